"""`python -m sdlearn generate`: pictures of a prompt, from noise or from a picture, and what they are to follow."""

import argparse
import re
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..checkpoint import load_control
from ..pipeline import PromptWarning, Settings, SettingsError, StableDiffusion, make_control
from ..prompt import LONG
from ..samplers import SAMPLERS
from ..schedule import SPACINGS
from .export import DTYPES
from .files import check_writable, save_png
from .source import add_source_options, models, source_options

SETTINGS = ("steps", "sampler", "spacing", "guidance", "rescale", "size", "batch", "seed", "long_prompts")
OTHERS = ("image", "strength", "mask", "control", "lora", "embedding")      # written into the PNG where given


def add_arguments(parser: argparse.ArgumentParser):
    default = Settings()
    parser.add_argument("prompt", help="what to draw, \"(red:1.3)\" heard more; \"\" for a picture without a prompt")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what to keep away from")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the sampler (%(default)s)")
    parser.add_argument("--sampler", default=default.sampler, help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--spacing", help=f"of the timesteps: {', '.join(SPACINGS)} (the sampler's own)")
    parser.add_argument("--guidance", type=float, default=default.guidance, help="1 is none (%(default)s)")
    parser.add_argument("--rescale", type=float, default=default.rescale, help="of guidance, 0 to 1 (%(default)s)")
    parser.add_argument("--size", type=size, help="pixels: a side, or WIDTHxHEIGHT (the image's or the model's own)")
    parser.add_argument("--batch", type=int, default=default.batch, help="pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the first picture (%(default)s)")
    parser.add_argument("--long-prompts", default=default.long_prompts,
                        help=f"past 77 tokens: {' or '.join(LONG)} (%(default)s)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from")
    parser.add_argument("--strength", type=float, help="how much of the image's noise is new, above 0 to 1 (0.8; "
                                                       "with a mask 1)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="the image is made anew where it is white")
    parser.add_argument("--resample", type=int, default=1, metavar="N", help="with a mask: each step N times (1)")
    parser.add_argument("--control", nargs="+", action="append", default=[], metavar=("NET", "HINT"),
                        help="a ControlNet's folder, file or hub name, a picture, and a strength if it is not 1; may "
                             "be given again")
    parser.add_argument("--lora", nargs="+", action="append", default=[], metavar=("FILE", "STRENGTH"),
                        help="a LoRA file, and a strength if it is not 1; may be given again")
    parser.add_argument("--embedding", nargs="+", action="append", default=[], metavar=("FILE", "WORD"),
                        help="a textual-inversion file, and the word for it if not its own; may be given again")
    parser.add_argument("--model", default="mini", help=f"{models()} (%(default)s)")
    add_source_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="to compute in (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="a .png file (named after the prompt and the seed)")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give 128 or, as width and height, 160x96")
    return int(match[1]), int(match[2] or match[1])


def run(args: argparse.Namespace):
    settings = {name: getattr(args, name) for name in SETTINGS}
    model = StableDiffusion.load(args.model, device=args.device, dtype=getattr(torch, args.dtype),
                                 **source_options(args))
    model.checked(settings)
    files = check_writable(picture_files(args.out or default_name(args.prompt, args.seed), args.batch))
    add_learned(model, args)
    given = settings | task(model, args)
    if not args.prompt.strip():
        print("note: the prompt is empty, so the picture is unconditional", file=sys.stderr)
    for _, message in model.doubts(args.prompt, args.negative, long_prompts=args.long_prompts):
        print(f"note: {message}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)      # they have just been told
        steps = model.steps(args.prompt, args.negative, **given)
    with tqdm(unit="step") as bar:
        for step in steps:
            bar.total = step.of
            bar.update()
    others = {name: told_of(getattr(args, name)) for name in OTHERS if getattr(args, name)}
    told = {"prompt": args.prompt, "negative_prompt": args.negative, **settings, "model": model.config.name, **others}
    for i, (file, image) in enumerate(zip(files, step.noisy_images(), strict=True)):
        save_png(file, image, {**told, "size": f"{image.width}x{image.height}", "batch": 1, "seed": args.seed + i})
        print(file)


def add_learned(model: StableDiffusion, args: argparse.Namespace):
    """LoRAs and learned words, as asked for."""
    for file, strength in (with_number(given, 1, "--lora") for given in args.lora):
        model.add_lora(file[0], strength)
    for file, *word in args.embedding:
        if len(word) > 1:
            raise SettingsError(f"--embedding takes a file and a word, not {' '.join(map(str, [file, *word]))}")
        model.add_embedding(file, *word)


def task(model: StableDiffusion, args: argparse.Namespace) -> dict:
    """What the run starts from and follows: pictures opened, ControlNets loaded."""
    given = {}
    if args.image:
        given |= {"image": opened(args.image), "strength": 0.8 if args.mask is None else 1.0}
    if args.strength is not None:
        given["strength"] = args.strength
    if args.mask:
        given["mask"] = opened(args.mask)
    controls = []
    for (folder, hint), strength in (with_number(control, 2, "--control") for control in args.control):
        net = load_control(folder, device=model.device, dtype=model.dtype)
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
        what = "a file" if count == 1 else "a folder, a picture"
        raise SettingsError(f"{option} takes {what} and a number if it is not 1, not '{' '.join(given)}'") from None


def opened(file: Path) -> Image.Image:
    """A picture from disk. Raises SettingsError for a file that is none."""
    try:
        image = Image.open(file)
        image.load()
        return image
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"{file} is not a picture that can be read: "
                            f"{getattr(error, 'strerror', None) or error}") from error


def told_of(value):
    """A setting as JSON keeps it."""
    return str(value) if isinstance(value, Path) else value


def default_name(prompt: str, seed: int) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return Path(f"{words or 'picture'}-{seed}.png")


def picture_files(out: Path, batch: int) -> list[Path]:
    """`out` for one picture, name-0.png, name-1.png ... for more."""
    return [out] if batch == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(batch)]
