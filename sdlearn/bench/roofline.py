"""The least time and the memory that sampling takes, by arithmetic: nothing is computed, the full size fits anywhere.

A layer moves its input, its output and its weights through memory once, at least, and multiplies. It takes no less time
than the slower of the two: its FLOPs at the chip's peak, its bytes at the memory's bandwidth (Williams et al. 2009,
"Roofline").

B  batch    C, h, w  channels, rows and columns of the latent    M, T  text tokens and their width
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..attention import CrossAttention
from ..clip import TextEncoder
from ..config import ModelConfig, UNetConfig, VAEConfig
from ..diagnostics.attention import attention_cost
from ..diagnostics.costs import TOKENS, empty_unet, roofline_seconds
from ..vae import VAE
from .machine import Peak

KINDS = {nn.Conv2d: "convolutions", nn.Linear: "linear layers", nn.GroupNorm: "norms", nn.LayerNorm: "norms",
         CrossAttention: "attention"}


@dataclass(frozen=True)
class Work:
    """What layers of one kind do in one pass. bytes: read and written, each tensor once."""

    layers: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.layers + other.layers, self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte. Above peak.flops / peak.bandwidth the multiplying takes longer, below it the moving."""
        return self.flops / self.bytes


def work(config: UNetConfig, side: int, batch: int = 2, bytes_each: int = 2) -> list[tuple[str, Work]]:
    """(kind, work) of every layer in one pass of a U-Net for `batch` latents of side x side cells.

    batch: 2 for one guided image. bytes_each: of a number, 2 in half precision. Sums, activations and the layout of
    tokens are left out: a compiler joins them with what stands before them.
    """
    unet, found = empty_unet(config), []
    with watched(unet, bytes_each, found), torch.device("meta"), torch.no_grad():
        unet(torch.empty(batch, config.in_channels, side, side), torch.empty(1),
             torch.empty(batch, TOKENS, config.context_dim))
    return found


def decoder_work(config: VAEConfig, side: int, batch: int = 1, bytes_each: int = 2) -> list[tuple[str, Work]]:
    """(kind, work) of every layer while a VAE decodes `batch` latents of side x side cells. Its attention, a single
    one, is counted by its linear layers alone."""
    found = []
    with torch.device("meta"), torch.no_grad():
        vae = VAE(config)
        with watched(vae, bytes_each, found):
            vae.decode(torch.empty(batch, config.latent_channels, side, side))
    return found


@contextmanager
def watched(model: nn.Module, bytes_each: int, found: list[tuple[str, Work]]) -> Iterator[None]:
    """Inside, every layer of `KINDS` that runs adds its work to `found`."""
    def after(layer: nn.Module, inputs: tuple, output: torch.Tensor):
        kind = KINDS.get(type(layer), "linear layers")          # 1x1 convolutions over tokens are linear
        found.append((kind, work_of(layer, inputs, output, bytes_each)))

    hooks = [layer.register_forward_hook(after) for layer in model.modules()
             if isinstance(layer, tuple(KINDS))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def work_of(layer: nn.Module, inputs: tuple, output: torch.Tensor, bytes_each: int) -> Work:
    """Of attention: the two products alone, as its linear layers are layers of their own."""
    x = inputs[0]
    if isinstance(layer, CrossAttention):
        (batch, queries, channels), keys = x.shape, (inputs[1] if len(inputs) > 1 else x).shape[1]
        flops, _ = attention_cost(queries, keys, channels, layer.heads)
        return Work(1, batch * flops, bytes_each * batch * channels * 2 * (queries + keys))     # q, k, v and the result
    moved = x.numel() + output.numel() + sum(p.numel() for p in layer.parameters())
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        return Work(1, 0, bytes_each * moved)
    return Work(1, 2 * output.numel() * prod(layer.weight.shape[1:]), bytes_each * moved)


def by_kind(found: list[tuple[str, Work]]) -> dict[str, Work]:
    """Sums over all layers of a kind."""
    sums: dict[str, Work] = {}
    for kind, one in found:
        sums[kind] = sums.get(kind, Work()) + one
    return sums


def least_seconds(found: list[tuple[str, Work]], peak: Peak) -> float:
    """The roofline of a pass: every layer at the chip's peak or at the memory's, whichever is slower."""
    return roofline_seconds([(one.flops, one.bytes) for _, one in found], peak.flops, peak.bandwidth)


def least_seconds_of_run(config: ModelConfig, size: int, peak: Peak, *, steps: int, batch: int = 1, guided: bool = True,
                         bytes_each: int = 2) -> float:
    """The roofline of images of size x size pixels: a whole pass of the U-Net at every step, for both halves of
    guidance if it is `guided`, and the decoder, for all of a batch at once. The text encoder is left out.

    The chip's peak is that of bfloat16: float32 gets nowhere near, and its share is small for that reason, too.
    """
    side = size // config.vae.factor
    return (steps * least_seconds(work(config.unet, side, batch * (2 if guided else 1), bytes_each), peak)
            + least_seconds(decoder_work(config.vae, side, batch, bytes_each), peak))


def memory_ledger(config: ModelConfig, size: int, batch: int = 1, bytes_each: int = 2) -> dict[str, int]:
    """Bytes by what they are for, while guided images of size x size pixels are made; they are not all there at once.

    Weights stay. "skips" are what the U-Net's way down keeps for its way up; "largest attention map" is there only
    where attention does not run fused; "decoder" is what the VAE's widest layer reads and writes, for one image.
    """
    side, both = size // config.vae.factor, 2 * batch
    with torch.device("meta"):
        parts = {"text encoder": TextEncoder(config.text), "U-Net": empty_unet(config.unet), "VAE": VAE(config.vae)}
        unet, width = parts["U-Net"], config.unet.context_dim
        x, text = torch.empty(both, config.unet.in_channels, side, side), torch.empty(both, TOKENS, width)
        with torch.no_grad():
            features = unet.encode(x, unet.embed_time(torch.empty(1), x), text)
    weights = {f"weights of the {name}": sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    level = next(i for i, has in enumerate(config.unet.attention) if has)
    cells, heads = (side >> level) ** 2, config.unet.heads_at(config.unet.channels[level])
    counts = weights | {"texts": text.numel(), "latents": x.numel(),
                        "skips": sum(f.numel() for f in features[:-1]),
                        "largest attention map": both * heads * cells**2,
                        "decoder": widest(parts["VAE"], torch.empty(1, *x.shape[1:], device="meta"))}
    return {name: bytes_each * count for name, count in counts.items()}


def widest(vae: VAE, latent: torch.Tensor) -> int:
    """Numbers that the convolution with the largest maps reads and writes while a latent is decoded."""
    seen = [0]
    hooks = [layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel() + output.numel()))
             for layer in vae.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        vae.decode(latent)
    for hook in hooks:
        hook.remove()
    return max(seen)
