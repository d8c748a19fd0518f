"""Ablation: how many steps each sampler needs, on the trained model.

Two questions that are not the same: does the image show what was asked, and is it the image that many steps give?
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from ..pipeline import StableDiffusion
from ..samplers import SAMPLERS
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant
from .drawing import draw, resized

COUNTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)        # of steps; those up to the plan's are taken
CONVERGED = ("unipc", 100)              # of the highest order here: the image that deterministic samplers lead to
FRESH_NOISE = ("ddpm", "euler_ancestral")
ON_SHEET = (2, 5, 8, 20)                # counts of steps whose images are shown
CALLS = {"heun": 2}                     # of the network, for each step


def counts(plan: Plan) -> list[int]:
    return [count for count in COUNTS if count <= plan.steps]


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant(name, {"sampler": name, "calls of the U-Net a step": CALLS.get(name, 1),
                           "fresh noise at each step": name in FRESH_NOISE},
                    len(counts(plan)), partial(run_variant, base, plan, name)) for name in SAMPLERS]


@lru_cache(maxsize=2)
def converged(base: StableDiffusion, plan: Plan) -> tuple[list, np.ndarray]:
    """The prompts, and the images that many steps give, uint8 (B, H, W, 3)."""
    asked = measuring.make_prompts(measuring.get_world(base), plan.prompts)
    sampler, steps = CONVERGED
    return asked, draw(base, base.unet, [one.text for one in asked], guidance=plan.guidance, steps=steps,
                       sampler=sampler)


def run_variant(base: StableDiffusion, plan: Plan, sampler: str) -> Iterator[Measurement]:
    """A reading for each count of steps; the images come with the last."""
    asked, wanted = converged(base, plan)
    shown, captions = [], []
    for count in counts(plan):
        images = draw(base, base.unet, [one.text for one in asked], guidance=plan.guidance, steps=count,
                      sampler=sampler)
        if count in ON_SHEET:
            shown.append(resized(images[:1], images.shape[1] // 2)[0])
            captions.append(f"{sampler} {count}")
        last = count == counts(plan)[-1]
        figures = {**measuring.judge_shares(images, asked, base.device), "distance": distance(images, wanted)}
        yield Measurement(count, figures, shown if last else (), captions if last else ())


def distance(images: np.ndarray, wanted: np.ndarray) -> float:
    """The root mean square difference of images, uint8 (B, H, W, 3), with pixels in [-1, 1]."""
    return float(np.sqrt(np.mean(((images.astype(float) - wanted) / 127.5) ** 2)))


def afford(base: StableDiffusion, plan: Plan, minutes: float) -> Plan:
    """As many prompts as `minutes` allow, at least one of each kind; where even that is too much, fewer counts."""
    asked = measuring.make_prompts(measuring.get_world(base), 1)
    side = base.config.latent_size
    latent = torch.zeros(2 * len(asked), base.unet.config.in_channels, side, side, device=base.device)
    text = base.text_encoder.config
    context = torch.zeros(len(latent), text.length, text.dim, device=base.device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            float(base.unet(latent, 500, context).sum())        # waits for the device
            seconds.append(time.perf_counter() - start)
    each = sorted(seconds[1:])[1]                               # for one prompt of each kind, guided
    for most in (count for count in reversed(COUNTS) if count <= plan.steps):
        calls = CONVERGED[1] + sum(CALLS.get(name, 1) * count for name in SAMPLERS for count in COUNTS if count <= most)
        if most == COUNTS[3] or calls * each <= 60 * minutes * 0.8:
            prompts = max(1, min(plan.prompts, int(60 * minutes * 0.8 / (calls * each))))
            return replace(plan, steps=most, prompts=prompts)
    return replace(plan, prompts=1)


STEPS = Ablation(
    "steps", "how many steps does each sampler need to show what was asked, and for the image of many steps?",
    "the sampler, and how many steps it takes",
    Plan(steps=50, prompts=6, guidance=3.0), 10, variants, "full",
    (f"distance: to the images of {CONVERGED[0]} in {CONVERGED[1]} steps from the same noise, root mean square, "
     "pixels in [-1, 1]", f"{' and '.join(FRESH_NOISE)} draw fresh noise at each step and lead to other images; "
     "on one grid of timesteps, as with zero terminal SNR, the two are the same sampler",
     "step: the number of steps of sampling"), columns=2 * len(ON_SHEET), afford=afford)
