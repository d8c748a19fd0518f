"""Ablation: one new thing, learnt in four ways, for longer than a lesson lasts; what is gained, and what is lost.

B  images

Gal et al. 2022 (textual inversion), Ruiz et al. 2022 (DreamBooth, with its prior and without), Hu et al. 2021 (LoRA).
The thing is one that no part of the model has seen; the class it is said to be of is one that all of them know.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Scene, draw_scene
from ..data.similarity import cut_out_foreground, pixel_similarity, reference_cutouts
from ..finetune import (
    TrainStep,
    add_embedding,
    attach_lora,
    init_embedding,
    new_lora,
    train_dreambooth,
    train_embedding,
    train_lora,
)
from ..images import to_tensor
from ..pipeline import StableDiffusion
from ..training.concept import CLASS, GROUND, OPENINGS, RANK, RARE, TARGETS, TAUGHT, THING, WORD, make_scenes
from ..training.unet import encode_scenes, make_training_batch
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, early_evaluation_steps
from .drawing import draw

OTHER_GROUND = "green"      # one that the thing has never been seen on
TIMESTEPS = (100, 300, 500, 700, 900)       # at which losses are measured
RATES = {"word": 1e-2, "lora": 2e-3, "unet": 1e-4}
FIRST = 10                                  # step at which something is measured, after the start
SENTENCES = tuple(f"{opening}a {{}} on a {GROUND} background" for opening in OPENINGS)


@dataclass(frozen=True, eq=False)
class Way:
    """A way to learn: a model of its own, the words for the thing in prompts, its training, the numbers that learn."""

    model: StableDiffusion
    words: str
    run: Iterator[TrainStep]
    learns: int
    beside: Callable = lambda unet: torch.no_grad()     # a context in which the U-Net is the one that has learnt


def by_word(base: StableDiffusion, plan: Plan, pixels: Tensor) -> Way:
    own = own_copy(base)
    start = CLASS.split()[-1]
    count = len(own.tokenizer.encode(start))            # one; more only for a vocabulary that has no such word
    vectors = init_embedding(own.tokenizer, own.text_encoder, WORD, start, count)
    add_embedding(own.tokenizer, own.text_encoder, vectors)
    run = train_embedding(own, WORD, pixels, max_steps=plan.steps, learning_rate=RATES["word"], templates=SENTENCES,
                          batch_size=plan.batch, seed=plan.seed)
    return Way(own, WORD, run, vectors.vectors.numel())


def by_lora(base: StableDiffusion, plan: Plan, pixels: Tensor) -> Way:
    own, words = own_copy(base), f"{RARE} {CLASS}"
    lora = new_lora(own.unet, rank=RANK, targets=TARGETS, seed=plan.seed)
    run = train_lora(own, lora, pixels, f"a {words} on a {GROUND} background", max_steps=plan.steps,
                     learning_rate=RATES["lora"], batch_size=plan.batch, seed=plan.seed)
    return Way(own, words, run, sum(one.numel() for one in lora.tensors()), lambda unet: attach_lora(unet, lora.unet))


def by_unet(base: StableDiffusion, plan: Plan, pixels: Tensor, *, prior: bool) -> Way:
    own, words = own_copy(base), f"{RARE} {CLASS}"
    kept = {}
    if prior:
        drawn = draw(base, base.unet, [f"a {CLASS}"] * 2 * TAUGHT, guidance=plan.guidance, steps=plan.sampling_steps)
        kept = {"class_pixels": to_tensor(drawn), "class_prompt": f"a {CLASS}"}
    run = train_dreambooth(own, pixels, f"a {words} on a {GROUND} background", max_steps=plan.steps,
                           learning_rate=RATES["unet"], batch_size=plan.batch, seed=plan.seed, **kept)
    return Way(own, words, run, sum(one.numel() for one in own.unet.parameters()))


WAYS = {"textual inversion": by_word, "LoRA": by_lora, "DreamBooth": partial(by_unet, prior=False),
        "DreamBooth, prior kept": partial(by_unet, prior=True)}


def own_copy(base: StableDiffusion) -> StableDiffusion:
    """The model with a copy of its U-Net, text encoder and tokenizer, which training may change."""
    own = copy.copy(base)
    own.unet, own.text_encoder, own.tokenizer = map(copy.deepcopy, (base.unet, base.text_encoder, base.tokenizer))
    return own


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant(name, {"method": name}, plan.steps, partial(run_variant, base, plan, name)) for name in WAYS]


def run_variant(base: StableDiffusion, plan: Plan, name: str) -> Iterator[Measurement]:
    at = {mark for mark in early_evaluation_steps(plan.steps) if mark == 0 or mark >= min(FIRST, plan.steps)}
    pixels = to_tensor([one.image for one in make_scenes(THING, TAUGHT, 0)])
    way = WAYS[name](base, plan, pixels)
    with way.beside(way.model.unet):
        yield Measurement(0, {"numbers that learn": way.learns, **losses(base, way, plan), **seen(way, plan)[0]})
    for done in way.run:
        step = done.index + 1
        if step not in at:
            yield Measurement(step)
        elif step < plan.steps:
            yield Measurement(step, {"training loss": done.loss, **losses(base, way, plan), **seen(way, plan)[0]})
    with way.beside(way.model.unet):
        figures, images = seen(way, plan)
        yield Measurement(plan.steps, {"training loss": done.loss, **losses(base, way, plan), **figures}, list(images),
                      [f"{name}: {text}" for text in prompts(way.words, plan)])


@lru_cache(maxsize=2)
def loss_scenes(base: StableDiffusion, count: int) -> dict[str, tuple[list[Scene], Tensor]]:
    """What losses are measured on: scenes and their latents (B, C, h, w), the same for all that learn from `base`."""
    sets = {"images that taught": make_scenes(THING, TAUGHT, 0), "unseen images": make_scenes(THING, count, 100),
            "class": make_scenes(CLASS, count, 200),
            "other scenes": [draw_scene(seed, "test", measuring.get_world(base)) for seed in range(2 * count)]}
    return {name: (drawn, encode_scenes(drawn, base.vae, base.text_encoder, base.tokenizer)[0])
            for name, drawn in sets.items()}


@torch.no_grad()
def losses(base: StableDiffusion, way: Way, plan: Plan) -> dict[str, float]:
    """Mean losses over five timesteps, always with the same noise: on the images that taught, on others of the
    thing, on images of the class, and on scenes of all that the base knows."""
    model, found = way.model, {}
    for name, (drawn, latents) in loss_scenes(base, plan.unseen).items():
        texts = [one.caption.replace(f"a {THING} ", f"a {way.words} ") for one in drawn]
        contexts = model.text_encoder(model.tokenizer(texts).to(model.device)).hidden              # (B, M, T)
        each = [F.mse_loss(model.unet(noisy, t, contexts), target) for noisy, t, target in
                (make_training_batch(latents, step, model.schedule) for step in TIMESTEPS)]
        found[name] = float(torch.stack(each).mean())
    return found


def prompts(words: str, plan: Plan) -> list[str]:
    """What is drawn: the thing, the thing elsewhere, the class, and a thing of another kind."""
    ask = [f"a {words} on a {GROUND} background", f"a {words} on a {OTHER_GROUND} background",
           f"a {CLASS} on a {GROUND} background", "a yellow star on a purple background"]
    return [text for text in ask for _ in range(plan.prompts)]


@torch.no_grad()
def seen(way: Way, plan: Plan) -> tuple[dict[str, float], np.ndarray]:
    """How much images look like the thing, asked for by its own words and by its class alone; how many images of
    other things the judge finds right; and the images of the thing."""
    model = way.model
    draws = partial(draw, model, model.unet, guidance=plan.guidance, steps=plan.sampling_steps)
    images = draws(prompts(way.words, plan))
    shown = cut_out_foreground(to_tensor(images))
    alike = pixel_similarity(shown, reference_cutouts([THING]))[:, 0].split(plan.prompts)
    names = ("fidelity", "fidelity elsewhere", "fidelity of the class")
    asked = measuring.make_prompts(replace(measuring.get_world(model), count=0, pair=0, triple=0), 2 * plan.prompts)
    others = measuring.judge_shares(draws([one.text for one in asked]), asked, model.device)["right"]
    fidelity = {name: float(one.mean()) for name, one in zip(names, alike, strict=False)}
    return {**fidelity, "others right": others}, images


CONCEPT = Ablation(
    "concept", "what does a model gain and lose that learns one new thing, in four ways, for longer and longer?",
    "what learns: a word, a LoRA, or the whole U-Net, with images of the class among the thing's and without",
    Plan(steps=200, batch=4, unseen=8, prompts=4, guidance=3.0, sampling_steps=10), 9, variants, "full",
    (f"the thing: {THING}, which no model has seen, taught by {TAUGHT} images on a {GROUND} background as "
     f"'{WORD}' or 'a {RARE} {CLASS}'",
     "images that taught, unseen images, class, other scenes: losses, the mean of five timesteps",
     f"fidelity: likeness by pixels of what is drawn and the {THING}; elsewhere: on a {OTHER_GROUND} background; of "
     f"the class: asked for as '{CLASS}' alone, where it should stay low",
     "others right: share of images of single things that the judge finds right"), columns=8)
