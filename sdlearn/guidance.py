"""Classifier-free guidance, and the closure that hides the network from the samplers.

B  batch    M  tokens    T  width of a token    C, h, w  channels, rows and columns of the latent

Ho and Salimans 2022: run the network with the prompt (c) and without it (u), and go further in the
direction from u to c:  u + w (c - u).  w = 1 is the plain conditional model, w = 0 the unconditional.
Without a prompt means the text "". A negative prompt takes its place: away from that instead.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .schedule import NoiseSchedule


def guided(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """u + w (c - u), for outputs of one shape."""
    return uncond + scale * (cond - uncond)


def repelled(uncond: Tensor, cond: Tensor, negative: Tensor, scale: float, away: float) -> Tensor:
    """u + w (c - u) - a (n - u): towards c, and away from n, each from u and with a strength of its own.

    Liu et al. 2022, "Compositional visual generation", with a negative weight. Three runs of the network in
    place of two. With a = w - 1 it is n + w (c - n), the usual negative prompt, and u cancels.
    """
    return uncond + scale * (cond - uncond) - away * (negative - uncond)


def rescaled(out: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Bring the contrast of a guided output back to that of the conditional one. Lin et al. 2023, section 3.4.

    A high scale stretches the output, and the image burns out. `phi` in 0...1 is how much of
    the way back to go, each latent's standard deviation on its own; the paper takes 0.7.
    """
    dims = list(range(1, cond.ndim))
    wanted, there = cond.std(dims, keepdim=True), out.std(dims, keepdim=True)        # (B, 1, 1, 1)
    factor = wanted / there.clamp(min=torch.finfo(there.dtype).tiny)     # an output of zeros stays one
    return out * (1 - phi + phi * factor)


def scale_at(t: float, scale: float, interval: tuple[float, float] | None = None) -> float:
    """w at timestep t: `scale` within interval (low, high), ends included, or everywhere without one; elsewhere 1."""
    return scale if interval is None or interval[0] <= t <= interval[1] else 1.0


def guided_passes(times: Iterable[float], scale: float, interval: tuple[float, float] | None = None) -> int:
    """How often the network runs for one image: twice at each timestep that is guided, once at w = 1 and at w = 0.

    times: the timesteps at which it is asked. What `predict_x0` does, counted. Two halves in one batch are two.
    """
    return sum(1 if scale_at(t, scale, interval) in (0, 1) else 2 for t in times)


def both_halves(unet: Callable[[Tensor, float, Tensor], Tensor], x: Tensor, t: float,
                texts: Tensor) -> tuple[Tensor, Tensor]:
    """u and c (B, C, h, w) for latents x (B, C, h, w): one run of the network on a batch of twice the size.

    texts (2B, M, T): those without the prompt first, then those with it, [u; c].
    """
    u, c = unet(torch.cat([x, x]), t, texts).chunk(2)                                # each (B, C, h, w)
    return u, c


def shared_halves(unet: Callable[[Tensor, float, Tensor], Tensor], x: Tensor, t: float,
                  texts: Tensor) -> tuple[Tensor, Tensor]:
    """`both_halves` for a network that takes several texts for each latent, as `UNet` does.

    What u and c have in common, all that comes before the first text is read, is computed once.
    """
    u, c = unet(x, t, texts).chunk(2)
    return u, c


def predict_x0(
    unet: Callable[[Tensor, float, Tensor], Tensor], schedule: NoiseSchedule, context: Tensor,
    uncond: Tensor | None = None, *, scale: float = 1.0, rescale: float = 0.0,
    interval: tuple[float, float] | None = None, halves: Callable[..., tuple[Tensor, Tensor]] = both_halves,
) -> Callable[[Tensor, float], Tensor]:
    """The `denoise(x, t) -> x0` that a sampler takes: the network, its guidance and its prediction.

    unet(x, t, context) gives (B, C, h, w) under `schedule.config.prediction`. context (B, M, T) is the
    encoded prompt, uncond (B, M, T) or (1, M, T) the encoded empty or negative one. Both halves run as
    one batch [u; c]; scale 1 runs the conditional half only, scale 0 the unconditional. The network's
    output is guided, then rescaled, then turned to x0.

    rescale: phi of `rescaled`. interval: (low, high), the timesteps at which to guide; outside of it
    the conditional half runs alone (Kynkaanniemi et al. 2024: guidance at much noise costs variety,
    at little it does nothing). halves: `both_halves`, or `shared_halves`, which takes less time where the
    network can.

    x keeps its type, float32 for small steps, whatever that of the network, which is context's.
    Raises ValueError for a scale that is not finite, for guidance without `uncond`, and for rescale or
    interval out of range.
    """
    check_guidance(schedule, scale, rescale, interval)
    if uncond is None and scale != 1:
        raise ValueError(f"guidance scale {scale} needs uncond, the encoded empty or negative prompt: "
                         "give it, or scale 1")
    if scale != 1:
        if uncond.shape[1:] != context.shape[1:] or len(uncond) not in (1, len(context)):
            raise ValueError(f"uncond is {tuple(uncond.shape)} but context {tuple(context.shape)}: encode "
                             "both with the same text encoder, one negative prompt for all or for each")
        uncond = uncond.expand(len(context), -1, -1)
        both = torch.cat([uncond, context])                                          # (2B, M, T)

    def output(x: Tensor, t: float) -> Tensor:
        w = scale_at(t, scale, interval)
        if w == 1:
            return unet(x, t, context)
        if w == 0:
            return unet(x, t, uncond)
        u, c = halves(unet, x, t, both)                                              # each (B, C, h, w)
        out = guided(u, c, w)
        return rescaled(out, c, rescale) if rescale else out

    def denoise(x: Tensor, t: float) -> Tensor:
        return schedule.to_x0(output(x.to(context.dtype), t).to(x.dtype), x, t)      # (B, C, h, w)

    return denoise


def check_guidance(schedule: NoiseSchedule, scale: float, rescale: float = 0.0,
                   interval: tuple[float, float] | None = None) -> None:
    """Raise ValueError, in one sentence, for numbers that `predict_x0` cannot take."""
    if not math.isfinite(scale):
        raise ValueError(f"the guidance scale is {scale}: give a finite number, such as 7.5, or 1 for none")
    if not 0 <= rescale <= 1:
        raise ValueError(f"the guidance rescale is {rescale}: give a number from 0 (off) to 1")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= schedule.steps - 1:
        raise ValueError(f"the guidance interval is {interval}: give (low, high) timesteps within "
                         f"0...{schedule.steps - 1}, the lower first")
