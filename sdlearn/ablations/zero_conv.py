"""Ablation: what joins a ControlNet to the U-Net starts at zero, or as convolutions usually start.

Zhang et al. 2023, section 3.1 and figure 8: with zero convolutions the first step starts from the trained model
itself; with random ones it starts from noise among its features, which has to be unlearnt.
"""

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from ..controlnet import Control, ControlNet, add_control
from ..data import Scene, draw_scene
from ..finetune.controlnet import train_controlnet
from ..images import to_tensor
from ..pipeline import StableDiffusion
from ..training.control import HINTS, edge_f1, hint_tensor, hint_widths
from ..training.unet import encode_scenes, make_training_batch
from . import measuring
from .ablation import Ablation, Measurement, Plan, Variant, early_evaluation_steps
from .drawing import draw

STARTS = {"zero convolutions": "zero", "random convolutions": "PyTorch's initialisation"}
HINT = HINTS["edges"]
TIMESTEPS = (100, 300, 500, 700, 900)       # at which losses on unseen scenes are measured
LEARNING_RATE, WARMUP, DROPOUT = 5e-4, 10, 0.5
SHOWN = 4


def variants(base: StableDiffusion, plan: Plan) -> list[Variant]:
    return [Variant(name, {"joined by": started}, plan.steps, partial(run_variant, base, plan, started == "zero"))
            for name, started in STARTS.items()]


def fresh(base: StableDiffusion, *, zero: bool, seed: int = 0) -> ControlNet:
    """A ControlNet for the base, joined by zero convolutions or by random ones; all else is equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNet.from_unet(base.unet, hint_widths=hint_widths(base.vae.config.factor))
        if not zero:
            for conv in (net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
                conv.reset_parameters()
    return net.requires_grad_(True)


@lru_cache(maxsize=4)
def drawn_scenes(base: StableDiffusion, count: int, split: str) -> tuple[list[Scene], torch.Tensor]:
    """Scenes of the base's world and their hints (B, 3, H, W)."""
    drawn = [draw_scene(seed, split, measuring.get_world(base)) for seed in range(count)]
    return drawn, hint_tensor([HINT(one) for one in drawn])


def run_variant(base: StableDiffusion, plan: Plan, zero: bool) -> Iterator[Measurement]:
    net, at = fresh(base, zero=zero, seed=plan.seed), early_evaluation_steps(plan.steps)
    drawn, hints = drawn_scenes(base, plan.scenes, "train")
    first, shown = images_of(base, plan, net)
    yield Measurement(0, {**losses(base, plan, net), **first})
    pixels = to_tensor([one.image for one in drawn])
    for done in train_controlnet(base, net, pixels, [one.caption for one in drawn], hints, max_steps=plan.steps,
                                 learning_rate=LEARNING_RATE, dropout=DROPOUT, batch_size=plan.batch, warmup=WARMUP,
                                 seed=plan.seed):
        step = done.index + 1
        if step not in at:
            yield Measurement(step)
        elif step < plan.steps:
            yield Measurement(step, {"training loss": done.loss, **losses(base, plan, net)})
    last, after = images_of(base, plan, net)
    maps = [np.stack([HINT(one)] * 3, axis=2) for one in drawn_scenes(base, plan.prompts, "test")[0]]
    name = next(name for name, started in STARTS.items() if (started == "zero") == zero)
    yield Measurement(plan.steps, {"training loss": done.loss, **losses(base, plan, net), **last},
                  [*maps[:SHOWN], *shown[:SHOWN], *after[:SHOWN]],
                  [f"{name}: {when}" for when in ("the hint", "step 0", f"step {plan.steps}") for _ in maps[:SHOWN]])


@torch.no_grad()
def losses(base: StableDiffusion, plan: Plan, net: ControlNet) -> dict[str, float]:
    """The loss on unseen scenes with the ControlNet and without, the mean of five timesteps; and how far it moves the
    base's output, as a share of that."""
    drawn, hints = drawn_scenes(base, plan.unseen, "test")
    latents, contexts = unseen_latents(base, plan.unseen)
    hints = hints.to(base.device)
    found = {"with ControlNet": [], "base": [], "change of the output": []}
    for step in TIMESTEPS:
        noisy, t, target = make_training_batch(latents, step, base.schedule)
        without = base.unet(noisy, t, contexts)
        output = base.unet(noisy, t, contexts, net(noisy, t, contexts, hints))
        found["with ControlNet"].append(float(F.mse_loss(output, target)))
        found["base"].append(float(F.mse_loss(without, target)))
        found["change of the output"].append(float((output - without).norm() / without.norm()))
    return {name: sum(values) / len(values) for name, values in found.items()}


@lru_cache(maxsize=4)
def unseen_latents(base: StableDiffusion, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, C, h, w) and text features (B, M, T) of the unseen scenes."""
    return encode_scenes(drawn_scenes(base, count, "test")[0], base.vae, base.text_encoder, base.tokenizer)


def images_of(base: StableDiffusion, plan: Plan, net: ControlNet) -> tuple[dict[str, float], list]:
    """How well the edges of images follow the hint, and the images; `drawing.AT_ONCE` at most."""
    drawn, hints = drawn_scenes(base, plan.prompts, "test")
    with torch.no_grad():
        run = add_control(base.unet, [Control(net, hints.to(base.device))])
    images = draw(base, run, [one.caption for one in drawn], guidance=plan.guidance, steps=plan.sampling_steps)
    return {"edges F1": float(np.mean([edge_f1(image, HINT(one)) for image, one in zip(images, drawn, strict=True)]))
            }, list(images)


ZERO_CONV = Ablation(
    "zero-conv", "where does a ControlNet start from, joined by zero convolutions or by random ones?",
    "what the convolutions start as that join the ControlNet to the U-Net",
    Plan(steps=250, batch=16, scenes=512, unseen=32, prompts=12, guidance=3.0, sampling_steps=20), 8, variants, "full",
    ("with ControlNet, base: the mean loss on unseen scenes at timesteps 100, 300, 500, 700 and 900",
     "change of the output: 0 where the ControlNet changes nothing",
     "the start does not tell which of them learns the hint sooner: that is in the later readings"), columns=SHOWN)
