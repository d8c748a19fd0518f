"""The U-Net as a compiled function: the same numbers up to rounding, sooner, after a minute or more of compiling.

B  batch        C, h, w  channels, rows and columns of the latent        M, T  text tokens and their width
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import CrossAttention, KeptText
from ..unet import UNet, add_residuals

MANY_SHAPES = 64            # sizes and batches that may each be compiled; PyTorch gives up after 8
FEW_ROWS = 16               # of a linear layer's input, below which oneDNN takes longer to begin than to compute


class CompiledUNet:
    """A UNet that is called as before: (x, t, context, residuals=None) -> (B, out_channels, h, w). For inference.

    Compiled at its first call, once for each size and batch. What is compiled takes the time embedding and each
    layer's keys and values of the text, so that the first are made once for a run and the second once for a text:
    see `unet.reusing`. On a CPU the weights become constants, laid out as the kernels read them, so `fresh` tells
    whether they have been changed since, and oneDNN multiplies (`LinearByOneDNN`). On a GPU the kernels of a call
    are one CUDA graph, launched at once; without `graphs` each is launched by itself.
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

    def __call__(self, x: Tensor, t: Tensor | float, context: Tensor | KeptText,
                 residuals: Sequence[Tensor] | None = None) -> Tensor:
        self.unet.check_inputs(x, t, context)
        text = context if isinstance(context, KeptText) else KeptText(context)
        with torch.no_grad():
            pairs = [text.keys_values(layer) for layer in self.layers]
            temb = self.unet.embed_time(t, x)
            with compiler_settings(freezing=not self.on_gpu):
                if not self.graphs:
                    return self.step(x, temb, pairs, residuals)
                torch.compiler.cudagraph_mark_step_begin()
                return self.step(x, temb, pairs, residuals).clone()     # the graph writes into the same place again

    @property
    def fresh(self) -> bool:
        """Whether the weights are those that were compiled."""
        return self.versions == self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self.unet.parameters()]


def _step(unet: UNet, layers: list[CrossAttention], multiply: Callable, x: Tensor, temb: Tensor,
          pairs: list[tuple[Tensor, Tensor]], residuals: Sequence[Tensor] | None) -> Tensor:
    text = KeptText(pairs[0][0])                        # only counted: all layers find their keys and values kept
    text.kept = dict(zip(layers, pairs, strict=True))
    with multiply():
        features = unet.encode(x, temb, text)
        if residuals is not None:
            features = add_residuals(features, residuals)
        return unet.decode(features, temb, text)


class LinearByOneDNN(TorchFunctionMode):
    """Linear layers by oneDNN, as convolutions are, in place of MKL: the same sums in another order.

    MKL knows AVX-512 on Intel's processors only; on an AMD EPYC with AVX-512 oneDNN multiplies twice as fast.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].shape[:-1].numel() >= FEW_ROWS and args[0].dtype == torch.float32:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return function(*args, **(kwargs or {}))


@contextmanager
def compiler_settings(freezing: bool):
    """PyTorch's compiler with weights as constants, or not, and with room for many shapes."""
    with torch._dynamo.config.patch(recompile_limit=MANY_SHAPES), torch._inductor.config.patch(freezing=freezing):
        yield
