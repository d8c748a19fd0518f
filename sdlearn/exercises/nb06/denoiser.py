"""Exercises of notebook 06: both predictions in one batch, and the denoiser that samplers take."""

from collections.abc import Callable

import torch
from torch import Tensor

from ... import guidance
from ...config import NoiseConfig
from ...guidance import classifier_free_guidance as cfg
from ...guidance import rescale_guidance
from ...schedule import NoiseSchedule
from ..testing import randn, require, require_shape
from . import lesson

SCHEDULE = NoiseSchedule(NoiseConfig(prediction_type="v_prediction"))
X, CONTEXT, UNCOND = randn(2, 4, 5, 3, seed=4), randn(2, 7, 6, seed=5), randn(2, 7, 6, seed=6)


class Network:
    """In the place of a U-Net: listens to x, t and the text, and keeps the sizes of the batches it was run on."""

    def __init__(self):
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        require(x.ndim == 4, f"The network is given latents of shape {tuple(x.shape)} where it takes (B, C, h, w)")
        require(len(x) == len(context), f"The network is given {len(x)} latents and {len(context)} texts: give one "
                                        "text for each latent")
        self.batches.append(len(x))
        text = context.mean(dim=1)[:, :4, None, None]
        time = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)         # one for all, or one each
        return torch.tanh(x * text + torch.sin(time / 100)) + text


# --- 6.2 ----------------------------------------------------------------------------------------------

predict_uncond_cond = lesson.exercise(
    2, guidance.predict_uncond_cond, grade="supported", minutes=8,
    asks="Write `predict_uncond_cond(unet, x, t, contexts)`: u and c from one run of the network. contexts holds the "
         "empty texts first, then the prompts.",
    hints=["There are twice as many texts as latents. Each latent is needed twice, in the order of the texts.",
           "`torch.cat([x, x])` repeats the whole batch; `repeat_interleave` would repeat each image in its place.",
           "`output.chunk(2)` cuts along the batch into the first half and the second."])


def texts() -> Tensor:
    return torch.cat([UNCOND, CONTEXT])


@predict_uncond_cond.test("shape")
def two_outputs(predict_uncond_cond):
    result = predict_uncond_cond(Network(), X, 500.0, texts())
    require(isinstance(result, (tuple, list)) and len(result) == 2, "It must return two tensors, u and c")
    predict_uncond_cond.agrees(lambda answer: [list(half.shape) for half in answer(Network(), X, 500.0, texts())],
                       what="The shape")


@predict_uncond_cond.test("value")
def the_halves_in_their_order(predict_uncond_cond):
    predict_uncond_cond.agrees(lambda answer: list(answer(Network(), X, 500.0, texts())))


@predict_uncond_cond.test("edge case")
def one_network_call(predict_uncond_cond):
    network = Network()
    predict_uncond_cond(network, X, 500.0, texts())
    require(len(network.batches) == 1, f"It runs the network {len(network.batches)} times where once will do, on a "
                                       "batch of twice the size")
    predict_uncond_cond.agrees(lambda answer: list(answer(Network(), X[:1], 20.0, texts()[1:3])),
                       what="With a batch of 1, the result")


@predict_uncond_cond.mistake("u and c have changed places: the texts come as [u; c]")
def halves_exchanged(unet, x, t, texts):
    return tuple(reversed(guidance.predict_uncond_cond(unet, x, t, texts)))


@predict_uncond_cond.mistake("the two copies of a latent are adjacent, but their texts are half a batch apart")
def side_by_side(unet, x, t, texts):
    return unet(x.repeat_interleave(2, dim=0), t, texts).chunk(2)


@predict_uncond_cond.mistake("the output is dealt out in turn: its first half is u, its second c")
def dealt_out(unet, x, t, texts):
    output = unet(torch.cat([x, x]), t, texts)
    return output[::2], output[1::2]


@predict_uncond_cond.mistake("split(2) makes pieces of 2 each: `chunk(2)` makes two pieces")
def in_pieces_of_two(unet, x, t, texts):
    return unet(torch.cat([x, x]), t, texts).split(2)


@predict_uncond_cond.mistake("it is cut along the channels: cut along the batch, axis 0")
def along_channels(unet, x, t, texts):
    return unet(torch.cat([x, x]), t, texts).chunk(2, dim=1)


@predict_uncond_cond.mistake("both are the same half")
def one_half(unet, x, t, texts):
    c = guidance.predict_uncond_cond(unet, x, t, texts)[1]
    return c, c


# --- 6.6 ----------------------------------------------------------------------------------------------

predict_x0 = lesson.exercise(
    6, guidance.predict_x0, grade="on your own", minutes=20,
    also=[guidance.guidance_scale_at, guidance.predict_uncond_cond],
    asks="Write `predict_x0(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, "
         "guidance_interval=None)`: the function denoise(x, t) -> x0 for a sampler, guided in one batch.",
    beyond="The package's `predict_x0` also checks its numbers and shapes, runs one half alone at scale 0, and keeps "
           "the type of x where the network has another; the exercise asks for none of these.",
    hints=["It returns a function. What is the same at every step, the texts of both halves, is made outside of it.",
           "Inside: w = guidance_scale_at(t, guidance_scale, guidance_interval). At w = 1 the network runs on the "
           "prompts alone. Otherwise both halves, guided, then rescaled, and last `schedule.to_x0(output, x, t)`.",
           "`uncond` may be (1, M, T), one for all: `uncond.expand(len(context), -1, -1)` before `torch.cat`."])


def looked(predict_x0: Callable, t: float = 500.0, uncond: Tensor | None = UNCOND, network: Network | None = None,
           **settings) -> Tensor:
    """x0 as the answer's denoise gives it."""
    denoise = predict_x0(network or Network(), SCHEDULE, CONTEXT, uncond, **settings)
    require(callable(denoise), "It must return a function, denoise(x, t)")
    return denoise(X, t)


@predict_x0.test("shape")
def it_returns_a_denoiser(predict_x0):
    require_shape(looked(predict_x0, guidance_scale=5.0), X.shape, "denoise(x, t)")


@predict_x0.test("value")
def guided_x0(predict_x0):
    predict_x0.agrees(lambda answer: looked(answer, guidance_scale=5.0), what="x0")


@predict_x0.test("value")
def rescaled_x0(predict_x0):
    predict_x0.agrees(lambda answer: looked(answer, guidance_scale=5.0, guidance_rescale=0.7),
                      what="With guidance_rescale 0.7, x0")


@predict_x0.test("value")
def only_within_the_interval(predict_x0):
    predict_x0.agrees(lambda answer: [looked(answer, t, guidance_scale=5.0, guidance_interval=(200, 800))
                                      for t in (500.0, 900.0)],
                      what="With the interval (200, 800), at t = 500 and 900, x0")


@predict_x0.test("edge case")
def one_text_for_all(predict_x0):
    predict_x0.agrees(lambda answer: looked(answer, uncond=UNCOND[:1], guidance_scale=5.0),
                      what="With one empty text, x0")


@predict_x0.test("edge case")
def without_guidance(predict_x0):
    predict_x0.agrees(lambda answer: looked(answer, uncond=None, guidance_scale=1.0),
                      what="At scale 1 and without uncond, x0")


@predict_x0.test("edge case")
def no_superfluous_network_call(predict_x0):
    for settings, t, batches, said in (
            ({"guidance_scale": 5.0}, 500.0, [4], "With guidance"), ({"guidance_scale": 1.0}, 500.0, [2], "At scale 1"),
            ({"guidance_scale": 5.0, "guidance_interval": (200, 800)}, 900.0, [2], "Outside of the interval")):
        network = Network()
        looked(predict_x0, t, network=network, **settings)
        require(network.batches == batches, f"{said}, for 2 latents, the network runs on batches of {network.batches} "
                                            f"where {batches} will do")


def closing(output: Callable | None = None, last: Callable = lambda out, x, t, schedule: schedule.to_x0(out, x, t),
            expand: bool = True) -> Callable:
    """Answers: `output(u, c, w, phi)` of both halves, and what `last` makes of it."""
    def combined(u, c, w, phi):
        return rescale_guidance(cfg(u, c, w), c, phi)

    def predict_x0(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0,
                   guidance_interval=None):
        if uncond is not None and expand:
            uncond = uncond.expand(len(context), -1, -1)

        def denoise(x, t):
            w = guidance.guidance_scale_at(t, guidance_scale, guidance_interval)
            if w == 1:
                return last(unet(x, t, context), x, t, schedule)
            u, c = guidance.predict_uncond_cond(unet, x, t, torch.cat([uncond, context]))
            return last((output or combined)(u, c, w, guidance_rescale), x, t, schedule)
        return denoise
    return predict_x0


for diagnosis, answer in [
    ("this is the network's output: a sampler wants x0", closing(last=lambda out, x, t, schedule: out)),
    ("u and c have changed places", closing(lambda u, c, w, phi: rescale_guidance(cfg(c, u, w), u, phi))),
    ("w starts at c here: w = 1 is the conditional model",
     closing(lambda u, c, w, phi: rescale_guidance(cfg(u, c, w + 1), c, phi))),
    ("`guidance_rescale` is not used", closing(lambda u, c, w, phi: cfg(u, c, w))),
    ("the output is rescaled to the deviation of u: the conditional one is wanted",
     closing(lambda u, c, w, phi: rescale_guidance(cfg(u, c, w), u, phi))),
    ("the conditional output is rescaled before it is guided: guide first",
     closing(lambda u, c, w, phi: cfg(u, rescale_guidance(c, cfg(u, c, w), phi), w))),
    ("there is one empty text for the whole batch: expand it", closing(expand=False)),
]:
    predict_x0.mistake(diagnosis)(answer)


@predict_x0.mistake("it is x0 that is rescaled: guide and rescale the network's output, then make x0 of it")
def x0_rescaled(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    def denoise(x, t):
        w = guidance.guidance_scale_at(t, guidance_scale, guidance_interval)
        c = schedule.to_x0(unet(x, t, context), x, t)
        if w == 1:
            return c
        u = schedule.to_x0(unet(x, t, uncond.expand(len(context), -1, -1)), x, t)
        return rescale_guidance(cfg(u, c, w), c, guidance_rescale)
    return denoise


@predict_x0.mistake("the interval is not used")
def always(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0, guidance_interval=None):
    return guidance.predict_x0(unet, schedule, context, uncond, guidance_scale=guidance_scale,
                               guidance_rescale=guidance_rescale)


@predict_x0.mistake("outside of the interval it runs without the prompt: no guidance is the conditional half alone")
def empty_outside(unet, schedule, context, uncond=None, *, guidance_scale, guidance_rescale=0.0,
                  guidance_interval=None):
    def denoise(x, t):
        inside = guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1]
        return guidance.predict_x0(unet, schedule, context, uncond, guidance_rescale=guidance_rescale,
                                   guidance_scale=guidance_scale if inside else 0.0)(x, t)
    return denoise
