"""Samplers: from noise to a clean latent, in steps.

B  batch    C, h, w  channels, rows and columns of the latent

Each sampler is a generator over one contract, `denoise(x, t) -> x0`, where

    x       (B, C, h, w), variance preserving: x = alpha x0 + sigma eps, with the schedule's alpha, sigma
    t       a Python number, the timestep; fractions on some grids
    x0      (B, C, h, w), the clean latent that the network sees in x

and iterates over pairs (t, t_prev) from `schedule.make_timesteps`. `guidance.predict_x0` makes `denoise` from
a network, whatever it predicts, and its guidance. x starts as noise of variance 1. The papers' letters:

    alpha, sigma    alpha_t and sigma_t of `schedule` at t; alpha_prev, sigma_prev at t_prev
    eps             the noise in x, (x - alpha x0) / sigma
    s               sigma / alpha, the sigma of variance-exploding papers (`schedule.ve_sigmas`)
    h               lambda(t_prev) - lambda(t), a step in lambda = log(alpha/sigma); h_last the previous step's
    D               the data prediction (x0) that a multistep solver uses for the step

Papers that work with sigma/alpha = s and X = x/alpha ("variance exploding", k-diffusion, diffusers'
Euler, Euler ancestral and Heun) solve dX/ds = eps. Their steps are written for x here, without a division
by alpha, so that they also work where alpha is 0 and s infinite (zero terminal SNR). k-diffusion and
diffusers' Euler samplers start at X = s_max noise, which is x = sigma noise here, 0.2 % less than noise for
Stable Diffusion; diffusers with "leading" timesteps starts at x = noise, as here.

Coefficients are Python floats from float64, so no step synchronises with the device. Noise is drawn on the CPU
in float32 and moved, so that a seed gives the same image on every machine.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .schedule import Generators, NoiseSchedule, Timesteps, make_timesteps, standard_noise

Denoise = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """The state of a sampler after a step."""

    index: int      # 0...n-1
    t: float        # the timestep that the step started from
    x: Tensor       # (B, C, h, w) the latent after the step
    x0: Tensor      # (B, C, h, w) the clean latent predicted at t, on which the step was built


def ddpm(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
         generator: Generators = None) -> Iterator[Step]:
    """Draw x_prev from the posterior q(x_prev | x, x0). Ho et al. 2020, equation 7, with the small variance.

    Ends at the predicted x0 itself, as in diffusers' DDPMScheduler.
    """
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        a = (alpha / alpha_prev) ** 2               # the paper's alpha_t, 1 - beta_t, from t_prev to t
        x0 = denoise(x, t)
        mean = (alpha_prev * (1 - a) * x0 + math.sqrt(a) * sigma_prev**2 * x) / sigma**2
        x = mean + gaussian(x, sigma_prev / sigma * math.sqrt(1 - a), generator)
        yield Step(index, t, x, x0)


def ddim(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *, eta: float = 0.0,
         set_alpha_to_one: bool = False, generator: Generators = None) -> Iterator[Step]:
    """x_prev from the predicted x0 and eps, a share of eps replaced by fresh noise. Song et al. 2021, equation 12.

    eta in 0...1: 0 is deterministic, 1 has DDPM's variance. Stable Diffusion ends at the noise of timestep 0
    (sigma 0.029), with `set_alpha_to_one` at the predicted x0 itself.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (no fresh noise) to 1 (as in DDPM)")
    end = None if set_alpha_to_one else 0
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(end if t_prev is None else t_prev)
        std = eta * sigma_prev / sigma * math.sqrt(1 - (alpha / alpha_prev) ** 2)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + math.sqrt(sigma_prev**2 - std**2) * eps + gaussian(x, std, generator)
        yield Step(index, t, x, x0)


def ddim_coefficients(schedule: NoiseSchedule, timesteps: Timesteps) -> list[tuple[float, float]]:
    """Coefficients (a, b) of each DDIM step, x_prev = a x + b x0, computed before sampling.

    `ddim` at eta 0 with eps = (x - alpha x0) / sigma inserted; they depend on the schedule and the timesteps
    alone. Ends at the noise of timestep 0, as Stable Diffusion does.
    """
    factors = []
    for t, t_prev in timesteps:
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(0 if t_prev is None else t_prev)
        factors.append((sigma_prev / sigma, alpha_prev - sigma_prev * alpha / sigma))
    return factors


def euler(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
          generator: Generators = None) -> Iterator[Step]:
    """Euler's method for dX/ds = eps: X + (s_prev - s) eps. Karras et al. 2022, algorithm 1 without churn.

    Since X = x0 + s eps, the step leads to X_prev = x0 + s_prev eps, and times alpha_prev that is
    DDIM's step. Ends at s = 0, the predicted x0.
    """
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + sigma_prev * eps
        yield Step(index, t, x, x0)


def euler_ancestral(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
                    eta: float = 1.0, generator: Generators = None) -> Iterator[Step]:
    """Euler ancestral: an Euler step to less noise than at t_prev, then fresh noise up to it. k-diffusion, 2022.

    eta in 0...1: 0 is plain Euler; 1 adds as much noise as the forward process does. Ends at the predicted x0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (plain Euler) to 1 (all noise fresh)")
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        shrink = sigma_prev / alpha_prev * alpha / sigma                # s_prev / s
        sigma_up = eta * sigma_prev * math.sqrt(1 - shrink**2)
        sigma_down = math.sqrt(sigma_prev**2 - sigma_up**2)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + sigma_down * eps + gaussian(x, sigma_up, generator)
        yield Step(index, t, x, x0)


def heun(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
         generator: Generators = None) -> Iterator[Step]:
    """Heun's method of second order: an Euler step, corrected by the mean slope. Karras et al. 2022, algorithm 1.

    Two calls of `denoise` a step; one in the last step, and one where alpha is 0 or close to it: there s is
    infinite, and a mean of slopes over the step has no meaning.
    """
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + sigma_prev * eps
        if t_prev is not None and alpha > NO_SIGNAL:
            eps_prev = (x - alpha_prev * denoise(x, t_prev)) / sigma_prev
            x = x + (sigma_prev - alpha_prev * sigma / alpha) * (eps_prev - eps) / 2
        yield Step(index, t, x, x0)


def dpmpp_2m(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
             generator: Generators = None) -> Iterator[Step]:
    """DPM-Solver++(2M), multistep of second order: x0 extrapolated in lambda. Lu et al. 2022, algorithm 2.

    The first step, and the last, which ends at x0, are of first order, those of DDIM.
    """
    x0_last = h_last = None
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0 = D = denoise(x, t)
        h = log(alpha_prev / sigma_prev) - log(alpha / sigma) if t_prev is not None else math.inf
        if x0_last is not None and t_prev is not None:
            D = x0 + h / h_last * (x0 - x0_last) / 2
        x = sigma_prev / sigma * x + (alpha_prev - sigma_prev * alpha / sigma) * D
        x0_last, h_last = x0, h
        yield Step(index, t, x, x0)


def pndm(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
         set_alpha_to_one: bool = False, generator: Generators = None) -> Iterator[Step]:
    """DDIM with eps from the last four timesteps (Adams-Bashforth). PLMS in Liu et al. 2022, PNDM's later steps.

    Stable Diffusion's first sampler. In place of PNDM's Runge-Kutta steps it begins with Heun's, so n
    steps take n + 1 calls of `denoise`; where x holds no signal with DDIM's, and n. `set_alpha_to_one`
    is as in `ddim`. Of second order, though the formula is of fourth: its weights take the steps for equal.

    With "v_prediction" diffusers' PNDMScheduler combines v in place of eps, which is of first order only,
    and so does this. With zero terminal SNR, of which that scheduler knows nothing, it is eps again.
    """
    by_v = schedule.config.prediction_type == "v_prediction" and not schedule.config.zero_terminal_snr
    end, outputs = None if set_alpha_to_one else 0, []
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(end if t_prev is None else t_prev)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        outputs = [alpha * eps - sigma * x0 if by_v else eps, *outputs[:3]]     # the newest first
        x = alpha_prev * x0 + sigma_prev * eps
        change = sum(weight * output for weight, output in zip(ADAMS_BASHFORTH[len(outputs)], outputs, strict=True))
        if index == 0 and t_prev is not None and alpha > NO_SIGNAL:
            x0_prev = denoise(x, t_prev)
            eps_prev = (x - alpha_prev * x0_prev) / sigma_prev
            change = ((alpha_prev * eps_prev - sigma_prev * x0_prev if by_v else eps_prev) - outputs[0]) / 2
        if index > 0 or alpha > NO_SIGNAL:
            x = x + (sigma_prev * alpha - alpha_prev * sigma) / (1 if by_v else alpha) * change
        yield Step(index, t, x, x0)


def unipc(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
          generator: Generators = None) -> Iterator[Step]:
    """UniPC-2 with B2(h), a predictor-corrector of third order. Zhao et al. 2023.

    With that B(h) the predictor (UniP) is the step of `dpmpp_2m`. The corrector (UniC) costs no call of `denoise`:
    it uses the next step's, made at the predicted x.

    x_first     the first-order (DDIM) result of the step        B      its coefficient of x0
    """
    x_first = B = h = h_last = x0_last = x0_older = None                     # of the previous step
    for index, (t, t_prev) in enumerate(timesteps):
        x0 = denoise(x, t)
        if index > 0:
            older, newer = correction(h, h_last)
            x = x_first + B * (older * (x0_older - x0_last) + newer * (x0 - x0_last))
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0_older, x0_last = x0_last if index > 0 else x0, x0
        h_last, h = h, log(alpha_prev / sigma_prev) - log(alpha / sigma) if t_prev is not None else math.inf
        B = alpha_prev - sigma_prev * alpha / sigma
        x = x_first = sigma_prev / sigma * x + B * x0
        if index > 0 and t_prev is not None:
            x = x_first + B * h / h_last * (x0_last - x0_older) / 2
        yield Step(index, t, x, x0)


def correction(h: float, h_last: float | None) -> tuple[float, float]:
    """UniC's weights of x0 one timestep earlier and of x0 at the step's end, each minus x0 at its start.

    h is the step in lambda, h_last the previous one, None in the first step, where the trapezoidal rule gives one
    half. The weights make the integral of e^lambda x0 over the step exact for x0 quadratic in lambda: the linear
    system of Zhao et al. 2023, solved for its two unknowns.
    """
    if h_last is None:
        return 0.0, 0.5
    r, decay = -h_last / h, math.expm1(-h)
    first = (-decay / h - 1) / decay                            # the mean of (lambda - start) / h under e^lambda
    second = 2 * ((decay / h + 1) / h - 1 / 2) / decay          # that of its square
    return (first - second) / (1 - r) / r, first - (first - second) / (1 - r)


ADAMS_BASHFORTH = {     # a function's mean over the next step, less its newest value, from its newest values
    1: (0.0,), 2: (1 / 2, -1 / 2), 3: (11 / 12, -16 / 12, 5 / 12), 4: (31 / 24, -59 / 24, 37 / 24, -9 / 24),
}
SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_ancestral": euler_ancestral, "heun": heun,
    "dpmpp_2m": dpmpp_2m, "pndm": pndm, "unipc": unipc,
}
# The defaults of diffusers' schedulers; every sampler accepts all of them.
DEFAULT_TIMESTEP_SPACING = {
    "ddpm": "leading", "ddim": "leading", "euler": "linspace", "euler_ancestral": "linspace",
    "heun": "linspace", "dpmpp_2m": "linspace_open", "pndm": "leading", "unipc": "linspace_open",
}
NO_SIGNAL = 2.0**-12    # the root of schedule.ALMOST_ZERO


def get_sampler(name: str) -> Callable[..., Iterator[Step]]:
    """The sampler of that name. Raises ValueError for an unknown name and lists the known ones."""
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make_timesteps_for(sampler: str, schedule: NoiseSchedule, num_inference_steps: int,
                       timestep_spacing: str | None = None) -> Timesteps:
    """The timesteps of a sampler, given by name, in its default spacing.

    timestep_spacing: unless given, the default of diffusers' scheduler of that name, or "trailing"
    for a schedule with zero terminal SNR, where sampling has to start at the last timestep. Raises ValueError for
    an unknown sampler or spacing, and for num_inference_steps not in 1...N.
    """
    get_sampler(sampler)
    if timestep_spacing is None and not schedule.config.zero_terminal_snr:
        timestep_spacing = DEFAULT_TIMESTEP_SPACING[sampler]
    return make_timesteps(schedule, num_inference_steps, timestep_spacing)


def gaussian(x: Tensor, std: float, generator: Generators) -> Tensor | float:
    """Gaussian noise of standard deviation std and x's shape; 0.0, with nothing drawn, where std is 0."""
    if std == 0:
        return 0.0
    return std * standard_noise(x, generator)


def log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
