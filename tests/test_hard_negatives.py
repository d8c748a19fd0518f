"""Hard negatives: a wrong caption differs from the true one in one fact, and names nothing that cannot be."""

import random
import re

import pytest

from sdlearn.data import COLOURS, OBJECTS, WORLDS, compose_scene, draw_scenes
from sdlearn.data.captions import RELATION_PHRASES, caption_and_hard_negative

TRIES = 60
NUMBERS = {"two": 2, "2": 2, "three": 3, "3": 3}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def pairs_of(scene):
    """Many (true, wrong) captions of one scene."""
    return [caption_and_hard_negative(scene, random.Random(seed)) for seed in range(TRIES)]


def tints_of(caption):
    """(colour, noun) of everything that the caption gives a colour, in its order; backgrounds are left out."""
    nouns = {noun: name for name, kind in OBJECTS.items() for noun in (kind.noun(1), kind.noun(2))}
    found = re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(sorted(nouns, key=len, reverse=True))})\b",
                       re.sub(r"\b\w+ background", "", caption))
    return [(colour, nouns[noun]) for colour, noun in found]


def names_of(caption):
    """The objects that a caption names."""
    text = f" {re.sub(r'[^a-z0-9 ]', '', caption)} "
    return {name for name, kind in OBJECTS.items() if f" {kind.noun(1)} " in text or f" {kind.noun(2)} " in text}


def relation_of(caption):
    return next((relation for relation, ways in RELATION_PHRASES.items()
                 if any(f" {way} " in caption for way in ways)), None)


@pytest.mark.parametrize("of", ["full", "hard", "rich"])
def test_only_objects_that_take_a_tint_have_one(of):
    for drawn in draw_scenes(0, 1500, world=WORLDS[of]):
        for caption in caption_and_hard_negative(drawn, random.Random(drawn.seed)):
            assert all(OBJECTS[name].tintable for _, name in tints_of(caption)), caption


@pytest.mark.parametrize("names", [["apple", "cat"], ["cat", "apple"], ["cat", "star", "pig"]])
def test_a_tint_does_not_move_to_an_object_that_takes_none(names):
    drawn = compose_scene(names, colours=["red" if OBJECTS[name].tintable else None for name in names])
    for true, wrong in pairs_of(drawn):
        [(colour, name)] = tints_of(true)
        assert colour == "red" and OBJECTS[name].tintable
        assert len(tints_of(wrong)) == 1 and tints_of(wrong)[0][1] == name and tints_of(wrong)[0][0] != "red", wrong


def test_another_tint_is_none_that_the_scene_has():
    """Of a red apple and a blue car, the wrong tint is neither red nor blue: else two things would be alike."""
    drawn = compose_scene(["apple", "car"], colours=["red", "blue"])
    kinds = set()
    for true, wrong in pairs_of(drawn):
        assert tints_of(true) == [("red", "apple"), ("blue", "car")]
        (first, _), (second, _) = tints_of(wrong)
        changed = (first != "red") + (second != "blue")
        kinds.add(changed)
        assert names_of(wrong) == {"apple", "car"}
        if changed == 1:
            assert {first, second} - {"red", "blue"} and first != second, wrong
        else:
            assert (first, second) == ("blue", "red"), wrong
    assert kinds == {1, 2}, "another tint, and tints exchanged"


def test_a_single_tint_is_always_replaced_by_another():
    drawn = compose_scene(["apple"], colours=["red"])
    others = set()
    for _, wrong in pairs_of(drawn):
        [(colour, name)] = tints_of(wrong)
        assert name == "apple" and colour != "red"
        others.add(colour)
    assert others == set(COLOURS) - {"red"}


def test_equal_tints_are_not_exchanged():
    drawn = compose_scene(["apple", "car"], colours=["red", "red"])
    assert all([first, second].count("red") == 1
               for _, wrong in pairs_of(drawn) for (first, _), (second, _) in [tints_of(wrong)])


def test_tints_of_three_objects_all_change_places():
    drawn = compose_scene(["apple", "car", "star"], colours=["red", "blue", "pink"])
    orders = {tuple(colour for colour, _ in tints_of(wrong)) for _, wrong in pairs_of(drawn)}
    exchanged = [order for order in orders if sorted(order) == ["blue", "pink", "red"]]
    assert exchanged and all(a != b for order in exchanged for a, b in zip(order, ("red", "blue", "pink"), strict=True))


@pytest.mark.parametrize("relation", OPPOSITE)
def test_a_wrong_relation_is_the_opposite_one(relation):
    """Not one along the other axis, which may be true as well."""
    drawn = compose_scene(["cat", "pig"], relation=relation)
    said = [(relation_of(true), relation_of(wrong), names_of(wrong)) for true, wrong in pairs_of(drawn)]
    assert {(right, other) for right, other, _ in said} == {(relation, OPPOSITE[relation]), (None, None)}
    for right, _, names in said:
        assert (names == {"cat", "pig"}) == (right is not None), "where none is said, another object"


@pytest.mark.parametrize("count", [2, 3])
def test_a_wrong_count_is_another_count_of_the_same_objects(count):
    drawn = compose_scene(["apple"] * count, colours=["red"] * count)
    numbers, tints = set(), set()
    for true, wrong in pairs_of(drawn):
        [right], [other] = ([NUMBERS[word] for word in text.split() if word in NUMBERS] for text in (true, wrong))
        assert right == count and names_of(wrong) == {"apple"}
        numbers.add(other)
        tints.update(colour for colour, _ in tints_of(wrong) if other == count)
        assert tints_of(wrong) == [("red", "apple")] or other == count, "one thing is wrong, not two"
    assert numbers == {2, 3} and tints == set(COLOURS) - {"red"}


def test_where_only_a_count_can_be_wrong_it_always_is():
    for true, wrong in pairs_of(compose_scene(["cat", "cat"])):
        assert names_of(true) == names_of(wrong) == {"cat"}
        assert re.search(r"\b(two|2)\b", true) and re.search(r"\b(three|3)\b", wrong)


def test_counts_are_exchanged_between_kinds():
    """Two cats and a pig: the wrong caption says a cat and two pigs, or three cats, and the same objects."""
    drawn = compose_scene(["cat", "cat", "pig"])
    wrong = {re.sub(r"^(a picture|a drawing|an image) of | (on|against|with) a .*", "", wrong.replace("2", "two")
                    .replace("3", "three").replace("small ", "").replace("large ", ""))
             for _, wrong in pairs_of(drawn)}
    assert wrong == {"a cat and two pigs", "three cats and a pig"}


def test_another_object_is_one_that_is_not_there():
    places = set()
    drawn = compose_scene(["cat", "pig", "frog"])
    for true, wrong in pairs_of(drawn):
        assert names_of(true) == {"cat", "pig", "frog"}
        [gone], [come] = names_of(true) - names_of(wrong), names_of(wrong) - names_of(true)
        assert come not in ("cat", "pig", "frog")
        places.add(gone)
    assert places == {"cat", "pig", "frog"}, "any of them"


def test_a_wrong_caption_says_the_rest_in_the_same_words():
    """Opening, sizes, background and wording agree, so that only the fact tells the two apart."""
    for drawn in draw_scenes(0, 400, world=WORLDS["full"]):
        true, wrong = caption_and_hard_negative(drawn, random.Random(drawn.seed))
        for pattern in (r"^a (image|drawing)|^an image|^", r"\b(small|large)\b", r"(\w+) an? \w+ background$",
                        r"\w+ background$"):
            assert [found[0] for found in re.finditer(pattern, true)] == [
                found[0] for found in re.finditer(pattern, wrong)], (true, wrong)
