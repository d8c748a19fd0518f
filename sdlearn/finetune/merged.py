"""LoRAs in the weights of a model, and out of them again without a trace."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .lora import LoRA, LowRank, check_fit, find_lora_layers, lora_delta


def merge_weight(weight: Tensor, changes: Sequence[tuple[LowRank, float]]) -> Tensor:
    """A layer's weight with LoRAs in it:  weight + the sum of strength * alpha / r * up @ down.

    changes: pairs of a LoRA's part for this layer and its strength. The sum is made in float32 at least; without any
    change it is `weight` itself.
    """
    if not changes:
        return weight
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for change, strength in changes:
        delta = lora_delta(change.down.to(total), change.up.to(total), change.alpha)
        total = total + strength * delta.reshape(weight.shape)
    return total


class MergedLoRAs:
    """What LoRAs add to the weights of a U-Net and a text encoder:  weight = base + the changes that are there.

    The base of every touched layer is kept, and each weight is made anew from it. So LoRAs can be added and
    removed in any order: what has been removed leaves no trace, and without any LoRA a weight has its bits back.

        merged = MergedLoRAs(model.unet, model.text_encoder)
        merged.add(lora, strength=0.8)
        merged.remove(lora)
    """

    def __init__(self, unet: nn.Module, text: nn.Module):
        self.unet, self.text_encoder = unet, text
        self._strengths: dict[LoRA, float] = {}
        self._bases: dict[nn.Module, Tensor] = {}       # the weight of each touched layer as it was
        self._seen: dict[nn.Module, tuple[Tensor, int]] = {}    # what was written: the weight and its version

    @property
    def strengths(self) -> dict[LoRA, float]:
        """The LoRAs that are there, in the order they came, and their strengths."""
        return dict(self._strengths)

    def add(self, lora: LoRA, strength: float = 1.0) -> None:
        """Add a LoRA, or change the strength of one that is there; it may be negative.

        Raises ValueError, with nothing changed, for a LoRA that does not fit.
        """
        if not abs(strength) < float("inf"):
            raise ValueError(f"the strength is {strength}: give a finite number, such as 1")
        check_fit(lora.unet, self.unet)
        check_fit(lora.text_encoder, self.text_encoder)
        self._write(lora, {**self._strengths, lora: strength})

    def remove(self, lora: LoRA) -> None:
        """Take a LoRA out again. Raises ValueError for one that is not there."""
        if lora not in self._strengths:
            raise ValueError("this LoRA is not merged into this model: remove one of those in `strengths`")
        self._write(lora, {other: strength for other, strength in self._strengths.items() if other is not lora})

    @torch.no_grad()
    def _write(self, lora: LoRA, strengths: dict[LoRA, float]) -> None:
        """Make the weights that `lora` touches anew, for LoRAs of these strengths."""
        touched = [(find_lora_layers(getattr(self, part))[name], part, name)
                   for part in ("unet", "text_encoder") for name in getattr(lora, part)]
        for layer, _, name in touched:
            self._check_unchanged(layer, name)
        for layer, part, name in touched:
            weight = layer.weight
            base = self._bases.setdefault(layer, weight.detach().clone())
            changes = [(getattr(one, part)[name], strength) for one, strength in strengths.items()
                       if name in getattr(one, part)]
            weight.copy_(merge_weight(base.to(weight.device), changes))
            self._seen[layer] = (weight, weight._version)
            if not changes:
                del self._bases[layer], self._seen[layer]
        self._strengths = strengths

    def _check_unchanged(self, layer: nn.Module, name: str) -> None:
        """What was trained or loaded into a weight since would be lost with the next change."""
        weight, version = self._seen.get(layer, (layer.weight, layer.weight._version))
        if layer.weight is not weight or weight._version != version:
            raise ValueError(f"the weight of '{name}' was changed by something else since a LoRA was merged into it: "
                             "remove LoRAs before training or loading, and add them again afterwards")
