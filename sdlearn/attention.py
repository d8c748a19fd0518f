"""Attention, and the transformer that lets an image's cells read the text.

B  batch            N  queries (cells h*w)     C  channels = H * D
H  heads            M  keys (cells or tokens)  D  channels of one head
h, w  rows and columns of the feature map      T  channels of one text token

Parameter names are those of diffusers' `Transformer2DModel`, so its weights load by name.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALL_MAP = 2**18           # queries * keys, one head: 512 cells that look at each other


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(D)) v, by PyTorch's fused kernel.

    q is (B, N, C), k and v are (B, M, C); the result is (B, N, C). `mask` broadcasts to
    (B, H, N, M): boolean, True where a query may look (`nn.MultiheadAttention` means the
    opposite), or floating, added to the scores; each query must be left at least one key.
    Raises ValueError for sizes that do not fit. Vaswani et al. 2017, "Attention is all you need".
    """
    _check(q, k, v, heads, mask)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))            # (B, H, N|M, D)
    if mask is not None:
        mask = torch.atleast_2d(mask)                               # the kernel takes no fewer
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))     # (B, N, C)


def attention_map(q: Tensor, k: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) itself: how much each query takes from each key.

    Arguments as for `attend`; the result is (B, H, N, M), and every row sums to 1.
    """
    _check(q, k, k, heads, mask)
    q, k = split_heads(q, heads), split_heads(k, heads)
    # Scaled before the product: in half precision the unscaled scores can overflow.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                 # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention in which a token sees itself and those before it, as in CLIP's text encoder.

    q, k and v are (B, N, C), and so is the result. Errors as in `attend`.
    """
    length = q.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()   # (N, N)
    return attend(q, k, v, heads, causal)


def attention_cost(queries: int, keys: int, channels: int, heads: int, *, bytes_each: int = 2) -> tuple[int, int]:
    """(FLOPs of the two products q k^T and map v, bytes of the map), for one sample.

    A multiplication and its addition are two FLOPs. The linear layers around it are not counted: they grow with
    the cells, this with queries * keys. More heads share the same FLOPs, and have a map each. bytes_each: of a
    number in the map, 2 in half precision. A fused kernel never holds the map as a whole.
    """
    return 4 * queries * keys * channels, bytes_each * heads * queries * keys


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) -> (B, H, N, D), without a copy."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D)."""
    return rearrange(x, "b h n d -> b n (h d)")


class KeptText:
    """A text, (B, M, T), and the keys and values that each attention layer has made of it, to be used again.

    A text is the same at every step of an image, and so are its keys and values. Stands wherever a network takes
    the text; a slice over the batch is another one. For weights and a text that do not change, and for inference:
    the first gradient that goes back through a key would free what the second needs.
    """

    def __init__(self, text: Tensor):
        self.text, self.kept, self.slices = text, {}, {}

    @property
    def shape(self) -> torch.Size:
        return self.text.shape

    @property
    def ndim(self) -> int:
        return self.text.ndim

    def keys_values(self, layer: "CrossAttention") -> tuple[Tensor, Tensor]:
        """A layer's keys and values, (B, M, C) each."""
        if layer not in self.kept:
            self.kept[layer] = layer.to_k(self.text), layer.to_v(self.text)
        return self.kept[layer]

    def __getitem__(self, rows: slice) -> "KeptText":
        bounds = rows.indices(len(self.text))
        if bounds not in self.slices:
            self.slices[bounds] = KeptText(self.text[rows])
        return self.slices[bounds]


def once_each(x: Tensor, like: "Tensor | KeptText") -> Tensor:
    """x (B, ...) once for each of the k texts that `like` (kB, ...) holds for it: (kB, ...), the batch k times over.

    Until a network reads the text, what it computes for the k texts of one latent is the same, so it is
    computed once; from there on it is needed k times.
    """
    times = like.shape[0] // x.shape[0]
    return x if times == 1 else x.repeat(times, *[1] * (x.ndim - 1))


class CrossAttention(nn.Module):
    """Queries from the image, keys and values from `context`; self-attention without one.

    dim: C. context_dim: T, or None for self-attention. C must be a multiple of `heads`.
    """

    def __init__(self, dim: int, context_dim: int | None = None, heads: int = 8):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels cannot be split into {heads} heads: choose a divisor")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))    # a Sequential for its key, to_out.0
        self.watch = None           # set by `record_attention`: called with every attention map
        self.open_up_to = 0         # set by `open_attention`: the largest map that is made in the open

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), context (B, M, T) -> (B, N, C)."""
        context = x if context is None else context
        q = self.to_q(x)
        k, v = context.keys_values(self) if isinstance(context, KeptText) else (self.to_k(context), self.to_v(context))
        if self.watch is None and x.shape[1] * context.shape[1] > self.open_up_to:
            return self.to_out(attend(q, k, v, self.heads, mask))
        weights = attention_map(q, k, self.heads, mask)                      # (B, H, N, M)
        if self.watch is not None:
            self.watch(weights)
        return self.to_out(merge_heads(weights @ split_heads(v, self.heads)))


class GEGLU(nn.Module):
    """Gated linear unit, value * GELU(gate), with the exact GELU. Shazeer 2020.

    One linear layer makes both; its first half is the value, its second half the gate.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """What every cell does by itself between attentions: widen, gate, narrow."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        # Place 1 was dropout when Stable Diffusion was trained; it keeps the key net.2.
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Cells look at each other, then at the text, then think alone; each step is residual."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, M, T) -> (B, N, C); with k texts for each x, context (kB, M, T) -> (kB, N, C)."""
        x = once_each(x + self.attn1(self.norm1(x)), context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class TokenConv(nn.Conv2d):
    """A 1x1 convolution over a list of tokens: a linear layer whose weight is (out, in, 1, 1)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, inputs) -> (B, N, outputs)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """A transformer block on a feature map: cells become tokens and go back to their places.

    linear: whether proj_in and proj_out hold linear weights (SD 2.x) or those of 1x1
    convolutions (SD 1.x), which is the same arithmetic. proj_out starts at zero, as in the
    training of Stable Diffusion: a fresh transformer changes nothing.
    """

    def __init__(self, channels: int, context_dim: int, heads: int, *,
                 linear: bool = False, groups: int = 32):
        super().__init__()
        project = nn.Linear if linear else TokenConv
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = project(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, h, w), context (B, M, T) -> (B, C, h, w); rows as in `TransformerBlock`."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = self.proj_in(tokens)                                        # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.proj_out(tokens)
        return once_each(x, context) + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


@dataclass
class AttentionRecord:
    """Attention maps by layer name, each (B, H, N, M), of the latest forward pass."""

    maps: dict[str, Tensor] = field(default_factory=dict)

    def watcher(self, name: str):
        """A function that files a map under `name`."""
        def watch(weights: Tensor) -> None:
            self.maps[name] = weights
        return watch


@contextmanager
def record_attention(model: nn.Module, only: str = "") -> Iterator[AttentionRecord]:
    """Record the attention maps of `model` inside a `with` block.

        with record_attention(unet, only="attn2") as record:
            unet(x, t, context)
        record.maps["mid_block.attentions.0.transformer_blocks.0.attn2"]    # (B, H, N, M)

    only: record the layers whose name contains this; "attn2" are those that read the text,
    and leaving out "attn1" saves memory, N * N numbers for each head. Those layers compute
    softmax(q k^T) openly instead of in the fused kernel, with equal results. The record
    stays valid after the block; afterwards the model is as it was, whatever happened.
    Raises ValueError if no layer's name contains `only`.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CrossAttention) and only in name}
    if not layers:
        raise ValueError(f"nothing to record: no attention layer of this {type(model).__name__} "
                         f"has {only!r} in its name")
    record = AttentionRecord()
    before = {name: layer.watch for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.watch = record.watcher(name)
        yield record
    finally:
        for name, layer in layers.items():
            layer.watch = before[name]


@contextmanager
def open_attention(*models: nn.Module, largest: int = SMALL_MAP) -> Iterator[None]:
    """Inside, the models' attention multiplies in the open, not by PyTorch's fused kernel; for training small ones.

    On a CPU the backward of that kernel takes several times as long as the plain products (a quarter of a whole
    step of `mini`); what it saves is the memory of the maps, so maps of more than `largest` numbers, queries times
    keys of one head, stay fused.
    """
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, CrossAttention)]
    before = [layer.open_up_to for layer in layers]
    try:
        for layer in layers:
            layer.open_up_to = largest
        yield
    finally:
        for layer, size in zip(layers, before, strict=True):
            layer.open_up_to = size


def attention_scale(tokens: float, trained: float) -> float:
    """What to multiply the scores of `tokens` keys by where training had `trained`: sqrt(log tokens / log trained).

    Softmax over more keys is flatter: its entropy grows like log tokens, less half the scores' variance. With this
    factor it stays the same share of log tokens, for scores that are normally distributed. ValueError below 2 tokens.
    Jin et al. 2023, "Training-free diffusion model adaptation for variable-sized text-to-image synthesis".
    """
    if tokens < 2 or trained < 2:
        raise ValueError(f"attention over {tokens} keys, in training {trained}: two at least are needed")
    return math.sqrt(math.log(tokens) / math.log(trained))


@contextmanager
def scaled_attention(model: nn.Module, area: float, only: str = "attn1") -> Iterator[None]:
    """Inside, self-attention's scores are multiplied by `attention_scale`, for images of another size.

        with scaled_attention(unet, area=4):            # twice as wide and as high as in training
            unet(x, t, context)

    area: cells of the image over cells of those of training, which holds at every level. only: the layers whose
    name contains this. Raises ValueError where there are none, and for an area that is not above 0.
    """
    layers = [m for name, m in model.named_modules() if isinstance(m, CrossAttention) and only in name]
    if not layers or area <= 0:
        raise ValueError(f"nothing to scale: {len(layers)} attention layers of this {type(model).__name__} have "
                         f"{only!r} in their name, and the area is {area}")

    def scaled(to_q: nn.Module, given: tuple[Tensor], q: Tensor) -> Tensor:
        tokens = q.shape[1]
        if tokens < 2 or tokens / area < 2:             # one key takes all, whatever its score
            return q
        return q * attention_scale(tokens, tokens / area)

    hooks = [layer.to_q.register_forward_hook(scaled) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def heat_maps(maps: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """From where in the image each token is looked at: (B, M, rows, columns), over the tokens a sum of 1.

    maps: of layers that read the text, (B, H, N, M) each, as `record_attention` keeps them. size: rows and columns
    of the result, the latent's or the image's. The mean over heads, laid out as the image is, enlarged
    (bilinear), and the mean over layers. Raises ValueError for no maps, and for one that is not the image's.
    In the manner of Tang et al. 2023, "What the DAAM", who add up where this takes means.
    """
    if not maps:
        raise ValueError("there are no attention maps: run the model inside `record_attention`, with only=\"attn2\"")
    layers = []
    for name, weights in maps.items():
        rows, columns = _halved(size, weights.shape[2], name)
        cells = weights.mean(dim=1)                                          # (B, N, M)
        cells = rearrange(cells, "b (h w) m -> b m h w", h=rows, w=columns)
        layers.append(F.interpolate(cells.float(), size=size, mode="bilinear"))
    return torch.stack(layers).mean(dim=0)                                   # (B, M, *size)


def _halved(size: tuple[int, int], cells: int, name: str) -> tuple[int, int]:
    """Rows and columns of a map of so many cells: `size` halved, rounding up, as often as it takes."""
    rows, columns = size
    while rows * columns > cells:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != cells:
        raise ValueError(f"the map of {name or 'the layer'} has {cells} cells, which a picture of {size[0]} rows and "
                         f"{size[1]} columns has at no level: give the size of the latent or of the image")
    return rows, columns


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> None:
    shapes = f"q is {tuple(q.shape)}, k is {tuple(k.shape)}, v is {tuple(v.shape)}"
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"attention needs (batch, tokens, channels) each, but {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or k.shape != v.shape:
        raise ValueError(f"q, k, v need one batch and width, and k as many tokens as v, but {shapes}")
    if heads < 1 or q.shape[2] % heads:
        raise ValueError(f"{q.shape[2]} channels cannot be split into {heads} heads: choose a divisor")
    if mask is None:
        return
    full = (q.shape[0], heads, q.shape[1], k.shape[1])
    fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise ValueError(f"the mask is {tuple(mask.shape)}, but must broadcast to {full}, which is "
                         "(batch, heads, queries, keys)")
