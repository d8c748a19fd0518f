"""Exercises of notebook 04: Cross-attention."""

from ..exercise import Lesson

lesson = Lesson(4, "Cross-attention")
