"""Training of the autoencoder on random crops of scenes, taken around objects, with noise on the latent."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig
from ..data import CORE, FULL, SIDE, World, contact_sheet, draw_scene
from ..images import psnr, save_sheet, to_images, to_tensor
from ..vae import VAE


def gradient_loss(a: torch.Tensor, b: torch.Tensor, scales: int = 1) -> torch.Tensor:
    """L1 distance of the differences between neighbouring pixels, which keeps thin outlines thin.

    a, b: pixels (B, 3, H, W). scales: how many resolutions to average over, each half of the one before.
    """
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        total = total + sum((a.diff(dim=dim) - b.diff(dim=dim)).abs().mean() for dim in (2, 3))
    return total / scales


def chroma(pixels: torch.Tensor) -> torch.Tensor:
    """Colour without luminance: each channel less the mean of the three, (B, 3, H, W)."""
    return pixels - pixels.mean(dim=1, keepdim=True)


def deviation_imbalance(latents: torch.Tensor) -> torch.Tensor:
    """Mean squared log-ratio of each channel's standard deviation to their mean: 0 where all are equal.

    One scaling factor serves all channels, so a channel of smaller deviation is buried by noise earlier.
    """
    deviations = latents.transpose(0, 1).flatten(1).std(dim=1)                         # (Z,)
    return (deviations / deviations.mean()).clamp(min=1e-6).log().square().mean()


def init_vae(config: ModelConfig) -> VAE:
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
# it most for their price; whole images keep GroupNorm's statistics honest.
CROPS = (32, 64, SIDE)
CROP_WEIGHTS = (5.0, 3.0, 2.0)
CORE_SHARE = 0.7            # of the crops that show the U-Net's own objects; the others show any object
SMALLEST_SHARE = 0.5        # of the crops taken around the smallest object of their scene, where most detail is lost


class VAERecipe:
    name = "vae"
    warmup = 100
    decay_share = 0.5

    def __init__(self, config: ModelConfig, *, world: World | None = None, batch_size: int = 8,
                 learning_rate: float = 1e-3, kl_weight: float = 3e-4, latent_noise: float = 0.15,
                 decoder_only: bool = False):
        """`batch_size` counts crops of 32 pixels. `world`: draw scenes of it alone, in place of the usual mixture.

        `latent_noise`: the decoder learns from latents with Gaussian noise of a deviation drawn from 0 to this, in
        units of the latents' own deviation; generated latents are about as far from encoded ones. `decoder_only`
        freezes the encoder, so that latents already computed stay valid.
        """
        self.model = init_vae(config)
        self.worlds = (CORE, FULL) if world is None else (world,)
        self.batch_size, self.learning_rate, self.kl_weight = batch_size, learning_rate, kl_weight
        self.latent_noise, self.decoder_only = latent_noise, decoder_only
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
        world = self.worlds[0] if rng.random() < CORE_SHARE else self.worlds[-1]
        drawn = draw_scene(seed, world=world)
        if rng.random() < SMALLEST_SHARE:
            centre = min(drawn.objects, key=lambda placed: max(placed.extent)).centre
        else:
            centre = rng.choice(drawn.objects).centre
        corner = []
        for middle in centre:                           # x, then y; up to half a crop away from the object's centre
            start = round(middle - size / 2 + rng.uniform(-0.5, 0.5) * size)
            corner.append(min(max(start, 0), SIDE - size))
        x, y = corner
        return drawn.image[y:y + size, x:x + size]

    def loss(self, model, pixels):
        """Outlines, flat colours and hues compete for four numbers a cell, so each has a term of its own."""
        posterior = model.encode(pixels)
        decoded = model.decode(self.with_noise(posterior.sample()))
        absolute, squared = F.l1_loss(decoded, pixels), F.mse_loss(decoded, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        flat = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(pixels, 8))
        hue = F.l1_loss(chroma(decoded), chroma(pixels))
        imbalance = 0.0 if self.decoder_only else deviation_imbalance(posterior.mean)
        loss = (absolute + 2 * squared + 0.5 * gradient_loss(decoded, pixels, scales=2) + 2 * flat + hue
                + self.kl_weight * kl + 0.02 * imbalance)
        return loss, {"l1": absolute, "mse": squared, "kl": kl}

    def with_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, Z, h, w) with noise of a deviation that is drawn for each image.

        The deviation of the batch is part of the gradient: with a constant in its place the encoder would learn to
        make latents ever larger, which outgrows the noise of one step and gains nothing.
        """
        share = torch.rand(len(latents), 1, 1, 1, device=latents.device)
        return latents + share * self.latent_noise * latents.std() * torch.randn_like(latents)

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        device = next(averaged.parameters()).device
        shown = [draw_scene(seed, "test", self.worlds[0]) for seed in range(16)]
        pixels = to_tensor([s.image for s in shown]).to(device)
        latents = averaged.encode(pixels).mode()
        decoded = averaged.decode(latents)
        score = psnr(decoded, pixels)
        pairs = [np.concatenate([a, b], axis=1) for a, b in zip(to_images(pixels), to_images(decoded), strict=True)]
        sheet = contact_sheet(pairs, [f"{s.caption}: {p:.1f} dB" for s, p in zip(shown, score, strict=True)], columns=4)
        save_sheet(sheet, folder / f"{self.name}-{step:07d}.png")
        return {"psnr": float(score.mean()), "latent_std": float(latents.std()),
                **{f"psnr with noise {noise}": value["PSNR"]
                   for noise, value in reconstruction_under_noise(averaged, count=40).items()}}


@torch.no_grad()
def reconstruction_under_noise(vae: VAE, noises: tuple[float, ...] = (0.0, 0.1, 0.15), count: int = 80,
                               world: World = CORE) -> dict[float, dict[str, float]]:
    """PSNR in dB of `count` unseen scenes decoded from latents with noise: mean over scenes, over small objects' boxes.

    The noise's deviation is in units of the deviation of these scenes' latents. The same noise for every autoencoder.
    """
    drawn = [draw_scene(seed, "test", world) for seed in range(count)]
    device = next(vae.parameters()).device
    pixels = to_tensor([one.image for one in drawn])                                    # (count, 3, H, W)
    latents = torch.cat([vae.encode(part.to(device)).mode() for part in pixels.split(16)])
    unit = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device) * latents.std()
    figures = {}
    for noise in noises:
        parts = (latents + noise * unit).split(16)
        decoded = torch.cat([vae.decode(part).clamp(-1, 1).cpu() for part in parts])
        small = [psnr(decoded[i:i + 1, :, top:bottom, left:right], pixels[i:i + 1, :, top:bottom, left:right])
                 for i, one in enumerate(drawn) for placed in one.objects if placed.size == "small"
                 for left, top, right, bottom in [placed.box]]
        figures[noise] = {"PSNR": float(psnr(decoded, pixels).mean()), "small objects": float(torch.cat(small).mean())}
    return figures


@torch.no_grad()
def measure_scaling_factor(vae: VAE, count: int = 256, world: World = FULL) -> float:
    """One over the standard deviation of the latents of `count` scenes: SD's scaling factor, for this autoencoder."""
    latents = [vae.encode(to_tensor([draw_scene(seed, world=world).image for seed in range(i, i + 16)])).mode()
               for i in range(0, count, 16)]
    return 1 / float(torch.cat(latents).std())
