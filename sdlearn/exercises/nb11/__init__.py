"""Exercises of notebook 11: The full GPU sampler."""

from ..exercise import Lesson

lesson = Lesson(11, "The full GPU sampler")
