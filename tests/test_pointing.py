"""Peaks of heat maps are counted in the boxes that they lie in."""

import math

import pytest
import torch
from models import one_thread  # noqa: F401

from sdlearn.data import scene_of
from sdlearn.evaluation.pointing import Pointing, places_of, pointing
from sdlearn.tokenizer import Tokenizer

CAPTION = "a smiling face to the left of an apple on a blue background"
TOKENIZER = Tokenizer.train([CAPTION] * 3, 560)
SIDE = 16


@pytest.fixture(scope="module")
def one():
    drawn = scene_of(["smiling face", "apple"], relation="left", background="blue", seed=3)
    object.__setattr__(drawn, "caption", CAPTION)
    return drawn


def peaks(one, **at) -> torch.Tensor:
    """Maps (1, 77, h, w) that are 1 at the cell of a pixel (x, y), for each token of a word, and 0 elsewhere."""
    maps = torch.zeros(1, 77, SIDE, SIDE)
    for word, (x, y) in at.items():
        for place in places_of(word.replace("_", " "), one.caption, TOKENIZER):
            maps[0, place, int(y * SIDE / one.side), int(x * SIDE / one.side)] = 1
    return maps


def test_peaks_in_their_own_boxes_and_beside_them(one):
    face, apple = (thing.centre for thing in one.objects)
    corner = (1, 1)
    right = pointing(peaks(one, smiling_face=face, apple=apple, background=corner), [one], TOKENIZER)
    swapped = pointing(peaks(one, smiling_face=apple, apple=face, background=face), [one], TOKENIZER)
    nowhere = pointing(peaks(one, smiling_face=corner, apple=corner, background=corner), [one], TOKENIZER)
    assert (right.own, right.other, right.ground) == (1, 0, 1)
    assert (swapped.own, swapped.other, swapped.ground) == (0, 1, 0)
    assert (nowhere.own, nowhere.other, nowhere.ground) == (0, 0, 1)
    half = pointing(torch.cat([peaks(one, smiling_face=face, apple=apple, background=corner),
                               peaks(one, smiling_face=apple, apple=face, background=face)]), [one, one], TOKENIZER)
    assert half[:3] == (0.5, 0.5, 0.5)


def test_chance_is_the_share_of_the_picture(one):
    found = pointing(torch.rand(1, 77, SIDE, SIDE), [one], TOKENIZER)
    areas = [(thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]) / one.side**2 for thing in one.objects]
    assert found.own_by_chance == pytest.approx(sum(areas) / 2)
    assert 1 - sum(areas) <= found.ground_by_chance + 1e-9 and found.ground_by_chance < 1 - max(areas)
    several = [pointing(torch.rand(1, 77, SIDE, SIDE, generator=torch.Generator().manual_seed(i)), [one], TOKENIZER)
               for i in range(300)]
    assert abs(sum(one.own for one in several) / 300 - found.own_by_chance) < 0.08


def test_words_are_found_by_their_tokens():
    ids = TOKENIZER(CAPTION)[0].tolist()
    for word in ("smiling face", "apple", "background"):
        assert [ids[i] for i in places_of(word, CAPTION, TOKENIZER)] == TOKENIZER.encode(word)
    with pytest.raises(ValueError, match="no 'cat' in 'a smiling"):
        places_of("cat", CAPTION, TOKENIZER)


def test_what_cannot_be_counted_is_told(one):
    with pytest.raises(ValueError, match="maps of 2 captions for 1 scenes"):
        pointing(torch.rand(2, 77, 4, 4), [one], TOKENIZER)
    assert all(map(math.isnan, pointing(torch.rand(0, 77, 4, 4), [], TOKENIZER)))
    assert Pointing._fields[0] == "own"
