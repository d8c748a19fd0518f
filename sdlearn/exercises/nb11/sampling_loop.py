"""Exercises of notebook 11: caching, DDIM coefficients on the host, the number of function evaluations."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from ... import guidance, samplers
from ...config import PRESETS, NoiseConfig
from ...pipeline import cache
from ...schedule import NoiseSchedule, make_timesteps
from ...unet import UNet
from ..testing import randn, require
from . import lesson

SD, ZERO = (NoiseSchedule(NoiseConfig()),
            NoiseSchedule(NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True)))
TINY = PRESETS["tiny"].unet
TIMES = [800.0, 500.0, 200.0]
X, TEXTS = randn(1, 4, 4, 4, seed=1), [randn(1, 5, TINY.context_dim, seed=seed) for seed in (2, 3)]


@lru_cache
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

ConditioningCache = lesson.exercise(
    3, cache.ConditioningCache, grade="supported", minutes=12,
    asks="Write the class `ConditioningCache(timesteps)`, which the U-Net asks as its argument `cache`: "
         "`keys_values(layer, context)` gives (layer.to_k(context), layer.to_v(context)), computed once for each layer "
         "and context; `embed_time(network, t, x)` gives network.embed_time(t, x), computed at its first call for all "
         "timesteps of the run together. Other timesteps must work as well.",
    hints=["Two dictionaries: one from (layer, context) to the pair, one from a network to the embeddings.",
           "A tensor as a dictionary's key is found by identity, not by its numbers, which is what you want here; the "
           "dictionary keeps it alive. Guidance has two contexts, or one batch of both.",
           "`network.embed_time(on_device(timesteps, x), x)` embeds all of them, a row each: (S, E). One step needs "
           "one row, with its dimension: (1, E).",
           "For a t that is not among `timesteps`: `network.embed_time(t, x)`."])


def at_every_step(answer: Callable, times=TIMES) -> list[torch.Tensor]:
    stored = answer(TIMES)
    return [network()(X, t, text, cache=stored) for t in times for text in TEXTS]


def computed(answer: Callable) -> dict[str, int]:
    """How many contexts' keys a layer computed, and how many timesteps were embedded, in a run with two contexts."""
    unet, seen = network(), {"contexts": 0, "timesteps": 0}
    to_k = next(layer for name, layer in unet.named_modules() if name.endswith("attn2.to_k"))

    def counts(what: str):
        def count(layer, inputs, output):
            seen[what] += len(output)
        return count
    hooks = [to_k.register_forward_hook(counts("contexts")),
             unet.time_embedding.register_forward_hook(counts("timesteps"))]
    try:
        at_every_step(answer)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@ConditioningCache.test("shape")
def two_methods(ConditioningCache):
    stored = ConditioningCache(TIMES)
    require(all(callable(getattr(stored, name, None)) for name in ("keys_values", "embed_time")),
            "It must have the methods `keys_values(layer, context)` and `embed_time(network, t, x)`")


@ConditioningCache.test("value")
def the_same_output(ConditioningCache):
    ConditioningCache.agrees(at_every_step, what="At three timesteps with two contexts, the list of outputs")


@ConditioningCache.test("value")
def each_computed_once(ConditioningCache):
    ConditioningCache.agrees(computed, what="Over three timesteps with two contexts, what is computed again")


@ConditioningCache.test("edge case")
def another_timestep(ConditioningCache):
    ConditioningCache.agrees(lambda answer: at_every_step(answer, times=(500.0, 333.0)),
                             what="At a timestep that is not among `timesteps`, the list of outputs")


def caching(key: Callable = lambda layer, context: (layer, context),
            row: Callable = lambda timesteps, t: timesteps.index(t), once: bool = True) -> type:
    """A cache of keys and values by `key`, and of embeddings by `row`; None as either stores nothing."""
    class Cache:
        def __init__(self, timesteps):
            self.timesteps, self.pairs, self.embeddings = list(timesteps), {}, {}

        def keys_values(self, layer, context):
            pair = self.pairs.get(key and key(layer, context)) or (layer.to_k(context), layer.to_v(context))
            return self.pairs.setdefault(key(layer, context), pair) if key else pair

        def embed_time(self, network, t, x):
            if row is None or t not in self.timesteps and row is not by_name:
                return network.embed_time(t, x)
            if not once or network not in self.embeddings:
                self.embeddings[network] = network.embed_time(torch.tensor(self.timesteps), x)
            at = row(self.timesteps, t)
            return self.embeddings[network][at:at + 1]
    return Cache


def by_name(timesteps: list, t: float) -> int:
    return {one: i for i, one in enumerate(timesteps)}[t]


for diagnosis, answer in [
    ("nothing is cached: keys, values and embeddings are computed at every step", caching(None, None)),
    ("keys are computed at every step: are they stored, and found again for the same context?", caching(None)),
    ("all contexts share one entry, so the second gets the keys and values of the first",
     caching(lambda layer, context: layer)),
    ("embeddings are not cached, only keys and values", caching(row=None)),
    ("a timestep that is not among `timesteps` must work as well", caching(row=by_name)),
    ("every timestep gets the first one's embedding", caching(row=lambda timesteps, t: 0)),
    ("all embeddings are computed again at every step: store them by network", caching(once=False)),
]:
    ConditioningCache.mistake(diagnosis)(answer)


# --- 11.4 ---------------------------------------------------------------------------------------------

ddim_coefficients = lesson.exercise(
    4, samplers.ddim_coefficients, grade="supported", minutes=10,
    asks="Write `ddim_coefficients(schedule, timesteps)`: (a, b) for each pair (t, t_prev) of the timesteps, Python "
         "floats, so that DDIM's step is x_prev = a x + b x0. `schedule.at(t)` is (alpha, sigma). The last "
         "t_prev is None and ends at the noise of timestep 0.",
    hints=["The step: eps = (x - alpha x0) / sigma, then x_prev = alpha_prev x0 + sigma_prev eps. Put the first into "
           "the second and collect x and x0.",
           "`alpha, sigma = schedule.at(t)` gives floats. For the last pair take `schedule.at(0)`.",
           "Nothing is divided by alpha: it is 0 where a schedule ends without signal."])


def factors(answer: Callable, schedule: NoiseSchedule, n: int) -> list[list[float]]:
    return [[float(value) for value in pair] for pair in answer(schedule, make_timesteps(schedule, n))]


@ddim_coefficients.test("shape")
def a_pair_of_floats_for_each_step(ddim_coefficients):
    found = ddim_coefficients(SD, make_timesteps(SD, 3))
    require(isinstance(found, (list, tuple)) and len(found) == 3 and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in found), "It must return a pair for each step")
    require(not any(isinstance(value, torch.Tensor) for pair in found for value in pair),
            "The factors are tensors: make them Python floats, which wait for no device")


@ddim_coefficients.test("value")
def at_inner_steps(ddim_coefficients):
    ddim_coefficients.agrees(lambda answer: factors(answer, SD, 4)[:-1], what="Of four steps, the first three pairs")


@ddim_coefficients.test("edge case")
def the_last(ddim_coefficients):
    ddim_coefficients.agrees(lambda answer: factors(answer, SD, 4)[-1], what="Of four steps, the last pair")


@ddim_coefficients.test("edge case")
def from_zero_signal(ddim_coefficients):
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

count_nfe = lesson.exercise(
    5, guidance.count_nfe, grade="guided", minutes=4,
    asks="Write `count_nfe(timesteps, guidance_scale, guidance_interval=None)`: how often the network "
         "runs for one image at these timesteps. Guided steps take two passes, also as one batch; where w is 1, or 0, "
         "one half is enough. Outside "
         "of the interval (its ends belong to it) w is 1.",
    hints=["`guidance_scale_at(t, guidance_scale, guidance_interval)` of notebook 06 gives w at a timestep: the scale "
           "within the interval, 1 outside.", "At w = 1 u + w (c - u) is c alone, at w = 0 it is u alone."])


@count_nfe.test("shape")
def a_whole_number(count_nfe):
    found = count_nfe(STEPS, 5.0)
    require(isinstance(found, int) and not isinstance(found, bool), "It must return a whole number")


@count_nfe.test("value")
def guided_everywhere(count_nfe):
    count_nfe.agrees(lambda answer: [answer(STEPS, 5.0), answer(STEPS, 0.5)],
                         what="At six steps, w 5 and 0.5, the number of passes")


@count_nfe.test("value")
def in_an_interval(count_nfe):
    count_nfe.agrees(lambda answer: [answer(STEPS, 5.0, (300, 700)), answer(STEPS, 5.0, (200, 800))],
                         what="With intervals (300, 700) and (200, 800), the number of passes")


@count_nfe.test("edge case")
def without_guidance(count_nfe):
    count_nfe.agrees(lambda answer: [answer(STEPS, 1.0), answer(STEPS, 0.0)],
                         what="At w = 1 and at w = 0, the number of passes")


@count_nfe.test("edge case")
def unconditional_in_an_interval(count_nfe):
    count_nfe.agrees(lambda answer: [answer(STEPS, 0.0, (200, 800)), answer([], 5.0)],
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
        1 if guidance.guidance_scale_at(t, scale, interval) <= 1 else 2 for t in times)),
    ("these are steps: a guided one takes two passes of work, also as one batch",
     lambda times, scale, interval=None: len(times)),
]:
    count_nfe.mistake(diagnosis)(answer)
