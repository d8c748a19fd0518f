"""Ablation: diffusion on pixels against diffusion on latents, for the same number of floating-point operations.

Rombach et al. 2022, section 4.1. One network and one recipe; the pixels are scenes shrunk to 64 or to 32, since at 128
a step of the network costs some 70 times what it costs on latents and none would be left for learning.
"""

from collections.abc import Iterator
from dataclasses import replace
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
from .drawing import ceiling, draw, lesson, lesson_prompts, lesson_unet, scaled

SIDES = (64, 32)
SHOWN = 6


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    budget = plan.steps * step_flops(lesson_unet(base.parts), base.config.latent_size)     # forward, for one image
    found = [Variant("latents", facts(base, base.config.latent_size, base.vae.config.latent_channels, plan.steps),
                     plan.steps, partial(latents, base, plan))]
    for side in SIDES:
        steps = max(1, budget // step_flops(lesson_unet(on_pixels(base)), side))
        found.append(Variant(f"pixels {side}x{side}", facts(base, side, 3, steps), steps,
                             partial(shrunk_pixels, base, plan, side, steps)))
    return found


def facts(base: StableDiffusion, side: int, channels: int, steps: int) -> dict[str, object]:
    parts = base.parts if channels != 3 else on_pixels(base)
    return {"diffusion on": [channels, side, side], "steps": steps,
            "GFLOPs of a U-Net step": step_flops(lesson_unet(parts), side) / 1e9}


def on_pixels(base: StableDiffusion):
    """The base's parts for a U-Net that reads three channels; no autoencoder is used."""
    return replace(base.parts, config=replace(base.config, vae=replace(base.config.vae, latent_channels=3)))


def latents(base: StableDiffusion, plan: Plan) -> Iterator[Measurement]:
    material, unseen = encode_lesson_scenes(base, plan.scenes), encode_lesson_scenes(base, plan.unseen, "test")
    shape = (base.vae.config.latent_channels, base.config.latent_size, base.config.latent_size)
    return one_side(base, plan, base.parts, plan.steps, material, unseen, shape,
                    lambda x: base.vae.to_pixels(x, at_once=8), lambda pixels: base.vae.to_latent(pixels))


def shrunk_pixels(base: StableDiffusion, plan: Plan, side: int, steps: int) -> Iterator[Measurement]:
    material, unseen = (scenes_at(base, count, split, side) for count, split in
                        ((plan.scenes, "train"), (plan.unseen, "test")))
    full = base.config.image_size
    return one_side(base, plan, on_pixels(base), steps, material, unseen, (3, side, side),
                    lambda x: scaled(x.clamp(-1, 1), full), lambda pixels: scaled(pixels, side))


@lru_cache(maxsize=4)
def scenes_at(base: StableDiffusion, count: int, split: str, side: int) -> EncodedScenes:
    """The lesson's scenes as pixels, shrunk; the captions' features are those that latents have."""
    pixels = torch.cat([scaled(to_tensor([draw_scene(seed, split, LESSON_WORLD).image]), side)
                        for seed in range(count)])
    return EncodedScenes(pixels.clamp(-1, 1).to(base.device), encode_lesson_scenes(base, count, split).contexts)


def one_side(base, plan, parts, steps, material, unseen, shape, decode, encode) -> Iterator[Measurement]:
    def finish(unet) -> Measurement:
        asked = lesson_prompts(base, plan)
        texts = [one.text for one in asked]
        images = draw(base, unet, texts, guidance=plan.guidance, steps=plan.sampling_steps, shape=shape, decode=decode)
        figures = {**measuring.judge_shares(images, asked, base.device),
                   **ceiling(base, asked, lambda pixels: decode(encode(pixels)))}
        return Measurement(steps, figures, list(images[:SHOWN]), texts[:SHOWN])

    return lesson(parts, material, plan, steps=steps, finish=finish,
                  measure=lambda unet: shuffled_caption_losses(unet, base.schedule, unseen.latents, unseen.contexts))


PIXELS = Ablation(
    "pixels", "what is learnt from the same amount of arithmetic, on latents and on pixels?",
    "what diffusion works on: latents, or the pixels of scenes shrunk to 64 or 32 pixels",
    Plan(steps=1500, batch=32, scenes=1500, unseen=64, prompts=15, guidance=3.0, sampling_steps=20), 13, variants,
    "small", ("every variant has the same FLOPs of training, so they differ in steps; the U-Net's widths and the noise "
              "schedule are the same", "losses of latents and of pixels are not of one scale: compare the judge's "
              "shares", "ceiling: what the judge says of real scenes through the autoencoder, or shrunk and enlarged"),
    columns=SHOWN)
