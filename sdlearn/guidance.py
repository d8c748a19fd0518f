"""Classifier-free guidance, and the function denoise(x, t) -> x0 that samplers call.

B  batch    M  tokens    T  width of a token    C, h, w  channels, rows and columns of the latent
u  unconditional output    c  conditional output    w  guidance scale

Ho and Salimans 2022: run the network with the prompt (c) and without it (u), and extrapolate from u
through c:  u + w (c - u), with w = 1 the conditional model and w = 0 the unconditional one. (The paper
writes (1 + s) c - s u, so w = 1 + s.) The unconditional input is the text ""; a negative prompt replaces it.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .schedule import NoiseSchedule

Interval = tuple[float, float]
UNet = Callable[[Tensor, float, Tensor], Tensor]        # (x, t, context) -> output


def classifier_free_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """u + w (c - u), for outputs of one shape. Ho and Salimans 2022."""
    return uncond + guidance_scale * (cond - uncond)


def composed_guidance(uncond: Tensor, cond: Tensor, negative: Tensor, guidance_scale: float,
                      negative_scale: float) -> Tensor:
    """u + w (c - u) - a (n - u): a prompt and a negative prompt n, with a scale for each. Liu et al. 2022.

    Takes three evaluations of the network in place of two. With a = w - 1 it is n + w (c - n), the usual
    negative prompt, and u cancels.
    """
    return uncond + guidance_scale * (cond - uncond) - negative_scale * (negative - uncond)


def rescale_guidance(out: Tensor, cond: Tensor, guidance_rescale: float) -> Tensor:
    """Rescale a guided output towards the standard deviation of the conditional one. Lin et al. 2023, section 3.4.

    A high guidance scale inflates the output's variance, and the image over-saturates. guidance_rescale, the
    paper's phi, in 0...1: 0 changes nothing, 1 restores the deviation, for each latent on its own; the paper
    takes 0.7.
    """
    dims = list(range(1, cond.ndim))
    std_cond, std_out = cond.std(dims, keepdim=True), out.std(dims, keepdim=True)    # (B, 1, 1, 1)
    factor = std_cond / std_out.clamp(min=torch.finfo(std_out.dtype).tiny)     # an output of zeros stays one
    return out * (1 - guidance_rescale + guidance_rescale * factor)


def guidance_scale_at(t: float, guidance_scale: float, guidance_interval: Interval | None = None) -> float:
    """w at timestep t: the guidance scale within the interval (low, high), ends included, and 1 outside of it.

    Without an interval the scale applies at every timestep.
    """
    return guidance_scale if guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1] else 1.0


def count_nfe(timesteps: Iterable[float], guidance_scale: float, guidance_interval: Interval | None = None) -> int:
    """Number of function evaluations (NFE) for one image: runs of the network in `predict_x0`.

    timesteps: those at which the sampler calls `denoise`. Each takes two evaluations, also in one batch, or one
    where w is 0 or 1.
    """
    return sum(1 if guidance_scale_at(t, guidance_scale, guidance_interval) in (0, 1) else 2 for t in timesteps)


def predict_uncond_cond(unet: UNet, x: Tensor, t: float, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs u and c (B, C, h, w) for latents x (B, C, h, w), by one run of the network on a batch of 2B.

    contexts (2B, M, T): the unconditional ones first, [u; c].
    """
    u, c = unet(torch.cat([x, x]), t, contexts).chunk(2)                             # each (B, C, h, w)
    return u, c


def predict_uncond_cond_shared(unet: UNet, x: Tensor, t: float, contexts: Tensor) -> tuple[Tensor, Tensor]:
    """`predict_uncond_cond` for a network that takes several contexts for each latent, as `UNet` does.

    The layers before the first cross-attention, which are the same for u and c, are computed once.
    """
    u, c = unet(x, t, contexts).chunk(2)
    return u, c


def predict_x0(unet: UNet, schedule: NoiseSchedule, context: Tensor, uncond: Tensor | None = None, *,
               guidance_scale: float = 1.0, guidance_rescale: float = 0.0, guidance_interval: Interval | None = None,
               predict_pair: Callable[..., tuple[Tensor, Tensor]] = predict_uncond_cond,
               ) -> Callable[[Tensor, float], Tensor]:
    """The function denoise(x, t) -> x0 of a network with guidance, whatever it predicts.

    unet(x, t, context) returns (B, C, h, w), of the kind `schedule.config.prediction_type`. context (B, M, T)
    is the encoded prompt, uncond (B, M, T) or (1, M, T) the encoded empty or negative prompt. u and c are one
    batch; at w = 1 the network runs on c alone, at w = 0 on u alone. The output is guided, then rescaled, then
    converted to x0.

    guidance_rescale: see `rescale_guidance`. guidance_interval: (low, high), the timesteps with guidance (elsewhere
    w = 1; Kynkaanniemi et al. 2024: at high noise guidance costs variety, at low noise it has no effect).
    predict_pair: `predict_uncond_cond`, or the faster `predict_uncond_cond_shared` where the network allows it.

    x keeps its dtype, float32 for accurate steps, and the network runs in that of context. Raises ValueError for
    a scale that is not finite, guidance without `uncond`, and a rescale or interval out of range.
    """
    check_guidance(schedule, guidance_scale, guidance_rescale, guidance_interval)
    if uncond is None and guidance_scale != 1:
        raise ValueError(f"guidance scale {guidance_scale} needs uncond, the encoded empty or negative prompt: "
                         "give it, or scale 1")
    if guidance_scale != 1:
        if uncond.shape[1:] != context.shape[1:] or len(uncond) not in (1, len(context)):
            raise ValueError(f"uncond is {tuple(uncond.shape)} but context {tuple(context.shape)}: encode "
                             "both with the same text encoder, one negative prompt for all or for each")
        uncond = uncond.expand(len(context), -1, -1)
        both = torch.cat([uncond, context])                                          # (2B, M, T)

    def output(x: Tensor, t: float) -> Tensor:
        w = guidance_scale_at(t, guidance_scale, guidance_interval)
        if w == 1:
            return unet(x, t, context)
        if w == 0:
            return unet(x, t, uncond)
        u, c = predict_pair(unet, x, t, both)                                        # each (B, C, h, w)
        out = classifier_free_guidance(u, c, w)
        return rescale_guidance(out, c, guidance_rescale) if guidance_rescale else out

    def denoise(x: Tensor, t: float) -> Tensor:
        return schedule.to_x0(output(x.to(context.dtype), t).to(x.dtype), x, t)      # (B, C, h, w)

    return denoise


def check_guidance(schedule: NoiseSchedule, guidance_scale: float, guidance_rescale: float = 0.0,
                   guidance_interval: Interval | None = None) -> None:
    """Raise ValueError for guidance settings that `predict_x0` cannot take."""
    if not math.isfinite(guidance_scale):
        raise ValueError(f"the guidance scale is {guidance_scale}: give a finite number, such as 7.5, or 1 for none")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"the guidance rescale is {guidance_rescale}: give a number from 0 (off) to 1")
    last = schedule.num_train_timesteps - 1
    if guidance_interval is not None and not 0 <= guidance_interval[0] <= guidance_interval[1] <= last:
        raise ValueError(f"the guidance interval is {guidance_interval}: give (low, high) timesteps within "
                         f"0...{last}, the lower first")
