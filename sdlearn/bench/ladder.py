"""From the plain loop to the fast one, rung by rung: each is measured against the one before, and paints its image.

    python -m sdlearn ladder --preset sd15 --device cuda --out ladder.json

A rung changes one thing. Times are of two neighbours, turn by turn in one process, so that a busy machine slows both.
An exact rung may move the image by rounding only, from the one before and from the first, so that small steps do not
add up to another image; a rung that is not exact, fewer steps or an interval of guidance,
paints another image of the same prompt, and says so.
"""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ..attention import eager_attention
from ..config import PRESETS
from ..diagnostics.costs import step_flops
from ..guidance import both_halves, guided, guided_passes, predict_x0, shared_halves
from ..images import to_images
from ..pipeline import StableDiffusion
from ..pipeline.cache import with_cache
from ..pipeline.compiled import CompiledUNet
from ..samplers import SAMPLERS, grid_for
from .machine import machine, peak_of
from .race import PROMPT, ROUNDING, Race, distance, rotated, timed, weights

ALL_MAPS = 2**62            # no attention map is too large for the first rungs


@dataclass(frozen=True)
class Rung:
    """How images are made. name: what this rung changes; exact: whether the image stays, up to rounding.

    dtype: of the weights and of the network's arithmetic. fused: attention by PyTorch's kernel, which holds no map.
    one_batch: both halves of guidance in one pass. reuse: keys, values and time embeddings of a run made once.
    shared: what both halves have in common, up to the first text that is read, computed once.
    compiled: "" for no, "kernels", or "graphs": kernels that a CUDA graph launches. interval: see `guidance`.
    """

    name: str
    exact: bool = True
    dtype: str = "float32"
    fused: bool = False
    channels_last: bool = False
    one_batch: bool = False
    reuse: bool = False
    shared: bool = False
    compiled: str = ""
    sampler: str = "ddim"
    steps: int = 50
    interval: tuple[float, float] | None = None


def rungs_for(device: str, steps: int = 50, fewer: int = 20, compiled: bool = True) -> list[Rung]:
    """All rungs for a device, in order. On a CPU arithmetic stays in float32, and there are no CUDA graphs.

    steps: of DDIM, on the first rungs. fewer: of DPM++ 2M, on the last. compiled: with the rungs that compile.
    """
    gpu = device.startswith("cuda")
    changes = [("half precision", {"dtype": "bfloat16"})] if gpu else []
    changes += [("fused attention", {"fused": True}), ("channels last", {"channels_last": True}),
                ("one batch for guidance", {"one_batch": True}), ("text and time once", {"reuse": True}),
                ("shared part once", {"shared": True})]
    changes += [("compiled kernels", {"compiled": "kernels"})] if compiled else []
    changes += [("CUDA graphs", {"compiled": "graphs"})] if compiled and gpu else []
    changes += [(f"{fewer} steps of DPM++ 2M", {"exact": False, "sampler": "dpmpp_2m", "steps": fewer}),
                ("guidance in an interval", {"exact": False, "interval": (200, 800)})]
    rungs = [Rung("the plain loop", steps=steps)]
    for name, change in changes:
        rungs.append(replace(rungs[-1], name=name, **change))
    return rungs


def two_passes(network: Callable, schedule, context: Tensor, uncond: Tensor, scale: float) -> Callable:
    """`denoise` for a sampler, with guidance in the plainest way: the network twice a step, one after the other."""
    def denoise(x: Tensor, t: float) -> Tensor:
        inside = x.to(context.dtype)
        u, c = network(inside, t, uncond), network(inside, t, context)              # (B, C, h, w) each
        return schedule.to_x0(guided(u, c, scale).to(x.dtype), x, t)
    return denoise


def painter(rung: Rung, model: StableDiffusion, guidance: float) -> Callable[[Tensor], Tensor]:
    """A function from noise (B, C, h, w), float32, to the latents that a run ends with."""
    grid = grid_for(rung.sampler, model.schedule, rung.steps)
    network = CompiledUNet(model.unet, graphs=rung.compiled == "graphs") if rung.compiled else model.unet
    attention = nullcontext if rung.fused else lambda: eager_attention(model.unet, largest=ALL_MAPS)

    @torch.no_grad()
    def latents(noise: Tensor) -> Tensor:
        context, uncond = model.encode([PROMPT, ""])[:, None].expand(-1, len(noise), -1, -1)     # (B, M, T) each
        run = with_cache(network, [t for t, _ in grid]) if rung.reuse else network
        if rung.one_batch:
            denoise = predict_x0(run, model.schedule, context, uncond, scale=guidance, interval=rung.interval,
                                 halves=shared_halves if rung.shared else both_halves)
        else:
            denoise = two_passes(run, model.schedule, context, uncond, guidance)
        with attention():
            for step in SAMPLERS[rung.sampler](denoise, noise.to(model.device), grid, model.schedule):
                x = step.x
        return x
    return latents


@dataclass(frozen=True)
class Ready:
    """A rung that has been run: how it paints, what it painted, uint8 (B, H, W, 3), and the bytes that it held."""

    rung: Rung
    model: StableDiffusion | None
    paint: Callable[[Tensor], Tensor] | None
    latents: Tensor | None
    images: np.ndarray
    memory: int | None                  # None on a CPU, where nothing tells


def climb(race: Race, rungs: list[Rung], watch: Callable = lambda items, **_: items,
          folder: Path | None = None) -> dict:
    """Every rung's seconds for the latents of a batch, its ratio to the rung before, how far its images are off from
    that rung's and from the first's.

    race: preset, device, batch, guidance, size and rounds; type, sampler and steps are the rungs' own. folder: of a
    model of that preset, in place of the weights that `race.weights` makes. Decoding is the same for all rungs and is
    timed by itself, with the last. Gives data as it is written, with the machine.
    """
    if race.threads:
        torch.set_num_threads(race.threads)
    noise, told, first, before = race.noise(), [], None, None
    with TemporaryDirectory() as place:
        folder = folder or weights(replace(race, dtype="float32"), Path(place) / "model")
        for rung in watch(rungs, total=len(rungs), desc="rungs"):
            model = before.model if before and alike(before.rung, rung) else loaded(race, rung, folder)
            ready = prepared(race, rung, model, noise)
            first = first or replace(ready, model=None, paint=None, latents=None)      # its images, not its memory
            both = [ready] if before is None else [before, ready]
            seconds = turns(race, [one.paint for one in both], noise)
            told.append(costs(race, ready, seconds[-1]) | compared(both, seconds) | from_first(first, ready))
            told[-1]["of the first"] = told[-1]["of the rung before"] * (told[-2]["of the first"] if before else 1)
            before = ready
        decoding = median(timed(race, decoder(ready.model), ready.latents) for _ in range(race.rounds))
    return {"ladder": told, "seconds to decode": decoding, "preset": race.preset, "size": race.side,
            "batch": race.batch, "guidance": race.guidance, **machine(race.device)}


def alike(one: Rung, other: Rung) -> bool:
    """Whether they can share a model: its weights have one type and one layout."""
    return (one.dtype, one.channels_last) == (other.dtype, other.channels_last)


def loaded(race: Race, rung: Rung, folder: Path) -> StableDiffusion:
    model = StableDiffusion.load(folder, device=race.device, dtype=getattr(torch, rung.dtype))
    if not rung.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    return model


def prepared(race: Race, rung: Rung, model: StableDiffusion, noise: Tensor) -> Ready:
    """Run twice, as some choose their kernels in the second run; the memory is the first one's."""
    paint = painter(rung, model, race.guidance)
    gpu = race.device.startswith("cuda")
    if gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        beside = torch.cuda.memory_allocated() - sum(p.nbytes for part in (model.text_encoder, model.unet, model.vae)
                                                     for p in part.parameters())
    latents = paint(noise)
    memory = torch.cuda.max_memory_allocated() - beside if gpu else None
    paint(noise)
    return Ready(rung, model, paint, latents, to_images(decoder(model)(latents).float()), memory)


def decoder(model: StableDiffusion) -> Callable[[Tensor], Tensor]:
    """A function from latents (B, C, h, w) to pixels (B, 3, H, W), one image at a time."""
    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return model.vae.to_pixels(latents.to(model.dtype), at_once=1)
    return decode


def turns(race: Race, painters: list[Callable], noise: Tensor) -> list[list[float]]:
    """Seconds of each, in `race.rounds` turns; another one begins in every turn."""
    seconds = [[] for _ in painters]
    for turn in range(race.rounds):
        for i in rotated(range(len(painters)), turn):
            seconds[i].append(timed(race, painters[i], noise))
    return seconds


def costs(race: Race, ready: Ready, seconds: list[float]) -> dict:
    """What one rung takes. FLOPs are of whole passes, also where two of them have a part in common."""
    rung, preset, middle = ready.rung, PRESETS[race.preset], median(seconds)
    flops = race.batch * passes(rung, ready.model, race.guidance) * step_flops(
        preset.unet, race.side // preset.vae.factor)
    told = {"rung": rung.name, "exact": rung.exact, "steps": rung.steps, "seconds": middle,
            "guided steps a second": rung.steps / middle, "TFLOP/s": flops / middle / 1e12}
    peak = peak_of(torch.cuda.get_device_name()) if race.device.startswith("cuda") else None
    return told | ({"share of the peak": flops / middle / peak.flops} if peak else {}) | (
        {} if ready.memory is None else {"peak memory, MiB": round(ready.memory / 2**20)})


def passes(rung: Rung, model: StableDiffusion, guidance: float) -> int:
    """Passes of the U-Net for one image."""
    return guided_passes((t for t, _ in grid_for(rung.sampler, model.schedule, rung.steps)), guidance, rung.interval)


def compared(both: list[Ready], seconds: list[list[float]]) -> dict:
    """The last rung against the one before: the median of the ratios of turns, and how far the images are off."""
    ratio = median(a / b for a, b in zip(seconds[-1], seconds[0], strict=True))
    off, same = apart(both[0], both[-1])
    return {"of the rung before": ratio, **off, "the same image": same}


def from_first(first: Ready, ready: Ready) -> dict:
    """How far a rung's images are off from the first one's."""
    off, same = apart(first, ready)
    return {f"{name} from the first": value for name, value in off.items()} | {"the first's image": same}


def apart(one: Ready, other: Ready) -> tuple[dict[str, float], bool]:
    """`race.distance` of what two rungs painted, and whether it is rounding, in the coarser of their types."""
    off = distance(one.images, other.images)
    largest, mean = max(ROUNDING[one.rung.dtype], ROUNDING[other.rung.dtype])
    return off, off["largest difference"] <= largest and off["mean difference"] <= mean
