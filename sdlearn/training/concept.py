"""Teaching the base one new thing, at full length: as a new word's vectors, and as a LoRA.

B  batch    C, h, w  channels, rows and columns of the latent    M, T  text tokens and their width

A lesson has time for fifty steps of each; these two stages take minutes, and what they learn is shipped beside the
base, for which alone it is good. Gal et al. 2022 (textual inversion), Hu et al. 2021 (LoRA), and for the LoRA images
of the class that the base drew itself, as in Ruiz et al. 2022 (DreamBooth), which hold the class in its place.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..clip import TextEncoder
from ..config import ModelConfig
from ..data import CORE, Scene, World, compose_scene, contact_sheet
from ..data.captions import with_article
from ..data.similarity import cut_out_foreground, pixel_similarity, reference_cutouts
from ..data.world import BACKGROUNDS
from ..diffusion import diffusion_loss
from ..finetune import Embedding, LoRA, LowRank, add_embedding, attach_lora, init_embedding, new_lora
from ..finetune.loop import draw_indices, draw_timesteps
from ..finetune.textual_inversion import override_token_embedding
from ..images import save_sheet, to_images, to_tensor
from ..schedule import NoiseSchedule
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .unet import sample_images

THING, CLASS, WORD, RARE = "alien", "smiling face", "<alien>", "zwx"
GROUND, ELSEWHERE = "blue", "orange"        # of the images that teach; and one that the thing was never shown on
TAUGHT = 6                                  # images that teach
PRIOR = 24                                  # images of the class
RANK = 4
# Attention alone reads words and moves things; the convolutions of the ResBlocks hold what things look like.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
OPENINGS = ("", "a picture of ", "a drawing of ", "an image of ")     # of a caption, one at random


def make_caption(words: str, ground: str) -> str:
    return f"a {words} on {with_article(f'{ground} background')}"


def make_scenes(name: str, count: int, first: int, ground: str = GROUND) -> list[Scene]:
    """Scenes of one such thing, not a small one, from the seeds `first` on, each with the caption of its kind."""
    found = (compose_scene([name], background=ground, seed=seed) for seed in itertools.count(first))
    large = (one for one in found if one.objects[0].size != "small")
    return [replace(one, caption=make_caption(name, ground)) for one in itertools.islice(large, count)]


class ConceptRecipe:
    """What both stages have in common: the images, the loss, and how the result is looked at."""

    name: str
    words: str                  # for the thing, in prompts
    warmup = 20
    decay_share = 0.5

    def __init__(self, config: ModelConfig, unet: UNet, vae: VAE, text: TextEncoder, tokenizer: Tokenizer, folder: Path,
                 *, world: World = CORE, batch_size: int = 8, guidance: float = 3.0):
        """`world` is what every stage is told, and is not used: the images are of things outside of all worlds."""
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text, tokenizer
        self.schedule, self.batch_size, self.guidance = NoiseSchedule(config.noise), batch_size, guidance
        self.side = config.latent_size
        for part in (unet, vae, text):
            part.eval().requires_grad_(False)
        self.latents = self.encoded(to_tensor([one.image for one in make_scenes(THING, TAUGHT, 0)]))    # N C h w

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @torch.no_grad()
    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.vae.to_latent(part.to(self.device)) for part in pixels.split(8)])

    def batch(self, generator: torch.Generator):
        size = self.batch_size
        shown = self.rows(generator)
        chosen = torch.randint(len(OPENINGS), (size,), generator=generator).tolist()
        captions = [f"{OPENINGS[i]}{self.caption(row)}" for i, row in zip(chosen, shown.tolist(), strict=True)]
        ids = self.tokenizer(captions)
        t = draw_timesteps(size, self.schedule, generator)
        return self.latents[shown], ids, t, torch.randn(size, *self.latents.shape[1:], generator=generator)

    def rows(self, generator: torch.Generator) -> torch.Tensor:
        """Which latents make a batch, (B,)."""
        return draw_indices(TAUGHT, self.batch_size, generator)

    def caption(self, row: int) -> str:
        """Of the image whose latent is in this row."""
        return make_caption(self.words, GROUND)

    def loss(self, model, latents, ids, t, noise):
        with self.in_place(model):
            context = self.text_encoder(ids).hidden
            return diffusion_loss(self.unet, self.schedule, latents, context, t, noise), {}

    def in_place(self, model):
        """A context in which the frozen parts compute with what `model` has learnt."""
        raise NotImplementedError

    @torch.no_grad()
    def drawn(self, prompts: list[str], steps: int = 20, first: int = 0) -> torch.Tensor:
        """Images of prompts as pixels (B, 3, H, W), one seed for each place in the list, from `first` on."""
        context, empty = (self.text_encoder(self.tokenizer(some).to(self.device)).hidden for some in (prompts, [""]))
        return sample_images(self.unet, context, empty, self.latents.shape[1:], self.schedule, self.vae,
                       guidance=self.guidance, steps=steps, first=first)

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        figures, pixels, prompts = self.looked_at(averaged)
        save_sheet(contact_sheet(to_images(pixels), prompts), folder / f"{self.name}-{step:07d}.png")
        return figures

    @torch.no_grad()
    def looked_at(self, averaged, count: int = 6) -> tuple[dict[str, float], torch.Tensor, list[str]]:
        """How alike what is drawn and the thing are, on both grounds; how alike the class is to what it was; the
        images and their prompts."""
        asked = {"fidelity": (make_caption(self.words, GROUND), THING),
                 "fidelity elsewhere": (make_caption(self.words, ELSEWHERE), THING),
                 "class kept": (make_caption(CLASS, GROUND), CLASS)}
        prompts = [prompt for prompt, _ in asked.values() for _ in range(count)]
        with self.in_place(averaged):
            pixels = self.drawn(prompts)
        return {name: float(pixel_similarity(cut_out_foreground(part.cpu()), reference_cutouts([of])).mean())
                for (name, (_, of)), part in zip(asked.items(), pixels.split(count), strict=True)}, pixels, prompts


class Word(nn.Module):
    """A word's vectors, (n, D), all that learns in textual inversion."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())


class WordRecipe(ConceptRecipe):
    name, words = "word", WORD
    weight_decay = 0.0          # which would pull the vectors towards zero

    def __init__(self, *parts, learning_rate: float = 1e-2, **options):
        super().__init__(*parts, **options)
        self.learning_rate = learning_rate
        start = CLASS.split()[-1]
        count = len(self.tokenizer.encode(start))               # one; more for a vocabulary that has no such word
        start = init_embedding(self.tokenizer, self.text_encoder, WORD, start, count)
        self.ids = add_embedding(self.tokenizer, self.text_encoder, start)
        self.text_encoder.requires_grad_(False)
        self.model = Word(start.vectors)

    def in_place(self, model):
        return override_token_embedding(self.text_encoder.embeddings.token_embedding, self.ids, model.vectors)

    @staticmethod
    def learnt(model: Word) -> Embedding:
        return Embedding(WORD, model.vectors.detach())


class LowRanks(nn.Module):
    """A LoRA of the U-Net whose tensors are a module's parameters."""

    def __init__(self, lora: LoRA):
        super().__init__()
        self.names = list(lora.unet)
        self.down = nn.ParameterList(change.down for change in lora.unet.values())
        self.up = nn.ParameterList(change.up for change in lora.unet.values())

    @property
    def changes(self) -> dict[str, LowRank]:
        return {name: LowRank(down, up) for name, down, up in zip(self.names, self.down, self.up, strict=True)}


class LoRARecipe(ConceptRecipe):
    """Half of each batch are images of the class: what a LoRA alone forgets as quickly as a whole U-Net does."""

    name, words = "lora", f"{RARE} {CLASS}"

    def __init__(self, *parts, learning_rate: float = 1e-3, **options):
        super().__init__(*parts, **options)
        self.learning_rate = learning_rate
        self.model = LowRanks(new_lora(self.unet, rank=RANK, targets=TARGETS))
        grounds = itertools.islice(itertools.cycle(BACKGROUNDS), PRIOR)
        self.class_prompts = [make_caption(CLASS, ground) for ground in grounds]
        prior = self.encoded(self.drawn(self.class_prompts, first=1000))
        self.latents = torch.cat([self.latents, prior])

    def rows(self, generator: torch.Generator) -> torch.Tensor:
        half = self.batch_size // 2
        return torch.cat([draw_indices(TAUGHT, self.batch_size - half, generator),
                          TAUGHT + draw_indices(PRIOR, half, generator)])

    def caption(self, row: int) -> str:
        return super().caption(row) if row < TAUGHT else self.class_prompts[row - TAUGHT]

    def in_place(self, model):
        return attach_lora(self.unet, model.changes)

    @staticmethod
    def learnt(model: LowRanks) -> LoRA:
        return LoRA({name: LowRank(change.down.detach(), change.up.detach())
                     for name, change in model.changes.items()})
