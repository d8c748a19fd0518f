"""What a pass of a U-Net costs, counted on PyTorch's device `meta`, which knows shapes alone: nothing is computed, and
the full-size models take no memory."""

import weakref
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .config import UNetConfig
from .unet import UNet

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
