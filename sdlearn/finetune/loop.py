"""The training loop and the loss that all fine-tuning shares.

B  batch        C, h, w  channels, rows and columns of the latent        M, T  text tokens and their width

`train` is a generator over steps: progress bars, samples and early stops belong to whoever iterates. At
every `yield` the models are whole and in eval mode, so that an image can be made between two steps; when
the generator ends, is closed or raises, what was learnt stays and everything else is as it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import diffusion
from ..attention import eager_attention
from ..clip import TextEncoder
from ..schedule import NoiseSchedule
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE

HALF_PRECISION = (torch.float16, torch.bfloat16)


class LatentDiffusion(Protocol):
    """The parts of a model that fine-tuning needs; `StableDiffusion` has them all."""

    tokenizer: Tokenizer
    text: TextEncoder
    unet: UNet
    vae: VAE
    schedule: NoiseSchedule


class TrainStep(NamedTuple):
    """What training yields, after the parameters have moved."""

    index: int              # 0...max_steps-1
    loss: float             # before this step
    gradient_norm: float    # before clipping


class Diverged(FloatingPointError):
    """The loss or its gradient is not finite; what learns is as it was after the step before."""


def train(parameters: Iterable[Tensor], loss: Callable[[torch.Generator], Tensor], *, max_steps: int,
          learning_rate: float, models: Iterable[nn.Module] = (), warmup: int = 0, weight_decay: float = 0.01,
          clip: float = 1.0, seed: int = 0) -> Iterator[TrainStep]:
    """Minimise `loss` over `parameters` with AdamW (Loshchilov and Hutter 2019).

    parameters: what learns, in float32. loss: makes a scalar from a random generator, which is seeded once
    with `seed`: all randomness comes from it, so that a seed gives the same run. models: the modules that
    `loss` computes with; while training runs they are in eval mode, and nothing in them but `parameters`
    has a gradient. warmup: steps over which the learning rate rises from near zero. clip: the largest norm
    of the whole gradient. Raises ValueError for settings that cannot be, at once; Diverged on the way.
    """
    parameters, models = list(parameters), list(models)
    _check(parameters, max_steps, learning_rate, warmup)
    return _train(parameters, loss, models, max_steps, learning_rate, warmup, weight_decay, clip, seed)


def _train(parameters, loss, models, max_steps, learning_rate, warmup, weight_decay, clip, seed):
    generator = torch.Generator().manual_seed(seed)
    with train_only(parameters, models), _small_attention(parameters, models):
        optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
        rates = (learning_rate * min(1.0, (index + 1) / max(warmup, 1)) for index in range(max_steps))
        yield from optimise(optimiser, parameters, lambda: loss(generator), rates, clip=clip)


def optimise(optimiser: torch.optim.Optimizer, parameters: list[Tensor], loss: Callable[[], Tensor],
             rates: Iterable[float], *, clip: float = 1.0, accelerator=None) -> Iterator[TrainStep]:
    """The optimisation steps of all training: one for each learning rate in `rates`, which are read as steps are made.

    loss() makes a scalar. accelerator: accelerate's, where it scales the loss and shares gradients among processes; it
    skips a step whose gradient is not finite, so that the loss alone is checked. Raises Diverged before such a step.
    """
    backward, clip_norm = Tensor.backward, nn.utils.clip_grad_norm_
    if accelerator is not None:
        backward, clip_norm = accelerator.backward, accelerator.clip_grad_norm_
    for index, rate in enumerate(rates):
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.enable_grad():       # at each step: whoever iterates may have disabled it
            value = loss()
            backward(value)
        norm = clip_norm(parameters, clip)
        step = TrainStep(index, value.item(), norm.item())
        if not math.isfinite(step.loss) or (accelerator is None and not math.isfinite(step.gradient_norm)):
            raise Diverged(f"the loss became {step.loss} and its gradient {step.gradient_norm} at step {index}; "
                           "the parameters are those of the step before: train with a lower learning rate")
        optimiser.step()
        optimiser.zero_grad()
        yield step


def _small_attention(parameters: list[Tensor], models: list[nn.Module]) -> AbstractContextManager:
    """Attention in the open on a CPU, where it is faster and images that can be trained on are small."""
    return eager_attention(*models) if parameters[0].device.type == "cpu" else nullcontext()


@contextmanager
def train_only(parameters: list[Tensor], models: list[nn.Module]):
    """Inside, only `parameters` have gradients; afterwards flags are as before, and no gradient is left."""
    before = [(p, p.requires_grad) for p in [*(p for model in models for p in model.parameters()), *parameters]]
    try:
        for model in models:
            model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)


def _check(parameters: list[Tensor], steps: int, learning_rate: float, warmup: int) -> None:
    if not parameters:
        raise ValueError("there is nothing to train: no parameters were given")
    for name, value, least in (("max_steps", steps, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value}: give a whole number of at least {least}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"the learning rate is {learning_rate}: give a number above 0, such as 1e-4")
    if half := [p.dtype for p in parameters if p.dtype in HALF_PRECISION]:
        raise ValueError(f"what learns is {half[0]}, in which small steps are lost: load the model in float32")


# --- the loss ---------------------------------------------------------------------------------------

def diffusion_losses(network: Callable[[Tensor, Tensor, Tensor], Tensor], schedule: NoiseSchedule, latents: Tensor,
                     context: Tensor, generator: torch.Generator) -> Tensor:
    """The diffusion loss of each image, (B,): the squared error of what the network predicts.

    network(x_t, t, context) is a U-Net, or one with a ControlNet around it; latents (B, C, h, w) are
    scaled, context is (B, M, T). Timesteps and noise are drawn on the CPU, so a seed gives the same on
    every device. Ho et al. 2020, equation 14, for whatever `schedule.config.prediction` says.
    """
    t = draw_timesteps(len(latents), schedule, generator).to(latents.device)                # (B,)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return diffusion.diffusion_loss(network, schedule, latents, context, t, noise, reduction="none")


def diffusion_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], schedule: NoiseSchedule, latents: Tensor,
                   context: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of `diffusion_losses` over the batch, a scalar."""
    return diffusion_losses(network, schedule, latents, context, generator).mean()


def draw_timesteps(count: int, schedule: NoiseSchedule, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of the schedule, in random order: (count,), int64.

    Each is uniform in 0...N-1, as if drawn alone; together they make less noise in the loss.
    """
    parts = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (parts * schedule.num_train_timesteps / count).long().clamp(max=schedule.num_train_timesteps - 1)


# --- what it is made from -----------------------------------------------------------------------------

def encode_prompts(model: LatentDiffusion, prompts: list[str]) -> Tensor:
    """What the U-Net attends to, (B, M, T); differentiable in the text encoder."""
    ids = model.tokenizer(prompts, model.text_encoder.config.length)                                # (B, M)
    return model.text_encoder(ids.to(model.text_encoder.final_layer_norm.weight.device)).hidden


@torch.no_grad()
def encode_prompts_frozen(model: LatentDiffusion, prompts: list[str]) -> Tensor:
    """`encode_prompts` for a text encoder that does not learn."""
    return encode_prompts(model, prompts)


@torch.no_grad()
def encode_images(model: LatentDiffusion, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] as scaled latents (B, C, h, w), a few images at a time."""
    place = model.vae.quant_conv.weight
    return torch.cat([model.vae.to_latent(part.to(place)) for part in pixels.split(8)])


def draw_indices(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of the numbers 0...count-1; none twice where there are enough."""
    rounds = -(-size // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:size]


def check_images(model: LatentDiffusion, pixels: Tensor, what: str = "images") -> None:
    """Raise ValueError for pixels that the model cannot be trained on."""
    config = model.unet.config
    if config.in_channels != config.out_channels:
        raise ValueError(f"this U-Net reads {config.in_channels} channels and writes {config.out_channels}: it is an "
                         "inpainting model; fine-tune the model that it was made from")
    if pixels.ndim != 4 or len(pixels) == 0 or not pixels.is_floating_point():
        raise ValueError(f"the {what} are {pixels.dtype} {tuple(pixels.shape)}: give at least one, as floating-point "
                         "pixels (batch, 3, height, width) in [-1, 1]")
    if not pixels.abs().max() <= 1.001:         # a NaN fails this, too
        raise ValueError(f"the {what} have pixels up to {pixels.abs().max():.3g}: give pixels in [-1, 1]")


def check_batch(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"the batch size is {size}: give a whole number of at least 1")
