"""Measures of an inpainting: known pixels, the border of the mask, what stands inside of it."""

import math

import pytest
import torch

from sdlearn.evaluation.inpainting import known_psnr, seam_difference, share_found_in_mask
from sdlearn.evaluation.judge import Detection, Detections
from sdlearn.images import psnr

MASK = torch.zeros(2, 1, 12, 16)
MASK[0, :, 3:9, 4:12] = MASK[1, :, :6] = 1
IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 16).reshape(2, 3, 12, 16)


def test_only_known_pixels_count():
    changed = torch.where(MASK > 0, torch.randn(IMAGES.shape), IMAGES)
    assert known_psnr(changed, IMAGES, MASK).tolist() == [math.inf, math.inf]
    assert known_psnr(changed + 0.1, IMAGES, MASK) == pytest.approx([26.02, 26.02], abs=0.01)
    none = torch.zeros_like(MASK)
    assert torch.allclose(known_psnr(changed, IMAGES, none), psnr(changed, IMAGES))


def test_a_seam_is_the_jump_across_the_border_and_nothing_else():
    flat = torch.zeros_like(IMAGES)
    assert seam_difference(flat, MASK).tolist() == [0, 0]
    assert seam_difference(flat + 0.5 * MASK, MASK) == pytest.approx([0.5, 0.5])
    inner = flat.clone()
    inner[:, :, 5:7, 7:9] = 1                           # an edge, but not on the border
    assert seam_difference(inner, MASK)[0] == 0
    half = flat + torch.cat([MASK[:1], 0 * MASK[:1]])
    half[0, :, 3] = 0                                   # the uppermost row of the mask fits its surroundings
    assert 0.5 < seam_difference(half, MASK)[0] < 1
    assert seam_difference(flat, torch.ones_like(MASK)).isnan().all()


def test_what_is_found_counts_where_its_middle_lies_within():
    def one(name, box):
        return Detection(name, box, 0.9, None)
    seen = [Detections((one("cat", (4, 3, 12, 9)), one("dog", (0, 0, 4, 4))), "white"), Detections((), "white")]
    assert share_found_in_mask(seen, MASK, ["cat", "cat"]) == 0.5
    assert share_found_in_mask(seen, MASK, ["dog", "dog"]) == 0 == share_found_in_mask(seen, MASK, ["bird", "cat"])
    outside = Detections((one("cat", (-40, -20, -20, -10)),), "white")       # a box may reach beyond the image
    assert share_found_in_mask([outside, outside], MASK, ["cat", "cat"]) == 0.5


def test_a_middle_is_looked_up_by_its_row_and_its_column():
    """A hole in the upper right corner: what is upper right lies in it, what is lower left does not."""
    hole = torch.zeros(1, 1, 16, 16)
    hole[:, :, :6, 9:] = 1
    right, left = Detection("cat", (10, 1, 14, 5), 0.9, None), Detection("cat", (1, 10, 5, 14), 0.9, None)
    assert share_found_in_mask([Detections((right,), "white")], hole, ["cat"]) == 1
    assert share_found_in_mask([Detections((left,), "white")], hole, ["cat"]) == 0
    wide = torch.zeros(1, 1, 8, 32)
    wide[:, :, :, 20:] = 1
    found = Detections((Detection("cat", (22, 1, 30, 7), 0.9, None),), "white")
    assert share_found_in_mask([found], wide, ["cat"]) == 1


def test_the_middle_decides_and_not_how_much_of_a_box_is_in_the_hole():
    hole = torch.zeros(1, 1, 32, 32)
    hole[:, :, 10:20, 10:20] = 1

    def share(*boxes):
        found = Detections(tuple(Detection("cat", box, 0.9, None) for box in boxes), "white")
        return share_found_in_mask([found], hole, ["cat"])

    assert share((0, 0, 30, 30)) == 1 and share((0, 10, 19, 20)) == 0 and share((10, 0, 20, 19)) == 0
    assert share((9, 9, 11, 11)) == 1 and share((18, 18, 20, 20)) == 1 and share((19, 19, 21, 21)) == 0
    assert share((0, 0, 4, 4), (12, 12, 18, 18)) == 1, "one of several is enough"


def test_each_image_has_its_own_hole_and_its_own_object():
    holes = torch.zeros(3, 1, 16, 16)
    holes[0, :, :8], holes[1, :, 8:], holes[2] = 1, 1, 1
    up = Detections((Detection("cat", (4, 0, 8, 4), 0.9, None),), "white")
    assert share_found_in_mask([up, up, up], holes, ["cat", "cat", "dog"]) == pytest.approx(1 / 3)
    assert share_found_in_mask([up, up, up], holes, ["cat", "dog", "cat"]) == pytest.approx(2 / 3)


def test_a_seam_is_a_mean_over_both_directions_of_its_border():
    """A corner of 4 rows and 2 columns has a border of 2 + 4 pairs of neighbours."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, :4, :2] = 1
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[:, 0, 4, :2] = 0.9                           # below the hole, in one of three colours
    assert seam_difference(pixels, mask) == pytest.approx([0.3 * 2 / 6])
    pixels[:, :, :4, 2] = 0.6                           # right of it, in all
    assert seam_difference(pixels, mask) == pytest.approx([(0.3 * 2 + 0.6 * 4) / 6])
