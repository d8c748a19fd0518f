"""Does the attention of a word point at its thing? Peaks of heat maps against the exact boxes of scenes.

B  scenes        M  tokens of a caption        h, w  rows and columns of a heat map
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..data import OBJECTS, Scene
from ..tokenizer import Tokenizer

BACKGROUND = "background"


class PointingResult(NamedTuple):
    """Shares of peaks, NaN where there was none to count; what a peak at any place would give is `..._by_chance`."""

    hit_rate: float                  # of nouns, inside the box of their thing
    other_object_rate: float                # of nouns, inside the box of another thing of the scene
    background_rate: float               # of the word "background", outside of all boxes
    hit_rate_by_chance: float
    background_rate_by_chance: float


def pointing_game(heat: Tensor, scenes: Sequence[Scene], tokenizer: Tokenizer) -> PointingResult:
    """Where the heat maps (B, M, h, w) of the scenes' captions are highest; of a word of several tokens, their sum.

    Each noun of each scene counts once, and "background" wherever the caption has it. Raises ValueError for a
    number of maps that is not that of the scenes, and for a caption without a noun of its scene.
    """
    if len(heat) != len(scenes):
        raise ValueError(f"there are maps of {len(heat)} captions for {len(scenes)} scenes: give one for each")
    nouns, grounds = [], []                             # rows of (in own, in other, own's share of the image)
    for one, maps in zip(scenes, heat, strict=True):
        for name, count in {group.name: group.count for group in one.groups}.items():
            own = box_mask(one, lambda thing, name=name: thing.name == name)
            other = box_mask(one, lambda thing, name=name: thing.name != name) & ~own
            at = find_peak(maps, OBJECTS[name].noun(count), one, tokenizer)
            nouns.append((own[at], other[at], own.mean()))
        if BACKGROUND in one.caption:
            free = ~box_mask(one, lambda thing: True)
            grounds.append((free[find_peak(maps, BACKGROUND, one, tokenizer)], free.mean()))
    own, other, area = np.mean(nouns, axis=0) if nouns else [math.nan] * 3
    outside, ground = np.mean(grounds, axis=0) if grounds else [math.nan] * 2
    return PointingResult(*map(float, (own, other, outside, area, ground)))


def find_peak(maps: Tensor, word: str, one: Scene, tokenizer: Tokenizer) -> tuple[int, int]:
    """(row, column) of the pixel in the middle of the cell where the maps (M, h, w) of a word are highest."""
    heat = maps[token_positions(word, one.caption, tokenizer)].sum(dim=0)                  # (h, w)
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    return int((row + 0.5) * one.side / heat.shape[0]), int((column + 0.5) * one.side / heat.shape[1])


def box_mask(one: Scene, wanted) -> np.ndarray:
    """The boxes of the things for which `wanted` is true, bool (side, side)."""
    area = np.zeros((one.side, one.side), bool)
    for thing in filter(wanted, one.objects):
        left, top, right, bottom = thing.box
        area[top:bottom, left:right] = True
    return area


def token_positions(word: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Places in the text's row of ids, which begins with the start token, where the word, or words, first stand.

    Raises ValueError where they do not stand.
    """
    ids, own = tokenizer.encode(text), tokenizer.encode(word)
    for first in range(len(ids) - len(own) + 1):
        if ids[first:first + len(own)] == own:
            return list(range(first + 1, first + 1 + len(own)))
    raise ValueError(f"there is no '{word}' in '{text}'")
