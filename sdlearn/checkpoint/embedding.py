"""Textual-inversion files: a word and its vectors, as diffusers and as AUTOMATIC1111's web UI keep them.

n  vectors of the word      D  width of the text encoder

    diffusers       {"<toy>": (D,) or (n, D)}                                   .safetensors, .bin
    the web UI      {"string_to_param": {"*": (n, D)}, "name": "toy", ...}      .pt
                    {"emb_params": (n, D)}, named by its file                   .safetensors

A .pt or .bin file is a pickle, which can hold code; only tensors, numbers and names are let through.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_atomically
from ..finetune import Embedding
from .errors import CheckpointError, first_line
from .files import PICKLES, check_archive, open_tensors, write_tensors

SAFE = ".safetensors"


def load_embedding(file: str | Path, token: str | None = None) -> Embedding:
    """The word and vectors in a file of either kind, in float32; `token` gives the word another name.

    Raises CheckpointError, in one sentence that names the file, for one that is missing, damaged, holds
    code, or is no embedding.
    """
    file = Path(file)
    name, vectors = _found_in(_read(file), file)
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or not vectors.is_floating_point() \
            or 0 in vectors.shape:
        what = list(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise CheckpointError(f"{file} is no embedding: '{name}' is {what} where (n, width) numbers are needed.")
    if not vectors.isfinite().all():
        raise CheckpointError(f"{file} holds vectors that are not finite; fetch or train the embedding again.")
    return Embedding(token or name, torch.atleast_2d(vectors.detach().float()))                     # (n, D)


def _found_in(content: dict, file: Path) -> tuple[str, object]:
    """The word and what should be its vectors."""
    if isinstance(params := content.get("string_to_param"), dict):
        if len(params) != 1:
            raise CheckpointError(f"{file} holds {len(params)} embeddings under string_to_param; one can be read.")
        name = content.get("name")
        return name if isinstance(name, str) and name else file.stem, *params.values()
    if list(content) == ["emb_params"]:
        return file.stem, content["emb_params"]
    if len(content) != 1:
        named = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise CheckpointError(f"{file} is no embedding of one word for Stable Diffusion 1.x or 2.x: it holds {named}.")
    [(name, vectors)] = content.items()
    if not isinstance(name, str):
        raise CheckpointError(f"{file} is no embedding: its key is {name!r} where a word is needed.")
    return name, vectors


def save_embedding(file: str | Path, embedding: Embedding) -> Path:
    """Write a word's vectors, in float32: diffusers' kind for .safetensors and .bin, the web UI's for .pt.

    Raises CheckpointError for another ending and for vectors that are not finite, OSError where the file cannot be
    written.
    """
    file = Path(file)
    vectors = embedding.vectors.detach().to("cpu", torch.float32).contiguous()
    if not vectors.isfinite().all():
        raise CheckpointError(f"{file} was not written: the vectors of '{embedding.token}' are not finite.")
    if file.suffix not in (SAFE, ".bin", ".pt"):
        raise CheckpointError(f"{file} has an ending that says no format: use .safetensors or .bin (diffusers) "
                              "or .pt (AUTOMATIC1111).")
    vectors = vectors.clone()           # torch.save writes the whole storage that a view is of
    with write_atomically(file) as temporary:
        match file.suffix:
            case ".safetensors":
                write_tensors(temporary, {embedding.token: vectors}, source=file.name)
            case ".bin":
                torch.save({embedding.token: vectors}, temporary)
            case ".pt":
                # 265 is the id of "*" in CLIP's vocabulary: the placeholder that such files are keyed by.
                torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors},
                            "name": embedding.token, "step": None, "sd_checkpoint": None,
                            "sd_checkpoint_name": None}, temporary)
    return file


def _read(file: Path) -> dict:
    """What a .safetensors file or a pickle holds, nested as it is, in memory. Raises CheckpointError."""
    check_file(file)
    if file.suffix == SAFE:
        with open_tensors(file) as opened:
            return {name: opened.read(name).clone() for name in opened.shapes}
    check_archive(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors, numbers and names, and was not opened, since that "
                              "may run code on this machine; use a .safetensors file.") from error
    except Exception as error:          # PyTorch raises whatever a made-up pickle leads it to
        raise CheckpointError(f"{file} cannot be read as tensors ({type(error).__name__}: {first_line(error)}); "
                              "copy or download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__} where tensors by name are needed.")
    return content


def check_file(file: Path):
    """Raises CheckpointError unless there is a file with an ending that can be read."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing or no file; give the path of a .safetensors, .pt or .bin file.")
    if file.suffix not in (SAFE, *PICKLES):
        raise CheckpointError(f"{file} has an ending that cannot be read; give a .safetensors, .pt or .bin file.")
