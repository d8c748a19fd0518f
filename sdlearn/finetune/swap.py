"""A LoRA without training: one word is read as another, by least squares.

N  tokens of all texts      T  width of a token     r  rank

A cross-attention layer reads a token h as W h. Texts with the old word have tokens h, the same texts with the new one
h'. A matrix D with D h = h' - h there, and D h = 0 for other texts, makes W (h + D h) read the one as the other: the
layer's change is W D, which D's largest singular values bring to rank r.

Follows Gandikota et al. 2024, "Unified concept editing in diffusion models", who edit the weights themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .loop import LatentDiffusion, encode_frozen
from .lora import LoRA, LowRank

READERS = ("attn2.to_k", "attn2.to_v")      # layers of the U-Net that read the text


@torch.no_grad()
def word_swap(model: LatentDiffusion, old: Sequence[str], new: Sequence[str], others: Sequence[str], *, rank: int = 8,
              ridge: float = 1e-3) -> LoRA:
    """A LoRA with which the texts `old` are read as `new`, one each, and `others` as they were.

    ridge: how much a large change is held back, in shares of a token's mean square. Raises ValueError where the texts
    are not pairs, there are none, or the rank is not from 1 to T.
    """
    if not old or len(old) != len(new):
        raise ValueError(f"{len(old)} texts cannot be read as {len(new)}: give pairs, the same texts with another word")
    h, wanted = (tokens(model, texts) for texts in (old, new))                              # (N, T) each
    if not 1 <= rank <= h.shape[1]:
        raise ValueError(f"the rank is {rank}: give 1 to {h.shape[1]}, the width of a token")
    change = wanted - h
    if others:
        h = torch.cat([h, tokens(model, others)])
        change = torch.cat([change, change.new_zeros(len(h) - len(change), change.shape[1])])
    wall = ridge * h.square().mean() * len(h) * torch.eye(h.shape[1], dtype=h.dtype)
    D = torch.linalg.solve(h.T @ h + wall, h.T @ change).T                                  # (T, T)
    U, S, V = torch.linalg.svd(D)
    return LoRA({name: LowRank(V[:rank].to(layer.weight.device, torch.float32),
                               (layer.weight.double().cpu() @ U[:, :rank] * S[:rank]).to(layer.weight.device,
                                                                                       torch.float32))
                 for name, layer in model.unet.named_modules() if name.endswith(READERS)})


def tokens(model: LatentDiffusion, texts: Sequence[str]) -> Tensor:
    """(N, T) of all texts, in float64 on the CPU."""
    return encode_frozen(model, list(texts)).flatten(0, 1).double().cpu()
