"""Exercises of notebook 08: masks of the latent, pasting the original back."""

import torch
import torch.nn.functional as F

from ...inpaint import latent_mask, paste, soft_mask
from ..testing import Wrong, randn, require, require_shape
from . import lesson

# --- 8.1 ----------------------------------------------------------------------------------------------

cells = lesson.exercise(
    1, latent_mask, grade="guided", minutes=5,
    asks="Write `latent_mask(mask, factor)`: a mask of pixels (B, 1, H, W) at the latent's size (B, 1, H/factor, "
         "W/factor); each cell takes the value of its upper left pixel. Raise ValueError for sides that are no "
         "multiples of factor, and where a mask has no cell left.",
    hints=["Every factor-th pixel of every factor-th row, beginning with the first: that is a slice with a step.",
           "`mask[:, :, ::factor, ::factor]`; or `F.interpolate(mask, size=..., mode=\"nearest\")`, which takes the "
           "same pixels.",
           "No cell left: `cells.flatten(1).any(dim=1)` says for each mask of the batch whether one is. Two `raise "
           "ValueError(...)`, one before the slice and one after it."])

MASKS = (F.avg_pool2d(randn(2, 1, 24, 32, seed=5), 5, 1, 2) > 0.02).float()                # blotches


@cells.test("shape")
def one_mask_cell_for_each_square(latent_mask):
    require_shape(latent_mask(MASKS, 8), (2, 1, 3, 4), "With factor 8, the mask of the latent")


@cells.test("value")
def the_upper_left_pixel(latent_mask):
    latent_mask.agrees(lambda answer: answer(MASKS, 8).float(), what="The mask of the latent")


@cells.test("value")
def other_factors(latent_mask):
    latent_mask.agrees(lambda answer: [answer(MASKS, factor).float() for factor in (4, 2)],
                       what="With factors 4 and 2, the mask")


@cells.test("edge case")
def thin_masks_are_refused(latent_mask):
    thin = torch.zeros(1, 1, 16, 16)
    thin[:, :, 9:12] = 1
    refuses(lambda: latent_mask(thin, 8), "A line of 3 pixels that runs between two rows of upper left pixels leaves "
                                          "no cell")
    refuses(lambda: latent_mask(torch.cat([torch.ones_like(thin), thin]), 8),
            "The second mask of a batch has no cell left, and the first has")
    refuses(lambda: latent_mask(torch.ones(1, 1, 12, 16), 8), "12 rows of pixels are no multiple of 8")


def refuses(call, said: str):
    try:
        call()
    except ValueError:
        return
    raise Wrong(f"{said}: that must raise ValueError")


for diagnosis, answer in [
    ("this is 1 where *most* of a cell's pixels are: Stable Diffusion asks one pixel only, the upper left",
     lambda mask, factor: (F.avg_pool2d(mask, factor) >= 0.5).float()),
    ("this is the share of a cell that is masked: a mask is 0 or 1",
     lambda mask, factor: F.avg_pool2d(mask, factor)),
    ("this is 1 where *any* pixel of a cell is: a fine idea, but not what the models were trained with",
     lambda mask, factor: F.max_pool2d(mask, factor)),
    ("this is 1 where *all* pixels of a cell are: one pixel decides, the upper left",
     lambda mask, factor: -F.max_pool2d(-mask, factor)),
    ("this is the pixel in the middle of each cell: it is the upper left one",
     lambda mask, factor: mask[:, :, factor // 2::factor, factor // 2::factor]),
    ("this is the lower right pixel of each cell: it is the upper left one",
     lambda mask, factor: mask[:, :, factor - 1::factor, factor - 1::factor]),
    ("this interpolates between pixels: take one of them",
     lambda mask, factor: F.interpolate(mask, scale_factor=1 / factor, mode="bilinear")),
]:
    cells.mistake(diagnosis)(answer)


# --- 8.2 ----------------------------------------------------------------------------------------------

pasting = lesson.exercise(
    2, paste, grade="guided", minutes=5, also=[soft_mask],
    asks="Write `paste(original, generated, mask, *, seam=0)`: the original where the mask is 0, the generated image "
         "where it is 1. Between them it goes over by `soft_mask(mask, seam)`, which is 1 within the mask and falls to "
         "0 over `seam` pixels outside of it.",
    beyond="The package's function also checks that the sizes fit.",
    hints=["Call the soft mask s. Where s is 1 it is all generated, where s is 0 all original, and in between?",
           "(1 - s) original + s generated.",
           "`soft_mask(mask, seam)` with seam 0 is the mask itself. It is in `sdlearn.inpaint`."])

ORIGINAL, GENERATED, BOX = randn(2, 3, 12, 16, seed=2), randn(2, 3, 12, 16, seed=3), torch.zeros(2, 1, 12, 16)
BOX[0, :, 3:8, 4:11] = BOX[1, :, 5:9, 2:7] = 1


@pasting.test("shape")
def an_image(paste):
    require_shape(paste(ORIGINAL, GENERATED, BOX), ORIGINAL.shape)


@pasting.test("value")
def a_hard_edge(paste):
    paste.agrees(lambda answer: answer(ORIGINAL, GENERATED, BOX), what="The image")


@pasting.test("value")
def a_soft_edge(paste):
    paste.agrees(lambda answer: answer(ORIGINAL, GENERATED, BOX, seam=2), what="With a seam of 2, the image")


@pasting.test("edge case")
def bit_for_bit(paste):
    known = (BOX == 0).expand_as(ORIGINAL)
    require(torch.equal(paste(ORIGINAL, GENERATED, BOX)[known], ORIGINAL[known]),
            "Where the mask is 0 the pixels are not the original's bit for bit: something is added and taken away "
            "again, which rounds")
    far = (soft_mask(BOX, 3) == 0).expand_as(ORIGINAL)
    require(torch.equal(paste(ORIGINAL, GENERATED, BOX, seam=3)[far], ORIGINAL[far]),
            "Outside of the seam the pixels are not the original's bit for bit: something is added and taken away "
            "again, which rounds")


def between(weight):
    def paste(original, generated, mask, seam=0):
        share = weight(mask, seam)
        return original * (1 - share) + generated * share
    return paste


for diagnosis, answer in [
    ("original and generated have changed places: 1 in the mask is what was generated",
     between(lambda mask, seam: 1 - soft_mask(mask, seam))),
    ("`seam` is not used: the edge is a hard one", between(lambda mask, seam: mask)),
    ("outside of the mask there is nothing: the original goes there",
     lambda original, generated, mask, seam=0: generated * soft_mask(mask, seam)),
    ("both are added up: the original must go where the generated one comes",
     lambda original, generated, mask, seam=0: original + generated * soft_mask(mask, seam)),
    ("the mask grows by the seam and stays hard: it must fall step by step",
     between(lambda mask, seam: (soft_mask(mask, seam) > 0).float())),
    ("the mask is blurred, so the original shines through within its edge: it must stay 1 inside",
     between(lambda mask, seam: F.avg_pool2d(mask, 2 * seam + 1, 1, seam))),
]:
    pasting.mistake(diagnosis)(answer)
