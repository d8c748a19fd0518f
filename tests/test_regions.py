"""Regions: what stands apart on a plain ground is counted, at any size."""

import numpy as np
import pytest
import torch

from sdlearn.evaluation.regions import connected, region_areas


def image(*boxes, size=128, ground=(160, 210, 250), colour=(220, 30, 30)):
    image = np.full((size, size, 3), ground, np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = colour
    return image


def test_separate_things_are_counted_the_largest_first():
    [found] = region_areas([image((8, 8, 40, 40), (64, 64, 80, 84), (96, 8, 112, 24))])
    assert found == [32 * 32, 20 * 16, 16 * 16]


def test_what_touches_is_one_and_what_is_tiny_is_none():
    diagonal = image((0, 0, 32, 32), (32, 32, 64, 64))
    specks = image((8, 8, 12, 20), (100, 100, 116, 116))
    assert [len(one) for one in region_areas([diagonal, specks, image()])] == [1, 1, 0]


def test_a_ground_need_not_be_even():
    rng = np.random.default_rng(0)
    noisy = np.clip(image((30, 30, 90, 90)) + rng.normal(0, 8, (128, 128, 3)), 0, 255).astype(np.uint8)
    assert [len(one) for one in region_areas([noisy])] == [1]


def test_pixels_and_larger_images_do_as_well():
    large = image((16, 16, 80, 80), (128, 128, 160, 168), size=256)
    pixels = torch.from_numpy(large).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert region_areas(pixels) == region_areas([large]) == [[64 * 64, 32 * 40]]
    with pytest.raises(ValueError):
        region_areas([])


def test_connected_follows_a_winding_way():
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]])[None]
    labels = connected(mask.bool())[0]
    assert len(labels.unique()) == 4 and labels[0, 0] == labels[0, 4] and (labels > 0).eq(mask[0].bool()).all()


def test_a_region_counts_from_eight_blocks_on():
    """Blocks of 4 x 4 pixels: 8 x 16 pixels are eight of them, seven in a row are 4 x 28 pixels."""
    assert region_areas([image((16, 16, 24, 32))]) == region_areas([image((16, 16, 32, 24))]) == [[8 * 16]]
    assert region_areas([image((16, 16, 44, 20))]) == region_areas([image((16, 16, 20, 44))]) == [[]]
    assert region_areas([image((16, 16, 44, 20))], least=7) == [[4 * 28]]
    assert region_areas([image((16, 16, 24, 32))], least=9) == [[]]
    assert region_areas([image((16, 16, 24, 32), (64, 64, 80, 80))], least=16) == [[16 * 16]]


def test_a_region_differs_from_its_ground_by_a_quarter():
    """Root mean square over the colours, of values in [-1, 1]: a step of one level is 2 / 255."""
    def found(*by, **options):
        return region_areas([image((16, 16, 48, 48), ground=(100, 100, 100), colour=tuple(100 + one for one in by))],
                       **options)

    assert found(33, 33, 33) == found(-33, -33, -33) == found(57, 0, 0) == [[32 * 32]]      # 0.259, 0.258
    assert found(30, 30, 30) == found(-30, 30, -30) == found(0, 52, 0) == [[]]              # 0.235, 0.235
    assert found(30, 30, 30, jump=0.2) == [[32 * 32]] and found(33, 33, 33, jump=0.3) == [[]]


def test_blocks_are_of_the_size_asked_for():
    small = image((16, 16, 24, 24))
    assert region_areas([small]) == [[]] and region_areas([small], block=2) == [[8 * 8]]
    assert region_areas([small], block=8, least=1) == [[8 * 8]]


def test_the_ground_is_each_images_own():
    """The colour that fills most of the image, whichever it is."""
    light = image((0, 0, 128, 40), ground=(250, 250, 250), colour=(20, 20, 20))
    dark = image((0, 0, 128, 40), ground=(20, 20, 20), colour=(250, 250, 250))
    assert region_areas([light, dark]) == [[128 * 40], [128 * 40]]
    most = image((0, 0, 128, 100), ground=(250, 250, 250), colour=(20, 20, 20))
    assert region_areas([most]) == [[128 * 28]]


def test_regions_of_images_that_are_not_square():
    image = np.full((64, 128, 3), 200, np.uint8)
    image[8:24, 96:120] = image[40:56, 8:40] = 20
    assert region_areas([image, image.copy()]) == [[16 * 32, 16 * 24]] * 2
    assert region_areas([image.transpose(1, 0, 2)]) == [[16 * 32, 16 * 24]]
