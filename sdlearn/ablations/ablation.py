"""What an ablation is: variants that differ in one thing, under one plan, each a generator of readings.

B  batch        H, W  pixels

    for variant in dropout.variants(base, Plan(steps=200, ...)):
        for reading in variant.readings():
            ...                                 # reading.step at each step; reading.figures at some

Judging images is another room's work, so whoever runs an ablation brings `Measures`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Parts
from ..data import CORE, World
from ..schedule import NoiseSchedule
from ..training.from_scratch import EncodedScenes, prepare_latents


class Asked(Protocol):
    """A prompt that can be checked, as `Measures.ask` makes them; more of it is the judge's affair."""

    text: str


@dataclass(frozen=True, eq=False)
class Measures:
    """How images, uint8 (H, W, 3), are measured."""

    ask: Callable[[World, int], list[Asked]]        # prompts: so many of each kind of scene that a world shows
    judge: Callable[[Sequence[np.ndarray], Sequence[Asked]], dict[str, float]]  # shares of images, by what is right
    show: Callable[[Asked], np.ndarray]             # a real scene of what was asked
    ssim: Callable[[Tensor, Tensor], Tensor]        # of pixels (B, 3, H, W) in [-1, 1]: (B,)


@dataclass(frozen=True, eq=False)
class Base:
    """The trained model that ablations build on, and the measures. It serves fine-tuning as a model."""

    parts: Parts
    measures: Measures

    def __post_init__(self):
        config = self.parts.config
        if self.parts.world is None:
            raise ValueError(f"'{config.name}' does not say which objects it was taught, so no prompt can be made for "
                             "it; take a model that was trained on the scenes")
        if config.unet.in_channels != config.vae.latent_channels:
            raise ValueError(f"'{config.name}' is an inpainting model; take the model that it was made from")

    @property
    def device(self) -> torch.device:
        return self.parts.unet.conv_in.weight.device

    @property
    def world(self) -> World:
        """The scenes of the objects that the base was taught."""
        return World(tuple(self.parts.world["objects"]), CORE.single, CORE.count, CORE.pair, CORE.triple)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.parts.config.noise)

    @property
    def tokenizer(self):
        return self.parts.tokenizer

    @property
    def text_encoder(self):
        return self.parts.text_encoder

    @property
    def vae(self):
        return self.parts.vae

    @property
    def unet(self):
        return self.parts.unet

    @property
    def cells(self) -> int:
        """Rows and columns of a latent at the base's own size."""
        return self.parts.config.image_size // self.vae.config.factor


@lru_cache(maxsize=4)
def encode_lesson_scenes(base: Base, count: int, split: str = "train") -> EncodedScenes:
    """The first scenes of the lesson's world, encoded once for all ablations that learn from them."""
    return prepare_latents(base.parts, count, split=split)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The budget that all variants of an ablation share. What an ablation has no use for is None."""

    steps: int                          # of training; in the ablation of samplers the most of sampling
    batch: int | None = None
    scenes: int | None = None           # to learn from
    unseen: int | None = None           # scenes on which losses are measured
    prompts: int | None = None          # of each kind, one image for each
    guidance: float | None = None
    sampling_steps: int | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Measurement:
    """One step of a variant. `figures` are there at the steps at which something is measured."""

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[np.ndarray] = ()             # uint8 (H, W, 3), all of one size
    captions: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Variant:
    """One side of the comparison. `run()` starts it from nothing, the same at every call."""

    name: str
    changed: Mapping[str, object]       # what sets it apart from the others
    steps: int                          # how many it takes
    run: Callable[[], Iterator[Measurement]]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What is asked and what is varied; with a plan, the variants."""

    name: str
    question: str
    varied: str
    plan: Plan                          # of a run that is not cut short
    minutes: float                      # that this takes, roughly, on two idle CPU cores
    variants: Callable[[Base, Plan], list[Variant]]
    network: str                        # "full": the shipped model itself; "small": one of a lesson, from nothing
    notes: tuple[str, ...] = ()         # what to know when reading the figures
    columns: int = 6                    # of the sheet
    afford: Callable[[Base, Plan, float], Plan] | None = None   # a plan within so many minutes, where steps do not tell


def evaluation_steps(steps: int, count: int = 8) -> set[int]:
    """Steps at which something is measured: `count` in equal distances, the last among them."""
    return {max(1, round(steps * i / count)) for i in range(1, count + 1)}


def early_evaluation_steps(steps: int) -> set[int]:
    """Steps at which something is measured where the first ones matter: 0, 1, 2, 5, 10, 20, 50 ... and the last."""
    return {0, steps, *(n * 10**i for i in range(len(str(steps))) for n in (1, 2, 5) if n * 10**i < steps)}
