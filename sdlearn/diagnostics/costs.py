"""What a pass of a U-Net costs, counted on PyTorch's device `meta`, which knows shapes alone: nothing is computed, and
the full-size models take no memory; and what costs come to: seconds on a chip, chips for a service."""

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
    """A U-Net without numbers."""
    with torch.device("meta"):
        return UNet(config)


def empty_pass(unet: UNet, side: int, tokens: int = TOKENS):
    """Send an empty latent of side x side cells and an empty text through an empty U-Net, for hooks and counters."""
    config = unet.config
    with torch.device("meta"), torch.no_grad():
        unet(torch.empty(1, config.in_channels, side, side), torch.empty(1), torch.empty(1, tokens, config.context_dim))


def layer_flops(config: UNetConfig, side: int, tokens: int = TOKENS) -> dict[str, dict[str, int]]:
    """Floating-point operations of one pass for one latent of side x side cells, by a layer's name, "" for the whole,
    and by the name of PyTorch's operation. A multiplication and its addition are two."""
    unet = empty_unet(config)
    with FlopCounterMode(display=False) as counter:
        empty_pass(unet, side, tokens)
    counts = counter.get_flop_counts()
    return {name.partition(".")[2]: {str(kind): count for kind, count in kinds.items()}
            for name, kinds in counts.items() if name != "Global"}


@lru_cache
def step_flops(config: UNetConfig, side: int, tokens: int = TOKENS) -> int:
    """Floating-point operations of one pass of a U-Net for one latent of side x side cells."""
    return sum(layer_flops(config, side, tokens)[""].values())


def conv_cost(rows: int, columns: int, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, batch: int = 1,
              bytes_each: int = 2) -> tuple[int, int]:
    """(FLOPs, bytes moved) of a convolution over maps of rows x columns, padded by kernel // 2, with a bias.

    A multiplication and its addition are two FLOPs; adding the bias is not counted. Bytes: input, output, weight and
    bias through memory once each. bytes_each: of a number, 2 in half precision.
    """
    cells = -(-rows // stride) * -(-columns // stride)                  # of the output: an odd number is rounded up
    numbers = batch * (rows * columns * inputs + cells * outputs) + outputs * (inputs * kernel**2 + 1)
    return 2 * batch * cells * outputs * inputs * kernel**2, bytes_each * numbers


def roofline_seconds(works: Iterable[tuple[float, float]], flops_a_second: float, bytes_a_second: float) -> float:
    """The least time of operations, (FLOPs, bytes) each, that run one after the other on a chip with these peaks.

    Each multiplies while it moves, so it takes the longer of the two. Williams et al. 2009, "Roofline".
    """
    return sum(max(flops / flops_a_second, moved / bytes_a_second) for flops, moved in works)


def fleet(rate: float, seconds: Mapping[int, float], within: float, *, busy: float = 0.7) -> tuple[int, int]:
    """(batch, chips) of the cheapest service for `rate` images a second that answers within `within` seconds.

    seconds: by batch size, of one chip for such a batch. The first image of a batch waits for the others,
    (batch - 1) / rate, and for the batch; queues before the chips come on top. busy: the share of time that chips work
    on average, since demand comes in bursts. Of batches that need as few chips, the smallest. Raises ValueError where
    no batch is ready in time.
    """
    ready = [batch for batch, each in seconds.items() if (batch - 1) / rate + each <= within]
    if not ready:
        raise ValueError(f"no batch is ready within {within:g} s: allow more time, or make images in fewer passes")
    chips = {batch: math.ceil(rate * seconds[batch] / batch / busy) for batch in ready}
    return min((count, batch) for batch, count in chips.items())[::-1]


class LiveBytes(TorchDispatchMode):
    """Inside, `now` are the bytes of all tensors that were made inside and are still in use, `peak` the most so far."""

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


STARTS_NOTHING = (torch.ops.aten._unsafe_view.default, torch.ops.prim.device.default)    # and are not told as views


class OperationCounter(TorchDispatchMode):
    """Inside, `count` are the operations that PyTorch starts so far; views of a tensor, which compute nothing, are left
    out. On a GPU each starts a kernel or more. (On `meta` attention falls into its parts; within `FakeTensorMode`
    it is one operation, as where it computes.)"""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function not in STARTS_NOTHING
        return function(*args, **(kwargs or {}))


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` take at one time, on any device, `meta` among them.

    Weights and other tensors that were there before are not counted, nor is what an operation needs for itself.
    """
    with torch.no_grad(), LiveBytes() as live:
        result = run()          # kept until the end, as whoever calls would keep it
    del result
    return live.peak
