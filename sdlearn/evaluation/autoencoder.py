"""What an autoencoder preserves of unseen scenes, and how much noise on its latents costs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..data import CORE, draw_scene
from ..images import psnr, to_tensor

SCENES = 200
NOISE = 0.1             # standard deviation, in scaled latent units: as far off as generated latents are


@torch.no_grad()
def autoencoder_psnr(vae, objects: Sequence[str], *, count: int = SCENES) -> dict[str, float]:
    """PSNR in dB of the round trip, the mean over `count` unseen scenes of these objects: of the latent as encoded (the
    posterior's mean), of the latent with noise added, and the same two within the boxes of small objects."""
    world = replace(CORE, objects=tuple(objects))
    parameter, generator = next(vae.parameters()), torch.Generator().manual_seed(0)
    whole: dict[str, list[float]] = {"PSNR": [], f"PSNR with noise {NOISE}": []}
    small: dict[str, list[float]] = {f"{name}, small objects": [] for name in whole}
    for seed in range(count):
        one = draw_scene(seed, "test", world)
        pixels = to_tensor([one.image])                                                 # (1, 3, H, W)
        latent = vae.to_latent(pixels.to(parameter.device, parameter.dtype))            # (1, C, h, w)
        noise = NOISE * torch.randn(latent.shape, generator=generator).to(latent)
        for name, given in zip(whole, (latent, latent + noise), strict=True):
            again = vae.to_pixels(given, at_once=1).float().cpu().clamp(-1, 1)
            whole[name].append(float(psnr(again, pixels)))
            small[f"{name}, small objects"] += [_within(placed.box, again, pixels) for placed in one.objects
                                                if placed.size == "small"]
    return {"scenes": count} | {name: sum(values) / len(values) for name, values in (whole | small).items() if values}


def _within(box: tuple[int, int, int, int], a: Tensor, b: Tensor) -> float:
    left, top, right, bottom = box
    return float(psnr(a[..., top:bottom, left:right], b[..., top:bottom, left:right]))
