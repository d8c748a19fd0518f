"""Tints: the object's main fills are exchanged, body for body and shade for shade."""

import numpy as np
import pytest

from sdlearn.data import COLOURS, OBJECTS, atlas, compose_scene

SIDE = 90                # pixels; none of the sizes of scenes, so each sprite is rendered here
TINTABLE = [name for name, kind in OBJECTS.items() if kind.tintable]


def rgb(fill):
    return np.array([int(fill[at:at + 2], 16) for at in (1, 3, 5)])


def luminance(fill):
    return rgb(fill) @ (0.299, 0.587, 0.114)


def pixels_of(sprite, fill):
    """Where a sprite is opaque and of just this colour."""
    return (sprite[..., 3] == 255) & (sprite[..., :3] == rgb(fill)).all(axis=-1)


@pytest.mark.parametrize("name", TINTABLE)
def test_the_body_takes_the_tints_body_and_the_shade_its_shade(name):
    natural = atlas.load_sprite(name, None, SIDE)
    parts = [pixels_of(natural, fill) for fill in OBJECTS[name].fills]
    assert parts[0].sum() > 30 and sum(part.sum() for part in parts) > 0.1 * (natural[..., 3] == 255).sum()
    for colour, tint in COLOURS.items():
        tinted = atlas.load_sprite(name, colour, SIDE)
        for part, fill in zip(parts, tint, strict=True):
            assert pixels_of(tinted, fill)[part].all(), (name, colour, fill)


def test_a_body_is_lighter_than_its_shade():
    for colour, (body, shade) in COLOURS.items():
        assert luminance(body) > luminance(shade) + 10, colour
    assert len({fill for tint in COLOURS.values() for fill in tint}) == 2 * len(COLOURS)


def test_the_colour_of_a_tint_is_the_one_that_its_name_says():
    for colour, hue in {"red": 0, "green": 1, "blue": 2}.items():
        for fill in COLOURS[colour]:
            assert rgb(fill).argmax() == hue, (colour, fill)
    yellow, orange, pink, purple = (rgb(COLOURS[colour][0]) for colour in ("yellow", "orange", "pink", "purple"))
    assert yellow[2] < orange[1] < yellow[1] and orange[2] < orange[1] < orange[0]
    assert pink.argmax() == 0 and pink.min() > 128 and purple.argmax() == 2 and purple.argmin() == 1


def test_a_scene_shows_the_tint_of_each_object():
    """In the image, too: the exact colour of the tint lies within the object's own mask, and in no other."""
    drawn = compose_scene(["apple", "car"], colours=["green", "pink"], relation="left", background="white", seed=2)
    for i, colour in enumerate(("green", "pink")):
        shown = (drawn.image == rgb(COLOURS[colour][0])).all(axis=-1)
        assert shown[drawn.masks[i]].any() and not shown[~drawn.masks[i]].any()
