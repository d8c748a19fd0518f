"""Inpainting: masks, the nine-channel U-Net, blending of latents, and RePaint.

B  batch    C, h, w  channels, rows and columns of the latent    H, W  pixels

A mask is 1 where the image is to be repainted and 0 where it is known. Either the U-Net was trained
to read it (`nine_channels`, Rombach et al. 2022), or the known cells replace those of x at every call of a plain one
(`blended_denoise`), if wanted several times a step (`repaint`, Lugmayr et al. 2022). In each case the pixels
outside of the mask have been through the autoencoder; `paste` puts the original ones back.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import NoiseSchedule, Timesteps, standard_noise

Denoise = Callable[[Tensor, float], Tensor]
Sampler = Callable[..., Iterator]           # one of `samplers`


# --- masks ------------------------------------------------------------------------------------------

def binary_mask(mask, size: tuple[int, int] | None = None, *, threshold: bool = False) -> Tensor:
    """A mask as (B, 1, H, W) of 0.0 and 1.0, 1 where the image is to be repainted.

    mask: a PIL image, an array or a tensor, (H, W) or (B, 1, H, W), of booleans, of 0 and 1, or of bytes
    0 and 255. threshold: take values between as well, 1 from a half on, as Stable Diffusion does.
    size: the image's (H, W). Raises ValueError for another size, for other values, and for a mask
    that is 0 everywhere, with which nothing could be done.
    """
    if hasattr(mask, "convert") and mask.mode not in ("1", "L"):        # a PIL image in colours
        mask = mask.convert("L")
    mask = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
    if mask.ndim == 2:
        mask = mask[None, None]                                                      # (1, 1, H, W)
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"the mask is {tuple(mask.shape)}: give (rows, columns) or (batch, 1, rows, columns)")
    if size is not None and tuple(mask.shape[2:]) != tuple(size):
        raise ValueError(f"the mask is {_sides(mask)} pixels (height x width), but the image is "
                         f"{size[0]} x {size[1]}: resize the mask")
    bytes_given = not mask.is_floating_point() and mask.dtype != torch.bool and bool((mask > 1).any())
    values = mask.float() / 255 if bytes_given else mask.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("the mask has values outside of 0...1 (0...255 in bytes): scale it first")
    binary = (values >= 0.5).float()
    if not threshold and not torch.equal(binary, values):
        raise ValueError("the mask is not binary, it has values between 0 and 1 (0 and 255 in bytes): "
                         "binary_mask(mask, threshold=True) makes it 1 where it is at least a half")
    if not bool(binary.flatten(1).any(dim=1).all()):
        raise ValueError("the mask is 0 everywhere, so nothing would be repainted: make it 1 where the "
                         "image is to change")
    return binary


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask of pixels (B, 1, H, W) at the latent's size (B, 1, H/factor, W/factor).

    The nearest pixel decides, as in Stable Diffusion: a cell is repainted if its upper left pixel is.
    Raises ValueError for sides that are no multiples of `factor`, and where no cell is left.
    """
    if any(side % factor for side in mask.shape[2:]):
        raise ValueError(f"the mask is {_sides(mask)} pixels (height x width): give sides that are multiples "
                         f"of {factor}")
    cells = F.interpolate(mask, size=[side // factor for side in mask.shape[2:]], mode="nearest")
    if mask.device.type != "meta" and not bool(cells.flatten(1).any(dim=1).all()):
        raise ValueError(f"the mask is too thin for the latent, whose cells are {factor} x {factor} pixels: "
                         "repaint a larger area")
    return cells


def masked_pixels(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], grey (0) where they are to be repainted: what the VAE encodes for
    `nine_channels`. Raises ValueError for a mask of another size."""
    _same_size("mask", mask, "image", pixels)
    return pixels * (mask < 0.5)


def soft_mask(mask: Tensor, seam: int) -> Tensor:
    """A mask (B, 1, H, W) that falls from 1 to 0 in equal steps outside of itself, over `seam` pixels.

    It stays 1 inside, where the original must not shine through.
    """
    if seam < 0:
        raise ValueError(f"the seam is {seam} pixels wide: give 0, a hard edge, or more")
    ring, total = mask, mask
    for _ in range(seam):
        ring = F.max_pool2d(ring, 3, stride=1, padding=1)       # one pixel wider
        total = total + ring
    return total / (seam + 1)


def paste(original: Tensor, generated: Tensor, mask: Tensor, *, seam: int = 0) -> Tensor:
    """The original where the mask is 0, the generated where it is 1, a blend over `seam` pixels outside of it.

    Images (B, 3, H, W) with a mask of pixels, or latents (B, C, h, w) with a mask of cells. Outside of
    mask and seam the result is the original, bit for bit. Raises ValueError for sizes that differ.
    """
    _same_size("generated image", generated, "original", original)
    _same_size("mask", mask, "original", original)
    return torch.lerp(original, generated, soft_mask(mask, seam).to(original))


# --- inpainting with the known region -----------------------------------------------------------------

def nine_channels(unet: Callable[..., Tensor], mask: Tensor, masked_latent: Tensor) -> Callable[..., Tensor]:
    """An inpainting U-Net as a function of the latent alone: (x, t, context, residuals=None, cache=None) -> output.

    At each call it reads the latent (4 channels), the mask (1) and the masked image's latent (4), in
    this order. mask (B, 1, h, w), masked_latent (B, 4, h, w), the VAE's latent of `masked_pixels`; or a
    batch of 1 for all. Where x holds the batch twice, as guidance's [u; c] does, both halves read the
    same. `controlnet.add_control` takes the result as its U-Net. Raises ValueError for sizes that differ,
    and for a U-Net that does not read so many channels.
    """
    _same_size("mask", mask, "masked latent", masked_latent)
    count = max(len(mask), len(masked_latent))
    if count % len(mask) or count % len(masked_latent):
        raise ValueError(f"{len(mask)} masks do not go with {len(masked_latent)} masked latents: give one, or "
                         "one for each")
    conditioning = torch.cat([mask.to(masked_latent).expand(count, -1, -1, -1),
                        masked_latent.expand(count, -1, -1, -1)], dim=1)             # (B, 5, h, w)
    reads = getattr(getattr(unet, "config", None), "in_channels", None)
    if reads not in (None, 2 * masked_latent.shape[1] + 1):
        raise ValueError(f"this U-Net reads {reads} channels and is no inpainting model, which reads "
                         f"{2 * masked_latent.shape[1] + 1}: use blended_denoise, or load an inpainting model")

    def run(x: Tensor, t: float, context: Tensor, residuals=None, **options) -> Tensor:
        _same_size("mask", conditioning, "latent", x)
        if len(x) % count:
            raise ValueError(f"{count} masks do not go with {len(x)} latents: give one for all, or one for each")
        tiled = conditioning.to(x).repeat(len(x) // count, 1, 1, 1)                        # (B, 5, h, w)
        return unet(torch.cat([x, tiled], dim=1), t, context, residuals, **options)

    return run


def blended_denoise(denoise: Denoise, known: Tensor, mask: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Denoise:
    """A `denoise` whose known cells are fixed, for inpainting with a U-Net that reads no mask.

    known: the image's latent, and noise, each (B, C, h, w); mask (B, 1, h, w), 1 = repaint. A batch of 1
    serves all. Before each call the known cells of x are replaced by alpha_t known + sigma_t noise, and
    after it those of x0 by `known`.

    This is what diffusers' StableDiffusionInpaintPipeline does with a four-channel U-Net, by other means.
    A step of any sampler works cell by cell, x_prev = a x + b x0 + noise with numbers a and b (and earlier
    x0), so a known cell influences a repainted one through the network alone. The pipeline writes
    add_noise(known, noise, t_prev) into the sampler's state after each step, for the next call to see;
    here the same is written into what the call sees. Each call sees the same, so the repainted cells are
    the same. There are two differences. The pipeline's first call, if it starts from noise alone (strength 1),
    sees noise alone in the known cells too; here known cells are never without their signal. At its end
    the pipeline writes `known` itself; so does every sampler here that ends at x0, but DDIM and PNDM end
    at the noise of timestep 0, after which `paste(known, x, mask)` does.
    """
    _same_size("mask", mask, "known latent", known)
    _same_size("noise", noise, "known latent", known)
    keep, noise = (mask < 0.5).to(known.device), noise.to(known)                     # (B, 1, h, w), (B, C, h, w)

    def denoise_blended(x: Tensor, t: float) -> Tensor:
        _same_size("mask", mask, "latent", x)
        x = torch.where(keep, schedule.add_noise(known, noise, t), x)
        return torch.where(keep, known, denoise(x, t))

    return denoise_blended


def repaint(sample: Sampler, known: Tensor, mask: Tensor, *, times: int = 10) -> Sampler:
    """A sampler that takes each step of `sample` several times, for inpainting in which both parts agree.

        for step in repaint(ddpm, known, mask)(denoise, x, timesteps, schedule, generator=generator): ...

    With `blended_denoise` the known cells are right but drawn without regard to the others, which follow a step
    late. Here, after a step to t_prev, noise is added as the forward process would, back up to t, and the
    step is taken again with new noise in the known cells, `times` in all; the last step, to the image,
    once. Lugmayr et al. 2022, "RePaint", algorithm 1 (jumps of length 1); theirs is DDPM, with 10 times.

    The result is a sampler as well: it yields the Step of the last pass over each pair of timesteps. With
    one call of `denoise` a step, n steps take (n - 1) times + 1. Samplers that look back at earlier steps,
    as DPM++ 2M does, find none here, and are of first order. Raises ValueError for times below 1.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ValueError(f"times is {times}: give a whole number of at least 1; the paper has 10")
    _same_size("mask", mask, "known latent", known)

    def sampler(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
                generator=None) -> Iterator:
        for index, (t, t_prev) in enumerate(timesteps):
            passes = 1 if t_prev is None else times
            for again in reversed(range(passes)):
                blended = blended_denoise(denoise, known, mask, standard_noise(x, generator), schedule)
                step, = sample(blended, x, [(t, t_prev)], schedule, generator=generator)
                x = step.x
                if again:
                    a = schedule.at(t)[0] / schedule.at(t_prev)[0]          # x_t = a x_prev + sqrt(1 - a²) noise
                    x = a * x + math.sqrt(1 - a**2) * standard_noise(x, generator)
            yield step._replace(index=index)

    return sampler


def _same_size(what: str, tensor: Tensor, other: str, wanted: Tensor) -> None:
    if tensor.ndim != 4 or wanted.ndim != 4 or tensor.shape[2:] != wanted.shape[2:]:
        raise ValueError(f"the {what} is {_sides(tensor)}, but the {other} {_sides(wanted)} (height x width): "
                         "make them of one size")


def _sides(tensor: Tensor) -> str:
    return " x ".join(str(side) for side in tensor.shape[-2:])
