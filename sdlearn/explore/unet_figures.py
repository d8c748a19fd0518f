"""The U-Net drawn: its skips as a ladder, its costs as bars, numbers in a table of shades; a widget to break it.

Lengths are in pixels of the screen.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from ipywidgets import Checkbox, Dropdown, HBox, Image, IntSlider, Layout
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from ..config import ModelConfig
from ..images import to_images
from ..pipeline import StableDiffusion
from ..training.unet import encode_scenes, make_training_batch
from ..unet import skip_channels
from .architecture import LATENT_LINE, PLAIN, PLAIN_LINE, TEXT, TEXT_LINE
from .curves import COLOURS, plain
from .figures import FAINT, INK, WIDTH, Drawing, show_images
from .unet_parts import KINDS, altered, parts_of, rungs, total
from .widgets import WithStill

TOP, ROW, BOX = 66, 40, 26          # of the ladder: its head, from one rung to the next, the height of a box
LEFT, RIGHT, WIDE = 92, 566, 250    # where its sides begin, and how wide a box is
LEVEL_GAP = 14


# --- drawings -----------------------------------------------------------------------------------------

def shape_ladder(config: ModelConfig) -> Drawing:
    """Every skip of a U-Net as a rung: down at the left, up at the right, the middle at the foot, with all shapes."""
    steps, middle = rungs(config.unet, config.latent_size)
    sides = [step.skip[1] for step in steps]
    tops, y = [], TOP
    for i in range(len(steps)):
        y += LEVEL_GAP if i and sides[i] != sides[i - 1] else 0
        tops.append(y)
        y += ROW
    height = y + LEVEL_GAP + BOX + 40
    title = f"{config.name}: the U-Net's skips, for a picture of {config.image_size} x {config.image_size}"
    drawing = Drawing(WIDTH, height, title=title, sharpness=1.25, colours=32)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    _text(axes, 8, 16, title, fontsize=11, fontweight="bold")
    _text(axes, LEFT, 48, "way down: makes a skip", FAINT)
    _text(axes, RIGHT, 48, "way up: a ResBlock reads what comes from below and the skip", FAINT)
    for i, (step, top) in enumerate(zip(steps, tops, strict=True)):
        if i == 0 or sides[i] != sides[i - 1]:
            _text(axes, 8, top + BOX / 2, f"{sides[i]} x {sides[i]}", FAINT)
        end = tops[i + 1] if i + 1 < len(steps) else height - 40 - BOX
        _rung(axes, step, top, end, i)
    foot = height - 40 - BOX
    _box(axes, LEFT, foot, RIGHT + WIDE + 110 - LEFT, f"middle: ResBlock, transformer, ResBlock: {_told(middle)}", True)
    _text(axes, 8, height - 14, "shapes: channels x rows x columns. Green: a transformer follows, which reads the "
          "text. An Upsample stands where the way up enters a larger size.", FAINT)
    return drawing


def _rung(axes, step, top: float, end: float, place: int):
    kind = {"conv_in": "conv_in", "downsamplers": "Downsample"}.get(step.name.split(".")[-2] if "." in step.name
                                                                     else step.name, "ResBlock")
    _box(axes, LEFT, top, WIDE, f"{kind}: {_told(step.skip)}", step.attends and kind == "ResBlock")
    _box(axes, RIGHT, top, WIDE + 110, f"{step.below} + {step.skip[0]} = {step.below + step.skip[0]}, "
         f"ResBlock: {_told(step.out)}", step.attends)
    middle = top + BOX / 2
    _arrow(axes, (LEFT + WIDE, middle), (RIGHT, middle), PLAIN_LINE)
    _text(axes, (LEFT + WIDE + RIGHT) / 2, middle - 8, f"skip {place}", FAINT, ha="center", fontsize=8)
    _arrow(axes, (LEFT + 40, top + BOX), (LEFT + 40, end), LATENT_LINE)
    _arrow(axes, (RIGHT + 40, end), (RIGHT + 40, top + BOX), LATENT_LINE)
    if step.upsampled:
        _text(axes, RIGHT + 50, top - 8, "Upsample", LATENT_LINE, fontsize=7.5)


def _told(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _text(axes, x, y, words, colour=INK, **style):
    axes.text(x, y, words, **{"fontsize": 8.5, "color": colour, "va": "center_baseline"} | style)


def _box(axes, x, y, width, words, green):
    axes.add_patch(FancyBboxPatch((x, y), width, BOX, facecolor=TEXT if green else PLAIN, linewidth=1,
                                  edgecolor=TEXT_LINE if green else PLAIN_LINE,
                                  boxstyle="round,pad=0,rounding_size=4"))
    _text(axes, x + width / 2, y + BOX / 2, words, ha="center")


def _arrow(axes, start, end, colour):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1,
                                   shrinkA=0, shrinkB=0))


def cost_bars(configs: Sequence[ModelConfig]) -> Drawing:
    """For each model, in shares of the whole, its parameters and FLOPs: by kind of layer, and by level."""
    rows = [(config, what) for config in configs for what in ("parameters", "flops")]
    width, height = WIDTH, 172 + 42 * len(rows)
    title = "Where the parameters sit, and where the work is done"
    drawing = Drawing(width, height, title=title, sharpness=1.5, colours=64)
    drawing.headline()
    levels = [f"level {i}" for i in range(max(len(config.unet.channels) for config in configs))]
    for column, (head, names, key) in enumerate((("by kind of layer", list(KINDS), "kind"),
                                                 ("by level, 0 the highest", levels, "level"))):
        axes = drawing.add_axes(((150 + column * 500) / width, 110 / height, (450 - 110 * column) / width,
                                 (height - 168) / height))
        for i, (config, what) in enumerate(rows):
            parts = parts_of(config.unet, config.latent_size)
            whole, start = total(parts, what), 0.0
            for j, name in enumerate(names):
                share = total((part for part in parts if getattr(part, key) == (name if key == "kind" else j)),
                              what) / whole
                axes.barh(i, share, left=start, height=0.66, color=COLOURS[j % 8] if j < 8 else "#c9c9d2",
                          label=name if i == 0 else None)
                if share > 0.07:
                    axes.text(start + share / 2, i, f"{share:.0%}", ha="center", va="center_baseline", fontsize=7.5,
                              color="white")
                start += share
        plain(axes, head, "share of the whole", "")
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), [f"{config.name}, {'FLOPs' if what == 'flops' else what}"
                                           for config, what in rows] if column == 0 else [""] * len(rows))
        axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, loc="upper left", ncols=3 if column == 0 else 2,
                    bbox_to_anchor=(-0.02, -42 / (height - 168)))
    return drawing


def shaded_table(values: Tensor, rows: Sequence[str], columns: Sequence[str], *, title: str, x: str, y: str,
                 most: float | None = None) -> Drawing:
    """Numbers (rows, columns), written into cells, the darker the larger; `most` is where the darkest begins."""
    values = np.asarray(values.detach() if isinstance(values, Tensor) else values, float)
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"the numbers are {values.shape}, for {len(rows)} rows and {len(columns)} columns")
    left, cell = 260, 92
    width, height = left + cell * len(columns) + 20, 100 + 27 * len(rows)
    drawing = Drawing(max(width, 9.4 * len(title)), height, title=title, sharpness=1.5, colours=64)
    _text_at(drawing, 8, 16, title)
    axes = drawing.add_axes((left / drawing.width, 46 / height, cell * len(columns) / drawing.width,
                             (height - 90) / height))
    top = most or values.max()
    axes.imshow(values, cmap="Purples", vmin=min(0, values.min()), vmax=top, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center_baseline", fontsize=8,
                      color="white" if value > 0.6 * top else INK)
    plain(axes, "", x, y)
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return drawing


def _text_at(drawing: Drawing, x: float, y: float, words: str):
    drawing.text(x / drawing.width, 1 - y / drawing.height, words, va="center", fontsize=11, fontweight="bold",
                 color=INK)


# --- the widget ---------------------------------------------------------------------------------------

class UNetBreaker(WithStill):
    """A scene, a timestep, and a U-Net that is told another time, loses skips or attention: what it still sees.

    A row of four: the scene, its latent with noise, the clean image that the whole U-Net sees in it, and the one
    that the altered U-Net sees, each with its loss. Above t = 900 little but the text is left to go by.
    """

    TIMES = (("the true timestep", None), ("always 50", 50), ("always 500", 500), ("always 999", 999))

    def __init__(self, model: StableDiffusion, scenes: Sequence, *, title: str = "A U-Net with something missing"):
        if not scenes:
            raise ValueError("there are no scenes to look at: give at least one")
        self.model, self.scenes, self.title = model, list(scenes), title
        self.skip_count = len(skip_channels(model.config.unet))
        wide = {"layout": Layout(width="340px"), "style": {"description_width": "80px"}}
        late = {"continuous_update": False, **wide}
        lost = [("none is lost", ()), *((f"{i} is lost", (i,)) for i in range(self.skip_count)),
                ("all are lost", tuple(range(self.skip_count)))]
        self.controls = {
            "scene": IntSlider(0, min=0, max=len(self.scenes) - 1, description="scene", **late),
            "t": IntSlider(500, min=0, max=model.schedule.num_train_timesteps - 1, description="timestep", **late),
            "time": Dropdown(options=self.TIMES, description="it is told", **wide),
            "skips": Dropdown(options=lost, description="skips", **wide),
            "attn1": Checkbox(True, description="self-attention"),
            "attn2": Checkbox(True, description="cross-attention: it reads the text")}
        self.image = Image(format="png")
        boxes = list(self.controls.values())
        super().__init__([*(HBox(boxes[i:i + 2]) for i in (0, 2, 4)), self.image])
        for control in boxes:
            control.observe(lambda _: self.show(), "value")
        self.show()

    def settings(self) -> dict:
        """What is set, as keywords of `look`."""
        values = {name: control.value for name, control in self.controls.items()}
        silent = [name for name in ("attn1", "attn2") if not values.pop(name)]
        return {**values, "silent": silent}

    @torch.no_grad()
    def look(self, scene: int, t: int, *, time: float | None = None, skips=(), silent=()) -> tuple[list, list[str]]:
        """Four images and their captions."""
        model = self.model
        latent, context = encode_scenes([self.scenes[scene]], model.vae, model.text_encoder, model.tokenizer)
        x, step, target = make_training_batch(latent, t, model.schedule)
        whole = model.unet(x, step, context)
        with altered(model.unet, time=time, skips=skips, silent=silent):
            broken = model.unet(x, step, context)
        seen = [x, *(model.schedule.to_x0(out, x, t) for out in (whole, broken))]
        images = [self.scenes[scene].image, *to_images(model.vae.to_pixels(torch.cat(seen)))]
        losses = [float((out - target).square().mean()) for out in (whole, broken)]
        return images, [self.scenes[scene].caption, f"with noise, t = {t}", f"whole\nloss {losses[0]:.2f}",
                          f"altered\nloss {losses[1]:.2f}"]

    def show(self):
        images, captions = self.look(**self.settings())
        self.image.value = show_images(images, captions, title=self.title, columns=4).png()

    def still(self) -> Drawing:
        everything = {"skips": tuple(range(self.skip_count))}
        changes: Mapping[str, dict] = {"told t = 50": {"time": 50}, "no skips": everything,
                                       "no self-attention": {"silent": ["attn1"]},
                                       "no cross-attention": {"silent": ["attn2"]}}
        images, captions = [], []
        for t in (100, 500, 900):
            row, words = self.look(0, t)
            images += row[1:3]
            captions += words[1:3]
            for name, change in changes.items():
                row, words = self.look(0, t, **change)
                images.append(row[3])
                captions.append(words[3].replace("altered", name))
        drawing = show_images(images, captions, title=self.title, columns=6)
        drawing.colours = 128
        return drawing
