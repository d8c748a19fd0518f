"""Where time and memory go: stacked bars, optimization steps, a roofline; and a widget that estimates what is chosen.

Lengths are in pixels of the screen.
"""

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ipywidgets import HTML, Dropdown, HBox, Image, Layout, VBox

from .curves import COLOURS, plain
from .figures import EDGE, FAINT, INK, LINE, WIDTH, Drawing
from .widgets import REFUSED, WithStill

BAR = 26                    # of a row of bars
NAMES = 262                 # width of the names of rows
PALE = 0.45                 # opacity of what is not exact


class Point(NamedTuple):
    """Something on a roofline: FLOPs for each byte that it moves, FLOP/s that it reaches, its share of the time."""

    intensity: float
    speed: float
    share: float


class Estimate(NamedTuple):
    """What a choice comes to: bars, by name of the row the amounts of its parts, and sentences beneath them."""

    bars: Mapping[str, Mapping[str, float]]
    told: Sequence[str]


def stacked(rows: Mapping[str, Mapping[str, float]], x: str, *, title: str, beneath: Sequence[str] = ()) -> Drawing:
    """A horizontal bar for each row, made of parts; the same part has the same colour in all rows.

    beneath: lines to write under the bars. ValueError for no rows, and for a row without parts.
    """
    if not rows or not all(rows.values()):
        raise ValueError("there are no bars to draw: give at least one part for every row")
    parts = list(dict.fromkeys(part for amounts in rows.values() for part in amounts))
    drawing, axes = _bars(len(rows), title, legend=len(parts) > 1, beneath=beneath)
    for y, amounts in enumerate(rows.values()):
        left = 0.0
        for part, amount in amounts.items():
            colour, known = COLOURS[parts.index(part) % len(COLOURS)], axes.get_legend_handles_labels()[1]
            axes.barh(y, amount, left=left, height=0.7, color=colour,
                      label=part if part not in known else None)
            left += amount
        axes.text(left, y, f" {_short(left)}", va="center", fontsize=8, color=INK)
    _named(axes, list(rows), x)
    axes.margins(x=0.12)
    if len(parts) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, ncols=min(4, len(parts)), loc="lower left",
                    bbox_to_anchor=(0, 1.0), borderaxespad=0.2)
    return drawing


def optimization_figure(steps: Sequence[tuple[str, float | None, bool]], *, title: str,
                        x: str = "seconds for the latents of one batch") -> Drawing:
    """A bar for each optimization step, (name, seconds or None, exact), with its time relative to the previous one's.

    Steps that are not exact, which make another image, are paler. None: "not measured here". ValueError for no steps.
    """
    if not steps:
        raise ValueError("there are no steps to draw: give at least one")
    drawing, axes = _bars(len(steps), title)
    previous = None
    for y, (_, seconds, exact) in enumerate(steps):
        if seconds is None:
            axes.text(0, y, " not measured here", va="center", fontsize=8, color=FAINT, style="italic")
            continue
        axes.barh(y, seconds, height=0.7, color=COLOURS[0], alpha=1 if exact else PALE)
        label = f" {_short(seconds)}" + (f"   {seconds / previous:.2f} of the previous" if previous else "")
        axes.text(seconds, y, label, va="center", fontsize=8, color=INK)
        previous = seconds
    longest = max((seconds for _, seconds, _ in steps if seconds), default=1.0)
    axes.set_xlim(0, 1.45 * longest)
    _named(axes, [name if exact else f"{name} (approximate)" for name, _, exact in steps], x)
    return drawing


def roofline_figure(points: Mapping[str, Point], peaks: Mapping[str, tuple[float, float]], *, title: str) -> Drawing:
    """Roofs of chips, (FLOP/s, bytes a second) by name, over FLOPs for each byte, and what lies beneath them.

    A disc's area is its share of the time. Work without FLOPs has no place on a logarithmic axis, so it is left out,
    and named beneath.
    """
    if not peaks:
        raise ValueError("a roofline needs a chip: give its peaks")
    drawing = Drawing(760, 400, title=title, sharpness=1.5, colours=48)
    axes = drawing.add_axes((0.09, 0.15, 0.88, 0.74))
    shown = {name: point for name, point in points.items() if point.intensity > 0 and point.speed > 0}
    ridges = [flops / moved for flops, moved in peaks.values()]
    low = min([1.0, *(point.intensity / 2 for point in shown.values())])
    high = max(4 * max(ridges), *(2 * point.intensity for point in shown.values()), 10)
    xs = np.geomspace(low, high, 200)
    for (name, (flops, moved)), style in zip(peaks.items(), ("-", "--", "-.", ":") * len(peaks), strict=False):
        axes.plot(xs, np.minimum(flops, moved * xs), color=COLOURS[5], linestyle=style, linewidth=1.5, label=name)
    for name, (intensity, speed, share) in shown.items():
        colour = COLOURS[list(points).index(name) % len(COLOURS)]           # as in `stacked`, which shows all of them
        axes.scatter(intensity, speed, s=40 + 900 * share, color=colour, alpha=0.75, zorder=3)
        axes.scatter([], [], s=40, color=colour, label=f"{name}, {share:.0%} of the time")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    plain(axes, "", "FLOPs for each byte that is moved", "FLOP/s")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    drawing.headline()
    if without := [f"{name}, {point.share:.0%} of the time" for name, point in points.items() if name not in shown]:
        drawing.text(0.09, 0.012, f"without FLOPs worth counting, so not on this axis: {'; '.join(without)}",
                     fontsize=8, color=FAINT)
    return drawing


class EstimateExplorer(WithStill):
    """Choices to turn, and what they come to: bars, and sentences. Nothing is raised.

    estimate(**chosen) gives an `Estimate`; choices: by name of an argument, its values, the first of them chosen.
    x: the name of the bars' axis.
    """

    def __init__(self, estimate: Callable[..., Estimate], choices: Mapping[str, Sequence], *, title: str, x: str):
        self.estimate, self.title, self.x = estimate, title, x
        wide = {"style": {"description_width": "150px"}, "layout": Layout(width="340px")}
        self.chosen = {name: Dropdown(options=[(str(value), value) for value in values], value=values[0],
                                      description=name.replace("_", " "), **wide) for name, values in choices.items()}
        self.image, self.told = Image(format="png"), HTML()
        for dropdown in self.chosen.values():
            dropdown.observe(lambda _: self.draw(), "value")
        super().__init__([HBox([VBox(list(self.chosen.values())), self.told]), self.image])
        self.draw()

    def settings(self) -> dict:
        """What is chosen, as keywords of `estimate`."""
        return {name: dropdown.value for name, dropdown in self.chosen.items()}

    def draw(self):
        """Show what the choices come to."""
        try:
            self.last = self.estimate(**self.settings())
        except REFUSED as error:
            self.told.value = html.escape(str(error))
            return
        self.image.value = self._figure().png()
        self.told.value = "<br>".join(map(html.escape, self.last.told))

    def still(self) -> Drawing:
        chosen = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings().items())
        return self._figure([*textwrap.wrap(chosen, 110), *self.last.told])

    def _figure(self, beneath: Sequence[str] = ()) -> Drawing:
        return stacked(self.last.bars, self.x, title=self.title, beneath=beneath)


def _bars(rows: int, title: str, legend: bool = False, beneath: Sequence[str] = ()):
    """A drawing with room for so many bars, and its axes."""
    top, bottom = 34 + (22 if legend else 0), 46 + LINE * len(beneath) + (EDGE if beneath else 0)
    height = top + BAR * rows + 12 + bottom
    drawing = Drawing(min(WIDTH, 860), height, title=title, sharpness=1.5, colours=48)
    drawing.headline()
    axes = drawing.add_axes((NAMES / drawing.width, bottom / height, 1 - (NAMES + 20) / drawing.width,
                             (height - bottom - top) / height))
    for i, line in enumerate(beneath):
        drawing.text(EDGE / drawing.width, (LINE * (len(beneath) - i) + EDGE / 2) / height, line, fontsize=8.5,
                     color=INK, va="top")
    return drawing, axes


def _named(axes, names: Sequence[str], x: str):
    axes.set_ylim(len(names) - 0.4, -0.6)
    plain(axes, "", x, "")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)


def _short(value: float) -> str:
    """Three digits, without an exponent where there need be none."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:,.0f}" if abs(value) >= 1e3 else (
        f"{value:.1e}")
