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
    ("H must be the outer axis", lambda x: rearrange(x, "b h n d -> b n (d h)")),
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
    ("goes back to (B, N, C)", attention_by(lambda s, d, h: (s / d**0.5).softmax(-1), merge="b h n d -> b h n d")),
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
    ("allow the diagonal", lambda s, ones: s.masked_fill(ones.triu(), -torch.inf).softmax(-1)),
    ("attends to the next one", lambda s, ones: s.masked_fill(ones.triu(2), -torch.inf).softmax(-1)),
    ("set to 0", lambda s, ones: s.masked_fill(~ones.tril(), 0).softmax(-1)),
    ("after the softmax", lambda s, ones: s.softmax(-1).masked_fill(~ones.tril(), 0)),
    ("zeros and ones are added", lambda s, ones: (s + ones.tril().float()).softmax(-1)),
    ("0 times infinity", lambda s, ones: (s + ones.triu(1) * -torch.inf).softmax(-1)),
    ("0 times infinity", lambda s, ones: (s - ones.tril() * torch.inf).softmax(-1)),
]:
    wrong("causal_attention", words)(causal_by(weights))


@wrong("causal_attention", "the heads are not split")
def without_heads(q, k, v, heads):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


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


# --- GEGLU --------------------------------------------------------------------------------------------

class Gated(nn.Module):
    """Its layer; children differ in `forward`."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.hidden, self.proj = hidden, nn.Linear(dim, hidden * 2)


@right("GEGLU")
class BySplit(Gated):
    def forward(self, x):
        value, gate = torch.split(self.proj(x), self.hidden, dim=-1)
        return F.gelu(gate) * value


@right("GEGLU")
class ByErf(Gated):
    def forward(self, x):
        x = x @ self.proj.weight.T + self.proj.bias
        gate = x[..., self.hidden:]
        return x[..., :self.hidden] * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))


def gated_by(combine):
    class Wrongly(Gated):
        def forward(self, x):
            x = self.proj(x)
            return combine(x[..., :self.hidden], x[..., self.hidden:])
    return Wrongly


for words, combine in [
    ("the halves are swapped", lambda a, b: F.gelu(a) * b),
    ("by a sigmoid", lambda a, b: a * b.sigmoid()),
    ("by a ReLU", lambda a, b: a * b.clamp(min=0)),
    ("the tanh approximation",
     lambda a, b: a * 0.5 * b * (1 + torch.tanh((2 / torch.pi)**0.5 * (b + 0.044715 * b**3)))),
    ("quick GELU", lambda a, b: a * b * (1.702 * b).sigmoid()),
    ("GELU was taken of both halves", lambda a, b: F.gelu(a) * F.gelu(b)),
    ("added where it must multiply", lambda a, b: a + F.gelu(b)),
    ("everywhere it is the negative", lambda a, b: -a * F.gelu(b)),
]:
    wrong("GEGLU", words)(gated_by(combine))


@wrong("GEGLU", "every other channel is the gate")
class ByTurns(Gated):
    def forward(self, x):
        value, gate = self.proj(x).unflatten(-1, (self.hidden, 2)).unbind(-1)
        return value * F.gelu(gate)


@wrong("GEGLU", "`proj.weight` has shape (5, 6) where it must be (10, 6)")
class OneHalf(Gated):
    def __init__(self, dim, hidden):
        super().__init__(dim, hidden)
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x):
        return F.gelu(self.proj(x))


# --- attention_cost -----------------------------------------------------------------------------------

@right("attention_cost")
def by_head(queries, keys, channels, heads):
    scores = heads * queries * keys * 2 * (channels / heads)        # each number a sum of D products
    mixed = heads * queries * (channels / heads) * 2 * keys         # each number a sum of M products
    return scores + mixed, heads * queries * keys * 16 // 8


@right("attention_cost")
def counted(queries, keys, channels, heads):
    numbers = queries * keys
    return [2 * 2 * numbers * channels, torch.empty(heads, queries, keys, dtype=torch.float16, device="meta").nbytes]


for words, answer in [
    ("a multiplication and its addition count as two", lambda n, m, c, h: (n * m * c * 2, n * m * h * 2)),
    ("one product of the two", lambda n, m, c, h: (n * m * c, n * m * h * 2)),
    ("do not multiply by the heads again", lambda n, m, c, h: (h * 4 * n * m * c, n * m * h * 2)),
    ("the FLOPs of one head", lambda n, m, c, h: (4 * n * m * (c // h), n * m * h * 2)),
    ("each head has a map of its own", lambda n, m, c, h: (4 * n * m * c, n * m * 2)),
    ("takes two bytes", lambda n, m, c, h: (4 * n * m * c, n * m * h)),
    ("whatever the channels", lambda n, m, c, h: (4 * n * m * c, n * m * c * 2)),
    ("queries times keys", lambda n, m, c, h: (4 * n * n * c, n * n * h * 2)),
    ("two numbers", lambda n, m, c, h: 4 * n * m * c + n * m * h * 2),
]:
    wrong("attention_cost", words)(answer)


# --- heat_maps ----------------------------------------------------------------------------------------

def sides(size, cells):
    rows, columns = size
    while rows * columns != cells:
        rows, columns = -(-rows // 2), -(-columns // 2)
    return rows, columns


@right("heat_maps")
def by_einops_and_sum(maps, size):
    total = 0
    for weights in maps.values():
        h, w = sides(size, weights.shape[-2])
        total = total + F.interpolate(rearrange(weights, "b k (h w) m -> b k m h w", h=h, w=w).mean(1), size,
                                      mode="bilinear", align_corners=False)
    return total / len(maps)


@right("heat_maps")
def an_image_a_token(maps, size):
    tokens = next(iter(maps.values())).shape[-1]
    images = []
    for token in range(tokens):
        layers = []
        for name in maps:
            batch, heads, cells, _ = maps[name].shape
            grid = maps[name][..., token].view(batch, heads, *sides(size, cells))
            layers.append(F.interpolate(grid, size=size, mode="bilinear").mean(dim=1))
        images.append(torch.stack(layers, dim=-1).mean(dim=-1))
    return torch.stack(images, dim=1)


def heats(size, weights, order="b n m -> b m n", mode="bilinear", heads=torch.mean, corners=None, square=False):
    cells = heads(weights, dim=1)
    rows, columns = (int(cells.shape[1] ** 0.5),) * 2 if square else sides(size, cells.shape[1])
    cells = rearrange(cells, order).reshape(len(cells), weights.shape[-1], rows, columns)
    return F.interpolate(cells, size, mode=mode, align_corners=corners)


for words, answer in [
    ("swap their axes first", lambda maps, size: torch.stack(
        [heats(size, w, order="b n m -> b n m") for w in maps.values()]).mean(0)),
    ("the heads are added up", lambda maps, size: torch.stack(
        [heats(size, w, heads=torch.sum) for w in maps.values()]).mean(0)),
    ("the largest of the heads", lambda maps, size: torch.stack(
        [heats(size, w, heads=torch.amax) for w in maps.values()]).mean(0)),
    ("the layers are added up", lambda maps, size: torch.stack([heats(size, w) for w in maps.values()]).sum(0)),
    ("the first layer alone", lambda maps, size: heats(size, next(iter(maps.values())))),
    ("repeating cells", lambda maps, size: torch.stack(
        [heats(size, w, mode="nearest") for w in maps.values()]).mean(0)),
    ("align_corners", lambda maps, size: torch.stack([heats(size, w, corners=True) for w in maps.values()]).mean(0)),
    ("the image is not square", lambda maps, size: torch.stack(
        [heats(size, w, square=True) for w in maps.values()]).mean(0)),
    ("has shape (2, 16, 16, 5)", lambda maps, size: torch.stack(
        [heats(size, w) for w in maps.values()]).mean(0).permute(0, 2, 3, 1)),
    ("words can no longer be compared", lambda maps, size: (
        x := torch.stack([heats(size, w) for w in maps.values()]).mean(0)) / x.flatten(2).amax(-1)[..., None, None]),
]:
    wrong("heat_maps", words)(answer)
