"""Guidance as arrows between a network's outputs; and a widget that turns its scale, rescale and interval.

B, C, h, w  batch, channels, rows and columns of the latent
"""

import html
import warnings
from collections.abc import Sequence

import numpy as np
from ipywidgets import HTML, Button, FloatSlider, HBox, Image, IntRangeSlider, Layout, Text, VBox
from PIL import Image as Images
from torch import Tensor

from ..pipeline import PromptWarning, StableDiffusion
from .curves import COLOURS, plain
from .figures import GAP, INK, Drawing, show_images
from .widgets import REFUSED, WithStill, _png

SHOWN = 4               # images of a row, seeds from 0 on
KEPT = 5                # rows that stay to compare with


def guidance_arrows(u: Tensor, c: Tensor, n: Tensor | None = None, *, scales: Sequence[float] = (2, 3, 5),
                    title: str) -> Drawing:
    """The plane of outputs u, c and, where given, n (any shape): the way on from u, and from n, through c.

    Lengths are multiples of |c - u|, which is also the first axis; u is the origin. Without n all lies on one line.
    Beside each point stands its scale.
    Raises ValueError where c is u.
    """
    places = {"u": (0.0, 0.0), "c": (1.0, 0.0)}
    starts = {"u": np.zeros(2)}
    if n is not None:
        starts["n"] = np.array(in_plane(u, c, n))
        places["n"] = tuple(starts["n"])
    elif not (c - u).norm():
        raise ValueError("c is u: the prompt changes nothing, so there is no arrow to draw")
    drawing = Drawing(760, 330, title=title, sharpness=1.5, colours=48)
    axes = drawing.subplots()
    end = np.array((1.0, 0.0))
    for i, (name, start) in enumerate(starts.items()):
        ends = np.stack([start + scale * (end - start) for scale in scales])
        axes.plot(*np.stack([start, ends[-1]]).T, color=COLOURS[i], linewidth=1.4)
        axes.plot(*ends.T, "o", color=COLOURS[i], markersize=5, label=f"{name} + w (c - {name})")
        for scale, place in zip(scales, ends, strict=True):
            axes.annotate(f"{scale:g}", place, (0, 6) if i == 0 else (-8, -10), textcoords="offset points",
                          fontsize=8, ha="center" if i == 0 else "right", color=COLOURS[i])
    for i, (name, place) in enumerate(places.items()):
        axes.plot(*place, "s", color=INK, markersize=6)
        axes.annotate(name, place, (0, -14 if i < 2 else 7), textcoords="offset points", fontsize=9.5, ha="center",
                      color=INK, weight="bold")
    plain(axes, "", "along c - u, in lengths of it", "across")
    axes.margins(0.1, 0.22)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")
    drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    drawing.tight_layout(pad=0.7)
    return drawing


def in_plane(u: Tensor, c: Tensor, n: Tensor) -> tuple[float, float]:
    """Where n lies: along c - u and across it, both in lengths of c - u, from u. Raises ValueError where c is u."""
    way, other = (c - u).flatten().double(), (n - u).flatten().double()
    length = float(way.norm())
    if not length:
        raise ValueError("c is u: the prompt changes nothing, so there is no arrow to draw")
    along = float(other @ way) / length**2
    return along, float((other - along * way).norm()) / length


class GuidanceExplorer(WithStill):
    """A prompt, a negative prompt, scale, rescale and interval to turn, and a button that draws a row of images.

    Each row holds the same seeds; the last rows stay to compare with. The row of the first settings is drawn at
    once. What no image can be made with is told beneath the button; nothing is raised.
    """

    def __init__(self, model: StableDiffusion, prompt: str, negative: str = "", *, steps: int = 8):
        self.model, self.count = model, steps
        wide = {"style": {"description_width": "80px"}, "layout": Layout(width="440px")}
        last = model.schedule.num_train_timesteps - 1
        self.prompt = Text(prompt, description="prompt", **wide)
        self.negative = Text(negative, description="negative", **wide)
        self.guidance = FloatSlider(5, min=0, max=20, step=0.5, description="w", **wide)
        self.rescale = FloatSlider(0, min=0, max=1, step=0.1, description="rescale", **wide)
        self.interval = IntRangeSlider(value=(0, last), min=0, max=last, description="interval", **wide)
        self.button = Button(description="Draw", button_style="primary", icon="paint-brush")
        self.message = HTML()
        self.shown = VBox()
        self.rows: list[tuple[str, list[Images.Image]]] = []      # the newest first
        self.button.on_click(lambda _: self.draw())
        super().__init__([self.prompt, self.negative, self.guidance, self.rescale, self.interval,
                          HBox([self.button, self.message]), self.shown])
        self.draw()

    def settings(self) -> dict:
        """What is set, as keywords of `model.text2img`."""
        return {"prompt": self.prompt.value, "negative_prompt": self.negative.value,
                "guidance_scale": self.guidance.value, "guidance_rescale": self.rescale.value,
                "guidance_interval": self.interval.value}

    def draw(self):
        """Make the row of what is set, and put it above the earlier ones."""
        self.button.disabled, self.message.value = True, "drawing ..."
        chosen = self.settings()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PromptWarning)
                images = self.model.text2img(**chosen, num_inference_steps=self.count, batch=SHOWN, seed=0)
        except REFUSED as error:
            self.message.value = html.escape(str(error))
        else:
            told = [message for _, message in self.model.prompt_warnings(chosen["prompt"], chosen["negative_prompt"])]
            self.message.value = "<br>".join(map(html.escape, told))
            self.rows = [(self.said(chosen), images), *self.rows][:KEPT]
            self.shown.children = [part for said, row in self.rows for part in
                                   (HTML(html.escape(said)), Image(value=_png(side_by_side(row)), format="png",
                                                                   layout=Layout(width=f"{SHOWN * 148}px")))]
        finally:
            self.button.disabled = False

    def said(self, chosen: dict) -> str:
        """The settings of a row in words; what is off is left out."""
        low, high = chosen["guidance_interval"]
        words = [chosen["prompt"], f"w = {chosen['guidance_scale']:g}"]
        words += [f"negative: {chosen['negative_prompt']}"] if chosen["negative_prompt"] else []
        words += [f"rescale {chosen['guidance_rescale']:g}"] if chosen["guidance_rescale"] else []
        words += [f"interval {low} to {high}"] if (low, high) != (0, self.interval.max) else []
        return ", ".join(words)

    def still(self) -> Drawing:
        title = self.rows[0][0] if len(self.rows) == 1 else "Rows from the newest to the oldest"
        return show_images([image for _, row in self.rows for image in row], title=title, columns=SHOWN)


def side_by_side(images: Sequence[Images.Image]) -> Images.Image:
    """Images of one size in a row, on white."""
    width, height = images[0].size
    row = Images.new("RGB", (len(images) * (width + GAP) - GAP, height), "white")
    for i, image in enumerate(images):
        row.paste(image, (i * (width + GAP), 0))
    return row
