"""ControlNet: a trainable copy of the U-Net's encoder that adds a spatial condition, an image, to its features.

B  batch    C, h, w  channels, rows and columns of a feature map    H, W  pixels of the hint
M, T  text tokens and their channels

    hint ── hint encoder ──┐
    x ──── conv_in ────────+── down ── mid              the copy, trained
              │                 │       │
           zero conv        zero convs  zero conv
              +                 +       +
    x ── conv_in ────────── down ───── mid ── up        the U-Net, frozen

The copy is the U-Net's own `Encoder`. Its features reach the U-Net through zero convolutions: 1x1 and
initialised to zero, so an untrained ControlNet changes no bit of the output, yet learns from the first step on.
The hint is an image (edges, depth, a pose) in [0, 1] at the size of the image to be made.
Parameter names are those of diffusers' `ControlNetModel`. Zhang et al. 2023, "Adding conditional
control to text-to-image diffusion models".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ControlNetConfig, UNetConfig
from .layers import zero_conv, zero_module
from .schedule import Timesteps
from .unet import Encoder, UNet


class HintEncoder(nn.Module):
    """Convolutional encoder of the hint: pixels to features of the latent's size; the last layer starts at zero."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        first, *rest = config.hint_widths
        self.conv_in = nn.Conv2d(config.hint_channels, first, 3, padding=1)
        self.blocks = nn.ModuleList()
        for inputs, outputs in zip(config.hint_widths, rest, strict=False):
            self.blocks.append(nn.Conv2d(inputs, inputs, 3, padding=1))
            self.blocks.append(nn.Conv2d(inputs, outputs, 3, padding=1, stride=2))
        self.conv_out = zero_module(nn.Conv2d(config.hint_widths[-1], config.unet.channels[0], 3, padding=1))

    def forward(self, hint: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        for conv in [self.conv_in, *self.blocks]:
            hint = F.silu(conv(hint))
        return self.conv_out(hint)


class ControlNet(Encoder):
    """ControlNet: the encoder of a U-Net that also reads a hint, and returns residuals for the U-Net's features.

    `config` is the encoder's, `control_config` the whole.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.control_config = config
        self.controlnet_cond_embedding = HintEncoder(config)
        *skips, middle = self.feature_channels
        self.controlnet_down_blocks = nn.ModuleList(zero_conv(channels) for channels in skips)
        self.controlnet_mid_block = zero_conv(middle)

    @classmethod
    def from_unet(cls, unet: UNet, *, hint_channels: int = 3,
                  hint_widths: tuple[int, ...] = (16, 32, 96, 256)) -> "ControlNet":
        """An untrained ControlNet whose encoder is a copy of the U-Net's, on its device and in its type.

        A ControlNet reads the latent and nothing else. Of an inpainting U-Net's nine channels the
        first four are the latent, so of conv_in's weights those four are copied, and the ControlNet
        serves the inpainting model and its base alike.
        """
        latent = unet.config.out_channels
        net = cls(ControlNetConfig(replace(unet.config, in_channels=latent), hint_channels, hint_widths))
        fresh = net.state_dict()
        copied = {name: tensor for name, tensor in unet.state_dict().items() if name in fresh}
        copied["conv_in.weight"] = copied["conv_in.weight"][:, :latent]
        net.load_state_dict({**fresh, **copied}, strict=True)
        return net.to(unet.conv_in.weight)

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor, hint: Tensor, *,
                conditioning_scale: float = 1.0, guess_mode: bool = False) -> list[Tensor]:
        """The residuals of the U-Net's features, skips first, then the middle, as `UNet.forward` takes them.

        x (B, 4, h, w), the noisy latent that the U-Net sees; t a number or (B,); context (B, M, T).
        hint (B, 3, H, W) or (1, 3, H, W), in [0, 1]. conditioning_scale multiplies all of it. guess_mode: see
        `guess_scales`. Raises ValueError, in a sentence, for shapes that do not fit.
        """
        self.check_hint(hint, tuple(x.shape[2:]))
        return self.residuals(x, t, context, self.encode_hint(hint),
                              conditioning_scale=conditioning_scale, guess_mode=guess_mode)

    def encode_hint(self, hint: Tensor) -> Tensor:
        """Encode hints, (B, 3, H, W) in [0, 1] -> (B, C, h, w). Independent of the timestep: once for an image."""
        self.check_hint(hint)
        return self.controlnet_cond_embedding(hint)

    def residuals(self, x: Tensor, t: Tensor | float, context: Tensor, encoded: Tensor, *,
                  conditioning_scale: float = 1.0, guess_mode: bool = False, cache=None) -> list[Tensor]:
        """`forward` for a hint encoded by `encode_hint`. A batch of hints is repeated where x holds the batch
        several times, as guidance's [u; c] does. cache: as in `UNet.forward`."""
        self.check_inputs(x, t, context)
        if encoded.shape[2:] != x.shape[2:]:
            raise ValueError(_another_size([side * self.control_config.factor for side in encoded.shape[2:]],
                                           x.shape[2:], self.control_config.factor))
        if len(x) % len(encoded):
            raise ValueError(f"{len(encoded)} hints do not go with {len(x)} latents: "
                             "give one hint for all, or one for each")
        encoded = encoded.repeat(len(x) // len(encoded), 1, 1, 1)                    # (B, C, h, w)
        temb = cache.embed_time(self, t, x) if cache else self.embed_time(t, x)      # (B, E) or (1, E)
        features = self.encode(x, temb, context, encoded, cache)
        convs = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        scales = guess_scales(len(convs)) if guess_mode else [1.0] * len(convs)
        return [conditioning_scale * scale * conv(feature)
                for scale, conv, feature in zip(scales, convs, features, strict=True)]

    def check_hint(self, hint: Tensor, cells: tuple[int, int] | None = None) -> None:
        """Raise ValueError for a hint that this model cannot read, or that does not fit a latent's (h, w)."""
        channels, factor = self.control_config.hint_channels, self.control_config.factor
        if hint.ndim != 4 or hint.shape[1] != channels or not hint.is_floating_point():
            raise ValueError(f"the hint is {hint.dtype} {tuple(hint.shape)}, but this ControlNet reads "
                             f"floating-point images (batch, {channels}, rows, columns) in [0, 1]")
        sides = hint.shape[2:]
        if cells is not None and [side * factor for side in cells] != list(sides):
            raise ValueError(_another_size(sides, cells, factor))
        if any(side < factor or side % factor for side in sides):
            raise ValueError(f"the hint is {sides[0]} x {sides[1]} pixels (height x width): give sides that "
                             f"are multiples of {factor}")


def zero_conv_gradients(weight: Tensor, x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of a 1x1 convolution y = W x + b: the gradients of W (C, C), b (C,) and x (B, C, h, w).

    weight: (C, C), outputs by inputs; x: (B, C, h, w); grad_output: the upstream gradient dL/dy, of y's shape. At
    W = 0 the last is zero, the first two are not: the convolution learns at the first step, the layers before it
    from the second on.
    """
    return (torch.einsum("bohw,bihw->oi", grad_output, x), grad_output.sum(dim=(0, 2, 3)),
            torch.einsum("oi,bohw->bihw", weight, grad_output))


def guess_scales(n: int) -> list[float]:
    """Guess mode's factors of the n residuals: geometric, from 0.1 at the first skip to 1 in the middle.

    The middle holds the content of the image, the first skips little more than its lines; so the hint alone,
    with an empty prompt, leads to a sensible image. As in diffusers; the paper's own code has
    0.825^(n - 1 - i), which with 13 residuals is the same to 0.6 %.
    """
    return [10 ** (i / (n - 1) - 1) for i in range(n)]


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet, its hint, its conditioning scale, and the interval of a sampling run in which it applies.

    hint: (B, 3, H, W), or (1, 3, H, W) for all images, in [0, 1]. conditioning_scale multiplies the residuals
    (controlnet_conditioning_scale in diffusers). start, end: shares of the run (control_guidance_start and _end);
    step i of n is controlled if i/n >= start and (i+1)/n <= end. guess_mode: scale the residuals by `guess_scales`,
    and control only the half of the batch that has the prompt. Raises ValueError for numbers out of range and for a
    hint that the ControlNet cannot read.
    """

    net: ControlNet
    hint: Tensor
    conditioning_scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess_mode: bool = False

    def __post_init__(self):
        if not math.isfinite(self.conditioning_scale):
            raise ValueError(f"the conditioning scale is {self.conditioning_scale}: give a finite number, 1 for the "
                             "ControlNet as it was trained, 0 for none")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"the control starts at {self.start} and ends at {self.end}: give shares of the "
                             "sampling run, 0 <= start < end <= 1")
        self.net.check_hint(self.hint)
        if self.hint.device.type != "meta" and not bool(((self.hint >= 0) & (self.hint <= 1)).all()):
            raise ValueError("the hint has values outside of [0, 1]: bring pixels in [-1, 1] there by "
                             "(pixels + 1) / 2, bytes by dividing by 255")

    def bounds(self, grid: Timesteps) -> tuple[float, float] | None:
        """(low, high), the timesteps of the first and last controlled steps of a run; None if there are none."""
        n = len(grid)
        active = [t for i, (t, _) in enumerate(grid) if i / n >= self.start and (i + 1) / n <= self.end]
        return (active[-1], active[0]) if active else None


def add_control(unet: Callable[..., Tensor], controls: Sequence[Control], *, grid: Timesteps | None = None,
               batch: int | None = None) -> Callable[..., Tensor]:
    """The U-Net with ControlNets, as `guidance.predict_x0` takes it: (x, t, context, cache=None) -> output.

        predict_x0(add_control(unet, [Control(edges, hint)]), schedule, context, uncond, guidance_scale=7.5)

    unet: a UNet, or a function of the same arguments such as `inpaint.nine_channels` makes. The residuals
    of several controls are added up. grid: the run's, needed when a control starts late or ends early.
    batch: how many images are made, needed in guess mode: a batch of twice that is guidance's [u; c],
    whose first half gets no residuals. Hints are encoded here, once. Raises ValueError for a ControlNet
    of another version than the U-Net, and for a missing grid or batch.
    """
    for control in controls:
        if isinstance(unet, Encoder):
            check_version(control.net.config, unet.config)
        if grid is None and (control.start, control.end) != (0, 1):
            raise ValueError("a control that starts late or ends early needs the grid of the sampling run: give grid")
        if control.guess_mode and batch is None:
            raise ValueError("guess mode needs to know how many images are made, to tell the half of the batch "
                             "that has the prompt: give batch")
    bounds = [(-math.inf, math.inf) if grid is None else control.bounds(grid) for control in controls]
    hints = [control.net.encode_hint(control.hint.to(control.net.conv_in.weight)) for control in controls]

    @lru_cache      # one tensor for each context, since a cache of keys and values goes by identity
    def conditional_half(context: Tensor) -> Tensor:
        return context[batch:]

    def run(x: Tensor, t: float, context: Tensor, cache=None) -> Tensor:
        total = None
        for control, hint, interval in zip(controls, hints, bounds, strict=True):
            if interval is None or not interval[0] <= t <= interval[1]:
                continue
            half = control.guess_mode and context.shape[0] == 2 * batch
            residuals = control.net.residuals(
                x[-batch:] if half else x, t, conditional_half(context) if half else context, hint, cache=cache,
                conditioning_scale=control.conditioning_scale, guess_mode=control.guess_mode)
            if half:
                residuals = [torch.cat([torch.zeros_like(one), one]) for one in residuals]
            total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
        options = {"residuals": total, "cache": cache}
        return unet(x, t, context, **{name: value for name, value in options.items() if value is not None})

    return run


def check_version(control: UNetConfig, unet: UNetConfig) -> None:
    """Raise ValueError if a ControlNet with this encoder was made for another kind of U-Net."""
    for what, mine, wanted in [
        ("reads text {} wide", control.context_dim, unet.context_dim),
        ("reads latents of {} channels", control.in_channels, unet.out_channels),
        ("has feature maps of {} channels", control.channels, unet.channels),
        ("has {} ResBlocks in a level", control.layers_per_block, unet.layers_per_block),
    ]:
        if mine != wanted:
            raise ValueError(f"the ControlNet {what.format(mine)}, but the U-Net {what.format(wanted)}: take a "
                             "ControlNet made for this version of the model (text is 768 wide in SD 1.x, "
                             "1024 in SD 2.x)")


def _another_size(hint: Sequence[int], cells: Sequence[int], factor: int) -> str:
    rows, columns = (side * factor for side in cells)
    return (f"the hint is {hint[0]} x {hint[1]} pixels (height x width), but a latent of {cells[0]} x {cells[1]} "
            f"needs one of {rows} x {columns}, the image's size: resize the hint")
