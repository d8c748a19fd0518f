"""Answers to the exercises of notebook 06."""

import torch

from exercise_answers import right, wrong
from sdlearn import guidance
from sdlearn.guidance import classifier_free_guidance as cfg
from sdlearn.guidance import rescale_guidance

# --- classifier_free_guidance -------------------------------------------------------------------------


@right("classifier_free_guidance")
def weights_that_sum_to_one(uncond, cond, scale):
    return scale * cond + (1 - scale) * uncond


@right("classifier_free_guidance")
def by_lerp(uncond, cond, scale):
    return torch.lerp(uncond, cond, scale)


@right("classifier_free_guidance")
def from_c(uncond, cond, scale):
    return cond + (scale - 1) * (cond - uncond)


for words, answer in [
    ("it starts at c, as in the paper's own convention", lambda u, c, w: (1 + w) * c - w * u),
    ("u and c have changed places", lambda uncond, cond, scale: cfg(cond, uncond, scale)),
    ("where does it start?", lambda u, c, w: (c - u) * w),
    ("not the other way round", lambda u, c, w: u + w * (u - c)),
    ("w times c is added whole", lambda u, c, w: torch.add(u, c, alpha=w)),
    ("whatever w is", lambda u, c, w: u + (c - u)),
    ("held between 0 and 1", lambda u, c, w: torch.lerp(u, c, min(w, 1.0)) if w > 0 else u),
    ("has shape", lambda u, c, w: torch.cat([u, c])),
]:
    wrong("classifier_free_guidance", words)(answer)


@wrong("classifier_free_guidance", "changes its argument `uncond` in place")
def in_place(uncond, cond, scale):
    uncond += scale * (cond - uncond)
    return uncond


@wrong("classifier_free_guidance", "returns None: is a `return` missing?")
def silent(uncond, cond, scale):
    uncond + scale * (cond - uncond)  # noqa: B018


# --- predict_uncond_cond --------------------------------------------------------------------------------------

@right("predict_uncond_cond")
def by_repeat(unet, x, t, texts):
    out = unet(x.repeat(2, 1, 1, 1), t, texts)
    return out[:len(x)], out[len(x):]


@right("predict_uncond_cond")
def by_unflatten(unet, x, t, texts):
    latents = x[None].expand(2, *x.shape).flatten(0, 1)
    u, c = unet(latents, t, texts).unflatten(0, (2, -1))
    return u, c


@wrong("predict_uncond_cond", "runs the network 2 times where once will do")
def one_after_the_other(unet, x, t, texts):
    empty, full = texts.chunk(2)
    return unet(x, t, empty), unet(x, t, full)


@wrong("predict_uncond_cond", "have changed places")
def wrong_way_round(unet, x, t, texts):
    c, u = unet(torch.cat([x, x]), t, texts).chunk(2)
    return u, c


@wrong("predict_uncond_cond", "half a batch apart")
def twins(unet, x, t, texts):
    out = unet(torch.repeat_interleave(x, 2, dim=0), t, texts)
    return out[:len(x)], out[len(x):]


@wrong("predict_uncond_cond", "dealt out in turn")
def in_turn(unet, x, t, texts):
    out = unet(x.repeat(2, 1, 1, 1), t, texts)
    return out[0::2], out[1::2]


@wrong("predict_uncond_cond", "makes pieces of 2 each")
def in_twos(unet, x, t, texts):
    return unet(x.repeat(2, 1, 1, 1), t, texts).split(2)


@right("predict_uncond_cond")
def with_a_timestep_for_each(unet, x, t, texts):
    u, c = unet(torch.cat([x, x]), torch.full((len(texts),), t), texts).chunk(2)
    return u, c


@wrong("predict_uncond_cond", "cut along the channels")
def wrong_axis(unet, x, t, texts):
    return torch.chunk(unet(torch.cat([x, x]), t, texts), 2, 1)


@wrong("predict_uncond_cond", "2 latents and 4 texts")
def not_doubled(unet, x, t, texts):
    return unet(x, t, texts).chunk(2)


@wrong("predict_uncond_cond", "two tensors, u and c")
def uncut(unet, x, t, texts):
    return unet(torch.cat([x, x]), t, texts)


# --- composed_guidance -----------------------------------------------------------------------------------------

@right("composed_guidance")
def by_weights(uncond, cond, negative, scale, away):
    return (1 - scale + away) * uncond + scale * cond - away * negative


@right("composed_guidance")
def after_guided(uncond, cond, negative, scale, away):
    return cfg(uncond, cond, scale) + away * (uncond - negative)


for words, answer in [
    ("it goes towards n", lambda u, c, n, w, v: cfg(u, c, w) + v * (n - u)),
    ("starts at c here", lambda u, c, n, w, v: u + w * (c - u) + v * (c - n)),
    ("from u, away from n", lambda u, c, n, w, v: cfg(u, c, w) + v * (n - c)),
    ("n is taken away whole", lambda u, c, n, w, v: cfg(u, c, w) - v * n),
    ("`negative_scale` is not used", lambda u, c, n, w, v: cfg(n, c, w)),
    ("a strength of its own", lambda u, c, n, w, v: cfg(u, c - v * (n - u), w)),
    ("n is not used", lambda u, c, n, w, v: cfg(u, c, w)),
]:
    wrong("composed_guidance", words)(answer)


# --- rescale_guidance -----------------------------------------------------------------------------------------

@right("rescale_guidance")
def as_in_the_paper(out, cond, phi):
    wanted = cond.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    there = out.flatten(1).std(dim=1).view(-1, 1, 1, 1)
    return phi * (out * wanted / (there + 1e-12)) + (1 - phi) * out


@right("rescale_guidance")
def by_lerp_of_both(out, cond, phi):
    dims = [1, 2, 3]
    ratio = torch.where(out.std(dims) > 0, cond.std(dims) / out.std(dims), 1.0)
    return torch.lerp(out, out * ratio[:, None, None, None], phi)


def of(x, dims=(1, 2, 3)):
    return x.std(dims, keepdim=True)


for words, answer in [
    ("serves the whole batch", lambda out, cond, phi: out * (1 - phi + phi * cond.std() / out.std().clamp(min=1e-9))),
    ("each channel is rescaled by itself",
     lambda out, cond, phi: out * (1 - phi + phi * of(cond, (2, 3)) / of(out, (2, 3)).clamp(min=1e-9))),
    ("upside down", lambda out, cond, phi: out * (1 - phi + phi * of(out) / of(cond))),
    ("a ratio of variances",
     lambda out, cond, phi: out * (1 - phi + phi * cond.var((1, 2, 3), keepdim=True)
                                   / out.var((1, 2, 3), keepdim=True).clamp(min=1e-9))),
    ("a power of the factor", lambda out, cond, phi: out * (of(cond) / of(out).clamp(min=1e-9)) ** phi),
    ("have changed places", lambda out, cond, phi: phi * out + (1 - phi) * out * of(cond) / of(out).clamp(min=1e-9)),
    ("whatever phi is", lambda out, cond, phi: out * of(cond) / of(out).clamp(min=1e-9)),
    ("not rescaled is missing", lambda out, cond, phi: phi * out * of(cond) / of(out).clamp(min=1e-9)),
    ("an output of zeros is 0", lambda out, cond, phi: out * (1 - phi + phi * of(cond) / of(out))),
    ("it is `cond` that is stretched", lambda out, cond, phi: cond * (1 - phi + phi * of(out) / of(cond))),
]:
    wrong("rescale_guidance", words)(answer)


# --- guidance_scale_at -----------------------------------------------------------------------------------------

@right("guidance_scale_at")
def in_a_chain(t, scale, interval=None):
    if interval is None:
        return scale
    low, high = interval
    return scale if low <= t <= high else 1


@right("guidance_scale_at")
def the_other_way(t, scale, interval=None):
    low, high = interval or (-float("inf"), float("inf"))
    return 1.0 if t < low or t > high else scale


@wrong("guidance_scale_at", "no prompt at all")
def zero_outside(t, scale, interval=None):
    return scale * (interval is None or interval[0] <= t <= interval[1])


@wrong("guidance_scale_at", "the ends belong to the interval")
def strictly(t, scale, interval=None):
    return scale if interval is None or interval[0] < t < interval[1] else 1.0


@wrong("guidance_scale_at", "the upper end belongs")
def by_range(t, scale, interval=None):
    return scale if interval is None or interval[1] > t >= interval[0] else 1.0


@wrong("guidance_scale_at", "outside of the interval and not within")
def upside_down(t, scale, interval=None):
    return 1.0 if interval is not None and interval[0] <= t <= interval[1] else scale


@wrong("guidance_scale_at", "above `high`")
def one_end(t, scale, interval=None):
    return 1.0 if interval is not None and t < interval[0] else scale


@wrong("guidance_scale_at", "It raises TypeError")
def none_forgotten(t, scale, interval=None):
    low, high = interval
    return scale if low <= t <= high else 1.0


@wrong("guidance_scale_at", "must return a number")
def yes_or_no(t, scale, interval=None):
    return interval is None or interval[0] <= t <= interval[1]


# --- predict_x0 ---------------------------------------------------------------------------------------

@right("predict_x0")
def in_one_piece(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    def denoise(x, t):
        if guidance_scale == 1 or guidance_interval and not guidance_interval[0] <= t <= guidance_interval[1]:
            out = unet(x, t, context)
        else:
            both = torch.cat([uncond.expand_as(context), context])
            u, c = unet(x.repeat(2, 1, 1, 1), t, both).chunk(2)
            out = u + guidance_scale * (c - u)
            dims = (1, 2, 3)
            full = out * c.std(dims, keepdim=True) / out.std(dims, keepdim=True)
            out = guidance_rescale * full + (1 - guidance_rescale) * out
        return schedule.to_x0(out, x, t)
    return denoise


@right("predict_x0")
def from_pieces(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    def denoise(x, t):
        if (w := guidance.guidance_scale_at(t, guidance_scale, guidance_interval)) == 1:
            return schedule.to_x0(unet(x, t, context), x, t)
        texts = torch.cat([uncond.repeat(len(context) // len(uncond), 1, 1), context])
        u, c = guidance.predict_uncond_cond(unet, x, t, texts)
        return schedule.to_x0(rescale_guidance(cfg(u, c, w), c, guidance_rescale), x, t)
    return denoise


def denoiser(combined=lambda u, c, w, phi: rescale_guidance(cfg(u, c, w), c, phi), alone=True,
             x0=True, none=1.0):
    def predict_x0(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0,
                   guidance_interval=None):
        def denoise(x, t):
            inside = guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1]
            w = guidance_scale if inside else none
            if w == 1 and alone:
                out = unet(x, t, context)
            else:
                empty = context if uncond is None else uncond
                both = torch.cat([empty.expand_as(context), context])
                out = combined(*unet(torch.cat([x, x]), t, both).chunk(2), w, guidance_rescale)
            return schedule.to_x0(out, x, t) if x0 else out
        return denoise
    return predict_x0


for words, answer in [
    ("a sampler wants x0", denoiser(x0=False)),
    ("u and c have changed places",
     denoiser(lambda c, u, w, phi: rescale_guidance(cfg(u, c, w), c, phi))),
    ("`guidance_rescale` is not used", denoiser(lambda u, c, w, phi: u + w * (c - u))),
    ("the deviation of u", denoiser(lambda u, c, w, phi: rescale_guidance(u + w * (c - u), u, phi))),
    ("w starts at c here", denoiser(lambda u, c, w, phi: rescale_guidance(c + w * (c - u), c, phi))),
    ("runs without the prompt", denoiser(none=0.0)),
    ("on batches of [4] where [2] will do", denoiser(alone=False)),
]:
    wrong("predict_x0", words)(answer)


@wrong("predict_x0", "on batches of [2, 2] where [4] will do")
def two_runs(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    def denoise(x, t):
        w = guidance.guidance_scale_at(t, guidance_scale, guidance_interval)
        c = unet(x, t, context)
        if w == 1:
            return schedule.to_x0(c, x, t)
        u = unet(x, t, uncond.expand_as(context))
        return schedule.to_x0(rescale_guidance(cfg(u, c, w), c, guidance_rescale), x, t)
    return denoise


@wrong("predict_x0", "the interval is not used")
def everywhere(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    return denoiser()(unet, schedule, context, uncond, guidance_scale=guidance_scale,
                      guidance_rescale=guidance_rescale)


@wrong("predict_x0", "must return a function")
def at_once(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    return context
