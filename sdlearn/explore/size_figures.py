"""Images of different sizes in one scale, where things lie in them, and a widget that draws at any size.

Lengths are in pixels of the screen.
"""

import html
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from ipywidgets import HTML, BoundedIntText, Button, Checkbox, Dropdown, FloatSlider, HBox, Image, Layout, Text, VBox
from PIL import Image as Images
from PIL import ImageDraw

from ..pipeline import PromptWarning, StableDiffusion, two_pass
from ..sizes import Box, Size, size_multiple
from .curves import COLOURS, Panel, curves
from .figures import EDGE, GAP, HEAD, LINE, WIDTH, Drawing, _image, _wrapped, _write, show_images
from .guidance_figures import side_by_side
from .widgets import REFUSED, WithStill, _png

SHOWN = 2               # images of a row, seeds from the first on
KEPT = 4                # rows that stay to compare with


def true_sizes(images: Sequence, captions: Sequence[str] = (), *, title: str, zoom: float = 1.0,
               breaks: Sequence[int] = ()) -> Drawing:
    """Images of any sizes in one scale, from left to right and row by row, each with its caption beneath.

    images: PIL images or uint8 arrays (H, W, 3). zoom: pixels of the screen for one of an image. breaks: the places
    in the list at which a new row begins, beside those where a row is full. ValueError for no images, captions that
    are not as many, and an image wider than a page.
    """
    images = [np.asarray(image) for image in images]
    captions = list(captions) or [""] * len(images)
    if not images or len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each, or none")
    room = WIDTH - 2 * EDGE
    if (widest := max(image.shape[1] * zoom for image in images)) > room:
        raise ValueError(f"an image would be {widest:.0f} pixels wide, but a page has {room}: give a smaller zoom")
    places, x, y, row = [], EDGE, HEAD, 0.0                     # row: height of the row so far, captions with it
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        height, width = (side * zoom for side in image.shape[:2])
        told = _wrapped(caption, width)
        if x > EDGE and (i in breaks or x + width > EDGE + room):
            x, y, row = EDGE, y + row + GAP, 0.0
        places.append((x, y, width, height, told))
        x += width + GAP
        row = max(row, height + (3 + LINE * (told.count("\n") + 1) if told else 0))
    right = max(x + width for x, _, width, _, _ in places) + EDGE
    drawing = Drawing(min(WIDTH, max(right, 9.4 * len(title) + 2 * EDGE)), y + row + EDGE, title=title)
    _write(drawing, EDGE, EDGE, title, size=11, weight="bold")
    for image, (x, y, width, height, told) in zip(images, places, strict=True):
        _image(drawing, image, x, y, width, height)
        _write(drawing, x + width / 2, y + height + 3, told, ha="center")
    return drawing


def box_map(size: Size, boxes: Sequence[Sequence[Box]]) -> np.ndarray:
    """Where things lie, those of all images of one size on one pale ground: each box as a thin line with a dot in its
    middle, and one colour for each image. uint8 (H, W, 3)."""
    ground = Images.new("RGB", size, "#f1f0ea")
    pen = ImageDraw.Draw(ground)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline="#26262e")
    for some, colour in zip(boxes, cycle(COLOURS)):
        for left, top, right, bottom in some:
            x, y = (left + right) / 2, (top + bottom) / 2
            pen.rectangle((left, top, right, bottom), outline=colour)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    return np.asarray(ground)


def by_steps(found: Mapping, panels: Mapping[str, str], y: str, *, title: str) -> Drawing:
    """Curves of an ablation's result over its steps: a panel for each figure, a line in it for each variant.

    found: what `load_ablation` gives. panels: the panel's title by the figure's name. ValueError for a figure that no
    reading holds.
    """
    runs = {name: run["measurements"] for name, run in found["variants"].items()}
    if missing := [name for name in panels if not any(name in one for some in runs.values() for one in some)]:
        raise ValueError(f"nothing was measured of {', '.join(missing)} in the ablation '{found['ablation']}'")
    return curves(*(Panel(told, "steps", y, {
        run: tuple(zip(*((one["step"], one[figure]) for one in some if figure in one), strict=True))
        for run, some in runs.items()}) for figure, told in panels.items()), title=title, height=300)


class SizeExplorer(WithStill):
    """A prompt, width and height, one pass or two and how strong the second is, and a button that draws a row.

    Each row holds two seeds; the last rows stay to compare with. The row of the first settings is drawn at once. What
    no image can be made with is told beside the button; nothing is raised.
    """

    def __init__(self, model: StableDiffusion, prompt: str, *, steps: int = 8, guidance: float = 4.0):
        self.model, self.given = model, {"num_inference_steps": steps, "guidance_scale": guidance, "batch": SHOWN}
        own, step = model.config.image_size, size_multiple(model.config)
        sides = list(range(own // 2, 2 * own + 1, step // 2))
        wide = {"style": {"description_width": "80px"}, "layout": Layout(width="440px")}
        self.prompt = Text(prompt, description="prompt", **wide)
        self.width = Dropdown(options=sides, value=2 * own, description="width", **wide)
        self.height = Dropdown(options=sides, value=own, description="height", **wide)
        self.passes = Checkbox(value=False, description="two passes", **wide)
        self.strength = FloatSlider(0.5, min=0.2, max=1, step=0.1, description="strength", **wide)
        self.seed = BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **wide)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.message, self.shown = HTML(), VBox()
        self.rows: list[tuple[str, list[Images.Image]]] = []      # the newest first
        self.button.on_click(lambda _: self.draw())
        super().__init__([self.prompt, self.width, self.height, self.passes, self.strength, self.seed,
                          HBox([self.button, self.message]), self.shown])
        self.draw()

    def draw(self):
        """Make the row of what is set, and put it above the earlier ones."""
        self.button.disabled, self.message.value = True, "drawing ..."
        prompt, size = self.prompt.value, (self.width.value, self.height.value)
        settings = {**self.given, "seed": self.seed.value}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)
                images = (two_pass(self.model, prompt, size, strength=self.strength.value, **settings)
                          if self.passes.value else self.model.text2img(prompt, size=size, **settings))
        except REFUSED as error:
            self.message.value = html.escape(str(error))
        else:
            self.message.value = "<br>".join(html.escape(told) for _, told in self.model.prompt_warnings(prompt))
            self.rows = [(self.said(), images), *self.rows][:KEPT]
            self.shown.children = [part for said, row in self.rows for part in (
                HTML(html.escape(said)), Image(value=_png(side_by_side(row)), format="png",
                                               layout=Layout(width=f"{side_by_side(row).width}px")))]
        finally:
            self.button.disabled = False

    def said(self) -> str:
        """The settings of a row in words."""
        passes = f", two passes of strength {self.strength.value:g}" if self.passes.value else ""
        return f"{self.prompt.value}, {self.width.value} x {self.height.value}{passes}"

    def still(self) -> Drawing:
        said, images = self.rows[0]
        return show_images(images, title=said, columns=SHOWN)
