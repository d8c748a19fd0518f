"""Where a U-Net reads the text: the shapes of q, k, v and of the maps at each of its levels, and what they cost; and
its layers, given something else to read.

Shapes and costs are read off a config. Lengths are in pixels of the screen.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from matplotlib.patches import FancyBboxPatch
from torch import nn

from ..config import ModelConfig
from ..diagnostics.costs import layer_flops
from .architecture import LATENT_LINE, PLAIN, PLAIN_LINE, TEXT, TEXT_LINE, spelled
from .figures import FAINT, INK, WIDTH, Drawing

TOP, ROW, BAR, LONG = 74, 44, 20, 34        # of the first row, from one to the next, height and width of a bar
DEEPEST = 90                    # how far the middle stands from the left of the first row
COLUMNS = {"cells": 300, "heads": 392, "q, of the cells": 500, "k and v, of the text": 612,
           "map of the text": 742, "map of the cells": 872}


class Level(NamedTuple):
    """A level of the U-Net, for one image of the model's own size; `reads` is how many transformers it has."""

    name: str
    side: int
    channels: int
    heads: int
    tokens: int
    reads: int

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of q, of k and v, and of the two maps (heads, queries, keys)."""
        return {"q": (self.cells, self.channels), "kv": (self.tokens, self.channels),
                "text": (self.heads, self.cells, self.tokens), "self": (self.heads, self.cells, self.cells)}


def text_levels(config: ModelConfig) -> list[Level]:
    """The levels from the finest to the coarsest, and the middle as the last."""
    unet, found, side = config.unet, [], config.latent_size
    for i, (channels, attention) in enumerate(zip(unet.channels, unet.attention, strict=True)):
        reads = (2 * unet.layers_per_block + 1) * attention             # one more on the way up
        found.append(Level(f"level {i}", side, channels, unet.heads_at(channels), config.text.length, reads))
        side = (side + 1) // 2 if i < len(unet.channels) - 1 else side
    return [*found, found[-1]._replace(name="middle", reads=1)]


def count_flops(config: ModelConfig) -> tuple[int, dict[str, int]]:
    """FLOPs of one pass of the U-Net for one image: in all, and of the maps of each attention layer by name.

    Counted as in `diagnostics.costs.layer_flops`.
    """
    counts = layer_flops(config.unet, config.latent_size, config.text.length)
    # The products of two activations: as the fused kernel, or as the batched products that it is made of on meta.
    maps = {name: sum(count for kind, count in kinds.items() if "bmm" in kind or "attention" in kind)
            for name, kinds in counts.items() if name.endswith(("attn1", "attn2"))}
    return sum(counts[""].values()), maps


@contextmanager
def changed(modules: Iterable[nn.Module], inputs: Callable) -> Iterator[None]:
    """Inside, each of the modules is called with what `inputs` makes of its arguments: a tensor, or a tuple of all."""
    with ExitStack() as stack:
        for one in modules:
            stack.enter_context(one.register_forward_pre_hook(lambda _, given: inputs(*given)))
        yield


def where_it_reads(config: ModelConfig) -> Drawing:
    """The U-Net of a config, level by level; at those that read the text, the shapes of what attention works on."""
    levels = text_levels(config)
    height = TOP + ROW * len(levels) + 30
    title = f"{config.name}: where the U-Net reads the text, one image of {config.image_size} x {config.image_size}"
    drawing = Drawing(WIDTH, height, title=title, sharpness=1.5, colours=48)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")

    def text(x, y, words, colour=INK, **style):
        axes.text(x, y, words, **{"fontsize": 8.5, "color": colour, "va": "center"} | style)

    text(8, 16, title, fontsize=11, fontweight="bold")
    for head, x in COLUMNS.items():
        text(x, 48, head, FAINT)
    step = DEEPEST / (len(levels) - 1)
    for i, level in enumerate(levels):
        y, left, right = TOP + ROW * i + BAR / 2, 8 + step * i, 276 - step * i
        middle = level.name == "middle"
        fill, line = (TEXT, TEXT_LINE) if level.reads else (PLAIN, PLAIN_LINE)
        for x in [left] if middle else [left, right - LONG]:
            axes.add_patch(FancyBboxPatch((x, y - BAR / 2), right - left if middle else LONG, BAR, facecolor=fill,
                                          edgecolor=line, linewidth=1, boxstyle="round,pad=0,rounding_size=4"))
        text(142, y if middle else y - 8, level.name, FAINT, ha="center", fontsize=8)
        if not middle:
            axes.plot([left + LONG, right - LONG], [y, y], color=PLAIN_LINE, linewidth=0.9)
            for x, towards in ((left + LONG / 2, step), (right - LONG / 2, -step)):
                axes.plot([x, x + towards], [y + BAR / 2, y + ROW - BAR / 2], color=LATENT_LINE, linewidth=0.9)
        _told(text, level, y)
    text(8, height - 14, "green: with transformers that read the text. Shapes: (cells or tokens, channels) of q, k and "
         "v; (heads, queries, keys) of a map", FAINT)
    return drawing


def _told(text, level: Level, y: float):
    shapes, at = level.shapes, list(COLUMNS.values())
    text(at[0], y, f"{level.side} x {level.side}\n{level.channels} channels")
    if not level.reads:
        text(at[1], y, "none: convolutions alone", FAINT)
        return
    times = f"{level.reads} transformer{'s' * (level.reads > 1)}"
    text(at[1], y, f"{level.heads} of width {level.channels // level.heads}\n{times}")
    for x, name in zip(at[2:], ("q", "kv", "text", "self"), strict=True):
        text(x, y, spelled(shapes[name]))
