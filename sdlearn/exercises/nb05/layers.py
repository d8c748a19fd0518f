"""Exercises of notebook 05: the timestep embedding, the U-Net's residual block, Downsample and Upsample."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import Downsample, ResBlock, Upsample, timestep_embedding
from ..nb01.layers import weights_of
from ..testing import randn, require, require_shape, with_weights
from . import lesson

# --- 5.1 ----------------------------------------------------------------------------------------------

sinusoids = lesson.exercise(
    1, timestep_embedding, grade="guided", minutes=8,
    asks="Write `timestep_embedding(t, dim)`: for timesteps (B,), fractions allowed, the cosines of t times dim/2 "
         "frequencies 10000^(-i / (dim/2)), then the sines of the same: (B, dim), float32.",
    beyond="The package's function also refuses an odd width.",
    hints=["How many frequencies are there? Half of dim; i runs from 0 to dim/2 - 1, so the first is 1.",
           "An outer product makes all angles: `t.float()[:, None] * frequencies` is (B, dim/2).",
           "10000^(-i/half) is exp(-log(10000) i / half). Then `torch.cat([angles.cos(), angles.sin()], dim=1)`."])

T = torch.tensor([0.0, 1.0, 7.0, 250.0, 999.0])                                     # (B,)


@sinusoids.test("shape")
def a_row_for_each_timestep(timestep_embedding):
    require_shape(timestep_embedding(T, 16), (5, 16))


@sinusoids.test("value")
def at_small_timesteps(timestep_embedding):
    timestep_embedding.agrees(lambda answer: answer(torch.tensor([1.0, 2.0, 3.0]), 4), what="At t = 1, 2, 3 the result")


@sinusoids.test("value")
def at_many_timesteps(timestep_embedding):
    timestep_embedding.same(T, 16)


@sinusoids.test("value")
def at_zero(timestep_embedding):
    timestep_embedding.agrees(lambda answer: answer(T[:1], 8), what="At t = 0, the result")


@sinusoids.test("edge case")
def other_widths(timestep_embedding):
    for dim in (2, 320):
        timestep_embedding.agrees(lambda answer, dim=dim: answer(T, dim), tol=1e-3,
                                  what=f"With dim = {dim}, the result")


@sinusoids.test("edge case")
def whole_numbers_and_fractions(timestep_embedding):
    timestep_embedding.agrees(lambda answer: answer(torch.tensor([3, 40]), 8), what="For whole numbers, the result")
    timestep_embedding.agrees(lambda answer: answer(torch.tensor([3.5, 40.25]), 8), what="For fractions, the result")


def waves(t, dim, *, over=None, sign=-1, base=10000.0, turns=1.0):
    """Angles (B, dim/2); the switches are mistakes."""
    half = dim // 2
    frequencies = torch.exp(sign * math.log(base) * torch.arange(half) / (over or half))
    return turns * t.float()[:, None] * frequencies


def both(angles):
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


for diagnosis, answer in [
    ("the sines come first: in Stable Diffusion's checkpoints the cosines do",
     lambda t, dim: torch.cat([waves(t, dim).sin(), waves(t, dim).cos()], dim=-1)),
    ("sine and cosine of one frequency alternate: first all cosines, then all sines",
     lambda t, dim: torch.stack([waves(t, dim).cos(), waves(t, dim).sin()], dim=-1).flatten(1)),
    ("this is the embedding of the first DDPM, sines first and i over dim/2 - 1: here cosines first, i over dim/2",
     lambda t, dim: torch.cat([(angles := waves(t, dim, over=max(dim // 2 - 1, 1))).sin(), angles.cos()], dim=-1)),
    ("the last frequency is 1/10000: it is divided by dim/2 - 1, as the first DDPM did; here by dim/2",
     lambda t, dim: both(waves(t, dim, over=max(dim // 2 - 1, 1)))),
    ("i is divided by dim: there are dim/2 frequencies, so divide by dim/2",
     lambda t, dim: both(waves(t, dim, over=dim))),
    ("the frequencies grow with i: the exponent is negative", lambda t, dim: both(waves(t, dim, sign=1))),
    ("the angles are multiplied by 2 pi: here they are t times a frequency as it is",
     lambda t, dim: both(waves(t, dim, turns=2 * math.pi))),
    ("t is divided by 1000: here it goes in as it is", lambda t, dim: both(waves(t, dim, turns=0.001))),
    ("these are the sines twice: one half is of cosines",
     lambda t, dim: torch.cat([waves(t, dim).sin(), waves(t, dim).sin()], dim=-1)),
    ("the fraction of t is cut off: samplers may pass 3.5", lambda t, dim: both(waves(t.long(), dim))),
    ("the angles themselves are returned: take their cosines and sines",
     lambda t, dim: torch.cat([waves(t, dim), waves(t, dim)], dim=-1)),
]:
    sinusoids.mistake(diagnosis)(answer)


# --- 5.2 ----------------------------------------------------------------------------------------------

resblock = lesson.exercise(
    2, ResBlock, name="unet_resblock", grade="supported", minutes=12,
    asks="Write the class `ResBlock(inputs, outputs, embed_dim, groups=32)`: norm1, SiLU, conv1, plus the time, "
         "norm2, SiLU, conv2, and the input added at the end. The time is `time_emb_proj` of SiLU of temb, one number "
         "for each channel. eps is 1e-5.",
    beyond="In the package conv2 starts at zero, so that a fresh block hands its input on.",
    hints=["Begin with the autoencoder's block of notebook 01; eps is PyTorch's own 1e-5 here. One linear layer is "
           "new: `time_emb_proj`, from embed_dim to outputs.",
           "`self.time_emb_proj(F.silu(temb))` is (B, outputs). It is added to a map (B, outputs, h, w): which two "
           "axes does it lack?",
           "It is added after conv1 and before norm2: `h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]`."])

CHANNELS, WIDER, EMBED, GROUPS = 6, 9, 5, 3
WEIGHTS = {outputs: weights_of(ResBlock(CHANNELS, outputs, EMBED, GROUPS)) for outputs in (CHANNELS, WIDER)}
MAP, TEMB = randn(2, CHANNELS, 7, 6, seed=7), 2 * randn(2, EMBED, seed=9)           # (B, C, h, w), (B, E)


def read(block, x: Tensor = MAP, temb: Tensor = TEMB, outputs: int = CHANNELS) -> Tensor:
    with torch.no_grad():
        return with_weights(block(CHANNELS, outputs, EMBED, GROUPS), WEIGHTS[outputs])(x, temb)


@resblock.test("shape")
def parameters_and_shape(ResBlock):
    fresh = ResBlock(CHANNELS, CHANNELS, EMBED, GROUPS)
    require(getattr(getattr(fresh, "conv_shortcut", None), "weight", None) is None,
            "It has a conv_shortcut where inputs and outputs are equal: there the input is added as it is")
    ResBlock.agrees(lambda block: 0 * read(block))
    ResBlock.agrees(lambda block: 0 * read(block, outputs=WIDER), what="With 9 output channels the result")


@resblock.test("value")
def of_the_same_width(ResBlock):
    ResBlock.agrees(read)


@resblock.test("value")
def of_another_width(ResBlock):
    ResBlock.agrees(lambda block: read(block, outputs=WIDER), what="With 9 output channels, the result")


@resblock.test("value")
def another_timestep(ResBlock):
    ResBlock.agrees(lambda block: read(block, temb=-TEMB) - read(block),
                    what="What changes in the result when temb changes")


@resblock.test("edge case")
def one_time_for_the_whole_batch(ResBlock):
    ResBlock.agrees(lambda block: read(block, temb=TEMB[:1]), what="With temb of (1, E) for a batch of two, the result")


@resblock.test("edge case")
def a_faint_map(ResBlock):
    ResBlock.agrees(lambda block: read(block, 0.002 * MAP), what="Of a map of small numbers, the result")


class Variant(nn.Module):
    """The parameters of the package's; wrong ones among its children have another `forward`."""

    eps, act = 1e-5, staticmethod(F.silu)

    def __init__(self, inputs, outputs, embed_dim, groups=32):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=self.eps) for width in (inputs, outputs))
        self.conv1, self.conv2 = (nn.Conv2d(width, outputs, 3, padding=1) for width in (inputs, outputs))
        self.time_emb_proj = nn.Linear(embed_dim, outputs)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def time(self, temb):
        return self.time_emb_proj(F.silu(temb))[:, :, None, None]

    def first(self, x):
        return self.conv1(self.act(self.norm1(x)))

    def second(self, h):
        return self.conv2(self.act(self.norm2(h)))

    def forward(self, x, temb):
        return self.conv_shortcut(x) + self.second(self.first(x) + self.time(temb))


@resblock.mistake("the time is not added: the block does the same at every timestep")
class WithoutTime(Variant):
    def time(self, temb):
        return 0


@resblock.mistake("temb does not pass through SiLU before its linear layer")
class TimeAsItIs(Variant):
    def time(self, temb):
        return self.time_emb_proj(temb)[:, :, None, None]


@resblock.mistake("SiLU comes after the linear layer of the time: it must come before")
class TimeTurned(Variant):
    def time(self, temb):
        return F.silu(self.time_emb_proj(temb))[:, :, None, None]


@resblock.mistake("the time is added at the end, after conv2: it is added between the two convolutions")
class TimeAtTheEnd(Variant):
    def forward(self, x, temb):
        return self.conv_shortcut(x) + self.second(self.first(x)) + self.time(temb)


@resblock.mistake("the time is added after norm2: it must be added before")
class TimeBehindTheNorm(Variant):
    def forward(self, x, temb):
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(self.first(x)) + self.time(temb)))


@resblock.mistake("the map is multiplied by the time: here it is added (a scale belongs to other networks)")
class TimeTimes(Variant):
    def forward(self, x, temb):
        return self.conv_shortcut(x) + self.second(self.first(x) * self.time(temb))


@resblock.mistake("the input is not added at the end")
class WithoutShortcut(Variant):
    def forward(self, x, temb):
        return self.second(self.first(x) + self.time(temb))


@resblock.mistake("what is added at the end is not the input but its norm")
class NormedShortcut(Variant):
    def forward(self, x, temb):
        return self.conv_shortcut(F.silu(self.norm1(x))) + self.second(self.first(x) + self.time(temb))


@resblock.mistake("the SiLUs of the map are missing")
class WithoutActivation(Variant):
    act = staticmethod(lambda x: x)


@resblock.mistake("this is ReLU, and SiLU is asked for")
class WithReLU(Variant):
    act = staticmethod(F.relu)


@resblock.mistake("eps is the autoencoder's 1e-6: in the U-Net's ResBlocks it is 1e-5")
class SmallerEps(Variant):
    eps = 1e-6


# --- 5.3 ----------------------------------------------------------------------------------------------

resample = lesson.exercise(
    3, Downsample, Upsample, name="resample", grade="guided", minutes=8,
    asks="Write the classes `Downsample(channels)`, half the rows and columns by `conv`, 3x3 of stride 2, padded by "
         "one on all sides; and `Upsample(channels)`, whose forward(x, size=None) repeats the nearest cell up to "
         "`size`, twice the rows and columns without one, and then convolves.",
    hints=["Both hold one convolution, `conv`, from channels to channels, 3x3 with padding=1. The stride differs.",
           "`F.interpolate(x, size=..., mode=\"nearest\")` repeats cells; the convolution comes after it.",
           "`size = size or (2 * x.shape[2], 2 * x.shape[3])`."])

CONV = weights_of(Downsample(3))
WIDE = randn(2, 3, 5, 8, seed=8)                                                    # (B, C, h, w)


def moved(block, x: Tensor = WIDE, *size) -> Tensor:
    with torch.no_grad():
        return with_weights(block(3), CONV)(x, *size)


@resample.test("shape")
def half(Downsample, Upsample):
    """Of going down alone, as the next: Downsample is tested before Upsample is written."""
    Downsample.agrees(lambda block: 0 * moved(block, WIDE[:, :, :4]), what="Downsample's result")


@resample.test("value")
def going_down(Downsample, Upsample):
    Downsample.agrees(lambda block: moved(block, WIDE[:, :, :4]), what="Downsample's result")


@resample.test("value")
def going_up(Downsample, Upsample):
    Upsample.agrees(moved, what="Upsample's result")


@resample.test("edge case")
def an_odd_number_of_rows(Downsample, Upsample):
    Downsample.agrees(moved, what="Of 5 rows, Downsample's result")


@resample.test("edge case")
def up_to_a_size(Downsample, Upsample):
    Upsample.agrees(lambda block: moved(block, WIDE[:, :, :3], (5, 15)), what="Up to 5 x 15 cells, Upsample's result")
    require(moved(Upsample, WIDE[:, :, :1, :1]).shape[2:] == (2, 2), "Of a single cell Upsample must make 2 x 2")


class Moving(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def filtered(self, x, **how):
        return F.conv2d(x, self.conv.weight, self.conv.bias, **how)


@resample.mistake("it is padded at the right and below alone, as in the autoencoder: here on all four sides")
class AsInTheAutoencoder(Moving):
    def forward(self, x):
        return self.filtered(F.pad(x, (0, 1, 0, 1)), stride=2)


@resample.mistake("the convolution has no stride: rows and columns stay as they are")
class Standing(Moving):
    def forward(self, x):
        return self.conv(x)


@resample.mistake("nothing is padded, so the first row and column have no neighbour")
class Unpadded(Moving):
    def forward(self, x):
        return self.filtered(x, stride=2)


@resample.mistake("it is averaged and then convolved: the convolution itself makes steps of 2")
class Averaged(Moving):
    def forward(self, x):
        return self.conv(F.avg_pool2d(x, 2, ceil_mode=True))


@resample.mistake("the largest of four is taken, and then convolved: the convolution itself makes steps of 2")
class Largest(Moving):
    def forward(self, x):
        return self.conv(F.max_pool2d(x, 2, ceil_mode=True))


def up(enlarge):
    class Enlarging(Moving):
        def forward(self, x, size=None):
            return enlarge(self, x, size or (2 * x.shape[2], 2 * x.shape[3]))
    return Enlarging


for diagnosis, enlarge in [
    ("the new cells are blends of neighbours, bilinear: repeat the nearest",
     lambda self, x, size: self.conv(F.interpolate(x, size=size, mode="bilinear"))),
    ("the convolution comes before the upsampling: it must come after",
     lambda self, x, size: F.interpolate(self.conv(x), size=size, mode="nearest")),
    ("the convolution is missing", lambda self, x, size: F.interpolate(x, size=size, mode="nearest")),
    ("the size is not used: twice of 3 rows is 6, and 5 may be asked for",
     lambda self, x, size: self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))),
    ("this is a transposed convolution: its kernels overlap unevenly; repeat cells, then convolve",
     lambda self, x, size: F.conv_transpose2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1,
                                              output_padding=1)),
]:
    resample.mistake(diagnosis, of="Upsample")(up(enlarge))
