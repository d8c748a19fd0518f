"""Exercises of notebook 01: group normalisation, the autoencoder's residual block, Downsample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...vae import Downsample, ResBlock
from ..testing import randn, require, with_weights
from . import lesson

# --- 1.2 ----------------------------------------------------------------------------------------------

def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Group normalisation of x (B, C, h, w), with a weight and a bias for each channel, (C,). Wu & He 2018.

    Neighbouring channels form `groups` groups. The numbers of one group in one image, over its rows and
    columns too, get mean 0 and variance 1; eps is added to the variance.
    """
    grouped = x.reshape(len(x), groups, -1)                                         # (B, G, C/G * h * w)
    mean, variance = grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, keepdim=True, unbiased=False)
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)       # (B, C, h, w)
    return normal * weight[:, None, None] + bias[:, None, None]


norm = lesson.exercise(
    2, group_norm, grade="supported", minutes=8,
    asks="Write `group_norm(x, groups, weight, bias, eps=1e-6)` for x (B, C, h, w): mean 0 and variance 1 for the "
         "numbers of each group of neighbouring channels in each image, then a weight and a bias for each channel, "
         "(C,).",
    hints=["Which numbers share a mean? All of one image, of C / groups channels side by side, at all places.",
           "`x.reshape(B, groups, -1)` puts the numbers of a group into one row: take mean and variance over it.",
           "The variance is the mean of squared deviations, not divided by n - 1: `var(..., unbiased=False)`; eps is "
           "added to it before the root is taken.",
           "Back in shape (B, C, h, w), `weight[:, None, None]` lines up with the channels."])

X = 2 * randn(2, 6, 3, 4, seed=1) + torch.arange(6.0)[:, None, None]                # (B, C, h, w)
WEIGHT, BIAS = 1 + 0.5 * randn(6, seed=2), randn(6, seed=3)                         # (C,)
ONES, ZEROS = torch.ones(6), torch.zeros(6)


@norm.test("shape")
def keeps_the_shape(group_norm):
    group_norm.agrees(lambda answer: 0 * answer(X, 3, WEIGHT, BIAS))


@norm.test("value")
def three_groups(group_norm):
    group_norm.agrees(lambda answer: answer(X, 3, ONES, ZEROS), what="With 6 channels in 3 groups, the result")


@norm.test("value")
def one_group(group_norm):
    group_norm.agrees(lambda answer: answer(X, 1, ONES, ZEROS), what="With one group, the result")


@norm.test("value")
def with_weight_and_bias(group_norm):
    group_norm.agrees(lambda answer: answer(X, 3, WEIGHT, BIAS), what="With weight and bias, the result")


@norm.test("edge case")
def images_of_a_batch_are_independent(group_norm):
    alone = group_norm(X[:1], 3, WEIGHT, BIAS)
    require(torch.allclose(group_norm(X, 3, WEIGHT, BIAS)[:1], alone, atol=1e-5),
            "An image comes out otherwise in another batch: its mean and variance must be its own")


@norm.test("edge case")
def a_flat_map(group_norm):
    group_norm.agrees(lambda answer: answer(torch.full((1, 6, 2, 2), 0.25), 3, WEIGHT, BIAS),
                      what="Of a map without any variance, the result")


@norm.test("edge case")
def a_small_variance(group_norm):
    group_norm.agrees(lambda answer: answer(0.002 * X, 3, ONES, ZEROS),
                      what="Where the variance is hardly more than eps, the result")
    group_norm.agrees(lambda answer: answer(X, 3, ONES, ZEROS, 0.5), what="With an eps of 0.5, the result")


def normalised(x, rows, dim=2, eps=1e-6, unbiased=False, outside=False, centred=True, root=True):
    """x over the given rows of it; the switches are mistakes."""
    mean = rows.mean(dim, keepdim=True)
    variance = rows.var(dim, keepdim=True, unbiased=unbiased) if centred else rows.square().mean(dim, keepdim=True)
    below = (variance.sqrt() + eps) if outside else (variance + eps).sqrt() if root else variance + eps
    return ((rows - mean if centred else rows) / below).reshape(x.shape)


def scaled(normal, weight, bias):
    return normal * weight[:, None, None] + bias[:, None, None]


def rows_of(x, groups):
    return x.reshape(len(x), groups, -1)


for diagnosis, answer in [
    ("the groups share one mean: this is one group of all channels",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, 1), eps=eps), w, b)),
    ("all numbers share one mean: those of a group in an image have their own", lambda x, g, w, b, eps=1e-6: scaled(
        normalised(x, x.reshape(1, 1, -1), eps=eps), w, b)),
    ("each channel has a mean of its own: this is instance normalisation",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, x.flatten(2), eps=eps), w, b)),
    ("the images of the batch share mean and variance: each has its own",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(
         x, x.reshape(len(x), g, -1), dim=(0, 2), eps=eps), w, b)),
    ("each place has a mean of its own: rows and columns belong to the group too",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, x.reshape(len(x), g, -1, *x.shape[2:]), eps=eps), w, b)),
    ("every n-th channel is in a group: a group is of neighbouring channels", lambda x, g, w, b, eps=1e-6: scaled(
        normalised(x, (rows := x.unflatten(1, (-1, g)).transpose(1, 2)).flatten(2), eps=eps)
        .reshape(rows.shape).transpose(1, 2).reshape(x.shape), w, b)),
    ("the number of groups is taken for that of the channels in one", lambda x, g, w, b, eps=1e-6: scaled(
        normalised(x, rows_of(x, x.shape[1] // g), eps=eps), w, b)),
    ("the variance is divided by n - 1: give `unbiased=False`",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps, unbiased=True), w, b)),
    ("it is divided by the variance: divide by its root",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps, root=False), w, b)),
    ("the mean is not subtracted: this is RMS normalisation",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps, centred=False), w, b)),
    ("weight and bias line up with the last axis, the columns: give them the shape (C, 1, 1)",
     lambda x, g, w, b, eps=1e-6: normalised(x, rows_of(x, g), eps=eps) * w + b),
    ("mean and variance have lost the axis that they run over: `keepdim=True` keeps it, so that they line up",
     lambda x, g, w, b, eps=1e-6: rows_of(x, g) - rows_of(x, g).mean(dim=2)),
    ("weight and bias are not used", lambda x, g, w, b, eps=1e-6: normalised(x, rows_of(x, g), eps=eps)),
    ("the bias is not used", lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps), w, 0 * b)),
    ("the weight is added, and the bias multiplied",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps), b, w)),
    ("eps is added after the root: add it to the variance",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=eps, outside=True), w, b)),
    ("without eps a map without variance is divided by zero",
     lambda x, g, w, b, eps=1e-6: scaled(normalised(x, rows_of(x, g), eps=0), w, b)),
    ("eps is 1e-5, PyTorch's default: the autoencoder's is an argument here, and 1e-6",
     lambda x, g, w, b, eps=1e-6: F.group_norm(x, g, w, b)),
]:
    norm.mistake(diagnosis)(answer)


# --- 1.3 ----------------------------------------------------------------------------------------------

resblock = lesson.exercise(
    3, ResBlock, name="vae_resblock", grade="supported", minutes=10,
    asks="Write the class `ResBlock(inputs, outputs, groups)`: norm1, SiLU, conv1, norm2, SiLU, conv2, and the input "
         "added at the end, through a 1x1 `conv_shortcut` where the widths differ. eps is 1e-6, convolutions are 3x3.",
    hints=["Norms act on what comes in: norm1 has `inputs` channels, norm2 has `outputs`.",
           "3x3 with padding=1 keeps rows and columns. What would the sum at the end do without it?",
           "Decide about the shortcut once, in `__init__`: `nn.Identity()` where the widths are the same. Then "
           "`forward` is one line for each convolution and one for the sum.",
           "`h = self.conv1(F.silu(self.norm1(x)))`, the same again with 2, and `return self.conv_shortcut(x) + h`."])


def weights_of(made: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights for a module of those shapes: random, of a size that keeps the signal's."""
    return {name: randn(*one.shape, seed=seed + place) / max(1, one[0].numel()) ** 0.5 + (
        1.0 if name.startswith("norm") and name.endswith("weight") else 0.0)
        for place, (name, one) in enumerate(made.state_dict().items())}


CHANNELS, GROUPS = 6, 3
SAME, WIDER = (weights_of(ResBlock(CHANNELS, outputs, GROUPS)) for outputs in (CHANNELS, 9))
MAP = randn(2, CHANNELS, 7, 6, seed=7)                                              # (B, C, h, w)


def read(block, x: Tensor = MAP, outputs: int = CHANNELS) -> Tensor:
    with torch.no_grad():
        return with_weights(block(CHANNELS, outputs, GROUPS), SAME if outputs == CHANNELS else WIDER)(x)


@resblock.test("shape")
def parameters_and_shape(ResBlock):
    ResBlock.agrees(lambda block: 0 * read(block))
    ResBlock.agrees(lambda block: 0 * read(block, outputs=9), what="With 9 output channels the result")


@resblock.test("value")
def of_the_same_width(ResBlock):
    ResBlock.agrees(read)


@resblock.test("value")
def of_another_width(ResBlock):
    ResBlock.agrees(lambda block: read(block, outputs=9), what="With 9 output channels, the result")


@resblock.test("edge case")
def a_faint_map(ResBlock):
    ResBlock.agrees(lambda block: read(block, 0.002 * MAP) - 0.002 * MAP,
                    what="Of a map of small numbers, the result without its input")


@resblock.test("edge case")
def one_cell(ResBlock):
    ResBlock.agrees(lambda block: read(block, MAP[:1, :, :1, :1]), what="Of a single cell, the result")


class Variant(nn.Module):
    """The parameters of the package's; wrong ones among its children have another `forward`."""

    eps, padding, act = 1e-6, 1, staticmethod(F.silu)

    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=self.eps) for width in (inputs, outputs))
        self.conv1, self.conv2 = (nn.Conv2d(width, outputs, 3, padding=self.padding) for width in (inputs, outputs))
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def first(self, x):
        return self.conv1(self.act(self.norm1(x)))

    def both(self, x):
        return self.conv2(self.act(self.norm2(self.first(x))))

    def forward(self, x):
        return self.conv_shortcut(x) + self.both(x)


@resblock.mistake("the convolutions do not pad, so the map shrinks and cannot be added to its input")
class Shrinking(Variant):
    padding = 0


@resblock.mistake("`conv_shortcut` is for blocks whose widths differ: elsewhere the input is added as it is")
class ShortcutAlways(Variant):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)


@resblock.mistake("the input has another number of channels than the result: project it by `conv_shortcut`")
class ShortcutUnused(Variant):
    def forward(self, x):
        return x + self.both(x)


@resblock.mistake("the groups come first: `nn.GroupNorm(groups, channels)`")
class GroupsLast(Variant):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups)
        self.norm1 = nn.GroupNorm(inputs, groups, eps=1e-6)


@resblock.mistake("the input is not added at the end")
class WithoutShortcut(Variant):
    def forward(self, x):
        return self.both(x)


@resblock.mistake("only the first half is there: norm2, SiLU and conv2 follow")
class HalfOfIt(Variant):
    def forward(self, x):
        return self.conv_shortcut(x) + self.conv2(self.first(x))


@resblock.mistake("convolution comes before norm and SiLU: here the norm comes first")
class ConvolutionFirst(Variant):
    def both(self, x):
        return F.silu(self.norm2(self.conv2(F.silu(self.norm2(self.conv1(x))))))


@resblock.mistake("the norm comes after SiLU: it must come before")
class NormBehind(Variant):
    def both(self, x):
        return self.conv2(self.norm2(F.silu(self.conv1(self.norm1(F.silu(x))))))


@resblock.mistake("SiLU is missing: without it the two convolutions are hardly more than one")
class WithoutActivation(Variant):
    act = staticmethod(lambda x: x)


@resblock.mistake("this is ReLU, and SiLU is asked for")
class WithReLU(Variant):
    act = staticmethod(F.relu)


@resblock.mistake("the first SiLU is missing")
class OneActivation(Variant):
    def first(self, x):
        return self.conv1(self.norm1(x))


@resblock.mistake("what is added is not the input but its norm")
class NormedShortcut(Variant):
    def forward(self, x):
        return self.conv_shortcut(F.silu(self.norm1(x))) + self.both(x)


@resblock.mistake("there is a SiLU after the sum: nothing comes after it")
class ActivationBehind(Variant):
    def forward(self, x):
        return F.silu(super().forward(x))


@resblock.mistake("the sum is divided by the root of 2: other networks do that, not this one")
class Divided(Variant):
    def forward(self, x):
        return super().forward(x) / 2**0.5


@resblock.mistake("eps is PyTorch's 1e-5: in the autoencoder it is 1e-6")
class LargerEps(Variant):
    eps = 1e-5


# --- 1.4 ----------------------------------------------------------------------------------------------

down = lesson.exercise(
    4, Downsample, name="vae_downsample", grade="guided", minutes=5,
    asks="Write the class `Downsample(channels)`: half the rows and columns by `conv`, 3x3 of stride 2, over a map "
         "that is padded with zeros by one column at the right and one row below, and nowhere else.",
    hints=["The convolution itself must not pad: that would pad all four sides.",
           "`F.pad(x, (left, right, above, below))`: the numbers begin with the last axis.",
           "`self.conv(F.pad(x, (0, 1, 0, 1)))`, with `self.conv = nn.Conv2d(channels, channels, 3, stride=2)`."])

DOWN = weights_of(Downsample(3))
WIDE = randn(2, 3, 4, 8, seed=8)                                                    # (B, C, h, w)


def halved(block, x: Tensor = WIDE) -> Tensor:
    with torch.no_grad():
        return with_weights(block(3), DOWN)(x)


@down.test("shape")
def half_of_each_side(Downsample):
    Downsample.agrees(lambda block: 0 * halved(block))


@down.test("value")
def inside_of_the_map(Downsample):
    Downsample.agrees(lambda block: halved(block)[:, :, :-1, :-1], what="Away from right and below, the result")


@down.test("value")
def the_whole_map(Downsample):
    Downsample.agrees(halved)


@down.test("edge case")
def two_by_two(Downsample):
    Downsample.agrees(lambda block: halved(block, WIDE[:, :, :2, :2]), what="Of 2 x 2 cells, the result")


class Padded(nn.Module):
    """The package's, with other sides padded, or otherwise."""

    sides, mode, padding = (0, 1, 0, 1), "constant", 0

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=self.padding)

    def forward(self, x):
        return self.conv(F.pad(x, self.sides, mode=self.mode))


@down.mistake("every output is shifted by a pixel, left and up: is it padded on all four sides, as in the U-Net, "
              "or on the wrong two?")
class AllSides(Padded):
    sides, padding = (0, 0, 0, 0), 1


@down.mistake("it is padded at the left and below: the order is left, right, above, below")
class LeftAndBelow(Padded):
    sides = (1, 0, 0, 1)


@down.mistake("it is padded at the right and above: the order is left, right, above, below")
class RightAndAbove(Padded):
    sides = (0, 1, 1, 0)


@down.mistake("the border is repeated into the padding: it is zeros")
class Repeated(Padded):
    mode = "replicate"


@down.mistake("nothing is padded, so the last row and column have no third neighbour")
class Unpadded(Padded):
    sides = (0, 0, 0, 0)


@down.mistake("only the right is padded: one row below is to be added as well")
class RightAlone(Padded):
    sides = (0, 1)


@down.mistake("the convolution takes steps of one: give it `stride=2`")
class StepsOfOne(Padded):
    def __init__(self, channels):
        super().__init__(channels)
        self.conv.stride = (1, 1)


@down.mistake("the result of the convolution is padded: pad what goes into it")
class PaddedBehind(Padded):
    def forward(self, x):
        return F.pad(self.conv(x), self.sides)


@down.mistake("this is padding of one more at both ends: one column at the right and one row below")
class PaddedTwice(Padded):
    padding = 1
