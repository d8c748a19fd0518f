"""Multi-head attention and the spatial transformer: self-attention over cells, cross-attention to the text.

B  batch            N  queries (cells h*w)     C  channels = H * D
H  heads            M  keys (cells or tokens)  D  channels of one head
h, w  rows and columns of the feature map      T  channels of one text token

Parameter names are those of diffusers' `Transformer2DModel`, so its weights load by name.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALL_MAP = 2**18           # queries * keys of one head: self-attention over 512 cells


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(D)) v, by PyTorch's fused kernel.

    q is (B, N, C), k and v are (B, M, C); the result is (B, N, C). `mask` broadcasts to
    (B, H, N, M): boolean, True where a query may look (`nn.MultiheadAttention` means the
    opposite), or floating, added to the scores; each query needs at least one key.
    Raises ValueError for sizes that do not fit. Vaswani et al. 2017, "Attention is all you need".
    """
    _check(q, k, v, heads, mask)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))            # (B, H, N|M, D)
    if mask is not None:
        mask = torch.atleast_2d(mask)                               # the kernel takes no fewer
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))     # (B, N, C)


def attention_map(q: Tensor, k: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention weights softmax(q k^T / sqrt(D)).

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
    """Causal self-attention: each token attends to itself and earlier ones, as in CLIP's text encoder.

    q, k and v are (B, N, C), and so is the result. Errors as in `attend`.
    """
    length = q.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()   # (N, N)
    return attend(q, k, v, heads, causal)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) -> (B, H, N, D), without a copy."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D)."""
    return rearrange(x, "b h n d -> b n (h d)")


def repeat_for_contexts(x: Tensor, contexts: Tensor) -> Tensor:
    """x (B, ...) repeated for the k contexts of each latent: (kB, ...), for contexts (kB, ...).

    What a network computes before its first cross-attention does not depend on the context, so it is computed
    once for all k; from there on each context needs its own rows.
    """
    times = contexts.shape[0] // x.shape[0]
    return x if times == 1 else x.repeat(times, *[1] * (x.ndim - 1))


class CrossAttention(nn.Module):
    """Multi-head attention: queries from x, keys and values from `context`; self-attention without a context.

    dim: C. context_dim: T, or None for self-attention. Raises ValueError unless C is a multiple of `heads`.
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
        self.attend = attend                                # `replace_attention` puts another function here

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, cache=None) -> Tensor:
        """x (B, N, C), context (B, M, T) -> (B, N, C). cache: has the keys and values, see `UNet.forward`."""
        context = x if context is None else context
        q = self.to_q(x)                                                             # (B, N, C)
        k, v = cache.keys_values(self, context) if cache else (self.to_k(context), self.to_v(context))  # (B, M, C)
        return self.to_out(self.attend(q, k, v, self.heads, mask))


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
    """Position-wise feed-forward network: GEGLU to mult * dim, then a linear layer back."""

    def __init__(self, dim: int, mult: int = 4):
        super().__init__()
        # Index 1 was dropout in Stable Diffusion's training; the identity preserves the key net.2.
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention, feed-forward, each with a residual connection."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, cache=None) -> Tensor:
        """x (B, N, C), context (B, M, T) -> (B, N, C); k contexts for each x: (kB, M, T) -> (kB, N, C)."""
        x = repeat_for_contexts(x + self.attn1(self.norm1(x)), context)
        x = x + self.attn2(self.norm2(x), context, cache=cache)
        return x + self.ff(self.norm3(x))


class TokenConv(nn.Conv2d):
    """1x1 convolution over tokens: a linear layer whose weight is (outputs, inputs, 1, 1)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, inputs) -> (B, N, outputs)."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """Spatial transformer: a transformer block over the cells of a feature map, with a residual connection.

    linear: whether proj_in and proj_out hold linear weights (SD 2.x) or those of 1x1
    convolutions (SD 1.x), which is the same arithmetic. proj_out is initialised to zero, as in the
    training of Stable Diffusion: before training the module is the identity.
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

    def forward(self, x: Tensor, context: Tensor, cache=None) -> Tensor:
        """x (B, C, h, w), context (B, M, T) -> (B, C, h, w); batch and cache as in `TransformerBlock`."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = self.proj_in(tokens)                                        # (B, N, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, cache)
        tokens = self.proj_out(tokens)
        return repeat_for_contexts(x, context) + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


@contextmanager
def replace_attention(functions: Mapping[CrossAttention, Callable[..., Tensor]]) -> Iterator[None]:
    """Inside, each layer computes attention by its function, of the arguments of `attend`; afterwards as before."""
    before = {layer: layer.attend for layer in functions}
    try:
        for layer, function in functions.items():
            layer.attend = function
        yield
    finally:
        for layer, function in before.items():
            layer.attend = function


@contextmanager
def eager_attention(*models: nn.Module, largest: int = SMALL_MAP) -> Iterator[None]:
    """Inside, the models compute small attention maps explicitly, by matrix products: for training on a CPU.

    There the fused kernel's backward pass takes several times as long as that of the plain products (a quarter of
    a training step of `mini`); it saves the memory of the maps. So maps of more than `largest` numbers, queries
    times keys of one head, are left to the kernel.
    """
    def attend_eagerly(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if q.shape[1] * k.shape[1] > largest:
            return attend(q, k, v, heads, mask)
        return merge_heads(attention_map(q, k, heads, mask) @ split_heads(v, heads))

    layers = [layer for model in models for layer in model.modules() if isinstance(layer, CrossAttention)]
    with replace_attention(dict.fromkeys(layers, attend_eagerly)):
        yield


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
