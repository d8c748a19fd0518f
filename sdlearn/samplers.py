"""Samplers: from noise to a clean latent, in steps.

B  batch    C, h, w  channels, rows and columns of the latent

Each sampler is a generator over one contract, `denoise(x, t) -> x0`, where

    x       (B, C, h, w), variance preserving: x = alpha x0 + sigma eps, with the schedule's alpha, sigma
    t       a Python number, the timestep; fractions on some grids
    x0      (B, C, h, w), the clean latent that the network sees in x

and walks a grid of pairs (t, t_prev) from `schedule.make_timesteps`. What the network predicts, and its
guidance, are hidden in `denoise` (`guidance.predict_x0`). x begins as noise of variance 1.

Papers that work with sigma/alpha = s and X = x/alpha ("variance exploding", k-diffusion, diffusers'
Euler, Euler ancestral and Heun) solve dX/ds = eps. Their steps are here as well, with x put back in
place of X and alpha not a divisor, so that a schedule with zero terminal SNR (alpha 0, s infinite)
is no trouble. k-diffusion and diffusers' Euler kind begin at X = s_max noise, which is x = sigma noise
here, 0.2 % less than noise for Stable Diffusion; diffusers on a "leading" grid at x = noise, as here.

Coefficients are Python floats from float64: no step waits for a device. Noise is drawn on the CPU, in
float32, and moved: a seed gives the same image on every machine.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .schedule import Generators, NoiseSchedule, Timesteps, make_timesteps, standard_noise

Denoise = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """What a sampler yields: the state after a step."""

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
        kept = (alpha / alpha_prev) ** 2            # of the variance, going forward from t_prev to t
        x0 = denoise(x, t)
        mean = (alpha_prev * (1 - kept) * x0 + math.sqrt(kept) * sigma_prev**2 * x) / sigma**2
        x = mean + gaussian(x, sigma_prev / sigma * math.sqrt(1 - kept), generator)
        yield Step(index, t, x, x0)


def ddim(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *, eta: float = 0.0,
         set_alpha_to_one: bool = False, generator: Generators = None) -> Iterator[Step]:
    """Noise x0 again with the noise just predicted, a part of it fresh. Song et al. 2021, equation 12.

    eta in 0...1: none of the noise fresh, or as much as in DDPM. Stable Diffusion ends at the noise of
    timestep 0 (sigma 0.029); with `set_alpha_to_one` at the predicted x0 itself.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (no fresh noise) to 1 (as in DDPM)")
    end = None if set_alpha_to_one else 0
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(end if t_prev is None else t_prev)
        fresh = eta * sigma_prev / sigma * math.sqrt(1 - (alpha / alpha_prev) ** 2)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + math.sqrt(sigma_prev**2 - fresh**2) * eps + gaussian(x, fresh, generator)
        yield Step(index, t, x, x0)


def ddim_coefficients(schedule: NoiseSchedule, timesteps: Timesteps) -> list[tuple[float, float]]:
    """DDIM's steps as numbers, made before a run: (a, b) for each pair of the grid, x_prev = a x + b x0.

    That of `ddim` at eta 0: with eps = (x - alpha x0) / sigma put in, nothing is left but two factors, which depend
    on the schedule and the grid alone. Ends at the noise of timestep 0, as Stable Diffusion does.
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
    """Euler down to less noise than t_prev has, then up to it with fresh noise. k-diffusion, 2022.

    With eta 1, what is added each time is what the forward process would add. Ends at the predicted x0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: give a number from 0 (plain Euler) to 1 (all noise fresh)")
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        shrink = sigma_prev / alpha_prev * alpha / sigma                # s_prev / s
        up = eta * sigma_prev * math.sqrt(1 - shrink**2)
        down = math.sqrt(sigma_prev**2 - up**2)
        x0 = denoise(x, t)
        eps = (x - alpha * x0) / sigma
        x = alpha_prev * x0 + down * eps + gaussian(x, up, generator)
        yield Step(index, t, x, x0)


def heun(denoise: Denoise, x: Tensor, timesteps: Timesteps, schedule: NoiseSchedule, *,
         generator: Generators = None) -> Iterator[Step]:
    """Euler's step, then again with the mean of the slopes at both ends. Karras et al. 2022, algorithm 1.

    Two calls of `denoise` a step, one in the last, and one where x holds no signal: there s is
    infinite or close to it, and a mean over the whole way from there says nothing.
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
    """DPM-Solver++(2M): x0 extrapolated along lambda = log(alpha/sigma). Lu et al. 2022, algorithm 2.

    The first step and the last, which ends at x0, are of first order: DDIM's.
    """
    x0_last = rise_last = None
    for index, (t, t_prev) in enumerate(timesteps):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0 = ahead = denoise(x, t)
        rise = log(alpha_prev / sigma_prev) - log(alpha / sigma) if t_prev is not None else math.inf
        if x0_last is not None and t_prev is not None:
            ahead = x0 + rise / rise_last * (x0 - x0_last) / 2
        x = sigma_prev / sigma * x + (alpha_prev - sigma_prev * alpha / sigma) * ahead
        x0_last, rise_last = x0, rise
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
    """DPM++ 2M, each step put right once x0 at its end is known. Zhao et al. 2023, UniPC-2 with B2(h).

    With that B(h) the predictor is the step of `dpmpp_2m`. The corrector costs no call of `denoise`: it
    takes the one of the next step, made at the x that was predicted. It brings the order to three.
    """
    straight = gain = rise = rise_last = x0_last = x0_older = None           # of the step before
    for index, (t, t_prev) in enumerate(timesteps):
        x0 = denoise(x, t)
        if index > 0:
            older, newer = correction(rise, rise_last)
            x = straight + gain * (older * (x0_older - x0_last) + newer * (x0 - x0_last))
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev)
        x0_older, x0_last = x0_last if index > 0 else x0, x0
        rise_last, rise = rise, log(alpha_prev / sigma_prev) - log(alpha / sigma) if t_prev is not None else math.inf
        gain = alpha_prev - sigma_prev * alpha / sigma
        x = straight = sigma_prev / sigma * x + gain * x0
        if index > 0 and t_prev is not None:
            x = straight + gain * rise / rise_last * (x0_last - x0_older) / 2
        yield Step(index, t, x, x0)


def correction(rise: float, rise_last: float | None) -> tuple[float, float]:
    """UniC's weights of x0 one timestep earlier, and of x0 at the step's end, both less x0 at its start.

    rise is the step in lambda = log(alpha/sigma), rise_last the one before, None in the first step, which
    has the half of a trapezoid. The weights make the integral of e^lambda x0 over the step exact for x0 a
    parabola in lambda: the linear system of Zhao et al. 2023, solved by hand for its two unknowns.
    """
    if rise_last is None:
        return 0.0, 0.5
    back, decay = -rise_last / rise, math.expm1(-rise)
    first = (-decay / rise - 1) / decay                         # the mean of (lambda - start) / rise under e^lambda
    second = 2 * ((decay / rise + 1) / rise - 1 / 2) / decay    # that of its square
    return (first - second) / (1 - back) / back, first - (first - second) / (1 - back)


ADAMS_BASHFORTH = {     # a function's mean over the next step, less its newest value, from its newest values
    1: (0.0,), 2: (1 / 2, -1 / 2), 3: (11 / 12, -16 / 12, 5 / 12), 4: (31 / 24, -59 / 24, 37 / 24, -9 / 24),
}
SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_ancestral": euler_ancestral, "heun": heun,
    "dpmpp_2m": dpmpp_2m, "pndm": pndm, "unipc": unipc,
}
# What diffusers' schedulers use unless told otherwise; the samplers run on any grid.
DEFAULT_TIMESTEP_SPACING = {
    "ddpm": "leading", "ddim": "leading", "euler": "linspace", "euler_ancestral": "linspace",
    "heun": "linspace", "dpmpp_2m": "linspace_open", "pndm": "leading", "unipc": "linspace_open",
}
NO_SIGNAL = 2.0**-12    # the root of schedule.ALMOST_ZERO


def get_sampler(name: str) -> Callable[..., Iterator[Step]]:
    """The sampler of that name. Raises ValueError, naming those there are."""
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make_timesteps_for(sampler: str, schedule: NoiseSchedule, num_inference_steps: int,
                       timestep_spacing: str | None = None) -> Timesteps:
    """The timesteps of a sampler, by its name.

    Unless `timestep_spacing` is given it is what diffusers' scheduler of that name starts with, or "trailing"
    for a schedule with zero terminal SNR, whose grid must begin at the last timestep. Raises
    ValueError for an unknown sampler or spacing, and for n not in 1...N.
    """
    get_sampler(sampler)
    if timestep_spacing is None and not schedule.config.zero_terminal_snr:
        timestep_spacing = DEFAULT_TIMESTEP_SPACING[sampler]
    return make_timesteps(schedule, num_inference_steps, timestep_spacing)


def gaussian(x: Tensor, std: float, generator: Generators) -> Tensor | float:
    """Noise of that standard deviation and of x's shape; 0.0, and nothing drawn, where std is 0."""
    if std == 0:
        return 0.0
    return std * standard_noise(x, generator)


def log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
