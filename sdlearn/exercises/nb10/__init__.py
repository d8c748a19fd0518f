"""Exercises of notebook 10: Image sizes."""

from ..exercise import Lesson

lesson = Lesson(10, "Image sizes")
