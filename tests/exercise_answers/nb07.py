"""Answers to the exercises of notebook 07."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from exercise_answers import right, wrong
from sdlearn.controlnet import guess_scales

# --- zero_conv ----------------------------------------------------------------------------------------


@right("zero_conv")
def by_init(channels):
    conv = nn.Conv2d(channels, channels, kernel_size=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


@right("zero_conv")
def by_data(channels):
    conv = nn.Conv2d(channels, channels, 1)
    for parameter in conv.parameters():
        parameter.data.zero_()
    return conv


@right("zero_conv")
def without_grad(channels):
    conv = nn.Conv2d(channels, channels, 1)
    with torch.no_grad():
        conv.weight *= 0
        conv.bias *= 0
    return conv


def conv_of(kernel=1, weight=True, bias=True, frozen=False, **settings):
    def zero_conv(channels):
        conv = nn.Conv2d(channels, channels, kernel, **settings)
        with torch.no_grad():
            if weight:
                conv.weight.zero_()
            if bias and conv.bias is not None:
                conv.bias.zero_()
        return conv.requires_grad_(not frozen)
    return zero_conv


for words, answer in [
    ("what else does a convolution add?", conv_of(bias=False)),
    ("the weight is not", conv_of(weight=False)),
    ("neither weight nor bias", conv_of(weight=False, bias=False)),
    ("must be (4, 4, 1, 1)", conv_of(kernel=3, padding=1)),
    ("has shape (2, 4, 3, 4)", conv_of(kernel=3)),
    ("no parameter `bias`", lambda channels: nn.Conv2d(channels, channels, 1, bias=False)),
    ("are frozen", conv_of(frozen=True)),
    ("must return a module", lambda channels: torch.zeros_like),
]:
    wrong("zero_conv", words)(answer)


@wrong("zero_conv", "Its parameters are frozen")
def frozen(channels):
    conv = nn.Conv2d(channels, channels, 1).requires_grad_(False)
    for one in conv.parameters():
        one.zero_()
    return conv


@wrong("zero_conv", "No gradient reaches its weight and bias")
class WithoutItsParameters(nn.Conv2d):
    """Zero whatever its weights are, as long as they are its first ones."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(x) if self.weight.any() else 0 * super().forward(x)


@wrong("zero_conv", "not W x + b of each cell")
class Transposed(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return F.conv2d(x, self.weight.transpose(0, 1), self.bias)


@wrong("zero_conv", "returns None: is a `return` missing?")
def silent(channels):
    by_init(channels)


# --- zero_conv_gradients ------------------------------------------------------------------------------

@right("zero_conv_gradients")
def by_matrices(weight, x, grad_output):
    given, after = x.transpose(0, 1).flatten(1), grad_output.transpose(0, 1).flatten(1)
    back = (weight.T @ after).unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
    return after @ given.T, after.sum(1), back


@right("zero_conv_gradients")
def by_autograd(weight, x, grad_output):
    with torch.enable_grad():
        w, b, x = weight.clone().requires_grad_(), torch.zeros(len(weight)).requires_grad_(), x.requires_grad_()
        y = F.conv2d(x, w[:, :, None, None], b)
        return torch.autograd.grad(y, (w, b, x), grad_output)


def parts(weight=None, bias=None, inputs=None):
    def zero_conv_gradients(w, x, g):
        found = by_matrices(w, x, g)
        return tuple(mine(w, x, g) if mine else one for mine, one in zip((weight, bias, inputs), found, strict=True))
    return zero_conv_gradients


for words, answer in [
    ("rows and columns have changed places", parts(weight=lambda w, x, g: by_matrices(w, x, g)[0].T)),
    ("the mean over the cells", parts(weight=lambda w, x, g: by_matrices(w, x, g)[0] / 60)),
    ("the mean over the cells", parts(bias=lambda w, x, g: g.mean((0, 2, 3)))),
    ("backwards it is W transposed", parts(inputs=lambda w, x, g: by_matrices(w.T, x, g)[2])),
    ("as if W were 1", parts(inputs=lambda w, x, g: g + 0)),
    ("looks at the weight", parts(weight=lambda w, x, g: g.mean() * w)),
    ("this is the input alone", parts(weight=lambda w, x, g: x.sum((0, 2, 3)).repeat(4, 1))),
    ("The gradient of the weight has shape (2, 4, 4)",
     parts(weight=lambda w, x, g: torch.einsum("bohw,bihw->boi", g, x))),
    ("The gradient of the bias has shape (2, 4)", parts(bias=lambda w, x, g: g.sum((2, 3)))),
    ("three tensors", lambda w, x, g: by_matrices(w, x, g)[0]),
]:
    wrong("zero_conv_gradients", words)(answer)


# --- HintEncoder --------------------------------------------------------------------------------------

def hint_encoder(active=F.silu, first=True, end=False, kernel_stride=2, zero=True, after_stride=False):
    class HintEncoder(nn.Module):
        def __init__(self, config):
            super().__init__()
            a, *rest = config.hint_widths
            self.conv_in = nn.Conv2d(config.hint_channels, a, 3, 1, 1)
            self.blocks = nn.ModuleList()
            for b in rest:
                self.blocks.append(nn.Conv2d(a, b if after_stride else a, 3, padding=1))
                self.blocks.append(nn.Conv2d(b if after_stride else a, b, 3, padding=1, stride=kernel_stride))
                a = b
            self.conv_out = nn.Conv2d(a, config.unet.channels[0], 3, padding=1)
            if zero:
                nn.init.zeros_(self.conv_out.weight)
                nn.init.zeros_(self.conv_out.bias)

        def forward(self, hint):
            x = self.conv_in(hint)
            if first:
                x = active(x)
            for block in self.blocks:
                x = active(block(x))
            x = self.conv_out(x)
            return active(x) if end else x
    return HintEncoder


right("HintEncoder")(hint_encoder())


@right("HintEncoder")
class WithSiLUFirst(nn.Module):
    """The activation in front of each later convolution, which is the same."""

    def __init__(self, config):
        super().__init__()
        widths = config.hint_widths
        self.conv_in = nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(a, c, 3, stride=s, padding=1)
            for a, b in zip(widths[:-1], widths[1:], strict=True) for c, s in ((a, 1), (b, 2)))
        self.conv_out = nn.Conv2d(widths[-1], config.unet.channels[0], 3, padding=1)
        for parameter in self.conv_out.parameters():
            parameter.data.fill_(0)

    def forward(self, hint):
        hint = self.conv_in(hint)
        for conv in (*self.blocks, self.conv_out):
            hint = conv(F.silu(hint))
        return hint


for words, answer in [
    ("there is an activation after conv_out", hint_encoder(end=True)),
    ("after conv_in there is a SiLU", hint_encoder(first=False)),
    ("the activation is ReLU", hint_encoder(active=F.relu)),
    ("the activation is GELU", hint_encoder(active=F.gelu)),
    ("together they are one linear map", hint_encoder(active=lambda x: x)),
    ("must both start at zero", hint_encoder(zero=False)),
    ("has shape (2, 8, 16, 24)", hint_encoder(kernel_stride=1)),
    ("Its parameter `blocks.0.weight` has shape", hint_encoder(after_stride=True)),
]:
    wrong("HintEncoder", words)(answer)


# --- residuals ----------------------------------------------------------------------------------------

@right("residuals")
def in_a_loop(net, x, t, context, encoded, conditioning_scale=1.0):
    hint = encoded.repeat(len(x) // len(encoded), 1, 1, 1)
    *skips, middle = net.encode(x, net.embed_time(t, x), context, hint)
    found = []
    for conv, skip in zip(net.controlnet_down_blocks, skips, strict=True):
        found.append(conv(skip) * conditioning_scale)
    found.append(net.controlnet_mid_block(middle) * conditioning_scale)
    return found


@right("residuals")
def by_cat(net, x, t, context, encoded, conditioning_scale=1.0):
    hint = torch.cat([encoded] * (x.shape[0] // encoded.shape[0]))
    features = net.encode(x, net.embed_time(t, x), context, hint=hint)
    convs = [*net.controlnet_down_blocks, net.controlnet_mid_block]
    return [conditioning_scale * convs[i](features[i]) for i in range(len(features))]


def answer_of(change=lambda found, s: [s * one for one in found], hint=lambda e, s: e, t_of=float,
              spread=lambda e, n: e.repeat(n, 1, 1, 1)):
    def residuals(net, x, t, context, encoded, conditioning_scale=1.0):
        entering = hint(spread(encoded, len(x) // len(encoded)), conditioning_scale)
        features = net.encode(x, net.embed_time(t_of(t), x), context, entering)
        convs = [*net.controlnet_down_blocks, net.controlnet_mid_block]
        return change([conv(one) for conv, one in zip(convs, features, strict=True)], conditioning_scale)
    return residuals


def bare_features(net, x, t, context, encoded, conditioning_scale=1.0):
    features = net.encode(x, net.embed_time(t, x), context, encoded.repeat(len(x) // len(encoded), 1, 1, 1))
    return [conditioning_scale * one for one in features]


for words, answer in [
    ("the hint is not used", answer_of(hint=lambda e, s: None)),
    ("the features themselves", bare_features),
    ("`conditioning_scale` is not used", answer_of(change=lambda found, s: found)),
    ("the conditioning scale scales the hint", answer_of(change=lambda found, s: found, hint=lambda e, s: s * e)),
    ("left out for the middle", answer_of(change=lambda found, s: [*(s * one for one in found[:-1]), found[-1]])),
    ("weighted as in guess mode", answer_of(change=lambda found, s: [
        s * w * one for w, one in zip(guess_scales(len(found)), found, strict=True)])),
    ("the timestep is not used", answer_of(t_of=lambda t: 0.0)),
    ("the copies of a hint are adjacent", answer_of(spread=lambda e, n: e.repeat_interleave(n, 0))),
    ("residuals where", answer_of(change=lambda found, s: found[:-1])),
    ("Residual 0 has shape", answer_of(change=lambda found, s: [found[-1], *found[:-1]])),
]:
    wrong("residuals", words)(answer)


# --- guess_scales -------------------------------------------------------------------------------------

@right("guess_scales")
def by_logspace(n):
    return torch.logspace(-1, 0, n).tolist()


@right("guess_scales")
def by_ratio(n):
    ratio = 10 ** (1 / (n - 1))
    return [0.1 * ratio ** i for i in range(n)]


@right("guess_scales")
def as_a_tensor(n):
    return torch.logspace(-1, 0, n)


@right("guess_scales")
def as_an_array(n):
    return np.geomspace(0.1, 1, n)


for words, answer in [
    ("equal steps", lambda n: torch.linspace(0.1, 1, n).tolist()),
    ("it falls", lambda n: torch.logspace(0, -1, n).tolist()),
    ("n - 1 steps between n numbers", lambda n: [0.1 * 10 ** (i / n) for i in range(n)]),
    ("the numbers go to 10", lambda n: torch.logspace(0, 1, n).tolist()),
    ("these are the exponents", lambda n: torch.linspace(-1, 0, n).tolist()),
    ("the base is e", lambda n: torch.linspace(-1, 0, n).exp().tolist()),
    ("this is the paper's own code", lambda n: [0.825 ** (n - 1 - i) for i in range(n)]),
    ("a list of n numbers", lambda n: torch.logspace(-1, 0, n - 1).tolist()),
]:
    wrong("guess_scales", words)(answer)
