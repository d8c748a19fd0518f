"""Stable Diffusion as one object: prompts, pictures, masks and condition pictures become pictures."""

from .model import SHIPPED, SamplingStep, StableDiffusion, shipped
from .settings import NotFinite, Settings, SettingsError
from .words import LongPromptWarning, PromptWarning, UnknownWordWarning, unknown_words

__all__ = ["SHIPPED", "LongPromptWarning", "NotFinite", "PromptWarning", "SamplingStep", "Settings",
           "SettingsError", "StableDiffusion", "UnknownWordWarning", "shipped", "unknown_words"]
