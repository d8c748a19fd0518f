"""Scenes: a seed gives an image, its caption, and exactly what is where.

Everything random about a scene comes from one `random.Random`, seeded with a string that names the
split and the seed, and everything drawn is integer arithmetic: the same seed gives the same bytes
on every machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .atlas import load_sprite
from .captions import write_caption
from .description import Group, group_objects
from .world import (
    BACKGROUNDS,
    COLOURS,
    COMPOSITIONS,
    COUNTS,
    FULL,
    OBJECTS,
    RELATIONS,
    SIZE_STEP,
    SIZES,
    UNTAUGHT,
    World,
    is_held_out,
)

SIDE = 128              # native width and height of an image, in pixels
MARGIN = 2              # pixels that stay free along the edge
MAX_OBJECTS = 4                # objects in a scene
# The longer side of an object at most, in pixels, by how many objects there are.
LARGEST = {1: 100, 2: 76, 3: 48, 4: 44}
SPLITS = ("train", "test", "held_out")
WHOLE = (MARGIN, MARGIN, SIDE - MARGIN, SIDE - MARGIN)      # where objects may lie: left, top, right, bottom
QUARTERS = tuple((x, y, x + SIDE // 2 - MARGIN, y + SIDE // 2 - MARGIN)
                 for y in (MARGIN, SIDE // 2) for x in (MARGIN, SIDE // 2))
DRAWABLE_OBJECTS = {**OBJECTS, **UNTAUGHT}         # those of `UNTAUGHT` are drawn only when asked for by name


@dataclass(frozen=True)
class PlacedObject:
    """One object in a scene. `box` is left, top, right, bottom in pixels; the nearest has depth 0."""

    name: str
    kind: str
    colour: str | None      # None: the object's natural look
    size: str               # a key of SIZES
    box: tuple[int, int, int, int]
    depth: int

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def extent(self) -> tuple[int, int]:
        """Width and height in pixels."""
        left, top, right, bottom = self.box
        return right - left, bottom - top


@dataclass(frozen=True)
class Scene:
    """A scene and everything that can be asked about it; images are made when asked for."""

    seed: int
    split: str
    caption: str
    objects: tuple[PlacedObject, ...]
    background: str
    background_rgb: tuple[int, int, int]
    relation: str | None            # of the first object to the second, when there are two of them
    side: int = SIDE

    @property
    def groups(self) -> tuple[Group, ...]:
        """The objects by kind and tint, in the order in which they come."""
        return group_objects(self.objects)

    @property
    def count(self) -> int:
        """How many of the same object; 1 when they differ. See `groups` for a count of each kind."""
        return len(self.objects) if len({placed.name for placed in self.objects}) == 1 else 1

    @property
    def held_out(self) -> bool:
        return is_held_out(tuple(o.name for o in self.objects), tuple(o.colour for o in self.objects))

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 (side, side, 3)."""
        canvas = np.empty((self.side, self.side, 3), np.uint16)
        canvas[:] = self.background_rgb
        for placed, rgba in self._sprites():
            left, top, right, bottom = placed.box
            below = canvas[top:bottom, left:right]
            # colour + (1 - opacity) below, rounded; colours are premultiplied
            below[:] = rgba[..., :3] + (below * (255 - rgba[..., 3:].astype(np.uint16)) + 127) // 255
        return canvas.astype(np.uint8)

    @cached_property
    def masks(self) -> np.ndarray:
        """What of each object can be seen, bool (objects, side, side)."""
        masks = np.zeros((len(self.objects), self.side, self.side), bool)
        for placed, rgba in self._sprites():
            left, top, right, bottom = placed.box
            shown = rgba[..., 3] > 127
            masks[:, top:bottom, left:right] &= ~shown
            masks[self.objects.index(placed), top:bottom, left:right] |= shown
        return masks

    @cached_property
    def depth_map(self) -> np.ndarray:
        """Nearness, uint8 (side, side): 0 the ground, 255 the nearest object."""
        shades = np.array([255 - 60 * placed.depth for placed in self.objects], np.uint8)
        return (self.masks * shades[:, None, None]).max(axis=0).astype(np.uint8)

    @cached_property
    def edge_map(self) -> np.ndarray:
        """Outlines, uint8 (side, side) of 0 and 255: where brightness or an object's border jumps."""
        grey = self.image.astype(np.int32) @ np.array([77, 150, 29])            # 256 times luminance
        jump = np.zeros((self.side, self.side), bool)
        jump[:, 1:] |= np.abs(np.diff(grey, axis=1)) > 256 * 40
        jump[1:] |= np.abs(np.diff(grey, axis=0)) > 256 * 40
        labels = (self.masks * np.arange(1, len(self.objects) + 1)[:, None, None]).sum(axis=0)
        jump[:, 1:] |= np.diff(labels, axis=1) != 0
        jump[1:] |= np.diff(labels, axis=0) != 0
        return jump.astype(np.uint8) * 255

    def _sprites(self):
        """Placed objects and their sprites, farthest first."""
        for placed in sorted(self.objects, key=lambda o: -o.depth):
            left, top, right, bottom = placed.box
            yield placed, load_sprite(placed.name, placed.colour, max(right - left, bottom - top))


def draw_scene(seed: int, split: str = "train", world: World = FULL) -> Scene:
    """The scene of a seed. `split` is "train", "test" (unseen scenes of the same kind) or "held_out"
    (only combinations that training never shows)."""
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}'; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"sdlearn {split} {seed}")
    while True:
        drawn = _draw(rng, seed, split, world)
        if drawn.held_out == (split == "held_out"):
            return replace(drawn, caption=write_caption(drawn, rng, world.grammar))


def draw_scenes(start: int, count: int, split: str = "train", world: World = FULL):
    """Scenes of the seeds `start` to `start + count - 1`, one after the other."""
    return (draw_scene(seed, split, world) for seed in range(start, start + count))


def compose_scene(names: Sequence[str], *, colours: Sequence[str | None] | None = None, relation: str | None = None,
             background: str | None = None, seed: int = 0) -> Scene:
    """A scene of just these objects, whatever training shows; what is left out is drawn from the seed.

    names: one to four, the same one again for a count; of `UNTAUGHT`, which no model has seen, as well. colours: one
    for each; all natural by default. relation: of the first of two objects to the second. The caption is empty.
    Raises ValueError for what no scene can hold.
    """
    colours = [None] * len(names) if colours is None else list(colours)
    _check_wanted(names, colours, relation, background)
    rng = random.Random(f"sdlearn of {seed} {list(names)} {colours} {relation} {background}")
    if len(names) > 1 and len(set(zip(names, colours, strict=True))) == 1:
        sizes = [rng.choice(("small", "medium"))] * len(names)
    else:
        sizes = [_size(rng, len(names)) for _ in names]
        if sizes == ["large", "large"]:
            sizes[rng.randrange(2)] = "medium"
    return _composed(rng, seed, "test", names, colours, sizes, relation, background)


def _check_wanted(names, colours, relation, background):
    if not 1 <= len(names) <= MAX_OBJECTS or len(colours) != len(names):
        raise ValueError(f"a scene holds one to four objects with a colour (or None) for each, not {len(names)} "
                         f"objects and {len(colours)} colours")
    for name, colour in zip(names, colours, strict=True):
        if name not in DRAWABLE_OBJECTS:
            raise ValueError(f"there is no object '{name}'; choose one of {', '.join(DRAWABLE_OBJECTS)}")
        if colour is not None and not (DRAWABLE_OBJECTS[name].tintable and colour in COLOURS):
            raise ValueError(f"'{name}' cannot be {colour}; the colours are {', '.join(COLOURS)}, and only some "
                             "objects take them: see tintable in OBJECTS")
    if relation is not None and (relation not in RELATIONS or len(names) != 2):
        raise ValueError(f"relation is '{relation}' for {len(names)} objects; give two objects and one of "
                         f"{', '.join(RELATIONS)}")
    if background is not None and background not in BACKGROUNDS:
        raise ValueError(f"there is no background '{background}'; choose one of {', '.join(BACKGROUNDS)}")


def _draw(rng: random.Random, seed: int, split: str, world: World) -> Scene:
    forms = ("single", "count", "pair", "triple", "composition")
    form = rng.choices(forms, [getattr(world, form) for form in forms])[0]
    number = {"single": 1, "count": rng.choice(tuple(COUNTS)), "pair": 2, "triple": 3, "composition": 0}[form]
    relation = rng.choice(RELATIONS) if form == "pair" else None
    objects = world.objects
    if world.colourful and rng.random() < world.colourful:
        objects = [name for name in objects if OBJECTS[name].tintable]
    if form == "composition":
        names, colours, sizes = _draw_composition(rng, objects, world.tinted)
    elif form == "count":
        names = [rng.choice(objects)] * number
        colours = [_colour(rng, names[0], world.tinted)] * number
        sizes = [rng.choice(("small", "medium"))] * number
    else:
        names = rng.sample(objects, number)
        colours = [_colour(rng, name, world.tinted) for name in names]
        sizes = [_size(rng, number) for _ in names]
        if number == 2 and sizes == ["large", "large"]:
            sizes[rng.randrange(2)] = "medium"
    return _composed(rng, seed, split, names, colours, sizes, relation)


def _draw_composition(rng: random.Random, objects, tinted: float) -> tuple[list, list, list]:
    """Names, colours and sizes of two or three kinds of objects; those of one kind are alike."""
    counts = rng.choice(COMPOSITIONS)
    kinds = [(name, _colour(rng, name, tinted), _size(rng, sum(counts))) for name in rng.sample(objects, len(counts))]
    names, colours, sizes = zip(*(kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)),
                                strict=True)
    return list(names), list(colours), list(sizes)


def _composed(rng: random.Random, seed: int, split: str, names, colours, sizes, relation,
              background: str | None = None) -> Scene:
    """A scene of objects whose sizes are known: places, depths and the ground."""
    number = len(names)
    boxes = _place(rng, names, colours, sizes, relation)
    depths = rng.sample(range(number), number)
    background = background or rng.choice(tuple(BACKGROUNDS))
    shade = rng.randint(-8, 8)
    rgb = tuple(min(255, max(0, value + shade)) for value in BACKGROUNDS[background])
    objects = tuple(PlacedObject(name, DRAWABLE_OBJECTS[name].kind, colour, size, box, depth) for
                    name, colour, size, box, depth in zip(names, colours, sizes, boxes, depths, strict=True))
    return Scene(seed, split, "", objects, background, rgb, relation)


def _colour(rng: random.Random, name: str, tinted: float) -> str | None:
    if OBJECTS[name].tintable and rng.random() < tinted:
        return rng.choice(tuple(COLOURS))
    return None


def _size(rng: random.Random, number: int) -> str:
    weights = {1: (2, 4, 4), 2: (3, 5, 2), 3: (5, 5, 0), 4: (6, 4, 0)}[number]
    return rng.choices(tuple(SIZES), weights)[0]


def _extent(rng: random.Random, name: str, colour: str | None, size: str, number: int) -> tuple[int, int]:
    low, high = SIZES[size]
    high = min(high, LARGEST[number])
    pixels = rng.randrange(low, high + 1, SIZE_STEP)
    height, width = load_sprite(name, colour, pixels).shape[:2]
    return width, height


def _place(rng, names, colours, sizes, relation) -> list[tuple[int, int, int, int]]:
    """Boxes for the objects. Objects of one kind, tint and size class are alike to the pixel."""
    number, first = len(names), {}
    extents = [first.setdefault(what, extent) for what, extent in
               [(what, _extent(rng, *what, number)) for what in zip(names, colours, sizes, strict=True)]]
    if relation:
        return _place_pair(rng, extents, relation)
    for _ in range(200):
        boxes = [_free_box(rng, extent) for extent in extents]
        if all(_overlap(a, b) <= 0.1 for i, a in enumerate(boxes) for b in boxes[:i]):
            return boxes
    if number == MAX_OBJECTS:
        return [_free_box(rng, extent, QUARTERS[i]) for i, extent in enumerate(extents)]
    # Crowded: a row, each in a third of the width, none wider than 48 pixels.
    return [(x, y, x + w, y + h) for i, (w, h) in enumerate(extents)
            for x, y in [(min(SIDE - MARGIN - w, MARGIN + i * (SIDE - 2 * MARGIN) // number),
                          rng.randint(MARGIN, SIDE - MARGIN - h))]]


def _place_pair(rng, extents, relation) -> list[tuple[int, int, int, int]]:
    """Two boxes side by side (or one above the other), first object first as `relation` says."""
    across = relation in ("left", "right")
    swap = relation in ("right", "below")
    first, second = [(w, h) if across else (h, w) for w, h in extents][::-1 if swap else 1]
    room = SIDE - 2 * MARGIN - first[0] - second[0]             # negative: they overlap by that much
    lead = rng.randint(0, max(0, room))
    gap = rng.randint(0, room - lead) if room > 0 else room
    start = MARGIN + lead
    middle = rng.randint(MARGIN + max(first[1], second[1]) // 2, SIDE - MARGIN - (max(first[1], second[1]) + 1) // 2)
    boxes = []
    for (length, breadth), a in ((first, start), (second, start + first[0] + gap)):
        b = middle - breadth // 2 + rng.randint(-10, 10)
        b = min(max(b, MARGIN), SIDE - MARGIN - breadth)
        boxes.append((a, b, a + length, b + breadth) if across else (b, a, b + breadth, a + length))
    return boxes[::-1] if swap else boxes


def _free_box(rng: random.Random, extent: tuple[int, int], within=WHOLE) -> tuple[int, int, int, int]:
    """A box of this width and height anywhere in a region (left, top, right, bottom)."""
    width, height = extent
    left = rng.randint(within[0], within[2] - width)
    top = rng.randint(within[1], within[3] - height)
    return left, top, left + width, top + height


def _overlap(a, b) -> float:
    """Area that two boxes share, as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    area = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / area
