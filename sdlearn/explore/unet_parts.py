"""A U-Net taken apart: the shape of every tensor, what each part costs, what each output cell depends on; and put
together with a part missing.

Shapes and costs need no weights: see `diagnostics.costs`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import CrossAttention
from ..config import UNetConfig
from ..diagnostics.costs import TOKENS, empty_pass, empty_unet, layer_flops
from ..unet import skip_channels

Shape = tuple[int, ...]
KINDS = {                   # of a parameter or a layer, by what its name holds: the first that fits
    "time": ("time_emb",), "norms": ("norm",), "self-attention": ("attn1",), "cross-attention": ("attn2",),
    "feed-forward": (".ff.",), "into and out of tokens": ("proj_in", "proj_out"), "down and up": ("samplers",),
    "convolutions of ResBlocks": ("resnets",), "first and last convolution": ("conv_in", "conv_out")}


# --- shapes -------------------------------------------------------------------------------------------

class Rung(NamedTuple):
    """A skip: the layer that makes it on the way down, and the ResBlock that reads it on the way up."""

    name: str               # of the layer that makes it
    skip: Shape             # (channels, rows, columns)
    below: int              # channels that come from below and lie beside it
    out: Shape              # what the ResBlock on the way up makes of both
    attends: bool           # whether that ResBlock is followed by a transformer
    upsampled: bool         # whether an Upsample follows


def rungs(config: UNetConfig, side: int) -> tuple[list[Rung], Shape]:
    """The skips in the order in which they are made, and the middle's shape, for a latent of side x side cells.

    The shapes are those that pass through the module itself, noted by hooks.
    """
    unet, made, read, ups = empty_unet(config), [], [], []
    for name, module in unet.named_modules():
        kind = name.split(".")[-2] if "." in name else name
        if name == "conv_in" or kind == "downsamplers" or (kind == "resnets" and name.startswith("down")):
            module.register_forward_hook(lambda _, given, out, name=name: made.append((name, tuple(out.shape[1:]))))
        elif kind == "resnets" and name.startswith("up"):
            module.register_forward_hook(lambda _, given, out, name=name: read.append(
                (name, given[0].shape[1], tuple(out.shape[1:]))))
        elif kind == "upsamplers":
            module.register_forward_hook(lambda *_: ups.append(len(read)))
        elif name == "mid_block":
            module.register_forward_hook(lambda _, given, out: ups.append(tuple(out.shape[1:])))
    empty_pass(unet, side)
    middle, *after = ups
    attending = {name.removesuffix(".transformer_blocks") for name, _ in unet.named_modules()
                 if name.endswith(".transformer_blocks")}
    found = []
    for place, ((name, skip), (reader, inputs, out)) in enumerate(zip(made, reversed(read), strict=True)):
        attention, attends = name.replace("resnets", "attentions"), reader.replace("resnets", "attentions") in attending
        name = attention if attention in attending else name            # the last that works on it before it is kept
        found.append(Rung(name, skip, inputs - skip[0], out, attends, len(read) - place in after))
    return found, middle


# --- costs --------------------------------------------------------------------------------------------

class Part(NamedTuple):
    """A layer: its kind, the level it works on (0 the highest), its parameters, FLOPs of one pass of one latent."""

    name: str
    kind: str
    level: int
    parameters: int
    flops: int


@lru_cache
def parts_of(config: UNetConfig, side: int, tokens: int = TOKENS) -> list[Part]:
    """Every layer of a U-Net with its cost. A multiplication and its addition are two FLOPs; norms, activations and
    sums are not counted, as everywhere."""
    flops = {name: sum(kinds.values()) for name, kinds in layer_flops(config, side, tokens).items()}
    found = []
    for name, module in empty_unet(config).named_modules():
        inside = "attn" in name and not isinstance(module, CrossAttention)
        if not inside and (isinstance(module, CrossAttention) or not list(module.children())):
            parameters = sum(one.numel() for one in module.parameters())
            if parameters:
                found.append(Part(name, kind_of(name), _level(name, config), parameters, flops.get(name, 0)))
    return found


def kind_of(name: str) -> str:
    return next(kind for kind, marks in KINDS.items() if any(mark in f".{name}." for mark in marks))


def total(parts: Iterable[Part], what: str) -> int:
    """Sum of "parameters" or "flops"."""
    return sum(getattr(part, what) for part in parts)


def _level(name: str, config: UNetConfig) -> int:
    place, lowest = name.split("."), len(config.channels) - 1
    if place[0] == "down_blocks":
        return int(place[1])
    return lowest - int(place[1]) if place[0] == "up_blocks" else lowest if place[0] == "mid_block" else 0


# --- what an output cell depends on -------------------------------------------------------------------

def conv_reach(config: UNetConfig, cell: int) -> tuple[int, int]:
    """The first and the last input column that convolutions alone can carry to an output column.

    Walked from the output back, along the longest way: through all levels and the middle. A 3x3 convolution adds a
    cell on either side; of stride 2 it doubles before; an Upsample halves.
    """
    first = last = cell
    lowest = len(config.channels) - 1

    def wider(by: int):
        nonlocal first, last
        first, last = first - by, last + by

    wider(1)                                                        # conv_out
    for level in range(lowest + 1):                                 # the way up, backwards
        wider(2 * (config.layers_per_block + 1))
        if level < lowest:
            wider(1)
            first, last = first // 2, last // 2
    wider(4)                                                        # the middle
    for level in range(lowest, -1, -1):
        wider(2 * config.layers_per_block)
        if level:
            first, last = 2 * first - 1, 2 * last + 1
    wider(1)                                                        # conv_in
    return first, last


@contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Inside, no gradient flows through the means and variances of GroupNorms: the outputs stay as they are."""
    def outputs(norm: nn.GroupNorm, given: tuple[Tensor], out: Tensor) -> Tensor:
        x = given[0]
        rows = x.detach().reshape(len(x), norm.num_groups, -1)
        mean, scale = (one.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[..., None, None] for one in (
            rows.mean(dim=2), (rows.var(dim=2, unbiased=False) + norm.eps).rsqrt()))
        return (x - mean) * scale * norm.weight[:, None, None] + norm.bias[:, None, None]

    hooks = [one.register_forward_hook(outputs) for one in model.modules() if isinstance(one, nn.GroupNorm)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- something missing --------------------------------------------------------------------------------

@contextmanager
def altered(unet: nn.Module, *, time: float | None = None, silent: Sequence[str] = (), skips: Iterable[int] = ()
            ) -> Iterator[None]:
    """Inside, the U-Net works with something changed; afterwards it is as it was, whatever happened.

    time: what it is told in place of the timestep. silent: layers whose name ends so output zeros: "attn1" is
    self-attention, "attn2" reads the text. skips: places of the skips that become zero, from conv_in's, 0, on.
    Raises ValueError where a name or a place is none of this U-Net's.
    """
    lost = set(skips)
    layers = [one for name, one in unet.named_modules() if name.endswith(tuple(silent))] if silent else []
    if silent and not layers:
        raise ValueError(f"no layer's name ends in {' or '.join(silent)}")
    count = len(skip_channels(unet.config))
    if not lost <= set(range(count)):
        raise ValueError(f"there are skips 0 to {count - 1}, but {sorted(lost)} were to be lost")
    embed, encode = unet.embed_time, unet.encode
    hooks = [one.register_forward_hook(lambda module, given, out: torch.zeros_like(out)) for one in layers]
    before = dict(vars(unet))               # methods that were replaced already, by an `altered` around this one
    if time is not None:
        # As many as were asked for: a cache embeds all timesteps of a run at once.
        unet.embed_time = lambda t, x: embed(torch.full(t.shape, float(time), device=x.device)
                                             if isinstance(t, torch.Tensor) else float(time), x)
    if lost:
        unet.encode = lambda *inputs, **options: [torch.zeros_like(skip) if i in lost else skip
                                                  for i, skip in enumerate(encode(*inputs, **options))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in ("embed_time", "encode"):
            vars(unet).pop(name, None)
            if name in before:
                setattr(unet, name, before[name])
