"""Shipping what was trained on top of the base: ControlNets and the inpainting U-Net, as differences to it."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..checkpoint import load_folder
from ..checkpoint.difference import relative_error
from ..checkpoint.shipped import (
    CONCEPT,
    DIFFERENCE_FILE,
    Concept,
    load_shipped_controlnet,
    load_shipped_inpaint,
    read_base_tensors,
    remove_incompatible,
    save_concept,
    save_shipped_controlnet,
    save_shipped_inpaint,
)
from ..config import ModelConfig
from ..controlnet import ControlNet
from ..data import contact_sheet, draw_scene
from ..images import to_images
from ..unet import UNet
from . import stages
from .concept import CLASS, GROUND, RARE, TAUGHT, THING, WORD
from .control import ControlRecipe, hint_widths
from .inpaint import InpaintRecipe, widen_unet
from .loop import load_state

KEPT = ("step", "samples", "seconds", "precisions", "worlds")     # of a stage's progress, for the card
# Bytes of each, 12 MB in all with names and configs: with base, autoencoder, encoders and judge below 64 MB.
SHEET_FILE = "samples.png"
BUDGETS = {"edges": 2_600_000, "depth": 2_600_000, "inpaint": 6_600_000}


def package_adapters(config: ModelConfig, run: Path, folder: Path, count: int = 32) -> dict[str, dict]:
    """Write whatever a run has on top of its U-Net into the model folder that was just shipped; figures by stage.

    `count`: unseen scenes for the figures. Adapters of another base that the folder still holds are removed,
    and that is said.
    """
    states = {stage: state for stage in BUDGETS if (state := load_state(run / f"{stage}-state.pt")) is not None}
    figures = {}
    for stage, state in states.items():
        recipe = stages.STAGES[stage].make(config, run, first=0, **({"first_masks": 0} if stage == "inpaint" else {}))
        figures[stage] = package_adapter(recipe, state["average"], folder, count)
        done = state["progress"]
        figures[stage]["training"] = {key: done[key] for key in KEPT if key in done}
    figures |= package_concept(config, run, folder)
    for name in remove_incompatible(folder):
        print(f"removed: {folder / name}, which belongs to another base than the one that is shipped now, and which "
              f"{run} has not trained; train it on this base and ship again")
    return figures


def package_concept(config: ModelConfig, run: Path, folder: Path) -> dict[str, dict]:
    """Write what a run has taught its base, if it has both the word and the LoRA; figures by stage."""
    states = {stage: load_state(run / f"{stage}-state.pt") for stage in stages.CONCEPTS}
    if None in states.values():
        return {}
    learnt, figures, images, captions = {}, {}, [], []
    for stage, state in states.items():
        recipe = stages.STAGES[stage].make(config, run)
        recipe.model.load_state_dict(state["average"])
        learnt[stage] = recipe.learnt(recipe.model)
        done = state["progress"]
        looks, pixels, prompts = recipe.looked_at(recipe.model)
        images, captions = [*images, *to_images(pixels)], [*captions, *prompts]
        numbers = sum(one.numel() for one in recipe.model.parameters())
        figures[stage] = {**looks, "numbers": numbers,
                          "training": {key: done[key] for key in KEPT if key in done}}
    told = {"thing": THING, "class": CLASS, "word": WORD, "rare word": RARE, "ground": GROUND, "images": TAUGHT,
            **figures}
    place = save_concept(folder, Concept(learnt["word"], learnt["lora"], told))
    contact_sheet(images, captions, columns=6).save(place / SHEET_FILE, optimize=True)
    return figures


@torch.no_grad()
def package_adapter(recipe: ControlRecipe | InpaintRecipe, weights: dict, folder: Path, count: int) -> dict[str, float]:
    """Write one adapter, load it again, and measure what of it got lost; the sheet beside it."""
    base = load_folder(folder).unet.to(recipe.empty.device)     # as stored: what it will be added to
    drawn = [draw_scene(seed, "test", recipe.world) for seed in range(count)]
    captions = [one.caption for one in drawn]
    if isinstance(recipe, ControlRecipe):
        whole = ControlNet.from_unet(base, hint_widths=hint_widths(recipe.vae.config.factor))
        whole.load_state_dict(weights)
        recipe.unet = base
        place = save_shipped_controlnet(folder, recipe.name, whole, budget=BUDGETS[recipe.name],
                             moments=input_moments(recipe, whole, base))
        stored = load_shipped_controlnet(folder, recipe.name, device=recipe.empty.device)
        images, unstored = (recipe.sample_with_control(net, drawn) for net in (stored, whole))
        baseline = recipe.sample(base, captions)
        figures = {**recipe.agreement(drawn, images, baseline), **recipe.shuffled_hint_losses(stored, count)}
        told = {**recipe.agreement(drawn, unstored, baseline), **recipe.shuffled_hint_losses(whole, count)}
    else:
        whole = widen_unet(base)
        whole.load_state_dict(weights)
        place = save_shipped_inpaint(folder, whole, budget=BUDGETS[recipe.name],
                                     moments=input_moments(recipe, whole, base))
        stored = load_shipped_inpaint(folder, device=recipe.empty.device).unet
        images = recipe.inpaint(stored, drawn)
        figures = {**recipe.known_psnr(drawn, images), **recipe.shuffled_conditioning_losses(stored, count)}
        told = {**recipe.known_psnr(drawn, recipe.inpaint(whole, drawn)),
                **recipe.shuffled_conditioning_losses(whole, count)}
    sheet = contact_sheet(recipe.strips(drawn[:12], images[:12]), captions[:12], columns=3)
    sheet.save(place / "samples.png", optimize=True)
    return {**figures, **{f"{name} before storing": value for name, value in told.items() if value != figures[name]},
            "error of the stored difference": relative_error(whole.state_dict(), stored.state_dict(),
                                                             read_base_tensors(folder)),
            "error of its effect on the output": effect_error(recipe, base, whole, stored, count),
            "bytes": (place / DIFFERENCE_FILE).stat().st_size}


@torch.no_grad()
def input_moments(recipe: ControlRecipe | InpaintRecipe, network: nn.Module, base: UNet,
                  count: int = 16) -> dict[str, torch.Tensor]:
    """The mean of x x^T over the inputs x of each layer that the base has, too, (N, N), by its weight's name.

    Inputs are those of `count` scenes at timesteps all over the schedule, a fourth of them without a caption,
    as in guidance. A convolution's inputs are its patches, channel by channel.
    """
    sums, counts = {}, {}

    def watch(name: str, layer: nn.Module, inputs: tuple[torch.Tensor]):
        x = inputs[0].float()
        if x.ndim == 4:                                         # a map; 1x1 convolutions also take tokens
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        x = x.reshape(-1, x.shape[-1])                                               # (all, N)
        sums[name] = sums.get(name, 0) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    hooks = [layer.register_forward_pre_hook(partial(watch, f"{name}.weight"))
             for name, layer in network.named_modules()
             if isinstance(layer, (nn.Linear, nn.Conv2d)) and f"{name}.weight" in base.state_dict()]
    try:
        for i, step in enumerate((50, 250, 450, 650, 850, 999)):
            drawn = [draw_scene(10**6 + count * i + j, world=recipe.world) for j in range(count)]
            noisy, t, contexts, _ = recipe.probe(drawn, step)
            contexts[:count // 4] = recipe.empty
            recipe.network(network, *(part.to(noisy.device) for part in recipe.given(drawn)))(noisy, t, contexts)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / counts[name]).cpu() for name, total in sums.items()}


def effect_error(recipe: ControlRecipe | InpaintRecipe, base: UNet, whole: nn.Module, stored: nn.Module,
                 count: int, step: int = 500) -> float:
    """How far the output moves by storing, as a share of how far the adapter moves the base's output, at a timestep."""
    drawn = [draw_scene(2000 + seed, "test", recipe.world) for seed in range(count)]
    noisy, t, contexts, _ = recipe.probe(drawn, step)
    extra = [part.to(noisy.device) for part in recipe.given(drawn)]
    before, right, near = (network(noisy, t, contexts) for network in
                           (base, recipe.network(whole, *extra), recipe.network(stored, *extra)))
    return float((near - right).norm() / (right - before).norm())


def card_section(figures: dict[str, dict]) -> list[str]:
    """The lines of the model card that tell of adapters; none when there are none."""
    if not figures:
        return []
    titles = {"edges": "ControlNet `edges`", "depth": "ControlNet `depth`", "inpaint": "Inpainting"}
    lines = ["## Trained on top of it", "",
             "Stored as low-rank differences to the U-Net. `error of the stored difference` is the share of the",
             "difference that was cut off, `error of its effect on the output` how much of it is felt. `edge_f1` and",
             "`foreground_iou` compare images of unseen captions with the hint, with and without it given; their",
             "ceiling is the scenes themselves through the autoencoder. `known_psnr`, in dB, is of what was to stay.",
             ""]
    for stage, told in figures.items():
        if stage in stages.CONCEPTS:
            continue
        folder = "inpaint" if stage == "inpaint" else f"control-{stage}"
        training = told["training"]
        lines += [f"### {titles[stage]}", "", f"{training['step']:,} steps, {training['samples']:,} samples, "
                  f"{training['seconds'] / 60:.0f} minutes; {told['bytes'] / 1e6:.2f} MB.", "", "| what | value |",
                  "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in told.items()
                                 if isinstance(value, float)),
                  "", f"![samples of {stage}]({folder}/samples.png)", ""]
    return [*lines, *concept_section({stage: figures[stage] for stage in stages.CONCEPTS if stage in figures})]


def concept_section(figures: dict[str, dict]) -> list[str]:
    """The lines of the model card that tell of the thing that the base was taught."""
    if not figures:
        return []
    measured = [name for name, value in next(iter(figures.values())).items() if isinstance(value, float)]
    head = ["taught as", "numbers", "steps", "minutes", *measured]
    rows = [[f"`{stage}`", f"{told['numbers']:,}", f"{told['training']['step']:,}",
             f"{told['training']['seconds'] / 60:.0f}", *(f"{told[name]:.3f}" for name in measured)]
            for stage, told in figures.items()]
    return [f"### {THING}, which it had never seen", "",
            f"{TAUGHT} images on a {GROUND} ground taught it, as the word `{WORD}` and as a LoRA for",
            f"`{RARE} {CLASS}`; likeness by pixels, 1 for the same.", "",
            *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), "",
            f"![the word above, the LoRA below]({CONCEPT}/{SHEET_FILE})", ""]
