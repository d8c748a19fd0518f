"""Decoding a large latent tile by tile, so that memory is that of a tile.

B  batch        Z, h, w  channels, rows and columns of the latent        f  pixels of a cell
"""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover 0...length, `overlap` or more of each shared with the next; the last ends there."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cells cannot share {overlap} with the next: give 0 to {tile - 1}")
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tile_weights(length: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """Weights of a tile along one axis, (length,): 1, and next to a neighbouring tile rising from nearly 0 to 1 over
    `overlap` pixels. Of two tiles that share just these the weights add up to 1."""
    weights = torch.ones(length)
    if overlap:
        ramp = (torch.arange(overlap) + 0.5) / overlap
        if not first:
            weights[:overlap] = ramp
        if not last:
            weights[-overlap:] = torch.minimum(weights[-overlap:], ramp.flip(0))
    return weights


def decode_tiled(decode: Callable[[Tensor], Tensor], latent: Tensor, *, factor: int, tile: int = 64,
                 overlap: int = 16) -> Tensor:
    """Latents (B, Z, h, w) to pixels (B, 3, f*h, f*w), `decode` called on tiles of `tile` x `tile` cells at most.

    decode: such as `vae.to_pixels`. factor: f. overlap: cells that neighbours share; there they are mixed with weights
    that rise and fall linearly. Not what the whole gives: a tile's norms and attention see only the tile. ValueError
    for an overlap that is not below `tile`.
    """
    batch, _, rows, columns = latent.shape
    total = torch.zeros(batch, 3, rows * factor, columns * factor, device=latent.device)
    weight = torch.zeros(rows * factor, columns * factor, device=latent.device)
    for top in tile_starts(rows, tile, overlap):
        for left in tile_starts(columns, tile, overlap):
            part = decode(latent[:, :, top:top + tile, left:left + tile]).float()               # (B, 3, H, W)
            height, width = part.shape[2:]
            down = tile_weights(height, overlap * factor, first=top == 0, last=top + tile >= rows)
            across = tile_weights(width, overlap * factor, first=left == 0, last=left + tile >= columns)
            share = (down[:, None] * across).to(latent.device)                                  # (H, W)
            here = slice(top * factor, top * factor + height), slice(left * factor, left * factor + width)
            total[:, :, *here] += share * part
            weight[here] += share
    return total / weight
