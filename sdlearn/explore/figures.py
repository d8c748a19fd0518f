"""Images side by side, and the steps of a sampler as a strip.

Lengths are in pixels of the screen. A figure is at most as wide as a page of a notebook.
"""

import base64
import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..data.atlas import load_sprite
from ..pipeline import SamplingStep

WIDTH = 1020            # of a page
DPI = 100               # so many pixels are an inch to matplotlib
GAP, EDGE = 10, 8       # between images, and around all of them
LINE = 15               # height of a line of a caption
HEAD = 34               # height of the title
SIDE = 76               # width of the names of rows
ZOOM = 3                # at most, of an image
GREYS = 24              # in a palette
PAPER = 246             # what is as bright as this is white: Pillow picks among neighbours that near at will
INK, FAINT = "#26262e", "#6b6b76"


class Drawing(Figure):
    """A matplotlib figure that shows itself, once, wherever a notebook is opened.

    It is made without pyplot, so nothing keeps it alive and no backend shows it a second time.
    sharpness: pixels in the file for one on the screen; more than 1 for fine lines and letters.
    colours: of its own, in the file: a third of the bytes of all colours, and a notebook holds many figures.
    """

    def __init__(self, width: float, height: float, *, title: str, sharpness: float = 1, colours: int = 232):
        super().__init__(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.width, self.height, self.title = round(width), round(height), title
        self.sharpness, self.colours = sharpness, colours

    def headline(self):
        """Write the title over the drawing, in the upper left corner."""
        self.suptitle(self.title, x=0.01, y=1 - 8 / self.height, va="top", ha="left", fontsize=11, fontweight="bold",
                      color=INK)

    def png(self) -> bytes:
        """The figure as a PNG file."""
        drawn, file = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=DPI * self.sharpness)
        image = Image.open(drawn).convert("RGB")
        image.quantize(palette=_palette(image, self.colours), dither=Image.Dither.NONE).save(
            file, format="PNG", optimize=True)
        return file.getvalue()

    def __repr__(self) -> str:
        return f"<Drawing: {self.title}>"

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        image = base64.b64encode(self.png()).decode("ascii")
        return ({"image/png": image, "text/plain": repr(self)},
                {"image/png": {"width": self.width, "height": self.height}})


def _palette(image: Image.Image, colours: int) -> Image.Image:
    """The image's own colours, with greys beside them: letters would take on the images' colours otherwise."""
    own = np.array(image.quantize(colours).getpalette()[:3 * colours], np.uint8).reshape(-1, 3)
    own[(own >= PAPER).all(axis=1)] = 255               # one white, not several that are almost white
    greys = np.linspace(0, 255, GREYS).round().astype(np.uint8)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*own.ravel().tolist(), *np.repeat(greys, 3).tolist()])
    return palette


def show_images(images: Sequence, captions: Sequence[str] = (), *, title: str, columns: int = 4) -> Drawing:
    """Images in a grid, row by row, each with its caption beneath, under one title.

    images: PIL images or uint8 arrays (H, W, 3), all in cells of the first one's size.
    captions: one for each image, or none; they are wrapped to the images' width.
    Raises ValueError for no images, or captions that are not as many.
    """
    images = [np.asarray(image) for image in images]
    if not images:
        raise ValueError("there are no images to show: give at least one")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one for each, or none")
    return _grid(images, captions or [""] * len(images), min(columns, len(images)), title)


def step_strip(steps: Sequence[SamplingStep], *, columns: int = 7,
               title: str = "One image, step by step") -> Drawing:
    """The first image of a batch at `columns` of its steps, the first and the last among them.

    Above: the latent after the step, decoded with all the noise that is still in it. Below: the clean
    image that the network saw when the step began.
    """
    steps = some_of(steps, columns)
    captions = [f"step {step.index + 1} of {step.of}\nfrom t = {step.t:.0f}" for step in steps]
    images = [step.noisy_images()[0] for step in steps] + [step.images()[0] for step in steps]
    return _grid([np.asarray(image) for image in images], [*captions, *[""] * len(steps)], len(steps), title,
                 rows=("the latent\nafter\nthe step", "what the\nnetwork\nsees in it"))


def portrait(name: str, colour: str | None = None, background: tuple[int, int, int] = (255, 255, 255),
             size: int = 64) -> np.ndarray:
    """An object as the scenes draw it, in the middle of a square; uint8 (size + 8, size + 8, 3).

    name: one of `data.OBJECTS` or `data.UNTAUGHT`. colour: a tint, for objects that take one.
    """
    rgba = load_sprite(name, colour, size).astype(np.uint16)                 # colours are premultiplied
    square = np.full((size + 8, size + 8, 3), background, np.uint16)
    top, left = ((size + 8 - side) // 2 for side in rgba.shape[:2])
    below = square[top:top + rgba.shape[0], left:left + rgba.shape[1]]
    below[:] = rgba[..., :3] + below * (255 - rgba[..., 3:]) // 255
    return square.astype(np.uint8)


def some_of(items: Sequence, count: int) -> list:
    """`count` of the items, evenly apart, with the first and the last; all of them if they are fewer."""
    if not items:
        raise ValueError("there are no steps to show: give the list of what `model.steps` yields")
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def _grid(images: list[np.ndarray], captions: Sequence[str], columns: int, title: str,
          rows: Sequence[str] = ()) -> Drawing:
    height, width = images[0].shape[:2]
    left = EDGE + (SIDE if rows else 0)
    zoom = _zoom((WIDTH - left - EDGE - (columns - 1) * GAP) / (columns * width))
    width, height = width * zoom, height * zoom
    captions = [_wrapped(caption, width) for caption in captions]
    count = -(-len(images) // columns)
    beneath = [LINE * max(caption.count("\n") + 1 if caption else 0 for caption in captions[i * columns:][:columns])
               for i in range(count)]
    total_w = left + columns * (width + GAP) - GAP + EDGE
    total_h = HEAD + sum(beneath) + count * (height + GAP) - GAP + EDGE
    # A title that is wider than its images would be cut off.
    drawing = Drawing(max(total_w, 9.4 * len(title) + 2 * EDGE), total_h, title=title)
    _write(drawing, EDGE, EDGE, title, size=11, weight="bold")
    top = HEAD
    for row in range(count):
        if rows:
            _write(drawing, EDGE, top + height / 2, rows[row], va="center")
        for column, place in enumerate(range(row * columns, min((row + 1) * columns, len(images)))):
            x = left + column * (width + GAP)
            _image(drawing, images[place], x, top, width, height)
            _write(drawing, x + width / 2, top + height + 3, captions[place], ha="center")
        top += height + beneath[row] + GAP
    return drawing


def _zoom(room: float) -> float:
    """How much to enlarge an image that fits `room` times: a whole number, so that its pixels stay sharp, or 1.5."""
    if room < 1:
        return room
    return 1.5 if 1.5 <= room < 2 else min(ZOOM, int(room))


def _wrapped(caption: str, width: float) -> str:
    return "\n".join(part for line in caption.split("\n") for part in textwrap.wrap(line, max(8, int(width / 6.3))))


def _image(drawing: Drawing, image: np.ndarray, x: float, y: float, width: float, height: float):
    axes = drawing.add_axes((x / drawing.width, 1 - (y + height) / drawing.height,
                             width / drawing.width, height / drawing.height))
    axes.imshow(image, interpolation="nearest" if width % image.shape[1] == 0 else "antialiased")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color="#d4d4da", linewidth=0.8)


def _write(drawing: Drawing, x: float, y: float, text: str, *, size: float = 8.5, ha: str = "left", va: str = "top",
           weight: str = "normal"):
    drawing.text(x / drawing.width, 1 - y / drawing.height, text, ha=ha, va=va, fontsize=size, weight=weight,
                 color=INK if weight == "bold" else FAINT, linespacing=1.25)
