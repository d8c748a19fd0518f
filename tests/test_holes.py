"""Measures of an inpainting: known pixels, the border of the mask, what stands inside of it."""

import math

import pytest
import torch

from sdlearn.evaluation.holes import found_inside, known_psnr, seam_jump
from sdlearn.evaluation.judge import Detection, Seen
from sdlearn.pictures import psnr

MASK = torch.zeros(2, 1, 12, 16)
MASK[0, :, 3:9, 4:12] = MASK[1, :, :6] = 1
PICTURES = torch.linspace(-1, 1, 2 * 3 * 12 * 16).reshape(2, 3, 12, 16)


def test_only_known_pixels_count():
    changed = torch.where(MASK > 0, torch.randn(PICTURES.shape), PICTURES)
    assert known_psnr(changed, PICTURES, MASK).tolist() == [math.inf, math.inf]
    assert known_psnr(changed + 0.1, PICTURES, MASK) == pytest.approx([26.02, 26.02], abs=0.01)
    none = torch.zeros_like(MASK)
    assert torch.allclose(known_psnr(changed, PICTURES, none), psnr(changed, PICTURES))


def test_a_seam_is_the_jump_across_the_border_and_nothing_else():
    flat = torch.zeros_like(PICTURES)
    assert seam_jump(flat, MASK).tolist() == [0, 0]
    assert seam_jump(flat + 0.5 * MASK, MASK) == pytest.approx([0.5, 0.5])
    inner = flat.clone()
    inner[:, :, 5:7, 7:9] = 1                           # an edge, but not on the border
    assert seam_jump(inner, MASK)[0] == 0
    half = flat + torch.cat([MASK[:1], 0 * MASK[:1]])
    half[0, :, 3] = 0                                   # the uppermost row of the mask fits its surroundings
    assert 0.5 < seam_jump(half, MASK)[0] < 1
    assert seam_jump(flat, torch.ones_like(MASK)).isnan().all()


def test_what_is_found_counts_where_its_middle_lies_within():
    def one(name, box):
        return Detection(name, box, 0.9, None)
    seen = [Seen((one("cat", (4, 3, 12, 9)), one("dog", (0, 0, 4, 4))), "white"), Seen((), "white")]
    assert found_inside(seen, MASK, ["cat", "cat"]) == 0.5
    assert found_inside(seen, MASK, ["dog", "dog"]) == 0 == found_inside(seen, MASK, ["bird", "cat"])
    outside = Seen((one("cat", (-40, -20, -20, -10)),), "white")       # a box may reach beyond the picture
    assert found_inside([outside, outside], MASK, ["cat", "cat"]) == 0.5
