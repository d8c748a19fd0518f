"""Exercises of notebook 10: levels of a size, attention's scale and the noise schedule for it, buckets."""

import math
from collections.abc import Callable

import numpy as np

from ... import sizes
from ...config import PRESETS, NoiseConfig
from ...diagnostics.attention import attention_scale as package_attention_scale
from ...schedule import NoiseSchedule
from ..testing import require
from . import lesson

MINI, SD = PRESETS["mini"], PRESETS["sd15"]


def or_refused(answer: Callable, *args):
    """What the answer gives, or "ValueError" where it raises that."""
    try:
        return answer(*args)
    except ValueError:
        return "ValueError"


def refused(answer: Callable, *args) -> str:
    """"ValueError" where the answer raises it, else "no error"."""
    return "ValueError" if or_refused(answer, *args) == "ValueError" else "no error"


# --- 10.1 ---------------------------------------------------------------------------------------------

level_sizes = lesson.exercise(
    1, sizes.level_sizes, grade="guided", minutes=5,
    asks="Write `level_sizes(size, config)`: (rows, columns) of the U-Net's feature maps for a picture of `size`, "
         "(width, height): a pair for each level, the latent's own first. ValueError where there is no such latent.",
    hints=["The autoencoder divides both sides by `config.vae.factor`. Width is counted in columns, height in rows.",
           "There are `len(config.unet.channels)` levels. From each to the next both numbers halve, rounding up: "
           "13 becomes 7. `-(-n // 2)` rounds up.",
           "`width % factor` is 0 for a multiple. A side has to be one factor at least, as well."])


@level_sizes.test("shape")
def one_pair_for_each_level(level_sizes):
    found = level_sizes((128, 128), MINI)
    require(isinstance(found, (list, tuple)) and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in found),
            "It must return a list of pairs (rows, columns)")
    level_sizes.agrees(lambda answer: [len(answer((128, 128), MINI)), len(answer((512, 512), SD))],
                       what="The number of levels")


@level_sizes.test("value")
def squares_and_other_shapes(level_sizes):
    level_sizes.agrees(lambda answer: [answer((128, 128), MINI), answer((512, 512), SD)], what="Of squares, the result")
    level_sizes.agrees(lambda answer: answer((256, 128), MINI), what="Of an image 256 wide and 128 high, the result")


@level_sizes.test("edge case")
def what_does_not_halve(level_sizes):
    level_sizes.agrees(lambda answer: or_refused(answer, (200, 72), MINI), what="Of 200 x 72 pixels, the result")


@level_sizes.test("edge case")
def no_latent(level_sizes):
    level_sizes.agrees(lambda answer: [refused(answer, size, MINI) for size in ((100, 128), (128, 100), (0, 128))],
                       what="For 100 x 128, 128 x 100 and 0 x 128 pixels, what it raises")


def halving(half: Callable = lambda n: -(-n // 2), pair: Callable = lambda width, height: (height, width),
            factor: Callable = lambda config: config.vae.factor, skip: int = 0, more: int = 0,
            wrong: Callable = lambda width, height, factor: width % factor or height % factor or min(width, height) < 1
            ) -> Callable:
    def answer(size, config):
        width, height = size
        if wrong(width, height, config.vae.factor):
            raise ValueError("no multiple")
        one, found = tuple(side // factor(config) for side in pair(width, height)), []
        for _ in range(len(config.unet.channels) + skip + more):
            found.append(one)
            one = tuple(half(n) for n in one)
        return found[skip:]
    return answer


for diagnosis, parts in [
    ("rows and columns have changed places: the height makes the rows",
     {"pair": lambda width, height: (width, height)}),
    ("half of an odd number is rounded up here: 13 becomes 7", {"half": lambda n: n // 2}),
    ("these are pixels: the autoencoder's factor is missing", {"factor": lambda config: 1}),
    ("it begins one level too low: the highest has the latent's own size", {"skip": 1}),
    ("there is one level too many: between n levels lie n - 1 halvings", {"more": 1}),
    ("there is one level too few", {"more": -1}),
    ("a size that is no multiple of the factor is rounded: it must be refused", {"wrong": lambda w, h, f: False}),
    ("only the width is checked", {"wrong": lambda width, height, factor: width % factor or width < 1}),
    ("only the height is checked", {"wrong": lambda width, height, factor: height % factor or width < 1}),
    ("a side of 0 is a multiple of everything", {"wrong": lambda width, height, factor: width % factor or
                                                height % factor}),
    ("both sides need to be multiples of the factor, and not of more: the U-Net takes odd sizes, too",
     {"wrong": lambda width, height, factor: width % (4 * factor) or height % (4 * factor) or min(width, height) < 1}),
]:
    level_sizes.mistake(diagnosis)(halving(**parts))


# --- 10.2 ---------------------------------------------------------------------------------------------

attention_scale = lesson.exercise(
    2, package_attention_scale, grade="guided", minutes=3,
    asks="Write `attention_scale(tokens, trained)`: by what the scores of `tokens` keys are multiplied where training "
         "had `trained`. ValueError where either is below 2.",
    hints=["It is sqrt(log N / log N_train). Which of the two is N?",
           "`math.log` and `math.sqrt`. The base of the logarithm does not matter: it is a ratio."])


@attention_scale.test("shape")
def it_is_a_number(attention_scale):
    require(isinstance(attention_scale(256, 64), (int, float)), "It must return a number")


@attention_scale.test("value")
def for_more_and_for_fewer_tokens(attention_scale):
    attention_scale.agrees(lambda answer: [float(answer(256, 64)), float(answer(16, 64))],
                           what="For 256 and for 16 tokens where there were 64, the factor")


@attention_scale.test("edge case")
def at_the_size_of_training(attention_scale):
    attention_scale.agrees(lambda answer: float(answer(64, 64)), what="For as many tokens as in training, the factor")


@attention_scale.test("edge case")
def with_a_single_token(attention_scale):
    attention_scale.agrees(lambda answer: [refused(answer, 1, 64), refused(answer, 64, 1)],
                           what="For one token, and for one in training, what it raises")


def scaling(value: Callable, least: Callable = lambda n, m: min(n, m)) -> Callable:
    def answer(tokens, trained):
        if least(tokens, trained) < 2:
            raise ValueError("two at least")
        return value(tokens, trained)
    return answer


for diagnosis, answer in [
    ("this is the ratio of the logarithms: its root is wanted", scaling(lambda n, m: math.log(n) / math.log(m))),
    ("it is upside down: more keys need a larger factor", scaling(lambda n, m: math.sqrt(math.log(m) / math.log(n)))),
    ("the logarithms are missing", scaling(lambda n, m: math.sqrt(n / m))),
    ("the logarithm of a ratio is a difference: take the ratio of two logarithms",
     scaling(lambda n, m: math.sqrt(abs(math.log(n / m))))),
    ("the logarithm of the ratio is not the ratio of the logarithms", scaling(lambda n, m: math.log(n / m))),
    ("this is the whole of the scale for one head: only the factor that comes on top is wanted",
     scaling(lambda n, m: math.sqrt(math.log(n) / math.log(m)) / math.sqrt(48))),
    ("it is never below 1: fewer keys need a smaller factor",
     scaling(lambda n, m: max(1.0, math.sqrt(math.log(n) / math.log(m))))),
    ("the logarithm of 1 is 0: with one key there is nothing to choose, so refuse it",
     scaling(lambda n, m: math.sqrt(math.log(n) / max(math.log(m), 1e-9)), least=lambda n, m: 2)),
    ("the logarithm of 1 is 0: with one key there is nothing to choose, so raise ValueError first",
     lambda n, m: math.sqrt(math.log(n) / math.log(m))),
    ("only `trained` is checked", scaling(lambda n, m: math.sqrt(math.log(n) / math.log(m)), least=lambda n, m: m)),
    ("only `tokens` is checked", scaling(lambda n, m: math.sqrt(math.log(n) / max(math.log(m), 1e-9)),
                                         least=lambda n, m: n)),
]:
    attention_scale.mistake(diagnosis)(answer)


# --- 10.3 ---------------------------------------------------------------------------------------------

SCHEDULES = (NoiseSchedule(NoiseConfig()),
             NoiseSchedule(NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True)))

shift_timestep = lesson.exercise(
    3, sizes.shift_timestep, grade="supported", minutes=8,
    asks="Write `shift_timestep(schedule, t, times)`: the timestep, with fraction, at which an image `times` as wide "
         "and as high is as noisy, at the usual image's scale, as that one is at t. Beyond the schedule, its ends.",
    hints=["Averages over `times` x `times` cells leave the signal and divide the noise's deviation by `times`. So "
           "what has to become of sigma / alpha?",
           "`alpha, sigma = schedule.at(t)`. `schedule.ratios` holds sigma / alpha of all timesteps, increasing; you "
           "look for the place at which it is `times` as large.",
           "`np.interp(y, ys, xs)` looks up a value in a table, with fractions, and stays within it. Where alpha is 0, "
           "sigma / alpha is `math.inf`."])


@shift_timestep.test("shape")
def a_timestep(shift_timestep):
    found = shift_timestep(SCHEDULES[0], 500, 2)
    require(isinstance(found, (int, float, np.number)) or getattr(found, "ndim", 1) == 0, "It must return a number")
    require(0 <= found <= 999, f"It returns {float(found):.1f}, where timesteps go from 0 to 999")


@shift_timestep.test("value")
def later_for_larger_images(shift_timestep):
    shift_timestep.agrees(lambda answer: [float(answer(SCHEDULES[0], t, 2)) for t in (100, 500)],
                        what="For an image twice as wide, at t = 100 and 500, the timestep")


@shift_timestep.test("value")
def for_smaller_ones_too(shift_timestep):
    shift_timestep.agrees(lambda answer: [float(answer(SCHEDULES[1], 600, times)) for times in (0.5, 1, 3)],
                        what="For images 0.5, 1 and 3 times as wide, at t = 600, the timestep")


@shift_timestep.test("edge case")
def at_the_ends(shift_timestep):
    shift_timestep.agrees(lambda answer: [float(answer(SCHEDULES[0], 990, 4)), float(answer(SCHEDULES[0], 1, 0.1))],
                        what="Beyond both ends, the timestep")


@shift_timestep.test("edge case")
def at_zero_signal(shift_timestep):
    shift_timestep.agrees(lambda answer: float(answer(SCHEDULES[1], 999, 2)), what="At t = 999 with no signal left, it")


def looked_up(factor: Callable = lambda times: times, ratio: Callable = lambda alpha, sigma: sigma / alpha,
              table: Callable = lambda ratios: ratios, last: Callable = float) -> Callable:
    def answer(schedule, t, times):
        alpha, sigma = schedule.at(t)
        wanted = factor(times) * ratio(alpha, sigma) if alpha else math.inf
        return last(np.interp(wanted, table(schedule.ve_sigmas), range(schedule.num_train_timesteps)))
    return answer


for diagnosis, answer in [
    ("this is the factor for the variance: the deviation falls with the side, not with the area",
     looked_up(lambda times: times ** 2)),
    ("this is the other direction: a larger image needs more noise", looked_up(lambda times: 1 / times)),
    ("the factor's root is taken", looked_up(lambda times: math.sqrt(times))),
    ("it is t that is multiplied: multiply sigma / alpha, and look up which t has it",
     lambda schedule, t, times: min(float(t * times), schedule.num_train_timesteps - 1.0)),
    ("sigma alone is multiplied: what counts is sigma over alpha",
     looked_up(ratio=lambda alpha, sigma: sigma, table=lambda ratios: ratios / (1 + ratios ** 2).sqrt())),
    ("the result is rounded: keep the fraction", looked_up(last=lambda t: float(round(t)))),
    ("the result is rounded down: keep the fraction", looked_up(last=lambda t: float(int(t)))),
    ("this is the formula for straight paths, alpha = 1 - t and sigma = t: here look up sigma / alpha in the table",
     lambda schedule, t, times: times * t / (1 + (times - 1) * t)),
    ("this is the formula for straight paths, alpha = 1 - t and sigma = t, times the number of steps: here look up "
     "sigma / alpha in the table",
     lambda schedule, t, times: times * t / (1 + (times - 1) * t / (schedule.num_train_timesteps - 1))),
    ("it does not depend on `times`", lambda schedule, t, times: float(t)),
]:
    shift_timestep.mistake(diagnosis)(answer)


@shift_timestep.mistake("where alpha is 0 nothing can be divided by it: sigma / alpha is infinite there")
def zero_forgotten(schedule, t, times):
    alpha, sigma = schedule.at(t)
    return float(np.interp(times * sigma / alpha, schedule.ve_sigmas, range(schedule.num_train_timesteps)))


# --- 10.5 ---------------------------------------------------------------------------------------------

SHAPES = [(128, 128), (256, 64), (64, 256), (160, 96), (96, 160)]

nearest_bucket = lesson.exercise(
    5, sizes.nearest_bucket, grade="guided", minutes=5,
    asks="Write `nearest_bucket(size, sizes)`: the one of `sizes`, (width, height) each, whose width / height is "
         "nearest to that of `size` by ratio. ValueError for an empty list.",
    hints=["2:1 and 1:2 are equally far from a square. As differences of width / height they are not: 1 and 0.5.",
           "A distance by ratio is a difference of logarithms: |log a - log b|.",
           "`min(sizes, key=lambda one: ...)` takes the first of equals. `if not sizes: raise ValueError(...)`."])


@nearest_bucket.test("shape")
def one_of_them(nearest_bucket):
    found = nearest_bucket((640, 480), SHAPES)
    require(isinstance(found, (tuple, list)) and tuple(found) in SHAPES,
            f"It returns {found!r}, which is none of the sizes")


@nearest_bucket.test("value")
def wide_and_tall(nearest_bucket):
    nearest_bucket.agrees(lambda answer: [list(answer(size, SHAPES)) for size in (
        (640, 480), (480, 640), (1920, 1080), (3000, 1000), (130, 120))],
        what="For 640x480, 480x640, 1920x1080, 3000x1000 and 130x120, the result")


@nearest_bucket.test("value")
def as_far_on_either_side(nearest_bucket):
    nearest_bucket.agrees(lambda answer: [list(answer(size, SHAPES[:3])) for size in (
        (1000, 499), (499, 1000), (1000, 550), (550, 1000))],
        what="With 1:1, 4:1 and 1:4 to choose from, for 1000x499, 499x1000, 1000x550 and 550x1000, the result")


@nearest_bucket.test("edge case")
def the_first_of_equals_and_none(nearest_bucket):
    nearest_bucket.agrees(lambda answer: list(answer((512, 512), [(256, 256), (128, 128)])),
                          what="Of two that are equally near, the result")
    nearest_bucket.agrees(lambda answer: refused(answer, (1, 1), []), what="For an empty list, what it raises")


def nearest(far: Callable, empty: bool = True, choose: Callable = min) -> Callable:
    def answer(size, sizes):
        if empty and not sizes:
            raise ValueError("none")
        return choose(sizes, key=lambda one: far(*size, *one))
    return answer


def by_log(w: float, h: float, a: float, b: float) -> float:
    return abs(math.log(w / h) - math.log(a / b))


for diagnosis, answer in [
    ("width / height is compared by difference, which squeezes tall shapes together (a ratio minus 1 does, too): take "
     "the difference of logarithms",
     nearest(lambda w, h, a, b: abs(w / h - a / b))),
    ("height / width is compared by difference, which squeezes wide shapes together (a ratio minus 1 does, too): take "
     "the difference of logarithms",
     nearest(lambda w, h, a, b: abs(h / w - b / a))),
    ("the shape of one is upside down: width / height of both", nearest(lambda w, h, a, b: by_log(h, w, a, b))),
    ("this is the farthest", nearest(by_log, choose=max)),
    ("it is the sides that are compared, in pixels: compare shapes, whatever the sizes",
     nearest(lambda w, h, a, b: abs(w - a) + abs(h - b))),
    ("`//` cuts the fraction of the shape off: divide with `/`", nearest(lambda w, h, a, b: abs(w // h - a // b))),
    ("without its magnitude, a difference below zero is the least: take `abs`",
     nearest(lambda w, h, a, b: math.log(w / h) - math.log(a / b))),
]:
    nearest_bucket.mistake(diagnosis)(answer)


@nearest_bucket.mistake("of equals it gives the last: it must be the first")
def last_of_equals(size, sizes):
    return nearest(by_log)(size, sizes[::-1])
