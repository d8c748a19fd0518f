"""Side-by-side benchmark with diffusers: the same weights, the same noise, one process, in turns.

Machines are noisy and differ, so what counts is the ratio of two times of one turn, and its median over turns. If two
implementations make different images, their times are reported without a ratio.
"""

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch

from ..checkpoint import Parts, load_folder, save_folder
from ..checkpoint.shipped import SHIPPED, list_shipped_models
from ..clip import TextEncoder
from ..config import PRESETS
from ..diagnostics.costs import step_flops
from ..pipeline import SettingsError, StableDiffusion
from ..schedule import ALMOST_ZERO, NoiseSchedule
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .diffusers_compile import compile_pipeline
from .peaks import describe_machine, find_peak
from .roofline import least_seconds_of_run

PROMPT = "a red apple to the left of a cat on a yellow background"
SAMPLERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
IMPLEMENTATIONS = ("sdlearn", "sdlearn compiled", "diffusers", "diffusers compiled")
# Differences of pixels in [0, 255] that are rounding: the largest one, and the mean. In float32 rounding is below 1. In
# half precision it adds up over the steps: `mini`, 20 steps, here and in diffusers: 41 and 0.9 in bfloat16, 3 and 0.1
# in float16; the image of another seed differs by 255 and 43.
ROUNDING = {"float32": (2, 0.1), "bfloat16": (128, 3.0), "float16": (16, 0.5)}


class ImagesDiffer(FloatingPointError):
    """Two implementations made different images, so that a ratio of their times means nothing."""


@dataclass(frozen=True)
class Benchmark:
    """Settings of a benchmark. size: pixels of a side, the preset's by default; rounds: timed turns after a warm-up."""

    preset: str = "mini"
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    steps: int = 20
    guidance: float = 5.0
    sampler: str = "ddim"
    size: int | None = None
    rounds: int = 7
    threads: int | None = None

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise SettingsError(f"there is no preset '{self.preset}'; choose one of {', '.join(PRESETS)}")
        if self.sampler not in SAMPLERS:
            raise SettingsError(f"'{self.sampler}' is not among the samplers that both sides have on one grid: "
                                f"choose one of {', '.join(SAMPLERS)}")

    @property
    def side(self) -> int:
        return self.size or PRESETS[self.preset].image_size

    def noise(self) -> torch.Tensor:
        """Starting noise, (B, C, h, w), always the same."""
        config = PRESETS[self.preset]
        cells = self.side // config.vae.factor
        return torch.randn(self.batch, config.unet.out_channels, cells, cells,
                           generator=torch.Generator().manual_seed(0))


def save_weights(benchmark: Benchmark, folder: Path) -> Path:
    """Write a model folder of the preset: the shipped weights where there are some, else random ones."""
    if benchmark.preset in list_shipped_models():
        parts = load_folder(SHIPPED / benchmark.preset)
    else:
        torch.manual_seed(0)
        config = PRESETS[benchmark.preset]
        tokenizer = Tokenizer.train([PROMPT], min(config.text.vocab_size, 600))     # words have no effect on time
        parts = Parts(config, tokenizer, TextEncoder(config.text), VAE(config.vae), UNet(config.unet), None, None)
        for parameter in parts.unet.conv_out.parameters():      # zeros would not change the noise
            torch.nn.init.normal_(parameter, std=0.02)
    return save_folder(folder, parts, dtype=getattr(torch, benchmark.dtype))


def load_implementation(name: str, benchmark: Benchmark, folder: Path) -> Callable[[torch.Tensor], np.ndarray]:
    """A function from noise (B, C, h, w) to images, uint8 (B, H, W, 3), not warmed up yet."""
    make = load_sdlearn if name.startswith("sdlearn") else load_diffusers
    return make(benchmark, folder, compiled=name.endswith("compiled"))


def load_sdlearn(benchmark: Benchmark, folder: Path, compiled: bool):
    model = StableDiffusion.load(folder, device=benchmark.device, dtype=getattr(torch, benchmark.dtype))
    # as in diffusers, see `timestep_spacings`
    if model.config.noise.zero_terminal_snr and benchmark.sampler != "ddim":
        model.schedule = NoiseSchedule(model.config.noise, floor=ALMOST_ZERO)
    if compiled:
        model.compile()
    _, grid = timestep_spacings(benchmark)

    def make_images(noise):
        images = model.text2img(PROMPT, latent=noise, num_inference_steps=benchmark.steps, sampler=benchmark.sampler,
                                guidance_scale=benchmark.guidance, batch=benchmark.batch, size=benchmark.side,
                                timestep_spacing=grid)
        return np.stack([np.asarray(image) for image in images])
    return make_images


def load_diffusers(benchmark: Benchmark, folder: Path, compiled: bool):
    """diffusers' pipeline; compiled: in its fastest documented configuration, see `compile_pipeline`."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.to(benchmark.device, getattr(torch, benchmark.dtype))
    pipe.set_progress_bar_config(disable=True)
    grid, _ = timestep_spacings(benchmark)
    scheduler = getattr(diffusers, SAMPLERS[benchmark.sampler])
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing=grid)
    if compiled:
        compile_pipeline(pipe, gpu=benchmark.device.startswith("cuda"))

    def make_images(noise):
        out = pipe([PROMPT] * benchmark.batch, latents=noise.to(benchmark.device, getattr(torch, benchmark.dtype)),
                   num_inference_steps=benchmark.steps, guidance_scale=benchmark.guidance, width=benchmark.side,
                   height=benchmark.side, output_type="np").images
        return (out * 255).round().astype(np.uint8)
    return make_images


def timestep_spacings(benchmark: Benchmark) -> tuple[str, str]:
    """A timestep spacing with which both begin at noise of variance 1: its name in diffusers, and here."""
    if PRESETS[benchmark.preset].noise.zero_terminal_snr:
        return "trailing", "trailing"
    return ("linspace", "linspace_open") if benchmark.sampler == "dpmpp_2m" else ("leading", "leading")


def run_benchmark(benchmark: Benchmark, names: tuple[str, ...], progress: Callable = lambda items, **_: items) -> dict:
    """Seconds, images a second, steps a second, memory and image difference of every implementation in `names`.

    Image differences are to the first one's. Ratios are of the first one's time to each other's, turn by turn, the
    median; they are left out where an image differs beyond rounding. progress(items, total=, desc=): such as tqdm.
    """
    if benchmark.threads:
        torch.set_num_threads(benchmark.threads)
    noise, seconds, images, memory = benchmark.noise(), {name: [] for name in names}, {}, {}
    with TemporaryDirectory() as scratch:
        folder = save_weights(benchmark, Path(scratch) / "model")
        functions = {}
        for name in progress(names, total=len(names), desc="memory and warm-up"):
            reset_peak_memory(benchmark)
            if not benchmark.device.startswith("cuda"):
                memory[name] = measure_peak_memory(name, benchmark, folder)
            functions[name] = load_implementation(name, benchmark, folder)
            images[name] = functions[name](noise)
            if benchmark.device.startswith("cuda"):
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
            functions[name](noise)                  # a second time: compilers choose some kernels in the second call
        for turn in progress(range(benchmark.rounds), total=benchmark.rounds, desc="turns"):
            for name in rotate(names, turn):
                seconds[name].append(time_call(benchmark, functions[name], noise))
    return summarize(benchmark, names, seconds, images, memory)


def rotate(names: Sequence, turn: int) -> Iterator:
    """`names` in the order of a turn: every turn begins with another one."""
    start = turn % len(names)
    return iter((*names[start:], *names[:start]))


def time_call(benchmark: Benchmark, make_images: Callable, noise: torch.Tensor) -> float:
    """Seconds of one call, with the GPU's work finished."""
    synchronize = torch.cuda.synchronize if benchmark.device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    make_images(noise)
    synchronize()
    return time.perf_counter() - start


def reset_peak_memory(benchmark: Benchmark):
    gc.collect()
    if benchmark.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_peak_memory(name: str, benchmark: Benchmark, folder: Path) -> float:
    """Peak resident memory, MiB, of a process of its own that makes the images once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_here, (name, benchmark, folder))


def _measure_here(name: str, benchmark: Benchmark, folder: Path) -> float:
    if benchmark.threads:
        torch.set_num_threads(benchmark.threads)
    load_implementation(name, benchmark, folder)(benchmark.noise())
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # which Windows lacks

    unit = 2**20 if sys.platform == "darwin" else 2**10         # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def summarize(benchmark: Benchmark, names, seconds: dict, images: dict, memory: dict) -> dict:
    """The result as data, with a description of the machine. On a GPU of known peaks each implementation has its share
    of the roofline: the least seconds of U-Net and decoder over its own."""
    first, *_ = names
    config = PRESETS[benchmark.preset]
    passes = benchmark.batch * benchmark.steps * (1 if benchmark.guidance == 1 else 2)
    flops = passes * step_flops(config.unet, benchmark.side // config.vae.factor)
    peak = find_peak(torch.cuda.get_device_name()) if benchmark.device.startswith("cuda") else None
    least = peak and least_seconds_of_run(config, benchmark.side, peak, batch=benchmark.batch, steps=benchmark.steps,
                                          guided=benchmark.guidance != 1,
                                          element_size=getattr(torch, benchmark.dtype).itemsize)
    results = {}
    for name in names:
        middle = median(seconds[name])
        results[name] = {"seconds": middle, "guided steps a second": benchmark.steps / middle,
                         "images a second": benchmark.batch / middle, "peak memory, MiB": round(memory[name]),
                         "TFLOP/s of the U-Net": flops / middle / 1e12,
                         **({"share of the roofline": least / middle} if least else {}),
                         **compare_images(images[first], images[name]),
                         "seconds of each turn": [round(value, 4) for value in seconds[name]]}
    alike = all(results[name][f"{kind} difference"] <= bound for name in names
                for kind, bound in zip(("largest", "mean"), ROUNDING[benchmark.dtype], strict=True))
    ratios = {name: median(a / b for a, b in zip(seconds[first], seconds[name], strict=True)) for name in names[1:]}
    return {"benchmark": asdict(benchmark) | {"size": benchmark.side}, "implementations": results, "alike": alike,
            **({f"time of {first} to that of": ratios} if alike else {}), **describe_machine(benchmark.device)}


def compare_images(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Largest and mean difference of two batches of uint8 images."""
    off = np.abs(a.astype(int) - b.astype(int))
    return {"largest difference": int(off.max()), "mean difference": float(off.mean())}
