"""A prompt token by token, and matrices of what goes with what; a widget that reads prompts.

Lengths are in pixels of the screen, from the left and from the top.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from ipywidgets import HTML, HBox, Layout, Text, VBox
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

from .. import prompt as prompt_room
from ..data import Scene
from ..images import to_tensor
from ..pipeline import StableDiffusion
from ..tokenizer import WORD_END, Tokenizer, merge_steps, to_symbols
from .figures import FAINT, INK, WIDTH, Drawing
from .widgets import SMALL, WithStill, _image

FILLS = ("#dcf1ec", "#e9e5f9", "#fdedd0", "#dbe9fa", "#fae0ea")     # of words, in turn
CUT = "#ececee"
CHAR, CHIP, ROW = 7.6, 22, 44       # width of a letter, height of a token, from one row of tokens to the next
NEAREST = 6                         # scenes that are shown
MOST_STEPS = 6                      # words whose merges are told


class Token(NamedTuple):
    """A token of a prompt: its symbol, its id, which word it is of, whether the row has a place for it."""

    symbol: str
    id: int
    word: int
    kept: bool
    weight: float


def read(text: str, tokenizer: Tokenizer, length: int) -> list[Token]:
    """The tokens of a prompt, also those past `length`; errors of `prompt.split_weighted_words`."""
    words = prompt_room.split_weighted_words(text, tokenizer)
    found = [(i, number, word.weight) for number, word in enumerate(words) for i in word.ids]
    return [Token(tokenizer.convert_ids_to_tokens([i])[0], i, number, place < length - 2, weight)
            for place, (i, number, weight) in enumerate(found)]


def merges_of(text: str, tokenizer: Tokenizer) -> list[tuple[str, list[str]]]:
    """The words of a prompt, each once, with its symbols after every merge: "c a t", "c at", "cat"."""
    words = dict.fromkeys(tokenizer.split_words(prompt_room.remove_weights(text)))
    return [(word, [" ".join(symbols).replace(WORD_END, "") for _, symbols in
                    merge_steps(to_symbols(word), tokenizer.ranks)])
            for word in words if not tokenizer._is_whole(word)]


# ---------------------------------------------------------------------------- drawings

def token_strip(text: str, tokenizer: Tokenizer, length: int = 77, *, title: str = "",
                scenes: Sequence[Scene] = ()) -> Drawing:
    """The tokens of a prompt, a colour for each word, with their ids; grey is what the row has no place for.

    scenes: images to show beneath, with their captions.
    """
    tokens, title = read(text, tokenizer, length), title or f"{text!r}, token by token"
    chips, x, y = [], 8.0, 40.0
    for token in tokens:
        shown = token.symbol.removesuffix(WORD_END)
        width = CHAR * max(len(shown), len(str(token.id)) * 0.85) + 10
        if x + width > WIDTH - 8:
            x, y = 8.0, y + ROW
        chips.append((token, shown, x, y, width))
        x += width + (9 if token.symbol.endswith(WORD_END) else 2)
    height = y + ROW + (SMALL + 66 if scenes else 0)
    drawing = Drawing(WIDTH, height, title=title, sharpness=1.5, colours=128 if scenes else 48)
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    axes.text(8, 12, title if len(title) < 120 else f"{title[:117]}...", fontsize=11, fontweight="bold", color=INK,
              va="center")
    for token, shown, x, y, width in chips:
        fill = FILLS[token.word % len(FILLS)] if token.kept else CUT
        axes.add_patch(FancyBboxPatch((x, y), width, CHIP, boxstyle="round,pad=0,rounding_size=4", fc=fill,
                                      ec="#b9b9c2", lw=0.8))
        axes.text(x + width / 2, y + CHIP / 2, shown.replace("$", r"\$"), family="monospace", fontsize=9, ha="center",
                  va="center", color=INK if token.kept else "#9a9aa3")
        axes.text(x + width / 2, y + CHIP + 9, str(token.id) if token.kept else "cut", fontsize=7, ha="center",
                  va="center", color=FAINT)
    for i, scene in enumerate(scenes):
        _thumbnail(drawing, scene, 8 + i * (SMALL + 60), height - SMALL - 54, SMALL)
        axes.text(8 + i * (SMALL + 60), height - 50, _wrapped(scene.caption, 26), fontsize=7.5, va="top",
                  color=FAINT, linespacing=1.2)
    return drawing


def matrices(values: Mapping[str, Tensor], *, title: str, x: str, y: str, labels: Sequence[str] = (),
             bar: str = "", side: float = 330) -> Drawing:
    """Square matrices side by side, each (rows, columns) in shades of its own range; labels: of rows and columns."""
    drawing = Drawing(min(WIDTH, (side + 90) * len(values)), side + 40 + (60 if labels else 0), title=title,
                      sharpness=1.5, colours=96)
    drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    for (name, matrix), axes in zip(values.items(), drawing.subplots(1, len(values), squeeze=False)[0], strict=True):
        shown = axes.imshow(matrix.detach().cpu().numpy(), cmap="Purples", interpolation="nearest")
        axes.set_title(name, fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel(x, fontsize=8.5, color=FAINT)
        axes.set_ylabel(y, fontsize=8.5, color=FAINT)
        axes.tick_params(labelsize=8, colors=FAINT)
        if labels:
            axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(labels)), labels)
        colours = drawing.colorbar(shown, ax=axes, fraction=0.045, pad=0.03)
        colours.ax.tick_params(labelsize=7, colors=FAINT)
        colours.set_label(bar, fontsize=8, color=FAINT)
    drawing.tight_layout(pad=0.7, w_pad=1.4)
    return drawing


def pairings(scenes: Sequence[Scene], values: Tensor, *, title: str) -> Drawing:
    """Cosines of captions, in rows, with the images of their scenes, in columns; frames mark what belongs together.

    values: (captions, images), as many of both as there are scenes. Raises ValueError for another shape.
    """
    count, cell, left, top = len(scenes), 66, 330, 118
    if values.shape != (count, count):
        raise ValueError(f"{count} scenes want {count} rows and columns of cosines, not {tuple(values.shape)}")
    drawing = Drawing(left + count * cell + 12, top + count * cell + 30, title=title, sharpness=1.5, colours=200)
    axes = drawing.add_axes((left / drawing.width, 30 / drawing.height, count * cell / drawing.width,
                             count * cell / drawing.height))
    axes.imshow(values.detach().cpu().numpy(), cmap="Purples", aspect="auto", vmin=float(values.min()),
                vmax=float(values.max()))
    dark = float(values.min()) + 0.6 * float(values.max() - values.min())
    for i in range(count):
        for j in range(count):
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if values[i, j] > dark else INK, fontweight="bold" if i == j else "normal")
        axes.add_patch(FancyBboxPatch((i - 0.46, i - 0.46), 0.92, 0.92, boxstyle="square,pad=0", fill=False,
                                      ec="#d17a00", lw=1.6))
        _thumbnail(drawing, scenes[i], left + i * cell + 3, top - cell, cell - 6)
    axes.set_yticks(range(count), [_wrapped(scene.caption, 46) for scene in scenes], fontsize=8, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlabel("cosine of a caption (row) with an image (column); framed: what belongs together", fontsize=8.5,
                    color=FAINT)
    drawing.text(0.01, 1 - 14 / drawing.height, title, fontsize=11, fontweight="bold", color=INK, va="center")
    return drawing


def _thumbnail(drawing: Drawing, scene: Scene, x: float, y: float, side: float):
    axes = drawing.add_axes((x / drawing.width, 1 - (y + side) / drawing.height, side / drawing.width,
                             side / drawing.height))
    axes.imshow(scene.image, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    for edge in axes.spines.values():
        edge.set(color="#d4d4da", linewidth=0.8)


def _wrapped(text: str, letters: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


# ---------------------------------------------------------------------------- the widget

class PromptReader(WithStill):
    """A prompt to type: its tokens in colours, how each word was merged, what is cut, the scenes nearest to it.

    Press Enter to read what was typed. What cannot be read is told beneath; nothing is raised.
    model: with encoders, `model.clip`; scenes: searched for the nearest. Raises ValueError without either.
    """

    def __init__(self, model: StableDiffusion, scenes: Sequence[Scene], prompt: str):
        if model.clip is None or not scenes:
            raise ValueError("the nearest scenes are found by both encoders: give a model that has its image encoder, "
                             "and some scenes")
        self.model, self.scenes = model, list(scenes)
        with torch.no_grad():
            self.images = torch.cat([model.clip.encode_image(to_tensor([scene.image]).to(model.device))
                                     for scene in self.scenes])                     # (scenes, S)
        self.prompt = Text(prompt, description="prompt", continuous_update=False, layout=Layout(width="720px"))
        self.tokens, self.merges, self.nearest = HTML(), HTML(), HBox(layout=Layout(flex_flow="row wrap"))
        self.prompt.observe(lambda _: self.show(), names="value")
        super().__init__([self.prompt, self.tokens, self.merges, self.nearest])
        self.show()

    @torch.no_grad()
    def nearest_to(self, prompt: str) -> list[Scene]:
        """The scenes whose images have the largest cosine with the prompt."""
        tokenizer, length = self.model.tokenizer, self.model.config.text.length
        ids = tokenizer(prompt_room.remove_weights(prompt), length).to(self.model.device)
        text = self.model.clip.encode_text(ids, end=tokenizer.end)                  # (1, S)
        return [self.scenes[i] for i in (self.images @ text[0]).topk(min(NEAREST, len(self.scenes))).indices.tolist()]

    def show(self):
        """Read what is typed, and show it."""
        try:
            tokens = read(self.prompt.value, self.model.tokenizer, self.model.config.text.length)
            scenes = self.nearest_to(self.prompt.value)
        except ValueError as error:
            self.tokens.value = html.escape(str(error))
            return
        self.shown = self.prompt.value, scenes
        lost = sum(not token.kept for token in tokens)
        counted = f"<p><small>{len(tokens)} tokens, {lost} of them cut</small></p>"
        self.tokens.value = " ".join(map(_chip, tokens)) + counted
        told = merges_of(self.prompt.value, self.model.tokenizer)[:MOST_STEPS]
        self.merges.value = "<br>".join(html.escape(f"{word}:  " + "  →  ".join(steps)) for word, steps in told)
        self.nearest.children = list(map(_card, scenes))

    def still(self) -> Drawing:
        prompt, scenes = self.shown
        return token_strip(prompt, self.model.tokenizer, self.model.config.text.length, scenes=scenes,
                           title=f"Tokens of {prompt!r}, and the scenes nearest to it")


def _chip(token: Token) -> str:
    fill = FILLS[token.word % len(FILLS)] if token.kept else CUT
    style = f"background:{fill};border-radius:4px;padding:2px 4px;font-family:monospace;color:{INK}"
    weight = f" × {token.weight:g}" if token.weight != 1 else ""
    text = html.escape(token.symbol.removesuffix(WORD_END) + weight)
    return f'<span style="{style}" title="id {token.id}">{text if token.kept else f"<s>{text}</s>"}</span>'


def _card(scene: Scene) -> VBox:
    caption = HTML(f"<small>{html.escape(scene.caption)}</small>", layout=Layout(width=f"{SMALL + 20}px"))
    return VBox([_image(Image.fromarray(scene.image), SMALL), caption])
