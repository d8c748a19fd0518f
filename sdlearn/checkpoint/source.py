"""One way in for every model and every ControlNet: a folder, a single file, or a name on the hub."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from ..controlnet import ControlNet
from .control import load_controlnet_folder
from .errors import CheckpointError
from .folder import DIFFUSERS_FILE, Parts, load_folder
from .hub import download
from .single import SUFFIXES, Source, find_tokenizer, load_single, load_single_controlnet
from .tokenizer import load_tokenizer

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load(source: str | Path, *, prediction: str | None = None, tokenizer: Source = None,
         revision: str | None = None, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> Parts:
    """Every part of a model, on `device`, cast to `dtype`.

    source: the path of a model folder or of a single file, or, when there is no such path, a repository on
    the hub, "owner/name", of which `revision` is taken. prediction, tokenizer: as for `load_single`; a
    folder needs neither. Raises CheckpointError, in one sentence.
    """
    path = Path(source).expanduser()
    options = {"device": device, "dtype": dtype}
    if path.is_file():
        return load_single(path, prediction=prediction, tokenizer=tokenizer, **options)
    folder = path if path.exists() else download_source(str(source), revision)
    if tokenizer is not None:       # padded as the folder's own
        tokenizer = find_tokenizer(folder, tokenizer, load_tokenizer(folder / "tokenizer").pad_with_end)
    parts = load_folder(folder, prediction=prediction, tokenizer=tokenizer, **options)
    if folder is not path:          # a folder of the cache, which is named after a commit
        parts.config = replace(parts.config, name=path.name)
    return parts


def download_source(source: str, revision: str | None, file: str | None = None) -> Path:
    if not HUB_NAME.fullmatch(source) or source.lower().endswith(SUFFIXES):
        raise CheckpointError(f"there is no file or folder {source}; give the path of a model folder or of a single "
                              "file, or a repository on the hub as owner/name.")
    try:
        return download(source, revision=revision, file=file)
    except CheckpointError as error:
        raise CheckpointError(f"there is no file or folder {source} here, and as a name on the hub: {error}") from error


def load_controlnet(source: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32) -> ControlNet:
    """A ControlNet: the path of its folder or of a single file, or a repository on the hub, "owner/name".

    Raises CheckpointError, in one sentence.
    """
    path = Path(source).expanduser()
    options = {"device": device, "dtype": dtype}
    if path.is_file():
        return load_single_controlnet(path, **options)
    if not path.exists():
        path = download_source(str(source), revision, file="config.json").parent
        download_source(str(source), revision, file=DIFFUSERS_FILE)        # into the same folder
    return load_controlnet_folder(path, **options)
