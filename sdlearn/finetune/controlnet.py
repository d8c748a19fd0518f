"""Training a ControlNet: the U-Net stays as it is, and a copy of its first half learns to read hints.

B  batch

Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models", section 3.3. Half of the
captions are replaced by the empty one, so that the network learns to see from the hint what is there.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .loop import (
    LatentDiffusion,
    TrainStep,
    check_batch,
    check_images,
    diffusion_loss,
    draw_indices,
    encode_images,
    encode_prompts_frozen,
    train,
)


def train_controlnet(model: LatentDiffusion, net: nn.Module, pixels: Tensor, captions: Sequence[str], hints: Tensor,
                     *, max_steps: int, learning_rate: float = 1e-5, dropout: float = 0.5, batch_size: int = 4,
                     warmup: int = 0, seed: int = 0) -> Iterator[TrainStep]:
    """Train a ControlNet on images, their captions and their hints; the model itself keeps its bits.

    net(x_t, t, context, hint) gives the residuals that `model.unet` adds. pixels: (B, 3, H, W) in [-1, 1];
    hints: (B, 3, H, W) in [0, 1], of the same size; dropout: the share of captions that is replaced by "".
    Raises ValueError for images, captions and hints that do not fit together; Diverged as `train` does.
    """
    check_images(model, pixels)
    check_batch(batch_size)
    if isinstance(captions, str) or len(captions) != len(pixels):
        raise ValueError(f"{len(pixels)} images need as many captions: give a list with one for each")
    if hints.ndim != 4 or len(hints) != len(pixels) or hints.shape[2:] != pixels.shape[2:]:
        raise ValueError(f"the hints are {tuple(hints.shape)}, but the images {tuple(pixels.shape)}: give a hint "
                         "for each, of its size")
    if not (hints.min() >= 0 and hints.max() <= 1):
        raise ValueError(f"the hints go from {hints.min():.3g} to {hints.max():.3g}: give them in [0, 1]")
    if not 0 <= dropout <= 1:
        raise ValueError(f"the dropout of captions is {dropout}: give a share from 0 to 1")
    latents = cache(lambda: encode_images(model, pixels))

    def loss(generator: torch.Generator) -> Tensor:
        shown = draw_indices(len(pixels), batch_size, generator)
        kept = (torch.rand(batch_size, generator=generator) >= dropout).tolist()
        prompts = [captions[row] if keep else "" for row, keep in zip(shown.tolist(), kept, strict=True)]
        x0 = latents()[shown]
        hint = hints[shown].to(x0)

        def controlled(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return model.unet(x, t, context, residuals=net(x, t, context, hint))

        return diffusion_loss(controlled, model.schedule, x0, encode_prompts_frozen(model, prompts), generator)

    return train(net.parameters(), loss, max_steps=max_steps, learning_rate=learning_rate,
                 models=(model.unet, model.text_encoder, net), warmup=warmup, seed=seed)
