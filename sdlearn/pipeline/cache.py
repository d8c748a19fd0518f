"""Cache of what no step of a sampling run changes: keys and values of the text, embeddings of the timesteps.

B  batch            M, T  text tokens and their channels        C  channels of an attention layer
S  timesteps        E     channels of the time embedding
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ..attention import CrossAttention
from ..unet import Encoder, on_device


class ConditioningCache:
    """Keys and values of each context, and time embeddings, computed once; the `cache` of `UNet.forward`.

    timesteps: those of the run. Inference only: a second backward pass through a cached key would fail. Valid as
    long as the weights and the contexts do not change. A context is recognised by identity, not by its numbers,
    and stays in memory with the cache.
    """

    def __init__(self, timesteps: Sequence[float] = ()):
        self.rows = {t: row for row, t in enumerate(dict.fromkeys(map(float, timesteps)))}
        self.pairs: dict[tuple[CrossAttention, Tensor], tuple[Tensor, Tensor]] = {}
        self.embeddings: dict[Encoder, Tensor] = {}

    def keys_values(self, layer: CrossAttention, context: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (B, M, C) of a context (B, M, T)."""
        if (layer, context) not in self.pairs:                      # tensors are hashed by identity
            self.pairs[layer, context] = layer.to_k(context), layer.to_v(context)
        return self.pairs[layer, context]

    def embed_time(self, network: Encoder, t: Tensor | float, x: Tensor) -> Tensor:
        """`network.embed_time(t, x)`; those of the run are computed together, at the first call: (1, E)."""
        if isinstance(t, Tensor) or t not in self.rows:
            return network.embed_time(t, x)
        if network not in self.embeddings:
            self.embeddings[network] = network.embed_time(on_device(list(self.rows), x), x)      # (S, E)
        row = self.rows[t]
        return self.embeddings[network][row:row + 1]


def with_cache(network: Callable[..., Tensor], timesteps: Sequence[float]) -> Callable[..., Tensor]:
    """The network with a `ConditioningCache` for one sampling run over these timesteps; others work uncached.

    network: a UNet, or a function of the same arguments that passes `cache` on, such as `controlnet.add_control` and
    `inpaint.nine_channels` return.
    """
    return partial(network, cache=ConditioningCache(timesteps))
