"""Exercises of notebook 06: classifier-free guidance, composed guidance, guidance rescale, the guidance interval."""

from collections.abc import Callable

import torch
from torch import Tensor

from ... import guidance
from ..testing import randn, require, require_shape
from . import lesson

U, C, N = (randn(3, 4, 5, 6, seed=seed) + shift for seed, shift in ((1, 0.3), (2, -0.5), (3, 0.8)))


# --- 6.1 ----------------------------------------------------------------------------------------------

classifier_free_guidance = lesson.exercise(
    1, guidance.classifier_free_guidance, grade="guided", minutes=3,
    asks="Write `classifier_free_guidance(uncond, cond, guidance_scale)`: at 1 the conditional output, at 0 the "
         "unconditional one.",
    hints=["It is a line through two points. Where are you at w = 0, and where at w = 1?",
           "Start at u and go w times the way from u to c.",
           "The way from u to c is c - u."])


@classifier_free_guidance.test("shape")
def guided_keeps_the_shape(classifier_free_guidance):
    require_shape(classifier_free_guidance(U, C, 7.5), U.shape)


@classifier_free_guidance.test("value")
def beyond_the_conditional(classifier_free_guidance):
    classifier_free_guidance.agrees(lambda answer: [answer(U, C, scale) for scale in (7.5, 0.5)],
                                    what="At w = 7.5 and 0.5, the result")


@classifier_free_guidance.test("edge case")
def at_both_ends_and_below_zero(classifier_free_guidance):
    classifier_free_guidance.agrees(lambda answer: [answer(U, C, scale) for scale in (0.0, 1.0, -1.0)],
                                    what="At w = 0, 1 and -1, the result")


for diagnosis, line in [
    ("it starts at c, as in the paper's own convention, where w = 0 is the conditional model: here that is w = 1",
     lambda u, c, w: c + w * (c - u)),
    ("u and c have changed places", lambda u, c, w: c + w * (u - c)),
    ("this is the way alone: where does it start?", lambda u, c, w: w * (c - u)),
    ("the way goes from u to c, not the other way round", lambda u, c, w: u - w * (c - u)),
    ("w times c is added whole: what of u is in c already?", lambda u, c, w: u + w * c),
    ("this is c, whatever w is", lambda u, c, w: c.clone()),
    ("w is held between 0 and 1: guidance goes beyond c", lambda u, c, w: u + min(max(w, 0), 1) * (c - u)),
]:
    classifier_free_guidance.mistake(diagnosis)(line)


# --- 6.3 ----------------------------------------------------------------------------------------------

composed_guidance = lesson.exercise(
    3, guidance.composed_guidance, grade="supported", minutes=6,
    asks="Write `composed_guidance(uncond, cond, negative, guidance_scale, negative_scale)`: from u, `guidance_scale` "
         "times the way to c, and `negative_scale` times the way from n.",
    hints=["Both ways start at u. The one to c is c - u. What is the one to n?",
           "Add `guidance_scale` times the first, take away `negative_scale` times the second."])


@composed_guidance.test("shape")
def repelled_keeps_the_shape(composed_guidance):
    require_shape(composed_guidance(U, C, N, 5.0, 2.0), U.shape)


@composed_guidance.test("value")
def away_from_the_negative(composed_guidance):
    composed_guidance.same(U, C, N, 5.0, 2.0)


@composed_guidance.test("edge case")
def without_negative_and_with_the_usual_one(composed_guidance):
    composed_guidance.agrees(lambda answer: [answer(U, C, N, 5.0, 0.0), answer(U, C, N, 5.0, 4.0)],
                             what="With negative_scale = 0, and with negative_scale = guidance_scale - 1,")


for diagnosis, line in [
    ("it goes towards n: what must be taken away?", lambda u, c, n, w, v: u + w * (c - u) + v * (n - u)),
    ("the way to n starts at c here: let it start at u", lambda u, c, n, w, v: u + w * (c - u) - v * (n - c)),
    ("n is taken away whole: only the way from u to n must be", lambda u, c, n, w, v: u + w * (c - u) - v * n),
    ("the push starts at n and goes to c: it goes from u, away from n",
     lambda u, c, n, w, v: u + w * (c - u) - v * (c - n)),
    ("this is n in the place of u, the usual negative prompt: `negative_scale` is not used",
     lambda u, c, n, w, v: n + w * (c - n)),
    ("the push has w as a factor, too: `negative_scale` is a strength of its own",
     lambda u, c, n, w, v: u + w * (c - u - v * (n - u))),
    ("n is not used", lambda u, c, n, w, v: u + w * (c - u)),
]:
    composed_guidance.mistake(diagnosis)(line)


# --- 6.4 ----------------------------------------------------------------------------------------------

rescale_guidance = lesson.exercise(
    4, guidance.rescale_guidance, grade="supported", minutes=8,
    asks="Write `rescale_guidance(out, cond, guidance_rescale)`: each guided output goes a share phi = "
         "`guidance_rescale` of the way back to the standard deviation of its conditional one.",
    hints=["The factor that gives `out` the deviation of `cond` is std(cond) / std(out), for each latent of the batch.",
           "`x.std(dim=(1, 2, 3), keepdim=True)` is (B, 1, 1, 1).",
           "A share phi of the way: phi times the rescaled output, and 1 - phi times `out` as it was. Where `out` is "
           "all zeros, `clamp(min=...)` the deviation that you divide by."])


@rescale_guidance.test("shape")
def rescaled_keeps_the_shape(rescale_guidance):
    require_shape(rescale_guidance(4 * U, C, 0.7), U.shape)


@rescale_guidance.test("value")
def all_the_way(rescale_guidance):
    rescale_guidance.agrees(lambda answer: answer(stretched(), C, 1.0), what="With phi = 1, the result")


@rescale_guidance.test("value")
def a_share_of_the_way(rescale_guidance):
    rescale_guidance.agrees(lambda answer: [answer(stretched(), C, phi) for phi in (0.7, 0.0)],
                            what="With phi = 0.7 and 0, the result")


@rescale_guidance.test("edge case")
def zeros_stay_zeros(rescale_guidance):
    rescale_guidance.agrees(lambda answer: answer(0 * U, C, 0.7), what="Of an output of zeros, the result")


def stretched() -> Tensor:
    """Guided outputs, each stretched by another factor, and each channel, too."""
    each = torch.tensor([2.0, 4.0, 7.0])[:, None, None, None]
    return U * each * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None]


def by_std(dims=(1, 2, 3), factor: Callable = lambda wanted, there: wanted / there, tiny: float = 1e-30,
           mixed: Callable = lambda out, full, phi: phi * full + (1 - phi) * out) -> Callable:
    def rescale(out, cond, phi):
        wanted, there = cond.std(dims, keepdim=True), out.std(dims, keepdim=True).clamp(min=tiny)
        return mixed(out, out * factor(wanted, there), phi)
    return rescale


for diagnosis, parts in [
    ("the deviation of an output of zeros is 0: what is divided by it is not a number", {"tiny": 0.0}),
    ("one deviation serves the whole batch: each latent has its own", {"dims": (0, 1, 2, 3)}),
    ("each channel is rescaled by itself, which shifts colours: one factor for each latent", {"dims": (2, 3)}),
    ("phi is taken as a power of the factor: mix the two outputs, phi of the one and 1 - phi of the other",
     {"mixed": lambda out, full, phi: out * (full.std((1, 2, 3), keepdim=True) / out.std(
         (1, 2, 3), keepdim=True).clamp(min=1e-30)) ** phi}),
    ("the factor is upside down: the deviation wanted, over the one that is there",
     {"factor": lambda wanted, there: there / wanted}),
    ("the factor is a ratio of variances: take their roots, the deviations",
     {"factor": lambda wanted, there: (wanted / there) ** 2}),
    ("phi and 1 - phi have changed places: at phi = 0 nothing is done",
     {"mixed": lambda out, full, phi: phi * out + (1 - phi) * full}),
    ("it goes all the way, whatever phi is", {"mixed": lambda out, full, phi: full}),
    ("the part that was not rescaled is missing: (1 - phi) of `out`", {"mixed": lambda out, full, phi: phi * full}),
]:
    rescale_guidance.mistake(diagnosis)(by_std(**parts))


@rescale_guidance.mistake("the mean is exchanged as well: only the deviation is")
def mean_too(out, cond, phi):
    dims = (1, 2, 3)
    full = (out - out.mean(dims, keepdim=True)) / out.std(dims, keepdim=True) * cond.std(dims, keepdim=True)
    return phi * (full + cond.mean(dims, keepdim=True)) + (1 - phi) * out


@rescale_guidance.mistake("it is `cond` that is stretched: `out` is to be brought back")
def the_other(out, cond, phi):
    return guidance.rescale_guidance(cond, out, phi)


# --- 6.5 ----------------------------------------------------------------------------------------------

guidance_scale_at = lesson.exercise(
    5, guidance.guidance_scale_at, grade="guided", minutes=4,
    asks="Write `guidance_scale_at(t, guidance_scale, guidance_interval=None)`: `guidance_scale` for low <= t <= high, "
         "and outside of the interval the w that means no guidance.",
    hints=["Which w makes the conditional output alone?",
           "Without an interval (None) the scale holds everywhere. The ends belong to it."])


@guidance_scale_at.test("shape")
def a_number(guidance_scale_at):
    result = guidance_scale_at(500, 7.5, (200, 800))
    require(isinstance(result, (int, float)) and not isinstance(result, bool), "It must return a number")


@guidance_scale_at.test("value")
def inside_and_outside(guidance_scale_at):
    guidance_scale_at.agrees(lambda answer: [float(answer(t, 7.5, (200, 800))) for t in (999, 500, 20)],
                             what="At t = 999, 500 and 20 with the interval (200, 800), w")


@guidance_scale_at.test("edge case")
def at_its_ends(guidance_scale_at):
    guidance_scale_at.agrees(lambda answer: [float(answer(t, 7.5, (200, 800))) for t in (800, 800.5, 200, 199)],
                             what="At t = 800, 800.5, 200 and 199 with the interval (200, 800), w")


@guidance_scale_at.test("edge case")
def everywhere(guidance_scale_at):
    guidance_scale_at.agrees(lambda answer: [float(answer(t, 7.5)) for t in (999, 0)], what="Without an interval, w")


def within(inside: Callable, outside: float = 1.0) -> Callable:
    return lambda t, scale, interval=None: scale if interval is None or inside(t, *interval) else outside


for diagnosis, answer in [
    ("w = 0 is the unconditional model, which has no prompt at all: no guidance is another w",
     within(lambda t, low, high: low <= t <= high, 0.0)),
    ("it guides outside of the interval and not within", within(lambda t, low, high: not low <= t <= high)),
    ("the ends belong to the interval", within(lambda t, low, high: low < t < high)),
    ("the upper end belongs to the interval as well", within(lambda t, low, high: low <= t < high)),
    ("the lower end belongs to the interval as well", within(lambda t, low, high: low < t <= high)),
    ("only one end is looked at: above `high` there is no guidance either", within(lambda t, low, high: t >= low)),
    ("only one end is looked at: below `low` there is no guidance either", within(lambda t, low, high: t <= high)),
    ("the interval is ignored", within(lambda t, low, high: True)),
    ("it gives 1 where there is no interval: then the scale holds everywhere",
     lambda t, scale, interval=None: scale if interval and interval[0] <= t <= interval[1] else 1.0),
]:
    guidance_scale_at.mistake(diagnosis)(answer)
