"""The options that say which model: by name, path or hub repository, and what its files do not tell."""

import argparse
from pathlib import Path

from ..pipeline import shipped


def models() -> str:
    return ", ".join([*shipped(), "a model folder", "a .safetensors or .ckpt file", "owner/name on the hub"])


def add_source_options(parser: argparse.ArgumentParser):
    parser.add_argument("--prediction-type", "--prediction",
                        help="what a single file of SD 2.x predicts: epsilon or v_prediction")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="of a single file: a folder, or CLIP's bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--revision", help="of a model on the hub: a branch, tag or commit")


def source_options(args: argparse.Namespace) -> dict:
    return {"prediction_type": args.prediction_type, "tokenizer": args.tokenizer, "revision": args.revision}
