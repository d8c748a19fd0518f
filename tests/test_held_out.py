"""Held-out combinations: none of them is in a training scene, wherever in the scene its objects come."""

import itertools

import pytest

from sdlearn.data import COLOURS, OBJECTS, WORLDS, compose_scene, draw_scene
from sdlearn.data.world import COUNTS, HELD_OUT_COLOURS, HELD_OUT_COUNTS, HELD_OUT_PAIRS
from sdlearn.evaluation import ObjectSpec, SceneSpec

PAIRS = sorted(tuple(sorted(pair)) for pair in HELD_OUT_PAIRS)
TINTED = sorted({name for _, name in HELD_OUT_COLOURS})


def bystander(*names):
    """A name of an object that is held out with none of these."""
    return next(name for name in OBJECTS if name not in names
                and not any(frozenset((name, other)) in HELD_OUT_PAIRS for other in names))


def combinations(objects):
    """The held-out combinations of a scene, looked up one by one; objects as (name, colour)."""
    names = [name for name, _ in objects]
    return ({(colour, name) for name, colour in objects if (colour, name) in HELD_OUT_COLOURS}
            | {(names.count(name), name) for name in names if (names.count(name), name) in HELD_OUT_COUNTS}
            | {pair for pair in map(frozenset, itertools.combinations(names, 2)) if pair in HELD_OUT_PAIRS})


@pytest.mark.parametrize("a, b", PAIRS)
def test_a_held_out_pair_is_held_out_in_any_order_and_with_a_third_object_between(a, b):
    third = bystander(a, b)
    for names in itertools.chain(itertools.permutations((a, b)), itertools.permutations((a, third, b))):
        assert compose_scene(names).held_out, names
    for names in ([a], [b], [a, third], [third, b]):
        assert not compose_scene(names).held_out, names
    assert SceneSpec((ObjectSpec(b), ObjectSpec(a))).held_out
    assert not SceneSpec((ObjectSpec(b), ObjectSpec(third))).held_out


@pytest.mark.parametrize("name", TINTED)
def test_a_held_out_colour_is_held_out_for_every_object_of_a_scene(name):
    others = [bystander(name)]
    others.append(bystander(name, *others))
    for colour in COLOURS:
        held_out = (colour, name) in HELD_OUT_COLOURS
        for count in (1, 2, 3):
            for place in range(count):
                names, colours = others[:count - 1], [None] * (count - 1)
                names.insert(place, name)
                colours.insert(place, colour)
                assert compose_scene(names, colours=colours).held_out == held_out, (names, colours)
        assert SceneSpec((ObjectSpec(others[0]), ObjectSpec(name, colour=colour))).held_out == held_out
    assert not compose_scene([name]).held_out, "its natural colour"


def test_a_held_out_colour_belongs_to_its_own_object():
    """A blue apple is held out, an apple and a blue umbrella are not."""
    assert ("blue", "apple") in HELD_OUT_COLOURS and ("blue", "umbrella") not in HELD_OUT_COLOURS
    assert compose_scene(["umbrella", "apple"], colours=["orange", "red"]).held_out
    assert not compose_scene(["apple", "umbrella"], colours=[None, "blue"]).held_out
    assert not compose_scene(["apple", "umbrella"], colours=["orange", "blue"]).held_out
    assert compose_scene(["car", "car"], colours=["red", "purple"]).held_out


@pytest.mark.parametrize("count", COUNTS)
def test_a_held_out_count_is_held_out_for_its_own_object_and_number(count):
    for name in sorted({name for _, name in HELD_OUT_COUNTS} | {"lemon", "dog"}):
        held_out = (count, name) in HELD_OUT_COUNTS
        assert compose_scene([name] * count).held_out == held_out, (count, name)
        assert SceneSpec((ObjectSpec(name, count=count),)).held_out == held_out, (count, name)


def test_a_held_out_count_does_not_depend_on_tints():
    assert compose_scene(["fish"] * 2, colours=["pink"] * 2).held_out
    assert not compose_scene(["fish"] * 3, colours=["pink"] * 3).held_out
    assert compose_scene(["fish"] * 3, colours=["red"] * 3).held_out, "the colour is"


def test_a_held_out_count_is_held_out_among_other_objects():
    """Of each kind the count is its own: two cats and an apple hold two cats, a cat and two apples do not."""
    for names in itertools.permutations(("cat", "cat", "apple")):
        assert compose_scene(names).held_out, names
    for names in itertools.permutations(("cat", "apple", "apple")):
        assert not compose_scene(names).held_out, names
    assert compose_scene(["cat", "apple", "apple", "apple"]).held_out, "three apples are"
    assert SceneSpec((ObjectSpec("apple"), ObjectSpec("cat", count=2))).held_out
    assert not SceneSpec((ObjectSpec("apple", count=2), ObjectSpec("cat"))).held_out


@pytest.mark.parametrize("of", ["full", "hard", "rich"])
def test_no_training_scene_holds_a_held_out_combination_and_every_held_out_scene_does(of):
    def found(split, start, count):
        drawn = [draw_scene(seed, split, WORLDS[of]) for seed in range(start, start + count)]
        return [combinations([(placed.name, placed.colour) for placed in one.objects]) for one in drawn]

    assert not any(itertools.chain(found("train", 0, 3000), found("test", 0, 500)))
    held_out = found("held_out", 0, 150)
    assert all(held_out)
    kinds = {type(next(iter(some))) for some in held_out}
    assert kinds == {tuple, frozenset}, "colours, counts and pairs"
    assert {type(combination[0]) for some in held_out for combination in some if isinstance(combination, tuple)} == {
        int, str}
