"""Peaks of heat maps are counted in the boxes that they lie in."""

import math
from dataclasses import replace

import pytest
import torch
from models import one_thread  # noqa: F401

from sdlearn.data import compose_scene
from sdlearn.evaluation.pointing import PointingResult, pointing_game, token_positions
from sdlearn.tokenizer import Tokenizer

CAPTION = "a smiling face to the left of an apple on a blue background"
TOKENIZER = Tokenizer.train([CAPTION] * 3, 560)
SIDE = 16


@pytest.fixture(scope="module")
def one():
    drawn = compose_scene(["smiling face", "apple"], relation="left", background="blue", seed=3)
    object.__setattr__(drawn, "caption", CAPTION)
    return drawn


def peaks(one, **at) -> torch.Tensor:
    """Maps (1, 77, h, w) that are 1 at the cell of a pixel (x, y), for each token of a word, and 0 elsewhere."""
    maps = torch.zeros(1, 77, SIDE, SIDE)
    for word, (x, y) in at.items():
        for place in token_positions(word.replace("_", " "), one.caption, TOKENIZER):
            maps[0, place, int(y * SIDE / one.side), int(x * SIDE / one.side)] = 1
    return maps


def test_peaks_in_their_own_boxes_and_beside_them(one):
    face, apple = (thing.centre for thing in one.objects)
    corner = (1, 1)
    right = pointing_game(peaks(one, smiling_face=face, apple=apple, background=corner), [one], TOKENIZER)
    swapped = pointing_game(peaks(one, smiling_face=apple, apple=face, background=face), [one], TOKENIZER)
    nowhere = pointing_game(peaks(one, smiling_face=corner, apple=corner, background=corner), [one], TOKENIZER)
    assert (right.hit_rate, right.other_object_rate, right.background_rate) == (1, 0, 1)
    assert (swapped.hit_rate, swapped.other_object_rate, swapped.background_rate) == (0, 1, 0)
    assert (nowhere.hit_rate, nowhere.other_object_rate, nowhere.background_rate) == (0, 0, 1)
    half = pointing_game(torch.cat([peaks(one, smiling_face=face, apple=apple, background=corner),
                               peaks(one, smiling_face=apple, apple=face, background=face)]), [one, one], TOKENIZER)
    assert half[:3] == (0.5, 0.5, 0.5)


def test_chance_is_the_share_of_the_image(one):
    found = pointing_game(torch.rand(1, 77, SIDE, SIDE), [one], TOKENIZER)
    areas = [(thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]) / one.side**2 for thing in one.objects]
    assert found.hit_rate_by_chance == pytest.approx(sum(areas) / 2)
    assert 1 - sum(areas) <= found.background_rate_by_chance + 1e-9 and found.background_rate_by_chance < 1 - max(areas)
    several = [pointing_game(torch.rand(1, 77, SIDE, SIDE, generator=torch.Generator().manual_seed(i)), [one],
                             TOKENIZER) for i in range(300)]
    assert abs(sum(one.hit_rate for one in several) / 300 - found.hit_rate_by_chance) < 0.08


def test_words_are_found_by_their_tokens():
    ids = TOKENIZER(CAPTION)[0].tolist()
    for word in ("smiling face", "apple", "background"):
        assert [ids[i] for i in token_positions(word, CAPTION, TOKENIZER)] == TOKENIZER.encode(word)
    with pytest.raises(ValueError, match="no 'cat' in 'a smiling"):
        token_positions("cat", CAPTION, TOKENIZER)


def test_what_cannot_be_counted_is_told(one):
    with pytest.raises(ValueError, match="maps of 2 captions for 1 scenes"):
        pointing_game(torch.rand(2, 77, 4, 4), [one], TOKENIZER)
    assert all(map(math.isnan, pointing_game(torch.rand(0, 77, 4, 4), [], TOKENIZER)))
    assert PointingResult._fields[0] == "hit_rate"


def moved(one, *boxes):
    return replace(one, objects=tuple(replace(thing, box=box) for thing, box in zip(one.objects, boxes, strict=True)))


def test_a_peak_where_boxes_overlap_is_in_the_objects_own_box_alone(one):
    both = moved(one, (10, 20, 60, 70), (50, 60, 110, 120))
    found = pointing_game(peaks(both, smiling_face=(54, 64), apple=(54, 64), background=(1, 1)), [both], TOKENIZER)
    assert (found.hit_rate, found.other_object_rate) == (1, 0)
    found = pointing_game(peaks(both, smiling_face=(80, 90), apple=(54, 64), background=(54, 64)), [both], TOKENIZER)
    assert (found.hit_rate, found.other_object_rate, found.background_rate) == (0.5, 0.5, 0)
    union = 50 * 50 + 60 * 60 - 10 * 10
    assert found.background_rate_by_chance == pytest.approx(1 - union / both.side**2)


def test_maps_need_not_be_square(one):
    """A peak's row is of the image's height, its column of its width."""
    apart = moved(one, (0, 96, 128, 128), (96, 0, 128, 64))
    for height, width in ((8, 16), (16, 8)):
        maps = torch.zeros(1, 77, height, width)
        for word, (x, y) in {"smiling face": (4, 120), "apple": (120, 4), "background": (4, 4)}.items():
            for place in token_positions(word, one.caption, TOKENIZER):
                maps[0, place, y * height // one.side, x * width // one.side] = 1
        assert pointing_game(maps, [apart], TOKENIZER)[:3] == (1, 0, 1)


def test_a_peak_lies_in_the_middle_of_its_cell(one):
    """Cells of 32 pixels: the second one's middle is at 48."""
    maps = torch.zeros(1, 77, 4, 4)
    maps[:, :, 1, 1] = 1
    for low, high, own in ((40, 56, 1), (32, 46, 0), (50, 64, 0)):
        both = moved(one, (low, low, high, high), (low, low, high, high))
        assert pointing_game(maps, [both], TOKENIZER).hit_rate == own


def test_the_maps_of_a_words_tokens_are_added(one):
    face, apple = (thing.centre for thing in one.objects)
    places = token_positions("smiling face", one.caption, TOKENIZER)
    assert len(places) > 1
    maps = peaks(one, smiling_face=face, apple=apple, background=(1, 1))
    strong = peaks(one, smiling_face=apple)[:, places[:1]]
    for first, wanted in ((1.5, 1),          # one token's peak lies elsewhere, and is not the sum's
                          (len(places) + 0.5, 0.5)):
        mixed = maps.clone()
        mixed[:, places[0]] += first * strong[:, 0]
        assert pointing_game(mixed, [one], TOKENIZER).hit_rate == wanted


def test_several_of_an_object_are_one_noun_and_any_of_them_is_its_own():
    two = replace(moved(compose_scene(["apple", "apple"], background="blue"), (0, 0, 40, 40), (80, 80, 120, 120)),
                  caption="two apples on a blue background")
    tokenizer = Tokenizer.train([two.caption] * 3, 560)
    for at, own in ((20, 1), (100, 1), (60, 0)):
        maps = torch.zeros(1, 77, SIDE, SIDE)
        maps[0, :, at * SIDE // two.side, at * SIDE // two.side] = 1
        found = pointing_game(maps, [two], tokenizer)
        assert (found.hit_rate, found.other_object_rate, found.background_rate) == (own, 0, 1 - own)
        assert found.hit_rate_by_chance == pytest.approx(2 * 40 * 40 / two.side**2)


def test_each_kind_of_object_is_named_by_its_own_count():
    """Two apples and a cat: the plural of the one, the singular of the other, and each counts once."""
    three = compose_scene(["apple", "apple", "cat"])
    drawn = replace(moved(three, (0, 0, 40, 40), (80, 80, 120, 120), (80, 0, 120, 40)),
                    caption="two apples and a cat")
    tokenizer = Tokenizer.train([drawn.caption] * 3, 560)
    maps = torch.zeros(1, 77, SIDE, SIDE)
    for word, (x, y) in {"apples": (100, 100), "cat": (20, 20)}.items():
        for place in token_positions(word, drawn.caption, tokenizer):
            maps[0, place, y * SIDE // drawn.side, x * SIDE // drawn.side] = 1
    found = pointing_game(maps, [drawn], tokenizer)
    assert (found.hit_rate, found.other_object_rate) == (0.5, 0.5)
    assert found.hit_rate_by_chance == pytest.approx((2 + 1) * 40 * 40 / 2 / drawn.side**2)


def test_captions_without_a_background_are_not_counted_for_it(one):
    face, apple = (thing.centre for thing in one.objects)
    without = replace(one, caption="a smiling face to the left of an apple")
    maps = peaks(one, smiling_face=face, apple=apple, background=face)
    alone = pointing_game(maps, [without], TOKENIZER)
    assert alone.hit_rate == 1 and math.isnan(alone.background_rate) and math.isnan(alone.background_rate_by_chance)
    both = pointing_game(torch.cat([maps, maps]), [without, one], TOKENIZER)
    assert both.background_rate == 0 and both.hit_rate == 1
