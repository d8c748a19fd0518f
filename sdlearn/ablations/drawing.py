"""Images for an ablation: of prompts, with any network and any way from its latents to pixels.

B  batch        C, h, w  channels, rows and columns of what the network denoises        H, W  pixels
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import Parts
from ..config import CLASSROOM, UNetConfig
from ..data import World
from ..data.world import CLASSROOM as LESSON_WORLD
from ..diffusion import sample_latents
from ..evaluation import Prompt, compose_prompt_scene
from ..finetune.loop import Diverged
from ..images import to_images, to_tensor
from ..pipeline import StableDiffusion
from ..schedule import seeded_noise
from ..training.from_scratch import EncodedScenes, train_small_unet
from . import measuring
from .ablation import Measurement, Plan, evaluation_steps

AT_ONCE = 32            # images in a batch
Decode = Callable[[Tensor], Tensor]         # (B, C, h, w) -> pixels (B, 3, H, W)


@torch.no_grad()
def draw(base: StableDiffusion, unet: Callable, texts: Sequence[str], *, guidance: float, steps: int, shape=None,
         sampler: str = "dpmpp_2m", decode: Decode | None = None) -> np.ndarray:
    """Images of texts, uint8 (B, H, W, 3), image i from seed i.

    shape: (C, h, w) of what the network denoises, and decode how it becomes pixels: the base's own unless given.
    Raises Diverged for what is not finite.
    """
    shape = shape or (base.vae.config.latent_channels, base.config.latent_size, base.config.latent_size)
    decode = decode or (lambda latent: base.vae.to_pixels(latent, at_once=8))
    images = []
    for first in range(0, len(texts), AT_ONCE):
        some = list(texts[first:first + AT_ONCE])
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        context = base.text_encoder(base.tokenizer([*some, ""]).to(base.device)).hidden                 # (B + 1, M, T)
        latents = sample_latents(unet, base.schedule, seeded_noise(shape, generators), context[:-1], context[-1:],
                                 sampler=sampler, num_inference_steps=steps, guidance_scale=guidance,
                                 generator=generators)                                                  # (B, C, h, w)
        if not bool(latents.isfinite().all()):
            raise Diverged(f"the latent became NaN or infinite in {steps} steps of {sampler}")
        images.append(to_images(decode(latents)))
    return np.concatenate(images)


def resized(images: np.ndarray, side: int) -> np.ndarray:
    """Images, uint8 (B, H, W, 3), at another size, smoothed: (B, side, side, 3)."""
    return images if images.shape[1] == side else to_images(scaled(to_tensor(images), side))


def scaled(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, 3, H, W) at another size, smoothed against aliasing: (B, 3, side, side)."""
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)


def lesson_prompts(base: StableDiffusion, plan: Plan, world: World = LESSON_WORLD) -> list[Prompt]:
    return measuring.make_prompts(world, plan.prompts)


def ceiling(base: StableDiffusion, asked: Sequence[Prompt], through: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """What the judge says of real scenes that went through what the images go through, pixels in and out."""
    with torch.no_grad():
        pixels = to_tensor([compose_prompt_scene(one).image for one in asked]).to(base.device)
        images = np.concatenate([to_images(through(part)) for part in pixels.split(8)])
    return {f"ceiling: {name}": value for name, value in measuring.judge_shares(images, asked, base.device).items()}


def lesson_unet(parts: Parts) -> UNetConfig:
    """The U-Net that `train_small_unet` makes for these parts."""
    channels = parts.config.vae.latent_channels
    return replace(CLASSROOM.unet, context_dim=parts.config.text.dim, in_channels=channels, out_channels=channels)


def lesson(parts: Parts, material: EncodedScenes, plan: Plan, *, steps: int | None = None, dropout: float = 0.1,
           measure: Callable[[torch.nn.Module], dict[str, float]],
           finish: Callable[[torch.nn.Module], Measurement]) -> Iterator[Measurement]:
    """A U-Net from nothing, by `train_small_unet`: figures at eight of the steps, images at the last.

    measure, finish: given the averaged U-Net, the figures at a mark, and the figures, images and captions of the
    end. Raises Diverged.
    """
    steps = steps or plan.steps
    at = evaluation_steps(steps)
    for now in train_small_unet(parts, material, steps=steps, batch_size=plan.batch, dropout=dropout, seed=plan.seed):
        if now.step not in at:
            yield Measurement(now.step)
            continue
        figures = {"loss": now.loss, "seconds": now.seconds, **measure(now.parts.unet)}
        end = finish(now.parts.unet) if now.step == steps else Measurement(now.step)
        if not all(math.isfinite(value) for value in figures.values()):
            raise Diverged(f"what was measured at step {now.step} is not finite")
        yield Measurement(now.step, {**figures, **end.figures}, end.images, end.captions)
