"""Images to be judged: what a model makes of the prompts, and real scenes of the same, as its ceiling.

`model` is a `pipeline.StableDiffusion`, or anything with its parts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image

from ..data import Scene, compose_scene
from ..guidance import predict_x0
from ..images import to_images, to_tensor
from ..samplers import get_sampler, make_timesteps_for
from .judge import Judge, load_judge
from .scoring import Scores, Verdict, compute_scores, judge_images
from .tasks import Prompt

BATCH_SIZE = 32            # images in a batch


@dataclass(frozen=True)
class JudgedImage:
    """One image, what it was to show, and the verdict."""

    prompt: Prompt
    seed: int
    image: np.ndarray               # uint8 (H, W, 3)
    verdict: Verdict


def score_images(judged: Sequence[JudgedImage]) -> Scores:
    """The shares of right images."""
    return compute_scores([one.prompt for one in judged], [one.verdict for one in judged])


@torch.no_grad()
def generate_images(model, texts: Sequence[str], seeds: Sequence[int], *, steps: int | None = None,
                    sampler: str = "dpmpp_2m", guidance: float | None = None) -> list[Image.Image]:
    """One image for each text and seed, in one batch: the one that `generate TEXT --seed SEED` gives, up to the
    rounding of arithmetic on a batch. steps, guidance: the model's defaults unless given. Raises what
    `StableDiffusion.iter_steps` raises."""
    chosen = model.validate(num_inference_steps=steps, sampler=sampler, guidance_scale=guidance, batch=len(texts))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = model.latent_shape(chosen)[1:]
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(model.device)   # (B, C, h, w)
    context = model.encode([*texts, ""])                                              # (B + 1, M, T)
    denoise = predict_x0(model.unet, model.schedule, context[:-1], context[-1:],
                         guidance_scale=chosen.guidance_scale)
    grid = make_timesteps_for(sampler, model.schedule, chosen.num_inference_steps)
    for step in get_sampler(sampler)(denoise, noise, grid, model.schedule, generator=generators):
        latent = step.x
    return model.decode(latent)


def evaluate(model, prompts: Sequence[Prompt], *, seeds: int | Sequence[int] = 4, judge: Judge | None = None,
             at_once: int = BATCH_SIZE, **settings) -> Iterator[JudgedImage]:
    """Images of the prompts, judged, one after the other as their batches are done: all seeds of a prompt together.

        results = list(evaluate(model, make_prompts(model.world["objects"], count=25), guidance=3))
        score_images(results).overall

    seeds: how many, from 0 on, or which. settings: steps, sampler, guidance, as in `generate_images`. Raises ValueError
    for an inpainting model, CheckpointError where there is no judge, both before anything is made.
    """
    if model.inpaints:
        raise ValueError(f"'{model.config.name}' is an inpainting model, which makes no images from prompts alone; "
                         "evaluate a model that does")
    judge = judge or load_judge(device=model.device)
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    return _evaluated(model, jobs, judge, at_once, settings)


def _evaluated(model, jobs, judge, at_once, settings) -> Iterator[JudgedImage]:
    for batch in batches(jobs, at_once):
        texts = [prompt.text for prompt, _ in batch]
        images = [np.asarray(image) for image in generate_images(model, texts, [seed for _, seed in batch], **settings)]
        yield from _judged(batch, images, judge)


def _judged(batch, images, judge) -> Iterator[JudgedImage]:
    verdicts = judge_images(images, [prompt for prompt, _ in batch], judge)
    for (prompt, seed), image, verdict in zip(batch, images, verdicts, strict=True):
        yield JudgedImage(prompt, seed, image, verdict)


def compose_prompt_scene(prompt: Prompt, seed: int = 0) -> Scene:
    """A real scene that shows what the prompt asks for."""
    names, colours = zip(*prompt.spec.instances, strict=True)
    return compose_scene(names, colours=colours, relation=prompt.spec.relation, background=prompt.spec.background,
                    seed=seed)


@torch.no_grad()
def evaluate_scenes(prompts: Sequence[Prompt], *, seeds: int = 1, vae=None, judge: Judge | None = None,
                    at_once: int = BATCH_SIZE) -> Iterator[JudgedImage]:
    """Real scenes that fulfil the prompts, judged in the same way: as they are, which tells the judge's own errors,
    or through an autoencoder and back, which is the ceiling of every model that draws with it."""
    judge = judge or load_judge()
    for batch in batches([(prompt, seed) for prompt in prompts for seed in range(seeds)], at_once):
        images = [compose_prompt_scene(prompt, seed).image for prompt, seed in batch]
        if vae is not None:
            images = list(encode_decode(vae, images))
        yield from _judged(batch, images, judge)


@torch.no_grad()
def encode_decode(vae, images: Sequence[np.ndarray]) -> np.ndarray:
    """Images encoded (the mean of the posterior) and decoded again, uint8 (B, H, W, 3)."""
    parameter = next(vae.parameters())
    pixels = to_tensor(images).to(parameter.device, parameter.dtype)
    return to_images(vae.to_pixels(vae.to_latent(pixels), at_once=1).float())


def batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
