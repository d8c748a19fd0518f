"""The command line: `python -m sdlearn generate | scenes | train | export`.

Bad input is one sentence on stderr and exit status 2; Ctrl-C is exit status 130. A command's modules are
imported only when it is the one that runs, so that help comes at once.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (--help tells more)\n")


# --- generate ---------------------------------------------------------------------------------------

def generate_arguments(parser: argparse.ArgumentParser):
    from .pipeline import Settings, shipped
    from .samplers import SAMPLERS

    default = Settings()
    parser.add_argument("prompt", help="what to draw; \"\" for a picture without a prompt")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what to keep away from")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the sampler (%(default)s)")
    parser.add_argument("--sampler", default=default.sampler, help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--guidance", type=float, default=default.guidance, help="1 is none (%(default)s)")
    parser.add_argument("--size", type=size, help="pixels: a side, or WIDTHxHEIGHT (the model's own)")
    parser.add_argument("--batch", type=int, default=default.batch, help="pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the first picture (%(default)s)")
    names = ", ".join(shipped())
    parser.add_argument("--model", default="mini", help=f"{names} or a model folder (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda ... (a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="a .png file (named after the prompt and the seed)")


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give 128 or, as width and height, 160x96")
    return int(match[1]), int(match[2] or match[1])


def generate(args: argparse.Namespace):
    from tqdm import tqdm

    from .pipeline import PromptWarning, StableDiffusion

    names = ("steps", "sampler", "guidance", "size", "batch", "seed")
    settings = {name: getattr(args, name) for name in names}
    model = StableDiffusion.load(args.model, device=args.device)
    model.checked(settings)
    files = check_writable(picture_files(args.out or default_name(args.prompt, args.seed), args.batch))
    if not args.prompt.strip():
        print("note: the prompt is empty, so the picture is unconditional", file=sys.stderr)
    for _, message in model.doubts(args.prompt, args.negative):
        print(f"note: {message}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)      # they have just been told
        steps = model.steps(args.prompt, args.negative, **settings)
    for step in tqdm(steps, total=args.steps, unit="step"):
        last = step
    width, height = model.size(args.size)
    told = {"prompt": args.prompt, "negative_prompt": args.negative, **settings, "size": f"{width}x{height}",
            "model": model.config.name}
    for i, (file, image) in enumerate(zip(files, last.noisy_images(), strict=True)):
        save_png(file, image, {**told, "batch": 1, "seed": args.seed + i})
        print(file)


def default_name(prompt: str, seed: int) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return Path(f"{words or 'picture'}-{seed}.png")


def picture_files(out: Path, batch: int) -> list[Path]:
    """`out` for one picture, name-0.png, name-1.png ... for more."""
    return [out] if batch == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(batch)]


# --- scenes -----------------------------------------------------------------------------------------

def scenes_arguments(parser: argparse.ArgumentParser):
    from .data import WORLDS
    from .data.scenes import SPLITS

    parser.add_argument("--seed", type=int, default=0, help="of the first scene (%(default)s)")
    parser.add_argument("--count", type=int, default=32, help="scenes (%(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(%(default)s)")
    parser.add_argument("--world", choices=sorted(WORLDS), default="full", help="of objects (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), help="a .png file (%(default)s)")


def scenes(args: argparse.Namespace):
    from . import data
    from .pipeline import SettingsError

    if not 1 <= args.count <= 1024:
        raise SettingsError(f"count is {args.count}; give a whole number from 1 to 1024")
    [file] = check_writable([args.out])
    drawn = list(data.scenes(args.seed, args.count, args.split, data.WORLDS[args.world]))
    sheet = data.contact_sheet([one.image for one in drawn], [one.caption for one in drawn])
    save_png(file, sheet, {"seed": args.seed, "count": args.count, "split": args.split, "world": args.world})
    print(file)


# --- train ------------------------------------------------------------------------------------------

def train_arguments(parser: argparse.ArgumentParser):
    from .training.command import add_arguments

    add_arguments(parser)


def train(args: argparse.Namespace):
    from .training.command import run

    run(args)


# --- export -----------------------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16")


def export_arguments(parser: argparse.ArgumentParser):
    from .pipeline import shipped

    names = ", ".join(shipped())
    parser.add_argument("source", help=f"{names}, a model folder, a .safetensors or .ckpt file, or owner/name "
                                       "on the hub")
    parser.add_argument("--to", choices=("diffusers", "single"), required=True,
                        help="a folder for diffusers, or a single .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the folder or file to write")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (%(default)s)")
    parser.add_argument("--prediction", help="what a single file of SD 2.x predicts: epsilon or v_prediction")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="of a single file: a folder, or CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--revision", help="of a model on the hub: a branch, tag or commit")


def export(args: argparse.Namespace):
    import torch

    from .checkpoint import load, save_folder, save_single
    from .pipeline import SHIPPED, shipped

    single = args.to == "single"
    check_target(args.out, single)
    source = SHIPPED / args.source if args.source in shipped() else args.source
    parts = load(source, prediction=args.prediction, tokenizer=args.tokenizer, revision=args.revision)
    save = save_single if single else save_folder
    save(args.out, parts, dtype=getattr(torch, args.dtype))
    print(args.out)


def check_target(out: Path, single: bool):
    """Raises SettingsError where no model can be written: asked before the model is read, not after."""
    from .pipeline import SettingsError

    if single and out.suffix.lower() != ".safetensors":
        raise SettingsError(f"{out} does not end in .safetensors; single files are written as such")
    if single and out.is_dir():
        raise SettingsError(f"{out} is a folder; give the name of a file in it")
    if not single and out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file; give the name of a folder")
    if not single and out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").exists():
        raise SettingsError(f"{out} is a folder with other things in it; give a new one, or that of a model")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise SettingsError(f"{out} cannot be written: {above} may not be written to")


# --- files ------------------------------------------------------------------------------------------

def check_writable(files: list[Path]) -> list[Path]:
    """The files, when a PNG can be written at each of them: asked before the work, not after."""
    from .pipeline import SettingsError

    for file in files:
        if file.suffix.lower() != ".png":
            raise SettingsError(f"{file} does not end in .png; pictures are written as PNG files")
        try:
            if file.is_dir():
                raise SettingsError(f"{file} is a folder; give the name of a file in it")
            if not file.absolute().parent.is_dir():
                raise SettingsError(f"{file} cannot be written: there is no folder {file.parent}")
            with file.open("ab") if file.exists() else tempfile.TemporaryFile(dir=file.parent):
                pass                        # opened for writing, and left as it was
        except OSError as error:
            raise SettingsError(f"{file} cannot be written: {error.strerror or error}") from error
    return files


def save_png(file: Path, image, settings: dict):
    """Write a picture with its settings, as JSON, in PNG text named "sdlearn"."""
    from PIL.PngImagePlugin import PngInfo

    from .checkpoint import written_beside

    info = PngInfo()
    info.add_text("Software", "sdlearn")
    info.add_text("sdlearn", json.dumps(settings))
    with written_beside(file) as beside:
        image.save(beside, format="PNG", pnginfo=info)


# --- all of it --------------------------------------------------------------------------------------

COMMANDS = {
    "generate": ("make pictures of a prompt", generate_arguments, generate),
    "scenes": ("draw a sheet of the scenes that the model learns from", scenes_arguments, scenes),
    "train": ("train the model's parts", train_arguments, train),
    "export": ("write a model as a folder for diffusers or as a single file", export_arguments, export),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; gives the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    parser = Parser(prog="python -m sdlearn", description="Stable Diffusion, small enough to learn from.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (told, add_arguments, _) in COMMANDS.items():
        command = commands.add_parser(name, help=told, description=told)
        if argv[:1] == [name]:
            add_arguments(command)
    args = parser.parse_args(argv)

    from .checkpoint import CheckpointError, sentence
    from .pipeline import SettingsError

    try:
        COMMANDS[args.command][2](args)
    except (CheckpointError, SettingsError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
