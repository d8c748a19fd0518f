"""LoRA: what a layer learns, as the product of two thin matrices.

r  rank     i, o  inputs and outputs of a layer     k  side of a convolution's kernel

    W + strength * alpha / r * up @ down            up (o, r), down (r, i)

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models". `up` starts at zero, so a fresh LoRA
changes nothing. For a convolution, down is (r, i, k, k) and up (o, r, 1, 1). A `LoRA` can be used in two
ways: `attach_lora` computes it beside the layers, which is how it is trained, and `MergedLoRAs` (merged.py) adds it
into their weights, which costs nothing at sampling and can be undone to the bit.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import TokenConv
from .loop import (
    LatentDiffusion,
    TrainStep,
    check_batch,
    check_images,
    diffusion_loss,
    draw_indices,
    encode_images,
    encode_prompts,
    encode_prompts_frozen,
    train,
)

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def lora_delta(down: Tensor, up: Tensor, alpha: float | None = None) -> Tensor:
    """alpha / r * up @ down, (o, i) from (r, i) and (o, r), or (o, i, k, k) from (r, i, k, k) and (o, r, 1, 1).

    alpha None is r: a scale of 1.
    """
    scale = 1.0 if alpha is None else alpha / len(down)
    product = up.flatten(1) @ down.flatten(1)                                       # (o, i*k*k)
    return scale * product.unflatten(1, down.shape[1:])


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one layer. alpha None is the rank: a scale of 1."""

    down: Tensor                    # (r, i) or (r, i, k, k)
    up: Tensor                      # (o, r) or (o, r, 1, 1)
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self) -> Tensor:
        """What it adds to the weight, (o, i) or (o, i, k, k)."""
        return lora_delta(self.down, self.up, self.alpha)


@dataclass(frozen=True, eq=False)
class LoRA:
    """The changes of a whole model, by the names of the layers in its U-Net and its text encoder."""

    unet: dict[str, LowRank] = field(default_factory=dict)
    text_encoder: dict[str, LowRank] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every down and up: what learns."""
        layers = (*self.unet.values(), *self.text_encoder.values())
        return [tensor for layer in layers for tensor in (layer.down, layer.up)]


class LoRALinear(nn.Module):
    """A linear layer with its LoRA as one module: the frozen layer, and beside it what learns.

    base(x) + alpha / r * up @ down @ x         down (r, i) random, up (o, r) zeros

    `attach_lora` does the same without changing a model's modules; this is the form that libraries put in their place.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha = alpha
        self.down = nn.Parameter(torch.randn(rank, base.in_features).to(base.weight) * base.in_features**-0.5)
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if self.alpha is None else self.alpha / len(self.down)
        return self.base(x) + scale * F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same."""
        layer = copy.deepcopy(self.base)
        layer.weight += lora_delta(self.down, self.up, self.alpha)
        return layer


def new_lora(unet: nn.Module, text: nn.Module | None = None, *, rank: int = 4, alpha: float | None = None,
             targets: Sequence[str] = UNET_TARGETS, text_targets: Sequence[str] = TEXT_TARGETS,
             seed: int = 0) -> LoRA:
    """A LoRA that changes nothing yet: down is random, up zero.

    It covers the linear layers and convolutions whose name is one of the targets or ends in "." and one:
    "to_k" is all of them, "mid_block.attentions.0.proj_in" one. With a `text` encoder, that too. Raises
    ValueError for a rank below 1 and for a target that is no layer.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank is {rank}: give a whole number of at least 1")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}: give a number above 0, or none for a scale of 1")
    generator = torch.Generator().manual_seed(seed)
    return LoRA(_fresh(unet, rank, alpha, targets, generator),
                {} if text is None else _fresh(text, rank, alpha, text_targets, generator))


def _fresh(module: nn.Module, rank: int, alpha: float | None, targets: Sequence[str],
           generator: torch.Generator) -> dict[str, LowRank]:
    layers, fresh = find_lora_layers(module), {}
    for target in targets:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"no linear layer or convolution of this {type(module).__name__} is called '{target}': "
                             "choose names, or their ends, from named_modules()")
        for name in found:
            weight = layers[name].weight
            inputs = weight[0].numel()
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * inputs**-0.5
            up = torch.zeros(len(weight), rank, *[1] * (weight.ndim - 2))
            fresh[name] = LowRank(down.to(weight.device), up.to(weight.device), alpha)
    return fresh


def find_lora_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that a LoRA can change, by name: linear layers and convolutions."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def check_fit(changes: Mapping[str, LowRank], module: nn.Module) -> None:
    """Raise ValueError, naming the layers, unless every change belongs to a layer of `module`."""
    layers, kind = find_lora_layers(module), type(module).__name__
    if strange := [name for name in changes if name not in layers]:
        raise ValueError(f"this is a LoRA for other layers: {len(strange)} of its {len(changes)} are not in this "
                         f"{kind}, the first being '{strange[0]}'; use it with the model that it was made for")
    for name, change in changes.items():
        down, up, weight = _bare(change.down), _bare(change.up), _bare(layers[name].weight)
        if len(up) != 2 or (up[0], *down[1:]) != weight or up[1] != down[0]:
            raise ValueError(f"the LoRA does not fit layer '{name}' of this {kind}: down {list(change.down.shape)} "
                             f"and up {list(change.up.shape)} do not make its {list(layers[name].weight.shape)}; "
                             "use it with the model that it was made for")


def _bare(tensor: Tensor) -> tuple[int, ...]:
    """A shape without the 1x1 of a kernel: linear layers and such convolutions are the same arithmetic."""
    return tuple(tensor.shape[:2]) if tensor.shape[2:] == (1, 1) else tuple(tensor.shape)


# --- beside the layers ------------------------------------------------------------------------------

@contextmanager
def attach_lora(module: nn.Module, changes: Mapping[str, LowRank], strength: float = 1.0):
    """Inside, each layer of `module` in `changes` gives W x + strength * alpha / r * up (down x).

    The weights are not touched; several can be attached at once, and add up. Raises ValueError for changes
    that do not fit.
    """
    check_fit(changes, module)
    layers = find_lora_layers(module)
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.callback(layers[name].register_forward_hook(_alpha_sigma_like(change, strength)).remove)
        yield


def _alpha_sigma_like(change: LowRank, strength: float):
    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        [x] = inputs
        down, up = change.down.to(x), change.up.to(x)
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, TokenConv):
            kernel = down.reshape(len(down), *layer.weight.shape[1:])
            thin = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)   # (B, r, h, w)
            return output + strength * change.scale * F.conv2d(thin, up.reshape(*up.shape[:2], 1, 1))
        return output + strength * change.scale * F.linear(F.linear(x, down.flatten(1)), up.flatten(1))
    return add


def train_lora(model: LatentDiffusion, lora: LoRA, pixels: Tensor, captions: str | Sequence[str], *, max_steps: int,
               learning_rate: float = 1e-4, batch_size: int = 1, warmup: int = 0,
               seed: int = 0) -> Iterator[TrainStep]:
    """Train the tensors of `lora`, in place, on images and their captions; the model keeps its bits.

    pixels: (B, 3, H, W) in [-1, 1]; captions: one for each, or one for all. Between two steps the LoRA is
    attached to the model, so that samples show it; when the generator ends or is closed, it no longer is.
    Raises ValueError for images, captions or a LoRA that do not fit; Diverged as `train` does.
    """
    check_images(model, pixels)
    check_batch(batch_size)
    check_fit(lora.unet, model.unet)
    check_fit(lora.text_encoder, model.text_encoder)
    captions = [captions] * len(pixels) if isinstance(captions, str) else list(captions)
    if len(captions) != len(pixels):
        raise ValueError(f"{len(pixels)} images need as many captions, or one for all, not {len(captions)}")
    latents = cache(lambda: encode_images(model, pixels))
    encode = encode_prompts if lora.text_encoder else encode_prompts_frozen

    def loss(generator: torch.Generator) -> Tensor:
        shown = draw_indices(len(pixels), batch_size, generator)
        context = encode(model, [captions[row] for row in shown.tolist()])
        return diffusion_loss(model.unet, model.schedule, latents()[shown], context, generator)

    run = train(lora.tensors(), loss, max_steps=max_steps, learning_rate=learning_rate,
                models=(model.unet, model.text_encoder), warmup=warmup, seed=seed)
    return _attached_meanwhile(run, model, lora)


def _attached_meanwhile(run: Iterator[TrainStep], model: LatentDiffusion, lora: LoRA) -> Iterator[TrainStep]:
    with attach_lora(model.unet, lora.unet), attach_lora(model.text_encoder, lora.text_encoder), closing(run):
        yield from run
