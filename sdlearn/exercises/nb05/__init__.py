"""Exercises of notebook 05: The U-Net."""

from ..exercise import Lesson

lesson = Lesson(5, "The U-Net")
