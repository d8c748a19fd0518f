"""How alike a thing in an image and a kind of object are: place and size do not count, everything else does."""

import numpy as np
import pytest
import torch

from sdlearn.data import OBJECTS, UNTAUGHT, compose_scene
from sdlearn.data.similarity import SIDE, cut_out_foreground, pixel_similarity, reference_cutouts
from sdlearn.images import to_tensor


def scenes_of(name, count=4, ground="blue"):
    return to_tensor([compose_scene([name], background=ground, seed=seed).image for seed in range(count)])


@pytest.mark.parametrize("ground", ["blue", "green"])
@pytest.mark.parametrize("name", UNTAUGHT)
def test_real_images_are_most_like_their_own_kind(name, ground):
    names = [*OBJECTS, *UNTAUGHT]
    alike = pixel_similarity(cut_out_foreground(scenes_of(name, ground=ground)), reference_cutouts(names))
    assert alike.shape == (4, len(names))
    right = (alike.argmax(dim=1) == names.index(name)).float().mean()
    assert right >= 0.75


def test_place_and_size_do_not_count():
    found = cut_out_foreground(scenes_of("alien", 6))
    assert found.shape == (6, 4, SIDE, SIDE)
    alike = pixel_similarity(found, reference_cutouts(["alien", "robot"]))
    assert alike[:, 0].min() > 0.8 and alike[:, 1].max() < 0.7


def test_likeness_is_symmetric_and_one_for_the_same():
    some = reference_cutouts(["cat", "alien", "octopus"])
    alike = pixel_similarity(some, some)
    assert torch.allclose(alike.diagonal(), torch.ones(3)) and torch.allclose(alike, alike.T)
    assert (alike <= 1).all()


def test_an_empty_image_is_like_nothing():
    empty = torch.full((1, 3, 64, 64), 0.4)
    speck = empty.clone()
    speck[:, :, 10:13, 10:13] = -1.0
    for image in (empty, speck):
        found = cut_out_foreground(image)
        assert not found.any() and pixel_similarity(found, reference_cutouts(["cat"])).item() == 0


def test_two_things_are_one_odd_thing():
    [one] = scenes_of("alien", 1)
    two = to_tensor([np.asarray(compose_scene(["alien", "alien"], background="blue", seed=1).image)])
    alone, both = (pixel_similarity(cut_out_foreground(image), reference_cutouts(["alien"])).item()
                   for image in (one[None], two))
    assert alone > both + 0.2
