"""Curves side by side, under one title."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import NullFormatter, NullLocator

from .figures import FAINT, INK, WIDTH, Drawing

COLOURS = ("#5a4bb0", "#d17a00", "#16796f", "#b8336a", "#2f6fb2", "#7a7a86", "#8a5a2b", "#26262e")
MOST = 12               # points in a line that has a mark on each of them


@dataclass(frozen=True)
class Panel:
    """Lines over common axes.

    lines: by name, each a pair (xs, ys) of as many numbers. log: "x", "y" or "xy". dashed: the names of
    lines to compare with. Lines of few points have marks on them.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence, Sequence]]
    log: str = ""
    dashed: Sequence[str] = ()


def curves(*panels: Panel, title: str, height: float = 320) -> Drawing:
    """Panels in a row. Raises ValueError for none, and for a line whose xs are not as many as its ys."""
    if not panels:
        raise ValueError("there are no panels to draw: give at least one")
    drawing = Drawing(min(WIDTH, 520 * len(panels)), height, title=title, sharpness=1.5, colours=48)
    drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    for panel, axes in zip(panels, drawing.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw_panel(axes, panel)
    drawing.tight_layout(pad=0.7, w_pad=1.4)
    return drawing


def over(xs: Sequence, lines: Mapping[str, Sequence]) -> dict[str, tuple[Sequence, Sequence]]:
    """Lines of a panel that share their xs, by name."""
    return {name: (xs, ys) for name, ys in lines.items()}


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """The mean of each `count` values in a row; the first of them ends at the value number `count`."""
    return np.convolve(np.asarray(values, float), np.full(count, 1 / count), mode="valid").tolist()


def density(values: Sequence, low: float, high: float, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A histogram as a line: the middles of `bins` equal parts of low...high, and the density in each, (bins,) both."""
    heights, edges = np.histogram(np.asarray(values).ravel(), bins=bins, range=(low, high), density=True)
    return (edges[1:] + edges[:-1]) / 2, heights


def draw_panel(axes, panel: Panel):
    """One panel on matplotlib's axes."""
    for (name, (xs, ys)), colour in zip(panel.lines.items(), _cycle(len(panel.lines)), strict=True):
        xs, ys = np.asarray(xs, float), np.asarray(ys, float)
        if len(xs) != len(ys):
            raise ValueError(f"the line '{name}' has {len(xs)} xs and {len(ys)} ys: give as many of both")
        style = {"linestyle": (0, (4, 3)), "linewidth": 1.3} if name in panel.dashed else {"linewidth": 1.6}
        mark = "o" if len(xs) <= MOST and name not in panel.dashed else None
        axes.plot(xs, ys, label=name, color=colour, marker=mark, markersize=4, **style)
    if "x" in panel.log:
        axes.set_xscale("log")
        if max(len(xs) for xs, _ in panel.lines.values()) <= MOST:          # its points are worth naming
            axes.set_xticks(apart({x for xs, _ in panel.lines.values() for x in xs}), minor=False)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
    if "y" in panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high > 10 * low:                             # decades are named; what lies between would be too much
            axes.yaxis.set_minor_formatter(NullFormatter())
    plain(axes, panel.title, panel.x, panel.y)
    if len(panel.lines) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def apart(places: Iterable[float], share: float = 0.07) -> list[float]:
    """Those of some positive places, in order, that lie so far apart on a logarithmic axis that their names do not
    touch: at least `share` of all it spans; the first is kept, then each that is far enough from the one before."""
    places, kept = sorted(places), []
    span = np.log(places[-1] / places[0])
    for place in places:
        if not kept or np.log(place / kept[-1]) >= share * span:
            kept.append(place)
    return kept


def plain(axes, title: str, x: str, y: str):
    """Title, names of the axes, and little else."""
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=8.5, color=FAINT)
    axes.set_ylabel(y, fontsize=8.5, color=FAINT)
    axes.tick_params(labelsize=8, colors=FAINT, which="both")
    axes.grid(color="#ececf0", linewidth=0.7)
    axes.set_axisbelow(True)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color("#c4c4cc")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
