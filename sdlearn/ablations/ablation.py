"""An ablation: variants that differ in one thing, under one plan, each a generator of measurements.

    for variant in dropout.variants(model, Plan(steps=200, ...)):
        for measurement in variant.run():
            ...                                 # measurement.step at each step; measurement.figures at some
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ..pipeline import StableDiffusion
from ..training.from_scratch import EncodedScenes, prepare_latents


@lru_cache(maxsize=4)
def encode_lesson_scenes(base: StableDiffusion, count: int, split: str = "train") -> EncodedScenes:
    """The first scenes of the world `classroom`, encoded once for all ablations that train on them."""
    return prepare_latents(base.parts, count, split=split)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The budget that all variants of an ablation share; None for what an ablation does not use."""

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
    """One step of a variant. `figures` are given at the steps at which something is measured."""

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    images: Sequence[np.ndarray] = ()             # uint8 (H, W, 3), all of one size
    captions: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Variant:
    """One side of the comparison. `run()` starts it from the beginning, with the same result at every call."""

    name: str
    changed: Mapping[str, object]       # what sets it apart from the others
    steps: int                          # how many it takes
    run: Callable[[], Iterator[Measurement]]


@dataclass(frozen=True, eq=False)
class Ablation:
    """The question of an ablation, what is varied, its plan and its variants."""

    name: str
    question: str
    varied: str
    plan: Plan                          # of a run in full length
    minutes: float                      # that this takes, roughly, on two idle CPU cores
    variants: Callable[[StableDiffusion, Plan], list[Variant]]
    network: str                        # "full": the shipped model itself; "small": a small one, trained from scratch
    notes: tuple[str, ...] = ()         # what to know when reading the figures
    columns: int = 6                    # of the sheet
    afford: Callable[[StableDiffusion, Plan, float], Plan] | None = None    # its own `running.fit_plan`


def evaluation_steps(steps: int, count: int = 8) -> set[int]:
    """Steps at which something is measured: `count` at equal distances, with the last step."""
    return {max(1, round(steps * i / count)) for i in range(1, count + 1)}


def early_evaluation_steps(steps: int) -> set[int]:
    """Steps at which something is measured where the first ones matter: 0, 1, 2, 5, 10, 20, 50 ... and the last."""
    return {0, steps, *(n * 10**i for i in range(len(str(steps))) for n in (1, 2, 5) if n * 10**i < steps)}
