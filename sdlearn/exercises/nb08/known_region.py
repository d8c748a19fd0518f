"""Exercises of notebook 08: blending the known region into a plain U-Net's steps, and RePaint."""

import math

import torch
from torch import Tensor

from ...config import NoiseConfig
from ...inpaint import blended_denoise, repaint
from ...samplers import ddpm, euler
from ...schedule import NoiseSchedule, make_timesteps, standard_noise
from ..testing import randn, require, require_shape
from . import lesson

SCHEDULE = NoiseSchedule(NoiseConfig())
X, KNOWN, NOISE = (randn(2, 4, 6, 8, seed=seed) for seed in (11, 12, 13))
MASK = torch.zeros(2, 1, 6, 8)
MASK[0, :, 1:4, 2:6] = MASK[1, :, 2:5, 1:4] = 1
GRID = make_timesteps(SCHEDULE, 3)


def network(x: Tensor, t: float) -> Tensor:
    """A `denoise` in which every cell hears of the others."""
    return torch.tanh(x + 0.5 * x.roll(1, 2) - 0.3 * x.mean((2, 3), keepdim=True)) * (1 + t / 1000)


# --- 8.3 ----------------------------------------------------------------------------------------------

blending = lesson.exercise(
    3, blended_denoise, grade="supported", minutes=12,
    asks="Write `blended_denoise(denoise, known, mask, noise, schedule)`: it returns `denoise_known(x, t)`. In what "
         "`denoise` sees, the known cells (mask 0) are `known` with `noise` of timestep t; in the x0 that comes back, "
         "they are `known`.",
    beyond="The package's function also checks the sizes.",
    hints=["Two replacements, one before and one after the call of `denoise`. Both leave the cells to repaint alone.",
           "`schedule.add_noise(known, noise, t)` is what the forward process makes of the known cells at t.",
           "`torch.where(mask < 0.5, a, b)` takes a in the known cells and b in the others."])


@blending.test("shape")
def a_function_of_x_and_t(blended_denoise):
    denoise_known = blended_denoise(network, KNOWN, MASK, NOISE, SCHEDULE)
    require(callable(denoise_known), "It must return a function of (x, t), which takes the place of `denoise`")
    require_shape(denoise_known(X, 500), X.shape)


@blending.test("value")
def the_same_each_time(blended_denoise):
    denoise_known = blended_denoise(network, KNOWN, MASK, NOISE, SCHEDULE)
    require(torch.equal(denoise_known(X, 500), denoise_known(X, 500)),
            "Two calls with the same x and t differ: use the `noise` that is given, and no noise of your own")


@blending.test("value")
def inputs_of_denoise(blended_denoise):
    def seen(answer):
        found = []
        answer(lambda x, t: (found.append(x.clone()), x)[1], KNOWN, MASK, NOISE, SCHEDULE)(X, 500)
        require(len(found) == 1, f"`denoise` is called {len(found)} times for one call: once is enough")
        return found
    blended_denoise.agrees(seen, what="What `denoise` sees at t = 500")


@blending.test("value")
def returned_x0(blended_denoise):
    blended_denoise.agrees(lambda answer: answer(network, KNOWN, MASK, NOISE, SCHEDULE)(X, 500),
                           what="The x0 at t = 500")


@blending.test("value")
def at_other_timesteps(blended_denoise):
    blended_denoise.agrees(lambda answer: [answer(network, KNOWN, MASK, NOISE, SCHEDULE)(X, t) for t in (20, 950)],
                           what="At t = 20 and 950, the x0")


@blending.test("edge case")
def one_image_for_the_batch(blended_denoise):
    blended_denoise.agrees(lambda answer: answer(network, KNOWN[:1], MASK[:1], NOISE[:1], SCHEDULE)(X, 500),
                           what="With one known latent for two of x, the x0")


@blending.test("edge case")
def x_is_unchanged(blended_denoise):
    x = X.clone()
    blended_denoise(network, KNOWN, MASK, NOISE, SCHEDULE)(x, 500)
    require(torch.equal(x, X), "It changes `x` in place: the sampler still needs what it held, so make something new")


def replacing_known(before=None, after=None, keep=lambda mask: mask < 0.5):
    """`blended_denoise` with one of its replacements exchanged; before and after get (known, noise, t, schedule)."""
    def answer(denoise, known, mask, noise, schedule):
        def denoise_known(x, t):
            entering = x if before is None else torch.where(keep(mask), before(known, noise, t, schedule), x)
            x0 = denoise(entering, t)
            return x0 if after is None else torch.where(keep(mask), after(known, noise, t, schedule), x0)
        return denoise_known
    return answer


def noised(known, noise, t, schedule):
    return schedule.add_noise(known, noise, t)


def clean(known, noise, t, schedule):
    return known


for diagnosis, answer in [
    ("the mask is turned round: known is where it is 0", replacing_known(noised, clean, keep=lambda mask: mask >= 0.5)),
    ("the known cells enter without noise: at timestep t the network expects them as noisy as the others",
     replacing_known(clean, clean)),
    ("the known cells get as much noise at every t: how much, `schedule.add_noise` knows",
     replacing_known(lambda known, noise, t, schedule: known + noise, clean)),
    ("the known cells of x are not replaced before the call: the network would see whatever is in them",
     replacing_known(None, clean)),
    ("the known cells of x0 are not replaced after the call", replacing_known(noised, None)),
    ("in the x0 that comes back the known cells are noisy: x0 is the clean latent", replacing_known(noised, noised)),
    ("the noise alone enters in the known cells", replacing_known(lambda known, noise, t, schedule: noise, clean)),
]:
    blending.mistake(diagnosis)(answer)


# --- 8.4 ----------------------------------------------------------------------------------------------

again = lesson.exercise(
    4, repaint, grade="on your own", minutes=25,
    asks="Write `repaint(sample, known, mask, *, times=10)`: it returns a sampler, a generator of (denoise, x, grid, "
         "schedule, *, generator=None), that takes each step of `sample` `times` times, the last step once. Each time "
         "it is blended with new noise; between two times it goes back up from t_prev to t.",
    beyond="The package's function also checks `times` and the sizes.",
    hints=["For each (t, t_prev): draw the known cells' noise, make `blended_denoise(denoise, known, mask, noise, "
           "schedule)`, and run `sample` on the grid `[(t, t_prev)]`, which yields one step: `step, = sample(...)`.",
           "Going back up: x_t = k x + sqrt(1 - k^2) noise, with k = alpha_t / alpha_t_prev, the share of the signal "
           "that the forward process keeps on this way. `schedule.at(t)` is (alpha, sigma): alpha is the root of "
           "abar already.",
           "Not after the last time, and the step to None is taken once. Yield the last `Step` of each pair with the "
           "pair's index: `step._replace(index=index)`.",
           "So that the numbers can be compared, draw in this order, each with `standard_noise(x, generator)`: the "
           "known cells' noise; what the step draws itself; the noise of the way back."])


def run(answer, *, times: int, sample=euler, grid=GRID, mask=MASK) -> list:
    sampler = answer(sample, KNOWN, mask, times=times)
    steps = sampler(network, X, grid, SCHEDULE, generator=torch.Generator().manual_seed(0))
    return [list(step) for step in steps]


def calls(answer, *, times: int) -> int:
    """How often `denoise` is called in a run of three steps."""
    found = []
    sampler = answer(euler, KNOWN, MASK, times=times)
    for _ in sampler(lambda x, t: (found.append(t), network(x, t))[1], X, GRID, SCHEDULE,
                     generator=torch.Generator().manual_seed(0)):
        pass
    return len(found)


@again.test("shape")
def a_step_for_each_pair(repaint):
    repaint.agrees(lambda answer: len(run(answer, times=2)), what="The number of steps that come out of three pairs")


@again.test("shape")
def as_many_calls(repaint):
    repaint.agrees(lambda answer: calls(answer, times=4), what="The number of calls of `denoise`, 3 steps 4 times,")


@again.test("value")
def once_is_blended(repaint):
    repaint.agrees(lambda answer: run(answer, times=1), what="With times = 1, the list of steps (index, t, x, x0)")


@again.test("value")
def three_times(repaint):
    repaint.agrees(lambda answer: run(answer, times=3), what="With times = 3, the list of steps (index, t, x, x0)")


@again.test("value")
def with_a_sampler_that_draws(repaint):
    repaint.agrees(lambda answer: run(answer, times=2, sample=ddpm), what="With ddpm, the list of steps")


@again.test("edge case")
def a_single_step(repaint):
    repaint.agrees(lambda answer: run(answer, times=5, grid=[(700, None)]), what="With one step only, the list")


def resampled(*, count=lambda times, last: 1 if last else times, back="forward", blend=True, fresh=True, every=False,
              after_last=False, number=True):
    """`repaint`; the switches are mistakes. fresh: noise for the known cells each time, once for a "pair", or once."""
    def repaint(sample, known, mask, *, times=10):
        def sampler(denoise, x, grid, schedule, *, generator=None):
            fixed = None if fresh else standard_noise(x, generator)
            for index, (t, t_prev) in enumerate(grid):
                passes = count(times, t_prev is None)
                for i in range(passes):
                    if fresh is True or fresh and i == 0:
                        fixed = standard_noise(x, generator)
                    denoise_known = blended_denoise(denoise, known, mask, fixed, schedule) if blend else denoise
                    step, = sample(denoise_known, x, [(t, t_prev)], schedule, generator=generator)
                    x = step.x
                    if every and i + 1 < passes:
                        yield step._replace(index=index)
                    if i + 1 < passes or (after_last and t_prev is not None):
                        x = returned(x, standard_noise(x, generator), t, t_prev, schedule, back)
                yield step._replace(index=index if number else step.index, x=x if after_last else step.x)
        return sampler
    return repaint


def returned(x: Tensor, noise: Tensor, t: float, t_prev: float, schedule: NoiseSchedule, back: str) -> Tensor:
    """From t_prev back to t; every way but "forward" is a mistake."""
    (alpha, sigma), (alpha_prev, _) = schedule.at(t), schedule.at(1 if t_prev is None else t_prev)
    ratio = alpha / alpha_prev
    return {"forward": lambda: ratio * x + math.sqrt(1 - ratio**2) * noise,
            "clean": lambda: alpha * x + sigma * noise,
            "unsquared": lambda: ratio * x + math.sqrt(1 - ratio) * noise,
            "root": lambda: math.sqrt(ratio) * x + math.sqrt(1 - ratio) * noise,
            "squared": lambda: ratio**2 * x + math.sqrt(1 - ratio**2) * noise,
            "added": lambda: x + math.sqrt(1 - ratio**2) * noise,
            "none": lambda: x,
            "noise": lambda: noise}[back]()


for diagnosis, answer in [
    ("every pass is yielded: one step for each pair of the grid, after its last pass", resampled(every=True)),
    ("the last step, to the image, is repeated as well: it is taken once",
     resampled(count=lambda times, last: times)),
    ("each step is taken `times` times more: `times` is how often in all",
     resampled(count=lambda times, last: 1 if last else times + 1)),
    ("no step is taken again: `times` is not used", resampled(count=lambda times, last: 1)),
    ("the known cells are not blended in", resampled(blend=False)),
    ("the known cells have the same noise each time: draw new noise for each pass", resampled(fresh=False)),
    ("the known cells get new noise for each pair of the grid only: draw new noise for each pass",
     resampled(fresh="pair")),
    ("on the way back x is taken for a clean latent: it holds the noise of t_prev already, so less is added",
     resampled(back="clean")),
    ("on the way back the noise's share is the root of 1 - k: of 1 - k^2, so that the variance stays",
     resampled(back="unsquared")),
    ("on the way back there is a root over k: `schedule.at` gives alpha, which is the root of abar already, so k is "
     "the ratio itself", resampled(back="root")),
    ("on the way back the signal is multiplied by k squared: by k", resampled(back="squared")),
    ("on the way back the signal is not scaled down, so the variance grows", resampled(back="added")),
    ("it does not go back up between two passes: the step to t_prev is taken from a latent that is there already",
     resampled(back="none")),
    ("on the way back all is replaced by noise, and the passes before are lost", resampled(back="noise")),
    ("it goes back up after the last pass as well, so the next step starts from t instead of t_prev",
     resampled(after_last=True)),
    ("the index of each step is 0: give it the pair's", resampled(number=False)),
]:
    again.mistake(diagnosis)(answer)


@again.test("edge case")
def the_known_cells_stay(repaint):
    *_, end = run(repaint, times=3)
    keep = (MASK == 0).expand_as(KNOWN)
    require(torch.equal(end[2][keep], KNOWN[keep]), "At the end the known cells are not `known`, bit for bit")
