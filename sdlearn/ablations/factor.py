"""Ablation: how far the autoencoder shrinks an image, at equal training and nearly equal parameters.

Rombach et al. 2022, section 4.1, compare f = 1 to 32: a smaller f keeps more, and makes every step of the U-Net dearer.
Here all have four channels, so that f alone says how many numbers are kept.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from ..data import FULL, draw_scene
from ..diagnostics.costs import step_flops
from ..evaluation.metrics import ssim
from ..finetune.loop import train
from ..images import psnr, to_images, to_tensor
from ..pipeline import StableDiffusion
from ..training.loop import EMA
from ..training.vae import VAERecipe
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, evaluation_steps
from .drawing import ceiling

CHANNELS = {4: (16, 52, 164), 8: (16, 32, 64, 160), 16: (16, 32, 64, 96, 144)}     # 3.98 to 4.05 M parameters each
SHOWN = 6


def config_of(base: StableDiffusion, factor: int):
    """The base's config with an autoencoder of this factor."""
    vae = replace(base.config.vae, channels=CHANNELS[factor], layers_per_block=1, groups=2)
    return replace(base.config, vae=vae)


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant(f"f = {factor}", facts(base, factor), plan.steps, partial(run_variant, base, plan, factor))
            for factor in CHANNELS]


def facts(base: StableDiffusion, factor: int) -> dict[str, object]:
    """What follows from the factor alone."""
    config = config_of(base, factor)
    with torch.device("meta"):
        model = VAERecipe(config).model
    kept = config.vae.latent_channels * config.latent_size**2
    return {"factor": factor, "channels": list(config.vae.channels),
            "parameters": sum(p.numel() for p in model.parameters()), "numbers kept": kept,
            "numbers in an image": 3 * config.image_size**2,
            "GFLOPs of a U-Net step": step_flops(config.unet, config.latent_size) / 1e9}


def run_variant(base: StableDiffusion, plan: Plan, factor: int) -> Iterator[Measurement]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        recipe = VAERecipe(config_of(base, factor), batch_size=plan.batch)
    model, at = recipe.model.to(base.device), evaluation_steps(plan.steps)
    average = EMA(model, decay=0.995)
    unseen = to_tensor([draw_scene(seed, "test", FULL).image for seed in range(plan.unseen)])

    def loss(generator: torch.Generator):
        pixels, = recipe.batch(generator)
        with torch.random.fork_rng(devices=[]):     # the posterior's sample draws from the global generator
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return recipe.loss(model, pixels.to(base.device))[0]

    for done in train(model.parameters(), loss, max_steps=plan.steps, models=[model],
                      learning_rate=recipe.learning_rate, warmup=recipe.warmup, seed=plan.seed):
        step = done.index + 1
        average.update(model, step)
        if step not in at:
            yield Measurement(step)
            continue
        figures, pairs = round_trip(base, average.model, unseen)
        if step < plan.steps:
            yield Measurement(step, {"loss": done.loss, **figures})
            continue
        asked = measuring.make_prompts(measuring.get_world(base), plan.prompts)
        seen = ceiling(base, asked, lambda pixels: average.model.decode(average.model.encode(pixels).mode()))
        yield Measurement(step, {"loss": done.loss, **figures, **seen}, pairs,
                      [f"f = {factor}: scene {i}" for i in range(len(pairs))])


@torch.no_grad()
def round_trip(base: StableDiffusion, model, unseen: torch.Tensor) -> tuple[dict[str, float], list]:
    """PSNR in dB and SSIM of unseen scenes through the autoencoder and back, and the first of them."""
    decoded = torch.cat([model.decode(model.encode(part.to(base.device)).mode()).clamp(-1, 1).cpu()
                         for part in unseen.split(8)])
    return ({"psnr": float(psnr(decoded, unseen).mean()), "ssim": float(ssim(decoded, unseen).mean())},
            list(to_images(decoded[:SHOWN])))


FACTOR = Ablation(
    "factor", "what does a larger factor lose of an image, and what does it save in the U-Net?",
    "the autoencoder's factor f, pixels along one side of a latent cell",
    Plan(steps=900, batch=8, unseen=64, prompts=10), 12, variants, "small",
    ("batch: crops of 32 pixels, as in the recipe of the autoencoder; larger crops are fewer",
     "ceiling: what the judge says of real scenes through the autoencoder"), columns=SHOWN)
