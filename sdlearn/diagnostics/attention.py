"""Diagnostics of attention: recorded maps, heat maps of tokens, scores scaled for another size, FLOPs and memory.

B  batch            N  queries (cells h*w)     H  heads
h, w  rows and columns of the feature map      M  keys (cells or tokens)
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..attention import CrossAttention, attention_map, merge_heads, replace_attention, split_heads


@dataclass
class AttentionRecord:
    """Attention maps by layer name, each (B, H, N, M), of the latest forward pass."""

    maps: dict[str, Tensor] = field(default_factory=dict)

    def recorder(self, name: str):
        """An attention function, as `attention.attend`, that stores the map under `name`."""
        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
            self.maps[name] = attention_map(q, k, heads, mask)                   # (B, H, N, M)
            return merge_heads(self.maps[name] @ split_heads(v, heads))
        return attend


@contextmanager
def record_attention(model: nn.Module, only: str = "") -> Iterator[AttentionRecord]:
    """Record the attention maps of `model` inside a `with` block.

        with record_attention(unet, only="attn2") as record:
            unet(x, t, context)
        record.maps["mid_block.attentions.0.transformer_blocks.0.attn2"]    # (B, H, N, M)

    only: record the layers whose name contains this; "attn2" are the cross-attention layers, and without
    "attn1" N * N numbers for each head less are stored. The recorded layers compute softmax(q k^T) explicitly
    in place of the fused kernel, with equal results up to rounding. The record stays valid after the block;
    the model is restored, also after an error. Of nested recordings of one layer the innermost gets the maps.
    Raises ValueError if no layer's name contains `only`.
    """
    layers = attention_layers(model, only)
    if not layers:
        raise ValueError(f"nothing to record: no attention layer of this {type(model).__name__} "
                         f"has {only!r} in its name")
    record = AttentionRecord()
    with replace_attention({layer: record.recorder(name) for name, layer in layers.items()}):
        yield record


def attention_layers(model: nn.Module, only: str = "") -> dict[str, CrossAttention]:
    """The attention layers of a model, by name, of those whose name contains `only`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CrossAttention) and only in name}


def heat_maps(maps: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Cross-attention heat maps of the tokens: (B, M, rows, columns), which sum to 1 over the tokens.

    maps: of cross-attention layers, (B, H, N, M) each, as `record_attention` stores them. size: rows and columns
    of the result, the latent's or the image's. Each layer's mean over heads is reshaped to its feature map and
    enlarged (bilinear); the result is the mean over layers. Raises ValueError for no maps, and for a map whose
    number of queries fits no level of `size`. After Tang et al. 2023, "What the DAAM", who sum where this averages.
    """
    if not maps:
        raise ValueError("there are no attention maps: run the model inside `record_attention`, with only=\"attn2\"")
    layers = []
    for name, weights in maps.items():
        rows, columns = level_shape(size, weights.shape[2], name)
        cells = weights.mean(dim=1)                                              # (B, N, M)
        cells = rearrange(cells, "b (h w) m -> b m h w", h=rows, w=columns)
        layers.append(F.interpolate(cells.float(), size=size, mode="bilinear"))
    return torch.stack(layers).mean(dim=0)                                       # (B, M, *size)


def level_shape(size: tuple[int, int], cells: int, name: str) -> tuple[int, int]:
    """Rows and columns of the level with so many cells: `size` halved, rounding up, as often as necessary.

    name: the layer's, for the message of the ValueError where no level has that many.
    """
    rows, columns = size
    while rows * columns > cells:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != cells:
        raise ValueError(f"the map of {name or 'the layer'} has {cells} cells, which an image of {size[0]} rows and "
                         f"{size[1]} columns has at no level: give the size of the latent or of the image")
    return rows, columns


def attention_scale(tokens: float, trained: float) -> float:
    """Factor of the scores for `tokens` keys after training with `trained`: sqrt(log tokens / log trained).

    Softmax over more keys is flatter: its entropy grows like log tokens, less half the scores' variance. With this
    factor it stays the same share of log tokens, for scores that are normally distributed. ValueError below 2 tokens.
    Jin et al. 2023, "Training-free diffusion model adaptation for variable-sized text-to-image synthesis".
    """
    if tokens < 2 or trained < 2:
        raise ValueError(f"attention over {tokens} keys, in training {trained}: at least two are needed")
    return math.sqrt(math.log(tokens) / math.log(trained))


@contextmanager
def scaled_attention(model: nn.Module, area: float, only: str = "attn1") -> Iterator[None]:
    """Inside, the scores of self-attention are multiplied by `attention_scale`, for images of another size.

        with scaled_attention(unet, area=4):            # twice the width and height of training
            unet(x, t, context)

    area: cells of the image over cells of those of training, the same at every level. only: the layers whose
    name contains this. Raises ValueError where there are none, and for an area that is not above 0.
    """
    layers = attention_layers(model, only).values()
    if not layers or area <= 0:
        raise ValueError(f"nothing to scale: {len(layers)} attention layers of this {type(model).__name__} have "
                         f"{only!r} in their name, and the area is {area}")

    def scale_queries(to_q: nn.Module, inputs: tuple[Tensor], q: Tensor) -> Tensor:
        tokens = q.shape[1]
        if tokens < 2 or tokens / area < 2:             # softmax over one key is 1, whatever the score
            return q
        return q * attention_scale(tokens, tokens / area)

    hooks = [layer.to_q.register_forward_hook(scale_queries) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_cost(queries: int, keys: int, channels: int, heads: int, *, bytes_each: int = 2) -> tuple[int, int]:
    """(FLOPs of the two products q k^T and map v, bytes of the map), for one sample.

    A multiplication and its addition are two FLOPs. The linear layers around it are not counted: they grow with
    the cells, this with queries * keys. More heads share the same FLOPs, and have a map each. bytes_each: of a
    number in the map, 2 in half precision. A fused kernel never stores the whole map.
    """
    return 4 * queries * keys * channels, bytes_each * heads * queries * keys
