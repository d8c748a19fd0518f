"""Exercises of notebook 07: the residuals that a ControlNet adds to the U-Net, and several ControlNets."""

from functools import cache

import torch
from torch import Tensor, nn

from ...config import PRESETS, ControlNetConfig
from ...controlnet import ControlNet, guess_scales
from ..testing import randn, require, require_shape
from . import lesson

X, CONTEXT, HINT = randn(2, 4, 6, 8, seed=1), randn(2, 5, 16, seed=2), randn(1, 3, 12, 16, seed=3).sigmoid()


@cache
def network() -> ControlNet:
    """A small ControlNet in which no convolution is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ControlNet(ControlNetConfig(PRESETS["tiny"].unet, 3, (4, 6)))
        for module in net.modules():            # in a fresh one, ResBlocks and transformers end in zeros as well
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
    return net.eval().requires_grad_(False)


def encoded(batch: int = 1) -> Tensor:
    return network().encode_hint(HINT).repeat(batch, 1, 1, 1)                       # (B, C, h, w)


# --- 7.4 ----------------------------------------------------------------------------------------------

residuals = lesson.exercise(
    4, ControlNet.residuals, grade="on your own", minutes=20,
    asks="Write `residuals(net, x, t, context, encoded, *, conditioning_scale=1.0)`: the list of what a "
         "ControlNet adds to the U-Net's skips and, as the last, to its middle.",
    beyond="The package's method also checks its inputs, and weights the residuals for guess mode.",
    hints=["`net.encode(x, temb, context, hint)` gives the features of all skips, then of the middle. The hint goes in "
           "after conv_in. temb is `net.embed_time(t, x)`.",
           "Each feature goes through its own convolution: `net.controlnet_down_blocks`, then "
           "`net.controlnet_mid_block`.",
           "One hint may serve a larger batch: `encoded.repeat(len(x) // len(encoded), 1, 1, 1)`. Last, everything "
           "times `conditioning_scale`."])


def given(answer, *, t=500.0, encoded: Tensor | None = None, **settings) -> list[Tensor]:
    hint = network().encode_hint(HINT).repeat(2, 1, 1, 1) if encoded is None else encoded
    return list(answer(network(), X, t, CONTEXT, hint, **settings))


@residuals.test("shape")
def one_for_each_feature(residuals):
    result = residuals(network(), X, 500.0, CONTEXT, encoded(2))
    count = len(network().feature_channels)
    require(isinstance(result, (list, tuple)), "It must return a list of residuals")
    require(len(result) == count, f"It gives {len(result)} residuals where {count} are wanted: one for each skip and "
                                  "one for the middle")
    for i, (one, channels) in enumerate(zip(result, network().feature_channels, strict=True)):
        require(isinstance(one, Tensor) and one.ndim == 4, f"Residual {i} must be a tensor (B, C, h, w)")
        require_shape(one, (2, channels, *one.shape[2:]), f"Residual {i}")


@residuals.test("value")
def through_the_convolutions(residuals):
    residuals.agrees(given, what="The list")


@residuals.test("value")
def at_another_timestep(residuals):
    residuals.agrees(lambda answer: given(answer, t=20.0), what="At t = 20, the list")


@residuals.test("value")
def with_a_strength(residuals):
    residuals.agrees(lambda answer: [given(answer, conditioning_scale=s) for s in (0.5, 2.0)],
                     what="At conditioning scale 0.5 and 2, the list")


@residuals.test("edge case")
def one_hint_for_the_batch(residuals):
    residuals.agrees(lambda answer: given(answer, encoded=encoded()), what="With one hint for both latents, the list")


@residuals.test("edge case")
def hints_of_a_guided_batch(residuals):
    two = torch.cat([encoded(), 0.5 * encoded()])
    residuals.agrees(lambda answer: list(answer(network(), X.repeat(2, 1, 1, 1), 500.0, CONTEXT.repeat(2, 1, 1), two)),
                     what="With two hints for the four latents of guidance's [u; c], the list")


def convolutions(net: ControlNet) -> list[nn.Module]:
    return [*net.controlnet_down_blocks, net.controlnet_mid_block]


def made(net, x, t, context, encoded, *, hint=True, entering=None, spread=Tensor.repeat, weights=None,
         joined=True) -> list[Tensor]:
    """The list; the switches are mistakes."""
    repeated = spread(encoded, len(x) // len(encoded), 1, 1, 1)
    start = entering(repeated) if entering else repeated
    features = net.encode(x, net.embed_time(t, x), context, start if hint else None)
    if not joined:
        return features
    weights = weights or [1.0] * len(features)
    return [weight * conv(feature) for weight, conv, feature in zip(weights, convolutions(net), features, strict=True)]


def twins(encoded: Tensor, times: int, *_: int) -> Tensor:
    return encoded.repeat_interleave(times, dim=0)


@residuals.mistake("the hint is not used: it is the fourth argument of `net.encode`")
def without_the_hint(net, x, t, context, encoded, conditioning_scale=1.0):
    return [conditioning_scale * one for one in made(net, x, t, context, encoded, hint=False)]


@residuals.mistake("these are the features themselves: each goes through its zero convolution first")
def not_joined(net, x, t, context, encoded, conditioning_scale=1.0):
    return [conditioning_scale * one for one in made(net, x, t, context, encoded, joined=False)]


@residuals.mistake("`conditioning_scale` is not used")
def strength_forgotten(net, x, t, context, encoded, conditioning_scale=1.0):
    return made(net, x, t, context, encoded)


@residuals.mistake("the conditioning scale scales the hint: it multiplies the residuals")
def stronger_hint(net, x, t, context, encoded, conditioning_scale=1.0):
    return made(net, x, t, context, encoded, entering=lambda hint: conditioning_scale * hint)


@residuals.mistake("the conditioning scale works before the convolutions, whose bias it leaves as it is")
def before_the_bias(net, x, t, context, encoded, conditioning_scale=1.0):
    features = made(net, x, t, context, encoded, joined=False)
    return [conv(conditioning_scale * feature) for conv, feature in zip(convolutions(net), features, strict=True)]


@residuals.mistake("the conditioning scale is left out for the middle")
def skips_only(net, x, t, context, encoded, conditioning_scale=1.0):
    *skips, middle = made(net, x, t, context, encoded)
    return [*(conditioning_scale * one for one in skips), middle]


@residuals.mistake("the residuals are weighted as in guess mode: without it all count the same")
def always_guessing(net, x, t, context, encoded, conditioning_scale=1.0):
    scales = [conditioning_scale * one for one in guess_scales(len(net.feature_channels))]
    return made(net, x, t, context, encoded, weights=scales)


@residuals.mistake("the timestep is not used: at t = 0 everywhere")
def no_time(net, x, t, context, encoded, conditioning_scale=1.0):
    return [conditioning_scale * one for one in made(net, x, 0.0, context, encoded)]


@residuals.mistake("the copies of a hint are adjacent: the batch [u; c] holds all images twice, one after the other")
def side_by_side(net, x, t, context, encoded, conditioning_scale=1.0):
    return [conditioning_scale * one for one in made(net, x, t, context, encoded, spread=twins)]
