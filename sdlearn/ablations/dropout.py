"""Ablation: conditioning dropout. Without it guidance has no unconditional model to go away from.

Ho and Salimans 2022, section 3.2: the same network is trained with the caption and, now and then, without.
"""

from functools import partial

import torch
import torch.nn.functional as F

from ..pipeline import StableDiffusion
from ..training.from_scratch import EncodedScenes
from ..training.unet import make_training_batch, shuffled_caption_losses
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, encode_lesson_scenes
from .drawing import draw, lesson, lesson_prompts

SHARES = (0.0, 0.1)             # of captions that are replaced by the empty one
SCALES = (1.0, 3.0, 7.0)        # of guidance
SHOWN = 4                       # images of each scale on the sheet


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant("no dropout" if share == 0 else f"dropout {share:g}", {"dropout": share}, plan.steps,
                    partial(run_variant, base, plan, share)) for share in SHARES]


def run_variant(base: StableDiffusion, plan: Plan, share: float):
    material, unseen = encode_lesson_scenes(base, plan.scenes), encode_lesson_scenes(base, plan.unseen, "test")
    return lesson(base.parts, material, plan, dropout=share, measure=partial(heard, base, unseen),
                  finish=partial(guided_images, base, plan, share))


@torch.no_grad()
def heard(base: StableDiffusion, unseen: EncodedScenes, unet, step: int = 700) -> dict[str, float]:
    """Losses on unseen scenes with the right captions, with those of others, and with the empty one."""
    noisy, t, target = make_training_batch(unseen.latents, step, base.schedule)
    empty = base.text_encoder(base.tokenizer("").to(base.device)).hidden.expand_as(unseen.contexts)          # (B, M, T)
    return {**shuffled_caption_losses(unet, base.schedule, unseen.latents, unseen.contexts),
            f"empty@{step}": float(F.mse_loss(unet(noisy, t, empty), target))}


def guided_images(base: StableDiffusion, plan: Plan, share: float, unet) -> Measurement:
    """Accuracy at each guidance scale; images of the first prompts at each."""
    asked = lesson_prompts(base, plan)
    figures, shown, captions = {}, [], []
    for scale in SCALES:
        images = draw(base, unet, [one.text for one in asked], guidance=scale, steps=plan.sampling_steps)
        shares = measuring.judge_shares(images, asked, base.device)
        figures |= {f"{name}, w = {scale:g}": value for name, value in shares.items()}
        shown += list(images[:SHOWN])
        captions += [f"dropout {share:g}, w = {scale:g}: {one.text}" for one in asked[:SHOWN]]
    return Measurement(plan.steps, figures, shown, captions)


DROPOUT = Ablation(
    "dropout", "what is guidance worth when the network has never been trained without a caption?",
    "the share of captions that is replaced by the empty one in training",
    Plan(steps=1500, batch=32, scenes=1500, unseen=128, prompts=25, guidance=None, sampling_steps=20), 10, variants,
    "small", ("right@t, wrong@t, empty@t: the loss at timestep t on unseen scenes with their own captions, with those "
              "of other scenes, with the empty one", "the images of w = 1 do not use the unconditional model"),
    columns=SHOWN)
