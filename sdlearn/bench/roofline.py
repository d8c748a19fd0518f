"""The roofline model of sampling: the least time, and the memory, counted on the meta device (Williams et al. 2009).

A layer moves at least its input, its output and its weights through memory once. It takes no less time than the slower
of the two: its FLOPs at the chip's peak, its bytes at the memory's bandwidth.

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
from .peaks import Peak

KINDS = {nn.Conv2d: "convolutions", nn.Linear: "linear layers", nn.GroupNorm: "norms", nn.LayerNorm: "norms",
         CrossAttention: "attention"}


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of layers in one pass. bytes: read and written, each tensor once."""

    layers: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.layers + other.layers, self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte: above peak.flops / peak.bandwidth compute-bound, below memory-bound."""
        return self.flops / self.bytes


def unet_work(config: UNetConfig, side: int, batch: int = 2, element_size: int = 2) -> list[tuple[str, Work]]:
    """(kind, work) of every layer in one pass of a U-Net for `batch` latents of side x side cells.

    batch: 2 for one guided image. element_size: bytes of a number, 2 in half precision. Sums, activations and reshapes
    are left out, as a compiler fuses them with the operation before them.
    """
    unet, found = empty_unet(config), []
    with record_work(unet, element_size, found), torch.device("meta"), torch.no_grad():
        unet(torch.empty(batch, config.in_channels, side, side), torch.empty(1),
             torch.empty(batch, TOKENS, config.context_dim))
    return found


def decoder_work(config: VAEConfig, side: int, batch: int = 1, element_size: int = 2) -> list[tuple[str, Work]]:
    """(kind, work) of every layer while a VAE decodes `batch` latents of side x side cells. Of its single
    attention only the linear layers are counted."""
    found = []
    with torch.device("meta"), torch.no_grad():
        vae = VAE(config)
        with record_work(vae, element_size, found):
            vae.decode(torch.empty(batch, config.latent_channels, side, side))
    return found


@contextmanager
def record_work(model: nn.Module, element_size: int, found: list[tuple[str, Work]]) -> Iterator[None]:
    """A context in which every layer of `KINDS` that runs adds its work to `found`."""
    def after(layer: nn.Module, inputs: tuple, output: torch.Tensor):
        kind = KINDS.get(type(layer), "linear layers")          # 1x1 convolutions over tokens are linear
        found.append((kind, layer_work(layer, inputs, output, element_size)))

    hooks = [layer.register_forward_hook(after) for layer in model.modules()
             if isinstance(layer, tuple(KINDS))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_work(layer: nn.Module, inputs: tuple, output: torch.Tensor, element_size: int) -> Work:
    """Work of one call of a layer. Attention: the two matrix products alone, as its linear layers are layers, too."""
    x = inputs[0]
    if isinstance(layer, CrossAttention):
        (batch, queries, channels), keys = x.shape, (inputs[1] if len(inputs) > 1 else x).shape[1]
        flops, _ = attention_cost(queries, keys, channels, layer.heads)
        return Work(1, batch * flops, element_size * batch * channels * 2 * (queries + keys))   # q, k, v, the output
    moved = x.numel() + output.numel() + sum(p.numel() for p in layer.parameters())
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        return Work(1, 0, element_size * moved)
    return Work(1, 2 * output.numel() * prod(layer.weight.shape[1:]), element_size * moved)


def sum_by_kind(found: list[tuple[str, Work]]) -> dict[str, Work]:
    """Sums over all layers of a kind."""
    sums: dict[str, Work] = {}
    for kind, one in found:
        sums[kind] = sums.get(kind, Work()) + one
    return sums


def least_seconds(found: list[tuple[str, Work]], peak: Peak) -> float:
    """Roofline time of a pass: every layer at the chip's peak or at the memory's, whichever is slower."""
    return roofline_seconds([(one.flops, one.bytes) for _, one in found], peak.flops, peak.bandwidth)


def least_seconds_of_run(config: ModelConfig, size: int, peak: Peak, *, steps: int, batch: int = 1, guided: bool = True,
                         element_size: int = 2) -> float:
    """Roofline time of a batch of images of size x size pixels: U-Net passes and the decoder, without the text encoder.

    guided: both halves of guidance at every step. The peak is that of bfloat16, which float32 cannot reach.
    """
    side = size // config.vae.factor
    return (steps * least_seconds(unet_work(config.unet, side, batch * (2 if guided else 1), element_size), peak)
            + least_seconds(decoder_work(config.vae, side, batch, element_size), peak))


def memory_breakdown(config: ModelConfig, size: int, batch: int = 1, element_size: int = 2) -> dict[str, int]:
    """Bytes by purpose, while guided images of size x size pixels are sampled; not all are allocated at once.

    "skips": the encoder's features for the skip connections; "largest attention map": allocated only where attention
    is not fused; "decoder": input and output of the VAE's largest convolution, for one image.
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
                        "decoder": largest_convolution(parts["VAE"], torch.empty(1, *x.shape[1:], device="meta"))}
    return {name: element_size * count for name, count in counts.items()}


def largest_convolution(vae: VAE, latent: torch.Tensor) -> int:
    """Elements of the input and output of the largest convolution while a latent is decoded."""
    seen = [0]
    hooks = [layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel() + output.numel()))
             for layer in vae.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        vae.decode(latent)
    for hook in hooks:
        hook.remove()
    return max(seen)
