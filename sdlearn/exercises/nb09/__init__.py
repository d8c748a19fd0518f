"""Exercises of notebook 09: Personalisation."""

from ..exercise import Lesson

lesson = Lesson(9, "Personalisation")
