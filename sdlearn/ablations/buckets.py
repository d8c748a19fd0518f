"""Ablation: the shipped U-Net, fine-tuned for a short while on its own size alone, or on buckets of shapes.

B  batch        H, W  pixels        h, w  cells of a latent

A scene goes to one bucket, as a square as wide as the bucket's short side; its plain ground goes on along the long one.
A batch holds one bucket, and the more of it the smaller its area, so that a step costs about the same.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..data import Scene, draw_scene
from ..evaluation import Prompt
from ..finetune.loop import draw_indices, train
from ..images import to_images, to_tensor
from ..pipeline import StableDiffusion
from ..sizes import Size, fit_size
from ..training.loop import EMA
from ..training.unet import draw_shifted_timesteps, make_training_batch
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, evaluation_steps
from .drawing import draw, resized

# Of the base's own width and height: all of them are multiples of a quarter.
NATIVE = (1.0, 1.0)
BUCKETS = (NATIVE, (1.5, 0.75), (0.75, 1.5), (2.0, 1.0), (1.0, 2.0), (1.5, 1.5))
NEW = (2.0, 2.0)                            # in no bucket
ASKED = (NATIVE, (2.0, 1.0), (1.0, 2.0), NEW)
TIMESTEPS = (500, 700, 900)                 # at which losses on unseen scenes are measured
LEARNING_RATE, WARMUP, DROPOUT, SHIFT = 1e-4, 20, 0.1, 3.0      # shift: of `draw_shifted_timesteps`, as for the base
SHOWN = 2


def size_of(base: StableDiffusion, shape: tuple[float, float]) -> Size:
    """(width, height) in pixels."""
    width, height = (round(base.config.image_size * part) for part in shape)
    return width, height


def called(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    ways = {"native size only": (NATIVE,), "buckets": BUCKETS}
    sizes = {name: [size_of(base, shape) for shape in shapes] for name, shapes in ways.items()}
    return [Variant(name, {"training shapes": [called(size) for size in some],
                           "images in a batch": [batch_of(base, plan, size) for size in some]},
                    plan.steps, partial(run_variant, base, plan, tuple(some))) for name, some in sizes.items()]


def batch_of(base: StableDiffusion, plan: Plan, size: Size) -> int:
    """So many images of a size that they have about as many cells as the plan's batch of native ones."""
    return max(1, round(plan.batch * base.config.image_size**2 / (size[0] * size[1])))


# --- scenes of other shapes -----------------------------------------------------------------------------

def laid_out(one: Scene, size: Size) -> np.ndarray:
    """A scene in a picture of another shape, uint8 (H, W, 3): as large as the short side allows, at a place along the
    long side that its seed decides. The ground is of one colour, so it can go on without a seam."""
    width, height = size
    side = min(size)
    rng = random.Random(f"sdlearn laid out {one.split} {one.seed} {width}x{height}")
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = one.background_rgb
    image[top:top + side, left:left + side] = resized(one.image[None], side)[0]
    return image


@lru_cache(maxsize=32)
@torch.no_grad()
def material(base: StableDiffusion, seeds: range, split: str, size: Size) -> tuple[Tensor, Tensor]:
    """Latents (N, C, h, w) and text features (N, M, T) of the scenes of these seeds, in images of one size."""
    drawn = [draw_scene(seed, split, measuring.get_world(base)) for seed in seeds]
    latents = [base.vae.to_latent(to_tensor([laid_out(one, size) for one in drawn[first:first + 16]]).to(base.device))
               for first in range(0, len(drawn), 16)]
    return torch.cat(latents), base.text_encoder(base.tokenizer([one.caption for one in drawn]).to(base.device)).hidden


# --- training -------------------------------------------------------------------------------------------

def run_variant(base: StableDiffusion, plan: Plan, sizes: Sequence[Size]) -> Iterator[Measurement]:
    unet = copy.deepcopy(base.unet)
    average, at = EMA(unet), evaluation_steps(plan.steps, 4)
    before = start(base, plan)
    yield Measurement(0, before.figures)
    for done in train(unet.parameters(), loss_of(base, plan, unet, sizes), max_steps=plan.steps, models=(unet,),
                      learning_rate=LEARNING_RATE, warmup=WARMUP, seed=plan.seed):
        step = done.index + 1
        average.update(unet, step)
        if step not in at:
            yield Measurement(step)
        elif step < plan.steps:
            yield Measurement(step, {"training loss": done.loss, **losses(base, plan, average.model)})
    after = measured(base, plan, average.model)
    name = "buckets" if len(sizes) > 1 else "native size only"
    yield Measurement(plan.steps, {"training loss": done.loss, **after.figures}, [*before.images, *after.images],
                  [f"{name}, {when}: {text}" for when, part in (("before", before), (f"step {plan.steps}", after))
                   for text in part.captions])


def loss_of(base: StableDiffusion, plan: Plan, unet: nn.Module, sizes: Sequence[Size]):
    """The diffusion loss of a batch of one bucket, as a function of a random generator."""
    count = len(sizes)
    parts = [material(base, range(i, plan.scenes, count), "train", size) for i, size in enumerate(sizes)]
    with torch.no_grad():
        empty = base.text_encoder(base.tokenizer("").to(base.device)).hidden                            # (1, M, T)

    def loss(generator: torch.Generator) -> Tensor:
        bucket = int(torch.randint(count, (1,), generator=generator))
        latents, contexts = parts[bucket]
        rows = draw_indices(len(latents), batch_of(base, plan, sizes[bucket]), generator)          # (B,)
        x0 = latents[rows.to(latents.device)]                                                   # (B, C, h, w)
        dropped = (torch.rand(len(rows), generator=generator) < DROPOUT).to(x0.device)
        context = torch.where(dropped[:, None, None], empty, contexts[rows.to(x0.device)])
        t = draw_shifted_timesteps(len(rows), base.schedule.num_train_timesteps, SHIFT, generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        return F.mse_loss(unet(base.schedule.add_noise(x0, noise, t), t, context), base.schedule.target(x0, noise, t))

    return loss


# --- what is measured -----------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def start(base: StableDiffusion, plan: Plan) -> Measurement:
    """What is measured of the base itself: the same for all variants."""
    return measured(base, plan, base.unet)


def measured(base: StableDiffusion, plan: Plan, unet: nn.Module) -> Measurement:
    figures, shown, captions = losses(base, plan, unet), [], []
    asked = measuring.make_prompts(replace(measuring.get_world(base), count=0, pair=0, triple=0), plan.prompts)
    for size in (size_of(base, shape) for shape in ASKED):
        factor = base.vae.config.factor
        images = draw(base, unet, [one.text for one in asked], guidance=plan.guidance, steps=plan.sampling_steps,
                      shape=(base.vae.config.latent_channels, size[1] // factor, size[0] // factor))
        figures |= {f"{name}, {called(size)}": share for name, share in judged(base, images, asked).items()}
        shown += [on_square(one, 2 * base.config.image_size) for one in images[:SHOWN]]
        captions += [f"{called(size)}: {one.text}" for one in asked[:SHOWN]]
    return Measurement(0, figures, shown, captions)


@torch.no_grad()
def losses(base: StableDiffusion, plan: Plan, unet: nn.Module) -> dict[str, float]:
    """The mean loss over three timesteps on unseen scenes, at every bucket's shape and at the new one."""
    found = {}
    for size in (size_of(base, shape) for shape in (*BUCKETS, NEW)):
        latents, contexts = material(base, range(plan.unseen), "test", size)
        each = [F.mse_loss(unet(noisy, t, contexts), target) for noisy, t, target in
                (make_training_batch(latents, step, base.schedule) for step in TIMESTEPS)]
        found[f"loss, {called(size)}"] = float(torch.stack(each).mean())
    return found


def judged(base: StableDiffusion, images: np.ndarray, asked: Sequence[Prompt]) -> dict[str, float]:
    """Shares of images, uint8 (B, H, W, 3), each looked at twice: at its own pixels, at which copies are told
    apart, and brought down to the native area, at which a large thing has its usual size. An image is right, or has
    more than was asked for, if either look says so."""
    height, width = images.shape[1:3]
    own = base.config.image_size
    small = fit_size((width, height), own, own // 4)
    looks = [images] if small == (width, height) else [images, brought_to(images, small)]
    each = [[measuring.judge_shares(some[i:i + 1], asked[i:i + 1], base.device) for some in looks]
            for i in range(len(images))]
    return {name: float(np.mean([max(look[name] for look in one) for one in each]))
            for name in ("right", "more than asked") if name in each[0][0]}


def brought_to(images: np.ndarray, size: Size) -> np.ndarray:
    """Images, uint8 (B, H, W, 3), at another size, smoothed."""
    return to_images(F.interpolate(to_tensor(images), size[::-1], mode="bilinear", antialias=True))


def on_square(image: np.ndarray, side: int) -> np.ndarray:
    """An image at half its size, in the corner of a pale square of side / 2, so that all have one size and one scale:
    uint8 (side / 2, side / 2, 3). side: pixels of the largest image."""
    height, width = (one // 2 for one in image.shape[:2])
    square = np.full((side // 2, side // 2, 3), 250, np.uint8)
    square[:height, :width] = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return square


BUCKET_TUNING = Ablation(
    "buckets", "does the shipped model draw fewer copies at other sizes after a short fine-tune on buckets of shapes?",
    "the shapes of the images in a fine-tune: the native one alone, or six of which each batch has one",
    Plan(steps=320, batch=16, scenes=960, unseen=16, prompts=12, guidance=4.0, sampling_steps=10), 7, variants, "full",
    ("both start from the shipped U-Net and take as many steps, which cost about the same",
     "loss: on unseen scenes laid out in that shape, the mean of timesteps 500, 700 and 900",
     "right, more than asked: shares of images of one thing; each is judged at its own pixels and brought down to "
     "the native area, and counts if either look says so; right says nothing of copies",
     "a scene in a bucket is as large as the short side, and its plain ground goes on along the long one"),
    columns=SHOWN * len(ASKED))
