"""Captions: what a scene holds, said in many ways, and never anything that is not there."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace

from .world import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, RELATIONS, SIZES

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")
WAYS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
GROUNDS = ("on a {} background", "on a {} background", "against a {} background", "with a {} background")
# What a caption can be asked for, and the answers: the relation, how many there are of the same thing, and the name
# and the tint of the first, the second and the third object.
ANSWERS: tuple[tuple, ...] = ((None, *RELATIONS), (1, *COUNTS), *[(None, *OBJECTS)] * 3, *[(None, *COLOURS)] * 3)
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


def captions_apart(scene, rng: random.Random) -> tuple[str, str]:
    """A true caption of `scene`, and a wrong one that differs from it in one thing and in no other word.

    A relation turned round, tints exchanged, another tint, another count; where a scene has none of these said,
    another object. Which is true is not told by the words that are there, but by how they belong together.
    """
    wording = rng.random()

    def said(of) -> str:
        return caption_for(of, random.Random(wording))
    wrong = [said(other) for other in _almost(scene, rng) if said(other) != said(scene)]
    return said(scene), rng.choice(wrong or [said(_another_object(scene, rng))])


def _almost(scene, rng: random.Random) -> Iterator:
    """Scenes that differ from this one in one thing each: a relation, a count, whose tint is whose, a tint."""
    objects = scene.objects
    if scene.relation:
        yield replace(scene, relation=OPPOSITE[scene.relation])
    if scene.count > 1:
        yield replace(scene, count=rng.choice([count for count in COUNTS if count != scene.count]))
    tints = [placed.colour for placed in objects]
    if scene.count == 1 and len(set(tints)) > 1 and all(OBJECTS[placed.name].tintable for placed in objects):
        turned = tints[1:] + tints[:1]
        yield replace(scene, objects=tuple(replace(placed, colour=tint)
                                           for placed, tint in zip(objects, turned, strict=True)))
    alike = len(objects) if scene.count > 1 else 1                  # things of one count change together
    if coloured := [i for i in range(0, len(objects), alike) if tints[i]]:
        tint = rng.choice([colour for colour in COLOURS if colour not in tints])
        yield _with(scene, rng.choice(coloured), alike, colour=tint)


def _another_object(scene, rng: random.Random):
    """The scene with one of its objects called something that is not there; of a count, all of them."""
    named = {placed.name for placed in scene.objects}
    other = rng.choice([name for name in OBJECTS if name not in named])
    alike = len(scene.objects) if scene.count > 1 else 1
    return _with(scene, 0 if alike > 1 else rng.randrange(len(scene.objects)), alike, name=other)


def _with(scene, first: int, count: int, **changes):
    """The scene with `count` objects from `first` on changed."""
    return replace(scene, objects=tuple(replace(placed, **changes) if first <= i < first + count else placed
                                        for i, placed in enumerate(scene.objects)))


def answers_of(caption: str, scene) -> list[int]:
    """What `caption` says of its `scene`: for each tuple of `ANSWERS` the place of the right one.

    None, the first answer, where it says nothing, as of the relation in "a cat and a dog".
    """
    objects = scene.objects[:1] if scene.count > 1 else scene.objects
    unused = [None] * (3 - len(objects))
    said = any(f" {way} " in caption for way in WAYS.get(scene.relation, ()))
    right = (scene.relation if said else None, scene.count, *(placed.name for placed in objects), *unused,
             *(placed.colour for placed in objects), *unused)
    return [answers.index(one) for answers, one in zip(ANSWERS, right, strict=True)]


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
