"""What learns in each way of teaching a model one new thing, sheets of images, and a widget that asks all of them.

Lengths are in pixels of the screen.
"""

import html
import textwrap
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from ipywidgets import HTML, BoundedIntText, Button, FloatSlider, HBox, Image, Layout, Text, VBox

from ..finetune import LoRA
from ..pipeline import PromptWarning, StableDiffusion
from .curves import COLOURS
from .figures import FAINT, INK, WIDTH, Drawing, _grid, show_images
from .guidance_figures import side_by_side
from .widgets import REFUSED, WithStill, _png

KEPT = 3                # rows that stay to compare with
ROW, TOP = 62, 74       # heights in the diagram
FROZEN = "#d9d9e0"

# Of each way: what learns, by part, and how the part is drawn: "row" a line in it, "beside" thin boxes, "all".
LEARNS = {
    "textual inversion": {"table": "row"},
    "LoRA": {"U-Net": "beside"},
    "DreamBooth": {"U-Net": "all"},
    "DreamBooth, text encoder too": {"table": "all", "text encoder": "all", "U-Net": "all"},
}
PARTS = {"table": (250, 110), "text encoder": (390, 150), "U-Net": (570, 220), "VAE": (820, 90)}      # left, width


def what_learns(*, title: str) -> Drawing:
    """A row for each way: the parts that a prompt goes through, and which of their numbers learn."""
    height = TOP + ROW * len(LEARNS)
    drawing = Drawing(940, height, title=title, sharpness=1.5, colours=48)
    drawing.headline()
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 940), ylim=(height, 0))
    axes.axis("off")
    for part, (left, width) in PARTS.items():
        named = "token embedding" if part == "table" else part
        axes.text(left + width / 2, TOP - 14, named, ha="center", fontsize=9, color=INK, fontweight="bold")
    for i, (way, learns) in enumerate(LEARNS.items()):
        y = TOP + ROW * i
        axes.text(14, y + 26, way, va="center", fontsize=9, color=INK)
        for part, (left, width) in PARTS.items():
            _part(axes, left, y + 6, width, 40, learns.get(part))
        for a, b in zip([*PARTS][:-1], [*PARTS][1:], strict=True):
            start = sum(PARTS[a])
            axes.annotate("", (PARTS[b][0] - 2, y + 26), (start + 2, y + 26),
                          arrowprops={"arrowstyle": "->", "color": FAINT, "linewidth": 1.0})
    return drawing


def _part(axes, left: float, top: float, width: float, height: float, learns: str | None):
    """One part as a box, what learns of it in colour."""
    def box(x, y, w, h, colour):
        axes.bar(x, h, width=w, bottom=y, align="edge", color=colour, edgecolor="white", linewidth=0.8)

    box(left, top, width, height, COLOURS[1] if learns == "all" else FROZEN)
    if learns == "row":
        box(left, top + height - 8, width, 8, COLOURS[1])
    if learns == "beside":                              # a thin pair beside each of some layers
        for k in range(5):
            x = left + width * (k + 0.5) / 5
            box(x - 9, top + 6, 7, height - 12, COLOURS[1])
            box(x + 2, top + 6, 7, height - 12, COLOURS[1])
    if told := {"all": "learns", "row": "one new row", None: "frozen"}.get(learns):
        y = top + (height - 8) / 2 if learns == "row" else top + height / 2
        axes.text(left + width / 2, y, told, ha="center", va="center", fontsize=8,
                  color="white" if learns == "all" else INK)


def sheet(rows: Mapping[str, Sequence], heads: Sequence[str], *, title: str) -> Drawing:
    """A row of images under each name, and over all columns what they were asked for, written beneath the last row.

    rows: as many images, uint8 (H, W, 3), in each as there are `heads`. ValueError for other counts.
    """
    if not rows or any(len(images) != len(heads) for images in rows.values()):
        counts = ", ".join(f"{name} {len(images)}" for name, images in rows.items()) or "no rows"
        raise ValueError(f"each row needs an image for each of the {len(heads)} heads, but there are: {counts}")
    images = [np.asarray(image) for row in rows.values() for image in row]
    captions = [""] * (len(images) - len(heads)) + list(heads)
    names = ["\n".join(textwrap.wrap(name.replace("DreamBooth", "Dream-Booth"), 10)) for name in rows]
    return _grid(images, captions, len(heads), title, rows=names)


class ConceptExplorer(WithStill):
    """A prompt with {} where the new thing goes, a seed, the LoRA's strength, and a button: an image by each way.

    ways: by name, a model and its words for the thing. lora: which of the ways is a base to which this LoRA is added,
    and the LoRA. The last rows stay to compare with. The row of the first settings is drawn at once. What no image
    can be made with is told beside the button; nothing is raised.
    """

    def __init__(self, ways: Mapping[str, tuple[StableDiffusion, str]], prompt: str, *,
                 lora: tuple[str, LoRA] | None = None, steps: int = 10, guidance: float = 3.0):
        self.ways, self.lora, self.given = dict(ways), lora, {"num_inference_steps": steps, "guidance_scale": guidance}
        wide = {"style": {"description_width": "80px"}, "layout": Layout(width="440px")}
        self.prompt = Text(prompt, description="prompt", **wide)
        self.seed = BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **wide)
        self.strength = FloatSlider(1, min=0, max=2, step=0.1, description="LoRA", **wide)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.message, self.shown = HTML(), VBox()
        self.rows: list[tuple[str, list]] = []          # the newest first
        self.button.on_click(lambda _: self.draw())
        super().__init__([self.prompt, self.seed, *([self.strength] if lora else []),
                          HBox([self.button, self.message]), self.shown])
        self.draw()

    def draw(self):
        """Make an image by each way, and put the row above the earlier ones."""
        self.button.disabled, self.message.value = True, "drawing ..."
        try:
            images = [self._image(name, model, words) for name, (model, words) in self.ways.items()]
        except REFUSED as error:
            self.message.value = html.escape(str(error))
        else:
            self.message.value = ""
            self.rows = [(self.said(), images), *self.rows][:KEPT]
            self.shown.children = [part for said, row in self.rows for part in (
                HTML(html.escape(said)), Image(value=_png(side_by_side(row)), format="png",
                                               layout=Layout(width=f"{min(side_by_side(row).width, WIDTH)}px")))]
        finally:
            self.button.disabled = False

    def _image(self, name: str, model: StableDiffusion, words: str):
        learnt = self.lora[1] if self.lora and self.lora[0] == name else None
        if learnt is not None:
            model.add_lora(learnt, self.strength.value)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)          # of the rare word
                [image] = model.text2img(self.prompt.value.replace("{}", words), seed=self.seed.value, **self.given)
        finally:
            if learnt is not None:
                model.remove_lora(learnt)
        return image

    def said(self) -> str:
        """The settings of a row in words, and the ways in their order."""
        lora = f", LoRA {self.strength.value:g}" if self.lora else ""
        return f"{self.prompt.value}, seed {self.seed.value}{lora}: {', '.join(self.ways)}"

    def still(self) -> Drawing:
        said, images = self.rows[0]
        return show_images(images, [*self.ways], title=said.partition(":")[0], columns=len(images))
