"""Training the towers by contrast: which caption belongs to which scene?"""

from pathlib import Path

import torch

from ..clip import CLIP, contrastive_loss
from ..config import ModelConfig
from ..data import FULL, World, contact_sheet, scene
from ..pictures import save_sheet, to_tensor
from ..tokenizer import Tokenizer


def shortest(ids: torch.Tensor, end: int) -> torch.Tensor:
    """`ids` (B, L) without the columns that only pad: the text tower is causal, so nothing before
    them changes, and captions of 15 tokens cost a fifth of 77."""
    longest = int((ids == end).int().argmax(dim=1).max())
    return ids[:, :longest + 1]


@torch.no_grad()
def retrieval(clip: CLIP, tokenizer: Tokenizer, *, count: int = 1000, start: int = 0, world: World = FULL) -> float:
    """Share of `count` unseen scenes whose picture is nearest to its own caption among all captions."""
    device = clip.logit_scale.device
    images, texts = [], []
    for first in range(start, start + count, 100):
        drawn = [scene(seed, "test", world) for seed in range(first, min(first + 100, start + count))]
        images.append(clip.encode_image(to_tensor([s.image for s in drawn]).to(device)))
        texts.append(clip.encode_text(shortest(tokenizer([s.caption for s in drawn]), tokenizer.end).to(device)))
    images, texts = torch.cat(images), torch.cat(texts)
    own = (images * texts).sum(dim=1, keepdim=True)
    # Two scenes may have the same caption, whose vectors are equal up to rounding: those tie.
    return float(((images @ texts.T) <= own + 1e-5).all(dim=1).float().mean())


class CLIPRecipe:
    name = "clip"
    warmup = 50
    decay_share = 0.6
    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, *, world: World = FULL, batch_size: int = 128,
                 learning_rate: float = 1e-3):
        self.model = CLIP(config.text, config.vision)
        self.tokenizer, self.world = tokenizer, world
        self.batch_size, self.learning_rate = batch_size, learning_rate

    def batch(self, generator: torch.Generator):
        seeds = torch.randint(2**40, (self.batch_size,), generator=generator).tolist()
        drawn = [scene(seed, world=self.world) for seed in seeds]
        ids = shortest(self.tokenizer([s.caption for s in drawn]), self.tokenizer.end)
        return to_tensor([s.image for s in drawn]), ids

    def loss(self, model, pixels, ids):
        images, texts = model.encode_image(pixels), model.encode_text(ids)
        loss = contrastive_loss(images, texts, model.logit_scale)
        return loss, {"scale": model.logit_scale.detach().exp()}

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        device = averaged.logit_scale.device
        drawn = [scene(seed, "test", self.world) for seed in range(8)]
        images = averaged.encode_image(to_tensor([s.image for s in drawn]).to(device))
        wrong = [scene(seed, "test", self.world).caption for seed in range(100, 400)]
        captions = [s.caption for s in drawn] + wrong
        texts = averaged.encode_text(shortest(self.tokenizer(captions), self.tokenizer.end).to(device))
        nearest = (images @ texts.T).argmax(dim=1).tolist()
        save_sheet(contact_sheet([s.image for s in drawn], [captions[i] for i in nearest], columns=4),
                   folder / f"{self.name}-{step:07d}.png")
        return {"retrieval": retrieval(averaged, self.tokenizer, count=500, world=self.world)}
