"""Exercises of notebook 03: samplers of second order, Heun and DPM++ 2M."""

import math
from collections.abc import Callable

from ... import samplers
from ...samplers import Step
from ..testing import require
from . import lesson
from .samplers import (
    STEPS,
    count_calls,
    require_one_call_per_step,
    require_predicted_x0,
    require_valid_steps,
    walk,
    yielded,
)

# --- 3.8 ----------------------------------------------------------------------------------------------

heun = lesson.exercise(
    8, samplers.heun, grade="supported", minutes=15,
    asks="Write `heun(denoise, x, timesteps, schedule)`: Euler's step, then again with the mean of both slopes.",
    beyond="The package's `heun` also falls back to Euler's step where x holds no signal at all; the exercise asks for "
           "grids that begin with some.",
    hints=["Make Euler's step first. At its end, at t_prev, ask `denoise` again: that gives eps there.",
           "In X = x / alpha and s = sigma / alpha: X_prev = X + (s_prev - s) (eps + eps_prev) / 2, from the old X.",
           "So Euler's x moves by alpha_prev (s_prev - s) (eps_prev - eps) / 2. In the last step t_prev is None, there "
           "is no second call, and Euler's step is the result."])
heun.test("shape")(require_valid_steps)


@heun.test("value")
def one_step_of_heun(heun):
    heun.agrees(lambda answer: walk(answer, grid=[(600, 400)]))


@heun.test("value")
def heun_over_all_steps(heun):
    heun.agrees(walk, what="The way down,")


@heun.test("edge case")
def heun_at_the_end(heun):
    heun.agrees(lambda answer: walk(answer, grid=[(100, None)]), what="The last step,")
    require((count := count_calls(heun)) == 2 * STEPS - 1,
            f"It calls `denoise` {count} times for {STEPS} steps where {2 * STEPS - 1} will do: one in the last step")


@heun.test("edge case")
def heun_does_not_overwrite_yielded_steps(heun):
    heun.agrees(yielded, what="The x of all steps, read after the last step,")
    require_predicted_x0(heun)


def twice(second: Callable) -> Callable:
    """A sampler of Euler's step and `second(denoise, x, x_euler, eps, t, t_prev, a, s, ap, sp)`, the next x."""
    def sampler(denoise, x, grid, schedule, **_):
        for index, (t, t_prev) in enumerate(grid):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            x0 = denoise(x, t)
            eps = (x - a * x0) / s
            end = ap * x0 + sp * eps
            x = end if t_prev is None else second(denoise, x, end, eps, t, t_prev, a, s, ap, sp)
            yield Step(index, t, x, x0)
    return sampler


for diagnosis, second in [
    ("this is Euler's step alone: the slope at its end is missing, or cancels out", lambda d, x, end, *_: end),
    ("this moves x as if it were X: X = x / alpha first, and times alpha_prev at the end",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     x + (sp / ap - s / a) * (eps + (end - ap * d(end, tp)) / sp) / 2),
    ("the second slope is taken at the old x: take it where Euler's step has led",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * ((x - ap * d(x, tp)) / sp - eps) / 2),
    ("`denoise` is asked at t the second time: x is at t_prev by then",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * ((end - ap * d(end, t)) / sp - eps) / 2),
    ("only the slope at the end counts: take the mean of both",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * ((end - ap * d(end, tp)) / sp - eps)),
    ("the slopes are added: their mean is half of that",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * (end - ap * d(end, tp)) / sp),
    ("the second step starts from Euler's end: both go from the old x",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * ((end - ap * d(end, tp)) / sp + eps) / 2),
    ("the mean is of eps, and x0 is the old one: X moves by (s_prev - s) times the mean, from X itself",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + sp * ((end - ap * d(end, tp)) / sp - eps) / 2),
    ("the second eps has the alpha and sigma of t: x is at t_prev by then",
     lambda d, x, end, eps, t, tp, a, s, ap, sp:
     end + ap * (sp / ap - s / a) * ((end - a * d(end, tp)) / s - eps) / 2),
]:
    heun.mistake(diagnosis)(twice(second))


@heun.mistake("after the last step, where t_prev is None, there is no second call: Euler's step is the result")
def asked_at_the_end(denoise, x, grid, schedule):
    yield from samplers.heun(denoise, x, grid[:-1], schedule)
    denoise(x, grid[-1][1])


# --- 3.9 ----------------------------------------------------------------------------------------------

dpmpp_2m = lesson.exercise(
    9, samplers.dpmpp_2m, grade="on your own", minutes=25,
    asks="Write `dpmpp_2m(denoise, x, timesteps, schedule)`: DPM-Solver++(2M), of second order with one call a step.",
    hints=["Between two steps x0 hardly changes: extrapolate it, along lambda = log(alpha / sigma), to the middle of "
           "the step that comes, and make the step of first order with that.",
           "With h = lambda_prev - lambda and h_last the step before: D = x0 + h / h_last (x0 - x0_last) / 2. The "
           "first step has no x0_last and takes D = x0.",
           "x_prev = sigma_prev / sigma x + (alpha_prev - sigma_prev alpha / sigma) D. In the last step sigma_prev is "
           "0 and lambda infinite: take D = x0 there."])
dpmpp_2m.test("shape")(require_valid_steps)


@dpmpp_2m.test("value")
def the_first_step_is_of_first_order(dpmpp_2m):
    dpmpp_2m.agrees(lambda answer: walk(answer, grid=[(600, 400)]), what="The first step,")


@dpmpp_2m.test("value")
def then_of_second_order(dpmpp_2m):
    dpmpp_2m.agrees(lambda answer: walk(answer, grid=[(800, 600), (600, 300)]))


@dpmpp_2m.test("value")
def dpmpp_over_all_steps(dpmpp_2m):
    dpmpp_2m.agrees(walk, what="The way down,")


@dpmpp_2m.test("edge case")
def dpmpp_at_the_end(dpmpp_2m):
    dpmpp_2m.agrees(lambda answer: walk(answer, grid=[(300, 100), (100, None)]), what="The way to the end,")
    require_one_call_per_step(dpmpp_2m)


@dpmpp_2m.test("edge case")
def dpmpp_does_not_overwrite_yielded_steps(dpmpp_2m):
    dpmpp_2m.agrees(yielded, what="The x of all steps, read after the last step,")
    require_predicted_x0(dpmpp_2m)


def multistep(extrapolate: Callable, remember: bool = True) -> Callable:
    """A sampler of the step of first order with `extrapolate(x0, x0_last, h, h_last)` in place of x0."""
    def sampler(denoise, x, grid, schedule, **_):
        last = h_last = None
        for index, (t, t_prev) in enumerate(grid):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            x0 = denoise(x, t)
            h = math.log(ap / sp) - math.log(a / s) if sp else math.inf
            D = x0 if last is None or not sp else extrapolate(x0, last, h, h_last)
            x = sp / s * x + (ap - sp * a / s) * D
            if remember or last is None:
                last, h_last = x0, h
            yield Step(index, t, x, x0)
    return sampler


def otherwise(extrapolated: bool) -> Callable:
    """A right one but for what it remembers, D in place of x0, or (False) for h, which it measures in t."""
    def sampler(denoise, x, grid, schedule, **_):
        last = h_last = None
        for index, (t, t_prev) in enumerate(grid):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            x0 = denoise(x, t)
            h = math.inf if not sp else math.log(ap / sp) - math.log(a / s) if extrapolated else t - t_prev
            D = x0 if last is None or not sp else x0 + h / h_last * (x0 - last) / 2
            x = sp / s * x + (ap - sp * a / s) * D
            last, h_last = (D if extrapolated else x0), h
            yield Step(index, t, x, x0)
    return sampler


def without_last_case(lam: Callable) -> Callable:
    """One that asks for lambda where sigma is 0."""
    def sampler(denoise, x, grid, schedule, **_):
        yield from samplers.dpmpp_2m(denoise, x, grid[:-1], schedule)
        lam(*schedule.at(grid[-1][1]))
    return sampler


for diagnosis, extrapolate in [
    ("this is of first order, DDIM's step: x0 is to be extrapolated", lambda x0, last, h, h_last: x0),
    ("the half is missing: x0 is extrapolated to the middle of the step",
     lambda x0, last, h, h_last: x0 + h / h_last * (x0 - last)),
    ("h and h_last are swapped: the step to come, divided by the step before it",
     lambda x0, last, h, h_last: x0 + h_last / h * (x0 - last) / 2),
    ("the steps are taken for equal: the change goes with h / h_last",
     lambda x0, last, h, h_last: x0 + (x0 - last) / 2),
    ("the sign is wrong: extrapolate along x0 - x0_last",
     lambda x0, last, h, h_last: x0 - h / h_last * (x0 - last) / 2),
    ("the mean of the two x0 interpolates between them: extrapolate beyond the newer one",
     lambda x0, last, h, h_last: (x0 + last) / 2),
    ("it extrapolates from x0_last: start at x0, the newer",
     lambda x0, last, h, h_last: last + h / h_last * (x0 - last) / 2),
]:
    dpmpp_2m.mistake(diagnosis)(multistep(extrapolate))
for extrapolated, said in ((True, "x0_last is the x0 that was predicted, not the D that was made of it"),
                           (False, "h is the way in lambda = log(alpha / sigma), not in t")):
    dpmpp_2m.mistake(said)(otherwise(extrapolated))
for of_nothing in (lambda a, s: math.log(a / s), lambda a, s: math.log(a) - math.log(s)):
    dpmpp_2m.mistake("in the last step sigma_prev is 0 and lambda infinite: take D = x0 there, without h")(
        without_last_case(of_nothing))
dpmpp_2m.mistake("x0_last stays that of the first step: keep each step's for the next")(
    multistep(lambda x0, last, h, h_last: x0 + h / h_last * (x0 - last) / 2, remember=False))
