"""Prompts for a model's scenes, and how well images show them, by the judge."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ..data import CORE, World
from ..evaluation import Judge, Prompt, compute_scores, duplicate_rate, judge_images, load_judge
from ..evaluation.tasks import make_prompts as make_task_prompts
from ..pipeline import StableDiffusion

# Tasks of prompts that a world's scenes answer, by the form of scene.
TASKS = {"single": ("one object", "colours"), "count": ("counting",),
         "pair": ("two objects", "position", "colour binding")}


def check_model(base: StableDiffusion):
    """Raises ValueError for a model that ablations cannot build on."""
    if base.world is None:
        raise ValueError(f"'{base.config.name}' does not say which objects it was taught, so no prompt can be made for "
                         "it; take a model that was trained on the scenes")
    if base.config.unet.in_channels != base.config.vae.latent_channels:
        raise ValueError(f"'{base.config.name}' is an inpainting model; take the model that it was made from")


def get_world(base: StableDiffusion) -> World:
    """The world of scenes with the objects that a model was taught."""
    return World(tuple(base.world["objects"]), CORE.single, CORE.count, CORE.pair, CORE.triple)


def make_prompts(world: World, count: int) -> list[Prompt]:
    """`count` prompts of each task that the world's scenes answer."""
    tasks = [task for form, some in TASKS.items() if getattr(world, form) > 0 for task in some]
    return make_task_prompts(world.objects, count=count, tasks=tasks)


@lru_cache(maxsize=2)
def cached_judge(device: torch.device) -> Judge:
    return load_judge(device=device)


def judge_shares(images: Sequence[np.ndarray], prompts: Sequence[Prompt], device: torch.device) -> dict[str, float]:
    """Shares of images, uint8 (H, W, 3), that are right, have the right background, show more than was asked for.

    Raises CheckpointError where there is no judge.
    """
    verdicts = judge_images(images, prompts, cached_judge(device))
    shares = {"right": sum(one.right for one in verdicts) / len(verdicts),
              "background": compute_scores(prompts, verdicts).background,
              "more than asked": duplicate_rate(prompts, [one.detections for one in verdicts])}
    return {name: share for name, share in shares.items() if share is not None}
