"""The U-Net: predicts noise, v or x0 from a noisy latent, a timestep and the encoded text.

B  batch        h, w  rows and columns of the latent     E  channels of the time embedding
C  channels     M, T  text tokens and their channels

                 x ── conv_in ─┬─ down ─┬─ down ─┬─ mid ─┐
                               │ skips  │        │       │
      output ── conv_out ── up ┴─── up ─┴─── up ─┴───────┘

`Encoder` is everything up to and including the middle, `UNet` the whole; a ControlNet is
another `Encoder`. Parameter names are those of diffusers' `UNet2DConditionModel`, so its
weights load by name. Rombach et al. 2022; Ronneberger et al. 2015.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlearn.attention import SpatialTransformer, repeat_for_contexts
from sdlearn.config import UNetConfig
from sdlearn.layers import Downsample, ResBlock, TimeEmbedding, Upsample, timestep_embedding, zero_module


def skip_channels(config: UNetConfig) -> list[int]:
    """Channels of the skips, in the order in which they are made: conv_in's output, then level by level those of each
    ResBlock and, but for the lowest level, of the Downsample."""
    skips = [config.channels[0]]
    for level, width in enumerate(config.channels):
        lowest = level == len(config.channels) - 1
        skips += [width] * (config.layers_per_block + (not lowest))
    return skips


def up_inputs(config: UNetConfig) -> list[list[int]]:
    """Channels that each ResBlock on the way up reads, a list for each level, the lowest first: those that come from
    below and those of a skip. The skip that was made last is read first."""
    skips, below, inputs = skip_channels(config), config.channels[-1], []
    for width in reversed(config.channels):
        inputs.append([])
        for _ in range(config.layers_per_block + 1):
            inputs[-1].append(below + skips.pop())
            below = width
    return inputs


class NoAttention(nn.Module):
    """Identity, in place of a SpatialTransformer at levels without attention."""

    def forward(self, x: Tensor, context: Tensor, cache=None) -> Tensor:
        return x


def make_res_block(config: UNetConfig, inputs: int, outputs: int) -> ResBlock:
    """A ResBlock with the config's groups and width of the time embedding."""
    return ResBlock(inputs, outputs, embed_dim=4 * config.channels[0], groups=config.groups)


def make_transformer(config: UNetConfig, channels: int, attention: bool = True) -> nn.Module:
    """A SpatialTransformer with the config's heads, groups and projections, or `NoAttention`."""
    if not attention:
        return NoAttention()
    return SpatialTransformer(channels, config.context_dim, config.heads_at(channels),
                              linear=config.linear_projection, groups=config.groups)


class DownBlock(nn.Module):
    """One level of the encoder: ResBlocks, each with attention or none, then downsampling."""

    def __init__(self, config: UNetConfig, inputs: int, level: int):
        super().__init__()
        outputs, attention = config.channels[level], config.attention[level]
        widths = [inputs] + [outputs] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(make_res_block(config, width, outputs) for width in widths)
        self.attentions = nn.ModuleList(make_transformer(config, outputs, attention) for _ in widths)
        last = level == len(config.channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(outputs)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, cache=None) -> list[Tensor]:
        """The features after each step; the last is the next block's input."""
        features = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, temb), context, cache)
            features.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            features.append(x)
        return features


class MidBlock(nn.Module):
    """The bottleneck: ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList(make_res_block(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([make_transformer(config, width)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor, cache=None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        first, second = self.resnets
        return second(self.attentions[0](first(x, temb), context, cache), temb)


class UpBlock(nn.Module):
    """One level of the decoder: each ResBlock reads its input concatenated with a skip; then upsampling.

    inputs: the channels that each ResBlock reads, input and skip together.
    """

    def __init__(self, config: UNetConfig, inputs: Sequence[int], level: int):
        super().__init__()
        outputs, attention = config.channels[level], config.attention[level]
        self.resnets = nn.ModuleList(make_res_block(config, width, outputs) for width in inputs)
        self.attentions = nn.ModuleList(make_transformer(config, outputs, attention) for _ in inputs)
        self.upsamplers = nn.ModuleList([Upsample(outputs)] if level > 0 else [])

    def forward(self, x: Tensor, skips: Sequence[Tensor], temb: Tensor, context: Tensor,
                size: tuple[int, int], cache=None) -> Tensor:
        """(B, C, h, w) -> (B, outputs, *size). skips: in the order in which they are read. size: rows and columns of
        the level above, which cannot be inferred: odd numbers are rounded when halved."""
        for resnet, attention, skip in zip(self.resnets, self.attentions, skips, strict=True):
            x = attention(resnet(torch.cat([x, repeat_for_contexts(skip, x)], dim=1), temb), context, cache)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class Encoder(nn.Module):
    """The U-Net's encoder: the time embedding, the down blocks and the middle block.

    `feature_channels` holds the channels of what `encode` returns.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, 4 * width)
        inputs = (width, *config.channels)
        levels = range(len(config.channels))
        self.down_blocks = nn.ModuleList(DownBlock(config, inputs[level], level) for level in levels)
        self.mid_block = MidBlock(config)
        self.feature_channels = [*skip_channels(config), config.channels[-1]]

    def embed_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Time embedding: a number or (B,) timesteps -> (1, E) or (B, E), in x's dtype and on its device."""
        if not isinstance(t, Tensor):
            t = on_device([t], x)
        sinusoids = timestep_embedding(t.reshape(-1), self.config.channels[0])
        return self.time_embedding(sinusoids.to(x.dtype))

    def encode(self, x: Tensor, temb: Tensor, context: Tensor, hint: Tensor | None = None,
               cache=None) -> list[Tensor]:
        """The skips, from conv_in's output on, and the middle's output as the last.

        x (B, in_channels, h, w), temb (B, E), context (B, M, T). `hint` is added to conv_in's
        output: a ControlNet's condition enters there. With k contexts for each latent, (kB, M, T), the
        features have B rows up to the first cross-attention, and kB from there on.
        """
        x = self.conv_in(x)
        features = [x if hint is None else x + hint]
        for block in self.down_blocks:
            features += block(features[-1], temb, context, cache)
        return [*features, self.mid_block(features[-1], temb, context, cache)]

    def check_inputs(self, x: Tensor, t: Tensor | float, context: Tensor) -> None:
        """Raise ValueError, in one sentence, for inputs that this model cannot take."""
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x is {tuple(x.shape)}, but this model takes (batch, {config.in_channels}, "
                             "rows, columns)" + _about_channels(config.in_channels))
        rows = max(1, x.shape[0])
        if context.ndim != 3 or context.shape[0] % rows or context.shape[0] < rows or (
                context.shape[2] != config.context_dim):
            raise ValueError(f"context is {tuple(context.shape)}, but this model takes "
                             f"({x.shape[0]}, tokens, {config.context_dim}): one text for each latent, "
                             "encoded by the text encoder this model was trained with")
        if isinstance(t, Tensor) and (t.ndim > 1 or t.numel() not in (1, x.shape[0])):
            raise ValueError(f"t is {tuple(t.shape)}, but must be a number or one timestep for each of "
                             f"the {x.shape[0]} latents")
        if isinstance(t, Tensor) and t.numel() > 1 and context.shape[0] != x.shape[0]:
            raise ValueError(f"{context.shape[0]} texts for {x.shape[0]} latents need one timestep for all of them, "
                             f"but t is {tuple(t.shape)}: give a number")
        if isinstance(t, Tensor) and t.device != x.device:
            raise ValueError(f"t is on {t.device} but x on {x.device}: give a number, or move t first")


def on_device(times: Sequence[float], x: Tensor) -> Tensor:
    """Numbers of the host as a tensor (len(times),) on x's device, filled in there: no copy blocks the host."""
    return torch.cat([torch.full((1,), t, dtype=torch.float32, device=x.device) for t in times])


class UNet(Encoder):
    """Stable Diffusion's U-Net. It predicts what `NoiseConfig.prediction` says: noise, v or x0.

    A fresh model outputs zeros, because conv_out starts at zero, as in the training of
    Stable Diffusion.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        width, levels = config.channels[0], reversed(range(len(config.channels)))
        self.up_blocks = nn.ModuleList(
            UpBlock(config, inputs, level) for inputs, level in zip(up_inputs(config), levels, strict=True))
        self.conv_norm_out = nn.GroupNorm(config.groups, width, eps=1e-5)
        self.conv_out = zero_module(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor,
                residuals: Sequence[Tensor] | None = None, cache=None) -> Tensor:
        """The network's output for latents x at timesteps t, given the text.

        x: (B, in_channels, h, w), any h and w. t: a number or (B,), in 0...999, fractions
        allowed. context: (B, M, T), or (kB, M, T), k contexts for each latent in the order of a batch that
        is repeated k times; what does not depend on the context is then computed once. residuals: a
        ControlNet's, added to the features of `encode` in that order, the middle last, each of its
        feature's shape or broadcast over the batch. cache: an object with `keys_values(layer, context)` and
        `embed_time(network, t, x)`, as `pipeline.cache.ConditioningCache`, that stores both during a run.
        Returns (B, out_channels, h, w), or kB of them. Raises ValueError for shapes that do not fit.
        """
        self.check_inputs(x, t, context)
        temb = cache.embed_time(self, t, x) if cache else self.embed_time(t, x)      # (B, E) or (1, E)
        features = self.encode(x, temb, context, cache=cache)
        if residuals is not None:
            features = add_residuals(features, residuals)
        return self.decode(features, temb, context, cache)

    def decode(self, features: Sequence[Tensor], temb: Tensor, context: Tensor, cache=None) -> Tensor:
        """The output (B, out_channels, h, w) of `encode`'s features: the up blocks, then norm, SiLU and conv_out."""
        *skips, h = features
        rows_and_columns = skips[0].shape[2:]
        for block in self.up_blocks:
            skips, mine = skips[:-len(block.resnets)], skips[-len(block.resnets):]
            size = skips[-1].shape[2:] if skips else rows_and_columns
            h = block(h, mine[::-1], temb, context, size, cache)             # (B, C, *size)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def add_residuals(features: Sequence[Tensor], residuals: Sequence[Tensor]) -> list[Tensor]:
    """Feature-wise sum of features and residuals. Raises ValueError if their count or shapes differ."""
    if len(residuals) != len(features):
        raise ValueError(f"{len(residuals)} residuals given, but this U-Net adds {len(features)}: "
                         f"one to each of its {len(features) - 1} skips and one to the middle, which is last")
    for i, (feature, residual) in enumerate(zip(features, residuals, strict=True)):
        if residual.shape[1:] != feature.shape[1:] or len(residual) not in (1, len(feature), len(features[-1])):
            raise ValueError(f"residual {i} is {tuple(residual.shape)}, but must have its feature's shape "
                             f"{tuple(feature.shape)}: make it from a latent of this size")
    return [feature + residual if len(residual) == 1 else repeat_for_contexts(feature, residual) + residual
            for feature, residual in zip(features, residuals, strict=True)]


def _about_channels(channels: int) -> str:
    if channels == 9:
        return ": it is an inpainting model and reads latent, mask and masked latent, in that order"
    return ""
