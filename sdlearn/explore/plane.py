"""Distributions over the plane: points, fields of arrows and paths of samples; and a widget that samples there.

N  points       n  steps of a run
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ipywidgets import Dropdown, HBox, Image, IntSlider, Layout, Play, jslink
from torch import Tensor

from ..samplers import Step, make_timesteps_for
from ..schedule import NoiseSchedule, Timesteps
from .curves import COLOURS, plain
from .figures import HEAD, INK, WIDTH, Drawing
from .widgets import WithStill

BEHIND = "#c9c9d2"      # of what is there to compare with
FEW = len(COLOURS)      # points that are drawn large, each in a colour of its own
LEFT, RIGHT, ABOVE, BELOW = 62, 10, 22, 42      # pixels around a square, for what is written there
LARGEST = 330           # pixels of a square with its margins


@dataclass(frozen=True)
class Plane:
    """What to draw on one square of the plane: any of its parts.

    points, behind      (N, 2), in colour, and grey behind all else
    arrows              pair of (N, 2): where they start, and where they point
    paths               (n + 1, N, 2), the places of N points after each step
    """

    title: str
    points: Tensor | None = None
    behind: Tensor | None = None
    arrows: tuple[Tensor, Tensor] | None = None
    paths: Tensor | None = None


def planes(*panels: Plane, title: str, reach: float = 2.4, columns: int = 4) -> Drawing:
    """Squares from -reach to reach, in rows of `columns`. Raises ValueError for none."""
    if not panels:
        raise ValueError("there is nothing to draw: give at least one plane")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    several = any(panel.points is not None and len(panel.points) <= FEW for panel in panels)
    drawing, grid = squares(rows, columns, title, colours=96 if several else 48)
    for axes, panel in zip(grid, panels, strict=False):
        draw_plane(axes, panel, reach)
    for axes in grid[len(panels):]:
        axes.axis("off")
    return drawing


def squares(rows: int, columns: int, title: str, colours: int = 48) -> tuple[Drawing, list]:
    """A drawing with room for squares, and their axes, row by row: matplotlib's own layouts cut their labels off."""
    cell = min(WIDTH / columns, LARGEST)
    side = cell - LEFT - RIGHT
    height = side + ABOVE + BELOW
    drawing = Drawing(cell * columns, HEAD + height * rows, title=title, sharpness=1.25, colours=colours)
    drawing.text(8 / drawing.width, 1 - 8 / drawing.height, title, va="top", fontsize=11, weight="bold", color=INK)
    size = side / drawing.width, side / drawing.height
    corners = [(cell * column + LEFT, HEAD + height * row + ABOVE + side)               # lower left, from above
               for row in range(rows) for column in range(columns)]
    return drawing, [drawing.add_axes((x / drawing.width, 1 - y / drawing.height, *size)) for x, y in corners]


def draw_plane(axes, panel: Plane, reach: float):
    """One square on matplotlib's axes."""
    if panel.behind is not None:
        axes.scatter(*_columns(panel.behind), s=3, color=BEHIND, linewidths=0)
    if panel.paths is not None:
        for path in np.asarray(panel.paths.detach(), float).transpose(1, 2, 0):
            axes.plot(*path, color=COLOURS[0], linewidth=0.8, alpha=0.7, marker=".", markersize=2.5)
    if panel.arrows is not None:
        start, along = panel.arrows
        axes.quiver(*_columns(start), *_columns(along), color=COLOURS[1], angles="xy", width=0.005)
    if panel.points is not None:
        few = len(panel.points) <= FEW
        axes.scatter(*_columns(panel.points), s=60 if few else 4, linewidths=0, zorder=3,
                     color=COLOURS[:len(panel.points)] if few else COLOURS[0])
    plain(axes, panel.title, "first coordinate", "second coordinate")
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")


def lattice(reach: float = 2.2, side: int = 19) -> np.ndarray:
    """(side * side, 2): places evenly over the square, float64."""
    line = np.linspace(-reach, reach, side)
    return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def sliced_distance(a: Tensor, b: Tensor, directions: int = 32) -> float:
    """How far two sets of as many points (N, 2) are apart, as distributions: sliced Wasserstein-1.

    Projected onto a line, and sorted, the points of the one are paired with those of the other; the mean distance
    of pairs, over `directions` lines. Rabin et al. 2011.
    """
    angles = np.arange(directions) * np.pi / directions
    lines = np.stack([np.cos(angles), np.sin(angles)])                                  # (2, directions)
    first, second = (np.sort(np.asarray(points.detach(), float) @ lines, axis=0) for points in (a, b))
    return float(np.abs(first - second).mean())


def _columns(points: Tensor) -> np.ndarray:
    return np.asarray(points.detach(), float).T


class SamplerExplorer(WithStill):
    """A sampler and its number of steps to choose, and a slider over the steps of the run.

    Three squares: the points after the step, what the denoiser predicted for each of them when the step
    began, and the grid: how much noise is left at each of its timesteps, with the step marked.

    denoise(x, t) -> x0 and x (N, 2) as samplers take them; samplers: by name; data (N, 2): drawn grey behind.
    """

    def __init__(self, denoise, x: Tensor, schedule: NoiseSchedule, samplers: Mapping, data: Tensor, *,
                 steps: int = 20, title: str = "A run, step by step"):
        self.denoise, self.x, self.schedule, self.samplers = denoise, x, schedule, dict(samplers)
        self.data, self.title = data, title
        wide = {"layout": Layout(width="330px")}
        self.sampler = Dropdown(options=list(self.samplers), description="sampler", **wide)
        self.count = IntSlider(steps, min=2, max=50, description="steps", continuous_update=False, **wide)
        self.step = IntSlider(0, min=0, max=steps - 1, description="step", **wide)
        self.play = Play(min=0, max=steps - 1, interval=400, show_repeat=False)
        self.link = jslink((self.play, "value"), (self.step, "value"))
        self.image = Image(format="png")
        super().__init__([HBox([self.sampler, self.count]), HBox([self.step, self.play]), self.image])
        self.walk()
        self.sampler.observe(lambda _: self.walk(), "value")
        self.count.observe(lambda _: self.walk(), "value")
        self.step.observe(lambda _: self.show(), "value")

    def walk(self):
        """Make the run of what is chosen, and show its step."""
        name, count = self.sampler.value, self.count.value
        self.grid = make_timesteps_for(name, self.schedule, count)
        self.run: list[Step] = list(self.samplers[name](self.denoise, self.x, self.grid, self.schedule))
        self.play.max = self.step.max = count - 1           # brings the step back into the run, if it lay beyond
        self.show()

    def show(self):
        self.image.value = self.frame([self.step.value]).png()

    def frame(self, indices: Sequence[int]) -> Drawing:
        """A row of three squares for each of these steps."""
        named = f"{self.title}: {self.sampler.value}, {self.count.value} steps"
        drawing, grid = squares(len(indices), 3, named)
        for place, index in enumerate(indices):
            row, step = grid[3 * place:3 * place + 3], self.run[index]
            for axes, points, what in ((row[0], step.x, f"x after step {index + 1}"),
                                       (row[1], step.x0, f"x0 predicted from t = {step.t:.0f}")):
                draw_plane(axes, Plane(what, points, self.data), reach=3.0)
            draw_grid(row[2], self.schedule, self.grid, index)
        return drawing

    def still(self) -> Drawing:
        return self.frame(sorted({0, self.count.value // 2, self.count.value - 1}))


def draw_grid(axes, schedule: NoiseSchedule, grid: Timesteps, index: int):
    """sigma, the share of noise, at every timestep of a grid, with the step `index` marked; the end stands at 0."""
    times = range(schedule.num_train_timesteps)
    axes.plot(times, [schedule.at(t)[1] for t in times], color=BEHIND, linewidth=1.4)
    places = [0 if t is None else t for t in (grid[0][0], *(end for _, end in grid))]
    left = [schedule.at(t)[1] for t in (grid[0][0], *(end for _, end in grid))]
    axes.plot(places, left, "o", color=COLOURS[0], markersize=3.5)
    axes.plot(places[index:index + 2], left[index:index + 2], "o-", color=COLOURS[1], markersize=5, linewidth=2)
    plain(axes, f"the grid, step {index + 1} marked", "timestep t", "sigma, share of noise")
    axes.set(xlim=(1020, -20), ylim=(-0.03, 1.05), box_aspect=1)
