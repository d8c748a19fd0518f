"""Exercises of notebook 03: DDPM, DDIM, Euler, and tests common to all samplers."""

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from ... import samplers
from ...samplers import Step
from ...schedule import NoiseSchedule, make_timesteps
from ..testing import Answer, Wrong, randn, require, require_shape
from . import lesson
from .schedule import EPS, ZERO_SNR

STEPS, START = 6, randn(2, 4, 8, 8, seed=3)
LIMIT = 40              # the most steps that are drawn from a sampler, which may never end


def denoise(x: Tensor, t: float) -> Tensor:
    """In place of a network: smooth in x and t, never linear, and each image by itself."""
    return torch.tanh(1.3 * x + 0.5 * math.cos(t / 150)) + 0.2 * x.flip(-1)


def walk(sampler: Callable, schedule: NoiseSchedule = EPS, grid: list | None = None, look: Callable = denoise,
         **settings) -> list[Tensor]:
    """The latents after each step of the sampler."""
    steps = sampler(look, START, grid or make_timesteps(schedule, STEPS), schedule, **settings)
    if not isinstance(steps, Iterator):
        raise Wrong("It is no generator: `yield` a Step after each step, in place of returning at the end")
    found = []
    for step in islice(steps, LIMIT):
        if not (isinstance(step, tuple) and len(step) == 4):
            raise Wrong("It must yield Step(index, t, x, x0) after each step")
        require_shape(step[2], START.shape, "x of a step")
        found.append(step[2].detach().clone())
    return found


def yielded(sampler: Callable) -> list[Tensor]:
    """The x of each step, read after the last step: a sampler must not overwrite what it has yielded."""
    steps = list(islice(sampler(denoise, START, make_timesteps(EPS, 3), EPS), LIMIT))
    return [step[2] for step in steps]


def require_valid_steps(sampler: Answer):
    """Common to all samplers, step "shape": as many steps as pairs, with their index, their t and their x0."""
    grid = make_timesteps(EPS, STEPS)
    sampler.agrees(lambda answer: 0 * len(walk(answer)))            # errors are reported here, with their cause
    require(len(found := walk(sampler)) == STEPS, f"It yields {len(found)} steps where the grid has {STEPS}")
    steps = list(islice(sampler(denoise, START, grid, EPS), LIMIT))
    require(not torch.equal(steps[0][2], START), "The x of the first step is the one that it began with: `yield` after "
            "the step is made, with the x that it leads to")
    for index, (step, (t, _)) in enumerate(zip(steps, grid, strict=True)):
        require(step[0] == index, f"Step {index} says that its index is {step[0]}: it counts from 0")
        require(step[1] == t, f"Step {index} says that its t is {step[1]} where it started from {t}")
        require_shape(step[3], START.shape, "x0 of a step")


def require_predicted_x0(sampler: Answer):
    """Each Step holds the x0 that was predicted where the step began."""
    x = START
    for index, t, after, x0 in islice(sampler(denoise, START, make_timesteps(EPS, STEPS), EPS), LIMIT):
        require(torch.allclose(x0, denoise(x, t), atol=1e-4), f"The x0 of step {index} is another one than "
                "`denoise(x, t)` gave: yield what was predicted where the step began")
        x = after.detach().clone()


def count_calls(sampler: Callable) -> int:
    """How often it calls `denoise` on the grid."""
    count = 0

    def look(x, t):
        nonlocal count
        count += 1
        return denoise(x, t)
    walk(sampler, look=look)
    return count


def require_one_call_per_step(sampler: Answer):
    require((count := count_calls(sampler)) == STEPS,
            f"It calls `denoise` {count} times for {STEPS} steps where once a step will do: each is a run of the U-Net")


def stepping(step: Callable) -> Callable:
    """A sampler of `step(x, x0, alpha, sigma, alpha_prev, sigma_prev, generator)`, which makes the next x."""
    def sampler(denoise, x, grid, schedule, *, generator=None, **_):
        for index, (t, t_prev) in enumerate(grid):
            x0 = denoise(x, t)
            x = step(x, x0, *schedule.at(t), *schedule.at(t_prev), generator)
            yield Step(index, t, x, x0)
    return sampler


def posterior(x, x0, a, s, ap, sp, generator=None, *, mean: Callable | None = None, std: Callable | None = None):
    """DDPM's step, or one with another mean or standard deviation."""
    k = (a / ap) ** 2
    middle = (ap * (1 - k) * x0 + math.sqrt(k) * sp**2 * x) / s**2 if mean is None else mean(x, x0, a, s, ap, sp)
    return middle + samplers.gaussian(x, sp / s * math.sqrt(1 - k) if std is None else std(a, s, ap, sp), generator)


# --- 3.5 ----------------------------------------------------------------------------------------------

ddpm = lesson.exercise(
    5, samplers.ddpm, grade="supported", minutes=15, also=[samplers.gaussian],
    asks="Write `ddpm(denoise, x, timesteps, schedule, *, generator=None)`: draw each x from the posterior.",
    hints=["q(x_prev | x, x0) is Gaussian. Its mean mixes x0 and x; its variance is what is lost of x_prev in x.",
           "With k = (alpha / alpha_prev)²: mean = (alpha_prev (1 - k) x0 + sqrt(k) sigma_prev² x) / sigma², and the "
           "standard deviation is sigma_prev / sigma sqrt(1 - k).",
           "Draw with `torch.randn(x.shape, generator=generator)`. Into the last step, where t_prev is None and "
           "`schedule.at(None)` is (1, 0), goes no noise: the formula gives 0, and the draw is left out."])


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ddpm.test("shape")(require_valid_steps)


@ddpm.test("value")
def one_step_of_the_posterior(ddpm):
    first, second = (walk(ddpm, grid=[(500, 400)], generator=seeded(seed))[0] for seed in (1, 2))
    [mean] = walk(stepping(lambda *values: posterior(*values, std=lambda *_: 0.0)), grid=[(500, 400)])
    require(not torch.equal(first, second) or torch.allclose(first, mean, atol=1e-4),
            "Two generators with different seeds give one image: does the noise come from `generator`?")
    ddpm.agrees(lambda answer: walk(answer, grid=[(500, 400)], generator=seeded()))


@ddpm.test("value")
def the_whole_way_down(ddpm):
    ddpm.agrees(lambda answer: walk(answer, generator=seeded()), what="The way down,")


@ddpm.test("edge case")
def ddpm_at_the_end(ddpm):
    ddpm.agrees(lambda answer: walk(answer, grid=[(100, None)], generator=seeded()), what="The last step,")


@ddpm.test("edge case")
def ddpm_calls_denoise_once_per_step(ddpm):
    require_one_call_per_step(ddpm)
    require_predicted_x0(ddpm)


for diagnosis, parts in [
    ("it is the mean alone: DDPM adds fresh noise in every step but the last", {"std": lambda a, s, ap, sp: 0.0}),
    ("the noise has the posterior's variance for its standard deviation: take the square root",
     {"std": lambda a, s, ap, sp: sp**2 / s**2 * (1 - (a / ap) ** 2)}),
    ("the noise has the large variance, 1 - k, of the forward step: the posterior's is smaller by sigma_prev² / sigma²",
     {"std": lambda a, s, ap, sp: math.sqrt(1 - (a / ap) ** 2) if sp else 0.0}),
    ("the noise has all of sigma_prev: then nothing of x is left in x_prev",
     {"std": lambda a, s, ap, sp: sp}),
    ("k is alpha / alpha_prev where it must be the square of that", {
        "mean": lambda x, x0, a, s, ap, sp: (ap * (1 - a / ap) * x0 + math.sqrt(a / ap) * sp**2 * x) / s**2,
        "std": lambda a, s, ap, sp: sp / s * math.sqrt(1 - a / ap)}),
    ("x0 and x have each other's weight in the mean",
     {"mean": lambda x, x0, a, s, ap, sp: (ap * (1 - (a / ap) ** 2) * x + a / ap * sp**2 * x0) / s**2}),
    ("the weight of x has k where it must have its root",
     {"mean": lambda x, x0, a, s, ap, sp: (ap * (1 - (a / ap) ** 2) * x0 + (a / ap) ** 2 * sp**2 * x) / s**2}),
    ("the mean has DDIM's noise in it as well: the posterior brings its own",
     {"mean": lambda x, x0, a, s, ap, sp: ap * x0 + sp * (x - a * x0) / s}),
    ("the mean forgets x: it is x0 scaled for t_prev", {"mean": lambda x, x0, a, s, ap, sp: ap * x0}),
]:
    ddpm.mistake(diagnosis)(stepping(lambda *values, parts=parts: posterior(*values, **parts)))


@ddpm.mistake("the noise does not come from the generator that was given")
@stepping
def other_noise(x, x0, a, s, ap, sp, generator):
    return posterior(x, x0, a, s, ap, sp)


# --- 3.6 and 3.7 --------------------------------------------------------------------------------------

def in_X(last: int | None, look: Callable = lambda denoise, x, X, t: denoise(x, t)) -> Callable:
    """Euler's method in X = x / alpha, right wherever alpha is not 0; it ends at timestep `last`."""
    def sampler(denoise, x, grid, schedule, **_):
        for index, (t, t_prev) in enumerate(grid):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(last if t_prev is None else t_prev)
            here, there, X = s / a, sp / ap, x / a
            x0 = look(denoise, x, X, t)
            x = ap * (X + (there - here) * (X - x0) / here)
            yield Step(index, t, x, x0)
    return sampler


def deterministic(exercise, last: int | None):
    """Tests and mistakes of DDIM and Euler, which are one line in two notations; `last` is where they end."""
    exercise.test("shape")(require_valid_steps)

    @exercise.test("value")
    def one_step(sampler):
        sampler.agrees(lambda answer: walk(answer, grid=[(600, 400)]))

    @exercise.test("value")
    def the_whole_way(sampler):
        sampler.agrees(walk, what="The way down,")

    exercise.mistake("it divides by alpha, which is 0 where x is noise alone: multiply the formula out until only "
                     "sigma is divided by")(in_X(last))
    exercise.mistake("`denoise` is given X where it must be given x: it was trained on x = alpha X")(
        in_X(last, lambda denoise, x, X, t: denoise(X, t)))
    for diagnosis, step in [
        ("x is scaled by alpha_prev, where the x0 that was predicted must be: alpha_prev x0 + sigma_prev eps",
         lambda x, x0, a, s, ap, sp, _: ap * x + sp * (x - a * x0) / s),
        ("eps is multiplied by the old sigma: the new x has sigma_prev of it",
         lambda x, x0, a, s, ap, sp, _: ap * x0 + x - a * x0),
        ("x0 is multiplied by the old alpha: the new x has alpha_prev of it",
         lambda x, x0, a, s, ap, sp, _: a * x0 + sp * (x - a * x0) / s),
        ("eps is x - x0 where it must be (x - alpha x0) / sigma",
         lambda x, x0, a, s, ap, sp, _: ap * x0 + sp * (x - x0)),
        ("eps is not divided by sigma: x - alpha x0 is sigma eps",
         lambda x, x0, a, s, ap, sp, _: ap * x0 + sp * (x - a * x0)),
        ("eps is (x - x0) / sigma: x holds only alpha of x0",
         lambda x, x0, a, s, ap, sp, _: ap * x0 + sp * (x - x0) / s),
        ("only x0 is left: the noise of t_prev must be in it as well",
         lambda x, x0, a, s, ap, sp, _: ap * x0),
        ("the noise is fresh: here it is the one that was predicted",
         lambda x, x0, a, s, ap, sp, g: ap * x0 + samplers.gaussian(x, sp, g)),
        ("this is the step for X = x / alpha: divide x by alpha first, and multiply by alpha_prev at the end",
         lambda x, x0, a, s, ap, sp, _: x + (sp / ap - s / a) * (x - a * x0) / s),
        ("the variances are used where their square roots are needed",
         lambda x, x0, a, s, ap, sp, _: ap**2 * x0 + sp**2 * (x - a**2 * x0) / s**2),
    ]:
        exercise.mistake(diagnosis)(stepping(step))


ddim = lesson.exercise(
    6, samplers.ddim, grade="guided", minutes=10,
    asks="Write `ddim(denoise, x, timesteps, schedule)` without fresh noise (eta 0).",
    beyond="The package's `ddim` can make a part of the noise fresh (eta), and ends at x0 itself only on request; "
           "the exercise asks for eta 0, down to the noise of timestep 0.",
    hints=["Predict x0. What is left of x, x - alpha x0, is noise, sigma times eps.",
           "Put x0 and eps together again with the shares of t_prev: alpha_prev x0 + sigma_prev eps.",
           "Stable Diffusion ends at the noise of timestep 0: in the last step, where t_prev is None, take "
           "`schedule.at(0)`."])
deterministic(ddim, last=0)


@ddim.test("edge case")
def it_ends_at_timestep_0(ddim):
    ddim.agrees(lambda answer: walk(answer, grid=[(100, None)]), what="The last step,")


@ddim.test("edge case")
def starts_at_zero_signal(ddim):
    ddim.agrees(lambda answer: walk(answer, ZERO_SNR), what="Where x begins as noise alone, the way down,")


@ddim.test("edge case")
def ddim_does_not_overwrite_yielded_steps(ddim):
    ddim.agrees(yielded, what="The x of all steps, read after the last step,")
    require_predicted_x0(ddim)


@ddim.mistake("it ends at x0 itself: DDIM of Stable Diffusion ends at the noise of timestep 0, `schedule.at(0)`")
def to_the_end(denoise, x, grid, schedule):
    return samplers.ddim(denoise, x, grid, schedule, set_alpha_to_one=True)


@ddim.mistake("all of the noise is fresh, as with eta 1: here none is")
def fresh(denoise, x, grid, schedule):
    return samplers.ddim(denoise, x, grid, schedule, eta=1.0)


euler = lesson.exercise(
    7, samplers.euler, grade="guided", minutes=10,
    asks="Write `euler(denoise, x, timesteps, schedule)`: Euler's method for dX/ds = eps, with X = x / alpha "
         "and s = sigma / alpha.",
    hints=["Euler: X_prev = X + (s_prev - s) eps. Since X = x0 + s eps, that is x0 + s_prev eps.",
           "Times alpha_prev: x_prev = alpha_prev x0 + sigma_prev eps, and nothing is divided by alpha.",
           "`schedule.at(None)` is (1, 0): the last step leads to x0 without a case of its own."])
deterministic(euler, last=None)


@euler.test("edge case")
def it_ends_at_x0(euler):
    euler.agrees(lambda answer: walk(answer, grid=[(100, None)]), what="The last step,")


@euler.test("edge case")
def it_starts_with_alpha_0(euler):
    euler.agrees(lambda answer: walk(answer, ZERO_SNR), what="Where x begins as noise alone, the way down,")


@euler.test("edge case")
def euler_does_not_overwrite_yielded_steps(euler):
    euler.agrees(yielded, what="The x of all steps, read after the last step,")
    require_predicted_x0(euler)


@euler.mistake("it ends at the noise of timestep 0, as DDIM does: Euler goes down to s = 0, which is x0")
def as_ddim(denoise, x, grid, schedule):
    return samplers.ddim(denoise, x, grid, schedule)
