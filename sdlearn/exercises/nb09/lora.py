"""Exercises of notebook 09: LoRA: the weight's update, a linear layer, merging."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...finetune import LoRALinear, LowRank, lora_delta, merge_weight
from ..testing import randn, require, require_shape, with_weights
from . import lesson

# --- 9.4 ----------------------------------------------------------------------------------------------

delta = lesson.exercise(
    4, lora_delta, grade="guided", minutes=5,
    asks="Write `lora_delta(down, up, alpha=None)`: alpha / r * up @ down, what a LoRA adds to a weight (o, i), from "
         "down (r, i) and up (o, r). Without an alpha the scale is 1.",
    hints=["r, the rank, is the number of rows of `down`: `len(down)`.",
           "`up @ down` is (o, r) times (r, i). The order matters.",
           "`scale = 1.0 if alpha is None else alpha / len(down)`"],
    beyond="The package's takes a convolution's down (r, i, k, k) and up (o, r, 1, 1) as well.")

DOWN, UP = randn(4, 6, seed=1), randn(5, 4, seed=2)                                 # (r, i), (o, r)


@delta.test("shape")
def as_the_weight(lora_delta):
    require_shape(lora_delta(DOWN, UP), (5, 6), "What is added")


@delta.test("value")
def without_alpha(lora_delta):
    lora_delta.agrees(lambda answer: answer(DOWN, UP), what="Without an alpha, what is added")


@delta.test("value")
def with_alpha(lora_delta):
    lora_delta.agrees(lambda answer: answer(DOWN, UP, 8.0), what="With an alpha of 8 and rank 4, what is added")


@delta.test("edge case")
def of_rank_one_and_alpha_zero(lora_delta):
    lora_delta.agrees(lambda answer: [answer(DOWN[:1], UP[:, :1], 2.0), answer(DOWN, UP, 0.0)],
                      what="Of rank 1 with an alpha of 2, and with an alpha of 0, what is added")


def scaled(scale: Callable[[Tensor, Tensor, float], float], default: float = 1.0) -> Callable:
    def answer(down, up, alpha=None):
        return (default if alpha is None else scale(down, up, alpha)) * (up @ down)
    return answer


for diagnosis, answer in [
    ("alpha is not used", scaled(lambda down, up, alpha: 1.0)),
    ("alpha is not divided by the rank", scaled(lambda down, up, alpha: alpha)),
    ("the scale is upside down: it is alpha / r", scaled(lambda down, up, alpha: len(down) / max(alpha, 1e-9))),
    ("alpha is divided by the number of outputs: the rank is the number of rows of `down`",
     scaled(lambda down, up, alpha: alpha / len(up))),
    ("alpha is divided by the number of inputs: the rank is the number of rows of `down`",
     scaled(lambda down, up, alpha: alpha / down.shape[1])),
    ("alpha is divided by the root of the rank, as rsLoRA does: LoRA divides by the rank",
     scaled(lambda down, up, alpha: alpha / len(down) ** 0.5)),
    ("without an alpha the scale is 1, not 1 / r", scaled(lambda down, up, alpha: alpha / len(down), 0.25)),
    ("an alpha of 0 is an alpha: `if alpha` takes it for none",
     scaled(lambda down, up, alpha: (alpha or len(down)) / len(down))),
]:
    delta.mistake(diagnosis)(answer)


# --- 9.5 ----------------------------------------------------------------------------------------------

linear = lesson.exercise(
    5, LoRALinear, grade="supported", minutes=15,
    asks="Write `LoRALinear(base, rank, alpha=None)`: a module around the frozen `base`, an nn.Linear, that adds "
         "alpha / r * up @ down @ x (without an alpha, up @ down @ x). `down` (r, i) starts random, `up` (o, r) at "
         "zero; `merged()` makes a plain nn.Linear that computes the same.",
    hints=["`self.base = base.requires_grad_(False)`. `down` and `up` are a `torch.nn.Parameter` each, made from "
           "`torch.randn(rank, base.in_features) * base.in_features**-0.5` and `torch.zeros(base.out_features, "
           "rank)`.",
           "In `forward`: `self.base(x) + scale * F.linear(F.linear(x, self.down), self.up)`, with the scale of 9.4. "
           "F.linear(x, A) is x @ A.T.",
           "`merged` copies the layer first (`copy.deepcopy(self.base)`), and adds `lora_delta(self.down, self.up, "
           "self.alpha)` to the copy's weight under `torch.no_grad()`: this page has gradients off, but a check has "
           "them on. The bias stays."])

LAYER = {"weight": randn(5, 6, seed=3), "bias": randn(5, seed=4)}
LEARNT = {**{f"base.{name}": one for name, one in LAYER.items()}, "down": DOWN, "up": UP}
X = randn(2, 3, 6, seed=5)                                                          # (B, M, i)


def layer(bias: bool = True) -> nn.Linear:
    made = nn.Linear(6, 5, bias=bias)
    made.load_state_dict(LAYER if bias else {"weight": LAYER["weight"]})
    return made


def learnt(answer: Callable, alpha: float | None = None, rank: int = 4) -> nn.Module:
    """One with given numbers."""
    weights = {**LEARNT, "down": DOWN[:rank], "up": UP[:, :rank]}
    return with_weights(answer(layer(), rank, alpha), weights)


@linear.test("shape")
def named_and_shaped(LoRALinear):
    require_shape(learnt(LoRALinear)(X), (2, 3, 5), "Its output")


@linear.test("shape")
def trainable_parameters(LoRALinear):
    made = LoRALinear(layer(), 4)
    open_ = {name for name, one in made.named_parameters() if one.requires_grad}
    require("base.weight" not in open_ and "base.bias" not in open_, "The base is not frozen: only `down` and `up` "
                                                                     "learn")
    require(open_ == {"down", "up"}, f"What learns is {', '.join(sorted(open_)) or 'nothing'}: it must be down and up")


@linear.test("value")
def starts_as_the_base(LoRALinear):
    made, plain = LoRALinear(layer(), 4), layer()
    require(made.down.abs().max() > 0 or made.up.abs().max() == 0,
            "`down` starts at zero and `up` does not: that, too, changes nothing, but here it is the other way round")
    require(made.down.abs().max() > 0, "`down` is zero: with both of them zero no gradient reaches either, for ever")
    require(torch.equal(made(X), plain(X)), "A fresh one does not give what the base gives, to the bit: which of down "
                                            "and up must start at zero?")


@linear.test("value")
def adds_its_part(LoRALinear):
    LoRALinear.agrees(lambda answer: learnt(answer)(X), what="With given numbers, the output")


@linear.test("value")
def scales_it(LoRALinear):
    LoRALinear.agrees(lambda answer: learnt(answer, 2.0)(X), what="With an alpha of 2 and rank 4, the output")


@linear.test("edge case")
def merges(LoRALinear):
    def weights(answer):
        made = learnt(answer, 2.0).merged()
        require(isinstance(made, nn.Linear), "`merged` must return an nn.Linear")
        return [made.weight.detach(), made(X)]
    LoRALinear.agrees(weights, what="Of `merged`, whose bias is the base's, weight and output")


@linear.test("edge case")
def merging_leaves_the_base(LoRALinear):
    made = learnt(LoRALinear)
    made.merged()
    require(torch.equal(made.base.weight, LAYER["weight"]), "`merged` changes the base itself, which then has the LoRA "
                                                            "twice: copy the layer first")


class WrongLinear(nn.Module):
    """The package's, with places to go wrong."""

    def __init__(self, base, rank, alpha=None):
        super().__init__()
        self.base, self.alpha, self.rank = base.requires_grad_(False), alpha, rank
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def inside(self, x):
        return x @ self.down.T @ self.up.T

    def forward(self, x):
        return self.base(x) + self.scale() * self.inside(x)

    def change(self):
        return self.scale() * self.up @ self.down

    @torch.no_grad()
    def merged(self):
        made = copy.deepcopy(self.base)
        made.weight += self.change()
        return made


def without_bias(self: WrongLinear) -> nn.Linear:
    made = WrongLinear.merged(self)
    made.bias = None
    return made


for diagnosis, parts in [
    ("the LoRA's part is not added", {"forward": lambda self, x: self.base(x)}),
    ("the scale is forgotten when merging", {"change": lambda self: self.up @ self.down}),
    ("alpha is not used", {"scale": lambda self: 1.0}),
    ("alpha is not divided by the rank", {"scale": lambda self: 1.0 if self.alpha is None else self.alpha}),
    ("there is an activation between down and up: together they would not be one matrix",
     {"inside": lambda self, x: F.relu(x @ self.down.T) @ self.up.T}),
    ("the base's output is scaled as well",
     {"forward": lambda self, x: self.scale() * (self.base(x) + self.inside(x))}),
    ("merging changed nothing", {"change": lambda self: 0 * self.base.weight}),
    ("the base's bias is missing from `merged`", {"merged": without_bias}),
    ("this is the change alone: the weight that was there is missing",
     {"change": lambda self: self.scale() * self.up @ self.down - self.base.weight}),
]:
    linear.mistake(diagnosis)(type("LoRALinear", (WrongLinear,), parts))


# --- 9.6 ----------------------------------------------------------------------------------------------

several = lesson.exercise(
    6, merge_weight, grade="on your own", minutes=10,
    asks="Write `merge_weight(weight, changes)`: a layer's weight with several LoRAs in it. `changes` holds pairs of "
         "a `LowRank` and its strength; `.delta()` of a LowRank is alpha / r * up @ down, for convolutions as well. "
         "The weight may be in half precision, the sum is made in float32; the result has the weight's shape.",
    hints=["Start from `weight.float()`, and add `strength * change.delta()` for each pair.",
           "`total = total + ...` makes a new tensor; `total += ...` may write into the weight that you were given.",
           "A convolution of 1x1 has a weight (o, i, 1, 1), while its LoRA may be (o, i): `.reshape(weight.shape)`."],
    beyond="The package's keeps a weight of float64 in float64.")

CHANGES = [(LowRank(DOWN, UP, 2.0), 0.8), (LowRank(randn(2, 6, seed=6), randn(5, 2, seed=7)), -1.5)]
WEIGHT = LAYER["weight"]


@several.test("shape")
def a_weight_again(merged_weight):
    require_shape(merged_weight(WEIGHT, CHANGES), (5, 6), "The weight")


@several.test("value")
def with_one(merged_weight):
    merged_weight.agrees(lambda answer: answer(WEIGHT, CHANGES[:1]), what="With one LoRA, the weight")


@several.test("value")
def with_two(merged_weight):
    merged_weight.agrees(lambda answer: answer(WEIGHT, CHANGES), what="With two LoRAs, the weight")


@several.test("edge case")
def with_none(merged_weight):
    merged_weight.agrees(lambda answer: answer(WEIGHT, []), what="Without any LoRA, the weight")


@several.test("edge case")
def in_half_precision(merged_weight):
    half = WEIGHT.half()
    found = merged_weight(half, CHANGES)
    require(found.dtype == torch.float32, f"Of a weight in half precision it makes {found.dtype}: make the sum in "
                                          "float32, in which small changes are not lost")
    merged_weight.agrees(lambda answer: answer(half, CHANGES), what="Of a weight in half precision, the result")


@several.test("edge case")
def of_a_convolution(merged_weight):
    merged_weight.agrees(lambda answer: answer(WEIGHT[:, :, None, None], CHANGES),
                         what="Of a 1x1 convolution, the weight")


def summed(add: Callable = lambda total, d, s, base: total + s * d, all_of: Callable = list,
           end: Callable = lambda total, base, n: total, delta: Callable = lambda one: one.delta()) -> Callable:
    def answer(weight, changes):
        base = weight.float()
        total = base
        for one, strength in all_of(changes):
            total = add(total, delta(one).reshape(weight.shape), strength, base)
        return end(total, base, len(changes))
    return answer


for diagnosis, parts in [
    ("the strengths are not used", {"add": lambda total, d, s, base: total + d}),
    ("the strength counts twice: it multiplies the product, not both factors",
     {"add": lambda total, d, s, base: total + s * s * d}),
    ("only the last LoRA is there: each starts from the weight again", {"add": lambda total, d, s, base: base + s * d}),
    ("only the first LoRA is there", {"all_of": lambda changes: changes[:1]}),
    ("alpha is not used", {"delta": lambda one: one.up @ one.down}),
    ("the mean of the changes is taken: they add up",
     {"end": lambda total, base, n: base + (total - base) / max(n, 1)}),
    ("the weight is blended away: a LoRA is added to all of it",
     {"add": lambda total, d, s, base: (1 - s) * total + s * d}),
    ("a negative strength takes away: its sign is lost", {"add": lambda total, d, s, base: total + abs(s) * d}),
    ("this is the change alone: the weight that was there is missing", {"end": lambda total, base, n: total - base}),
]:
    several.mistake(diagnosis)(summed(**parts))
