"""Exercises of notebook 04: GEGLU, the cost of attention, heat maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import GEGLU
from ...diagnostics.attention import attention_cost, heat_maps, level_shape
from ..testing import randn, require, require_shape, require_sums, with_weights
from . import lesson

# --- 4.5 ----------------------------------------------------------------------------------------------

geglu = lesson.exercise(
    5, GEGLU, grade="guided", minutes=5,
    asks="Write the module `GEGLU(dim, hidden)`: one linear layer `proj` makes value and gate; value * GELU(gate).",
    hints=["`proj` makes twice `hidden` channels, with a bias. Then cut its result in two.",
           "`chunk(2, dim=-1)`: the first half is the value, the second the gate.",
           "`value * F.gelu(gate)`, with the exact GELU: that is the default of `F.gelu`."])

GEGLU_WEIGHTS = {"proj.weight": randn(10, 6, seed=1), "proj.bias": randn(10, seed=2)}


def gated(module: type, x: Tensor) -> Tensor:
    """What a GEGLU(6, 5) with these weights makes of x."""
    return with_weights(module(6, 5), GEGLU_WEIGHTS)(x)


@geglu.test("shape")
def twice_as_many_and_half_of_them(GEGLU):
    require_shape(gated(GEGLU, randn(2, 3, 6)), (2, 3, 5))


@geglu.test("value")
def the_value_is_gated(GEGLU):
    GEGLU.agrees(lambda module: gated(module, randn(2, 3, 6)))


@geglu.test("edge case")
def the_gate_is_the_exact_gelu(GEGLU):
    """A value of 1, a gate that runs from -4 to 4: at the ends the approximations of GELU are close to it."""
    weights = {"proj.weight": torch.tensor([[0.0], [1.0]]), "proj.bias": torch.tensor([1.0, 0.0])}
    gates = torch.linspace(-4, 4, 81)[:, None]
    GEGLU.agrees(lambda module: with_weights(module(1, 1), weights)(gates), tol=2e-5, what="With a value of 1")


@geglu.test("edge case")
def any_number_of_axes(GEGLU):
    for shape in ((6,), (4, 6), (2, 2, 3, 6)):
        GEGLU.agrees(lambda module, shape=shape: gated(module, randn(*shape)), what=f"For an input {shape} the result")


def halves(combine):
    """A module like GEGLU that combines the value and the gate in this way."""
    class Halves(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.proj = nn.Linear(dim, 2 * hidden)

        def forward(self, x):
            return combine(*self.proj(x).chunk(2, dim=-1))
    return Halves


for diagnosis, combine in [
    ("the halves are swapped: the first is the value, the second the gate", lambda v, g: g * F.gelu(v)),
    ("the gate opens by a sigmoid: that is GLU; here it is the GELU", lambda v, g: v * torch.sigmoid(g)),
    ("the gate opens by a ReLU where it must be the GELU", lambda v, g: v * F.relu(g)),
    ("the gate opens by SiLU, as in SwiGLU, where it must be the GELU", lambda v, g: v * F.silu(g)),
    ("this is the tanh approximation of GELU: Stable Diffusion was trained with the exact one",
     lambda v, g: v * F.gelu(g, approximate="tanh")),
    ("this is CLIP's quick GELU: Stable Diffusion's U-Net was trained with the exact one",
     lambda v, g: v * g * torch.sigmoid(1.702 * g)),
    ("GELU was taken of both halves: the value stays as it is", lambda v, g: F.gelu(v) * F.gelu(g)),
    ("the gate is added where it must multiply", lambda v, g: v + F.gelu(g)),
    ("nothing is gated: this is the GELU of the value", lambda v, g: F.gelu(v)),
]:
    geglu.mistake(diagnosis)(halves(combine))


@geglu.mistake("every other channel is the gate: cut the channels in the middle, into two halves")
class Interleaved(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):
        x = self.proj(x)
        return x[..., ::2] * F.gelu(x[..., 1::2])


# --- 4.6 ----------------------------------------------------------------------------------------------

cost = lesson.exercise(
    6, attention_cost, grade="guided", minutes=5,
    asks="Write `attention_cost(queries, keys, channels, heads)`: the FLOPs of q k^T and of map v together, and the "
         "bytes of the map, with two bytes a number.",
    beyond="The package's takes `bytes_each` for another number format.",
    hints=["For each query and each key, q k^T multiplies and adds as many numbers as a head has channels. Over all "
           "heads these are all channels.",
           "A multiplication and its addition are two FLOPs. map v takes as many again.",
           "The map has a number for each head, query and key, of two bytes. Channels are not in it any more."])


@cost.test("shape")
def two_numbers(attention_cost):
    got = attention_cost(5, 7, 12, 3)
    require(isinstance(got, tuple | list) and len(got) == 2, "It must return two numbers: FLOPs, bytes")


@cost.test("value")
def one_query_and_one_key(attention_cost):
    """Two products of two FLOPs each; one number of two bytes."""
    attention_cost.agrees(lambda answer: list(map(int, answer(1, 1, 1, 1))), what="With one of everything the result")


@cost.test("value")
def a_small_one(attention_cost):
    attention_cost.agrees(lambda answer: list(map(int, answer(5, 7, 12, 3))))


@cost.test("edge case")
def full_size(attention_cost):
    for keys in (64 * 64, 77):
        attention_cost.agrees(lambda answer, keys=keys: list(map(int, answer(64 * 64, keys, 320, 8))),
                              what=f"With 4096 queries and {keys} keys the result")


for diagnosis, answer in [
    ("a multiplication and its addition count as two", lambda n, m, c, h: (2 * n * m * c, 2 * h * n * m)),
    ("this is one product of the two, q k^T and map v, and each multiplication has its addition",
     lambda n, m, c, h: (n * m * c, 2 * h * n * m)),
    ("each head has C / H channels, so all heads together have C: do not multiply by the heads again",
     lambda n, m, c, h: (4 * n * m * c * h, 2 * h * n * m)),
    ("these are the FLOPs of one head: there are H of them", lambda n, m, c, h: (4 * n * m * c // h, 2 * h * n * m)),
    ("each head has a map of its own", lambda n, m, c, h: (4 * n * m * c, 2 * n * m)),
    ("each number of the map takes two bytes", lambda n, m, c, h: (4 * n * m * c, h * n * m)),
    ("the map has a number for each head, query and key, whatever the channels",
     lambda n, m, c, h: (4 * n * m * c, 2 * c * n * m)),
    ("these are the bytes of q, k and v: the map is queries times keys",
     lambda n, m, c, h: (4 * n * m * c, 2 * c * (n + 2 * m))),
    ("the queries are cells and the keys are tokens: queries times keys",
     lambda n, m, c, h: (4 * n * n * c, 2 * h * n * n)),
]:
    cost.mistake(diagnosis)(answer)


# --- 4.7 ----------------------------------------------------------------------------------------------

heat = lesson.exercise(
    7, heat_maps, grade="supported", minutes=15, also=[level_shape],
    asks="Write `heat_maps(maps, size)`: from the maps (B, H, N, M) of several layers, by name, one image for each "
         "token, (B, M, rows, columns).",
    beyond="The package's says which layer does not fit.",
    hints=["For each layer: the mean over its heads, (B, N, M). Then an image for each token: tokens before cells.",
           "The N cells lie row by row. How many rows? Halve `size`, rounding up, until rows * columns is N.",
           "`F.interpolate(x, size=size, mode=\"bilinear\")` enlarges (B, M, rows, columns). At the end the mean over "
           "the layers."])

SQUARE = {"fine": randn(2, 3, 64, 5).softmax(-1), "coarse": randn(2, 3, 16, 5, seed=1).softmax(-1)}
# 8 x 18 and 4 x 9 cells: as many as in a square, so that taking it for one is no error, but a wrong image.
WIDE = {"fine": randn(1, 2, 144, 4, seed=2).softmax(-1), "coarse": randn(1, 2, 36, 4, seed=3).softmax(-1)}
ODD = {"fine": randn(1, 2, 35, 4, seed=4).softmax(-1), "coarse": randn(1, 2, 12, 4, seed=5).softmax(-1)}    # 5x7, 3x4
FIRST = {"fine": SQUARE["fine"]}


@heat.test("shape")
def an_image_for_each_token(heat_maps):
    require_shape(heat_maps(SQUARE, (16, 16)), (2, 5, 16, 16))


@heat.test("value")
def one_layer_of_that_size(heat_maps):
    """Nothing is to be enlarged: mean over heads, and cells in their places."""
    heat_maps.agrees(lambda answer: answer(FIRST, (8, 8)), what="Of one layer, at its own size, the result")


@heat.test("value")
def one_layer_enlarged(heat_maps):
    heat_maps.agrees(lambda answer: answer(FIRST, (16, 16)), what="Of one layer, enlarged, the result")


@heat.test("value")
def the_mean_over_layers(heat_maps):
    heat_maps.agrees(lambda answer: answer(SQUARE, (16, 16)), what="Of two layers the result")


@heat.test("value")
def weights_sum_to_one(heat_maps):
    require_sums(heat_maps(SQUARE, (32, 32)), 1, 1, "at each place the tokens share out a whole, as in each row of "
                                                    "the softmax: a mean keeps that, a sum does not")


@heat.test("edge case")
def a_wide_image(heat_maps):
    heat_maps.agrees(lambda answer: answer(WIDE, (16, 36)), what="Of a wide image the result")


@heat.test("edge case")
def odd_numbers_of_rows(heat_maps):
    """Half of 5 rows are 3: a convolution of stride 2 rounds up."""
    heat_maps.agrees(lambda answer: answer(ODD, (5, 7)), what="Of 5 rows and 7 columns, halved to 3 and 4, the result")


def heat_by(join=lambda layers: torch.stack(layers).mean(dim=0), heads=lambda w: w.mean(dim=1),
            place=lambda w, rows, columns: w.transpose(1, 2).reshape(len(w), -1, rows, columns), **mode):
    """A `heat_maps` that does one of its steps in this way."""
    mode = {"mode": "bilinear"} | mode
    square = mode.pop("square", False)

    def answer(maps, size):
        layers = []
        for weights in maps.values():
            rows, columns = (round(weights.shape[2] ** 0.5),) * 2 if square else level_shape(size, weights.shape[2], "")
            layers.append(F.interpolate(place(heads(weights), rows, columns), size=size, **mode))
        return join(layers)
    return answer


for diagnosis, answer in [
    ("a reshape alone moves nothing, cells and tokens are mixed up: swap their axes first",
     heat_by(place=lambda w, rows, columns: w.reshape(len(w), -1, rows, columns))),
    ("rows and columns are swapped: the cells lie row by row",
     heat_by(place=lambda w, rows, columns: w.transpose(1, 2).reshape(len(w), -1, columns, rows).transpose(2, 3))),
    ("the heads are added up: take their mean", heat_by(heads=lambda w: w.sum(dim=1))),
    ("this is the largest of the heads: take their mean", heat_by(heads=lambda w: w.amax(dim=1))),
    ("this is the first head alone: take the mean of all", heat_by(heads=lambda w: w[:, 0])),
    ("the layers are added up: take their mean", heat_by(join=sum)),
    ("these are the heat maps of the last layer alone", heat_by(join=lambda layers: layers[-1])),
    ("these are the heat maps of the first layer alone", heat_by(join=lambda layers: layers[0])),
    ("each map is scaled to its largest value: then the words can no longer be compared",
     heat_by(join=lambda layers: (x := torch.stack(layers).mean(dim=0)) / x.amax(dim=(2, 3), keepdim=True))),
    ("this enlarges by repeating cells, and the bilinear way was asked for", heat_by(mode="nearest")),
    ("this is bicubic, and the bilinear way was asked for", heat_by(mode="bicubic")),
    ("align_corners stretches the cells to the border of the image: leave it out", heat_by(align_corners=True)),
    ("the image is not square: the number of cells alone does not give its rows", heat_by(square=True)),
]:
    heat.mistake(diagnosis)(answer)
