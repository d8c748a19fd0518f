"""Exercises of notebook 03: Noise and samplers."""

from ..exercise import Lesson

lesson = Lesson(3, "Noise and samplers")
