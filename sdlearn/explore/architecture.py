"""One diagram of a latent diffusion model: its parts, and the shape of every tensor between them.

Everything is read off a config; the modules are built without memory, only to be counted. An image of
batch 1 is drawn, with guidance, so that the U-Net works on a batch of two: without the prompt, with it.

The canvas is 100 wide, and its units are a tenth of an inch.
"""

from collections.abc import Callable, Sequence

import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from ..clip import TextEncoder
from ..config import ModelConfig
from ..unet import UNet
from ..vae import VAE
from .figures import DPI, FAINT, INK, Drawing

WIDE, HIGH = 100, 61
TEXT, LATENT, PIXEL, PLAIN = "#dcf1ec", "#e9e5f9", "#fdedd0", "#f3f3f1"     # fills, by what flows
TEXT_LINE, LATENT_LINE, PIXEL_LINE, PLAIN_LINE = "#16796f", "#5a4bb0", "#b06f0c", "#9a9aa3"
OUTPUT = {"epsilon": "noise", "v_prediction": "v", "sample": "x0"}         # what the U-Net predicts


def architecture_diagram(config: ModelConfig) -> Drawing:
    """The way from a prompt to an image through a model of this config, with shapes at each arrow.

        architecture_diagram(model.config)
        architecture_diagram(PRESETS["sd15"])       # needs no weights
    """
    title = f"{config.name}: from a prompt to an image, one image with guidance"
    drawing = Drawing(WIDE * DPI / 10, HIGH * DPI / 10, title=title, sharpness=1.6, colours=64)
    canvas = Canvas(drawing)
    canvas.text(1, HIGH - 1.8, title, size=11.5, weight="bold")
    canvas.text(1, HIGH - 4, "shapes: (batch, tokens, width) of text; (batch, channels, rows, columns) of latents "
                "and pixels", colour=FAINT)
    _draw_text_path(canvas, config)
    _draw_loop(canvas, config)
    _draw_pixels(canvas, config)
    return drawing


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the diagram, by name, for one guided image of the model's own size."""
    side, latent, text = config.image_size, config.latent_size, config.text
    one = (1, config.vae.latent_channels, latent, latent)
    return {
        "ids": (2, text.length),
        "context": (2, text.length, text.dim),
        "noise": one,
        "twice": (2, config.unet.in_channels, latent, latent),
        "time": (1, 4 * config.unet.channels[0]),
        "output": (2, config.unet.out_channels, latent, latent),
        "guided": (1, config.unet.out_channels, latent, latent),
        "latent": one,
        "pixels": (1, config.vae.in_channels, side, side),
    }


def levels(config: ModelConfig) -> list[tuple[tuple[int, ...], bool]]:
    """Shape of the features at each level of the U-Net, and whether it attends to the text."""
    found, side = [], config.latent_size
    for channels, attention in zip(config.unet.channels, config.unet.attention, strict=True):
        found.append(((2, channels, side, side), attention))
        side = (side + 1) // 2                          # a convolution of stride 2 rounds up
    return found


def count_parameters(make: Callable[[], nn.Module]) -> int:
    """Parameters of the module that `make` returns, built without memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def told(count: int) -> str:
    """860 M, 16.7 M, 0.4 M, 12 k parameters."""
    if count >= 50_000:
        millions = count / 1e6
        return f"{millions:.0f} M" if millions >= 100 else f"{millions:.1f} M"
    return f"{count / 1e3:.0f} k"


# --- the three stretches of the way -----------------------------------------------------------------

def _draw_text_path(canvas: "Canvas", config: ModelConfig):
    shapes, text = tensors(config), config.text
    parameters = told(count_parameters(lambda: TextEncoder(text)))
    canvas.box(1, 46, 15, 9, "prompt", ("and the empty prompt,", "for guidance"), PLAIN, PLAIN_LINE)
    canvas.box(24, 46, 16, 9, "Tokenizer", ("byte-pair encoding,", f"{text.vocab_size:,} tokens"), TEXT, TEXT_LINE)
    canvas.box(53, 46, 21, 9, "CLIP text encoder",
               (f"{text.layers} layers, {text.heads} heads", f"{parameters} parameters"), TEXT, TEXT_LINE)
    canvas.arrow((16, 50.5), (24, 50.5), PLAIN_LINE)
    canvas.label(20, 50.5, "text", PLAIN_LINE)
    canvas.arrow((40, 50.5), (53, 50.5), TEXT_LINE)
    canvas.label(46.5, 50.5, "token ids", TEXT_LINE, shapes["ids"])


def _draw_loop(canvas: "Canvas", config: ModelConfig):
    shapes = tensors(config)
    canvas.panel(18, 1.5, 60.5, 39, "repeated for every timestep t")
    canvas.box(1, 25, 13, 7.5, "seed", ("random generator",), PLAIN, PLAIN_LINE)
    _draw_unet(canvas, config, x=27.5, y=9.5, width=27, height=26)

    canvas.arrow((63.5, 46), (63.5, 42.6), (41, 42.6), (41, 35.7), TEXT_LINE)
    canvas.label(52.3, 42.6, "context", TEXT_LINE, shapes["context"])
    canvas.arrow((7.5, 25), (7.5, 20.5), (27.5, 20.5), LATENT_LINE)
    canvas.label(12.7, 22.5, "noise", LATENT_LINE, shapes["noise"], lift=0)
    canvas.label(22.7, 22.5, "stacked twice", LATENT_LINE, shapes["twice"], lift=0)
    canvas.arrow((54.5, 29.7), (63.3, 29.7), LATENT_LINE)
    canvas.label(58.8, 29.7, f"{OUTPUT[config.noise.prediction_type]}, twice", LATENT_LINE, shapes["output"])

    canvas.box(63.3, 26, 13.5, 7.5, "Guidance", ("u + w (c − u)",), LATENT, LATENT_LINE)
    canvas.arrow((70, 26), (70, 19.5), LATENT_LINE)
    canvas.label(69.4, 22.8, "guided", LATENT_LINE, shapes["guided"], ha="right", lift=0)
    canvas.box(63.3, 12, 13.5, 7.5, "Sampler step", ("from t to the next t",), LATENT, LATENT_LINE)
    canvas.arrow((70, 12), (70, 5), (19.3, 5), (19.3, 20.3), LATENT_LINE)
    canvas.label(41, 5, "latent, a little cleaner", LATENT_LINE, shapes["latent"])


def _draw_pixels(canvas: "Canvas", config: ModelConfig):
    shapes, vae = tensors(config), config.vae
    parameters = told(count_parameters(lambda: VAE(vae).decoder))
    canvas.arrow((76.8, 15.7), (89.7, 15.7), (89.7, 25), LATENT_LINE)
    canvas.label(84.5, 15.7, "after the last t", LATENT_LINE, shapes["latent"])
    canvas.box(80.5, 25, 18.5, 9, "VAE decoder",
               (f"a cell to {vae.factor} x {vae.factor} pixels", f"{parameters} parameters"), PIXEL, PIXEL_LINE)
    canvas.arrow((89.7, 34), (89.7, 46), PIXEL_LINE)
    canvas.label(89, 40, "pixels", PIXEL_LINE, shapes["pixels"], ha="right", lift=0)
    canvas.box(80.5, 46, 18.5, 9, "image", (f"{config.image_size} x {config.image_size} pixels",),
               PLAIN, PLAIN_LINE)


def _draw_unet(canvas: "Canvas", config: ModelConfig, x: float, y: float, width: float, height: float):
    """The U: a row for each level, down at the left, up at the right, the skip between them."""
    parameters = told(count_parameters(lambda: UNet(config.unet)))
    canvas.box(x, y, width, height, "", (), "white", LATENT_LINE)
    canvas.text(x + width / 2, y + height - 1.9, "U-Net", ha="center", weight="bold", size=10)
    canvas.text(x + width / 2, y + height - 4, f"{parameters} parameters", ha="center", colour=FAINT)
    rows = levels(config)
    step = (height - 11) / (len(rows) + 1)
    bar, thick, inwards = 3.2, min(0.62 * step, 2.6), min(1.6, 5 / len(rows))
    for i, (shape, attention) in enumerate(rows):
        middle = y + height - 6 - (i + 0.5) * step
        inset = 1.2 + inwards * i
        fill, line = (TEXT, TEXT_LINE) if attention else (PLAIN, PLAIN_LINE)
        left, right = x + inset, x + width - inset - bar
        for at in (left, right):
            canvas.bar(at, middle, bar, thick, fill, line)
        canvas.arrow((left + bar, middle), (right, middle), PLAIN_LINE, thin=True)
        canvas.text(x + width / 2, middle + 0.25, spelled(shape), ha="center", va="bottom")
        down, up = left + bar / 2 + 0.8, right + bar / 2 - 0.8
        canvas.arrow((down, middle - thick / 2), (down, middle - step + thick / 2), LATENT_LINE, thin=True)
        canvas.arrow((up, middle - step + thick / 2), (up, middle - thick / 2), LATENT_LINE, thin=True)
    inset, middle = 1.2 + inwards * len(rows), y + height - 6 - (len(rows) + 0.5) * step
    canvas.bar(x + inset, middle, width - 2 * inset, thick + 0.4, TEXT, TEXT_LINE)
    canvas.text(x + width / 2, middle, f"middle  {spelled(rows[-1][0])}", ha="center", va="center_baseline")
    canvas.text(x + 1.2, y + 3.2, "green: reads the text, by cross-attention", colour=TEXT_LINE)
    canvas.text(x + 1.2, y + 1.4, f"t enters every ResBlock, as {spelled(tensors(config)['time'])}", colour=FAINT)


def spelled(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


class Canvas:
    """Boxes, arrows and words on a page of WIDE x HIGH units, the origin at the lower left."""

    def __init__(self, drawing: Drawing):
        self.axes = drawing.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDE), ylim=(0, HIGH))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, *, size: float = 8, colour: str = INK, **where):
        self.axes.text(x, y, words, **{"fontsize": size, "color": colour, "va": "center"} | where)

    def box(self, x: float, y: float, width: float, height: float, head: str, lines: Sequence[str],
            fill: str, line: str):
        """A part: its name, and small lines beneath it."""
        self._rounded(x, y, width, height, facecolor=fill, edgecolor=line, linewidth=1.2)
        top = y + height / 2 + 0.95 * len(lines)
        if head:
            self.text(x + width / 2, top, head, ha="center", size=10, weight="bold")
        for i, words in enumerate(lines):
            self.text(x + width / 2, top - 2.2 - 1.75 * i, words, ha="center", colour=FAINT)

    def panel(self, x: float, y: float, width: float, height: float, words: str):
        """A dashed frame around what is repeated."""
        self._rounded(x, y, width, height, facecolor="#f8f7fd", edgecolor=LATENT_LINE, linewidth=1,
                      linestyle=(0, (5, 4)))
        self.text(x + 1.2, y + height - 1.7, words, colour=LATENT_LINE, style="italic", size=8.5)

    def bar(self, x: float, middle: float, width: float, height: float, fill: str, line: str):
        self._rounded(x, middle - height / 2, width, height, radius=0.4, facecolor=fill, edgecolor=line, linewidth=1)

    def arrow(self, *way, thin: bool = False):
        """A line through the points to the last of them, where its head is; the colour comes last."""
        *points, colour = way
        xs, ys = zip(*points[:-1], strict=True)
        width = 0.9 if thin else 1.5
        if len(points) > 2:
            self.axes.plot(xs, ys, color=colour, linewidth=width, solid_joinstyle="round")
        self.axes.add_patch(FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=7 if thin else 11, color=colour,
            linewidth=width, shrinkA=0, shrinkB=0))

    def label(self, x: float, y: float, words: str, colour: str, shape: tuple[int, ...] | None = None, *,
              ha: str = "center", lift: float = 0.5):
        """What an arrow carries, above its line at (x, y) (or, with lift 0, beside it), and its shape."""
        if lift:
            self.text(x, y + lift, words, ha=ha, va="bottom", colour=colour)
            if shape:
                self.text(x, y - lift, spelled(shape), ha=ha, va="top")
        else:
            self.text(x, y + 0.9, words, ha=ha, colour=colour)
            self.text(x, y - 0.9, spelled(shape), ha=ha)

    def _rounded(self, x: float, y: float, width: float, height: float, radius: float = 1.0, **style):
        corners = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=corners, **style))
