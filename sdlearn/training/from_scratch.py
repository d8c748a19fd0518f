"""Training of a small U-Net from nothing, in minutes, on the autoencoder and the encoders of a finished model.

    scenes = prepare_latents(model.parts)
    for state in train_small_unet(model.parts, scenes, minutes=5):
        ...                                             # state.loss, state.samples; an image between two steps:
    StableDiffusion(state.parts).text2img("a red star on a blue background", guidance_scale=3)

All is in memory, and nothing is left behind. The recipe is that of `training.unet` with a smaller network, a
smaller world, and a learning rate that falls to zero within the lesson.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ..checkpoint import Parts
from ..config import CLASSROOM as CONFIG
from ..data import World, draw_scene
from ..data.world import CLASSROOM as WORLD
from ..finetune.loop import diffusion_loss, draw_indices, optimise
from ..schedule import NoiseSchedule
from ..unet import UNet
from .loop import EMA
from .unet import encode_scenes, shuffled_caption_losses


@dataclass(frozen=True, eq=False)
class EncodedScenes:
    """What is learnt from: latents (N, C, h, w) and text features (N, L, D) of scenes."""

    latents: torch.Tensor
    contexts: torch.Tensor


@dataclass(frozen=True, eq=False)
class TrainState:
    """How far it is. `parts` is the whole model with the averaged U-Net, which goes on changing."""

    step: int
    samples: int
    seconds: float              # of training; whatever is done between two steps does not count
    loss: float                 # running mean
    parts: Parts


def prepare_latents(parts: Parts, count: int = 1500, *, split: str = "train", world: World = WORLD) -> EncodedScenes:
    """Encode the first `count` scenes of a split: some 70 a second on two CPU cores."""
    found = []
    for first in tqdm(range(0, count, 50), desc="scenes", unit="scene", unit_scale=50):
        drawn = [draw_scene(seed, split, world) for seed in range(first, min(first + 50, count))]
        found.append(encode_scenes(drawn, parts.vae, parts.text_encoder, parts.tokenizer))
    return EncodedScenes(*(torch.cat(part) for part in zip(*found, strict=True)))


def train_small_unet(parts: Parts, material: EncodedScenes, *, minutes: float = 5.0, steps: int | None = None,
                     batch_size: int = 32, learning_rate: float = 1.5e-3, dropout: float = 0.1,
                     seed: int = 0) -> Iterator[TrainState]:
    """Train a fresh U-Net of the preset `classroom` for so many minutes, or steps where they are given.

    dropout: the share of captions replaced by the empty one, for guidance. Raises ValueError for a budget,
    a batch or a rate that is not above zero, Diverged when the loss is no longer a number.
    """
    for what, value in (("minutes", minutes), ("batch size", batch_size), ("learning rate", learning_rate),
                        ("number of steps", 1 if steps is None else steps)):
        if not 0 < value < math.inf:
            raise ValueError(f"the {what} is {value}: give a number above 0")
    return _learn(parts, material, 60 * minutes, steps, batch_size, learning_rate, dropout, seed)


def _learn(parts, material, budget, steps, batch_size, learning_rate, dropout, seed):
    generator = torch.Generator().manual_seed(seed)
    config = replace(CONFIG.unet, context_dim=parts.config.text.dim, in_channels=parts.config.vae.latent_channels,
                     out_channels=parts.config.vae.latent_channels)
    with torch.random.fork_rng(devices=[]):                     # the first weights are the seed's, too
        torch.manual_seed(seed)
        unet = UNet(config).to(material.latents.device, memory_format=torch.channels_last)
    average, schedule = EMA(unet, decay=0.995), NoiseSchedule(parts.config.noise)
    whole = replace(parts, unet=average.model, config=replace(parts.config, name=CONFIG.name, unet=config))
    with torch.no_grad():
        empty = parts.text_encoder(parts.tokenizer("").to(material.contexts.device)).hidden                     # 1 L D
    optimiser = torch.optim.AdamW(unet.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=True)
    step, seconds, mean, start = 0, 0.0, math.nan, 0.0

    def rates() -> Iterator[float]:
        """A short warm-up, then half a cosine to zero."""
        nonlocal start
        while (step < steps) if steps else (seconds < budget):
            start = time.perf_counter()
            share = step / steps if steps else seconds / budget
            yield learning_rate * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * share))

    def loss() -> torch.Tensor:
        rows = draw_indices(len(material.latents), batch_size, generator)
        dropped = torch.rand(len(rows), generator=generator) < dropout
        contexts = torch.where(dropped[:, None, None].to(empty.device), empty, material.contexts[rows])
        return diffusion_loss(unet, schedule, material.latents[rows], contexts, generator)

    for done in optimise(optimiser, list(unet.parameters()), loss, rates()):
        step += 1
        average.update(unet, step)
        mean = done.loss if step == 1 else mean + (done.loss - mean) * 0.02
        seconds += time.perf_counter() - start
        yield TrainState(step, step * batch_size, seconds, mean, whole)


def shuffled_losses_of(lesson: TrainState, material: EncodedScenes) -> dict[str, float]:
    """The loss on scenes (unseen ones, if `material` was prepared from them) with right and with wrong captions."""
    schedule = NoiseSchedule(lesson.parts.config.noise)
    return shuffled_caption_losses(lesson.parts.unet, schedule, material.latents, material.contexts)
