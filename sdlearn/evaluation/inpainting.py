"""What an inpainting did: to the known pixels, along the border of the mask, and inside of it.

B  images    H, W  pixels
"""

from collections.abc import Sequence

from torch import Tensor

from ..images import psnr
from .judge import Detection, Detections


def known_psnr(pixels: Tensor, originals: Tensor, mask: Tensor) -> Tensor:
    """PSNR in dB of the pixels where the mask is 0, of each image, (B,); infinite where they are equal.

    pixels, originals (B, 3, H, W) in [-1, 1], peak 2; mask (B, 1, H, W), 1 = repainted.
    """
    return psnr(pixels, originals, where=1 - mask)


def seam_difference(pixels: Tensor, mask: Tensor) -> Tensor:
    """How far apart neighbours are that the mask's border separates: the mean of |inside - outside|, (B,).

    Pixels (B, 3, H, W), mask (B, 1, H, W). NaN where a mask has no border within the image.
    """
    total = count = 0
    for dim in (2, 3):
        crossing = mask.diff(dim=dim) != 0                                           # (B, 1, H', W')
        total = total + (pixels.diff(dim=dim).abs().mean(1, keepdim=True) * crossing).sum((1, 2, 3))
        count = count + crossing.sum((1, 2, 3))
    return total / count


def is_centre_in_mask(one: Detection, mask: Tensor) -> bool:
    """Whether the middle of what was found lies within a mask (1, H, W)."""
    rows, columns = mask.shape[-2:]
    x, y = one.centre
    column, row = (min(max(int(at), 0), most - 1) for at, most in ((x, columns), (y, rows)))
    return bool(mask[0, row, column] > 0)


def share_found_in_mask(seen: Sequence[Detections], mask: Tensor, names: Sequence[str]) -> float:
    """The share of images in which the judge has found the object of that name with its middle in the mask.

    seen: what `Judge.detect` returns; mask (B, 1, H, W); names: one for each image.
    """
    return sum(any(one.name == name and is_centre_in_mask(one, hole) for one in found.objects)
               for found, hole, name in zip(seen, mask, names, strict=True)) / len(names)
