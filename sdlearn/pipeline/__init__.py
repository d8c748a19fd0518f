"""Stable Diffusion as one object: prompts, pictures, masks and condition pictures become pictures."""

from .model import SHIPPED, SamplingStep, StableDiffusion, shipped
from .settings import NotFinite, Settings, SettingsError
from .task import make_control
from .words import LongPromptWarning, PromptWarning, UnknownWordWarning, unknown_words

__all__ = ["SHIPPED", "LongPromptWarning", "NotFinite", "PromptWarning", "SamplingStep", "Settings",
           "SettingsError", "StableDiffusion", "UnknownWordWarning", "make_control", "shipped",
           "unknown_words"]
