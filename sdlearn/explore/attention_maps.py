"""Who looks at which word: cells that ask, maps over images, levels of a U-Net; a widget to look at any prompt.

M tokens, of which the last of a prompt are padding; h, w rows and columns. Lengths are in pixels of the screen.
"""

import html
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from ipywidgets import HTML, BoundedIntText, Dropdown, HBox, Image, IntSlider, Layout, Play, Text, ToggleButtons, jslink
from matplotlib.patches import Rectangle
from PIL import Image as Images
from torch import Tensor

from .. import prompt as prompt_room
from ..diagnostics.attention import heat_maps, record_attention
from ..pipeline import PromptWarning, StableDiffusion
from ..tokenizer import WORD_END, Tokenizer
from .curves import COLOURS, plain
from .figures import EDGE, FAINT, GAP, INK, SIDE, WIDTH, Drawing, _grid, some_of
from .widgets import REFUSED, SHOWN, WithStill, _enlarged, _png

MOST = 10               # maps in a row
SMALLEST = 92           # width of an image in a row of many: a page holds several such figures
LITTLE = {"a", "an", "and", "of", "on", "the", "to", "with"}       # words that a still image can do without
ALL = "all layers"
STEPS = 10              # shades of a map
HOT = matplotlib.colormaps["YlOrRd"]


def places(prompt: str, tokenizer: Tokenizer, length: int = 77) -> list[str]:
    """Names for the places of a prompt in the text: START, its tokens, END, and one for all of the padding."""
    ids = tokenizer(prompt_room.remove_weights(prompt), length)[0].tolist()
    end = ids.index(tokenizer.end)
    tokens = tokenizer.convert_ids_to_tokens(ids[1:end])
    return ["START", *(token.removesuffix(WORD_END) for token in tokens), "END", "padding"]


def by_place(weights: Tensor, names: Sequence[str], dim: int = -1) -> Tensor:
    """Weights over the tokens, along `dim`, as weights over `places`: those of the padding are added up."""
    own = len(names) - 1
    padding = weights.narrow(dim, own, weights.shape[dim] - own).sum(dim, keepdim=True)
    return torch.cat([weights.narrow(dim, 0, own), padding], dim)


def finest(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of maps (B, H, N, M) by layer, those with the most cells N."""
    most = max(one.shape[2] for one in maps.values())
    return {name: one for name, one in maps.items() if one.shape[2] == most}


def short_name(layer: str) -> str:
    """"up 1.0" for the first transformer of up_blocks.1, "mid" for that of the middle."""
    block, _, number = layer.partition("_block")
    found = re.match(r"s\.(\d+)\.attentions\.(\d+)", number)
    return f"{block} {found[1]}.{found[2]}" if found else block


def literal(text: str) -> str:
    """A text for matplotlib in which a dollar is a dollar."""
    return text.replace("$", r"\$")


# ---------------------------------------------------------------------------- drawings

def overlay(image, heat: Tensor, top: float | None = None) -> np.ndarray:
    """An image in pale grey under a map (h, w), red where the map is `top`, or else its highest; uint8 (H, W, 3)."""
    pixels = np.asarray(image, float)
    grey = np.round(pixels.mean(axis=-1, keepdims=True) / 32) * 32          # in steps, as the map: fewer bytes
    pale = 255 - 0.55 * (255 - grey.clip(0, 255))
    share = heat.detach().float()
    share = torch.nn.functional.interpolate(share[None, None], pixels.shape[:2], mode="bilinear")[0, 0].numpy()
    share = np.clip(share / max(share.max() if top is None else top, 1e-12), 0, 1)[..., None]
    share = np.round(share * STEPS) / STEPS
    hot = 255 * HOT(0.25 + 0.75 * share[..., 0])[..., :3]
    return (pale + (hot - pale) * 0.85 * share).round().astype(np.uint8)


def word_maps(rows: Mapping[str, tuple], names: Sequence[str], *, title: str) -> Drawing:
    """Rows of one image and its maps, a map for each name; in each the highest weight is red, and told beneath.

    rows: by name, an image and maps (names, h, w).
    """
    images, captions = [], []
    columns = len(names) + 1
    room = (WIDTH - SIDE - 2 * EDGE - (columns - 1) * GAP) // columns       # a map in its own size stays crisp
    for image, maps in rows.values():
        image = _shrunk(image, room)
        images += [np.asarray(image), *(overlay(image, one) for one in maps)]
        captions += ["the image", *(f"{literal(name)}\nup to {float(one.max()):.2f}"
                                      for name, one in zip(names, maps, strict=True))]
    return _grid(images, captions, columns, title, rows=list(rows))


def _shrunk(image, width: int) -> Images.Image:
    """The image, at most so wide."""
    image = Images.fromarray(np.asarray(image))
    width = min(width, image.width)
    return image.resize((width, round(width * image.height / image.width)))


def image_rows(rows: Mapping[str, Sequence], captions: Sequence[str] = (), *, title: str) -> Drawing:
    """Rows of small images, by name; captions: beneath the last row, one for each column."""
    columns = len(next(iter(rows.values())))
    room = (WIDTH - SIDE - 2 * EDGE - (columns - 1) * GAP) / columns
    width = max(SMALLEST, int(room / 1.5) + 1)          # `_grid` enlarges what fits one and a half times
    images = [np.asarray(_shrunk(image, width)) for row in rows.values() for image in row]
    told = [""] * (len(images) - columns) + (list(captions) or [""] * columns)
    drawing = _grid(images, told, columns, title, rows=list(rows))
    drawing.colours = 128
    return drawing


def cells_asking(image, weights: Tensor, names: Sequence[str], cells: Sequence[tuple[int, int]], side: int, *,
                 title: str) -> Drawing:
    """An image with some of its side x side cells framed, and beside it what each of them takes from each name.

    weights: (cells, names); cells: (row, column) each.
    """
    pixels, height = np.asarray(image), max(230, 16 * len(names) + 82)
    drawing = Drawing(WIDTH, height, title=title, sharpness=1.5, colours=128)
    drawing.headline()
    axes = drawing.add_axes((10 / WIDTH, 1 - 214 / height, 176 / WIDTH, 176 / height))
    axes.imshow(pixels, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    cell = pixels.shape[0] / side
    for i, (row, column) in enumerate(cells):
        axes.add_patch(Rectangle((column * cell - 0.5, row * cell - 0.5), cell, cell, fill=False, ec=COLOURS[i],
                                 lw=2.2))
        axes.text((column + 0.5) * cell, (row + 0.5) * cell, str(i + 1), ha="center", va="center", fontsize=9,
                  fontweight="bold", color=COLOURS[i], bbox={"fc": "white", "ec": "none", "pad": 0.8})
    wide = (WIDTH - 290) / len(cells)
    for i in range(len(cells)):
        axes = drawing.add_axes(((280 + i * wide) / WIDTH, 46 / height, (wide - 20) / WIDTH, (height - 106) / height))
        axes.barh(range(len(names)), weights[i].tolist(), color=COLOURS[i], height=0.7)
        plain(axes, f"cell {i + 1}: row {cells[i][0]}, column {cells[i][1]}", "share", "")
        axes.set_yticks(range(len(names)), map(literal, names) if i == 0 else [""] * len(names))
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.05 * float(weights.max())))
    return drawing


def bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], *, title: str, x: str,
         line: tuple[str, float] | None = None) -> Drawing:
    """Horizontal bars, a group for each name, in it one for each of the groups; a dashed line to compare with.

    groups: by name, as many numbers as there are names. line: its name and place.
    """
    width, height = 840, 92 + len(names) * (10 + 13 * len(groups))
    drawing = Drawing(width, height, title=title, sharpness=1.5, colours=48)
    drawing.headline()
    axes = drawing.add_axes((100 / width, 46 / height, 480 / width, (height - 84) / height))
    thick, most = 0.8 / len(groups), max(map(max, groups.values()))
    for i, (name, values) in enumerate(groups.items()):
        at = np.arange(len(names)) + (i + 0.5) * thick - 0.4
        axes.barh(at, values, height=0.9 * thick, color=COLOURS[i], label=name)
        for y, value in zip(at, values, strict=True):
            axes.text(max(value, 0) + most / 100, y, f"{round(value, 2) + 0:.2f}", va="center_baseline", fontsize=6.5,
                      color=FAINT)
    if line:
        axes.axvline(line[1], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.3, label=line[0])
    plain(axes, "", x, "")
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.45, -0.55), xlim=(min(0, *map(min, groups.values())), 1.09 * most))
    if len(groups) > 1 or line:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return drawing


# ---------------------------------------------------------------------------- the widget

class AttentionExplorer(WithStill):
    """A prompt to type, and for each of its words from where it is looked at: at any step, in any layer.

    Press Enter: an image is made, and its attention kept. At the right what the network saw at the step, at the
    left the map of the word over it. What was typed and no image can be made of is told beneath; for the first
    prompt errors are those of `StableDiffusion.steps`.
    """

    def __init__(self, model: StableDiffusion, prompt: str, *, seed: int = 0, steps: int = 12):
        self.model, self.count = model, steps
        self.prompt = Text(prompt, description="prompt", continuous_update=False, layout=Layout(width="640px"))
        self.seed = BoundedIntText(seed, min=0, max=2**31 - 1, description="seed", layout=Layout(width="200px"))
        self.word = ToggleButtons(style={"button_width": "auto"})
        self.step = IntSlider(steps // 2, min=0, max=steps - 1, description="step", layout=Layout(width="400px"))
        self.play = Play(min=0, max=steps - 1, interval=500, show_repeat=False)
        self.link = jslink((self.play, "value"), (self.step, "value"))
        self.layer = Dropdown(options=[(ALL, ALL)], description="layer", layout=Layout(width="300px"))
        self.message, self.heads = HTML(), HTML()
        self.images = Image(format="png"), Image(format="png")
        super().__init__([HBox([self.prompt, self.seed]), self.word, HBox([self.step, self.play, self.layer]),
                          self.message, self.heads, HBox(self.images)])
        self._make(prompt, seed)
        for control in (self.prompt, self.seed):
            control.observe(lambda _: self.draw(), names="value")
        for control in (self.word, self.step, self.layer):
            control.observe(lambda _: self.show(), names="value")

    def draw(self):
        """Make the image of what is typed, and keep its attention."""
        try:
            self._make(self.prompt.value, self.seed.value)
        except REFUSED as error:
            self.message.value = html.escape(str(error))

    def _make(self, prompt: str, seed: int):
        self.run, self.maps = self._made(prompt, seed)
        self.message.value = "<br>".join(html.escape(said) for _, said in self.model.prompt_warnings(prompt))
        self.shown, self.names = prompt, places(prompt, self.model.tokenizer, self.model.config.text.length)
        chosen = min(3 if self.word.index is None else self.word.index, len(self.names) - 1)
        self.word.options = [(name, i) for i, name in enumerate(self.names)]        # names may be there twice
        self.word.index = chosen
        layers = [(f"{short_name(name)}, {one.shape[2]} cells", name) for name, one in self.maps[0].items()]
        if len(self.layer.options) != 1 + len(layers):
            self.layer.options = [(ALL, ALL), *layers]
            self.layer.value = layers[-1][1]
        self.show()

    def _made(self, prompt: str, seed: int) -> tuple[list, list[dict[str, Tensor]]]:
        """The steps of the run, and at each the maps (1, H, N, M) of the half that has the prompt."""
        run, maps = [], []
        with record_attention(self.model.unet, only="attn2") as record, warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)                  # they are told beneath
            for step in self.model.iter_steps(prompt, seed=seed, num_inference_steps=self.count):
                run.append(step)
                maps.append({name: one[-1:] for name, one in record.maps.items()})
        return run, maps

    def heat(self, step: int, layer: str) -> Tensor:
        """The maps of all places at that step, (places, h, w)."""
        maps = self.maps[step]
        maps = maps if layer == ALL else {layer: maps[layer]}
        return by_place(heat_maps(maps, self.run[0].latent.shape[2:])[0], self.names, dim=0)

    def show(self):
        """Show the map of the chosen word, at the chosen step and layer."""
        if self.word.value is None or self.layer.value is None:             # while their options change
            return
        heat = self.heat(self.step.value, self.layer.value)[self.word.value]
        [seen] = self.run[self.step.value].images()
        for place, image in zip(self.images, (Images.fromarray(overlay(seen, heat)), seen), strict=True):
            place.value = _png(_enlarged(image, SHOWN))
        word = html.escape(self.names[self.word.value])
        self.heads.value = (f"<b>left:</b> how much each cell takes from <i>{word}</i>, dark red: {heat.max():.2f} "
                            "&ensp; <b>right:</b> what the network saw in the latent at this step")

    def still(self) -> Drawing:
        shown = some_of([i for i, name in enumerate(self.names) if name not in LITTLE], MOST)
        rows = {f"step {i + 1}": (self.run[i].images()[0], self.heat(i, self.layer.value)[shown])
                for i in some_of(range(len(self.run)), 3)}
        layer = next(name for name, value in self.layer.options if value == self.layer.value)
        return word_maps(rows, [self.names[i] for i in shown], title=literal(f"{self.shown}: layer {layer}"))
