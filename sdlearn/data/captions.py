"""Captions: what a scene holds, said in many ways, and never anything that is not there."""

import random
import re

from .description import OPPOSITE, Description, Group, describe, iter_hard_negatives, replace_object, with_article
from .grammar import SYNONYMS, list_phrases, write_varied_caption
from .held_out import is_held_out_text
from .world import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, RELATIONS, SIZES

OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ")
RELATION_PHRASES = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BACKGROUND_PHRASES = ("on a {} background", "on a {} background", "against a {} background", "with a {} background")
MAX_GROUPS = 3          # of objects in a scene
# What can be asked of a caption, and the answers: the relation, then the count, the name and the tint of the first, the
# second and the third kind of object that it names.
CAPTION_LABELS: tuple[tuple, ...] = ((None, *RELATIONS), *[(None, 1, *COUNTS)] * MAX_GROUPS,
                                     *[(None, *OBJECTS)] * MAX_GROUPS, *[(None, *COLOURS)] * MAX_GROUPS)
DIRECTIONS = re.compile(r"\b(left|right|above|over|at the top|below|under|beneath|underneath)\b")
NUMERALS = {2: ("two", "two", "2"), 3: ("three", "three", "3")}


def write_caption(scene, rng: random.Random, grammar: float = 0.0) -> str:
    """A caption of `draw_scene`. Sizes and the background are sometimes left unsaid; tints and counts never are.

    grammar: the share of captions in the wordings of `grammar`; the others are in the simplest one.
    """
    description = describe(scene)
    while is_held_out_text(text := _word(description, rng, grammar)):
        pass
    return text


def _word(description: Description, rng: random.Random, grammar: float) -> str:
    varied = grammar and rng.random() < grammar
    return write_varied_caption(description, rng) if varied else write_plain_caption(description, rng)


def write_plain_caption(description: Description, rng: random.Random) -> str:
    """A text in the simplest wording: "a red apple to the left of a cat on a yellow background"."""
    things = [_phrase(group, rng) for group in description.groups]
    if description.relation and rng.random() < 0.8:
        text = f"{things[0]} {rng.choice(RELATION_PHRASES[description.relation])} {things[1]}"
    else:
        text = ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else things[0]
    text = rng.choice(OPENINGS) + text
    if rng.random() < 0.8:
        ground = with_article(f"{description.background} background")
        text = f"{text} {rng.choice(BACKGROUND_PHRASES).replace('a {} background', ground)}"
    return text


def caption_and_hard_negative(scene, rng: random.Random, grammar: float = 0.0) -> tuple[str, str]:
    """A true caption of `draw_scene`, and a hard negative that differs from it in one thing and in no other word.

    The opposite relation, counts or tints exchanged, another tint, another count; where the caption says none of
    these, another object. So which is true shows in how the words belong together, not in which words are there.
    """
    true = describe(scene)
    while True:
        wording = rng.random()

        def word(description: Description, wording: float = wording) -> str:
            return _word(description, random.Random(wording), grammar)
        wrong = [word(other) for other in iter_hard_negatives(true, rng) if word(other) != word(true)]
        pair = word(true), rng.choice(wrong or [word(replace_object(true, rng))])
        if not any(map(is_held_out_text, pair)):
            return pair


def label_caption(caption: str, scene) -> list[int]:
    """What `caption` says of its `draw_scene`: for each tuple of `CAPTION_LABELS` the place of the right one.

    Kinds of objects are asked for in the order in which the caption names them, and the relation of the first to the
    second. None, the first answer, where it says nothing, as of the relation in "a cat and a dog".
    """
    text = caption.lower()
    groups = sorted(scene.groups, key=lambda group: _first_place(text, group))
    relation = scene.relation if DIRECTIONS.search(text.replace("one above the other", "")) else None
    if relation and groups[0] != scene.groups[0]:
        relation = OPPOSITE[relation]
    unused = [None] * (MAX_GROUPS - len(groups))
    right = (relation, *(group.count for group in groups), *unused, *(group.name for group in groups), *unused,
             *(group.colour for group in groups), *unused)
    return [answers.index(one) for answers, one in zip(CAPTION_LABELS, right, strict=True)]


def _first_place(text: str, group: Group) -> int:
    """Where a caption names a group of its objects for the first time."""
    nouns = [OBJECTS[group.name].noun(group.count), *(some[group.count > 1] for some in SYNONYMS.get(group.name, ()))]
    found = [re.search(rf"\b{re.escape(noun)}\b", text) for noun in nouns]
    return min(match.start() for match in found if match)


def _phrase(group: Group, rng: random.Random) -> str:
    number = rng.choice(NUMERALS[group.count]) if group.count > 1 else None
    size = group.size if group.size in ("small", "large") and rng.random() < 0.5 else None
    phrase = " ".join(filter(None, (number, size, group.colour, OBJECTS[group.name].noun(group.count))))
    return phrase if number else with_article(phrase)


def vocabulary(objects=tuple(OBJECTS), *, grammar: bool = False) -> frozenset[str]:
    """Every word that a caption can hold in a world of these objects (all by default), in lower case.

    grammar: whether some of the captions are in the wordings of `grammar`.
    """
    phrases = [*OPENINGS, *BACKGROUND_PHRASES, *COLOURS, *BACKGROUNDS, *SIZES, *COUNTS.values(), "an and"]
    phrases += [way for ways in RELATION_PHRASES.values() for way in ways]
    phrases += [word for words in NUMERALS.values() for word in words]
    phrases += [OBJECTS[name].noun(count) for name in objects for count in (1, 2)]
    if grammar:
        phrases += [re.sub(r"\{[^}]*\}", " ", phrase) for phrase in list_phrases(objects)]
    return frozenset(re.findall(r"[a-z0-9]+", " ".join(phrases).lower())) - {"medium"}
