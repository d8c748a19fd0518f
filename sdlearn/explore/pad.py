"""A pad to draw on with the mouse or a finger: an edge map for a ControlNet, a mask for inpainting.

The browser shows ipycanvas' canvases; what was drawn is kept in Python as strokes, and from these the
image is made that a model reads, so that it is the same with any browser, and with none.
"""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ipycanvas import MultiCanvas, hold_canvas
from ipywidgets import HTML, Button, HBox, Image, IntSlider, Layout, Text, ToggleButtons
from PIL import Image as Images
from PIL import ImageDraw

from .figures import Drawing, show_images
from .widgets import REFUSED, SHOWN, WithStill, _enlarged, _png

Point = tuple[float, float]             # x, y in pixels of the image
INK = (255, 255, 255)                   # of a line
VEIL = (255, 60, 60)                    # of what a mask covers, over an image that is seen through it
SEEN_THROUGH = 0.55


@dataclass(frozen=True)
class Stroke:
    """A line of `width` pixels through points (x, y) in pixels of the image; it takes away if `erases`."""

    points: tuple[Point, ...]
    width: int = 2
    erases: bool = False


def drawn_from(strokes: Sequence[Stroke], size: tuple[int, int]) -> np.ndarray:
    """What strokes leave on a picture of size (H, W): bytes (H, W), 255 where there is a line and 0 elsewhere."""
    canvas = Images.new("L", size[::-1])
    pen = ImageDraw.Draw(canvas)
    for stroke in strokes:
        fill, half = 0 if stroke.erases else 255, stroke.width / 2
        if stroke.width > 2:                                        # round ends, and a click alone is a dot
            for x, y in (stroke.points[0], stroke.points[-1]):
                pen.ellipse((x - half, y - half, x + half, y + half), fill)
        if len(stroke.points) > 1:
            pen.line(stroke.points, fill, stroke.width, joint="curve")
        else:
            pen.point(stroke.points, fill)
    return np.array(canvas)


class DrawingPad(WithStill):
    """A canvas with a pen, a rubber, undo and clear, and a button that makes a picture of what was drawn.

    image: what is drawn upon, (H, W, 3) bytes or a PIL image; black and of `size` where there is none.
    make: (drawn, prompt) -> PIL image, where drawn is bytes (H, W) of 0 and 255: it runs when the button is
    pressed, and once at the start if something is there already. strokes: what is there at the start.
    What it refuses (ValueError and its kin) is told beneath the button. Raises ValueError for a size that
    is not the image's.
    """

    def __init__(self, image=None, *, size: tuple[int, int] = (128, 128), width: int = 2, prompt: str = "",
                 make: Callable[[np.ndarray, str], Images.Image] | None = None, strokes: Sequence[Stroke] = (),
                 title: str = "Drawing pad"):
        self.under = None if image is None else np.array(Images.fromarray(np.asarray(image)).convert("RGB"))
        self.size = size if self.under is None else self.under.shape[:2]
        self.make, self.title, self.strokes, self.begun = make, title, list(strokes), None
        self.scale = max(1, -(-SHOWN // self.size[1]))
        self.canvas = MultiCanvas(2, width=self.size[1] * self.scale, height=self.size[0] * self.scale,
                                  layout=Layout(border="1px solid #888"))
        self.pen = ToggleButtons(options=["draw", "erase"], style={"button_width": "70px"})
        self.width = IntSlider(width, min=1, max=40, description="width", layout=Layout(width="260px"))
        self.prompt = Text(prompt, description="prompt", layout=Layout(width="360px"))
        self.message, self.made = HTML(), None
        self.result = Image(format="png", layout=Layout(display="none", margin="0 0 0 12px"))
        buttons = [self._button("undo", self.undo), self._button("clear", self.clear)]
        if make is not None:
            buttons.append(self._button("Draw the image", self.run, "primary"))
        self._listen()
        rows = [HBox([self.canvas, self.result]), HBox([self.pen, self.width]), HBox(buttons), self.message]
        if make is not None:
            rows.insert(2, self.prompt)
        super().__init__(rows)
        self._paint_ground()
        self._paint_strokes()
        if make is not None and self.strokes:
            self.run()

    @property
    def drawn(self) -> np.ndarray:
        """What is on the pad: bytes (H, W), 255 where something was drawn and 0 elsewhere."""
        return drawn_from(self.strokes, self.size)

    def start(self, x: float, y: float):
        """The pen comes down, at a point of the canvas."""
        self.begun = Stroke((self._point(x, y),), self.width.value, self.pen.value == "erase")

    def move(self, x: float, y: float):
        """The pen goes on to a point of the canvas; without effect while it is up."""
        if self.begun is None:
            return
        last, here = self.begun.points[-1], self._point(x, y)
        self.begun = Stroke((*self.begun.points, here), self.begun.width, self.begun.erases)
        if not self.begun.erases:                                   # what is taken away is seen when the pen is up
            layer = self.canvas[1]
            layer.stroke_style, layer.line_width, layer.line_cap = _css(self._ink), self._line, "round"
            layer.stroke_line(*(self.scale * value for value in (*last, *here)))

    def end(self, *_):
        """The pen goes up: the stroke is there to stay."""
        if self.begun is not None:
            self.strokes.append(self.begun)
            self.begun = None
            self._paint_strokes()

    def undo(self):
        """Take the last stroke back, if there is one."""
        del self.strokes[-1:]
        self._paint_strokes()

    def clear(self):
        """Take all strokes back."""
        self.strokes.clear()
        self._paint_strokes()

    def run(self):
        """Make the image of what is drawn, and show it."""
        self.message.value = ""
        try:
            self.made = self.make(self.drawn, self.prompt.value)
            self.result.value, self.result.layout.display = _png(_enlarged(self.made, SHOWN)), None
        except REFUSED as error:
            self.message.value = html.escape(str(error))

    def still(self) -> Drawing:
        shown = [Images.fromarray(self._seen())]
        titles = ["drawn"]
        if self.made is not None:
            shown.append(self.made)
            titles.append(self.prompt.value or "made of it")
        return show_images(shown, titles, title=self.title, columns=len(shown))

    @property
    def _ink(self) -> tuple[int, int, int]:
        return INK if self.under is None else VEIL

    @property
    def _line(self) -> float:
        return self.begun.width * self.scale

    def _seen(self) -> np.ndarray:
        """The ground with what is drawn over it, bytes (H, W, 3)."""
        ground = np.zeros((*self.size, 3), np.uint8) if self.under is None else self.under
        opacity = (1.0 if self.under is None else SEEN_THROUGH) * (self.drawn[..., None] / 255)
        return (ground * (1 - opacity) + np.array(self._ink) * opacity).round().astype(np.uint8)

    def _point(self, x: float, y: float) -> Point:
        return x / self.scale, y / self.scale

    def _listen(self):
        canvas = self.canvas
        canvas.on_mouse_down(self.start)
        canvas.on_mouse_move(self.move)
        canvas.on_mouse_up(self.end)
        canvas.on_mouse_out(self.end)
        canvas.on_touch_start(lambda points: self.start(*points[0]) if points else None)
        canvas.on_touch_move(lambda points: self.move(*points[0]) if points else None)
        canvas.on_touch_end(self.end)

    def _paint_ground(self):
        ground = np.zeros((*self.size, 3), np.uint8) if self.under is None else self.under
        self.canvas[0].put_image_data(ground.repeat(self.scale, 0).repeat(self.scale, 1), 0, 0)

    def _paint_strokes(self):
        """What is drawn, exactly as a model will read it: pixel by pixel, and seen through over an image."""
        opacity = 255 if self.under is None else round(255 * SEEN_THROUGH)
        layer = np.zeros((*self.size, 4), np.uint8)
        layer[..., :3], layer[..., 3] = self._ink, self.drawn // 255 * opacity
        with hold_canvas():
            self.canvas[1].clear()
            self.canvas[1].put_image_data(layer.repeat(self.scale, 0).repeat(self.scale, 1), 0, 0)

    @staticmethod
    def _button(name: str, action: Callable[[], None], style: str = "") -> Button:
        button = Button(description=name, button_style=style, layout=Layout(width="auto"))
        button.on_click(lambda _: action())
        return button


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb{colour}"
