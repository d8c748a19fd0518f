"""What a pass of a U-Net costs, counted on PyTorch's device `meta`, which knows shapes alone: nothing is computed, and
the full-size models take no memory."""

from functools import lru_cache

import torch
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
