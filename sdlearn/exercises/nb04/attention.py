"""Exercises of notebook 04: heads, attention, causal attention, the cross-attention module."""

import torch
from torch import Tensor, nn

from ...attention import CrossAttention, attend, attention_map, causal_attention, merge_heads, split_heads
from ..testing import randn, require, require_shape, require_sums, with_weights
from . import lesson

HEADS = 3
X = randn(2, 5, 12)                                                                 # (B, N, C)
Q, K, V = X, randn(2, 7, 12, seed=1), randn(2, 7, 12, seed=2)


# --- 4.1 ----------------------------------------------------------------------------------------------

heads = lesson.exercise(
    1, split_heads, merge_heads, name="heads", grade="guided", minutes=5,
    asks="Write `split_heads(x, heads)`, (B, N, H*D) -> (B, H, N, D), and `merge_heads(x)`, the way back.",
    hints=["The channels of one head lie side by side: channel c belongs to head c // D.",
           "First cut the last axis in two, H outside and D inside; then swap two axes. The way back swaps first.",
           "`x.view(B, N, H, D).transpose(1, 2)`; and back `x.transpose(1, 2).reshape(B, N, H * D)`."])


@heads.test("shape")
def heads_are_an_axis(split_heads, merge_heads):
    """Of splitting alone, as the next: split_heads is tested before merge_heads is written."""
    split_heads.agrees(lambda split: split(X, HEADS) * 0, what="split_heads' result")


@heads.test("value")
def channels_of_a_head_are_adjacent(split_heads, merge_heads):
    split_heads.agrees(lambda split: split(X, HEADS), what="split_heads' result")


@heads.test("value")
def merging_undoes_splitting(split_heads, merge_heads):
    merge_heads.agrees(lambda merge: merge(randn(2, 3, 5, 4)), what="merge_heads' result")
    require(torch.equal(merge_heads(split_heads(X, HEADS)), X), "merge_heads(split_heads(x, 3)) is not x again")


@heads.test("edge case")
def one_head_and_as_many_as_channels(split_heads, merge_heads):
    for count in (1, 12):
        split_heads.agrees(lambda split, count=count: split(X, count), what=f"With {count} heads split_heads' result")
        require(torch.equal(merge_heads(split_heads(X, count)), X), f"With {count} heads, merging undoes no splitting")


@heads.mistake("a view alone moves nothing: tokens and heads are mixed up; cut the last axis, then swap two axes")
def viewed(x, heads):
    return x.reshape(len(x), heads, x.shape[1], -1)


@heads.mistake("every H-th channel goes to a head: those of one lie side by side, so H is the outer axis of the cut")
def interleaved(x, heads):
    return x.reshape(*x.shape[:2], -1, heads).permute(0, 3, 1, 2)


@heads.mistake("the heads' axis comes after the tokens': swap the axes 1 and 2")
def not_swapped(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


@heads.mistake("the heads are part of the batch: give them an axis of their own")
def in_the_batch(x, heads):
    return split_heads(x, heads).flatten(0, 1)


@heads.mistake("a view alone moves nothing: tokens and heads are mixed up; swap axes 1 and 2 before", of="merge_heads")
def merged_without_swapping(x):
    return x.reshape(len(x), x.shape[2], -1)


@heads.mistake("the channels of a head are not adjacent: H must be the outer axis, D the inner", of="merge_heads")
def merged_interleaved(x):
    return x.permute(0, 2, 3, 1).flatten(2)


# --- 4.2 ----------------------------------------------------------------------------------------------

attention = lesson.exercise(
    2, attend, name="attention", grade="supported", minutes=15, also=[attention_map],
    asks="Write `attention(q, k, v, heads)`: softmax(q k^T / sqrt(D)) v, with q (B, N, C), k and v (B, M, C).",
    beyond="The package's `attend` also takes a mask, checks its sizes, and leaves the arithmetic to PyTorch's fused "
           "kernel; `attention_map` is the formula in the open.",
    hints=["Split q, k and v into heads, and each head attends by itself.",
           "Scores are (B, H, N, M): `q @ k.transpose(-1, -2)`, divided by the root of D, the channels of one head.",
           "Each query shares out a whole among the keys: softmax over the last axis. Then times v, and merge."])


def of_heads(scores, mix=lambda weights, v: weights @ v, *, merge=merge_heads):
    """An attention of `scores(q, k)`, which gives the weights, all split into heads."""
    def answer(q, k, v, heads):
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        return merge(mix(scores(q, k), v))
    return answer


@attention.test("shape")
def as_many_as_queries(attention):
    attention.agrees(lambda answer: answer(Q, K, V, HEADS) * 0)


@attention.test("value")
def weights_are_split(attention):
    """Values of 1 come out as 1 exactly if the weights of every query sum to 1."""
    out = attention.agrees(lambda answer: answer(Q, K, torch.ones_like(V), HEADS), what="With v of ones, the result")
    require_sums(out, out.shape[-1], -1, "the weights of a query must sum to 1")


@attention.test("value")
def one_head(attention):
    attention.agrees(lambda answer: answer(Q, K, V, 1), what="With one head, the result")


@attention.test("value")
def three_heads(attention):
    attention.same(Q, K, V, HEADS)


@attention.test("edge case")
def large_scores(attention):
    """Weights of exp(300) are no numbers in float32: softmax takes the largest away first."""
    attention.agrees(lambda answer: answer(40 * Q, 40 * K, V, HEADS), what="With large scores, the result")


@attention.test("edge case")
def itself_and_a_single_key(attention):
    attention.same(Q, Q, Q, HEADS)
    attention.agrees(lambda answer: answer(Q, K[:, :1], V[:, :1], HEADS), what="With a single key, the result")


def scaled(q: Tensor, k: Tensor, width: float | None = None) -> Tensor:
    return q @ k.transpose(-1, -2) / (width or q.shape[-1]) ** 0.5


for diagnosis, weights in [
    ("rows do not sum to 1: which axis did softmax run over?", lambda q, k: scaled(q, k).softmax(-2)),
    ("softmax ran over the heads: it must run over the keys, the last axis", lambda q, k: scaled(q, k).softmax(1)),
    ("the scores are not divided by the root of D", lambda q, k: scaled(q, k, 1.0).softmax(-1)),
    ("the scores are divided by D where it must be its root", lambda q, k: scaled(q, k, q.shape[-1] ** 2).softmax(-1)),
    ("the root is of C, all channels: each head has D = C / H of them",
     lambda q, k: scaled(q, k, q.shape[-1] * q.shape[1]).softmax(-1)),
    ("the scores are multiplied by the root of D where they must be divided",
     lambda q, k: scaled(q, k, 1 / q.shape[-1]).softmax(-1)),
    ("the softmax is missing: the weights are bare scores", scaled),
    ("the scores are divided after the softmax: then the weights sum to less than 1",
     lambda q, k: scaled(q, k, 1.0).softmax(-1) / q.shape[-1] ** 0.5),
    ("exp overflows: take the largest score away before, as `softmax` does",
     lambda q, k: scaled(q, k).exp() / scaled(q, k).exp().sum(-1, keepdim=True)),
]:
    attention.mistake(diagnosis)(of_heads(weights))


@attention.mistake("the heads are not split: this is one head of all channels")
def one_for_all(q, k, v, heads):
    return attend(q, k, v, 1)


attention.mistake("the heads are not put together: (B, H, N, D) goes back to (B, N, C)")(
    of_heads(lambda q, k: scaled(q, k).softmax(-1), merge=lambda x: x))
attention.mistake("the heads are put together without swapping tokens and heads back")(
    of_heads(lambda q, k: scaled(q, k).softmax(-1), merge=lambda x: x.reshape(len(x), x.shape[2], -1)))


# --- 4.3 ----------------------------------------------------------------------------------------------

causal = lesson.exercise(
    3, causal_attention, grade="supported", minutes=10,
    asks="Write `causal_attention(q, k, v, heads)`: a token attends to itself and those before. q, k, v are (B, L, C).",
    hints=["The mask is (L, L): row i says which tokens token i may attend to.",
           "Forbid before the softmax, not after: a score of minus infinity becomes a weight of 0; the rest sums to 1.",
           "`torch.ones(L, L, dtype=torch.bool).tril()` is True where it may attend. `attend` takes it as mask."])


@causal.test("shape")
def as_many_as_tokens(causal_attention):
    require_shape(causal_attention(X, X, X, HEADS), X.shape)


@causal.test("value")
def tokens_attend_to_earlier_ones(causal_attention):
    causal_attention.same(X, X, X, HEADS)


@causal.test("value")
def later_tokens_have_no_effect(causal_attention):
    later = torch.cat([X[:, :3], randn(2, 2, 12, seed=9)], dim=1)
    before, after = (causal_attention(x, x, x, HEADS)[:, :3] for x in (X, later))
    require(torch.allclose(before, after, atol=1e-5), "Other words at the end change the tokens before them")


@causal.test("edge case")
def a_single_token(causal_attention):
    one = X[:, :1]
    causal_attention.agrees(lambda answer: answer(one, one, one, HEADS), what="With one token, the result")


def ones(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


for diagnosis, mask in [
    ("nothing is masked: a token attends to later ones as well", lambda n: ones(n)),
    ("the mask is turned round: a token attends to later ones; tril, not triu", lambda n: ones(n).triu()),
    ("the mask says what is forbidden where `attend` wants to know what is allowed", lambda n: ones(n).triu(1)),
    ("a token must attend to itself, too: allow the diagonal", lambda n: ones(n).tril(-1)),
    ("a token attends to the next one: the diagonal is the last to allow", lambda n: ones(n).tril(1)),
    ("zeros and ones are added to the scores: a forbidden score must become minus infinity",
     lambda n: ones(n).tril().float()),
    ("the scores that are forbidden are set to 0, which is a score like others: make them minus infinity", None),
]:
    def answer(q, k, v, heads, mask=mask):
        if mask is not None:
            return attend(q, k, v, heads, mask(q.shape[1]))
        return of_heads(lambda q, k: (scaled(q, k) * ones(q.shape[2]).tril()).softmax(-1))(q, k, v, heads)
    causal.mistake(diagnosis)(answer)

causal.mistake("0 times infinity is no number: write minus infinity where it is forbidden, 0 where it is allowed")(
    lambda q, k, v, heads: attend(q, k, v, heads, ones(q.shape[1]).tril().float() * -torch.inf))
causal.mistake("0 times infinity is no number: write minus infinity where it is forbidden, 0 where it is allowed")(
    lambda q, k, v, heads: attend(q, k, v, heads, ones(q.shape[1]).triu(1).float() * -torch.inf))
causal.mistake("the heads are not split: this is one head of all channels")(
    lambda q, k, v, heads: causal_attention(q, k, v, 1))
causal.mistake("a token must attend to itself, too: allow the diagonal")(    # by hand, the first token's row is NaN
    of_heads(lambda q, k: scaled(q, k).masked_fill(~ones(q.shape[2]).tril(-1), -torch.inf).softmax(-1)))
causal.mistake("the mask comes after the softmax: then a row no longer sums to 1")(
    of_heads(lambda q, k: scaled(q, k).softmax(-1) * ones(q.shape[2]).tril()))


# --- 4.4 ----------------------------------------------------------------------------------------------

cross_attention = lesson.exercise(
    4, CrossAttention, grade="on your own", minutes=20,
    asks="Write the module `CrossAttention(dim, context_dim, heads)`, whose forward(x, context) attends to the text.",
    beyond="The package's module is self-attention as well (no context), takes a mask, and takes hooks; the "
           "exercise asks for an image that reads a text.",
    hints=["Four linear layers: to_q, to_k, to_v without bias, and to_out, a Sequential of one with bias. The names "
           "are those of the checkpoints.",
           "Queries come from the image, x; keys and values from the context, whose tokens have `context_dim` "
           "channels.",
           "`self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))`."])

WEIGHTS = {"to_q.weight": randn(12, 12, seed=3) / 2, "to_k.weight": randn(12, 9, seed=4) / 2,
           "to_v.weight": randn(12, 9, seed=5) / 2, "to_out.0.weight": randn(12, 12, seed=6) / 2,
           "to_out.0.bias": randn(12, seed=7)}
TEXT = randn(2, 7, 9, seed=8)                                                       # (B, M, T)


def read(module: type, x: Tensor = X, context: Tensor = TEXT, heads: int = HEADS) -> Tensor:
    """What the module, with these weights, makes of x and the context."""
    return with_weights(module(12, 9, heads), WEIGHTS)(x, context)


@cross_attention.test("shape")
def parameters_have_the_checkpoints_names(CrossAttention):
    module = CrossAttention(12, 9, HEADS)
    require(isinstance(module, nn.Module), "It is no nn.Module: class CrossAttention(nn.Module), with "
                                           "super().__init__() first")
    CrossAttention.agrees(lambda module: dict(with_weights(module(12, 9, HEADS), WEIGHTS).state_dict()))


@cross_attention.test("shape")
def an_image_stays_an_image(CrossAttention):
    require_shape(read(CrossAttention), X.shape)


@cross_attention.test("value")
def it_reads_with_one_head(CrossAttention):
    CrossAttention.agrees(lambda module: read(module, heads=1), what="With one head, the result")


@cross_attention.test("value")
def it_reads_with_three(CrossAttention):
    CrossAttention.agrees(read)


@cross_attention.test("value")
def gradients_reach_every_layer(CrossAttention):
    module = with_weights(CrossAttention(12, 9, HEADS), WEIGHTS)
    module(X, TEXT).square().sum().backward()
    for name, parameter in module.named_parameters():
        require(parameter.grad is not None and bool(parameter.grad.any()), f"No gradient reaches `{name}`")


@cross_attention.test("edge case")
def one_token_and_another_batch(CrossAttention):
    CrossAttention.agrees(lambda module: read(module, context=TEXT[:, :1]), what="With a text of one token, the result")
    CrossAttention.agrees(lambda module: read(module, X[:1], TEXT[:1]), what="With a batch of one, the result")


class Variant(nn.Module):
    """The parameters of the package's; wrong ones among its children have another `forward`."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def qkv(self, x, context):
        return self.to_q(x), self.to_k(context), self.to_v(context)


@cross_attention.mistake("to_out is not applied: it mixes the heads at the end")
class WithoutOut(Variant):
    def forward(self, x, context):
        return attend(*self.qkv(x, context), self.heads)


@cross_attention.mistake("x is added: the residual belongs to the block around, not to the attention")
class Residual(Variant):
    def forward(self, x, context):
        return x + self.to_out(attend(*self.qkv(x, context), self.heads))


@cross_attention.mistake("k and v have changed places")
class KeysForValues(Variant):
    def forward(self, x, context):
        q, k, v = self.qkv(x, context)
        return self.to_out(attend(q, v, k, self.heads))


@cross_attention.mistake("the heads are not split: this is one head of all channels")
class OneHead(Variant):
    def forward(self, x, context):
        return self.to_out(attend(*self.qkv(x, context), 1))


@cross_attention.mistake("the scores are not divided by the root of D")
class Unscaled(Variant):
    def forward(self, x, context):
        return self.to_out(of_heads(lambda q, k: scaled(q, k, 1.0).softmax(-1))(*self.qkv(x, context), self.heads))


@cross_attention.mistake("softmax ran over the queries: it must run over the tokens of the text, the last axis")
class OverQueries(Variant):
    def forward(self, x, context):
        return self.to_out(of_heads(lambda q, k: scaled(q, k).softmax(-2))(*self.qkv(x, context), self.heads))


@cross_attention.mistake("the values are not projected by to_v: they come from k")
class KeysTwice(Variant):
    def forward(self, x, context):
        q, k, _ = self.qkv(x, context)
        return self.to_out(attend(q, k, k, self.heads))


@cross_attention.mistake("queries come from the text and keys from the image: q comes from x, k and v from the context")
class TurnedRound(Variant):
    def __init__(self, dim, context_dim, heads):
        super().__init__(dim, context_dim, heads)
        self.to_q = nn.Linear(context_dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x, context):
        return self.to_out(attend(self.to_q(context), self.to_k(x), self.to_v(x), self.heads))


