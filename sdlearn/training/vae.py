"""Training the autoencoder: random crops of scenes, most of them where something is to be seen."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig
from ..data import FULL, SIDE, World, contact_sheet, scene
from ..pictures import psnr, save_sheet, to_images, to_tensor
from ..vae import VAE


def gradient_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How far the differences between neighbouring pixels are apart: what keeps a thin outline thin."""
    return sum((a.diff(dim=dim) - b.diff(dim=dim)).abs().mean() for dim in (2, 3))


def fresh_vae(config: ModelConfig) -> VAE:
    """An autoencoder to train from nothing: convolutions that keep the variance of what they pass on,
    and a posterior that starts narrow (standard deviation e^-3), so that the decoder sees the encoder
    and not its noise from the first step."""
    model = VAE(config.vae)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    nn.init.constant_(model.quant_conv.bias[config.vae.latent_channels:], -6.0)
    return model


# Sides of the crops and how often each is drawn. The autoencoder is convolutional, so small crops teach
# it most for their price; whole pictures keep GroupNorm's statistics honest.
CROPS = (32, 64, SIDE)
CROP_WEIGHTS = (6.0, 3.0, 1.0)


class VAERecipe:
    name = "vae"
    warmup = 100
    decay_share = 0.5

    def __init__(self, config: ModelConfig, *, world: World = FULL, batch_size: int = 8,
                 learning_rate: float = 1e-3, kl_weight: float = 3e-4, decoder_only: bool = False):
        """`batch_size` counts crops of 32 pixels. `decoder_only` freezes the encoder, so that latents
        made earlier stay valid."""
        self.model = fresh_vae(config)
        self.world, self.batch_size = world, batch_size
        self.learning_rate, self.kl_weight, self.decoder_only = learning_rate, kl_weight, decoder_only
        if decoder_only:
            self.model.encoder.requires_grad_(False)
            self.model.quant_conv.requires_grad_(False)

    def batch(self, generator: torch.Generator):
        crop = CROPS[int(torch.multinomial(torch.tensor(CROP_WEIGHTS), 1, generator=generator))]
        count = max(1, self.batch_size * CROPS[0] ** 2 // crop**2)
        seeds = torch.randint(2**40, (count,), generator=generator).tolist()
        return (to_tensor([self._crop(seed, crop) for seed in seeds]),)

    def _crop(self, seed: int, size: int) -> np.ndarray:
        rng = random.Random(seed)
        drawn = scene(seed, world=self.world)
        corner = []
        for middle in rng.choice(drawn.objects).centre:         # x, then y; up to a crop's half beside the object
            start = round(middle - size / 2 + rng.uniform(-0.5, 0.5) * size)
            corner.append(min(max(start, 0), SIDE - size))
        x, y = corner
        return drawn.image[y:y + size, x:x + size]

    def loss(self, model, pixels):
        """Outlines and flat colours compete for four numbers a cell, so each has a term of its own."""
        posterior = model.encode(pixels)
        decoded = model.decode(posterior.sample())
        absolute, squared = F.l1_loss(decoded, pixels), F.mse_loss(decoded, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        colour = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(pixels, 8))
        loss = absolute + 2 * squared + 0.3 * gradient_loss(decoded, pixels) + 2 * colour + self.kl_weight * kl
        return loss, {"l1": absolute, "mse": squared, "kl": kl}

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        device = next(averaged.parameters()).device
        shown = [scene(seed, "test", self.world) for seed in range(16)]
        pixels = to_tensor([s.image for s in shown]).to(device)
        latents = averaged.encode(pixels).mode()
        decoded = averaged.decode(latents)
        score = psnr(decoded, pixels)
        pairs = [np.concatenate([a, b], axis=1) for a, b in zip(to_images(pixels), to_images(decoded), strict=True)]
        sheet = contact_sheet(pairs, [f"{s.caption}: {p:.1f} dB" for s, p in zip(shown, score, strict=True)], columns=4)
        save_sheet(sheet, folder / f"{self.name}-{step:07d}.png")
        return {"psnr": float(score.mean()), "latent_std": float(latents.std())}


@torch.no_grad()
def measure_scaling(vae: VAE, count: int = 256, world: World = FULL) -> float:
    """One over the standard deviation of the latents of `count` scenes: SD's scaling factor, for this autoencoder."""
    latents = [vae.encode(to_tensor([scene(seed, world=world).image for seed in range(i, i + 16)])).mode()
               for i in range(0, count, 16)]
    return 1 / float(torch.cat(latents).std())
