"""CLIP: a text encoder and an image encoder that meet in one space.

B  batch             D  channels of an encoder                S  channels of the shared space
L  tokens            N  patches and the class token, (image_size / patch_size)^2 + 1

Follows Radford et al. 2021, "Learning transferable visual models from natural language
supervision". Stable Diffusion is conditioned on the text encoder's hidden states; the vision
encoder serves to train it, and to judge images. Parameter names are those of transformers'
`CLIPTextModel`, `CLIPVisionModel` and `CLIPModel` (its version 5), so their weights load by
name. All LayerNorms have eps 1e-5, PyTorch's default and CLIP's.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .config import TextConfig, VisionConfig

MAX_SCALE = 100.0                   # of the logits, Radford et al., section 2.5
INITIAL_SCALE = 1 / 0.07            # the temperature that training starts from, ibid.


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{dim} channels do not split into {heads} heads: choose heads that divide them")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), mask (L, L), True where a row's token may look -> (B, L, D)."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class MLP(nn.Module):
    """Position-wise MLP."""

    def __init__(self, dim: int, hidden: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block: self-attention and MLP, each with a residual connection."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.dim)
        self.self_attn = SelfAttention(config.dim, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_dim, config.activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), mask (L, L) or None -> (B, L, D)."""
        x = self.self_attn(self.layer_norm1(x), mask) + x
        return self.mlp(self.layer_norm2(x)) + x


class Encoder(nn.Module):
    """A stack of transformer blocks."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.layers)])
        for layer in self.layers:
            _initialise(layer, config.dim, config.layers)

    def forward(self, x: Tensor, mask: Tensor | None = None, skip: int = 0) -> Tensor:
        """(B, L, D) -> (B, L, D); the last `skip` layers are left out."""
        for layer in self.layers[:len(self.layers) - skip]:
            x = layer(x, mask)
        return x


class TextEmbeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.length, config.dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextOutput(NamedTuple):
    """The text encoder's output; transformers' names are last_hidden_state (with layer=-1) and pooler_output."""

    hidden: Tensor                  # (B, L, D), after the final LayerNorm: the U-Net's context
    pooled: Tensor                  # (B, D), hidden at the end token, which summarises the text
    pre_norm: Tensor                     # (B, L, D)


class TextEncoder(nn.Module):
    """CLIP's text encoder: a causal transformer, in which a token attends to itself and those before it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.dim)

    def forward(self, ids: Tensor, *, layer: int = -1, end: int | None = None) -> TextOutput:
        """Token ids (B, L), start and end tokens included, L up to `config.length`.

        layer: which layer's output to give, -1 the last (SD 1.x), -2 the one before it (SD 2.x,
        where the config already leaves the last layer out); later layers are not computed.
        The final LayerNorm is applied in each case.
        end: id of the end token, at whose first place `pooled` is read; a row without it is
        read at its first token, as transformers does. Without `end` it is the largest id of
        the row, which is the end token's in CLIP's own vocabulary; pass `end` when words have
        been added. Causality makes `pooled` independent of the padding behind the end.
        A shorter L gives the same numbers as the first L places of a longer one.
        Raises ValueError for more than `config.length` tokens, a layer that is not there, or
        a tensor that is not (B, L) of integers.
        """
        self._check(ids, layer)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        raw = self.encoder(self.embeddings(ids), causal, skip=-1 - layer)                # (B, L, D)
        hidden = self.final_layer_norm(raw)
        places = (ids if end is None else (ids == end).int()).argmax(dim=1)              # (B,)
        rows = torch.arange(len(ids), device=ids.device)
        return TextOutput(hidden, hidden[rows, places], raw)

    def _check(self, ids: Tensor, layer: int) -> None:
        if ids.ndim != 2 or ids.shape[1] < 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids must be integers (batch, tokens), not {ids.dtype} {tuple(ids.shape)}")
        if ids.shape[1] > self.config.length:
            raise ValueError(f"{ids.shape[1]} tokens are too many for a text encoder with places for "
                             f"{self.config.length}: truncate the prompt")
        if not -self.config.layers <= layer <= -1:
            raise ValueError(f"layer {layer} is not there: choose -1, the last, to {-self.config.layers}")


class VisionEmbeddings(nn.Module):
    """Patch embedding: the class token, then a token for each patch, row by row; plus position embeddings."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(f"patches of {config.patch_size} pixels do not tile {config.image_size}: "
                             "choose a patch_size that divides image_size")
        patch = config.patch_size
        places = (config.image_size // patch) ** 2 + 1
        std = config.dim ** -0.5                        # of everything that is added up, as in OpenAI's CLIP
        self.class_embedding = nn.Parameter(std * torch.randn(config.dim))
        self.patch_embedding = nn.Conv2d(3, config.dim, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(places, config.dim)
        nn.init.normal_(self.position_embedding.weight, std=std)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)           # (B, N-1, D)
        whole = self.class_embedding.to(patches.dtype).expand(len(pixels), 1, -1)   # (B, 1, D)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight  # (B, N, D)


class VisionOutput(NamedTuple):
    """The image encoder's output; transformers' names are last_hidden_state and pooler_output."""

    hidden: Tensor                  # (B, N, D), the last layer's output, not normalised
    pooled: Tensor                  # (B, D), the class token after the last LayerNorm


class ImageEncoder(nn.Module):
    """CLIP's image encoder, a vision transformer (ViT) with full attention among patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim)    # the spelling is that of the checkpoints
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.dim)

    def forward(self, pixels: Tensor) -> VisionOutput:
        """Pixels (B, 3, H, W), H and W both `config.image_size`.

        The course's own encoders are trained on pixels in [-1, 1], like the autoencoder; OpenAI's
        weights expect colours normalised by the mean and standard deviation of their data.
        Raises ValueError for another size.
        """
        side = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side):
            raise ValueError(f"pixels must be (batch, 3, {side}, {side}) for this image encoder, "
                             f"not {tuple(pixels.shape)}: resize the images")
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))           # (B, N, D)
        return VisionOutput(hidden, self.post_layernorm(hidden[:, 0]))


class CLIP(nn.Module):
    """Both encoders, and the projections that bring them into one space.

    Raises ValueError if the two configs differ in `projection_dim`.
    """

    def __init__(self, text: TextConfig, vision: VisionConfig):
        super().__init__()
        if text.projection_dim != vision.projection_dim:
            raise ValueError(f"the encoders cannot meet: text projects to {text.projection_dim} channels, "
                             f"vision to {vision.projection_dim}; make projection_dim equal")
        self.text_model = TextEncoder(text)
        self.vision_model = ImageEncoder(vision)
        self.text_projection = nn.Linear(text.dim, text.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.dim, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))      # learned, as a logarithm
        nn.init.normal_(self.text_projection.weight, std=text.dim ** -0.5)
        nn.init.normal_(self.visual_projection.weight, std=vision.dim ** -0.5)

    def encode_text(self, ids: Tensor, *, end: int | None = None) -> Tensor:
        """Token ids (B, L) to unit vectors (B, S); `end` and errors as in `TextEncoder.forward`."""
        return F.normalize(self.text_projection(self.text_model(ids, end=end).pooled), dim=-1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to unit vectors (B, S); errors as in `ImageEncoder.forward`."""
        return F.normalize(self.visual_projection(self.vision_model(pixels).pooled), dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor, *, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Unit vectors of images (B, S) and of texts (B, S), as `contrastive_loss` takes them."""
        return self.encode_image(pixels), self.encode_text(ids, end=end)


def similarity_logits(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Scaled cosines of every image with every text, (images, texts), in float32.

    Both are unit vectors (B, S); `logit_scale` is the logarithm of the scale, which is kept at
    or below 100 for stability, as Radford et al. do.
    """
    # In bfloat16 a logit near 100 would be off by as much as 0.25, so autocast is kept out.
    with torch.autocast(image_embeds.device.type, enabled=False):
        scale = logit_scale.float().clamp(max=math.log(MAX_SCALE)).exp()
        return scale * image_embeds.float() @ text_embeds.float().T


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE, a scalar: which text belongs to each image, and which image to each text.

    Row i of both, unit vectors (B, S), belongs together; every other row serves as a wrong
    answer. `logit_scale`: see `similarity_logits`. Radford et al. 2021, figure 3.
    Raises ValueError if the shapes differ.
    """
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError("images and texts must come in pairs of one width, but their vectors are "
                         f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}")
    logits = similarity_logits(image_embeds, text_embeds, logit_scale)              # (B, B)
    matches = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


def _initialise(layer: EncoderLayer, dim: int, layers: int) -> None:
    """Random weights as OpenAI's CLIP begins: what is added to the residual stream is kept small."""
    attention, mlp = layer.self_attn, layer.mlp
    residual = dim ** -0.5 * (2 * layers) ** -0.5       # 2 additions in each layer
    for linear, std in [(attention.q_proj, dim ** -0.5), (attention.k_proj, dim ** -0.5),
                        (attention.v_proj, dim ** -0.5), (attention.out_proj, residual),
                        (mlp.fc1, (2 * dim) ** -0.5), (mlp.fc2, residual)]:
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
