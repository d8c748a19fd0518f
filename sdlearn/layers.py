"""The U-Net's layers other than attention: time embedding, residual blocks, down- and upsampling.

B  batch        C  channels              E  channels of the time embedding
h, w  rows and columns of the feature map

Parameter names are those of diffusers' layers, so its weights load by name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal timestep embedding: cosines, then sines, of decreasing frequency.

    t: (B,), in 0...999, fractions allowed; dim: even. Gives (B, dim) in float32, on t's
    device. Frequencies as in Stable Diffusion: 10000^(-i / (dim/2)), i = 0 ... dim/2 - 1.
    Raises ValueError for an odd width. Vaswani et al. 2017; Ho et al. 2020.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the timestep embedding needs an even width of at least 2, not {dim}")
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / (dim // 2))
    angles = t.float()[:, None] * frequencies                        # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)           # (B, dim)


class TimeEmbedding(nn.Module):
    """Time embedding MLP: two linear layers with a SiLU, on the sinusoidal embedding."""

    def __init__(self, dim: int, embed_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """(B, dim) -> (B, E)."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResBlock(nn.Module):
    """Residual block, x + conv(conv(x) + time): norm and SiLU before each convolution.

    conv2 is initialised to zero, as in the training of Stable Diffusion, so that before training
    the block is the identity.
    """

    def __init__(self, inputs: int, outputs: int, embed_dim: int, groups: int = 32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-5)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_dim, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-5)
        self.conv2 = zero_module(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (B, inputs, h, w), temb (B, E) or (1, E) -> (B, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))                        # (B, outputs, h, w)
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Downsampling by a convolution of stride 2: half the rows and columns, rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2))."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to `size`, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, *size); without a size, twice the rows and columns.

        A size is needed to undo a Downsample of an odd number of rows or columns.
        """
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def zero_module(module: nn.Module) -> nn.Module:
    """The same module, with every parameter set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def zero_conv(channels: int) -> nn.Conv2d:
    """Zero convolution: 1x1, weight and bias initialised to zero. Zhang et al. 2023, ControlNet.

    Added to a trained model it changes nothing at first, yet learns: the gradient of its
    weight is its input times the upstream gradient, neither of them zero.
    """
    return zero_module(nn.Conv2d(channels, channels, 1))
