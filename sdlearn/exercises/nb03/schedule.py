"""Exercises of notebook 03: the noise schedule, prediction types, timestep grids."""

from collections.abc import Callable, Iterator

import torch

from ...config import NoiseConfig
from ...schedule import NoiseSchedule, make_timesteps
from ..testing import Wrong, randn, require, require_shape
from . import lesson

EPS = NoiseSchedule(NoiseConfig())
V = NoiseSchedule(NoiseConfig(prediction_type="v_prediction"))
ZERO_SNR = NoiseSchedule(NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True))
X0, NOISE, OUTPUT = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)


def with_shares(formula: Callable) -> Callable:
    """`formula(a, b, alpha, sigma)` as a function of (schedule, a, b, t)."""
    def answer(schedule, a, b, t, *_):
        alpha, sigma = schedule._alpha_sigma_like(a, t)
        return formula(a, b, alpha, sigma)
    return answer


ONE_NUMBER = "`schedule.at` takes one timestep: for a tensor with one for each latent there is `schedule.alpha_sigma`"


def at_one(formula: Callable) -> Callable:
    """As `with_shares`, with the alpha and sigma of one number t only."""
    return lambda schedule, a, b, t, *_: formula(a, b, *schedule.at(t))


# --- 3.1 ----------------------------------------------------------------------------------------------

add_noise = lesson.exercise(
    1, NoiseSchedule.add_noise, grade="guided", minutes=5, also=[NoiseSchedule._alpha_sigma_like],
    asks="Write `add_noise(schedule, x0, noise, t)`: the latent at timestep t, in one step from x0.",
    hints=["`schedule.at(t)` gives two numbers for one timestep: how much signal is left, and how much noise is in it.",
           "x_t = alpha x0 + sigma noise. Their squares sum to 1, so that the variance stays.",
           "For t with a timestep for each latent, `schedule.alpha_sigma(t)` gives float64 of shape (B,). Bring "
           "both to x0's dtype and to (B, 1, 1, 1) before they multiply."])


@add_noise.test("shape")
def noised_has_the_shape_of_x0(add_noise):
    require_shape(add_noise(EPS, X0, NOISE, 400), X0.shape)


@add_noise.test("value")
def noised_at_one_timestep(add_noise):
    add_noise.same(EPS, X0, NOISE, 400)


@add_noise.test("value")
def noised_at_both_ends(add_noise):
    for t in (0, 999):
        add_noise.same(EPS, X0, NOISE, t)


@add_noise.test("edge case")
def each_latent_at_its_own_timestep(add_noise):
    add_noise.same(EPS, X0, NOISE, torch.tensor([10, 900]))
    add_noise.same(EPS, randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1), torch.tensor([0, 10, 500, 999]))


@add_noise.mistake("these are the variances, abar and 1 - abar: what scales a signal is the square root of one")
@with_shares
def variances(x0, noise, alpha, sigma):
    return alpha**2 * x0 + sigma**2 * noise


@add_noise.mistake("signal and noise have each other's share: which of them is left at t = 0?")
@with_shares
def swapped(x0, noise, alpha, sigma):
    return sigma * x0 + alpha * noise


@add_noise.mistake("the signal keeps its full size: then the variance grows, here it stays 1")
@with_shares
def exploding(x0, noise, alpha, sigma):
    return x0 + sigma * noise


@add_noise.mistake("the noise keeps its full size: at t = 0 there must be next to none")
@with_shares
def full_noise(x0, noise, alpha, sigma):
    return alpha * x0 + noise


@add_noise.mistake("the noise is taken away: it must be added")
@with_shares
def subtracted(x0, noise, alpha, sigma):
    return alpha * x0 - sigma * noise


@add_noise.mistake("this is the path of flow matching, straight in t/1000; Stable Diffusion's follows the schedule")
def straight(schedule, x0, noise, t):
    share = (torch.as_tensor(t) / schedule.num_train_timesteps).reshape(-1, 1, 1, 1).to(x0.dtype)
    return (1 - share) * x0 + share * noise


add_noise.mistake(ONE_NUMBER)(at_one(lambda x0, noise, a, s: a * x0 + s * noise))
add_noise.mistake("alpha and sigma are the roots already: multiply by them as they are")(
    with_shares(lambda x0, noise, a, s: a**0.5 * x0 + (1 - a)**0.5 * noise))
add_noise.mistake("the schedule computes in float64: bring alpha and sigma to the dtype of x0")(
    with_shares(lambda x0, noise, a, s: (a * x0 + s * noise).double()))


@add_noise.mistake("alpha and sigma multiply the width, not the batch: reshape them to (B, 1, 1, 1)")
def along_the_width(schedule, x0, noise, t):
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(t))
    return alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise


# --- 3.2 ----------------------------------------------------------------------------------------------

target = lesson.exercise(
    2, NoiseSchedule.target, grade="guided", minutes=5, also=[NoiseSchedule._alpha_sigma_like],
    asks="Write `target(schedule, x0, noise, t)` for v-prediction: what the network must output for x_t.",
    beyond="The package's `target` also serves networks that predict eps or x0; the exercise asks for v alone.",
    hints=["v is the velocity on the circle that x_t = alpha x0 + sigma noise walks, with alpha = cos and sigma = sin "
           "of an angle. Differentiate by the angle.",
           "The derivative of cos is -sin, that of sin is cos: v = alpha noise - sigma x0."])


@target.test("shape")
def target_has_the_shape_of_x0(target):
    require_shape(target(V, X0, NOISE, 400), X0.shape)


@target.test("value")
def target_in_the_middle(target):
    target.same(V, X0, NOISE, 400)


@target.test("value")
def target_at_both_ends(target):
    for t in (0, 999):
        target.same(V, X0, NOISE, t)


@target.test("edge case")
def target_without_any_signal(target):
    """With zero terminal SNR x_999 is the noise itself, and v is -x0: the image, from the prompt alone."""
    target.same(ZERO_SNR, X0, NOISE, 999)


@target.test("edge case")
def targets_at_timesteps_of_their_own(target):
    target.same(V, X0, NOISE, torch.tensor([10, 900]))


target.mistake(ONE_NUMBER)(at_one(lambda x0, noise, a, s: a * noise - s * x0))
target.mistake("this is eps: v also has a share of the image in it")(with_shares(lambda x0, noise, a, s: noise))
target.mistake("this is x0: v also has a share of the noise in it")(with_shares(lambda x0, noise, a, s: x0))
target.mistake("this is x_t itself: v is its derivative by the angle, and cos becomes -sin")(
    with_shares(lambda x0, noise, a, s: a * x0 + s * noise))
target.mistake("the sign is turned round: at t = 0 v is the noise, not its negative")(
    with_shares(lambda x0, noise, a, s: s * x0 - a * noise))
target.mistake("alpha and sigma have changed places: at t = 0, where alpha is 1, v is the noise")(
    with_shares(lambda x0, noise, a, s: s * noise - a * x0))
target.mistake("both are added: one of the two derivatives has a minus")(
    with_shares(lambda x0, noise, a, s: a * noise + s * x0))
target.mistake("these are the variances, abar and 1 - abar: their square roots are alpha and sigma")(
    with_shares(lambda x0, noise, a, s: a**2 * noise - s**2 * x0))
target.mistake("noise - x0 is the target of flow matching: v weighs the two by alpha and sigma")(
    with_shares(lambda x0, noise, a, s: noise - x0))


# --- 3.3 ----------------------------------------------------------------------------------------------

to_x0 = lesson.exercise(
    3, NoiseSchedule.to_x0, grade="guided", minutes=8, also=[NoiseSchedule._alpha_sigma_like],
    asks='Write `to_x0(schedule, output, x, t, prediction_type)` for "epsilon" and "v_prediction".',
    beyond="The package's `to_x0` also takes \"sample\", for a network that predicts x0 itself, and falls back on the "
           "schedule's own prediction; the exercise asks for the two others, named each time.",
    hints=["For eps: take x = alpha x0 + sigma eps, and solve it for x0.",
           "For v: x = alpha x0 + sigma eps and v = alpha eps - sigma x0 are two equations. Multiply the first by "
           "alpha, the second by sigma, and subtract: eps drops out.",
           "(x - sigma eps) / alpha, and alpha x - sigma v, since alpha² + sigma² = 1."])


@to_x0.test("shape")
def x0_has_the_shape_of_x(to_x0):
    for prediction in ("epsilon", "v_prediction"):
        require_shape(to_x0(EPS, OUTPUT, X0, 400, prediction), X0.shape)


@to_x0.test("value")
def x0_from_eps(to_x0):
    to_x0.same(EPS, OUTPUT, X0, 400, "epsilon")


@to_x0.test("value")
def x0_from_v(to_x0):
    to_x0.same(EPS, OUTPUT, X0, 400, "v_prediction")


@to_x0.test("edge case")
def x0_from_v_at_zero_signal(to_x0):
    """Where alpha is 0, eps says nothing about x0; v says all of it."""
    to_x0.same(ZERO_SNR, OUTPUT, X0, 999, "v_prediction")


@to_x0.test("edge case")
def x0_at_timesteps_of_their_own(to_x0):
    for prediction in ("epsilon", "v_prediction"):
        to_x0.same(EPS, OUTPUT, X0, torch.tensor([10, 900]), prediction)


def from_either(eps: Callable, v: Callable) -> Callable:
    """An answer made of two formulas of (output, x, alpha, sigma)."""
    def answer(schedule, output, x, t, prediction):
        return with_shares(eps if prediction == "epsilon" else v)(schedule, output, x, t)
    return answer


def right_eps(output, x, alpha, sigma):
    return (x - sigma * output) / alpha


def right_v(output, x, alpha, sigma):
    return alpha * x - sigma * output


for diagnosis, eps, v in [
    ("it is not divided by alpha: x - sigma eps is alpha x0", lambda e, x, a, s: x - s * e, right_v),
    ("it is multiplied by alpha: alpha x0 = x - sigma eps is solved by dividing",
     lambda e, x, a, s: a * (x - s * e), right_v),
    ("the noise is added once more: take it away", lambda e, x, a, s: (x + s * e) / a, right_v),
    ("the noise is taken away at its full size: x holds sigma of it", lambda e, x, a, s: (x - e) / a, right_v),
    ("these are the variances, abar and 1 - abar: their square roots are alpha and sigma",
     lambda e, x, a, s: (x - s**2 * e) / a**2, right_v),
    ("alpha and sigma have changed places", lambda e, x, a, s: (x - a * e) / s, right_v),
    ("the v is taken for eps: does the function use `prediction`?", right_eps, right_eps),
    ("the eps is taken for v: does the function use `prediction`?", right_v, right_v),
    ("alpha x + sigma v has the wrong sign: put v = alpha eps - sigma x0 in, and see whether eps drops out",
     right_eps, lambda v, x, a, s: a * x + s * v),
    ("alpha v + sigma x is the noise: the image is the other one", right_eps, lambda v, x, a, s: a * v + s * x),
    ("it is divided by alpha, which is for eps: alpha² + sigma² = 1 has done it already",
     right_eps, lambda v, x, a, s: (a * x - s * v) / a),
    ("alpha and sigma have changed places", right_eps, lambda v, x, a, s: s * x - a * v),
]:
    to_x0.mistake(diagnosis)(from_either(eps, v))
to_x0.mistake(ONE_NUMBER)(lambda schedule, output, x, t, prediction: at_one(
    right_eps if prediction == "epsilon" else right_v)(schedule, output, x, t))


# --- 3.4 ----------------------------------------------------------------------------------------------

grid = lesson.exercise(
    4, make_timesteps, grade="supported", minutes=8,
    asks="Write `make_timesteps(schedule, n)`: the leading grid, n pairs (t, t_prev) from noise to image.",
    beyond='The package\'s `make_timesteps` has four more spacings; the exercise asks for "leading", '
           'the default.',
    hints=["The stride is N // n. Go in steps of it, from the largest timestep to the smallest.",
           "Multiples of the stride, from 0 on, each plus 1, are Stable Diffusion's grid: 751, 501, 251, 1 for n = 4.",
           "The second of a pair is the next one's first; after the last comes None, the clean image. `zip` the list "
           "with itself, moved by one."])


def pairs(answer: Callable, n: int) -> list[list]:
    found = answer(EPS, n)
    if not isinstance(found, (list, tuple, Iterator, zip)):
        raise Wrong("The grid must be a list of pairs (t, t_prev)")
    return [list(pair) if isinstance(pair, (list, tuple)) else pair for pair in found]


@grid.test("shape")
def as_many_pairs_as_steps(timesteps):
    for n in (4, 20):
        found = pairs(timesteps, n)
        require(len(found) == n, f"The grid has {len(found)} steps where {n} were asked for")
        require(all(isinstance(pair, list) and len(pair) == 2 for pair in found),
                f"A step is {found[0]} where it must be a pair (t, t_prev)")


@grid.test("value")
def each_pair_starts_where_the_last_ended(timesteps):
    found = pairs(timesteps, 4)
    require(found[0][0] > found[-1][0],
            f"It goes from t = {found[0][0]} to {found[-1][0]}: sampling leads from noise to image, so t falls")
    require(found[-1][1] is None,
            f"The last t_prev is {found[-1][1]} where it must be None: what comes after is the clean image")
    for (_, t_prev), (t, _) in zip(found, found[1:], strict=False):
        require(t_prev == t, f"A step ends at {t_prev} and the next begins at {t}: they must be the same")


@grid.test("value")
def four_steps_and_twenty(timesteps):
    for n in (4, 20):
        timesteps.agrees(lambda answer, n=n: pairs(answer, n))


@grid.test("edge case")
def numbers_that_do_not_divide_and_one(timesteps):
    for n in (7, 30, 1):
        timesteps.agrees(lambda answer, n=n: pairs(answer, n))


def paired(times: Callable) -> Callable:
    """The grid that goes through the timesteps of `times(N, n)`."""
    def answer(schedule, n):
        found = list(times(schedule.num_train_timesteps, n))
        return list(zip(found, [*found[1:], None], strict=True))
    return answer


for diagnosis, times in [
    ("the 1 is missing: Stable Diffusion moves the multiples up by one",
     lambda N, n: [N // n * i for i in range(n)][::-1]),
    ('this is the "trailing" grid, which starts at 999',
     lambda N, n: [round(N - i * N / n) - 1 for i in range(n)]),
    ('this is the "linspace" grid, which starts at 999 and ends at 0',
     lambda N, n: torch.linspace(N - 1, 0, n).tolist()),
    ("the stride is N / n, rounded each time: take N // n once",
     lambda N, n: [round(N / n * i) + 1 for i in range(n)][::-1]),
    ("the stride is N / n, cut off each time: take N // n once",
     lambda N, n: [int(N / n * i) + 1 for i in range(n)][::-1]),
    ("a `range` up to N does not stop where n does not divide N: take n multiples of the stride",
     lambda N, n: list(range(1, N, N // n))[::-1]),
    ("it counts from 1 where it must count from 0: the smallest is 1",
     lambda N, n: [N // n * i for i in range(1, n + 1)][::-1]),
]:
    grid.mistake(diagnosis)(paired(times))
