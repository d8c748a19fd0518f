"""Options that commands share, and argparse types: positive numbers, whole numbers, sizes.

A type raises argparse.ArgumentTypeError, which argparse prints with the option's name.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

from ..pipeline import Settings, shipped

DTYPES = ("float32", "float16", "bfloat16")
SHORT = {"num_inference_steps": "--steps", "guidance_scale": "--guidance", "guidance_rescale": "--rescale",
         "timestep_spacing": "--spacing"}


def positive(kind: type) -> Callable[[str], int | float]:
    """An argparse type: a finite int or float above 0."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
        return value
    return parse


def size(text: str) -> tuple[int, int]:
    """An argparse type: (width, height) from "128" or "160x96"."""
    match = re.fullmatch(r"(-?\d+)(?:x(-?\d+))?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give 128 or, as width and height, 160x96")
    return int(match[1]), int(match[2] or match[1])


def add_settings_options(parser: argparse.ArgumentParser):
    """An option for each field of `pipeline.Settings`, with its type, default and help."""
    types = get_type_hints(Settings)
    for one in fields(Settings):
        [kind, *_] = [kind for kind in get_args(types[one.name]) or [types[one.name]] if kind is not NoneType]
        how = {"type": size if one.name == "size" else kind}
        if get_origin(kind) is tuple:
            how = {"type": get_args(kind)[0], "nargs": len(get_args(kind)), "metavar": ("LOW", "HIGH")}
        names = [f"--{one.name.replace('_', '-')}", *filter(None, [SHORT.get(one.name)])]
        unset = one.metadata["unset"] if one.default is None else one.default
        parser.add_argument(*names, dest=one.name, default=one.default, **how,
                            help=f"{one.metadata['help']} (default: {unset})")


def model_sources() -> str:
    """What --model and `export` take, for help."""
    return ", ".join([*shipped(), "a model folder", "a .safetensors or .ckpt file", "owner/name on the hub"])


def add_source_options(parser: argparse.ArgumentParser):
    """What a model's files do not say."""
    parser.add_argument("--prediction-type", "--prediction", metavar="TYPE",
                        help="of a single file of SD 2.x: epsilon or v_prediction")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="of a single file: a folder, or CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--revision", help="of a model on the hub: a branch, tag or commit")


def add_device_option(parser: argparse.ArgumentParser):
    parser.add_argument("--device", help="cpu, cuda ... (default: a GPU where there is one)")


def add_dtype_option(parser: argparse.ArgumentParser, what: str, default: str = DTYPES[0]):
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=f"{what} (default: %(default)s)")
