"""Answers to the exercises of notebook 03."""

import math
from itertools import pairwise

import torch

from exercise_answers import right, wrong
from sdlearn.exercises.exercise import find
from sdlearn.samplers import Step

# --- add_noise ----------------------------------------------------------------------------------------


def shares(schedule, x0, t):
    """alpha and sigma at t, ready to multiply x0."""
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(t))
    return (value.to(x0.dtype).reshape(-1, 1, 1, 1) for value in (alpha, sigma))


@right("add_noise")
def from_abar(schedule, x0, noise, t):
    abar = schedule.alphas_cumprod[torch.as_tensor(t)].float()
    while abar.ndim < x0.ndim:
        abar = abar[..., None]
    return torch.sqrt(abar) * x0 + torch.sqrt(1 - abar) * noise


@right("add_noise")
def one_by_one(schedule, x0, noise, t):
    times = [t] * len(x0) if isinstance(t, int) else t.tolist()
    pairs = [schedule.at(one) for one in times]
    return torch.stack([a * x + s * n for (a, s), x, n in zip(pairs, x0, noise, strict=True)])


@wrong("add_noise", "square root")
def abar_itself(schedule, x0, noise, t):
    abar = schedule.alphas_cumprod[torch.as_tensor(t)].float().reshape(-1, 1, 1, 1)
    return abar * x0 + (1 - abar) * noise


@wrong("add_noise", "each other's share")
def mixed_up(schedule, x0, noise, t):
    sigma, alpha = shares(schedule, x0, t)
    return alpha * x0 + sigma * noise


@wrong("add_noise", "the variance grows")
def as_in_exploding(schedule, x0, noise, t):
    _, sigma = shares(schedule, x0, t)
    return torch.add(x0, sigma * noise)


@wrong("add_noise", "must be added")
def taken_away(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    return alpha * x0 - sigma * noise


@wrong("add_noise", "`x0` in place")
def in_place(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    x0 *= alpha
    return x0 + sigma * noise


@wrong("add_noise", "reshape them to (B, 1, 1, 1)")
def numbers_only(schedule, x0, noise, t):
    alpha, sigma = schedule.alpha_sigma(torch.as_tensor(t))
    return alpha.float() * x0 + sigma.float() * noise


@wrong("add_noise", "is float64 where it must be float32")
def in_double(schedule, x0, noise, t):
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in schedule.alpha_sigma(torch.as_tensor(t)))
    return alpha * x0 + sigma * noise


@wrong("add_noise", "returns None: is a `return` missing?")
def silent(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    alpha * x0 + sigma * noise  # noqa: B018


@wrong("add_noise", "flow matching")
def flow(schedule, x0, noise, t):
    return torch.lerp(x0, noise, (torch.as_tensor(t) / 1000.0).reshape(-1, 1, 1, 1).expand_as(x0).contiguous())


# --- target -------------------------------------------------------------------------------------------

@right("target")
def velocity(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    return noise * alpha - x0 * sigma


@right("target")
def from_x(schedule, x0, noise, t):
    """Through x_t: v = (alpha x_t - x0) / sigma."""
    alpha, sigma = shares(schedule, x0, t)
    x = schedule.add_noise(x0, noise, t)
    return (alpha * x - x0) / sigma


@wrong("target", "this is eps")
def noise_itself(schedule, x0, noise, t):
    return noise.clone()


@wrong("target", "this is x0")
def image_itself(schedule, x0, noise, t):
    return x0 + 0


@wrong("target", "x_t itself")
def noised(schedule, x0, noise, t):
    return schedule.add_noise(x0, noise, t)


@wrong("target", "the sign is turned round")
def turned(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    return sigma * x0 - alpha * noise


@wrong("target", "have changed places")
def exchanged(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    return sigma * noise - alpha * x0


@wrong("target", "flow matching")
def of_flow(schedule, x0, noise, t):
    return noise - x0


@wrong("target", "one of the two derivatives has a minus")
def plus(schedule, x0, noise, t):
    alpha, sigma = shares(schedule, x0, t)
    return sigma * x0 + alpha * noise


# --- to_x0 --------------------------------------------------------------------------------------------

@right("to_x0")
def by_cases(schedule, output, x, t, prediction):
    alpha, sigma = shares(schedule, x, t)
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return x / alpha - sigma / alpha * output


@right("to_x0")
def by_way_of_eps(schedule, output, x, t, prediction):
    alpha, sigma = shares(schedule, x, t)
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    eps = alpha * output + sigma * x
    return -(output - alpha * eps) / sigma


def x0_by(eps=lambda e, x, a, s: (x - s * e) / a, v=lambda v, x, a, s: a * x - s * v):
    def to_x0(schedule, output, x, t, prediction_type):
        alpha, sigma = shares(schedule, x, t)
        return (eps if prediction_type == "epsilon" else v)(output, x, alpha, sigma)
    return to_x0


for words, answer in [
    ("not divided by alpha", x0_by(lambda e, x, a, s: x - s * e)),
    ("solved by dividing", x0_by(lambda e, x, a, s: (x - s * e) * a)),
    ("take it away", x0_by(lambda e, x, a, s: (x + s * e) / a)),
    ("at its full size", x0_by(lambda e, x, a, s: (x - e) / a)),
    ("abar and 1 - abar", x0_by(lambda e, x, a, s: (x - (1 - a**2) * e) / a**2)),
    ("does the function use `prediction`?", x0_by(v=lambda v, x, a, s: (x - s * v) / a)),
    ("wrong sign", x0_by(v=lambda v, x, a, s: a * x + s * v)),
    ("is the noise", x0_by(v=lambda v, x, a, s: a * v + s * x)),
    ("divided by alpha, which is for eps", x0_by(v=lambda v, x, a, s: x - s * v / a)),
    ("everywhere it is the negative", x0_by(v=lambda v, x, a, s: s * v - a * x)),
]:
    wrong("to_x0", words)(answer)


# --- make_timesteps -----------------------------------------------------------------------------------

@right("make_timesteps")
def counting_down(schedule, n):
    stride = schedule.num_train_timesteps // n
    found, t = [], stride * (n - 1) + 1
    while t >= 1:
        found.append((t, t - stride if t > stride else None))
        t -= stride
    return found


@right("make_timesteps")
def lists(schedule, n):
    times = sorted((i * (schedule.num_train_timesteps // n) + 1 for i in range(n)), reverse=True)
    return [[t, times[i + 1] if i + 1 < n else None] for i, t in enumerate(times)]


def grid_of(times, end=None):
    def answer(schedule, n):
        found = times(schedule.num_train_timesteps, n)
        return list(zip(found, found[1:] + [end], strict=True))
    return answer


for words, answer in [
    ("the 1 is missing", grid_of(lambda N, n: list(range(0, N - N % n, N // n))[::-1])),
    ("t falls", grid_of(lambda N, n: [N // n * i + 1 for i in range(n)])),
    ("The last t_prev is 0", grid_of(lambda N, n: [N // n * i + 1 for i in range(n)][::-1], end=0)),
    ("trailing", grid_of(lambda N, n: [round(N * (n - i) / n) - 1 for i in range(n)])),
    ("linspace", grid_of(lambda N, n: [999 - 999 * i / max(n - 1, 1) for i in range(n)])),
    ("N // n once", grid_of(lambda N, n: [round(i * N / n) + 1 for i in reversed(range(n))])),
    ("must be a pair", lambda schedule, n: [1000 // n * i + 1 for i in range(n)][::-1]),
    ("3 steps where 4", lambda schedule, n: pairwise([1000 // n * i + 1 for i in reversed(range(n))])),
]:
    wrong("make_timesteps", words)(answer)


# --- samplers -----------------------------------------------------------------------------------------

def sampler_of(step):
    """A sampler of `step(x, x0, eps, a, s, ap, sp, noise)`, as most people write theirs."""
    def sampler(denoise, x, grid, schedule, *, generator=None):
        for i, (t, t_prev) in enumerate(grid):
            a, s = schedule.at(t)
            ap, sp = schedule.at(t_prev)
            x0 = denoise(x, t)
            eps = (x - a * x0) / s
            x = step(x, x0, eps, a, s, ap, sp, lambda x=x: torch.randn(x.shape, generator=generator))
            yield Step(i, t, x, x0)
    return sampler


def mean(x, x0, a, s, ap, sp):
    k = a**2 / ap**2
    return ap * (1 - k) / s**2 * x0 + k**0.5 * sp**2 / s**2 * x


def std(a, s, ap, sp):
    return sp / s * (1 - a**2 / ap**2) ** 0.5


@right("ddpm")
def by_beta(denoise, x, grid, schedule, generator=None):
    """Ho et al.'s notation, with abar and beta."""
    for i, (t, t_prev) in enumerate(grid):
        abar = schedule.at(t)[0] ** 2
        abar_prev = 1.0 if t_prev is None else schedule.at(t_prev)[0] ** 2
        beta = 1 - abar / abar_prev
        x0 = denoise(x, t)
        x = math.sqrt(abar_prev) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
        if t_prev is not None:
            variance = beta * (1 - abar_prev) / (1 - abar)
            x = x + math.sqrt(variance) * torch.randn(x.shape, generator=generator)
        yield Step(i, t, x, x0)


@right("ddpm")
def by_ddim(denoise, x, grid, schedule, generator=None):
    """DDIM with eta 1 is the same Gaussian."""
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        fresh = std(a, s, ap, sp)
        x = ap * x0 + math.sqrt(max(sp**2 - fresh**2, 0)) * (x - a * x0) / s
        if fresh > 0:
            x = x + fresh * torch.randn(x.shape, generator=generator)
        yield (i, t, x, x0)


def ddpm_by(mean=mean, std=std):
    return sampler_of(lambda x, x0, eps, a, s, ap, sp, noise:
                      mean(x, x0, a, s, ap, sp) + (std(a, s, ap, sp) * noise() if sp else 0))


for words, answer in [
    ("the mean alone", ddpm_by(std=lambda *_: 0.0)),
    ("take the square root", ddpm_by(std=lambda a, s, ap, sp: (sp / s) ** 2 * (1 - (a / ap) ** 2))),
    ("the large variance", ddpm_by(std=lambda a, s, ap, sp: math.sqrt(1 - (a / ap) ** 2))),
    ("x0 and x have each other's weight", ddpm_by(mean=lambda x, x0, *rest: mean(x0, x, *rest))),
    ("k where it must have its root", ddpm_by(mean=lambda x, x0, a, s, ap, sp: (
        ap * (1 - (a / ap) ** 2) * x0 + (a / ap) ** 2 * sp**2 * x) / s**2)),
    ("DDIM's noise", ddpm_by(mean=lambda x, x0, a, s, ap, sp: ap * x0 + sp / s * (x - a * x0))),
    ("the mean forgets x", ddpm_by(mean=lambda x, x0, a, s, ap, sp: ap * x0)),
    ("does the noise come from `generator`?", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise:
     mean(x, x0, a, s, ap, sp) + std(a, s, ap, sp) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))),
]:
    wrong("ddpm", words)(answer)


def ending_at_0(sampler):
    """The same sampler, down to the noise of timestep 0, as DDIM of Stable Diffusion ends."""
    class Ends:
        def __init__(self, schedule):
            self.schedule = schedule

        def at(self, t):
            return self.schedule.at(0 if t is None else t)
    return lambda denoise, x, grid, schedule: sampler(denoise, x, grid, Ends(schedule))


@right("ddim")
def by_rescaling(denoise, x, grid, schedule):
    """Straight from x: both parts of it scaled, and x0 put right."""
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(0 if t_prev is None else t_prev)
        x0 = denoise(x, t)
        x = sp / s * x + (ap - sp * a / s) * x0
        yield Step(i, t, x, x0)


@right("ddim")
def by_abar(denoise, x, grid, schedule):
    def abar(t):
        return schedule.alphas_cumprod[t or 0]

    for i, (t, t_prev) in enumerate(grid):
        now, then = abar(t), abar(t_prev)
        x0 = denoise(x, t)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
        yield Step(i, t, x, x0)


@right("euler")
def in_sigmas(denoise, x, grid, schedule):
    """In X = x / alpha and s = sigma / alpha, where there is some signal."""
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        if a > 0:
            X = x / a
            eps = (X - x0) / (s / a)
            x = ap * (X + (sp / ap - s / a) * eps)
        else:
            x = ap * x0 + sp * x
        yield Step(i, t, x, x0)


right("euler")(sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: torch.add(ap * x0, eps, alpha=sp)))


def in_place_steps(denoise, x, grid, schedule):
    x = x.clone()
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        x -= a * x0
        x *= sp / s
        x += ap * x0
        yield Step(i, t, x, x0)


def all_at_once(denoise, x, grid, schedule):
    return list(sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * eps)(denoise, x, grid, schedule))


def counted_from_1(denoise, x, grid, schedule):
    steps = sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * eps)(denoise, x, grid, schedule)
    return (Step(step.index + 1, *step[1:]) for step in steps)


for words, answer in [
    ("alpha_prev x0 + sigma_prev eps", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x + sp * eps)),
    ("is multiplied by the old sigma", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + s * eps)),
    ("is multiplied by the old alpha", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: a * x0 + sp * eps)),
    ("eps is x - x0", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * (x - x0))),
    ("eps is not divided by sigma", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * s * eps)),
    ("only x0 is left", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0)),
    ("divide x by alpha first", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: x + (sp / ap - s / a) * eps)),
    ("the noise is fresh", sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + (sp * noise() if sp else 0))),
    ("It is no generator", all_at_once),
    ("its index is 1: it counts from 0", counted_from_1),
]:
    wrong("euler", words)(answer)
    wrong("ddim", words)(ending_at_0(answer))
wrong("euler", "read after the last step")(in_place_steps)
wrong("ddim", "ends at the noise of timestep 0")(
    sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * eps))
wrong("euler", "as DDIM does")(ending_at_0(sampler_of(lambda x, x0, eps, a, s, ap, sp, noise: ap * x0 + sp * eps)))


# --- heun ---------------------------------------------------------------------------------------------

@right("heun")
def heun_in_sigmas(denoise, x, grid, schedule):
    """Karras et al.'s algorithm 1 as printed, with X in place of x."""
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        X, now, then = x / a, s / a, sp / ap
        x0 = denoise(x, t)
        d = (X - x0) / now
        end = X + (then - now) * d
        if then != 0:
            d_end = (end - denoise(ap * end, t_prev)) / then
            end = X + (then - now) * (d / 2 + d_end / 2)
        x = ap * end
        yield Step(i, t, x, x0)


@right("heun")
def heun_as_a_mean(denoise, x, grid, schedule, generator=None):
    """The mean of Euler's end and of the end that the slope there leads to."""
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        first = ap * x0 + sp * (x - a * x0) / s
        if t_prev is not None:
            slope = (first - ap * denoise(first, t_prev)) / sp
            second = ap * (x / a + (sp / ap - s / a) * slope)
            first = (first + second) / 2
        x = first
        yield Step(i, t, x, x0)


def heun_by(end):
    """Heun with another end of the step; `end(X, d, now, then, slope)` in X, where slope(X, t) asks again."""
    def heun(denoise, x, timesteps, schedule):
        for i, (t, t_prev) in enumerate(timesteps):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            X, now, then = x / a, s / a, sp / ap
            x0 = denoise(x, t)
            d = (X - x0) / now

            def slope(X, late=True, t=t, t_prev=t_prev, a=a, ap=ap, now=now, then=then):
                return (X - denoise((ap if late else a) * X, t_prev if late else t)) / (then if late else now)
            x = ap * (X + (then - now) * d if t_prev is None else end(X, d, now, then, slope))
            yield Step(i, t, x, x0)
    return heun


for words, answer in [
    ("Euler's step alone", heun_by(lambda X, d, now, then, slope: X + (then - now) * d)),
    ("take the mean of both", heun_by(lambda X, d, now, then, slope:
                                      X + (then - now) * slope(X + (then - now) * d))),
    ("their mean is half of that", heun_by(lambda X, d, now, then, slope:
                                           X + (then - now) * (d + slope(X + (then - now) * d)))),
    ("both go from the old x", heun_by(lambda X, d, now, then, slope: X + (then - now) * d
                                       + (then - now) * (d + slope(X + (then - now) * d)) / 2)),
]:
    wrong("heun", words)(answer)


def heun_second(second):
    """Heun in x, with `second(denoise, x, end, t, t_prev, a, s, ap, sp)` for the eps at the end."""
    def heun(denoise, x, timesteps, schedule):
        for i, (t, t_prev) in enumerate(timesteps):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            x0 = denoise(x, t)
            eps = (x - a * x0) / s
            end = ap * x0 + sp * eps
            if t_prev is not None:
                eps_end = second(denoise, x, end, t, t_prev, a, s, ap, sp)
                end = ap * (x / a + (sp / ap - s / a) * (eps + eps_end) / 2)
            x = end
            yield Step(i, t, x, x0)
    return heun


def last_step_too(denoise, x, grid, schedule):
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        eps = (x - a * x0) / s
        end = ap * x0 + sp * eps
        eps_end = (end - ap * denoise(end, t_prev)) / sp
        x = ap * (x / a + (sp / ap - s / a) * (eps + eps_end) / 2)
        yield Step(i, t, x, x0)


def wasteful(denoise, x, grid, schedule):
    for step in heun_as_a_mean(denoise, x, grid, schedule):
        denoise(step.x, 0)
        yield step


for words, answer in [
    ("taken at the old x", heun_second(lambda d, x, end, t, tp, a, s, ap, sp: (x - ap * d(x, tp)) / sp)),
    ("asked at t the second time", heun_second(lambda d, x, end, t, tp, a, s, ap, sp: (end - ap * d(end, t)) / sp)),
    ("alpha and sigma of t", heun_second(lambda d, x, end, t, tp, a, s, ap, sp: (end - a * d(end, tp)) / s)),
    ("It raises TypeError", last_step_too),
    ("calls `denoise` 17 times for 6 steps where 11", wasteful),
]:
    wrong("heun", words)(answer)


# --- dpmpp_2m -----------------------------------------------------------------------------------------

@right("dpmpp_2m")
def as_in_the_paper(denoise, x, grid, schedule):
    """With r = h_last / h and expm1."""
    predictions, lambdas = [], []
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        predictions.append(denoise(x, t))
        lambdas.append(math.log(a / s))
        if t_prev is None:
            x = predictions[-1]
        else:
            h = math.log(ap / sp) - lambdas[-1]
            D = predictions[-1]
            if i:
                r = (lambdas[-1] - lambdas[-2]) / h
                D = (1 + 1 / (2 * r)) * predictions[-1] - 1 / (2 * r) * predictions[-2]
            x = sp / s * x - ap * math.expm1(-h) * D
        yield Step(i, t, x, predictions[-1])


@right("dpmpp_2m")
def in_two_terms(denoise, x, grid, schedule, generator=None):
    """DDIM's step, and what the change of x0 adds to it."""
    before = None
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        x = ap * x0 + sp * (x - a * x0) / s
        if t_prev is not None:
            h = math.log(ap * s / (sp * a))
            if before is not None:
                x = x + (ap - sp * a / s) * h / before[1] * (x0 - before[0]) / 2
            before = x0, h
        yield Step(i, t, x, x0)


def dpmpp_by(extrapolate, forget=False):
    def dpmpp(denoise, x, grid, schedule):
        x0_last = h_last = None
        for i, (t, t_prev) in enumerate(grid):
            (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
            x0 = D = denoise(x, t)
            if t_prev is None:
                x = x0
            else:
                h = math.log(ap / sp) - math.log(a / s)
                if x0_last is not None:
                    D = extrapolate(x0, x0_last, h / h_last)
                x = sp / s * x - ap * math.expm1(-h) * D
                if not forget or x0_last is None:
                    x0_last, h_last = x0, h
            yield Step(i, t, x, x0)
    return dpmpp


for words, answer in [
    ("of first order", dpmpp_by(lambda x0, last, r: x0)),
    ("the half is missing", dpmpp_by(lambda x0, last, r: (1 + r) * x0 - r * last)),
    ("h and h_last are swapped", dpmpp_by(lambda x0, last, r: x0 + (x0 - last) / r / 2)),
    ("taken for equal", dpmpp_by(lambda x0, last, r: 1.5 * x0 - 0.5 * last)),
    ("the sign is wrong", dpmpp_by(lambda x0, last, r: x0 + r * (last - x0) / 2)),
    ("interpolates between them", dpmpp_by(lambda x0, last, r: (x0 + last) / 2)),
    ("x0_last stays that of the first step", dpmpp_by(lambda x0, last, r: x0 + r * (x0 - last) / 2, forget=True)),
]:
    wrong("dpmpp_2m", words)(answer)


@wrong("dpmpp_2m", "It raises ZeroDivisionError")
def no_end(denoise, x, grid, schedule):
    for i, (t, t_prev) in enumerate(grid):
        (a, s), (ap, sp) = schedule.at(t), schedule.at(t_prev)
        x0 = denoise(x, t)
        h = math.log(ap / sp) - math.log(a / s)
        x = sp / s * x - ap * math.expm1(-h) * x0
        yield Step(i, t, x, x0)


# --- what is asked of every sampler -------------------------------------------------------------------

def reporting(name, change, *, look=lambda denoise: denoise):
    """The package's sampler; `change(place, steps, x)` makes what is yielded at a place of all its steps."""
    [sample, *_] = find(name).solutions

    def sampler(denoise, x, grid, schedule, **settings):
        steps = list(sample(look(denoise), x, grid, schedule, **settings))
        for i in range(len(steps)):
            yield from change(i, steps, x)
    return sampler


def twice(denoise):
    def look(x, t):
        denoise(x, t)
        return denoise(x, t)
    return look


def as_it_is(i, steps, x):
    yield steps[i]


def at(name, value):
    """With another value of one part of each step."""
    def change(i, steps, x):
        yield steps[i]._replace(**{name: value(i, steps, x)})
    return change


for name in ("ddpm", "ddim", "euler", "heun", "dpmpp_2m"):
    for words, change in [
        ("yields 5 steps where the grid has 6", lambda i, steps, x: steps[i:i + 1] if i else []),
        ("yields 12 steps where the grid has 6", lambda i, steps, x: [steps[i]] * (2 if len(steps) > 3 else 1)),
        ("`yield` after the step is made", at("x", lambda i, steps, x: steps[i - 1].x if i else x)),
        ("says that its index is 1: it counts from 0", at("index", lambda i, steps, x: i + 1)),
        ("where it started from", at("t", lambda i, steps, x: steps[min(i + 1, len(steps) - 1)].t)),
        ("x0 of a step has shape", at("x0", lambda i, steps, x: steps[i].x0[0])),
        ("It must yield Step(index, t, x, x0)", lambda i, steps, x: [tuple(steps[i])[:3]]),
        ("is another one than `denoise(x, t)` gave", at("x0", lambda i, steps, x: steps[-1].x0)),
    ]:
        wrong(name, words)(reporting(name, change))
for name in ("ddpm", "dpmpp_2m"):
    wrong(name, "It calls `denoise` 12 times for 6 steps")(reporting(name, as_it_is, look=twice))
