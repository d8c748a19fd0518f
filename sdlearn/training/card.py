"""Shipping a run: its averaged weights as a model folder, with a card of measured figures beside them."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from ..checkpoint import Parts, save_folder
from ..checkpoint.shipped import SHIPPED, remove_old_evaluation
from ..clip import CLIP
from ..config import ModelConfig
from ..data import CORE, FULL, WORLDS, World, contact_sheet, draw_scene, vocabulary
from ..data.world import SIZES
from ..images import psnr, ssim, to_images, to_tensor
from ..machine import machine_name
from ..unet import UNet
from .adapters import KEPT, card_section, package_adapters
from .clip import retrieval_accuracy, trim_padding
from .loop import load_state
from .stages import load_averaged, load_trained_vae, train_tokenizer
from .unet import UNetRecipe, validation_prompts
from .vae import reconstruction_under_noise

EXPERIMENTS = SHIPPED / "experiments.json"      # by hand: results of trials, with machine and date


@torch.no_grad()
def autoencoder_psnr(vae, count: int = 500, world: World = FULL) -> float:
    """Mean PSNR in dB of the round trip of `count` unseen scenes (posterior mean, pixels in [-1, 1])."""
    scores = []
    for first in range(0, count, 25):
        pixels = to_tensor([draw_scene(seed, "test", world).image for seed in range(first, min(first + 25, count))])
        scores.append(psnr(vae.decode(vae.encode(pixels).mode()).clamp(-1, 1), pixels))
    return float(torch.cat(scores).mean())


@torch.no_grad()
def autoencoder_by_size(vae, count: int = 200, world: World = FULL) -> dict[str, dict[str, float]]:
    """PSNR in dB and SSIM of the round trip within the boxes of objects, by their size; `count` objects of each."""
    found = {size: {"objects": 0, "pixels": 0.0, "PSNR": 0.0, "SSIM": 0.0} for size in SIZES}
    for seed in range(100 * count):
        one = draw_scene(seed, "test", world)
        wanted = [placed for placed in one.objects if found[placed.size]["objects"] < count]
        if wanted:
            pixels = to_tensor([one.image])
            again = vae.decode(vae.encode(pixels).mode()).clamp(-1, 1)
            for placed in wanted:
                left, top, right, bottom = placed.box
                a, b = (some[:, :, top:bottom, left:right] for some in (pixels, again))
                if min(a.shape[2:]) < 11:                       # less than SSIM's window
                    continue
                told = found[placed.size]
                told["objects"] += 1
                told["pixels"] += max(a.shape[2:])
                told["PSNR"] += float(psnr(a, b))
                told["SSIM"] += float(ssim(a, b))
        elif all(told["objects"] == count for told in found.values()):
            break
    return {size: {"objects": told["objects"]} | {name: told[name] / told["objects"] for name in (
        "pixels", "PSNR", "SSIM")} for size, told in found.items() if told["objects"]}


@torch.no_grad()
def image_to_text_accuracy(clip: CLIP, tokenizer, images, prompts: list[str], others: int = 99,
                           world: World = CORE) -> float:
    """Share of images whose own prompt is nearest, by the encoders, among it and `others` other captions."""
    wrong = [draw_scene(10_000 + seed, "test", world).caption for seed in range(others)]
    embedded = clip.encode_image(to_tensor(images))
    texts, rest = (clip.encode_text(trim_padding(tokenizer(list(some)), tokenizer.end)) for some in (prompts, wrong))
    own = (embedded * texts).sum(dim=1)
    return float((own > (embedded @ rest.T).amax(dim=1)).float().mean())





def known_words(world: World, trained_on: list[str]) -> list[str]:
    """The words that a U-Net knows of a world's objects: those of the captions in the worlds it was trained on."""
    return sorted(vocabulary(world.objects, grammar=any(WORLDS[name].grammar for name in trained_on if name in WORLDS)))


def measure(config: ModelConfig, run: Path, prompts: list[str], world: World) -> tuple[Parts, dict, list]:
    """The parts of a run, its figures, and the images of `prompts`."""
    states = {stage: load_state(run / f"{stage}-state.pt")["progress"] for stage in ("vae", "clip", "unet")}
    tokenizer, vae = train_tokenizer(config, run), load_trained_vae(config, run)
    clip = load_averaged(CLIP(config.text, config.vision), run, "clip")
    recipe = UNetRecipe(config, vae, clip.text_model, tokenizer, run, world=world, first=0)
    unet = load_averaged(UNet(config.unet), run, "unet")
    images = list(recipe.sample(unet, prompts, steps=25))
    words = known_words(world, states["unet"].get("worlds", []))
    parts = Parts(config_with(config, vae), tokenizer, clip.text_model, vae, unet, clip,
                  {"objects": sorted(world.objects), "words": words})
    real = [draw_scene(seed, "test", world) for seed in range(len(prompts) - 1)]
    through = to_images(torch.cat([vae.decode(vae.encode(to_tensor([s.image])).mode()) for s in real]))
    figures = {
        "autoencoder PSNR on 500 unseen scenes, dB": autoencoder_psnr(vae),
        "encoders' retrieval among 1,000 unseen scenes, top 1": retrieval_accuracy(clip, tokenizer),
        f"images of {len(prompts)} unseen prompts whose own prompt the encoders choose among 100":
            image_to_text_accuracy(clip, tokenizer, images, prompts, world=world),
        "the same for the real scenes of these prompts through the autoencoder":
            image_to_text_accuracy(clip, tokenizer, list(through), [s.caption for s in real], world=world),
        **{f"loss {name}": value for name, value in recipe.shuffled_caption_losses(unet).items()},
        "autoencoder by size": autoencoder_by_size(vae),
        "autoencoder under noise": {f"{noise:g}": row for noise, row in reconstruction_under_noise(vae).items()},
        "training": {stage: {key: states[stage][key] for key in KEPT if key in states[stage]} for stage in states},
        "machine": machine_name(), "torch": torch.__version__, "date": str(date.today()),
    }
    return parts, figures, images


def experiments_section(experiments: list[dict]) -> list[str]:
    """Lines of Markdown: what was tried beside what before the shapes and losses were settled."""
    lines = ["## What decided", ""]
    for one in experiments:
        rows = [one["columns"], ["---"] * len(one["columns"]), *one["rows"]]
        lines += [f"**{one['question']}** {one['setting']}", "",
                  *(f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in row)} |"
                    for row in rows), "",
                  f"{one['decided']} ({one['machine']}, torch {one['torch']}, {one['date']})", ""]
    return lines


def config_with(config: ModelConfig, vae) -> ModelConfig:
    """`config` with the autoencoder's own config, whose scaling factor was measured."""
    return replace(config, vae=vae.config)


def package_weights(config: ModelConfig, run: Path, out: Path | None = None, *, world: World = CORE,
                    count: int = 64) -> Path:
    """Measure a run, write its weights in half precision as a model folder, and the card and sheet beside them."""
    prompts = validation_prompts(count, world)
    parts, figures, images = measure(config, run, prompts, world)
    folder = save_folder(out or SHIPPED / config.name, parts, dtype=torch.float16)
    remove_old_evaluation(folder)
    if adapters := package_adapters(config, run, folder):
        figures["on top"] = adapters
        figures["training"] |= {stage: told["training"] for stage, told in adapters.items()}
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card(config, parts, figures), encoding="utf-8")
    contact_sheet(images, prompts).save(folder / "samples.png", optimize=True)
    return folder


def card(config: ModelConfig, parts: Parts, figures: dict) -> str:
    """The model card, in Markdown; every number in it was measured by `measure` or read off the model."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in
             (("U-Net", parts.unet), ("autoencoder", parts.vae), ("text and image encoders", parts.clip))}
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items() if isinstance(value, float)]
    stages = [f"| {stage} | {told['step']:,} | {told['samples']:,} | {told['seconds'] / 60:.0f} "
              f"| {', '.join(told.get('worlds', [])) or '-'} | {', '.join(told.get('precisions', ['fp32']))} |"
              for stage, told in figures["training"].items()]
    return "\n".join((
        f"# `{config.name}`: the Stable Diffusion of this course", "",
        "A latent diffusion model in the architecture of Stable Diffusion 1.x, small enough for a laptop's CPU, in the",
        "folder layout of `diffusers`. It draws small scenes of a closed world and nothing else.", "",
        "## Data", "",
        "Scenes drawn on the fly by `sdlearn.data` from OpenMoji art (CC BY-SA 4.0), with exact captions; no scene is",
        f"stored. Autoencoder and encoders saw all objects, the U-Net {len(parts.world['objects'])} of them: "
        f"{', '.join(parts.world['objects'])}.", "",
        "## Model", "",
        *(f"- {name}: {count / 1e6:.2f} M parameters" for name, count in sizes.items()),
        f"- images of {config.image_size} x {config.image_size}, latents of {config.latent_size} x "
        f"{config.latent_size} x {config.vae.latent_channels}, scaling factor {parts.vae.config.scaling_factor}",
        f"- prediction: {config.noise.prediction_type}; terminal signal-to-noise ratio "
        f"{'zero' if config.noise.zero_terminal_snr else 'above zero'}", "",
        "## Training", "",
        f"`python -m sdlearn train`, lately on {figures['machine']}, torch {figures['torch']}; other work ran on the "
        "same", "cores most of the time, so minutes are an upper bound.", "",
        "| stage | steps | images or crops | minutes | scenes | computed in |", "|---|---|---|---|---|---|",
        *stages, "", "Scenes: `full` has all objects, `core` the 32, `hard` these too, with two tints, counts and "
        "places more often.", "",
        "## Figures", "", f"Measured {figures['date']} by `python -m sdlearn train package`.", "",
        "| what | value |", "|---|---|", *rows, "",
        "`loss right@999` is the U-Net's loss at timestep 999 with the right captions, `wrong` with the captions of "
        "other", "scenes: the gap is how much of the prompt it hears.", "",
        "The autoencoder's round trip within the boxes of objects in unseen scenes, by the size of the object:", "",
        "| size | objects | longer side, pixels | PSNR, dB | SSIM |", "|---|---|---|---|---|",
        *(f"| {size} | {told['objects']} | {told['pixels']:.0f} | {told['PSNR']:.1f} | {told['SSIM']:.3f} |"
          for size, told in figures["autoencoder by size"].items()), "",
        "Unseen scenes of the U-Net's objects, decoded from latents with Gaussian noise, in units of the latents'",
        "standard deviation: generated latents are about as far from encoded ones as encoded ones with noise 0.1.", "",
        "| noise | PSNR, dB | within the boxes of small objects |", "|---|---|---|",
        *(f"| {noise} | {row['PSNR']:.1f} | {row['small objects']:.1f} |"
          for noise, row in figures.get("autoencoder under noise", {}).items()), "",
        "How well it follows prompts, task by task, stands in `EVALUATION.md` beside this card, if these weights have",
        "been measured: `python -m sdlearn evaluate --keep`.", "",
        "## Samples", "",
        "Captions of unseen scenes, one seed each, none left out: DDIM, 25 steps, guidance 3.", "",
        "![images of unseen prompts](samples.png)", "",
        *card_section(figures.get("on top", {})),
        *experiments_section(json.loads(EXPERIMENTS.read_text(encoding="utf-8"))),
        "## Licence", "",
        "Trained on OpenMoji art: the weights and the images they make are shared under CC BY-SA 4.0. All emojis",
        "designed by OpenMoji, the open-source emoji and icon project.", ""))
