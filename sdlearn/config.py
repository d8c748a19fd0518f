"""Every number that shapes a model, and one table of presets.

A preset is a `ModelConfig`: five frozen dataclasses, one for each part. The same
classes describe `tiny` (tests, milliseconds), `mini` (the shipped model, a laptop's
CPU) and the full-size Stable Diffusion models, whose values follow the configs
published with their checkpoints.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net.

    `channels[i]` is the width of resolution level i, and `attention[i]` says whether that
    level attends to the text; SD's lowest level does not. Exactly one of `heads` (the same
    number of heads at every width, SD 1.x) and `head_dim` (the same width of a head,
    SD 2.x) is set.
    """

    in_channels: int = 4            # 9 for an inpainting model: latent 4, mask 1, masked latent 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2       # ResBlocks in a level on the way down; one more on the way up
    heads: int | None = 8
    head_dim: int | None = None
    context_dim: int = 768          # width of one text token
    linear_projection: bool = False  # proj_in and proj_out: 1x1 convolution (SD 1.x) or linear (SD 2.x)
    groups: int = 32                # of GroupNorm

    def __post_init__(self):
        if len(self.channels) != len(self.attention):
            raise ValueError(f"{len(self.channels)} levels of channels, but attention for {len(self.attention)}")
        if (self.heads is None) == (self.head_dim is None):
            raise ValueError("set exactly one of heads and head_dim")

    def heads_at(self, channels: int) -> int:
        """Number of attention heads of a block that is `channels` wide."""
        return self.heads if self.heads is not None else channels // self.head_dim


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a ControlNet: the encoder of a U-Net, and the small network that reads the hint, an image.

    Each width of the hint's network after the first comes with half the rows and columns, so that the
    hint arrives at the size of the latent: four widths for a VAE of factor 8, two for one of factor 2.
    """

    unet: UNetConfig = UNetConfig()
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    def __post_init__(self):
        if not self.hint_widths:
            raise ValueError("hint_widths is empty: give one width, and another for each halving of the hint")

    @property
    def factor(self) -> int:
        """Pixels of the hint along one side of a latent cell."""
        return 2 ** (len(self.hint_widths) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2       # ResBlocks in a level of the encoder; the decoder has one more
    groups: int = 32
    scaling_factor: float = 0.18215  # latents times this have a standard deviation near 1

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell: 8 for every Stable Diffusion."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Shape of CLIP's text encoder."""

    vocab_size: int = 49408
    dim: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    length: int = 77                # tokens, start and end included
    activation: str = "quick_gelu"  # or "gelu", the exact one
    projection_dim: int = 768       # of the space that text and images share
    pad_with_end: bool = True       # pad with the end-of-text token (SD 1.x) or with id 0 (SD 2.x)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of CLIP's image encoder."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    projection_dim: int = 768


@dataclass(frozen=True)
class NoiseConfig:
    """The forward process, and what the U-Net predicts."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"    # linear in the root of beta; or "linear", "cosine"
    prediction_type: str = "epsilon"             # or "v_prediction", "sample"
    zero_terminal_snr: bool = False         # rescale so that the last step holds no signal at all


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling settings of a model, for a caller who gives none. The values here are Stable Diffusion's."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5             # w in u + w (c - u); 1 is no guidance


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model. `vision` is only used to train `text` and to judge."""

    name: str
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    vision: VisionConfig | None = None
    noise: NoiseConfig = NoiseConfig()
    image_size: int = 512           # pixels, the side the model was trained at
    sampling: SamplingConfig = SamplingConfig()

    @property
    def latent_size(self) -> int:
        return self.image_size // self.vae.factor


SD15 = ModelConfig("sd15", vision=VisionConfig())
SD2_BASE = ModelConfig(
    "sd2_base",
    unet=UNetConfig(heads=None, head_dim=64, context_dim=1024, linear_projection=True),
    # OpenCLIP ViT-H has 24 text layers; SD 2.x reads the output of the 23rd, so 23 are kept.
    text=TextConfig(dim=1024, layers=23, heads=16, mlp_dim=4096, activation="gelu",
                    projection_dim=1024, pad_with_end=False),
)
MINI = ModelConfig(
    "mini",
    # Attention at 16x16 would halve the speed of training, and what lies at 4x4 hardly changes a picture of 128
    # pixels, so channels are spent above: of four shapes, each given six minutes of a core, this learnt fastest.
    unet=UNetConfig(channels=(96, 192, 192), attention=(False, True, False), layers_per_block=1,
                    heads=4, context_dim=192, groups=8),
    # GroupNorm over two channels of a flat patch keeps only their order, so a flat colour is lost in it:
    # with few channels, few groups.
    vae=VAEConfig(channels=(16, 32, 64, 160), layers_per_block=1, groups=2, scaling_factor=1.0),
    text=TextConfig(vocab_size=2048, dim=192, layers=3, heads=6, mlp_dim=768, projection_dim=192),
    vision=VisionConfig(image_size=128, patch_size=16, dim=128, layers=4, heads=4, mlp_dim=512,
                        projection_dim=192),
    noise=NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True),
    image_size=128,
    # Of the scales 1, 3, 5, 7.5 and 12 the one that follows most prompts: see the evaluation beside the weights.
    sampling=SamplingConfig(num_inference_steps=20, guidance_scale=3.0),
)
# A U-Net of 2.9 M parameters on `mini`'s autoencoder and encoders, to be trained from nothing in a lesson.
CLASSROOM = replace(MINI, name="classroom", unet=replace(MINI.unet, channels=(32, 64, 96),
                                                         attention=(False, True, True)))
TINY = ModelConfig(
    "tiny",
    unet=UNetConfig(channels=(8, 16), attention=(True, False), layers_per_block=1, heads=2,
                    context_dim=16, groups=4),
    vae=VAEConfig(channels=(4, 8), layers_per_block=1, groups=2, scaling_factor=1.0),
    text=TextConfig(vocab_size=600, dim=16, layers=2, heads=2, mlp_dim=32, projection_dim=16),
    vision=VisionConfig(image_size=32, patch_size=8, dim=16, layers=2, heads=2, mlp_dim=32,
                        projection_dim=16),
    image_size=32,
)

PRESETS: dict[str, ModelConfig] = {
    "tiny": TINY,
    "mini": MINI,
    "classroom": CLASSROOM,
    "sd15": SD15,
    "sd15_inpaint": replace(SD15, name="sd15_inpaint", unet=replace(SD15.unet, in_channels=9)),
    "sd2_base": SD2_BASE,
    "sd21": replace(SD2_BASE, name="sd21", noise=NoiseConfig(prediction_type="v_prediction"), image_size=768),
    "sd2_inpaint": replace(SD2_BASE, name="sd2_inpaint", unet=replace(SD2_BASE.unet, in_channels=9)),
}
