"""The diffusion loss, and sampling: from noise to latents without a pipeline.

B  batch        C, h, w  channels, rows and columns of the latent        M, T  text tokens and their width
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .guidance import predict_x0
from .samplers import get_sampler, make_timesteps_for
from .schedule import Generators, NoiseSchedule


def diffusion_loss(network: Callable[[Tensor, Tensor, Tensor], Tensor], schedule: NoiseSchedule, x0: Tensor,
                   context: Tensor, t: Tensor, noise: Tensor, *, reduction: str = "mean") -> Tensor:
    """Mean squared error between the network's output for x_t and its target. Ho et al. 2020, equation 14.

    network(x_t, t, context) is a U-Net, or one with a ControlNet around it; its target is what
    `schedule.config` says that it predicts. x0 and noise (B, C, h, w), context (B, M, T), t (B,).
    reduction: "mean", a scalar, or "none", the loss of each image, (B,). Computed in float32.
    """
    output = network(schedule.add_noise(x0, noise, t), t, context)
    target = schedule.target(x0, noise, t)
    if reduction == "mean":
        return F.mse_loss(output.float(), target.float())
    if reduction == "none":
        return F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    raise ValueError(f"reduction is '{reduction}': choose mean or none")


def sample_latents(network: Callable[[Tensor, float, Tensor], Tensor], schedule: NoiseSchedule, noise: Tensor,
                   context: Tensor, uncond: Tensor | None = None, *, num_inference_steps: int,
                   sampler: str = "dpmpp_2m", guidance_scale: float = 1.0, generator: Generators = None) -> Tensor:
    """Clean latents (B, C, h, w) from noise of variance 1, by a sampler with classifier-free guidance.

    network, context (B, M, T) and uncond, the encoded empty or negative prompt, are as in `predict_x0`. noise
    (B, C, h, w), such as `schedule.seeded_noise` draws, is moved to context's device. generator: of the noise that
    stochastic samplers add. Runs with gradients where the caller has them on. Raises ValueError for an unknown
    sampler and for numbers out of range.
    """
    denoise = predict_x0(network, schedule, context, uncond, guidance_scale=guidance_scale)
    grid = make_timesteps_for(sampler, schedule, num_inference_steps)
    for step in get_sampler(sampler)(denoise, noise.to(context.device), grid, schedule, generator=generator):
        latent = step.x
    return latent
