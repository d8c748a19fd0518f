"""Captions: what a scene holds, said in many ways, and never anything that is not there."""

import random
import re

from .world import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, SIZES

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")
WAYS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
GROUNDS = ("on a {} background", "on a {} background", "against a {} background", "with a {} background")
NUMERALS = {2: ("two", "two", "2"), 3: ("three", "three", "3")}


def caption_for(scene, rng: random.Random) -> str:
    """A caption of `scene`. Sizes and the background are sometimes left unsaid; tints never are."""
    if scene.count > 1:
        first = scene.objects[0]
        text = f"{rng.choice(NUMERALS[scene.count])} {_phrase(first, rng, scene.count)}"
    else:
        things = [with_article(_phrase(placed, rng)) for placed in scene.objects]
        if scene.relation and rng.random() < 0.8:
            text = f"{things[0]} {rng.choice(WAYS[scene.relation])} {things[1]}"
        else:
            text = ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]
    text = rng.choice(OPENINGS) + text
    if rng.random() < 0.8:
        ground = with_article(f"{scene.background} background")
        text = f"{text} {rng.choice(GROUNDS).replace('a {} background', ground)}"
    return text


def _phrase(placed, rng: random.Random, count: int = 1) -> str:
    size = placed.size if placed.size != "medium" and rng.random() < 0.5 else None
    return " ".join(filter(None, (size, placed.colour, OBJECTS[placed.name].noun(count))))


def with_article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def vocabulary(objects=tuple(OBJECTS)) -> frozenset[str]:
    """Every word that a caption can hold in a world of these objects (all by default), in lower case."""
    phrases = [*OPENINGS, *GROUNDS, *COLOURS, *BACKGROUNDS, *SIZES, *COUNTS.values(), "an and"]
    phrases += [way for ways in WAYS.values() for way in ways]
    phrases += [word for words in NUMERALS.values() for word in words]
    phrases += [OBJECTS[name].noun(count) for name in objects for count in (1, 2)]
    return frozenset(re.findall(r"[a-z0-9]+", " ".join(phrases))) - {"medium"}
