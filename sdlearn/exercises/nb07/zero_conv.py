"""Exercises of notebook 07: zero convolution, its gradients, the hint encoder, guess mode."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import PRESETS, ControlNetConfig
from ...controlnet import HintEncoder, guess_scales, zero_conv_gradients
from ...layers import zero_conv
from ..nb01.layers import weights_of
from ..testing import randn, require, require_shape, with_weights
from . import lesson

# --- 7.1 ----------------------------------------------------------------------------------------------

zero = lesson.exercise(
    1, zero_conv, grade="guided", minutes=3,
    asks="Write `zero_conv(channels)`: a 1x1 convolution that keeps the number of channels and outputs exactly zero "
         "at the start.",
    hints=["A convolution computes W x + b. Which two tensors must be zero?",
           "`nn.Conv2d(channels, channels, 1)` is a 1x1 convolution.",
           "`nn.init.zeros_(tensor)` fills a tensor with zeros, for `.weight` and for `.bias`. (A parameter is filled, "
           "not replaced: `conv.weight = torch.zeros(...)` is refused.)"])

FEATURE = randn(2, 4, 5, 6, seed=1)                                                 # (B, C, h, w)


@zero.test("shape")
def keeps_the_shape(zero_conv):
    conv = zero_conv(4)
    require(isinstance(conv, nn.Module), "It must return a module, which can be trained")
    require_shape(conv(FEATURE), FEATURE.shape, "Its output")


@zero.test("shape")
def one_cell_at_a_time(zero_conv):
    weights = {"weight": randn(4, 4, 1, 1, seed=2), "bias": randn(4, seed=3)}
    conv = with_weights(zero_conv(4), weights)
    expected = torch.einsum("oi,bihw->bohw", weights["weight"][:, :, 0, 0], FEATURE) + weights["bias"][:, None, None]
    require((conv(FEATURE) - expected).abs().max() < 1e-4, "With given weights its output is not W x + b of each cell")


@zero.test("value")
def outputs_zero(zero_conv):
    zero_conv.agrees(lambda answer: answer(4)(FEATURE), what="The output")


@zero.test("edge case")
def gradients_are_not_zero(zero_conv):
    conv = zero_conv(3)
    require(all(one.requires_grad for one in conv.parameters()),
            "Its parameters are frozen: a zero convolution starts at zero and must leave it")
    with torch.enable_grad():
        (conv(FEATURE[:, :3]) * randn(2, 3, 5, 6, seed=4)).sum().backward()
    require(all(one.grad is not None and one.grad.abs().max() > 0 for one in conv.parameters()),
            "No gradient reaches its weight and bias: the output must be computed from them")


def started(weight, bias):
    def zero_conv(channels):
        conv = nn.Conv2d(channels, channels, 1)
        if weight is not None:
            nn.init.constant_(conv.weight, weight)
        if bias is not None:
            nn.init.constant_(conv.bias, bias)
        return conv
    return zero_conv


for diagnosis, answer in [
    ("the weight is zero, what else does a convolution add?", started(0.0, None)),
    ("the bias is zero, the weight is not", started(None, 0.0)),
    ("this is a convolution as PyTorch makes it: neither weight nor bias is zero yet", started(None, None)),
    ("ones are not zeros", started(1.0, 0.0)),
]:
    zero.mistake(diagnosis)(answer)


# --- 7.2 ----------------------------------------------------------------------------------------------

gradients = lesson.exercise(
    2, zero_conv_gradients, grade="supported", minutes=10,
    asks="Write `zero_conv_gradients(weight, x, grad_output)`: what the backward pass of y = W x + b gives, from "
         "grad_output = dL/dy: the gradients of the weight (C, C), of the bias (C,) and of x (B, C, h, w).",
    hints=["One cell first: y_o = sum over i of W_oi x_i + b_o. So dy_o/dW_oi is x_i, dy_o/db_o is 1, dy_o/dx_i is "
           "W_oi.",
           "The same weight works on every cell of every image: its gradient is the sum over batch, rows and "
           "columns.",
           '`torch.einsum("bohw,bihw->oi", grad_output, x)` sums what is not named after the arrow. Of x it is W '
           'transposed times grad_output: `"oi,bohw->bihw"`.'])

WEIGHT, BEHIND = randn(4, 4, seed=5), randn(2, 4, 5, 6, seed=6)


@gradients.test("shape")
def three_gradients(zero_conv_gradients):
    result = zero_conv_gradients(WEIGHT, FEATURE, BEHIND)
    require(isinstance(result, (tuple, list)) and len(result) == 3,
            "It must return three tensors: the gradients of the weight, of the bias and of x")
    for one, shape, said in zip(result, ((4, 4), (4,), FEATURE.shape), ("weight", "bias", "x"), strict=True):
        require_shape(one, shape, f"The gradient of the {said}")


@gradients.test("value")
def of_the_weight(zero_conv_gradients):
    zero_conv_gradients.agrees(lambda answer: answer(WEIGHT, FEATURE, BEHIND)[0], tol=1e-3,
                               what="The gradient of the weight")


@gradients.test("value")
def of_the_bias(zero_conv_gradients):
    zero_conv_gradients.agrees(lambda answer: answer(WEIGHT, FEATURE, BEHIND)[1], tol=1e-3,
                               what="The gradient of the bias")


@gradients.test("value")
def of_the_input(zero_conv_gradients):
    zero_conv_gradients.agrees(lambda answer: answer(WEIGHT, FEATURE, BEHIND)[2], what="The gradient of x")


@gradients.test("edge case")
def of_a_zero_weight(zero_conv_gradients):
    zero_conv_gradients.agrees(lambda answer: list(answer(0 * WEIGHT, FEATURE, BEHIND)), tol=1e-3,
                               what="With a weight of zeros, the result")


def backward(weight="bohw,bihw->oi", bias: str = "sum", inputs="oi,bohw->bihw", share=1.0):
    def zero_conv_gradients(w, x, grad_output):
        return (share * torch.einsum(weight, grad_output, x), getattr(grad_output, bias)((0, 2, 3)),
                torch.einsum(inputs, w, grad_output))
    return zero_conv_gradients


for diagnosis, answer in [
    ("its rows and columns have changed places: rows are outputs, columns are inputs",
     backward(weight="bihw,bohw->oi")),
    ("the mean over the cells is taken: every cell adds its own share", lambda w, x, g: (
        torch.einsum("bohw,bihw->oi", g, x) / (x.numel() / x.shape[1]), g.sum((0, 2, 3)),
        torch.einsum("oi,bohw->bihw", w, g))),
    ("the mean over the cells is taken: every cell adds its own share", backward(bias="mean")),
    ("this is W times the upstream gradient: backwards it is W transposed", backward(inputs="io,bohw->bihw")),
    ("this is the upstream gradient, as if W were 1", lambda w, x, g: (
        torch.einsum("bohw,bihw->oi", g, x), g.sum((0, 2, 3)), g.clone())),
    ("this looks at the weight: the gradient of W is x times the upstream gradient", lambda w, x, g: (
        w * g.mean(), g.sum((0, 2, 3)), torch.einsum("oi,bohw->bihw", w, g))),
    ("this is the input alone: the upstream gradient is missing", lambda w, x, g: (
        x.sum((0, 2, 3)).expand(len(w), -1).clone(), g.sum((0, 2, 3)), torch.einsum("oi,bohw->bihw", w, g))),
]:
    gradients.mistake(diagnosis)(answer)


# --- 7.3 ----------------------------------------------------------------------------------------------

hints = lesson.exercise(
    3, HintEncoder, grade="supported", minutes=12,
    asks="Write `HintEncoder(config)`: the hint's pixels (B, 3, H, W) to (B, C, h, w) by 3x3 convolutions with SiLU "
         "between them; the last one starts at zero. Names: `conv_in`, `blocks`, `conv_out`.",
    hints=["For each pair of neighbours (a, b) of hint_widths, `blocks` gets two convolutions: a to a, then a to b "
           "with stride 2. Each needs padding=1.",
           "conv_in goes from hint_channels to the first width, conv_out from the last to unet.channels[0].",
           "SiLU after conv_in and after each of `blocks`, none after conv_out: zero must stay zero, and a residual "
           "may be negative."])

HINTS = ControlNetConfig(PRESETS["tiny"].unet, 3, (4, 6, 8))
HINT = randn(2, 3, 16, 24, seed=7).sigmoid()


def hint_weights() -> dict[str, Tensor]:
    return weights_of(HintEncoder(HINTS))


@hints.test("shape")
def a_feature_map(HintEncoder):
    require_shape(HintEncoder(HINTS)(HINT), (2, HINTS.unet.channels[0], 4, 6), "Its output")


@hints.test("shape")
def named_as_in_checkpoints(HintEncoder):
    with_weights(HintEncoder(HINTS), hint_weights())


@hints.test("value")
def reads_the_hint(HintEncoder):
    weights = hint_weights()
    HintEncoder.agrees(lambda answer: with_weights(answer(HINTS), weights)(HINT), what="With given weights, the output")


@hints.test("edge case")
def starts_at_zero(HintEncoder):
    require(HintEncoder(HINTS)(HINT).abs().max() == 0,
            "A fresh one's output is not zero: conv_out's weight and bias must both start at zero")


class Convolutions(nn.Module):
    """The package's layers; what `forward` makes of them is the mistake."""

    activation = staticmethod(F.silu)
    last_active, first_active = False, True

    def __init__(self, config):
        super().__init__()
        made = HintEncoder(config)
        self.conv_in, self.blocks, self.conv_out = made.conv_in, made.blocks, made.conv_out

    def forward(self, hint):
        hint = self.conv_in(hint)
        hint = self.activation(hint) if self.first_active else hint
        for conv in self.blocks:
            hint = self.activation(conv(hint))
        hint = self.conv_out(hint)
        return self.activation(hint) if self.last_active else hint


for diagnosis, settings in [
    ("there is an activation after conv_out: the last layer is a convolution alone", {"last_active": True}),
    ("after conv_in there is a SiLU as well", {"first_active": False}),
    ("the activation is ReLU: SiLU is wanted", {"activation": staticmethod(F.relu)}),
    ("the activation is GELU: SiLU is wanted", {"activation": staticmethod(F.gelu)}),
    ("there is no activation between the convolutions: together they are one linear map",
     {"activation": staticmethod(lambda x: x)}),
]:
    hints.mistake(diagnosis)(type("Wrong", (Convolutions,), settings))


# --- 7.5 ----------------------------------------------------------------------------------------------

scales = lesson.exercise(
    5, guess_scales, grade="guided", minutes=5,
    asks="Write `guess_scales(n)`: a list of n factors from 0.1 at the first skip to 1 in the middle, each the same "
         "multiple of the one before.",
    hints=["Equal *ratio*, not equal distance: the exponents are equally far apart. 0.1 is 10 to which power? And 1?",
           "The exponent goes from -1 to 0 in n - 1 steps.",
           "Number i is 10 ** (i / (n - 1) - 1)."])


@scales.test("shape")
def n_numbers(guess_scales):
    result = guess_scales(13)
    require(isinstance(result, (list, tuple, Tensor, np.ndarray)) and len(result) == 13,
            "It must return a list of n numbers")


@scales.test("value")
def from_a_tenth_to_one(guess_scales):
    guess_scales.agrees(lambda answer: [float(one) for one in answer(13)], what="For 13 residuals the list")


@scales.test("edge case")
def other_counts(guess_scales):
    guess_scales.agrees(lambda answer: [[float(one) for one in answer(n)] for n in (2, 7)],
                        what="For 2 and for 7 residuals the list")


for diagnosis, answer in [
    ("equal steps: it is the ratio of neighbours that is equal",
     lambda n: [0.1 + 0.9 * i / (n - 1) for i in range(n)]),
    ("it falls: the first skip gets least, the middle 1", lambda n: [10 ** (-i / (n - 1)) for i in range(n)]),
    ("there are n - 1 steps between n numbers: the last one must be 1",
     lambda n: [10 ** (i / n - 1) for i in range(n)]),
    ("the numbers go to 10: they end at 1", lambda n: [10 ** (i / (n - 1)) for i in range(n)]),
    ("these are the exponents: 10 to the power of them is wanted", lambda n: [i / (n - 1) - 1 for i in range(n)]),
    ("the base is e: the first factor is 0.1, a power of 10",
     lambda n: [float(torch.tensor(i / (n - 1) - 1).exp()) for i in range(n)]),
    ("this is the paper's own code, 0.825 to a power: it ends at 1, but begins at 0.1 for 13 residuals only",
     lambda n: [0.825 ** (n - 1 - i) for i in range(n)]),
]:
    scales.mistake(diagnosis)(answer)
