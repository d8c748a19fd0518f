"""Answers to the exercises of notebook 10."""

import math

import numpy as np
import torch
from PIL import Image

from exercise_answers import right, wrong
from sdlearn.exercises.exercise import find
from sdlearn.sizes import fit_size, size_multiple
from sdlearn.tiles import tile_starts, tile_weights

# --- level_sizes --------------------------------------------------------------------------------------


@right("level_sizes")
def by_recursion(size, config):
    f = config.vae.factor
    if any(side < f or side % f for side in size):
        raise ValueError("sides must be multiples of 8")

    def down(r, c, n):
        return [] if n == 0 else [(r, c), *down((r + 1) // 2, (c + 1) // 2, n - 1)]
    return down(size[1] // f, size[0] // f, len(config.unet.channels))


@right("level_sizes")
def by_powers(size, config):
    f = config.vae.factor
    w, h = size
    if w <= 0 or h <= 0 or w % f != 0 or h % f != 0:
        raise ValueError(size)
    return [[math.ceil(h / f / 2 ** i), math.ceil(w / f / 2 ** i)] for i in range(len(config.unet.channels))]


def levels(half=lambda n: (n + 1) // 2, swap=False, factor=8, check=True, count=0):
    def answer(size, config):
        w, h = size
        if check and (w % 8 or h % 8 or w < 8 or h < 8):
            raise ValueError
        one, found = (w // factor, h // factor) if swap else (h // factor, w // factor), []
        for _ in range(len(config.unet.channels) + count):
            found.append(one)
            one = half(one[0]), half(one[1])
        return found
    return answer


for words, answer in [
    ("have changed places", levels(swap=True)),
    ("rounded up here", levels(half=lambda n: n // 2)),
    ("these are pixels", levels(factor=1)),
    ("one level too many", levels(count=1)),
    ("one level too few", levels(count=-1)),
    ("it must be refused", levels(check=False)),
    ("a list of pairs", lambda size, config: size[0] // 8),
    ("one level too low", lambda size, config: levels(count=1)(size, config)[1:]),
]:
    wrong("level_sizes", words)(answer)


@wrong("level_sizes", "only the width is checked")
def width_alone(size, config):
    if size[0] % 8 or not size[0]:
        raise ValueError
    return levels(check=False)(size, config)


@wrong("level_sizes", "a side of 0")
def zero_slips(size, config):
    if size[0] % 8 or size[1] % 8:
        raise ValueError
    return levels(check=False)(size, config)


@wrong("level_sizes", "and not of more")
def too_strict(size, config):
    if size[0] % 32 or size[1] % 32 or not all(size):
        raise ValueError
    return levels(check=False)(size, config)


# --- attention_scale ----------------------------------------------------------------------------------

@right("attention_scale")
def by_powers_of_two(tokens, trained):
    if tokens < 2 or trained < 2:
        raise ValueError("too few")
    return (math.log2(tokens) / math.log2(trained)) ** 0.5


@right("attention_scale")
def log_to_a_base(tokens, trained):
    if min(tokens, trained) <= 1:
        raise ValueError("too few")
    return float(np.sqrt(math.log(tokens, trained)))


for words, answer in [
    ("its root is wanted", lambda n, m: math.log(n) / math.log(m)),
    ("upside down", lambda n, m: math.sqrt(math.log(m) / math.log(n))),
    ("the logarithms are missing", lambda n, m: (n / m) ** 0.5),
    ("the ratio of the logarithms", lambda n, m: math.log(n / m)),
    ("never below 1", lambda n, m: max(1, math.sqrt(math.log(n) / math.log(m)))),
    ("nothing to choose", lambda n, m: math.sqrt(math.log(n) / (math.log(m) or 1e-9))),
    ("must return a number", lambda n, m: torch.tensor([1.2])),
]:
    wrong("attention_scale", words)(answer)


@wrong("attention_scale", "only `trained` is checked")
def one_check(tokens, trained):
    if trained < 2:
        raise ValueError
    return math.sqrt(math.log(tokens) / math.log(trained))


# --- shift_timestep -------------------------------------------------------------------------------------

@right("shift_timestep")
def by_hand(schedule, t, times):
    alpha, sigma = schedule.at(t)
    ratios = schedule.ve_sigmas.tolist()
    if alpha == 0:
        return len(ratios) - 1
    wanted = times * sigma / alpha
    if wanted <= ratios[0]:
        return 0
    for i in range(1, len(ratios)):
        if ratios[i] >= wanted:
            return i - 1 + (wanted - ratios[i - 1]) / (ratios[i] - ratios[i - 1])
    return len(ratios) - 1


@right("shift_timestep")
def by_searchsorted(schedule, t, times):
    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in schedule.at(t))
    table = schedule.ve_sigmas
    wanted = (times * sigma / alpha).clamp(table[0], table[-1])
    i = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
    return (i - 1 + (wanted - table[i - 1]) / (table[i] - table[i - 1])).item()


def interp(factor, last=float):
    def answer(schedule, t, times):
        alpha, sigma = schedule.at(t)
        ratio = sigma / alpha if alpha else math.inf
        return last(np.interp(factor(times) * ratio, schedule.ve_sigmas, np.arange(1000)))
    return answer


for words, answer in [
    ("not with the area", interp(lambda k: k * k)),
    ("the other direction", interp(lambda k: 1 / k)),
    ("the factor's root", interp(lambda k: k ** 0.5)),
    ("keep the fraction", interp(lambda k: k, last=round)),
    ("rounded down", interp(lambda k: k, last=int)),
    ("does not depend on `times`", lambda schedule, t, times: t),
    ("it is t that is multiplied", lambda schedule, t, times: min(t * times, 999)),
    ("timesteps go from 0 to 999", lambda schedule, t, times: times * t),
    ("sigma / alpha is infinite", lambda schedule, t, times: float(np.interp(
        times * schedule.at(t)[1] / schedule.at(t)[0], schedule.ve_sigmas, range(1000)))),
]:
    wrong("shift_timestep", words)(answer)


# --- two_pass -----------------------------------------------------------------------------------------

@right("two_pass")
def in_other_words(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    w, h = model.size(size)
    own = model.config.image_size
    large = w * h > own ** 2
    first = fit_size((w, h), own, size_multiple(model.config)) if large else (w, h)
    images = model.text2img(prompt, negative_prompt=negative_prompt, size=first, **settings)
    if not large:
        return images
    images = [one.resize((w, h), resample=Image.BICUBIC) for one in images]
    return model.img2img(prompt, images, negative_prompt=negative_prompt, strength=strength, size=(w, h), **settings)


@right("two_pass")
def by_another_filter(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    w, h = model.size(size)
    own = model.config.image_size
    if w * h <= own * own:
        return model.text2img(prompt, negative_prompt, size=(w, h), **settings)
    images = model.text2img(prompt, negative_prompt, size=fit_size((w, h), own, size_multiple(model.config)),
                            **settings)
    large = list(map(lambda image: image.resize((w, h), Image.Resampling.LANCZOS), images))
    return model.img2img(prompt, large, negative_prompt, strength=strength, **settings)


def passes(first=fit_size, strength_of=lambda s: s, keep=True, negative=True, take=lambda images: images, small=True,
           filters=Image.Resampling.BICUBIC):
    def two_pass(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
        w, h = model.size(size)
        own = model.config.image_size
        if small and w * h <= own * own:
            return model.text2img(prompt, negative_prompt, size=(w, h), **settings)
        images = model.text2img(prompt, negative_prompt, size=first((w, h), own, size_multiple(model.config)),
                                **settings)
        images = take([one.resize((w, h), filters) for one in images])
        return model.img2img(prompt, images, negative_prompt if negative else "", strength=strength_of(strength),
                             **(settings if keep else {}))
    return two_pass


for words, answer in [
    ("the full size already", passes(first=lambda size, own, step: size)),
    ("the first pass is a square", passes(first=lambda size, own, step: own)),
    ("width and height exchanged", passes(first=lambda size, own, step: fit_size(size, own, step)[::-1])),
    ("half of the sides", passes(first=lambda size, own, step: (size[0] // 2, size[1] // 2))),
    ("passes on 1 - strength", passes(strength_of=lambda s: 1 - s)),
    ("`strength` is not passed on", passes(strength_of=lambda s: 0.8)),
    ("does not get `settings`", passes(keep=False)),
    ("does not get the negative prompt", passes(negative=False)),
    ("only the first image", passes(take=lambda images: images[0])),
    ("needs no second pass", passes(small=False)),
    ("each pixel becomes a square", passes(filters=Image.Resampling.NEAREST)),
]:
    wrong("two_pass", words)(answer)


@wrong("two_pass", "The images are 192x96")
def forgot_to_enlarge(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    size = fit_size(model.size(size), model.config.image_size, size_multiple(model.config))
    images = model.text2img(prompt, negative_prompt, size=size, **settings)
    return model.img2img(prompt, images, negative_prompt, strength=strength, **settings)


@wrong("two_pass", "there is no second pass")
def one_pass(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    w, h = model.size(size)
    images = model.text2img(prompt, negative_prompt, size=fit_size((w, h), model.config.image_size,
                                                                 size_multiple(model.config)), **settings)
    return [one.resize((w, h), Image.Resampling.BICUBIC) for one in images]


# --- nearest_bucket -----------------------------------------------------------------------------------

@right("nearest_bucket")
def by_the_larger_ratio(size, sizes):
    if len(sizes) == 0:
        raise ValueError("no bucket")
    shape = size[0] / size[1]
    ratios = [max(shape * h / w, w / h / shape) for w, h in sizes]
    return sizes[ratios.index(min(ratios))]


@right("nearest_bucket")
def with_numpy(size, sizes):
    shapes = np.array([w / h for w, h in sizes])
    return tuple(sizes[int(np.argmin(np.abs(np.log(shapes * size[1] / size[0]))))])      # ValueError of an empty one


def least(key):
    return lambda size, sizes: min(sizes, key=lambda one: key(size[0], size[1], *one))


for words, answer in [
    ("squeezes tall shapes", least(lambda w, h, a, b: abs(w / h - a / b))),
    ("squeezes wide shapes", least(lambda w, h, a, b: abs(h / w - b / a))),
    ("whatever the sizes", least(lambda w, h, a, b: abs(w - a) + abs(h - b))),
    ("upside down", least(lambda w, h, a, b: abs(math.log(w / h * a / b)))),
    ("this is the farthest", least(lambda w, h, a, b: -abs(math.log(w / h * b / a)))),
    ("take `abs`", least(lambda w, h, a, b: w / h * b / a)),
    ("which is none of the sizes", lambda size, sizes: 1),
    ("cuts the fraction", least(lambda w, h, a, b: abs(w // h - a // b))),
    ("it gives the last", lambda size, sizes: least(lambda w, h, a, b: abs(math.log(w / h * b / a)))(
        size, list(reversed(sizes)))),
]:
    wrong("nearest_bucket", words)(answer)


@wrong("nearest_bucket", "For an empty list, what it raises")
def the_size_itself(size, buckets):
    return find("nearest_bucket").solutions[0](size, buckets) if buckets else size


@wrong("nearest_bucket", "Of two that are equally near, the result")
def the_last_of_equals(size, buckets):
    return find("nearest_bucket").solutions[0](size, buckets[::-1])


@wrong("shift_timestep", "where timesteps go from 0 to 999")
def in_thousands(*given):
    return 1000 + find("shift_timestep").solutions[0](*given)


# --- decode_tiled -------------------------------------------------------------------------------------

@right("decode_tiled")
def with_a_cosine(decode, latent, *, factor, tile=64, overlap=16):
    """Weights of its own, another shape, and smaller tiles at the ends."""
    b, _, h, w = latent.shape
    out, total = torch.zeros(b, 3, h * factor, w * factor), torch.zeros(1, 1, h * factor, w * factor)

    def weights(n, start, length):
        at = torch.ones(n)
        k = overlap * factor
        for i in range(min(k, n)):
            v = 0.5 - 0.5 * math.cos(math.pi * (i + 1) / (k + 1))
            if start > 0:
                at[i] = v
            if start + tile < length:
                at[-1 - i] = min(at[-1 - i], v)
        return at
    for y in range(0, h, tile - overlap):
        for x in range(0, w, tile - overlap):
            pixels = decode(latent[:, :, y:y + tile, x:x + tile])
            m = weights(pixels.shape[2], y, h)[:, None] * weights(pixels.shape[3], x, w)
            where = (..., slice(y * factor, y * factor + pixels.shape[2]),
                     slice(x * factor, x * factor + pixels.shape[3]))
            out[where] += pixels * m
            total[where] += m
    return out / total


@right("decode_tiled")
def rows_of_tiles(decode, latent, *, factor, tile=64, overlap=16):
    f, (b, _, h, w) = factor, latent.shape
    acc = torch.zeros(b, 4, h * f, w * f)
    for top in tile_starts(h, tile, overlap):
        for left in tile_starts(w, tile, overlap):
            part = decode(latent[..., top:top + tile, left:left + tile])
            down = tile_weights(part.shape[2], overlap * f, first=top == 0, last=top + tile >= h)
            across = tile_weights(part.shape[3], overlap * f, first=left == 0, last=left + tile >= w)
            weight = (down[:, None] * across).expand(b, 1, -1, -1)
            acc[..., top * f:top * f + part.shape[2], left * f:left * f + part.shape[3]] += torch.cat(
                [part * weight, weight], dim=1)
    return acc[:, :3] / acc[:, 3:]


def tiled(starts=tile_starts, scale=True, weights=tile_weights, over=False, divide=True, at=lambda y, x: (y, x)):
    def answer(decode, latent, *, factor, tile=64, overlap=16):
        b, _, h, w = latent.shape
        out, total = torch.zeros(b, 3, h * factor, w * factor), torch.zeros(h * factor, w * factor)
        for top in starts(h, tile, overlap):
            for left in starts(w, tile, overlap):
                part = decode(latent[:, :, top:top + tile, left:left + tile])
                y, x = at(top * factor, left * factor) if scale else (top, left)
                m = (weights(part.shape[2], overlap * factor, first=top == 0, last=top + tile >= h)[:, None]
                     * weights(part.shape[3], overlap * factor, first=left == 0, last=left + tile >= w))
                here = out[:, :, y:y + part.shape[2], x:x + part.shape[3]]
                here.copy_(part) if over else here.add_(part * m)
                total[y:y + part.shape[2], x:x + part.shape[3]] += m
        return out if over or not divide else out / total
    return answer


def flat(length, overlap, *, first, last):
    return torch.ones(length)


for words, answer in [
    ("one has to fade out", tiled(over=True)),
    ("one has to fade out", tiled(weights=flat)),
    ("not divided by the sum", tiled(weights=flat, divide=False)),
    ("pixels are `factor` times as many", tiled(scale=False)),
    ("the last rows and columns are missing",
     tiled(starts=lambda n, tile, overlap: range(0, max(n - tile, 0) + 1, tile - overlap))),
    ("where tiles of 8 were asked for", lambda decode, latent, factor, tile=64, overlap=16: decode(latent)),
    ("has shape", lambda decode, latent, factor, tile=64, overlap=16: decode(latent[:, :, :tile, :tile])),
]:
    wrong("decode_tiled", words)(answer)


@wrong("decode_tiled", "own border")
def ramp_from_zero(decode, latent, *, factor, tile=64, overlap=16):
    def from_zero(length, overlap, *, first, last):
        weights = torch.ones(length)
        if overlap:
            weights[:overlap] = torch.linspace(0, 1, overlap)
            weights[-overlap:] = torch.minimum(weights[-overlap:], torch.linspace(1, 0, overlap))
        return weights
    return tiled(weights=from_zero)(decode, latent.clone(), factor=factor, tile=tile, overlap=overlap)
