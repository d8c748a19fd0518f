"""How much a thing in an image looks like a kind of object: by its pixels, with no network.

B  images     R  references       H, W  pixels        S  side of a cut-out

An image encoder sees what it was trained to tell apart. Of a thing that it was never shown it knows little, so it is no
judge of whether an image shows just that thing. Here a thing is cut out of its plain ground, brought to one size and
compared colour by colour, so that neither its place nor its size counts:

    pixel_similarity(cut_out_foreground(pixels), reference_cutouts(["alien", "robot"]))        # (B, 2)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .atlas import load_sprite

SIDE = 24               # pixels of a cut-out
JUMP = 0.2              # from the ground, of values in [-1, 1], root mean square over the colours
LEAST = 30              # pixels of a thing: fewer are specks


def cut_out_foreground(pixels: Tensor, *, jump: float = JUMP) -> Tensor:
    """What stands on the plain ground of each image, (B, 4, S, S): colours in [-1, 1] and how much is covered.

    pixels: (B, 3, H, W) in [-1, 1]. The ground is each colour's median, so it has to fill more than half of the
    image. All that differs from it is cut out together: two things are one odd thing. Nothing is all zeros.
    """
    found = []
    for image in pixels.float().clamp(-1, 1):
        ground = image.flatten(1).median(dim=1).values[:, None, None]               # (3, 1, 1)
        differs = (image - ground).square().mean(dim=0).sqrt() > jump               # (H, W)
        near = F.avg_pool2d(differs[None, None].float(), 3, stride=1, padding=1)[0, 0]
        found.append(_square(image, near > 0.5))                                    # without single pixels
    return torch.stack(found)


def reference_cutouts(names: Sequence[str], *, size: int = 72) -> Tensor:
    """Cut-outs of kinds of objects as they are drawn, in their natural colours: (R, 4, S, S)."""
    found = []
    for name in names:
        drawn = torch.from_numpy(load_sprite(name, None, size).copy()).permute(2, 0, 1).float()    # premultiplied
        found.append(_square(drawn[:3] / 127.5 - 1, drawn[3] > 127))
    return torch.stack(found)


def pixel_similarity(things: Tensor, references: Tensor) -> Tensor:
    """How alike cut-outs (B, 4, S, S) and (R, 4, S, S) are, (B, R): 1 for the same, about 0 for what shares nothing.

    1 - |a - b|^2 / (|a|^2 + |b|^2)
    """
    a, b = things.flatten(1).double(), references.flatten(1).double()
    sizes = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)                    # (B, R)
    return (2 * a @ b.T / sizes.clamp(min=1e-9)).float()


def _square(colours: Tensor, mask: Tensor) -> Tensor:
    """The masked part of (3, H, W) in a square of its own, and the mask beside it: (4, S, S)."""
    rows, columns = torch.where(mask)
    if len(rows) < LEAST:
        return torch.zeros(4, SIDE, SIDE, device=colours.device)
    both = torch.cat([colours * mask, mask[None].to(colours)])                        # (4, H, W)
    both = both[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    height, width = both.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    both = F.pad(both, (left, side - width - left, top, side - height - top))
    return F.interpolate(both[None], (SIDE, SIDE), mode="area")[0]
