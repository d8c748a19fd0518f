"""Ablation: one training size against buckets of sizes, and what happens at sizes that were never seen.

A batch of the buckets has one size, drawn with its scenes, as in aspect-ratio bucketing. A smaller size is the whole
scene, shrunk, and not a crop, which could lose the object that the caption names.
"""

from collections.abc import Iterator
from functools import lru_cache, partial

import torch

from ..data import draw_scene
from ..data.world import CLASSROOM as LESSON_WORLD
from ..diagnostics.costs import step_flops
from ..images import to_tensor
from ..pipeline import StableDiffusion
from ..training.from_scratch import EncodedScenes
from ..training.unet import shuffled_caption_losses
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, encode_lesson_scenes
from .drawing import draw, lesson, lesson_prompts, lesson_unet, resized, scaled

PARTS = (1.0, 0.75, 0.5)                # of the base's size: 128, 96, 64 pixels
ASKED = (0.5, 0.75, 1.0, 1.25, 1.5)     # sizes of images; the last two are new to all variants
SHOWN = 2


class Buckets:
    """Latents of the same scenes at several sizes, indexed like one tensor; the first row says which size."""

    def __init__(self, latents: list[torch.Tensor]):
        self.latents, self.device = latents, latents[0].device

    def __len__(self) -> int:
        return len(self.latents[0])

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B,) -> (B, C, h, w), all of one size."""
        return self.latents[int(rows[0]) % len(self.latents)][rows]


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant(name, facts(base, parts), plan.steps, partial(run_variant, base, plan, parts))
            for name, parts in (("one size", PARTS[:1]), ("buckets", PARTS))]


def facts(base: StableDiffusion, parts: tuple[float, ...]) -> dict[str, object]:
    sides = [side_of(base, part) for part in parts]
    flops = [step_flops(lesson_unet(base.parts), side // base.vae.config.factor) / 1e9 for side in sides]
    return {"training sizes": sides, "mean GFLOPs of a U-Net step": sum(flops) / len(flops)}


def side_of(base: StableDiffusion, part: float) -> int:
    """Pixels: that part of the base's size, in whole latent cells."""
    return round(base.config.latent_size * part) * base.vae.config.factor


@lru_cache(maxsize=8)
@torch.no_grad()
def latents_at(base: StableDiffusion, count: int, split: str, side: int) -> torch.Tensor:
    """Latents (count, C, h, w) of the lesson's scenes, resized to `side` pixels."""
    if side == base.config.image_size:
        return encode_lesson_scenes(base, count, split).latents
    found = []
    for first in range(0, count, 32):
        drawn = [draw_scene(seed, split, LESSON_WORLD).image for seed in range(first, min(first + 32, count))]
        found.append(base.vae.to_latent(scaled(to_tensor(drawn), side).to(base.device)))
    return torch.cat(found)


def run_variant(base: StableDiffusion, plan: Plan, parts: tuple[float, ...]) -> Iterator[Measurement]:
    contexts = encode_lesson_scenes(base, plan.scenes).contexts
    latents = [latents_at(base, plan.scenes, "train", side_of(base, part)) for part in parts]
    material = EncodedScenes(Buckets(latents), contexts)
    return lesson(base.parts, material, plan, measure=partial(heard, base, plan), finish=partial(drawn_at, base, plan))


def heard(base: StableDiffusion, plan: Plan, unet) -> dict[str, float]:
    """The loss at two timesteps with right and with wrong captions, on unseen scenes of every training size."""
    contexts = encode_lesson_scenes(base, plan.unseen, "test").contexts
    return {f"{name}, {side}": value for side in (side_of(base, part) for part in PARTS) for name, value in
            shuffled_caption_losses(unet, base.schedule, latents_at(base, plan.unseen, "test", side), contexts).items()}


def drawn_at(base: StableDiffusion, plan: Plan, unet) -> Measurement:
    """Accuracy at each size, the images seen as large as the base's; the first images of each size."""
    asked, full, factor = lesson_prompts(base, plan), base.config.image_size, base.vae.config.factor
    figures, shown, captions = {}, [], []
    for side in (side_of(base, part) for part in ASKED):
        cells = side // factor
        images = resized(draw(base, unet, [one.text for one in asked], guidance=plan.guidance,
                              steps=plan.sampling_steps, shape=(base.vae.config.latent_channels, cells, cells)), full)
        shares = measuring.judge_shares(images, asked, base.device)
        figures |= {f"{name}, {side}": value for name, value in shares.items()}
        shown += list(images[:SHOWN])
        captions += [f"{side} px: {one.text}" for one in asked[:SHOWN]]
    return Measurement(plan.steps, figures, shown, captions)


SIZES = Ablation(
    "sizes", "what does a U-Net draw at sizes that it has never seen, trained at one size or at several?",
    "the sizes of the scenes in training: one, or three of which each batch has one",
    Plan(steps=1500, batch=32, scenes=1500, unseen=64, prompts=20, guidance=3.0, sampling_steps=20), 11, variants,
    "small", ("smaller sizes are whole scenes, shrunk; images of all sizes are brought to one size for the judge",
              "same steps and scenes for both; a step of the buckets takes less arithmetic"),
    columns=SHOWN * len(ASKED))
