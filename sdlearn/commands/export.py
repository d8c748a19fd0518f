"""`python -m sdlearn export`: a model as a folder for diffusers, or as a single file."""

import argparse
from pathlib import Path

import torch

from ..checkpoint import load, save_folder, save_single
from ..checkpoint.shipped import list_shipped_models, load_shipped
from .arguments import add_dtype_option, add_source_options, model_sources
from .files import check_target


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("source", help=model_sources())
    parser.add_argument("--to", choices=("diffusers", "single"), required=True,
                        help="a folder for diffusers, or a single .safetensors file")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the folder or file to write")
    add_dtype_option(parser, "of the weights")
    add_source_options(parser)


def run(args: argparse.Namespace):
    single = args.to == "single"
    check_target(args.out, single)
    if args.source in list_shipped_models():
        parts = load_shipped(args.source)
    else:
        parts = load(args.source, prediction=args.prediction_type, tokenizer=args.tokenizer, revision=args.revision)
    save = save_single if single else save_folder
    save(args.out, parts, dtype=getattr(torch, args.dtype))
    print(args.out)
