"""`python -m sdlearn generate`: images of a prompt, from noise or from an image, and what they are to follow.

Of many prompts in a file, too, which processes share out among them:

    accelerate launch --multi_gpu --num_processes 2 -m sdlearn generate --prompts prompts.txt --out images

Without the two options accelerate starts a process for each GPU where there are several, and otherwise one, unless
`accelerate config` was told something else. What an image was made with stands in its PNG, the model by its source as
it was given and by a fingerprint of its U-Net's weights; with --prompts what tells anything else is made anew.
"""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..checkpoint import load_controlnet
from ..checkpoint.difference import fingerprint_tensors
from ..pipeline import PromptWarning, Settings, SettingsError, StableDiffusion, make_control
from ..prompt import LONG
from ..samplers import SAMPLERS
from ..schedule import TIMESTEP_SPACINGS
from .export import DTYPES
from .files import check_images, check_writable, save_png, settings_of
from .source import add_source_options, models, source_options

SETTINGS = ("num_inference_steps", "sampler", "timestep_spacing", "guidance_scale", "guidance_rescale", "size", "batch",
            "seed", "long_prompts")
ALWAYS = ("model", "dtype", "resample")                                     # written into the PNG, too; these if given:
OTHERS = ("image", "strength", "mask", "control", "lora", "embedding", "prediction_type", "tokenizer", "revision")


def add_arguments(parser: argparse.ArgumentParser):
    default = Settings()
    parser.add_argument("prompt", nargs="?", help="what to draw, \"(red:1.3)\" heard more; \"\" for an image without "
                                                  "a prompt")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="a prompt in each line instead; goes on where it was cut off. Processes that torchrun or "
                             "accelerate has started share them out, a GPU each")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what to keep away from")
    parser.add_argument("--num-inference-steps", "--steps", type=int,
                        help="of the sampler (the model's default: 20 for mini)")
    parser.add_argument("--sampler", default=default.sampler, help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--timestep-spacing", "--spacing",
                        help=f"of the timesteps: {', '.join(TIMESTEP_SPACINGS)} (the sampler's own)")
    parser.add_argument("--guidance-scale", "--guidance", type=float,
                        help="1 is none (the model's default: 3 for mini)")
    parser.add_argument("--guidance-rescale", "--rescale", type=float, default=default.guidance_rescale,
                        help="of guidance, 0 to 1 (%(default)s)")
    parser.add_argument("--size", type=size, help="pixels: a side, or WIDTHxHEIGHT (the image's or the model's own)")
    parser.add_argument("--batch", type=int, default=default.batch, help="images (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the first image (%(default)s)")
    parser.add_argument("--long-prompts", default=default.long_prompts,
                        help=f"past 77 tokens: {' or '.join(LONG)} (%(default)s)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image to start from")
    parser.add_argument("--strength", type=float, help="how much of the image's noise is new, above 0 to 1 (0.8; "
                                                       "with a mask 1)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="the image is made anew where it is white")
    parser.add_argument("--resample", type=int, default=1, metavar="N", help="with a mask: each step N times (1)")
    parser.add_argument("--control", nargs="+", action="append", default=[], metavar=("NET", "HINT"),
                        help="a ControlNet's folder, file or hub name, an image, and a strength if it is not 1; may "
                             "be given again")
    parser.add_argument("--lora", nargs="+", action="append", default=[], metavar=("FILE", "STRENGTH"),
                        help="a LoRA file, and a strength if it is not 1; may be given again")
    parser.add_argument("--embedding", nargs="+", action="append", default=[], metavar=("FILE", "WORD"),
                        help="a textual-inversion file, and the word for it if not its own; may be given again")
    parser.add_argument("--model", default="mini", help=f"{models()} (%(default)s)")
    add_source_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="to compute in (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="a .png file (named after the prompt and the seed); with --prompts "
                                                 "a folder (named after the file)")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give 128 or, as width and height, 160x96")
    return int(match[1]), int(match[2] or match[1])


def run(args: argparse.Namespace):
    if (args.prompt is None) == (args.prompts is None):
        raise SettingsError("give a prompt, or a file of them with --prompts, and not both")
    settings = {name: getattr(args, name) for name in SETTINGS}
    asked = read_prompts(args.prompts) if args.prompts else [args.prompt]
    files = [image_files(out, args.batch) for out in outputs(args, asked)]
    for some in files:
        check_writable(some)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = StableDiffusion.load(args.model, device=args.device or own_gpu(), dtype=getattr(torch, args.dtype),
                                 **source_options(args))
    chosen = model.validate(**settings)
    settings |= {"num_inference_steps": chosen.num_inference_steps,     # the PNG holds the model's defaults, too
                 "guidance_scale": chosen.guidance_scale}
    weights = fingerprint_tensors(model.unet.state_dict().items())     # of the model itself, before LoRAs change it
    add_learned(model, args)
    given = settings | task(model, args)
    others = {name: told_of(getattr(args, name)) for name in ALWAYS + OTHERS if getattr(args, name)}
    width, height = model.size(args.size or (given["image"].size if args.image else None))
    mine = list(zip(asked, files, strict=True))[rank::processes]        # by place: what others have done moves nothing
    for prompt, some in mine:
        told = {"prompt": prompt, "negative_prompt": args.negative, **settings, **others, "weights": weights,
                "size": f"{width}x{height}", "batch": 1}
        told = [told | {"seed": args.seed + i} for i in range(args.batch)]
        if args.prompts and [settings_of(file) for file in some] == told:
            continue                                                    # of an earlier call
        for file, image, one in zip(some, make(model, args, prompt, given), told, strict=True):
            save_png(file, image, one)
            print(f"{file}\n", end="", flush=True)       # in one write: other processes tell theirs on the same lines


def make(model: StableDiffusion, args: argparse.Namespace, prompt: str, given: dict) -> list[Image.Image]:
    """Images of one prompt, with a bar, and with a note of what will not be heard."""
    if not prompt.strip():
        print("note: the prompt is empty, so the image is unconditional", file=sys.stderr)
    for _, message in model.prompt_warnings(prompt, args.negative, long_prompts=args.long_prompts):
        print(f"note: {message}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)      # they have just been told
        steps = model.iter_steps(prompt, args.negative, **given)
    with tqdm(unit="step", desc=prompt[:40] if args.prompts else None) as bar:
        for step in steps:
            bar.total = step.of
            bar.update()
    return step.noisy_images()


def own_gpu() -> str | None:
    """The GPU of this process among several that share the work; None where there is one process, or no GPU."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty. Raises SettingsError for a file that is none, or has none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not any(lines):
        raise SettingsError(f"{file} holds no prompt; write one in each line")
    return [line for line in lines if line]


def outputs(args: argparse.Namespace, asked: list[str]) -> list[Path]:
    """A file for each prompt; in a folder they are numbered, so that equal prompts have files of their own."""
    if not args.prompts:
        return [args.out or default_name(args.prompt, args.seed)]
    folder = check_images(args.out or Path(args.prompts.stem))
    return [folder / f"{i:04d}-{default_name(prompt, args.seed)}" for i, prompt in enumerate(asked)]


def add_learned(model: StableDiffusion, args: argparse.Namespace):
    """LoRAs and learned words, as asked for."""
    for file, strength in (with_number(given, 1, "--lora") for given in args.lora):
        model.add_lora(file[0], strength)
    for file, *word in args.embedding:
        if len(word) > 1:
            raise SettingsError(f"--embedding takes a file and a word, not {' '.join(map(str, [file, *word]))}")
        model.add_embedding(file, *word)


def task(model: StableDiffusion, args: argparse.Namespace) -> dict:
    """What the run starts from and follows: images opened, ControlNets loaded."""
    given = {}
    if args.image:
        given |= {"image": opened(args.image), "strength": 0.8 if args.mask is None else 1.0}
    if args.strength is not None:
        given["strength"] = args.strength
    if args.mask:
        given["mask"] = opened(args.mask)
    controls = []
    for (folder, hint), strength in (with_number(control, 2, "--control") for control in args.control):
        net = load_controlnet(folder, device=model.device, dtype=model.dtype)
        controls.append(make_control(net, opened(Path(hint)), strength=strength))
    return given | {"resample": args.resample, "controls": controls}


def with_number(given: list[str], count: int, option: str) -> tuple[list[str], float]:
    """`count` names and the number behind them, 1 if there is none."""
    names, number = given[:count], given[count:]
    try:
        if len(names) < count or len(number) > 1:
            raise ValueError
        return names, float(number[0]) if number else 1.0
    except ValueError:
        what = "a file" if count == 1 else "a folder, an image"
        raise SettingsError(f"{option} takes {what} and a number if it is not 1, not '{' '.join(given)}'") from None


def opened(file: Path) -> Image.Image:
    """An image from disk. Raises SettingsError for a file that is none."""
    try:
        image = Image.open(file)
        image.load()
        return image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"{file} is not an image that can be read: "
                            f"{getattr(error, 'strerror', None) or error}") from error


def told_of(value):
    """A setting as JSON keeps it."""
    return str(value) if isinstance(value, Path) else value


def default_name(prompt: str, seed: int) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return Path(f"{words or 'image'}-{seed}.png")


def image_files(out: Path, batch: int) -> list[Path]:
    """`out` for one image, name-0.png, name-1.png ... for more."""
    return [out] if batch == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(batch)]
