"""The U-Net compiled by torch.compile: the same output up to rounding, faster, after a minute or more of compiling.

B  batch        C, h, w  channels, rows and columns of the latent        M, T  text tokens and their width
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import CrossAttention
from ..unet import UNet, add_residuals
from .cache import ConditioningCache

MANY_SHAPES = 64            # sizes and batches that may each be compiled; PyTorch gives up after 8
FEW_ROWS = 16               # of a linear layer's input, below which oneDNN's overhead exceeds its computation


class CompiledUNet:
    """Compiled U-Net with the arguments and result of `UNet.forward`. Inference only.

    Compiled at its first call, once for each size and batch. The compiled function takes the time embedding and each
    layer's keys and values as inputs, so that both can come from a cache: see `cache.ConditioningCache`. On a CPU the
    weights become constants, laid out for the kernels (`fresh` is False once they have changed), and linear layers
    run by oneDNN (`LinearByOneDNN`). On a GPU the kernels of a call are one CUDA graph; without `graphs` they are
    launched one by one.
    """

    def __init__(self, unet: UNet, graphs: bool = True):
        self.unet, self.config = unet, unet.config
        self.on_gpu = unet.conv_in.weight.device.type == "cuda"
        self.graphs = graphs and self.on_gpu
        self.layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
        multiply = LinearByOneDNN if not self.on_gpu and torch.backends.mkldnn.is_available() else nullcontext
        self.step = torch.compile(partial(_step, unet, self.layers, multiply), fullgraph=True, dynamic=False,
                                  mode="reduce-overhead" if self.graphs else None)
        self.versions = self._versions()

    def __call__(self, x: Tensor, t: Tensor | float, context: Tensor, residuals: Sequence[Tensor] | None = None,
                 cache: ConditioningCache | None = None) -> Tensor:
        self.unet.check_inputs(x, t, context)
        cache = cache or ConditioningCache()
        with torch.no_grad():
            pairs = [cache.keys_values(layer, context) for layer in self.layers]
            temb = cache.embed_time(self.unet, t, x)
            with compiler_settings(freezing=not self.on_gpu):
                if not self.graphs:
                    return self.step(x, temb, pairs, residuals)
                torch.compiler.cudagraph_mark_step_begin()
                return self.step(x, temb, pairs, residuals).clone()     # the graph writes into the same place again

    @property
    def fresh(self) -> bool:
        """Whether the weights are unchanged since they were compiled."""
        return self.versions == self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self.unet.parameters()]


def _step(unet: UNet, layers: list[CrossAttention], multiply: Callable, x: Tensor, temb: Tensor,
          pairs: list[tuple[Tensor, Tensor]], residuals: Sequence[Tensor] | None) -> Tensor:
    cache, context = GivenKeys(dict(zip(layers, pairs, strict=True))), pairs[0][0]      # of context only len is read
    with multiply():
        features = unet.encode(x, temb, context, cache=cache)
        if residuals is not None:
            features = add_residuals(features, residuals)
        return unet.decode(features, temb, context, cache)


@dataclass
class GivenKeys:
    """A cache of the keys and values of one context, by layer."""

    pairs: dict[CrossAttention, tuple[Tensor, Tensor]]

    def keys_values(self, layer: CrossAttention, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs[layer]


class LinearByOneDNN(TorchFunctionMode):
    """Linear layers computed by oneDNN, as convolutions are, not by MKL: the same sums in another order.

    MKL knows AVX-512 on Intel's processors only; on an AMD EPYC with AVX-512 oneDNN multiplies twice as fast.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].shape[:-1].numel() >= FEW_ROWS and args[0].dtype == torch.float32:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return function(*args, **(kwargs or {}))


@contextmanager
def compiler_settings(freezing: bool):
    """Options of torch.compile: freezing makes weights constants; up to `MANY_SHAPES` recompilations."""
    with torch._dynamo.config.patch(recompile_limit=MANY_SHAPES), torch._inductor.config.patch(freezing=freezing):
        yield
