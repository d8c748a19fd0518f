"""Where a ControlNet's residuals land, and a widget that composes an edge map from strokes.

H, W  pixels
"""

import html
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ipywidgets import HTML, Button, Dropdown, FloatSlider, HBox, Image, IntSlider, Layout, Text, VBox
from PIL import Image as Images
from PIL import ImageDraw

from ..config import UNetConfig
from ..controlnet import ControlNet
from ..data import SIDE
from ..evaluation.metrics import edges
from ..layers import zero_conv
from ..pipeline import PromptWarning, StableDiffusion
from .architecture import spelled
from .curves import COLOURS
from .figures import FAINT, INK, WIDTH, Drawing, show_images
from .unet_parts import rungs
from .widgets import REFUSED, WithStill, _enlarged, _png

KEPT = 4                # images that stay to compare with
PEN = 3                 # pixels: as wide as the outlines of the scenes' objects
STEPS = 15              # of the widget's images
ROW, TOP = 30, 84       # heights in the diagram


# --- where residuals land -----------------------------------------------------------------------------

class Landing(NamedTuple):
    """A residual: the layer of the U-Net that makes what it is added to, its shape, its zero convolution's size."""

    onto: str
    shape: tuple[int, int, int]     # (channels, rows, columns)
    parameters: int


def landings(config: UNetConfig, side: int) -> list[Landing]:
    """All residuals for a latent of side x side cells: skips in their order, the middle last. No weights are made."""
    skips, middle = rungs(config, side)
    found = []
    for onto, shape in [*((rung.name, rung.skip) for rung in skips), ("mid_block", middle)]:
        with torch.device("meta"):
            found.append(Landing(onto, shape, sum(one.numel() for one in zero_conv(shape[0]).parameters())))
    return found


def control_diagram(config: UNetConfig, side: int, *, title: str) -> Drawing:
    """Both encoders side by side: a row for each residual, with its shape and where it lands."""
    rows = landings(config, side)
    height = TOP + ROW * (len(rows) + 1)
    drawing = Drawing(min(WIDTH, 900), height, title=title, sharpness=1.5, colours=48)
    drawing.headline()
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 900), ylim=(height, 0))
    axes.axis("off")
    for x, head in ((120, "the copy, trained"), (330, "zero convolution"), (560, "added to the U-Net's, frozen"),
                    (800, "which is read on")):
        axes.text(x, TOP - 30, head, ha="center", fontsize=9, color=INK, fontweight="bold")
    axes.text(120, TOP - 14, "hint joins behind conv_in", ha="center", fontsize=8, color=FAINT)
    widest = max(np.log2(row.shape[0]) for row in rows)
    for i, (onto, shape, parameters) in enumerate(rows):
        y, wide = TOP + ROW * (i + 0.5), 40 + 180 * np.log2(shape[0]) / widest
        for x, colour in ((120, COLOURS[0]), (560, COLOURS[5])):
            axes.barh(y, wide, height=ROW * 0.72, left=x - wide / 2, color=colour, alpha=0.85)
            axes.text(x, y, onto if x > 500 else spelled(shape), ha="center", va="center", fontsize=7.5,
                      color="white")
        axes.annotate("", (560 - wide / 2 - 3, y), (120 + wide / 2 + 3, y),
                      arrowprops={"arrowstyle": "->", "color": COLOURS[1], "linewidth": 1.2})
        axes.text(330, y, f"{shape[0]} to {shape[0]}: {parameters:,}", ha="center", va="center", fontsize=8, color=INK,
                  bbox={"facecolor": "white", "edgecolor": COLOURS[1], "boxstyle": "round,pad=0.25", "linewidth": 0.8})
        axes.text(800, y, "by the first block on the way up" if i == len(rows) - 1 else "as a skip, on the way up",
                  ha="center", va="center", fontsize=8, color=FAINT)
    return drawing


# --- shapes to an edge map ----------------------------------------------------------------------------

class Shape(NamedTuple):
    """A shape drawn with a pen: its kind, its middle, width and height, all in pixels."""

    kind: str
    x: int
    y: int
    width: int
    height: int


def _corners(stroke: Shape) -> tuple[float, float, float, float]:
    return (stroke.x - stroke.width / 2, stroke.y - stroke.height / 2,
            stroke.x + stroke.width / 2, stroke.y + stroke.height / 2)


def _triangle(draw: ImageDraw.ImageDraw, stroke: Shape, **pen):
    left, top, right, bottom = _corners(stroke)
    draw.line([(left, bottom), (stroke.x, top), (right, bottom), (left, bottom)], joint="curve", **pen)


SHAPES = {
    "ellipse": lambda draw, stroke, fill, width: draw.ellipse(_corners(stroke), outline=fill, width=width),
    "box": lambda draw, stroke, fill, width: draw.rectangle(_corners(stroke), outline=fill, width=width),
    "triangle": _triangle,
    "line, falling": lambda draw, stroke, **pen: draw.line(_corners(stroke), **pen),
    "line, rising": lambda draw, stroke, **pen: draw.line(
        [_corners(stroke)[i] for i in (0, 3, 2, 1)], **pen),
}


def edge_map_of(strokes: Sequence[Shape], side: int = SIDE) -> np.ndarray:
    """Pen strokes as an edge map, uint8 (side, side) of 0 and 255: both borders of each, by the scenes' own rule.

    Raises ValueError for a kind that is not in `SHAPES`.
    """
    paper = Images.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(paper)
    for stroke in strokes:
        if stroke.kind not in SHAPES:
            raise ValueError(f"there is no shape '{stroke.kind}'; choose one of {', '.join(SHAPES)}")
        SHAPES[stroke.kind](draw, stroke, fill="black", width=PEN)
    return edges([paper])[0].numpy().astype(np.uint8) * 255


def borders(drawn: np.ndarray) -> np.ndarray:
    """Free-hand lines, bytes (H, W) of 0 and 255, as an edge map of the same form: both borders of each line."""
    return edges([Images.fromarray(255 - drawn).convert("RGB")])[0].numpy().astype(np.uint8) * 255


def as_image(maps: np.ndarray) -> np.ndarray:
    """A map, uint8 (H, W), as a grey image (H, W, 3)."""
    return np.stack([maps] * 3, axis=2)


class SketchExplorer(WithStill):
    """Strokes from sliders make an edge map; the ControlNet's image of it, with a prompt, a strength and an end.

    For straight lines and true circles, and for whom the mouse does not serve; `pad.DrawingPad` is for the free hand.
    What is being placed is shown in the map at once; "Add" keeps it. The image of the first strokes is drawn at
    once. Nothing is raised.
    """

    def __init__(self, model: StableDiffusion, net: ControlNet, prompt: str, strokes: Sequence[Shape], *,
                 steps: int = STEPS):
        wide = {"style": {"description_width": "70px"}, "layout": Layout(width="320px")}
        side = model.size(None)[0]
        self.model, self.net, self.count, self.side = model, net, steps, side
        self.kind = Dropdown(options=list(SHAPES), description="shape", **wide)
        self.x, self.y = (IntSlider(side // 2, min=0, max=side, description=name, **wide) for name in ("x", "y"))
        self.width, self.height = (IntSlider(side // 3, min=4, max=side, description=name, **wide)
                                   for name in ("width", "height"))
        self.add, self.undo = Button(description="Add", icon="plus"), Button(description="Undo", icon="undo")
        self.prompt = Text(prompt, description="prompt", **wide)
        self.strength = FloatSlider(1, min=0, max=2, step=0.1, description="strength", **wide)
        self.end = FloatSlider(1, min=0.1, max=1, step=0.1, description="end", **wide)
        self.seed = IntSlider(0, min=0, max=99, description="seed", **wide)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.message, self.map, self.shown = HTML(), Image(format="png"), HBox(layout=Layout(flex_flow="row wrap"))
        self.strokes, self.rows = list(strokes), []
        for control in (self.kind, self.x, self.y, self.width, self.height):
            control.observe(lambda _: self.preview(), "value")
        self.add.on_click(lambda _: self.change([*self.strokes, self.pen()]))
        self.undo.on_click(lambda _: self.change(self.strokes[:-1]))
        self.button.on_click(lambda _: self.draw())
        left = VBox([self.kind, self.x, self.y, self.width, self.height, HBox([self.add, self.undo]), self.prompt,
                     self.strength, self.end, self.seed, HBox([self.button, self.message])])
        super().__init__([HBox([left, self.map]), self.shown])
        self.change(self.strokes)
        self.draw()

    def pen(self) -> Shape:
        """The shape that is being placed."""
        return Shape(self.kind.value, self.x.value, self.y.value, self.width.value, self.height.value)

    def change(self, strokes: list[Shape]):
        """Keep these strokes."""
        self.strokes = strokes
        self._show_map(edge_map_of(strokes, self.side))

    def preview(self):
        """Show the kept strokes and the one being placed."""
        self._show_map(edge_map_of([*self.strokes, self.pen()], self.side))

    def settings(self) -> Mapping:
        """What is set, as keywords of `model.control`."""
        return {"prompt": self.prompt.value, "conditioning_scale": self.strength.value, "end": self.end.value,
                "seed": self.seed.value}

    def draw(self):
        """Make the image of the kept strokes, and put it before the earlier ones."""
        self.button.disabled, self.message.value = True, "drawing ..."
        chosen, drawn = self.settings(), as_image(edge_map_of(self.strokes, self.side))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)
                [image] = self.model.control(net=self.net, hint=drawn, num_inference_steps=self.count, **chosen)
        except REFUSED as error:
            self.message.value = html.escape(str(error))
        else:
            self.message.value = "<br>".join(html.escape(said)
                                             for _, said in self.model.prompt_warnings(chosen["prompt"]))
            said = (f"{chosen['prompt']}, strength {chosen['conditioning_scale']:g}, end {chosen['end']:g}, "
                    f"seed {chosen['seed']}")
            self.rows = [(said, drawn, image), *self.rows][:KEPT]
            self.shown.children = [self._card(words, one) for words, _, one in self.rows]
        finally:
            self.button.disabled = False

    def still(self) -> Drawing:
        return show_images([one for _, drawn, image in self.rows for one in (drawn, image)],
                           [one for said, *_ in self.rows for one in ("the strokes' edges", said)],
                           title="Strokes and what is made of them", columns=4)

    def _card(self, words: str, image: Images.Image) -> VBox:
        return VBox([Image(value=_png(_enlarged(image, 2 * self.side)), format="png", layout=Layout(width="240px")),
                     HTML(f"<small>{html.escape(words)}</small>")])

    def _show_map(self, drawn: np.ndarray):
        self.map.value = _png(_enlarged(Images.fromarray(as_image(drawn)), 2 * self.side))
