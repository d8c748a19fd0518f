"""Exercises of notebook 07: ControlNet."""

from ..exercise import Lesson

lesson = Lesson(7, "ControlNet")
