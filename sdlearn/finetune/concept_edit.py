"""Concept editing in closed form: ridge regression on the cross-attention's keys and values, stored as a LoRA.

N  tokens of all texts      T  width of a token     r  rank

Texts with the source concept have tokens h, the same texts with the target concept h'. A matrix D with D h = h' - h
for these, and D h = 0 for the preserved texts, gives each key and value layer the edit W D: W (h + D h) = W h'. Its
truncated singular value decomposition has rank r.

Follows Gandikota et al. 2024, "Unified concept editing in diffusion models" (UCE), and Orgad et al. 2023, "Editing
implicit assumptions in text-to-image diffusion models" (TIME), who write the edit into the weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .loop import LatentDiffusion, encode_prompts_frozen
from .lora import LoRA, LowRank

CROSS_ATTENTION_LAYERS = ("attn2.to_k", "attn2.to_v")      # layers of the U-Net that read the text


@torch.no_grad()
def edit_concept(model: LatentDiffusion, source: Sequence[str], target: Sequence[str], preserved: Sequence[str],
                 *, rank: int = 8, ridge: float = 1e-3) -> LoRA:
    """A LoRA that maps each text of `source` to the text of `target` in its place, and leaves `preserved` as they are.

    ridge: the regression's penalty, in units of the tokens' mean square. Raises ValueError for texts that are not
    pairs, for none, and for a rank outside of 1 to T.
    """
    if not source or len(source) != len(target):
        raise ValueError(f"{len(source)} texts cannot be read as {len(target)}: give pairs, the same texts with "
                         "another word")
    h, wanted = (encode_tokens(model, texts) for texts in (source, target))                  # (N, T) each
    if not 1 <= rank <= h.shape[1]:
        raise ValueError(f"the rank is {rank}: give 1 to {h.shape[1]}, the width of a token")
    change = wanted - h
    if preserved:
        h = torch.cat([h, encode_tokens(model, preserved)])
        change = torch.cat([change, change.new_zeros(len(h) - len(change), change.shape[1])])
    penalty = ridge * h.square().mean() * len(h) * torch.eye(h.shape[1], dtype=h.dtype)
    D = torch.linalg.solve(h.T @ h + penalty, h.T @ change).T                                  # (T, T)
    U, S, V = torch.linalg.svd(D)
    return LoRA({name: LowRank(V[:rank].to(layer.weight.device, torch.float32),
                               (layer.weight.double().cpu() @ U[:, :rank] * S[:rank]).to(layer.weight.device,
                                                                                       torch.float32))
                 for name, layer in model.unet.named_modules() if name.endswith(CROSS_ATTENTION_LAYERS)})


def encode_tokens(model: LatentDiffusion, texts: Sequence[str]) -> Tensor:
    """The text encoder's outputs for all tokens of the texts, (N, T), in float64 on the CPU."""
    return encode_prompts_frozen(model, list(texts)).flatten(0, 1).double().cpu()
