"""Exercises of notebook 06: Classifier-free guidance."""

from ..exercise import Lesson

lesson = Lesson(6, "Classifier-free guidance")
