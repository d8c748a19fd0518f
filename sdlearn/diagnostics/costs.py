"""FLOPs, memory and operations of a U-Net, counted on PyTorch's `meta` device, which has shapes but no data; and
what follows from them: a roofline estimate of the time on a chip, the chips of a service."""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..config import UNetConfig
from ..unet import UNet

TOKENS = 77


def empty_unet(config: UNetConfig) -> UNet:
    """A U-Net on the `meta` device, without data."""
    with torch.device("meta"):
        return UNet(config)


def empty_pass(unet: UNet, side: int, tokens: int = TOKENS):
    """Forward pass on `meta` for a latent of side x side cells and a context of `tokens`, for hooks and counters."""
    config = unet.config
    with torch.device("meta"), torch.no_grad():
        unet(torch.empty(1, config.in_channels, side, side), torch.empty(1), torch.empty(1, tokens, config.context_dim))


def layer_flops(config: UNetConfig, side: int, tokens: int = TOKENS) -> dict[str, dict[str, int]]:
    """FLOPs of one pass for one latent of side x side cells, by layer name ("" for the whole U-Net) and by the name of
    PyTorch's operation. A multiplication and its addition are two."""
    unet = empty_unet(config)
    with FlopCounterMode(display=False) as counter:
        empty_pass(unet, side, tokens)
    counts = counter.get_flop_counts()
    return {name.partition(".")[2]: {str(kind): count for kind, count in kinds.items()}
            for name, kinds in counts.items() if name != "Global"}


@lru_cache
def step_flops(config: UNetConfig, side: int, tokens: int = TOKENS) -> int:
    """FLOPs of one pass of a U-Net for one latent of side x side cells."""
    return sum(layer_flops(config, side, tokens)[""].values())


def conv_cost(rows: int, columns: int, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, batch: int = 1,
              bytes_each: int = 2) -> tuple[int, int]:
    """(FLOPs, bytes moved) of a convolution over maps of rows x columns, with padding kernel // 2 and a bias.

    A multiplication and its addition are two FLOPs; adding the bias is not counted. Bytes: input, output, weight and
    bias through memory once each. bytes_each: of a number, 2 in half precision.
    """
    cells = -(-rows // stride) * -(-columns // stride)                  # of the output: an odd number is rounded up
    numbers = batch * (rows * columns * inputs + cells * outputs) + outputs * (inputs * kernel**2 + 1)
    return 2 * batch * cells * outputs * inputs * kernel**2, bytes_each * numbers


def roofline_seconds(works: Iterable[tuple[float, float]], flops_a_second: float, bytes_a_second: float) -> float:
    """Roofline estimate: the least time in seconds of consecutive operations, (FLOPs, bytes) each, at these peak rates.

    Computation and memory traffic overlap, so each operation takes the longer of the two. Williams et al. 2009.
    """
    return sum(max(flops / flops_a_second, moved / bytes_a_second) for flops, moved in works)


def fleet(rate: float, seconds: Mapping[int, float], within: float, *, busy: float = 0.7) -> tuple[int, int]:
    """Fleet size: (batch, chips) of the cheapest service for `rate` images a second, each within `within` seconds.

    seconds: by batch size, of one chip for such a batch. The first image of a batch waits for the others,
    (batch - 1) / rate, and for the batch; queues before the chips come on top. busy: the share of time that chips work
    on average, since demand comes in bursts. Of batches that need equally few chips, the smallest. Raises ValueError
    where no batch is ready in time.
    """
    ready = [batch for batch, each in seconds.items() if (batch - 1) / rate + each <= within]
    if not ready:
        raise ValueError(f"no batch is ready within {within:g} s: allow more time, or make images in fewer passes")
    chips = {batch: math.ceil(rate * seconds[batch] / batch / busy) for batch in ready}
    return min((count, batch) for batch, count in chips.items())[::-1]


class LiveBytes(TorchDispatchMode):
    """Tracks live memory: `now`, bytes of tensors created inside that still exist; `peak`, its maximum so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and storage_of(one) not in self.known | given:
                self._born(one.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage):
        size, place = storage.nbytes(), storage._cdata
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.known.discard(place)
            self.now -= size
        weakref.finalize(storage, gone).atexit = False


NO_KERNEL = (torch.ops.aten._unsafe_view.default, torch.ops.prim.device.default)     # is_view is False for these


class OperationCounter(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, `count`, without views, which compute nothing. On a GPU each
    launches a kernel or more. (On `meta` attention is decomposed; within `FakeTensorMode` it is one operation, as on
    a real device.)"""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function not in NO_KERNEL
        return function(*args, **(kwargs or {}))


def storage_of(tensor: torch.Tensor) -> int:
    """An identifier of the tensor's memory, shared by its views."""
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak memory in bytes of the tensors that `run` creates, on any device, `meta` included.

    Tensors that existed before, such as weights, and the workspace inside an operation are not counted.
    """
    with torch.no_grad(), LiveBytes() as live:
        result = run()          # alive until the end, as it is for a caller
    del result
    return live.peak
