"""Scenes: the same bytes for a seed, captions that tell the truth, layouts that match the images."""

import hashlib
import itertools
import random
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.data import (
    BACKGROUNDS,
    COLOURS,
    CORE,
    FULL,
    OBJECTS,
    SIDE,
    UNTAUGHT,
    atlas,
    compose_scene,
    contact_sheet,
    draw_scene,
    draw_scenes,
    vocabulary,
    world,
)
from sdlearn.data.captions import (
    CAPTION_LABELS,
    RELATION_PHRASES,
    caption_and_hard_negative,
    label_caption,
    write_caption,
)
from sdlearn.data.world import RICH

seeds = st.integers(0, 2**40)
splits = st.sampled_from(("train", "test", "held_out"))


@pytest.fixture(scope="module")
def many():
    return list(draw_scenes(0, 1500))


def test_a_seed_gives_the_same_bytes():
    """The pin holds for the pinned versions of OpenMoji and resvg; on any machine."""
    digest = hashlib.sha256()
    for one in draw_scenes(0, 40):
        digest.update(one.image.tobytes() + one.caption.encode() + one.edge_map.tobytes() + one.depth_map.tobytes())
    assert digest.hexdigest() == "4aaea144ecac800326b47e6a0102e0709ea2d97e7c7c584b4a7b529b12fac727"


@settings(max_examples=60, deadline=None)
@given(seeds, splits)
def test_what_a_scene_says_of_itself(seed, split):
    one, again = draw_scene(seed, split), draw_scene(seed, split)
    assert one == again and np.array_equal(one.image, again.image)
    assert one.image.shape == (SIDE, SIDE, 3) and one.image.dtype == np.uint8
    assert one.edge_map.shape == one.depth_map.shape == (SIDE, SIDE)
    assert set(np.unique(one.edge_map)) <= {0, 255}
    assert one.masks.shape == (len(one.objects), SIDE, SIDE)
    assert (one.masks.sum(axis=0) <= 1).all(), "a pixel shows one object at most"
    assert one.held_out == (split == "held_out")
    for placed, mask in zip(one.objects, one.masks, strict=True):
        left, top, right, bottom = placed.box
        assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
        outside = mask.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        assert mask.any(), "every object can be seen"
        low, high = world.SIZES[placed.size]
        assert low <= max(right - left, bottom - top) <= high
    ground = ~one.masks.any(axis=0)
    assert (one.depth_map[ground] == 0).all() and (one.depth_map[~ground] > 0).all()


def test_the_nearer_object_covers_the_farther_one():
    for one in draw_scenes(0, 3000):
        for (i, a), (j, b) in itertools.permutations(enumerate(one.objects), 2):
            if a.depth < b.depth:
                left, top, right, bottom = a.box
                opaque = atlas.load_sprite(a.name, a.colour, max(right - left, bottom - top))[..., 3] > 127
                assert not (one.masks[j, top:bottom, left:right] & opaque).any()
                assert one.depth_map[one.masks[i]].min() > one.depth_map[one.masks[j]].max()


def test_relations_hold_in_the_image(many):
    pairs = [one for one in many if one.relation]
    assert {one.relation for one in pairs} == set(world.RELATIONS)
    for one in pairs:
        (ax, ay), (bx, by) = one.objects[0].centre, one.objects[1].centre
        along, across = (ax - bx, ay - by) if one.relation in ("left", "right") else (ay - by, ax - bx)
        assert abs(along) > abs(across), one.caption
        assert (along < 0) == (one.relation in ("left", "above")), one.caption


def test_captions_tell_the_truth(many):
    """Everything in a caption can be read back: counts, tints, sizes, nouns, relation, background."""
    for one in many:
        words = one.caption.split(" background")[0].split()
        nouns = re.sub(r"\b(on|against|with) an? \w+ background$", "", one.caption)
        for placed in one.objects:
            assert OBJECTS[placed.name].noun(one.count) in nouns
            if placed.colour:
                assert f"{placed.colour} {OBJECTS[placed.name].noun(one.count)}" in nouns
        if one.count > 1:
            assert words[0] in ("two", "2", "three", "3") or words[3] in ("two", "2", "three", "3")
        if "background" in one.caption:
            assert re.search(rf"an? {one.background} background$", one.caption)
        if one.relation and not re.search(r" and an? ", nouns):
            said = re.search(r"\b(left|right|above|over|below|under)\b", nouns)[0]
            assert {"over": "above", "under": "below"}.get(said, said) == one.relation
        said_sizes = set(re.findall(r"\b(small|medium|large)\b", nouns))
        assert said_sizes <= {placed.size for placed in one.objects} - {"medium"}
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", one.caption), one.caption


def test_the_world_is_as_large_as_it_says(many):
    assert 60 <= len(OBJECTS) <= 70 and len({kind.kind for kind in OBJECTS.values()}) >= 6
    assert len(BACKGROUNDS) == 8 and len(UNTAUGHT) == 8 and not set(UNTAUGHT) & set(OBJECTS)
    seen = {(placed.name, placed.colour) for one in many for placed in one.objects}
    assert {name for name, _ in seen} == set(OBJECTS)
    assert {colour for _, colour in seen} == {None, *COLOURS}
    assert {one.background for one in many} == set(BACKGROUNDS)
    assert {len(one.objects) for one in many} == {1, 2, 3} and {one.count for one in many} == {1, 2, 3}
    assert {placed.name for one in draw_scenes(0, 500, world=CORE) for placed in one.objects} == set(CORE.objects)


def test_every_held_out_combination_can_be_asked_for():
    """Each names objects and colours that exist; a typing error here would hold nothing out."""
    for colour, name in world.HELD_OUT_COLOURS:
        assert colour in COLOURS and OBJECTS[name].tintable
    assert all(count in world.COUNTS and name in OBJECTS for count, name in world.HELD_OUT_COUNTS)
    assert all(len(pair) == 2 and pair <= set(OBJECTS) for pair in world.HELD_OUT_PAIRS)


def test_the_vocabulary_is_what_captions_use():
    used = set()
    for one in itertools.chain(draw_scenes(0, 4000), draw_scenes(0, 500, "held_out")):
        used |= set(re.findall(r"[a-z0-9]+", one.caption))
    assert used == vocabulary()


def test_counts_are_held_out_for_each_kind_in_a_composition():
    def held_out(*names):
        return world.is_held_out(names, (None,) * len(names))
    assert held_out("cat", "cat") and held_out("cat", "cat", "key") and held_out("key", "cat", "cat", "lemon")
    assert not held_out("cat", "cat", "cat") and not held_out("cat", "key", "key")
    assert held_out("star", "star", "star", "key") and not held_out("star", "star", "key")
    assert world.is_held_out(("key", "key", "star"), (None, None, "green")), "a colour of one object among others"
    assert held_out("rocket", "key", "moon"), "a pair with another object beside it"


def test_rich_scenes_hold_compositions_that_fit():
    drawn = [draw_scene(seed, world=RICH) for seed in range(1500)]
    assert not any(one.held_out for one in drawn)
    composed = [one for one in drawn if len(one.groups) > 1 and len(one.objects) > 2]
    assert 0.14 < len(composed) / len(drawn) < 0.22
    assert {tuple(group.count for group in one.groups) for one in composed} == set(world.COMPOSITIONS)
    assert sum(any(group.colour for group in one.groups) for one in composed) > 0.4 * len(composed)
    for one in composed:
        assert sum(group.count for group in one.groups) == len(one.objects) <= 4 and one.relation is None
        assert len({group.name for group in one.groups}) == len(one.groups) and one.count == 1
        assert all(mask.sum() > 30 for mask in one.masks), "each object can be seen"
        for group in one.groups:
            alike = [o for o in one.objects if o.name == group.name]
            assert len({(o.colour, o.size, o.box[2] - o.box[0], o.box[3] - o.box[1]) for o in alike}) == 1
            assert len(alike) == group.count


def test_four_large_objects_fit_into_their_quarters(monkeypatch):
    """Where no free place is found, each object lies in a quarter of the image."""
    monkeypatch.setattr(sys.modules["sdlearn.data.scenes"], "_overlap", lambda a, b: 1.0)
    for seed in range(20):
        one = compose_scene(["car", "house", "cat", "cat"], seed=seed)
        corners = {(x < SIDE / 2, y < SIDE / 2) for x, y in (placed.centre for placed in one.objects)}
        assert len(corners) == 4 and one.masks.any(axis=(1, 2)).all()


def test_groups_are_the_objects_of_one_kind_and_tint():
    one = compose_scene(["car", "cat", "car"], colours=["red", None, "red"], seed=1)
    assert [(group.name, group.count, group.colour) for group in one.groups] == [("car", 2, "red"), ("cat", 1, None)]
    two = compose_scene(["car", "car"], colours=["red", "blue"])
    assert [(group.count, group.colour) for group in two.groups] == [(1, "red"), (1, "blue")] and two.count == 2


def test_train_and_test_are_different_scenes():
    assert not any(np.array_equal(draw_scene(s).image, draw_scene(s, "test").image) for s in range(30))


def test_a_tint_changes_the_fill_and_keeps_the_outline():
    for name, kind in OBJECTS.items():
        if kind.tintable:
            red, blue = (atlas.load_sprite(name, colour, 64).astype(int) for colour in ("red", "blue"))
            changed = (np.abs(red - blue) > 30).any(axis=-1)
            assert changed.mean() > 0.05, name
            assert np.array_equal(red[..., 3], blue[..., 3]), name
    with pytest.raises(ValueError, match="'cat' has no colour"):
        atlas.svg_text(OBJECTS["cat"], "red")


def test_an_atlas_from_disk_is_the_atlas_that_was_rendered(tmp_path, monkeypatch):
    some = ("cat", "star")
    monkeypatch.setenv("SDLEARN_CACHE", str(tmp_path))
    monkeypatch.setattr(atlas, "OBJECTS", {name: OBJECTS[name] for name in some})
    rendered, mapped = atlas.load_atlas.__wrapped__(), atlas.load_atlas.__wrapped__()
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]
    assert rendered.keys() == mapped.keys() and len(mapped) == len(atlas.SPRITE_SIZES) * (1 + 1 + len(COLOURS))
    for (name, colour, size), pixels in mapped.items():
        assert np.array_equal(pixels, atlas.render_sprite(OBJECTS[name], colour, size))
        assert max(pixels.shape[:2]) == size


def test_an_atlas_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDLEARN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(atlas, "OBJECTS", {"cat": OBJECTS["cat"]})
    assert atlas.load_atlas.__wrapped__()["cat", None, 28].shape[2] == 4


@pytest.mark.parametrize("name", UNTAUGHT)
def test_untaught_objects_can_be_drawn_and_are_in_no_caption(name, many):
    assert max(atlas.load_sprite(name, None, 60).shape[:2]) == 60
    assert not any(name in one.caption for one in many)


def test_the_hard_world_shows_two_tints_often_and_nothing_that_is_held_out():
    hard, core = world.WORLDS["hard"], CORE
    assert hard.objects == core.objects

    def share(of):
        drawn = [draw_scene(seed, world=of) for seed in range(1500)]
        assert not any(one.held_out for one in drawn)
        two = [one for one in drawn if len(one.objects) == 2 and one.count == 1 and all(o.colour for o in one.objects)]
        return len(two) / len(drawn), sum(one.count > 1 for one in drawn) / len(drawn)

    (tints, counts), (few_tints, few_counts) = share(hard), share(core)
    assert tints > 0.15 and tints > 5 * few_tints and counts > 1.4 * few_counts


def test_what_a_caption_says_can_be_answered():
    relations, counts = set(), set()
    for one in [*draw_scenes(0, 300), *draw_scenes(0, 100, world=replace(RICH, grammar=0.0))]:
        labels = label_caption(one.caption, one)
        relation, *rest = [values[i] for values, i in zip(CAPTION_LABELS, labels, strict=True)]
        numbers, names, tints = rest[:3], rest[3:6], rest[6:]
        said = next((of for of, ways in RELATION_PHRASES.items()
                     if any(f" {way} " in one.caption for way in ways)), None)
        assert relation == said and (relation is None or relation == one.relation)
        at = 0
        for count, name, tint in zip(numbers, names, tints, strict=True):   # in the order in which it names them
            if name is None:
                assert count is None and tint is None
                continue
            words = " ".join(filter(None, (tint, OBJECTS[name].noun(count))))
            assert (at := one.caption.find(words, at)) >= 0
            at += len(words)
            assert sum(o.name == name and o.colour == tint for o in one.objects) == count
        assert sum(count or 0 for count in numbers) == len(one.objects)
        relations.add(relation)
        counts.add(tuple(numbers))
    assert relations == {None, *RELATION_PHRASES}
    assert counts >= {(1, None, None), (2, None, None), (3, None, None), (2, 1, None), (1, 2, None), (1, 1, 1)}


@pytest.mark.parametrize("of", ["full", "hard", "rich", "classroom"])
def test_two_captions_differ_in_one_thing_and_one_of_them_is_true(of):
    changes = set()
    for one in draw_scenes(0, 400, world=world.WORLDS[of]):
        true, wrong = caption_and_hard_negative(one, random.Random(one.seed))
        assert (true, wrong) == caption_and_hard_negative(one, random.Random(one.seed)) and true != wrong
        said, other = (Counter(re.findall(r"[a-z0-9]+", text)) - Counter(a=9, an=9) for text in (true, wrong))
        names = [placed.name for placed in one.objects]
        assert all(any(word in true for word in (OBJECTS[name].noun(1), OBJECTS[name].noun(2))) for name in names)
        assert {placed.colour for placed in one.objects if placed.colour} <= set(said)
        gone, come = said - other, other - said
        if said == other:
            changes.add("whose tint")
        elif set(come) & set(COLOURS):
            changes.add("tint")
        elif {*come, *gone} & {"two", "three", "2", "3"}:
            changes.add("count")
        elif {*come, *gone} <= {"left", "right", "above", "below", "over", "under", "to", "on", "the", "of"}:
            changes.add("relation")
            assert gone.total() == come.total() == 1
        else:
            changes.add("object")
    assert changes == ({"tint", "object"} if of == "classroom" else
                       {"whose tint", "tint", "count", "relation", "object"})


def test_a_world_is_called_by_its_name():
    assert world.world_name(CORE) == "core" and world.world_name(world.World(single=1.0)) == "another"


def test_untaught_objects_are_in_scenes_that_ask_for_them():
    alone = compose_scene(["alien"], background="blue", seed=3)
    [placed] = alone.objects
    assert placed.name == "alien" and placed.kind == "face" and alone.masks[0].sum() > 100
    pair = compose_scene(["cat", "octopus"], relation="left", seed=1)
    assert pair.objects[0].centre[0] < pair.objects[1].centre[0]
    with pytest.raises(ValueError, match="'alien' cannot be red"):
        compose_scene(["alien"], colours=["red"])


def test_a_contact_sheet_has_room_for_all():
    drawn = list(draw_scenes(0, 5))
    sheet = contact_sheet([one.image for one in drawn], [one.caption for one in drawn], columns=3)
    assert sheet.width > 3 * SIDE and sheet.height > 2 * SIDE
    with pytest.raises(ValueError, match="one caption for each image"):
        contact_sheet([drawn[0].image], [])


def test_an_unknown_split_is_told():
    with pytest.raises(ValueError, match="no split 'validation'; choose one of train, test, held_out"):
        draw_scene(0, "validation")


def test_wording_varies_for_one_scene():
    one = draw_scene(11, world=FULL)
    assert len({write_caption(one, random.Random(i)) for i in range(50)}) > 5
