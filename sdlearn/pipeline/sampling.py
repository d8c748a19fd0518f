"""The state of a run before its first step: the noisy latent, what inpainting needs, the network with its controls."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..controlnet import add_control
from ..inpaint import blended_denoise, latent_mask, masked_pixels, nine_channels, paste, repaint
from ..samplers import SAMPLERS, Denoise, Step
from ..schedule import seeded_noise
from ..vae import DiagonalGaussian
from .inputs import PipelineInputs


class SamplingState:
    """The first latent of a run, `x` (B, C, h, w), and the network as the sampler sees it, `unet`.

    The random numbers of each image are drawn in diffusers' order: a sample of the image's latent, the noise, a
    sample of the masked image's latent; each only where it is needed.
    """

    def __init__(self, model, inputs: PipelineInputs, generators: list[torch.Generator]):
        self.schedule, self.inputs, self.generators = model.schedule, inputs, generators
        shape, grid, masked = model.latent_shape(inputs), inputs.timesteps, inputs.mask is not None
        self.blends = masked and not model.inpaints
        noised = not masked or inputs.strength < 1          # an inpainting at full strength starts from noise alone
        self.known = self.mask = None
        if inputs.image is not None and (noised or self.blends):
            self.known = encode_to_latents(model, inputs.image, generators)                         # (B, C, h, w)
        noise = seeded_noise(shape[1:], generators) if inputs.latent is None else inputs.latent
        self.x = self.noise = noise.to(model.device)
        if self.known is not None and noised:
            self.x = self.schedule.add_noise(self.known, self.noise, grid[0][0])
        self.unet = model.network
        if masked:
            self.mask = latent_mask(inputs.mask, model.config.vae.factor).to(self.x)                # (B, 1, h, w)
        if masked and model.inpaints:
            known = encode_to_latents(model, masked_pixels(inputs.image, inputs.mask), generators)
            self.unet = nine_channels(self.unet, self.mask.to(model.dtype), known.to(model.dtype))
        if inputs.controls:
            self.unet = add_control(self.unet, inputs.controls, grid=grid, batch=inputs.batch)

    def sample(self, denoise: Denoise) -> Iterator[Step]:
        """The sampler's steps; where the U-Net takes no mask, blended with the known region or by RePaint."""
        sampler = SAMPLERS[self.inputs.sampler]
        if self.inputs.resample > 1:
            sampler = repaint(sampler, self.known, self.mask, times=self.inputs.resample)
        elif self.blends:
            denoise = blended_denoise(denoise, self.known, self.mask, self.noise, self.schedule)
        return sampler(denoise, self.x, self.inputs.timesteps, self.schedule, generator=self.generators)

    def composite(self, x: Tensor) -> Tensor:
        """The last latent, (B, C, h, w); after blended inpainting with the image's own latent outside of the mask."""
        return paste(self.known, x, self.mask) if self.blends else x


def encode_to_latents(model, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Scaled latents (B, C, h, w) in float32, each image's sampled from the VAE's posterior by its own generator.

    pixels: (B, 3, H, W) or (1, 3, H, W) in [-1, 1].
    """
    posterior = model.vae.encode(pixels.to(model.device, model.dtype))
    rows = [i % len(pixels) for i in range(len(generators))]
    samples = [DiagonalGaussian(posterior.mean[row:row + 1], posterior.logvar[row:row + 1]).sample(generator)
               for row, generator in zip(rows, generators, strict=True)]
    return torch.cat(samples).float() * model.config.vae.scaling_factor
