"""Regions: what stands apart on a plain ground is counted, at any size."""

import numpy as np
import pytest
import torch

from sdlearn.evaluation.regions import connected, regions


def picture(*boxes, size=128, ground=(160, 210, 250), colour=(220, 30, 30)):
    image = np.full((size, size, 3), ground, np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = colour
    return image


def test_separate_things_are_counted_the_largest_first():
    [found] = regions([picture((8, 8, 40, 40), (64, 64, 80, 84), (96, 8, 112, 24))])
    assert found == [32 * 32, 20 * 16, 16 * 16]


def test_what_touches_is_one_and_what_is_tiny_is_none():
    diagonal = picture((0, 0, 32, 32), (32, 32, 64, 64))
    specks = picture((8, 8, 12, 20), (100, 100, 116, 116))
    assert [len(one) for one in regions([diagonal, specks, picture()])] == [1, 1, 0]


def test_a_ground_need_not_be_even():
    rng = np.random.default_rng(0)
    noisy = np.clip(picture((30, 30, 90, 90)) + rng.normal(0, 8, (128, 128, 3)), 0, 255).astype(np.uint8)
    assert [len(one) for one in regions([noisy])] == [1]


def test_pixels_and_larger_pictures_do_as_well():
    large = picture((16, 16, 80, 80), (128, 128, 160, 168), size=256)
    pixels = torch.from_numpy(large).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert regions(pixels) == regions([large]) == [[64 * 64, 32 * 40]]
    with pytest.raises(ValueError):
        regions([])


def test_connected_follows_a_winding_way():
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]])[None]
    labels = connected(mask.bool())[0]
    assert len(labels.unique()) == 4 and labels[0, 0] == labels[0, 4] and (labels > 0).eq(mask[0].bool()).all()
