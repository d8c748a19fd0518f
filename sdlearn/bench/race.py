"""Side by side with diffusers: the same weights, the same noise, one process, turn by turn.

Machines are noisy and differ, so what counts is the ratio of two times of one turn, and its median over turns. Two
programs that make different images cannot be compared: then there are times and no ratio.
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
from .fastest import speed_up
from .machine import machine, peak_of
from .roofline import least_seconds_of_run

PROMPT = "a red apple to the left of a cat on a yellow background"
SAMPLERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
CONTENDERS = ("sdlearn", "sdlearn compiled", "diffusers", "diffusers compiled")
# Of 255, at most and on average. Rounding in float32 moves an image by less than a shade. In half precision it adds
# up over the steps: `mini`, 20 steps, here and in diffusers: 41 and 0.9 in bfloat16, 3 and 0.1 in float16, where
# another seed's image is 255 and 43 away.
ROUNDING = {"float32": (2, 0.1), "bfloat16": (128, 3.0), "float16": (16, 0.5)}


class ImagesDiffer(FloatingPointError):
    """Two contenders made different images, so that no ratio of their times means anything."""


@dataclass(frozen=True)
class Race:
    """What all contenders do. size: pixels of a side; rounds: turns that count, after one that does not."""

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
        """(B, C, h, w)"""
        config = PRESETS[self.preset]
        cells = self.side // config.vae.factor
        return torch.randn(self.batch, config.unet.out_channels, cells, cells,
                           generator=torch.Generator().manual_seed(0))


def weights(race: Race, folder: Path) -> Path:
    """A model folder of the preset in `folder`: the shipped weights where there are some, else random ones."""
    if race.preset in list_shipped_models():
        parts = load_folder(SHIPPED / race.preset)
    else:
        torch.manual_seed(0)
        config = PRESETS[race.preset]
        tokenizer = Tokenizer.train([PROMPT], min(config.text.vocab_size, 600))     # words do not matter to a clock
        parts = Parts(config, tokenizer, TextEncoder(config.text), VAE(config.vae), UNet(config.unet), None, None)
        for parameter in parts.unet.conv_out.parameters():      # zeros would leave the noise as it is
            torch.nn.init.normal_(parameter, std=0.02)
    return save_folder(folder, parts, dtype=getattr(torch, race.dtype))


def contender(name: str, race: Race, folder: Path) -> Callable[[torch.Tensor], np.ndarray]:
    """A function from noise (B, C, h, w) to images, uint8 (B, H, W, 3), ready but for its first call."""
    make = ours if name.startswith("sdlearn") else theirs
    return make(race, folder, compiled=name.endswith("compiled"))


def ours(race: Race, folder: Path, compiled: bool):
    model = StableDiffusion.load(folder, device=race.device, dtype=getattr(torch, race.dtype))
    if model.config.noise.zero_terminal_snr and race.sampler != "ddim":     # as diffusers, see `spacing`
        model.schedule = NoiseSchedule(model.config.noise, floor=ALMOST_ZERO)
    if compiled:
        model.compile()
    _, grid = spacing(race)

    def make_images(noise):
        images = model.text2img(PROMPT, latent=noise, num_inference_steps=race.steps, sampler=race.sampler,
                                guidance_scale=race.guidance, batch=race.batch, size=race.side,
                                timestep_spacing=grid)
        return np.stack([np.asarray(image) for image in images])
    return make_images


def theirs(race: Race, folder: Path, compiled: bool):
    """diffusers' pipeline; compiled: in its fastest documented configuration, see `speed_up`."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.to(race.device, getattr(torch, race.dtype))
    pipe.set_progress_bar_config(disable=True)
    grid, _ = spacing(race)
    pipe.scheduler = getattr(diffusers, SAMPLERS[race.sampler]).from_config(pipe.scheduler.config,
                                                                           timestep_spacing=grid)
    if compiled:
        speed_up(pipe, gpu=race.device.startswith("cuda"))

    def make_images(noise):
        out = pipe([PROMPT] * race.batch, latents=noise.to(race.device, getattr(torch, race.dtype)),
                   num_inference_steps=race.steps, guidance_scale=race.guidance, width=race.side, height=race.side,
                   output_type="np").images
        return (out * 255).round().astype(np.uint8)
    return make_images


def spacing(race: Race) -> tuple[str, str]:
    """A grid of timesteps on which both sides begin at noise of variance 1: its name in diffusers, and here."""
    if PRESETS[race.preset].noise.zero_terminal_snr:
        return "trailing", "trailing"
    return ("linspace", "linspace_open") if race.sampler == "dpmpp_2m" else ("leading", "leading")


def run(race: Race, names: tuple[str, ...], watch: Callable = lambda items, **_: items) -> dict:
    """Every contender's seconds, images a second, steps a second, memory and distance from the first's image.

    `ratios` are of the first's time to each other's, turn by turn, the median; they are left out where an image
    differs beyond rounding. watch(items, total=, desc=) may show progress, as tqdm does.
    """
    if race.threads:
        torch.set_num_threads(race.threads)
    noise, seconds, made, memory = race.noise(), {name: [] for name in names}, {}, {}
    with TemporaryDirectory() as place:
        folder = weights(race, Path(place) / "model")
        ready = {}
        for name in watch(names, total=len(names), desc="memory and warm-up"):
            before_memory(race)
            if not race.device.startswith("cuda"):
                memory[name] = in_a_process(name, race, folder)
            ready[name] = contender(name, race, folder)
            made[name] = ready[name](noise)
            if race.device.startswith("cuda"):
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
            ready[name](noise)                                  # a second time: some choose their kernels then
        for turn in watch(range(race.rounds), total=race.rounds, desc="turns"):
            for name in rotated(names, turn):
                seconds[name].append(timed(race, ready[name], noise))
    return report(race, names, seconds, made, memory)


def rotated(names: Sequence, turn: int) -> Iterator:
    """Another one begins in every turn."""
    start = turn % len(names)
    return iter((*names[start:], *names[:start]))


def timed(race: Race, make_images: Callable, noise: torch.Tensor) -> float:
    wait = torch.cuda.synchronize if race.device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    make_images(noise)
    wait()
    return time.perf_counter() - start


def before_memory(race: Race):
    gc.collect()
    if race.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def in_a_process(name: str, race: Race, folder: Path) -> float:
    """Peak resident memory, MiB, of a process that does nothing but make the images once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, race, folder))


def _peak(name: str, race: Race, folder: Path) -> float:
    if race.threads:
        torch.set_num_threads(race.threads)
    contender(name, race, folder)(race.noise())
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # which Windows lacks

    unit = 2**20 if sys.platform == "darwin" else 2**10         # macOS tells bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def report(race: Race, names, seconds: dict, made: dict, memory: dict) -> dict:
    """The result as data, with what it was measured on. On a GPU whose peaks are known each contender has its share of
    the roofline: the least seconds of U-Net and decoder to its own."""
    first, *_ = names
    config = PRESETS[race.preset]
    passes = race.batch * race.steps * (1 if race.guidance == 1 else 2)
    flops = passes * step_flops(config.unet, race.side // config.vae.factor)
    peak = peak_of(torch.cuda.get_device_name()) if race.device.startswith("cuda") else None
    least = peak and least_seconds_of_run(config, race.side, peak, batch=race.batch, steps=race.steps,
                                          guided=race.guidance != 1, bytes_each=getattr(torch, race.dtype).itemsize)
    results = {}
    for name in names:
        middle = median(seconds[name])
        results[name] = {"seconds": middle, "guided steps a second": race.steps / middle,
                         "images a second": race.batch / middle, "peak memory, MiB": round(memory[name]),
                         "TFLOP/s of the U-Net": flops / middle / 1e12,
                         **({"share of the roofline": least / middle} if least else {}),
                         **distance(made[first], made[name]),
                         "seconds of each turn": [round(value, 4) for value in seconds[name]]}
    alike = all(results[name][f"{kind} difference"] <= bound for name in names
                for kind, bound in zip(("largest", "mean"), ROUNDING[race.dtype], strict=True))
    ratios = {name: median(a / b for a, b in zip(seconds[first], seconds[name], strict=True)) for name in names[1:]}
    return {"race": asdict(race) | {"size": race.side}, "contenders": results, "alike": alike,
            **({f"time of {first} to that of": ratios} if alike else {}), **machine(race.device)}


def distance(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Of two lots of images, in shades of 255."""
    off = np.abs(a.astype(int) - b.astype(int))
    return {"largest difference": int(off.max()), "mean difference": float(off.mean())}
