"""How many separate things stand on a plain ground: a count that needs no detector, and works at every size.

B  images        h, w  blocks of an image
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import as_pixels

BLOCK = 4               # pixels of a block
JUMP = 0.25             # from the ground, of values in [-1, 1], root mean square over the colours
LEAST = 8               # blocks of a region that counts: two latent cells of a model of factor 8


def region_areas(images, *, block: int = BLOCK, jump: float = JUMP, least: int = LEAST) -> list[list[int]]:
    """Of each image the areas, in pixels, of the separate regions that differ from its ground, the largest first.

    The ground is each colour's median, so it has to fill more than half of the image. Blocks that touch, corners
    included, are one region: things that touch count once. Images as in `metrics`, of one size; ValueError for
    others. block, jump, least: see above.
    """
    blocks = F.avg_pool2d(as_pixels(images).clamp(-1, 1), block)                      # (B, 3, h, w)
    ground = blocks.flatten(2).median(dim=2).values[..., None, None]                  # (B, 3, 1, 1)
    differs = (blocks - ground).square().mean(dim=1).sqrt() > jump                    # (B, h, w)
    found = []
    for labels in connected(differs):
        _, counts = labels[labels > 0].unique(return_counts=True)
        found.append(sorted((count * block * block for count in counts.tolist() if count >= least), reverse=True))
    return found


def connected(mask: Tensor) -> Tensor:
    """Numbers (B, h, w) for the cells of a mask, equal where they hang together, corners included; 0 outside of it.

    Each cell starts with a number of its own, and takes the largest of its neighbours' until nothing changes.
    """
    cells = mask[0].numel()
    labels = torch.arange(1, cells + 1, dtype=torch.float64, device=mask.device).view(1, *mask.shape[1:]) * mask
    while True:
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread
