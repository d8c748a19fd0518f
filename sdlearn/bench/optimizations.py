"""Optimization steps of a sampling loop, from the plain loop to the fast one, each measured against the previous one.

    python -m sdlearn optimizations --preset sd15 --device cuda --out optimizations.json

A step changes one thing. Two neighbouring steps are timed in turns in one process, so that a busy machine slows both.
The images of an exact step differ by rounding only, from the previous step's and from the first step's, so that small
differences do not add up. A step that is not exact (fewer sampling steps, guidance in an interval) makes another image
of the same prompt, and is marked.
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
from ..guidance import classifier_free_guidance, count_nfe, predict_uncond_cond, predict_uncond_cond_shared, predict_x0
from ..images import to_images
from ..pipeline import StableDiffusion
from ..pipeline.cache import with_cache
from ..pipeline.compiled import CompiledUNet
from ..samplers import SAMPLERS, make_timesteps_for
from .comparison import PROMPT, ROUNDING, Benchmark, compare_images, rotate, save_weights, time_call
from .peaks import describe_machine, find_peak

ALL_MAPS = 2**62            # no attention map is too large for the first steps


@dataclass(frozen=True)
class OptimizationStep:
    """Configuration of a sampling loop. name: what this step changes; exact: whether the image stays, up to rounding.

    dtype: of the weights and of the network's arithmetic. fused: attention by PyTorch's kernel, which holds no map.
    one_batch: both halves of guidance in one pass. reuse: keys, values and time embeddings computed once.
    shared: what both halves have in common, up to the first cross-attention, computed once.
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


def list_steps(device: str, steps: int = 50, fewer: int = 20, compiled: bool = True) -> list[OptimizationStep]:
    """All optimization steps for a device, in order. On a CPU arithmetic stays in float32, without CUDA graphs.

    steps: of DDIM, in the first ones. fewer: of DPM++ 2M, in the last. compiled: with the steps that compile.
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
    found = [OptimizationStep("the plain loop", steps=steps)]
    for name, change in changes:
        found.append(replace(found[-1], name=name, **change))
    return found


def denoise_in_two_passes(network: Callable, schedule, context: Tensor, uncond: Tensor, scale: float) -> Callable:
    """`denoise` for a sampler, with classifier-free guidance in two passes of the network, one after the other."""
    def denoise(x: Tensor, t: float) -> Tensor:
        inside = x.to(context.dtype)
        u, c = network(inside, t, uncond), network(inside, t, context)              # (B, C, h, w) each
        return schedule.to_x0(classifier_free_guidance(u, c, scale).to(x.dtype), x, t)
    return denoise


def build_sampler(step: OptimizationStep, model: StableDiffusion, guidance: float) -> Callable[[Tensor], Tensor]:
    """A function from noise (B, C, h, w), float32, to the latents after the last sampling step."""
    grid = make_timesteps_for(step.sampler, model.schedule, step.steps)
    network = CompiledUNet(model.unet, graphs=step.compiled == "graphs") if step.compiled else model.unet
    attention = nullcontext if step.fused else lambda: eager_attention(model.unet, largest=ALL_MAPS)

    @torch.no_grad()
    def latents(noise: Tensor) -> Tensor:
        context, uncond = model.encode([PROMPT, ""])[:, None].expand(-1, len(noise), -1, -1)     # (B, M, T) each
        run = with_cache(network, [t for t, _ in grid]) if step.reuse else network
        if step.one_batch:
            denoise = predict_x0(run, model.schedule, context, uncond, guidance_scale=guidance,
                                 guidance_interval=step.interval,
                                 predict_pair=predict_uncond_cond_shared if step.shared else predict_uncond_cond)
        else:
            denoise = denoise_in_two_passes(run, model.schedule, context, uncond, guidance)
        with attention():
            for state in SAMPLERS[step.sampler](denoise, noise.to(model.device), grid, model.schedule):
                x = state.x
        return x
    return latents


@dataclass(frozen=True)
class PreparedStep:
    """An optimization step that was run: its sampling function, latents, images, uint8 (B, H, W, 3), and memory."""

    step: OptimizationStep
    model: StableDiffusion | None
    sample: Callable[[Tensor], Tensor] | None
    latents: Tensor | None
    images: np.ndarray
    memory: int | None                  # peak bytes; None on a CPU, where they are not measured


def run_steps(benchmark: Benchmark, steps: list[OptimizationStep], progress: Callable = lambda items, **_: items,
              folder: Path | None = None) -> dict:
    """Time, memory and image differences of every optimization step, as data with a description of the machine.

    benchmark: preset, device, batch, guidance, size and rounds; type, sampler and steps belong to each step. folder: a
    model of that preset, in place of the weights that `save_weights` writes. Seconds are for the latents of a batch;
    decoding, which is the same for all, is timed once, with the last step.
    """
    if benchmark.threads:
        torch.set_num_threads(benchmark.threads)
    noise, results, first, previous = benchmark.noise(), [], None, None
    with TemporaryDirectory() as scratch:
        folder = folder or save_weights(replace(benchmark, dtype="float32"), Path(scratch) / "model")
        for step in progress(steps, total=len(steps), desc="optimization steps"):
            share = previous and can_share_model(previous.step, step)
            prepared = prepare_step(benchmark, step, previous.model if share else load_model(benchmark, step, folder),
                                    noise)
            first = first or replace(prepared, model=None, sample=None, latents=None)  # its images, not its memory
            both = [prepared] if previous is None else [previous, prepared]
            seconds = time_in_turns(benchmark, [one.sample for one in both], noise)
            result = (summarize_step(benchmark, prepared, seconds[-1]) | compare_with_previous(both, seconds)
                      | compare_with_first(first, prepared))
            result["time relative to the first"] = result["time relative to the previous"] * (
                results[-1]["time relative to the first"] if results else 1)
            results.append(result)
            previous = prepared
        decode = build_decoder(previous.model)
        decoding = median(time_call(benchmark, decode, previous.latents) for _ in range(benchmark.rounds))
    return {"optimization steps": results, "seconds to decode": decoding, "preset": benchmark.preset,
            "size": benchmark.side, "batch": benchmark.batch, "guidance": benchmark.guidance,
            **describe_machine(benchmark.device)}


def can_share_model(one: OptimizationStep, other: OptimizationStep) -> bool:
    """Whether the weights of two steps have one type and one layout."""
    return (one.dtype, one.channels_last) == (other.dtype, other.channels_last)


def load_model(benchmark: Benchmark, step: OptimizationStep, folder: Path) -> StableDiffusion:
    model = StableDiffusion.load(folder, device=benchmark.device, dtype=getattr(torch, step.dtype))
    if not step.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    return model


def prepare_step(benchmark: Benchmark, step: OptimizationStep, model: StableDiffusion, noise: Tensor) -> PreparedStep:
    """Run a step twice, as compilers choose some kernels in the second run; the memory is the first run's."""
    sample = build_sampler(step, model, benchmark.guidance)
    gpu = benchmark.device.startswith("cuda")
    if gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - sum(p.nbytes for part in (model.text_encoder, model.unet, model.vae)
                                                     for p in part.parameters())
    latents = sample(noise)
    memory = torch.cuda.max_memory_allocated() - others if gpu else None
    sample(noise)
    return PreparedStep(step, model, sample, latents, to_images(build_decoder(model)(latents).float()), memory)


def build_decoder(model: StableDiffusion) -> Callable[[Tensor], Tensor]:
    """A function from latents (B, C, h, w) to pixels (B, 3, H, W), one image at a time."""
    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return model.vae.to_pixels(latents.to(model.dtype), at_once=1)
    return decode


def time_in_turns(benchmark: Benchmark, functions: list[Callable], noise: Tensor) -> list[list[float]]:
    """Seconds of each function in `benchmark.rounds` turns; every turn begins with another one."""
    seconds = [[] for _ in functions]
    for turn in range(benchmark.rounds):
        for i in rotate(range(len(functions)), turn):
            seconds[i].append(time_call(benchmark, functions[i], noise))
    return seconds


def summarize_step(benchmark: Benchmark, prepared: PreparedStep, seconds: list[float]) -> dict:
    """Time, speed and memory of one step. FLOPs are of whole passes, also where two of them share a part."""
    step, preset, middle = prepared.step, PRESETS[benchmark.preset], median(seconds)
    flops = benchmark.batch * count_unet_passes(step, prepared.model, benchmark.guidance) * step_flops(
        preset.unet, benchmark.side // preset.vae.factor)
    summary = {"name": step.name, "exact": step.exact, "steps": step.steps, "seconds": middle,
               "guided steps a second": step.steps / middle, "TFLOP/s": flops / middle / 1e12}
    peak = find_peak(torch.cuda.get_device_name()) if benchmark.device.startswith("cuda") else None
    return summary | ({"share of the peak": flops / middle / peak.flops} if peak else {}) | (
        {} if prepared.memory is None else {"peak memory, MiB": round(prepared.memory / 2**20)})


def count_unet_passes(step: OptimizationStep, model: StableDiffusion, guidance: float) -> int:
    """Passes of the U-Net for one image (NFE)."""
    timesteps = make_timesteps_for(step.sampler, model.schedule, step.steps)
    return count_nfe((t for t, _ in timesteps), guidance, step.interval)


def compare_with_previous(both: list[PreparedStep], seconds: list[list[float]]) -> dict:
    """The last step against the previous one: the median over turns of the time ratio, and the image difference."""
    ratio = median(a / b for a, b in zip(seconds[-1], seconds[0], strict=True))
    difference, same = compare_steps(both[0], both[-1])
    return {"time relative to the previous": ratio, **difference, "the same image": same}


def compare_with_first(first: PreparedStep, prepared: PreparedStep) -> dict:
    """The image difference of a step to the first one."""
    difference, same = compare_steps(first, prepared)
    return {f"{name} from the first": value for name, value in difference.items()} | {"the first's image": same}


def compare_steps(one: PreparedStep, other: PreparedStep) -> tuple[dict[str, float], bool]:
    """`compare_images` of two steps, and whether the difference is rounding in the coarser of their types."""
    difference = compare_images(one.images, other.images)
    largest, mean = max(ROUNDING[one.step.dtype], ROUNDING[other.step.dtype])
    return difference, difference["largest difference"] <= largest and difference["mean difference"] <= mean
