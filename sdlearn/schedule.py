"""The noise schedule, prediction types and timesteps.

B  batch        N  timesteps of training, 1000

The forward process is variance preserving (Ho et al. 2020):

    x_t = alpha_t x0 + sigma_t eps,    alpha_t^2 + sigma_t^2 = 1,    alpha_t^2 = abar_t

alpha_t and sigma_t are written alpha and sigma in code. Papers on variance-exploding diffusion (Karras et al. 2022,
k-diffusion) use X = x / alpha and the one number sigma / alpha, here `ve_sigmas`.

A network predicts one of three things. Given x_t each determines the others:

    "epsilon"         eps, the noise                        Stable Diffusion 1.x, 2.x-base
    "v_prediction"    v = alpha eps - sigma x0              Stable Diffusion 2.x at 768 (Salimans and Ho 2022)
    "sample"          x0, the clean latent
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .config import NoiseConfig

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "linspace_open", "trailing", "karras")
Timesteps = list[tuple[float, float | None]]
Generators = torch.Generator | list[torch.Generator] | None     # one for the batch, or one for each image in it

# Where abar is 0, sigma/alpha is infinite. Where it has to be finite, abar is replaced by the smallest number of
# float16, as in diffusers: sigma/alpha = 4096.
ALMOST_ZERO = 2.0**-24


class NoiseSchedule:
    """The noise schedule of a `NoiseConfig`: abar at every timestep, in float64, and conversions of predictions.

    With `config.zero_terminal_snr` abar is rescaled (Lin et al. 2023, "Common diffusion noise
    schedules and sample steps are flawed") so that it is exactly 0 at the last timestep.
    `floor` is the lowest abar allowed. Every sampler here works with the exact 0, and so do
    diffusers' DDPM and DDIM; its Euler, Euler ancestral and DPM++ schedulers clamp to ALMOST_ZERO, so
    `floor=ALMOST_ZERO` reproduces their numbers.

    Raises ValueError for an unknown schedule or prediction type, and for "epsilon" with abar 0, where the
    prediction does not determine x0.
    """

    def __init__(self, config: NoiseConfig, floor: float = 0.0):
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is '{config.prediction_type}': choose one of "
                             f"{', '.join(PREDICTION_TYPES)}")
        if config.num_train_timesteps < 2:
            raise ValueError(f"a noise schedule of {config.num_train_timesteps} steps: give at least 2")
        self.config = config
        self.num_train_timesteps = config.num_train_timesteps
        abar = torch.cumprod(1 - betas(config), dim=0)
        if config.zero_terminal_snr:
            abar = zero_terminal_snr(abar)
        self.alphas_cumprod = abar.clamp(min=floor)                                  # (N,)
        if config.prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ValueError("zero_terminal_snr needs v_prediction or sample: at the last timestep x is "
                             "pure noise, and predicting it says nothing about the image")
        finite = torch.where(self.alphas_cumprod > 0, self.alphas_cumprod, ALMOST_ZERO)
        self.ve_sigmas = ((1 - finite) / finite).sqrt()                              # (N,) sigma/alpha

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps t in 0...N-1: float64, of t's shape and on its device.

        Between whole timesteps sigma/alpha is interpolated linearly, as in diffusers' Euler schedulers.
        (k-diffusion interpolates its logarithm: 1.5 % apart between 0 and 1, below 1e-4 from 20 on.)
        Raises ValueError for t out of range, on the CPU alone: on a GPU the check would synchronise.
        """
        t = t if isinstance(t, Tensor) else torch.tensor(t, device="cpu")
        t = t.cpu() if t.device.type == "mps" else t        # Apple's GPUs have no float64
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= self.num_train_timesteps - 1)).all()):
            raise ValueError(f"timestep {t.tolist()} is outside of 0...{self.num_train_timesteps - 1}")
        abar = self.alphas_cumprod.to(t.device)[t.round().long() if t.is_floating_point() else t.long()]
        if not t.is_floating_point():
            return abar.sqrt(), (1 - abar).sqrt()
        below = t.floor().long().clamp(max=self.num_train_timesteps - 2)
        ve_sigmas = self.ve_sigmas.to(t.device)
        ve_sigma = torch.lerp(ve_sigmas[below], ve_sigmas[below + 1], t.double() - below)
        abar = torch.where(t == t.round(), abar, 1 / (1 + ve_sigma**2))
        return abar.sqrt(), (1 - abar).sqrt()

    def at(self, t: float | None) -> tuple[float, float]:
        """(alpha, sigma) at one timestep as Python floats; None is the end, a clean latent: (1, 0)."""
        if t is None:
            return 1.0, 0.0
        alpha, sigma = self.alpha_sigma(t)
        return alpha.item(), sigma.item()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The forward process, x_t = alpha x0 + sigma noise, for t a number or (B,)."""
        alpha, sigma = self._alpha_sigma_like(x0, t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The training target for add_noise(x0, noise, t), of the kind `config.prediction_type`."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return x0
        alpha, sigma = self._alpha_sigma_like(x0, t)
        return alpha * noise - sigma * x0

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor | float, prediction_type: str | None = None) -> Tensor:
        """x0 from a prediction `output` for x at t.

        prediction_type: the kind of `output`, `config.prediction_type` unless given; so these three methods
        convert between any two of eps, v and x0. Where abar is 0, eps does not determine x0 and v, and the
        result is not finite.
        """
        alpha, sigma = self._alpha_sigma_like(x, t)
        match self._resolve_type(prediction_type):
            case "epsilon":
                return (x - sigma * output) / alpha
            case "v_prediction":
                return alpha * x - sigma * output
            case _:
                return output

    def to_noise(self, output: Tensor, x: Tensor, t: Tensor | float, prediction_type: str | None = None) -> Tensor:
        """The noise eps from a prediction `output` for x at t; see `to_x0`."""
        alpha, sigma = self._alpha_sigma_like(x, t)
        match self._resolve_type(prediction_type):
            case "epsilon":
                return output
            case "v_prediction":
                return alpha * output + sigma * x
            case _:
                return (x - alpha * output) / sigma

    def to_v(self, output: Tensor, x: Tensor, t: Tensor | float, prediction_type: str | None = None) -> Tensor:
        """The velocity v from a prediction `output` for x at t; see `to_x0`."""
        alpha, sigma = self._alpha_sigma_like(x, t)
        match self._resolve_type(prediction_type):
            case "epsilon":
                return (output - sigma * x) / alpha
            case "v_prediction":
                return output
            case _:
                return (alpha * x - output) / sigma

    def _resolve_type(self, prediction_type: str | None) -> str:
        if prediction_type not in (None, *PREDICTION_TYPES):
            raise ValueError(f"prediction_type is '{prediction_type}': choose one of {', '.join(PREDICTION_TYPES)}")
        return prediction_type or self.config.prediction_type

    def _alpha_sigma_like(self, x: Tensor, t: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
        """alpha and sigma that broadcast with x: floats for a number t, (B, 1, 1, 1) for (B,) timesteps."""
        if not isinstance(t, Tensor):
            return self.at(t)
        if t.ndim > 1 or t.numel() not in (1, len(x)):
            raise ValueError(f"t is {tuple(t.shape)}: give a number, or a timestep for each "
                             f"of the {len(x)} latents")
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (value.to(x.dtype).to(x.device).reshape(shape) for value in self.alpha_sigma(t))
        return alpha, sigma


def seeded_noise(shape: Sequence[int], seeds: Iterable[int | torch.Generator]) -> Tensor:
    """Noise of variance 1, (B, *shape): image i from seed i alone, or from generator i.

    Drawn on the CPU in float32, so that a seed gives the same noise on every device and in every batch.
    """
    generators = [torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed for seed in seeds]
    return torch.stack([torch.randn(shape, generator=one, device="cpu", dtype=torch.float32) for one in generators])


def standard_noise(x: Tensor, generator: Generators = None) -> Tensor:
    """Noise of variance 1, of x's shape and type and on its device; drawn on the CPU in float32.

    generator: one for the whole batch, or a list of one for each image, as in `seeded_noise`. Does not wait for a GPU.
    """
    if isinstance(generator, list):
        noise = seeded_noise(x.shape[1:], generator)
    else:
        noise = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float32)
    return noise.to(device=x.device, dtype=x.dtype, non_blocking=x.is_cuda)


def betas(config: NoiseConfig) -> Tensor:
    """(N,) beta, the share of variance that each forward step replaces by noise; float64.

    "scaled_linear" is Stable Diffusion's: linear in the root of beta (its own code calls this
    "linear"). "linear" is Ho et al. 2020, "cosine" Nichol and Dhariwal 2021.
    """
    start, end, n = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64, device="cpu") ** 2
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")
    if config.beta_schedule == "cosine":
        edges = torch.arange(n + 1, dtype=torch.float64, device="cpu") / n
        abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule is '{config.beta_schedule}': choose scaled_linear, linear or cosine")


def zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and stretch the root of abar so that it keeps its first value and ends at 0. Lin et al. 2023."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def make_timesteps(schedule: NoiseSchedule, num_inference_steps: int, timestep_spacing: str | None = None) -> Timesteps:
    """The timesteps of a sampler: n pairs (t, t_prev) from noise to image, the last t_prev None.

    timestep_spacing, in the notation of Lin et al. 2023, table 2, for n = 4 of 1000:
      "leading"        751, 501, 251, 1: multiples of N // n, plus 1. Stable Diffusion's own.
      "trailing"       999, 749, 499, 249: starts at the last timestep for every n, as zero terminal
                       SNR needs. The default with it; "leading" is the default without.
      "linspace"       999, 666, 333, 0, with fractions for other n: k-diffusion, and diffusers' Euler,
                       Euler ancestral and Heun.
      "linspace_open"  999, 749, 500, 250: the same without its end, rounded: diffusers' DPM++.
      "karras"         from the largest sigma/alpha to the smallest in equal steps of its 7th root, with
                       fractions: small steps near the image. Karras et al. 2022, equation 5.

    n is num_inference_steps. Raises ValueError for n not in 1...N and for an unknown spacing.
    """
    n, total = num_inference_steps, schedule.num_train_timesteps
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
        raise ValueError(f"{n} steps asked for: give a whole number from 1 to {total}")
    if timestep_spacing is None:
        timestep_spacing = "trailing" if schedule.config.zero_terminal_snr else "leading"
    times = _times(schedule, n, timestep_spacing)
    return list(zip(times, [*times[1:], None], strict=True))


def _times(schedule: NoiseSchedule, n: int, spacing: str) -> list[float]:
    """The n timesteps, falling. NumPy's arange and linspace round as they do in diffusers, ties included."""
    total, last = schedule.num_train_timesteps, schedule.num_train_timesteps - 1
    match spacing:
        case "leading":
            stride = total // n
            offset = min(1, last - stride * (n - 1))        # for n = 1000 the offset is 0
            return [stride * i + offset for i in reversed(range(n))]
        case "trailing":
            return (np.arange(total, 0, -total / n)[:n].round().astype(int) - 1).tolist()
        case "linspace":
            return [_whole(t) for t in np.linspace(last, 0, n).tolist()]
        case "linspace_open":
            times = np.linspace(0, last, n + 1).round().astype(int)[:0:-1].tolist()
            return times if n < total else list(range(last, -1, -1))    # n = 1000 would round two to one
        case "karras":
            return _karras(schedule, n)
        case _:
            raise ValueError(f"there is no spacing '{spacing}': choose one of {', '.join(TIMESTEP_SPACINGS)}")


def _whole(t: float) -> float:
    return round(t) if abs(t - round(t)) < 1e-9 else t


def _karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> list[float]:
    """Timesteps, mostly fractions, whose sigma/alpha are evenly spaced in their root of order rho."""
    table = schedule.ve_sigmas                                                       # (N,), increasing
    high, low = (table[[-1, 0]] ** (1 / rho)).tolist()
    sigmas = torch.linspace(high, low, n, dtype=torch.float64, device="cpu") ** rho  # (n,)
    above = torch.searchsorted(table, sigmas).clamp(1, schedule.num_train_timesteps - 1)
    part = (sigmas - table[above - 1]) / (table[above] - table[above - 1])
    return [_whole(t) for t in (above - 1 + part.clamp(0, 1)).tolist()]
