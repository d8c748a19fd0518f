"""`python -m sdlearn export`: a model as a folder for diffusers, or as a single file."""

import argparse
from pathlib import Path

import torch

from ..checkpoint import load, save_folder, save_single
from ..checkpoint.shipped import list_shipped_models, load_shipped
from .files import check_target
from .source import add_source_options, models

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("source", help=models())
    parser.add_argument("--to", choices=("diffusers", "single"), required=True,
                        help="a folder for diffusers, or a single .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the folder or file to write")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (%(default)s)")
    add_source_options(parser)


def run(args: argparse.Namespace):
    single = args.to == "single"
    check_target(args.out, single)
    shipped = args.source in list_shipped_models()
    parts = load_shipped(args.source) if shipped else load(args.source, prediction=args.prediction_type,
                                                           tokenizer=args.tokenizer, revision=args.revision)
    save = save_single if single else save_folder
    save(args.out, parts, dtype=getattr(torch, args.dtype))
    print(args.out)
