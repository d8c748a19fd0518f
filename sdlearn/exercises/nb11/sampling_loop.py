"""Exercises of notebook 11, its second part: what a sampling loop need not do at every step."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ... import guidance, samplers
from ...attention import KeptText
from ...config import PRESETS, NoiseConfig
from ...schedule import NoiseSchedule, timesteps
from ...unet import KeptTime, UNet
from ...unet import reusing as package_reusing
from ..testing import randn, require
from . import lesson

SD, ZERO = NoiseSchedule(NoiseConfig()), NoiseSchedule(NoiseConfig(prediction="v_prediction", zero_terminal_snr=True))
TINY = PRESETS["tiny"].unet
TIMES = [800.0, 500.0, 200.0]
X, TEXTS = randn(1, 4, 4, 4, seed=1), [randn(1, 5, TINY.context_dim, seed=seed) for seed in (2, 3)]


@cache
def network() -> UNet:
    """A small U-Net in which nothing is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(TINY)
        for module in unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
    return unet.eval().requires_grad_(False)


# --- 11.3 ---------------------------------------------------------------------------------------------

reusing = lesson.exercise(
    3, package_reusing, grade="supported", minutes=12,
    asks="Write `reusing(network, times)`: a function run(x, t, context) that gives network(x, t, context), with each "
         "text as one `KeptText` and each of `times` as its `KeptTime`, so that keys, values and time embeddings are "
         "made once for the run. Other timesteps must work as well.",
    hints=["Make the timesteps ready before `run` is ever called: `KeptTime.of_run(times)` is a dictionary, from "
           "timestep to its KeptTime (which `KeptTime(t)` alone does not make).",
           "A text is wrapped when it first comes, `KeptText(context)`, and the same wrapper is found when it comes "
           "again. Guidance has two texts, or one of both: keep a dictionary.",
           "`==` compares two tensors number by number; `id(context)` is a number that tells objects apart for as long "
           "as they live, and a KeptText keeps its text alive.",
           "`known.get(t, t)` is the kept one, or t itself where `times` has no such timestep."])


def at_every_step(answer: Callable, times=TIMES) -> list[torch.Tensor]:
    run = answer(network(), TIMES)
    return [run(X, t, text) for t in times for text in TEXTS]


def computed(answer: Callable) -> dict[str, int]:
    """How many texts' keys a layer made, and how many timesteps were embedded, in a run with two texts."""
    unet, seen = network(), {"texts": 0, "timesteps": 0}
    to_k = next(layer for name, layer in unet.named_modules() if name.endswith("attn2.to_k"))

    def counts(what: str):
        def count(layer, inputs, output):
            seen[what] += len(output)
        return count
    hooks = [to_k.register_forward_hook(counts("texts")),
             unet.time_embedding.register_forward_hook(counts("timesteps"))]
    try:
        at_every_step(answer)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@reusing.test("shape")
def a_function(reusing):
    require(callable(reusing(network(), TIMES)), "It must return a function of (x, t, context)")


@reusing.test("value")
def the_same_output(reusing):
    reusing.agrees(at_every_step, what="At three timesteps with two texts, the list of outputs")


@reusing.test("value")
def once_for_a_run(reusing):
    reusing.agrees(computed, what="Over three timesteps with two texts, what is computed anew")


@reusing.test("edge case")
def another_timestep(reusing):
    reusing.agrees(lambda answer: at_every_step(answer, times=(500.0, 333.0)),
                   what="At a timestep that is not among `times`, the list of outputs")


def keeping(text: Callable, time: Callable = lambda known, t: known.get(t, t)) -> Callable:
    def answer(network, times):
        known, texts = KeptTime.of_run(times), {}
        return lambda x, t, context: network(x, time(known, t), text(texts, context))
    return answer


def each_text(texts: dict, context) -> KeptText:
    return texts.setdefault(id(context), KeptText(context))


for diagnosis, answer in [
    ("nothing is kept: the network gets text and timestep as they come", lambda network, times: (
        lambda x, t, context: network(x, t, context))),
    ("keys are made at every step: is each text wrapped once, and that one KeptText found again?",
     keeping(lambda texts, context: KeptText(context))),
    ("all texts share one KeptText, so the second is answered with the keys and values of the first",
     keeping(lambda texts, context: texts.setdefault("text", KeptText(context)))),
    ("timesteps are not kept, only the texts", keeping(each_text, lambda known, t: t)),
    ("a timestep that is not among `times` must work as well", keeping(each_text, lambda known, t: known[t])),
    ("every timestep gets the first one's embedding", keeping(each_text, lambda known, t: next(iter(known.values())))),
]:
    reusing.mistake(diagnosis)(answer)


@reusing.mistake("`KeptTime.of_run` is called at every step, and makes all embeddings again: call it before the run")
def of_run_in_the_run(network, times):
    texts = {}
    return lambda x, t, context: network(x, KeptTime.of_run(times).get(t, t), each_text(texts, context))


# --- 11.4 ---------------------------------------------------------------------------------------------

ddim_coefficients = lesson.exercise(
    4, samplers.ddim_coefficients, grade="supported", minutes=10,
    asks="Write `ddim_coefficients(schedule, grid)`: (a, b) for each pair (t, t_prev) of the grid, Python floats, so "
         "that DDIM's step is x_prev = a x + b x0. `schedule.at(t)` is (alpha, sigma). The last t_prev is None and "
         "ends at the noise of timestep 0.",
    hints=["The step: eps = (x - alpha x0) / sigma, then x_prev = alpha_prev x0 + sigma_prev eps. Put the first into "
           "the second and collect x and x0.",
           "`alpha, sigma = schedule.at(t)` gives floats. For the last pair take `schedule.at(0)`.",
           "Nothing is divided by alpha: it is 0 where a schedule ends without signal."])


def factors(answer: Callable, schedule: NoiseSchedule, n: int) -> list[list[float]]:
    return [[float(value) for value in pair] for pair in answer(schedule, timesteps(schedule, n))]


@ddim_coefficients.test("shape")
def a_pair_of_floats_for_each_step(ddim_coefficients):
    found = ddim_coefficients(SD, timesteps(SD, 3))
    require(isinstance(found, (list, tuple)) and len(found) == 3 and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in found), "It must return a pair for each step")
    require(not any(isinstance(value, torch.Tensor) for pair in found for value in pair),
            "The factors are tensors: make them Python floats, which wait for no device")


@ddim_coefficients.test("value")
def on_the_way(ddim_coefficients):
    ddim_coefficients.agrees(lambda answer: factors(answer, SD, 4)[:-1], what="Of four steps, the first three pairs")


@ddim_coefficients.test("edge case")
def the_last(ddim_coefficients):
    ddim_coefficients.agrees(lambda answer: factors(answer, SD, 4)[-1], what="Of four steps, the last pair")


@ddim_coefficients.test("edge case")
def from_no_signal(ddim_coefficients):
    ddim_coefficients.agrees(lambda answer: factors(answer, ZERO, 4)[0],
                             what="From t = 999 of a schedule without signal there, the pair")


def stepping(pair: Callable, end: int | None = 0) -> Callable:
    def answer(schedule, grid):
        return [pair(*schedule.at(t), *schedule.at(end if t_prev is None else t_prev)) for t, t_prev in grid]
    return answer


for diagnosis, answer in [
    ("the factors have changed places: x first, then x0",
     stepping(lambda a, s, a_prev, s_prev: (a_prev - s_prev * a / s, s_prev / s))),
    ("these are the factors of eps and x0: put eps = (x - alpha x0) / sigma in",
     stepping(lambda a, s, a_prev, s_prev: (s_prev, a_prev))),
    ("these are the factors of x and eps: x0 is wanted",
     stepping(lambda a, s, a_prev, s_prev: (a_prev / a, s_prev - a_prev * s / a) if a else (0.0, 0.0))),
    ("x0's factor lacks what eps takes away: eps holds x0, too", stepping(lambda a, s, a_prev, s_prev: (
        s_prev / s, a_prev))),
    ("eps = (x - alpha x0) / sigma: its alpha is missing", stepping(lambda a, s, a_prev, s_prev: (
        s_prev / s, a_prev - s_prev / s))),
    ("the sign of what eps takes away is turned", stepping(lambda a, s, a_prev, s_prev: (
        s_prev / s, a_prev + s_prev * a / s))),
    ("this goes from t_prev to t: the other way", stepping(lambda a, s, a_prev, s_prev: (
        s / s_prev, a - s * a_prev / s_prev) if s_prev else (0.0, 0.0))),
    ("these are variances: take alpha and sigma, not their squares", stepping(lambda a, s, a_prev, s_prev: (
        s_prev**2 / s**2, a_prev**2 - s_prev**2 * a**2 / s**2))),
    ("the last step ends at the noise of timestep 0: `schedule.at(None)` is without any",
     stepping(lambda a, s, a_prev, s_prev: (s_prev / s, a_prev - s_prev * a / s), end=None)),
    ("something is divided by alpha, which is 0 here", stepping(lambda a, s, a_prev, s_prev: (
        s_prev / s, a * (a_prev / a - s_prev / s)))),
]:
    ddim_coefficients.mistake(diagnosis)(answer)


# --- 11.5 ---------------------------------------------------------------------------------------------

STEPS = [999, 800, 600, 400, 200, 0]

guided_passes = lesson.exercise(
    5, guidance.guided_passes, grade="guided", minutes=4,
    asks="Write `guided_passes(times, scale, interval=None)`: how often the network runs for one image at these "
         "timesteps. Guided steps take two passes, also as one batch; where w is 1, or 0, one half is enough. Outside "
         "of the interval (its ends belong to it) w is 1.",
    hints=["`scale_at(t, scale, interval)` of notebook 06 gives w at a timestep: `scale` within the interval, 1 "
           "outside.", "At w = 1 u + w (c - u) is c alone, at w = 0 it is u alone."])


@guided_passes.test("shape")
def a_whole_number(guided_passes):
    found = guided_passes(STEPS, 5.0)
    require(isinstance(found, int) and not isinstance(found, bool), "It must return a whole number")


@guided_passes.test("value")
def guided_everywhere(guided_passes):
    guided_passes.agrees(lambda answer: [answer(STEPS, 5.0), answer(STEPS, 0.5)],
                         what="At six steps, w 5 and 0.5, the number of passes")


@guided_passes.test("value")
def in_an_interval(guided_passes):
    guided_passes.agrees(lambda answer: [answer(STEPS, 5.0, (300, 700)), answer(STEPS, 5.0, (200, 800))],
                         what="With intervals (300, 700) and (200, 800), the number of passes")


@guided_passes.test("edge case")
def without_guidance(guided_passes):
    guided_passes.agrees(lambda answer: [answer(STEPS, 1.0), answer(STEPS, 0.0)],
                         what="At w = 1 and at w = 0, the number of passes")


@guided_passes.test("edge case")
def unconditional_in_an_interval(guided_passes):
    guided_passes.agrees(lambda answer: [answer(STEPS, 0.0, (200, 800)), answer([], 5.0)],
                         what="At w = 0 in an interval, and for no steps, the number of passes")


def within(t: float, interval: tuple | None) -> bool:
    return interval is None or interval[0] <= t <= interval[1]


def counting(once: tuple = (0, 1), inside: Callable = within, out: int = 1) -> Callable:
    return lambda times, scale, interval=None: sum(
        out if not inside(t, interval) else 1 if scale in once else 2 for t in times)


for diagnosis, answer in [
    ("the interval is not looked at", counting(inside=lambda t, interval: True)),
    ("both ends belong to the interval",
     counting(inside=lambda t, interval: interval is None or interval[0] < t < interval[1])),
    ("inside and outside are exchanged",
     counting(inside=lambda t, interval: interval is None or not interval[0] <= t <= interval[1])),
    ("outside of the interval the conditional half still runs", counting(out=0)),
    ("at w = 0 the unconditional half is enough", counting(once=(1,))),
    ("at w = 1 the conditional half is enough", counting(once=(0,))),
    ("below 1 it is guided, too: u + 0.5 (c - u) needs both", lambda times, scale, interval=None: sum(
        1 if guidance.scale_at(t, scale, interval) <= 1 else 2 for t in times)),
    ("these are steps: a guided one takes two passes of work, also as one batch",
     lambda times, scale, interval=None: len(times)),
]:
    guided_passes.mistake(diagnosis)(answer)
