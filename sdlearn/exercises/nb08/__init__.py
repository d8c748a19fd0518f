"""Exercises of notebook 08: Inpainting."""

from ..exercise import Lesson

lesson = Lesson(8, "Inpainting")
