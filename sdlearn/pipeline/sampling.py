"""Where a run starts: noise, or an image with noise; and the network with what it is given beside the latent."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..controlnet import add_control
from ..inpaint import blended_denoise, latent_mask, masked_pixels, nine_channels, paste, repaint
from ..samplers import SAMPLERS, Denoise, Step
from ..schedule import Timesteps, seeded_noise
from ..vae import DiagonalGaussian
from .settings import SettingsError
from .task import PipelineInputs


def get_timesteps(grid: Timesteps, strength: float) -> Timesteps:
    """The last steps of a grid: the share `strength` of them, rounded down, as in diffusers."""
    count = int(len(grid) * strength)
    if count < 1:
        raise SettingsError(f"strength {strength:g} of {len(grid)} steps is less than one step; give more steps, or "
                            "more strength")
    return grid[len(grid) - count:]


class SamplingState:
    """The first latent of a run, `x` (B, C, h, w), and the network as the sampler sees it, `unet`.

    The random numbers of each image are drawn in diffusers' order: a sample of the image's latent, the noise, a
    sample of the masked image's latent; each only where it is needed.
    """

    def __init__(self, model, task: PipelineInputs, grid: Timesteps, generators: list[torch.Generator],
                 shape: tuple[int, ...]):
        self.schedule, self.grid, self.task, self.generators = model.schedule, grid, task, generators
        self.blends = task.mask is not None and not model.inpaints
        noised = task.mask is None or task.strength < 1     # an inpainting at full strength starts from noise alone
        self.known = self.mask = None
        if task.image is not None and (noised or self.blends):
            self.known = encode_to_latents(model, task.image, generators)                      # (B, C, h, w)
        noise = seeded_noise(shape[1:], generators) if task.latent is None else task.latent
        self.noise = noise.to(model.device)
        start = self.known is not None and noised
        self.x = self.schedule.add_noise(self.known, self.noise, grid[0][0]) if start else self.noise
        unet = model.network
        if task.mask is not None:
            self.mask = latent_mask(task.mask, model.config.vae.factor).to(self.x)   # (B, 1, h, w)
        if task.mask is not None and model.inpaints:
            masked = encode_to_latents(model, masked_pixels(task.image, task.mask), generators)
            unet = nine_channels(unet, self.mask.to(model.dtype), masked.to(model.dtype))
        self.unet = add_control(unet, task.controls, grid=grid, batch=shape[0]) if task.controls else unet

    def sample(self, denoise: Denoise, sampler: str) -> Iterator[Step]:
        """The steps of the sampler, held to the known region where the U-Net does not do so itself."""
        sample = SAMPLERS[sampler]
        if self.task.resample > 1:
            sample = repaint(sample, self.known, self.mask, times=self.task.resample)
        elif self.blends:
            denoise = blended_denoise(denoise, self.known, self.mask, self.noise, self.schedule)
        return sample(denoise, self.x, self.grid, self.schedule, generator=self.generators)

    def composite(self, x: Tensor) -> Tensor:
        """The last latent: of a blended inpainting with the image's own latent where nothing was to change."""
        return paste(self.known, x, self.mask) if self.blends else x


def encode_to_latents(model, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Scaled latents (B, C, h, w) in float32, each image's sampled with its own generator."""
    posterior = model.vae.encode(pixels.to(model.device, model.dtype))
    rows = [i % len(pixels) for i in range(len(generators))]
    samples = [DiagonalGaussian(posterior.mean[row:row + 1], posterior.logvar[row:row + 1]).sample(generator)
               for row, generator in zip(rows, generators, strict=True)]
    return torch.cat(samples).float() * model.config.vae.scaling_factor
