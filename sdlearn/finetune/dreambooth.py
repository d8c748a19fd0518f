"""DreamBooth: the whole U-Net learns one thing from a few images of it.

B  batch

The prompt names it by a rare word and its class, "a picture of a zwx cat". Trained on that alone, a model
forgets what other cats look like; so it is shown images of its own of the class, under "a picture of a
cat", and keeps to them: prior preservation. Ruiz et al. 2022, "DreamBooth", equation 2.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from .loop import (
    LatentDiffusion,
    TrainStep,
    check_batch,
    check_images,
    diffusion_losses,
    draw_indices,
    encode_images,
    encode_prompts,
    encode_prompts_frozen,
    train,
)


def prior_preservation_loss(losses: Tensor, weight: float) -> Tensor:
    """The loss of a batch, a scalar, from those of its images (2B,): first the thing's, then as many of its class.

    mean over the thing's + weight * mean over the class's
    """
    thing, kind = losses.chunk(2)
    return thing.mean() + weight * kind.mean()


def dreambooth_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], schedule: NoiseSchedule,
                    latents: Sequence[Tensor], contexts: Tensor, generator: torch.Generator,
                    prior_weight: float = 1.0) -> Tensor:
    """The loss, a scalar, of one run of the network on images of the thing, and of its class where they are given.

    latents: those of the thing (B, C, h, w), alone or followed by as many of the class. contexts (1 or 2, M, T): the
    prompt of each, in that order. `prior_weight` weighs the class's part, see `prior_preservation_loss`.
    """
    each = contexts.repeat_interleave(len(latents[0]), dim=0)                       # (B or 2B, M, T)
    losses = diffusion_losses(network, schedule, torch.cat(list(latents)), each, generator)
    return prior_preservation_loss(losses, prior_weight) if len(latents) == 2 else losses.mean()


def train_dreambooth(model: LatentDiffusion, pixels: Tensor, prompt: str, *, max_steps: int,
                     learning_rate: float = 5e-6, class_pixels: Tensor | None = None, class_prompt: str | None = None,
                     prior_weight: float = 1.0, train_text: bool = False, batch_size: int = 1, warmup: int = 0,
                     seed: int = 0) -> Iterator[TrainStep]:
    """Train the U-Net, and the text encoder if `train_text`, on images of one thing under one prompt.

    pixels: (B, 3, H, W) in [-1, 1]. class_pixels, class_prompt: images that the model itself drew of the
    class, and their prompt; a batch then holds `batch_size` images of each kind, and the loss is

        loss(images of the thing) + prior_weight * loss(images of the class)

    Without them, or with weight 0, nothing but the thing is learnt. Raises ValueError for images that do
    not fit, one of the two class arguments alone, or a negative weight; Diverged as `train` does.
    """
    check_images(model, pixels)
    check_batch(batch_size)
    if (class_pixels is None) != (class_prompt is None):
        raise ValueError("prior preservation needs both class_pixels and class_prompt: give both, or neither")
    if not 0 <= prior_weight < float("inf"):
        raise ValueError(f"the weight of the prior is {prior_weight}: give 0, for none, or a number above, such as 1")
    prior = class_pixels is not None and prior_weight > 0
    if prior:
        check_images(model, class_pixels, "class images")
        if class_pixels.shape[1:] != pixels.shape[1:]:
            raise ValueError(f"the class images are {tuple(class_pixels.shape[1:])}, but the others "
                             f"{tuple(pixels.shape[1:])}: make them of one size")
    prompts = [prompt, class_prompt] if prior else [prompt]
    latents = cache(lambda: [encode_images(model, part) for part in (pixels, class_pixels)[:len(prompts)]])
    frozen = cache(lambda: encode_prompts_frozen(model, prompts))

    def loss(generator: torch.Generator) -> Tensor:
        context = encode_prompts(model, prompts) if train_text else frozen()        # a row for each kind
        x0 = [part[draw_indices(len(part), batch_size, generator)] for part in latents()]
        return dreambooth_loss(model.unet, model.schedule, x0, context, generator, prior_weight)

    parameters = [*model.unet.parameters(), *(model.text_encoder.parameters() if train_text else ())]
    return train(parameters, loss, max_steps=max_steps, learning_rate=learning_rate,
                 models=(model.unet, model.text_encoder), warmup=warmup, seed=seed)
