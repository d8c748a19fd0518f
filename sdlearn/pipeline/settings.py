"""How an image is made, beside its prompt, and what can be wrong with that."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from ..prompt import LONG
from ..samplers import SAMPLERS
from ..schedule import TIMESTEP_SPACINGS

MAX_SIDE = 2048         # pixels; beyond it attention takes hours and all memory
MAX_BATCH = 256         # images at once
MAX_RESAMPLE = 100      # times that a step of inpainting is done again


class SettingsError(ValueError):
    """A setting that no image can be made with; the message says what to give instead."""


class NotFinite(FloatingPointError):
    """The latent or the image holds NaN or infinity, which would be shown as black."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image is made, beside its prompt. Raises SettingsError for values that cannot be."""

    num_inference_steps: int | None = None      # None: the model's default, see config.SamplingConfig
    sampler: str = "dpmpp_2m"           # a key of samplers.SAMPLERS
    guidance_scale: float | None = None     # w in u + w (c - u), 1 is no guidance; None: the model's default
    guidance_rescale: float = 0.0       # of the guided output's contrast, 0...1 (Lin et al. 2023)
    guidance_interval: tuple[float, float] | None = None    # timesteps (low, high) between which to guide; None: all
    timestep_spacing: str | None = None     # one of schedule.SPACINGS; None: the sampler's own
    size: int | tuple[int, int] | None = None   # pixels, a side or (width, height); None: the image's or model's
    batch: int = 1                      # images
    seed: int = 0                       # of the first image; the next ones have seed + 1, seed + 2 ...
    long_prompts: str = "cut"           # past 77 tokens: "cut" off, or read in "chunks" of 75

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise SettingsError(f"there is no sampler '{self.sampler}'; choose one of {', '.join(SAMPLERS)}")
        if self.timestep_spacing not in (None, *TIMESTEP_SPACINGS):
            raise SettingsError(f"there is no timestep_spacing '{self.timestep_spacing}'; choose one of "
                                f"{', '.join(TIMESTEP_SPACINGS)}")
        if self.long_prompts not in LONG:
            raise SettingsError(f"long_prompts is '{self.long_prompts}'; choose one of {', '.join(LONG)}")
        for name, low, high in (("batch", 1, MAX_BATCH), ("seed", 0, 2**63 - MAX_BATCH)):
            if not whole(value := getattr(self, name), low, high):
                raise SettingsError(f"{name} is {value}; give a whole number from {low} to {high}")
        scale = self.guidance_scale
        if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
            raise SettingsError(f"guidance_scale is {scale}; give a finite number, 1 for none, or leave it out "
                                "for the model's default")
        if not isinstance(self.guidance_rescale, Real) or not 0 <= self.guidance_rescale <= 1:
            raise SettingsError(f"guidance_rescale is {self.guidance_rescale}; give a number from 0, off, to 1")


def check_strength(strength: float):
    """Raise SettingsError unless 0 < strength <= 1, the share of the noise that an image is given."""
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise SettingsError(f"strength is {strength}; give a number above 0, which would change nothing, "
                            "up to 1, which keeps nothing of the image")


def whole(value, low: int, high: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high


def as_settings_error(function: Callable, *arguments, **named):
    """A call whose ValueError says what is wrong with a setting."""
    try:
        return function(*arguments, **named)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; without one a GPU where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:     # PyTorch without CUDA raises the latter
        raise SettingsError(f"there is no device '{name}' here; leave it out for the best there is, "
                            "or give 'cpu'") from error


@contextmanager
def out_of_memory_as_error(what: str):
    """Turns the ways in which PyTorch runs out of memory into one MemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise MemoryError(f"not enough memory for the images ({what}); "
                              "ask for fewer or smaller ones") from error
        raise
