"""The settings of a run: steps, sampler, guidance, size, seeds. And the errors of the pipeline."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from numbers import Real
from typing import TypeVar

import torch

from ..checks import check_whole
from ..prompt import LONG
from ..samplers import SAMPLERS
from ..schedule import TIMESTEP_SPACINGS

MAX_SIDE = 2048         # pixels; beyond it attention takes hours and all memory
MAX_BATCH = 256         # images at once
MAX_RESAMPLE = 100      # repetitions of each step of inpainting
Method = TypeVar("Method", bound=Callable)


class SettingsError(ValueError):
    """An argument that no image can be made with; the message says what to give instead."""


class NotFinite(FloatingPointError):
    """The latent or the image holds NaN or infinity, which would be shown as black."""


def setting(default, help: str, unset: str = ""):
    """A field of `Settings`. help: for docstrings and the command line; unset: what None stands for."""
    return field(default=default, metadata={"help": help, "unset": unset})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image is made, apart from its prompt. Raises SettingsError for values out of range."""

    num_inference_steps: int | None = setting(
        None, "steps of the sampler, from 1 to the schedule's number of timesteps", "the model's own")
    sampler: str = setting("dpmpp_2m", f"one of {', '.join(SAMPLERS)}")
    guidance_scale: float | None = setting(
        None, "w in u + w (c - u) of classifier-free guidance, any finite number; 1 is no guidance",
        "the model's own")
    guidance_rescale: float = setting(
        0.0, "0 to 1: how far the guided output gets the conditional one's standard deviation (Lin et al. 2023)")
    guidance_interval: tuple[float, float] | None = setting(
        None, "timesteps LOW and HIGH between which guidance applies, both included", "all of them")
    timestep_spacing: str | None = setting(None, f"one of {', '.join(TIMESTEP_SPACINGS)}", "the sampler's own")
    size: int | tuple[int, int] | None = setting(
        None, f"pixels, a side or width and height: multiples of the VAE's factor up to {MAX_SIDE}",
        "the size of the image or the hint, or the model's")
    batch: int = setting(1, f"number of images, 1 to {MAX_BATCH}")
    seed: int = setting(0, "at least 0, of the first image's random generator; the next ones have seed + 1 and so on")
    long_prompts: str = setting("cut", "past 77 tokens: cut off (\"cut\"), or encoded 75 at a time (\"chunks\")")

    def __post_init__(self):
        for name, values in (("sampler", SAMPLERS), ("timestep_spacing", (None, *TIMESTEP_SPACINGS))):
            if (value := getattr(self, name)) not in values:
                raise SettingsError(f"there is no {name} '{value}'; choose one of {', '.join(filter(None, values))}")
        if self.long_prompts not in LONG:
            raise SettingsError(f"long_prompts is '{self.long_prompts}'; choose one of {', '.join(LONG)}")
        as_settings_error(check_whole, "batch", self.batch, 1, MAX_BATCH)
        as_settings_error(check_whole, "seed", self.seed, 0, 2**63 - MAX_BATCH)
        scale, rescale = self.guidance_scale, self.guidance_rescale
        if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
            raise SettingsError(f"guidance_scale is {scale}; give a finite number, 1 for none, or leave it out for the "
                                "model's default")
        if not isinstance(rescale, Real) or not 0 <= rescale <= 1:
            raise SettingsError(f"guidance_rescale is {rescale}; give a number from 0, off, to 1")


def document_settings(method: Method) -> Method:
    """A decorator that adds the arguments that are fields of `Settings` to a docstring."""
    lines = [f"    {one.name}: {one.metadata['help']}" + (f"; None: {one.metadata['unset']}" if one.default is None
                                                           else f"; default {one.default}") for one in fields(Settings)]
    method.__doc__ = "\n".join([cleandoc(method.__doc__), "", "Settings:", *lines])
    return method


def as_settings_error(function: Callable, *arguments, **named):
    """Call a function; a ValueError that it raises becomes a SettingsError."""
    try:
        return function(*arguments, **named)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; for None a GPU where there is one, else the CPU. Raises SettingsError."""
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
    """Raises one MemoryError for all ways in which PyTorch runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise MemoryError(f"not enough memory for the images ({what}); "
                              "ask for fewer or smaller ones") from error
        raise
