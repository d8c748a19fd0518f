"""Exercises of notebook 02: CLIP conditioning."""

from ..exercise import Lesson

lesson = Lesson(2, "CLIP conditioning")
