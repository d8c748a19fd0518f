"""The autoencoder: images to latents with 8 times fewer rows and columns, and back.

B  batch             C     channels of a feature map     Z     channels of the latent
H, W  pixels         h, w  rows and columns of a feature map or latent

Follows Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models",
and Kingma & Welling 2014 for the Gaussian in the middle. Parameter names are those of
diffusers' `AutoencoderKL`, so its weights load by name; the numbers (eps 1e-6, the padding
of the downsampling, one attention head in the middle, logvar kept in -30...20) are those
of the autoencoder published with Stable Diffusion.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import attend
from .config import VAEConfig


@dataclass(frozen=True)
class DiagonalGaussian:
    """Diagonal Gaussian over latents, the encoder's posterior: mean and logvar, each (B, Z, h, w).

    diffusers calls it DiagonalGaussianDistribution.
    """

    mean: Tensor
    logvar: Tensor                  # natural logarithm of the variance

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split (B, 2Z, h, w) into mean and logvar, the latter kept in -30...20.

        Beyond that range exp would reach 0 or overflow float16 on the way to the sample.
        """
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30, 20))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, Z, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The likeliest latent, which is the mean: (B, Z, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, (B, Z, h, w): differentiable in both (the reparameterisation trick).

        With a generator on the CPU the noise is the same on every device.
        """
        place = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=place, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal in nats, summed for each image: (B,)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    """Residual block of two convolutions, x + conv(conv(x)); without the U-Net's time embedding."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the cells of a feature map, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)       # with biases, unlike the U-Net's
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))  # a Sequential for its key, to_out.0

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        cells = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        cells = attend(self.to_q(cells), self.to_k(cells), self.to_v(cells), heads=1)
        return rearrange(self.to_out(cells), "b (h w) c -> b c h w", h=x.shape[2]) + x


class MidBlock(nn.Module):
    """Middle block: ResBlock, self-attention, ResBlock, at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Downsampling by 2: a convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))        # one column at right, one row below; none elsewhere


class Upsample(nn.Module):
    """Upsampling by 2: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def make_resblocks(inputs: int, outputs: int, count: int, groups: int) -> nn.ModuleList:
    """`count` ResBlocks in a row, the first of which changes the width."""
    return nn.ModuleList([ResBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(count)])


class DownBlock(nn.Module):
    """One resolution level of the encoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool):
        super().__init__()
        self.resnets = make_resblocks(inputs, outputs, layers, groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h/2, w/2), the last level (B, outputs, h, w)."""
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One resolution level of the decoder."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, *, last: bool):
        super().__init__()
        self.resnets = make_resblocks(inputs, outputs, layers, groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, 2h, 2w), the last level (B, outputs, h, w)."""
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels to the mean and logvar of the latent, before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(inputs, outputs, config.layers_per_block, groups, last=last))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2Z, h, w)."""
        x = self.conv_in(pixels)                                    # (B, C, H, W)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)                                       # (B, C, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 2Z, h, w)


class Decoder(nn.Module):
    """The encoder's mirror image, one ResBlock a level richer."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            last = i == len(widths) - 1
            self.up_blocks.append(UpBlock(inputs, outputs, config.layers_per_block + 1, groups, last=last))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, Z, h, w) -> (B, 3, H, W)."""
        x = self.conv_in(latent)                                    # (B, C, h, w)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)                                            # (B, C, H, W) after the last
        return self.conv_out(F.silu(self.conv_norm_out(x)))         # (B, 3, H, W)


class VAE(nn.Module):
    """The autoencoder of Stable Diffusion.

    `encode` and `decode` know nothing of the scaling factor; `to_latent` and `to_pixels`
    apply it, and are what the diffusion model works with.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """Pixels (B, 3, H, W) in [-1, 1] to a Gaussian over unscaled latents, (B, Z, H/f, W/f).

        f is `config.factor`, 8 in Stable Diffusion. Raises ValueError if H or W is not a
        multiple of it, or the tensor is not a batch of floating-point images.
        """
        self._check_pixels(pixels)
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(pixels)))

    def decode(self, latent: Tensor, *, at_once: int | None = None) -> Tensor:
        """Unscaled latents (B, Z, h, w) to pixels (B, 3, f*h, f*w), near [-1, 1] but not clamped.

        at_once: decode so many images at a time, 1 for the least memory; all of them by
        default. The images are the same. Raises ValueError for a tensor of another shape.
        """
        self._check_latent(latent)
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once, the images decoded at a time, must be at least 1, not {at_once}")
        parts = latent.split(at_once or len(latent)) if len(latent) else (latent,)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """What training needs: pixels through a sampled latent and back, and the Gaussian."""
        posterior = self.encode(pixels)
        return self.decode(posterior.sample(generator)), posterior

    def to_latent(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, Z, h, w).

        The mode, or a sample if there is a generator. Errors as in `encode`.
        """
        posterior = self.encode(pixels)
        latent = posterior.mode() if generator is None else posterior.sample(generator)
        return latent * self.config.scaling_factor

    def to_pixels(self, latent: Tensor, *, at_once: int | None = None) -> Tensor:
        """Scaled latents (B, Z, h, w) to pixels (B, 3, H, W), near [-1, 1] but not clamped."""
        return self.decode(latent / self.config.scaling_factor, at_once=at_once)

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, factor = self.config.in_channels, self.config.factor
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ValueError(f"pixels must be (batch, {channels}, height, width), not {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be floating-point numbers in [-1, 1], but are {pixels.dtype}: "
                             "divide bytes by 127.5 and subtract 1")
        height, width = pixels.shape[2:]
        if height < factor or width < factor or height % factor or width % factor:
            near = " x ".join(str(max(round(side / factor), 1) * factor) for side in (height, width))
            raise ValueError(f"height and width must be multiples of {factor}, but the image is "
                             f"{height} x {width}: crop or resize it, for example to {near}")

    def _check_latent(self, latent: Tensor) -> None:
        channels = self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(f"latents must be (batch, {channels}, height, width), not {tuple(latent.shape)}")
