"""Stable Diffusion as one object: prompts, images, masks and condition images become images."""

from ..checkpoint.shipped import SHIPPED
from ..checkpoint.shipped import list_shipped_models as shipped
from .inputs import PipelineInputs, make_control
from .model import SamplingStep, StableDiffusion
from .prompt_warnings import LongPromptWarning, PromptWarning, UnknownWordWarning, unknown_words
from .settings import NotFinite, Settings, SettingsError
from .two_pass import two_pass

__all__ = ["SHIPPED", "LongPromptWarning", "NotFinite", "PipelineInputs", "PromptWarning", "SamplingStep", "Settings",
           "SettingsError", "StableDiffusion", "UnknownWordWarning", "make_control", "shipped", "two_pass",
           "unknown_words"]
