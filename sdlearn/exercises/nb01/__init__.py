"""Exercises of notebook 01: VAE latents."""

from ..exercise import Lesson

lesson = Lesson(1, "VAE latents")
