"""Training the encoders by contrast: which caption belongs to which scene?

Among the captions of other scenes the right one is told by its words, whatever their order: "a cat to the left of a
dog" and "a cat to the right of a dog" come out much alike, and what a frozen encoder tells faintly, a U-Net
hardly learns. Two things are done about it:

- each scene has, beside its own caption, one that is wrong in one thing alone (Yuksekgonul et al. 2023, "NegCLIP");
- the text encoder's pooled vector is asked what the caption says: which relation, and count, name and tint of each
  kind of object in turn. A linear layer answers, which is thrown away after training.

By contrast alone relations stayed a guess, whether the wrong captions were there or not: where things are has to be
learnt by both encoders at once, and neither begins. Reading needs no image, and is learnt in some hundred steps.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..clip import CLIP, similarity_logits
from ..config import ModelConfig
from ..data import FULL, World, contact_sheet, draw_scene
from ..data.captions import CAPTION_LABELS, caption_and_hard_negative, label_caption
from ..images import save_sheet, to_tensor
from ..tokenizer import Tokenizer


def trim_padding(ids: torch.Tensor, end: int) -> torch.Tensor:
    """`ids` (B, L) without the columns that only pad: the text encoder is causal, so nothing before
    them changes, and captions of 15 tokens cost a fifth of 77."""
    longest = int((ids == end).int().argmax(dim=1).max())
    return ids[:, :longest + 1]


@torch.no_grad()
def retrieval_accuracy(clip: CLIP, tokenizer: Tokenizer, *, count: int = 1000, start: int = 0,
                       world: World = FULL) -> float:
    """Share of `count` unseen scenes whose image is nearest to its own caption among all captions."""
    device = clip.logit_scale.device
    images, texts = [], []
    for first in range(start, start + count, 100):
        drawn = [draw_scene(seed, "test", world) for seed in range(first, min(first + 100, start + count))]
        images.append(clip.encode_image(to_tensor([s.image for s in drawn]).to(device)))
        texts.append(clip.encode_text(trim_padding(tokenizer([s.caption for s in drawn]), tokenizer.end).to(device)))
    images, texts = torch.cat(images), torch.cat(texts)
    own = (images * texts).sum(dim=1, keepdim=True)
    # Two scenes may have the same caption, whose vectors are equal up to rounding: those tie.
    return float(((images @ texts.T) <= own + 1e-5).all(dim=1).float().mean())


@torch.no_grad()
def hard_negative_accuracy(clip: CLIP, tokenizer: Tokenizer, *, count: int = 500, world: World = FULL) -> float:
    """Share of `count` unseen scenes whose image is nearer to its caption than to one that is wrong in one thing."""
    device, right = clip.logit_scale.device, 0
    for first in range(0, count, 100):
        drawn = [draw_scene(seed, "test", world) for seed in range(first, min(first + 100, count))]
        images = clip.encode_image(to_tensor([s.image for s in drawn]).to(device))
        pairs = [caption_and_hard_negative(s, random.Random(s.seed), world.grammar) for s in drawn]
        ids = trim_padding(tokenizer([caption for pair in zip(*pairs, strict=True) for caption in pair]), tokenizer.end)
        true, wrong = clip.encode_text(ids.to(device)).chunk(2)
        right += int(((images * true).sum(dim=1) > (images * wrong).sum(dim=1)).sum())
    return right / count


def hard_negative_loss(images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """InfoNCE as `clip.contrastive_loss`, with more wrong texts than there are images: row i of the first B belongs
    to image i. images (B, S), texts (2B, S); a scalar."""
    logits, matches = similarity_logits(images, texts, logit_scale), torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits[:, :len(images)].T, matches)) / 2


class AuxiliaryClassifier(nn.Module):
    """Answers what a caption says, from the text encoder's pooled vector."""

    scale = 10.0        # of the vectors, whose numbers are near 1: the layer learns as much faster than the encoders

    def __init__(self, dim: int):
        super().__init__()
        self.answer = nn.Linear(dim, sum(map(len, CAPTION_LABELS)))
        nn.init.zeros_(self.answer.weight)
        nn.init.zeros_(self.answer.bias)

    def forward(self, pooled: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, D) to the logits of each question's answers."""
        return self.answer(self.scale * pooled).split([len(answers) for answers in CAPTION_LABELS], dim=1)


class CLIPWithClassifier(CLIP):
    """CLIP with an auxiliary classifier, which serves training alone: packaged weights lack it."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.text, config.vision)
        self.auxiliary_head = AuxiliaryClassifier(config.text.dim)


@torch.no_grad()
def relation_accuracy(encoders: CLIPWithClassifier, tokenizer: Tokenizer, *, count: int = 500,
                      world: World = FULL) -> float:
    """Share of the relations said in captions of `count` unseen scenes that are read off the pooled vectors."""
    drawn = [draw_scene(seed, "test", world) for seed in range(count)]
    answers = torch.tensor([label_caption(s.caption, s)[0] for s in drawn])
    ids = trim_padding(tokenizer([s.caption for s in drawn]), tokenizer.end).to(encoders.logit_scale.device)
    given = torch.cat([encoders.auxiliary_head(encoders.text_model(part).pooled)[0].argmax(dim=1)
                       for part in ids.split(100)])
    return float((given.cpu() == answers)[answers > 0].float().mean())


class CLIPRecipe:
    name = "clip"
    warmup = 50
    decay_share = 0.6

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, *, world: World = FULL, batch_size: int = 128,
                 learning_rate: float = 1e-3):
        self.model = CLIPWithClassifier(config)
        self.tokenizer, self.world = tokenizer, world
        self.batch_size, self.learning_rate = batch_size, learning_rate

    def batch(self, generator: torch.Generator):
        seeds = torch.randint(2**40, (self.batch_size,), generator=generator).tolist()
        drawn = [draw_scene(seed, world=self.world) for seed in seeds]
        pairs = [caption_and_hard_negative(s, random.Random(s.seed), self.world.grammar) for s in drawn]
        true, wrong = zip(*pairs, strict=True)
        answers = torch.tensor([label_caption(caption, s) for caption, s in zip(true, drawn, strict=True)])
        return (to_tensor([s.image for s in drawn]), trim_padding(self.tokenizer([*true, *wrong]), self.tokenizer.end),
                answers)

    def loss(self, model, pixels, ids, answers):
        pooled = model.text_model(ids).pooled                                               # (2B, D)
        texts = F.normalize(model.text_projection(pooled), dim=-1)
        contrast = hard_negative_loss(model.encode_image(pixels), texts, model.logit_scale)
        given = model.auxiliary_head(pooled[:len(pixels)])
        reading = sum(F.cross_entropy(logits, right) for logits, right in zip(given, answers.T, strict=True))
        return contrast + 0.5 * reading, {"contrast": contrast.detach(), "reading": reading.detach(),
                                          "scale": model.logit_scale.detach().exp()}

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        device = averaged.logit_scale.device
        drawn = [draw_scene(seed, "test", self.world) for seed in range(8)]
        images = averaged.encode_image(to_tensor([s.image for s in drawn]).to(device))
        wrong = [draw_scene(seed, "test", self.world).caption for seed in range(100, 400)]
        captions = [s.caption for s in drawn] + wrong
        texts = averaged.encode_text(trim_padding(self.tokenizer(captions), self.tokenizer.end).to(device))
        nearest = (images @ texts.T).argmax(dim=1).tolist()
        save_sheet(contact_sheet([s.image for s in drawn], [captions[i] for i in nearest], columns=4),
                   folder / f"{self.name}-{step:07d}.png")
        return {"retrieval": retrieval_accuracy(averaged, self.tokenizer, count=500, world=self.world),
                "told apart": hard_negative_accuracy(averaged, self.tokenizer, world=self.world),
                "relations read": relation_accuracy(averaged, self.tokenizer, world=self.world)}
