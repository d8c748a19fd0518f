"""Answers to the exercises of notebook 04."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

from exercise_answers import right, wrong

# --- heads --------------------------------------------------------------------------------------------


@right("heads")
def by_view(x, heads):
    B, N, C = x.shape
    return x.view(B, N, heads, C // heads).transpose(1, 2)


@right("heads")
def by_chunks(x, heads):
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


@right("heads", of="merge_heads")
def by_cat(x):
    return torch.cat(x.unbind(1), dim=-1)


@right("heads", of="merge_heads")
def by_einops(x):
    return rearrange(x, "b h n d -> b n (h d)")


for words, split in [
    ("moves nothing", lambda x, heads: x.view(x.shape[0], heads, x.shape[1], x.shape[2] // heads)),
    ("H is the outer axis", lambda x, heads: rearrange(x, "b n (d h) -> b h n d", h=heads)),
    ("swap the axes 1 and 2", lambda x, heads: x.unflatten(-1, (heads, -1))),
    ("an axis of their own", lambda x, heads: rearrange(x, "b n (h d) -> (b h) n d", h=heads)),
    ("is a list where it must be a tensor", lambda x, heads: list(x.chunk(heads, dim=-1))),
]:
    wrong("heads", words)(split)
for words, merge in [
    ("swap axes 1 and 2 before", lambda x: x.contiguous().view(x.shape[0], x.shape[2], -1)),
    ("H must be outside of D", lambda x: rearrange(x, "b h n d -> b n (d h)")),
    ("shape (2, 4, 15) where it must be (2, 5, 12)", lambda x: rearrange(x, "b h n d -> b d (h n)")),
]:
    wrong("heads", words, of="merge_heads")(merge)


# --- attention ----------------------------------------------------------------------------------------

@right("attention")
def by_einsum(q, k, v, heads):
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    scores = einsum(q, k, "b h n d, b h m d -> b h n m") * q.shape[-1] ** -0.5
    return rearrange(einsum(scores.softmax(dim=-1), v, "b h n m, b h m d -> b h n d"), "b h n d -> b n (h d)")


@right("attention")
def head_by_head(q, k, v, heads):
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = torch.bmm(a, b.mT) / a.shape[-1] ** 0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ c)
    return torch.cat(out, dim=-1)


def attention_by(weights, split="b n (h d) -> b h n d", merge="b h n d -> b n (h d)"):
    def attention(q, k, v, heads):
        q, k, v = (rearrange(x, split, h=heads) for x in (q, k, v))
        return rearrange(weights(q @ k.mT, q.shape[-1], heads) @ v, merge)
    return attention


def bare_exp(scores, d, heads):
    weights = torch.exp(scores / d**0.5)
    return weights / weights.sum(dim=-1, keepdim=True)


for words, answer in [
    ("which axis did softmax run over?", attention_by(lambda s, d, h: torch.softmax(s / d**0.5, dim=2))),
    ("softmax ran over the heads", attention_by(lambda s, d, h: F.softmax(s / d**0.5, dim=1))),
    ("not divided by the root of D", attention_by(lambda s, d, h: s.softmax(-1))),
    ("divided by D where it must be its root", attention_by(lambda s, d, h: (s / d).softmax(-1))),
    ("the root is of C", attention_by(lambda s, d, h: (s / (d * h) ** 0.5).softmax(-1))),
    ("where they must be divided", attention_by(lambda s, d, h: (s * d**0.5).softmax(-1))),
    ("the softmax is missing", attention_by(lambda s, d, h: s / d**0.5)),
    ("divided after the softmax", attention_by(lambda s, d, h: s.softmax(-1) / d**0.5)),
    ("exp overflows", attention_by(bare_exp)),
    ("the heads are not split", lambda q, k, v, heads: F.scaled_dot_product_attention(q, k, v)),
    ("swapping tokens and heads back", lambda q, k, v, heads: F.scaled_dot_product_attention(
        *(rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))).contiguous().view(q.shape)),
]:
    wrong("attention", words)(answer)


# --- causal_attention ---------------------------------------------------------------------------------

def split(*xs, heads):
    return (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in xs)


def merge(x):
    return rearrange(x, "b h n d -> b n (h d)")


@right("causal_attention")
def by_the_kernel(q, k, v, heads):
    return merge(F.scaled_dot_product_attention(*split(q, k, v, heads=heads), is_causal=True))


@right("causal_attention")
def token_by_token(q, k, v, heads):
    q, k, v = split(q, k, v, heads=heads)
    rows = []
    for i in range(q.shape[2]):
        scores = q[:, :, i:i + 1] @ k[:, :, :i + 1].mT / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ v[:, :, :i + 1])
    return merge(torch.cat(rows, dim=2))


@right("causal_attention")
def by_a_sum(q, k, v, heads):
    q, k, v = split(q, k, v, heads=heads)
    L = q.shape[2]
    mask = torch.full((L, L), float("-inf")).triu(1)
    return merge((q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v)


def causal_by(weights):
    def causal_attention(q, k, v, heads):
        q, k, v = split(q, k, v, heads=heads)
        return merge(weights(q @ k.mT / q.shape[-1] ** 0.5, torch.ones(q.shape[2], q.shape[2]).bool()) @ v)
    return causal_attention


for words, weights in [
    ("nothing is masked", lambda s, ones: s.softmax(-1)),
    ("tril, not triu", lambda s, ones: s.masked_fill(ones.tril(-1), -torch.inf).softmax(-1)),
    ("keep the diagonal", lambda s, ones: s.masked_fill(ones.triu(), -torch.inf).softmax(-1)),
    ("sees the next one too", lambda s, ones: s.masked_fill(ones.triu(2), -torch.inf).softmax(-1)),
    ("set to 0", lambda s, ones: s.masked_fill(~ones.tril(), 0).softmax(-1)),
    ("after the softmax", lambda s, ones: s.softmax(-1).masked_fill(~ones.tril(), 0)),
    ("zeros and ones are added", lambda s, ones: (s + ones.tril().float()).softmax(-1)),
]:
    wrong("causal_attention", words)(causal_by(weights))


# --- CrossAttention -----------------------------------------------------------------------------------

class Parts(nn.Module):
    """The layers, in an order of their own; children differ in `forward`."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.h = heads
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_q = nn.Linear(dim, dim, bias=False)

    def mixed(self, q, k, v):
        return merge(F.scaled_dot_product_attention(*split(q, k, v, heads=self.h)))


@right("CrossAttention")
class Own(Parts):
    def forward(self, x, context):
        return self.to_out(self.mixed(self.to_q(x), self.to_k(context), self.to_v(context)))


@right("CrossAttention")
class ByHand(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        for name, width in (("to_q", dim), ("to_k", context_dim), ("to_v", context_dim)):
            setattr(self, name, nn.Linear(width, dim, bias=False))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x, context):
        q, k, v = split(self.to_q(x) * self.scale, self.to_k(context), self.to_v(context), heads=self.heads)
        x = merge((q @ k.mT).softmax(-1) @ v)
        for layer in self.to_out:
            x = layer(x)
        return x


@wrong("CrossAttention", "to_out is not applied")
class NoOut(Parts):
    def forward(self, x, context):
        return self.mixed(self.to_q(x), self.to_k(context), self.to_v(context))


@wrong("CrossAttention", "the residual belongs to the block")
class WithResidual(Parts):
    def forward(self, x, context):
        return self.to_out(self.mixed(self.to_q(x), self.to_k(context), self.to_v(context))) + x


@wrong("CrossAttention", "k and v have changed places")
class Exchanged(Parts):
    def forward(self, x, context):
        return self.to_out(self.mixed(self.to_q(x), self.to_v(context), self.to_k(context)))


@wrong("CrossAttention", "the heads are not split")
class SingleHead(Parts):
    def forward(self, x, context):
        return self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context)))


@wrong("CrossAttention", "not divided by the root of D")
class NoScale(Parts):
    def mixed(self, q, k, v):
        q, k, v = split(q, k, v, heads=self.h)
        return merge((q @ k.mT).softmax(-1) @ v)

    forward = Own.forward


@wrong("CrossAttention", "softmax ran over the queries")
class OverCells(Parts):
    def forward(self, x, context):
        q, k, v = split(self.to_q(x), self.to_k(context), self.to_v(context), heads=self.h)
        return self.to_out(merge(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-2) @ v))


@wrong("CrossAttention", "which must not be there")
class WithBias(Own):
    def __init__(self, dim, context_dim, heads):
        super().__init__(dim, context_dim, heads)
        self.to_q = nn.Linear(dim, dim)


@wrong("CrossAttention", "no parameter `to_out.0.weight`")
class BareOut(Own):
    def __init__(self, dim, context_dim, heads):
        super().__init__(dim, context_dim, heads)
        self.to_out = nn.Linear(dim, dim)


@wrong("CrossAttention", "q comes from x, k and v from the context")
class TheTextAsks(Parts):
    def __init__(self, dim, context_dim, heads):
        super().__init__(dim, context_dim, heads)
        self.to_k, self.to_v, self.to_q = (nn.Linear(width, dim, bias=False) for width in (dim, dim, context_dim))

    def forward(self, x, context):
        return self.to_out(self.mixed(self.to_q(context), self.to_k(x), self.to_v(x)))


@wrong("CrossAttention", "No gradient reaches `to_q.weight`")
class Cut(Parts):
    def forward(self, x, context):
        return self.to_out(self.mixed(self.to_q(x).detach(), self.to_k(context), self.to_v(context)))
