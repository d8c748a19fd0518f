"""`python -m sdlearn generate`: images of a prompt, from noise or from an image, with masks and ControlNets.

With --prompts, of many prompts in a file, which several processes divide among them:

    accelerate launch --multi_gpu --num_processes 2 -m sdlearn generate --prompts prompts.txt --out images

Without the two options accelerate starts a process for each GPU where there are several, and otherwise one, unless
`accelerate config` says something else. A PNG records all settings of its image, the model by its source as given and
by a fingerprint of its U-Net's weights; with --prompts an image whose record differs is generated again.
"""

import argparse
import os
import re
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..checkpoint import load_controlnet
from ..checkpoint.difference import fingerprint_tensors
from ..pipeline import PromptWarning, Settings, SettingsError, StableDiffusion, make_control
from .arguments import (
    add_device_option,
    add_dtype_option,
    add_settings_options,
    add_source_options,
    model_sources,
)
from .files import check_writable, make_folder, read_settings, save_png

ALWAYS = ("model", "dtype", "resample")                 # recorded in the PNG with the settings; and these where given:
IF_GIVEN = ("image", "strength", "mask", "control", "lora", "embedding", "prediction_type", "tokenizer", "revision")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("prompt", nargs="?", help="what to draw; \"(red:1.3)\" weighs a word more; \"\" is the "
                                                  "unconditional model")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="a prompt in each line instead; resumes where it was interrupted. Processes that torchrun "
                             "or accelerate has started divide them, a GPU each")
    parser.add_argument("--negative-prompt", "--negative", default="", metavar="PROMPT",
                        help="takes the place of the empty prompt in classifier-free guidance")
    add_settings_options(parser)
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image to start from (img2img), or to inpaint")
    parser.add_argument("--strength", type=float, help="share of the steps that an image is noised for, above 0 to 1 "
                                                       "(default: 0.8; with a mask 1)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="the image is inpainted where the mask is white")
    parser.add_argument("--resample", type=int, default=1, metavar="N",
                        help="with a mask: run each step N times, as in RePaint (default: 1)")
    parser.add_argument("--control", nargs="+", action="append", default=[], metavar=("NET", "HINT"),
                        help="a ControlNet's folder, file or hub name, a condition image, and a conditioning scale "
                             "if it is not 1; may be repeated")
    parser.add_argument("--lora", nargs="+", action="append", default=[], metavar=("FILE", "STRENGTH"),
                        help="a LoRA file, and a strength if it is not 1; may be repeated")
    parser.add_argument("--embedding", nargs="+", action="append", default=[], metavar=("FILE", "WORD"),
                        help="a textual-inversion file, and the word for it if not its own; may be repeated")
    parser.add_argument("--model", default="mini", help=f"{model_sources()} (default: %(default)s)")
    add_source_options(parser)
    add_dtype_option(parser, "to compute in")
    add_device_option(parser)
    parser.add_argument("--out", type=Path, help="a .png file (default: named after the prompt and the seed); with "
                                                 "--prompts a folder (default: named after the file)")


def run(args: argparse.Namespace):
    if (args.prompt is None) == (args.prompts is None):
        raise SettingsError("give a prompt, or a file of them with --prompts, and not both")
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
    files = [image_files(out, args.batch) for out in outputs(args, prompts)]
    for group in files:
        check_writable(group)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = StableDiffusion.load(args.model, device=args.device or own_gpu(), dtype=getattr(torch, args.dtype),
                                 prediction_type=args.prediction_type, tokenizer=args.tokenizer, revision=args.revision)
    model.validate(**{name: getattr(args, name) for name in setting_names()})   # before files are read
    weights = fingerprint_tensors(model.unet.state_dict().items())                   # before LoRAs change them
    add_learned(model, args)
    given = pipeline_arguments(model, args)
    record = make_record(args, model.validate(**given), weights)
    share = list(zip(prompts, files, strict=True))[rank::processes]     # by position, whatever others have finished
    for prompt, group in share:
        records = [{"prompt": prompt, **record, "seed": args.seed + i} for i in range(args.batch)]
        if args.prompts and [read_settings(file) for file in group] == records:
            continue                                                    # of an earlier call
        for file, image, settings in zip(group, generate(model, args, prompt, given), records, strict=True):
            save_png(file, image, settings)
            print(f"{file}\n", end="", flush=True)      # in one write: other processes print to the same terminal


def setting_names() -> list[str]:
    return [one.name for one in fields(Settings)]


def make_record(args: argparse.Namespace, inputs, weights: str) -> dict:
    """What a PNG records, apart from its prompt and seed: all settings, with the model's defaults filled in."""
    record = {"negative_prompt": args.negative_prompt, **{name: getattr(inputs, name) for name in setting_names()}}
    others = {name: getattr(args, name) for name in ALWAYS + IF_GIVEN if getattr(args, name)}
    width, height = inputs.size
    return {**record, **{name: str(value) if isinstance(value, Path) else value for name, value in others.items()},
            "weights": weights, "size": f"{width}x{height}", "batch": 1}


def generate(model: StableDiffusion, args: argparse.Namespace, prompt: str, given: dict) -> list[Image.Image]:
    """Images of one prompt, with a progress bar, and a note for each part of the prompt that has no effect."""
    if not prompt.strip():
        print("note: the prompt is empty, so the image is unconditional", file=sys.stderr)
    for _, message in model.prompt_warnings(prompt, args.negative_prompt, long_prompts=args.long_prompts):
        print(f"note: {message}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)      # printed above
        steps = model.iter_steps(prompt, args.negative_prompt, **given)
    with tqdm(unit="step", desc=prompt[:40] if args.prompts else None) as bar:
        for step in steps:
            bar.total = step.of
            bar.update()
    return step.noisy_images()


def own_gpu() -> str | None:
    """The GPU of this process among several; None where there is one process, or no GPU."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty. Raises SettingsError where it cannot be read or has none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not any(lines):
        raise SettingsError(f"{file} holds no prompt; write one in each line")
    return [line for line in lines if line]


def outputs(args: argparse.Namespace, prompts: list[str]) -> list[Path]:
    """A file for each prompt; in a folder they are numbered, so that equal prompts have files of their own."""
    if not args.prompts:
        return [args.out or default_name(args.prompt, args.seed)]
    folder = make_folder(args.out or Path(args.prompts.stem))
    return [folder / f"{i:04d}-{default_name(prompt, args.seed)}" for i, prompt in enumerate(prompts)]


def add_learned(model: StableDiffusion, args: argparse.Namespace):
    """Merge the LoRAs and add the textual inversions of --lora and --embedding."""
    for file, strength in (split_number(given, 1, "--lora") for given in args.lora):
        model.add_lora(file[0], strength)
    for file, *word in args.embedding:
        if len(word) > 1:
            raise SettingsError(f"--embedding takes a file and a word, not {' '.join(map(str, [file, *word]))}")
        model.add_embedding(file, *word)


def pipeline_arguments(model: StableDiffusion, args: argparse.Namespace) -> dict:
    """The arguments of `iter_steps`: settings, images opened, ControlNets loaded."""
    given = {name: getattr(args, name) for name in setting_names()} | {"resample": args.resample}
    if args.image:
        given |= {"image": open_image(args.image), "strength": 0.8 if args.mask is None else 1.0}
    if args.strength is not None:
        given["strength"] = args.strength
    if args.mask:
        given["mask"] = open_image(args.mask)
    controls = []
    for (folder, hint), scale in (split_number(control, 2, "--control") for control in args.control):
        net = load_controlnet(folder, device=model.device, dtype=model.dtype)
        controls.append(make_control(net, open_image(Path(hint)), conditioning_scale=scale))
    return given | {"controls": controls}


def split_number(given: list[str], count: int, option: str) -> tuple[list[str], float]:
    """`count` names and the number after them, 1 where it is left out. Raises SettingsError."""
    names, number = given[:count], given[count:]
    try:
        if len(names) < count or len(number) > 1:
            raise ValueError
        return names, float(number[0]) if number else 1.0
    except ValueError:
        what = "a file" if count == 1 else "a folder, an image"
        raise SettingsError(f"{option} takes {what} and a number if it is not 1, not '{' '.join(given)}'") from None


def open_image(file: Path) -> Image.Image:
    """An image from disk. Raises SettingsError where it cannot be read."""
    try:
        image = Image.open(file)
        image.load()
        return image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"{file} is not an image that can be read: "
                            f"{getattr(error, 'strerror', None) or error}") from error


def default_name(prompt: str, seed: int) -> Path:
    """A file name from the prompt's words and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return Path(f"{words or 'image'}-{seed}.png")


def image_files(out: Path, batch: int) -> list[Path]:
    """`out` for one image, name-0.png, name-1.png ... for more."""
    return [out] if batch == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(batch)]
