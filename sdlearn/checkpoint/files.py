"""Reading and writing single files: JSON and safetensors, strictly, and never half-written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError, TensorMismatch


@contextmanager
def written_beside(target: Path):
    """Gives a path beside `target` to write a file or a folder at, and renames it when all went well.

    A folder that exists already is updated file by file: what is in it and was not written again stays.
    After any error, or a kill, `target` is as it was before (a kill can leave the hidden path beside).
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error
    try:
        beside = room / target.name
        yield beside
        if beside.is_dir() and target.is_dir():
            for file in sorted(path for path in beside.rglob("*") if path.is_file()):
                place = target / file.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        else:
            os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{target} cannot be written: {why}.") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def read_json(file: Path) -> dict:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file(file) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:         # broken JSON or broken UTF-8
        raise CheckpointError(f"{file} is not a JSON file ({error}); copy or save it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__} where an object with keys is needed.")
    return values


def missing_file(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is missing; the model folder is not whole, copy or save it again.")


def write_json(file: Path, values: dict):
    """Not atomic by itself: for use inside `written_beside`, as is `write_tensors`."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32):
    """A safetensors file as transformers and diffusers read it; floating-point tensors become `dtype`."""
    cast = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for name, tensor in tensors.items()}
    if bad := [name for name, tensor in cast.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"nothing was saved: '{bad[0]}' of {file.parent.name} is not finite in "
                              f"{dtype}; save in float32, or take weights from before the training diverged.")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).touch()
    mode = Path(file).stat().st_mode        # the user's usual one: safetensors makes files for the user alone
    save_file(cast, file, metadata={"format": "pt"})
    Path(file).chmod(mode)


def read_tensors(file: Path, wanted: dict[str, tuple[int, ...]], *, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu",
                 rename: Callable[[str], str | None] = lambda name: name) -> dict[str, Tensor]:
    """The tensors of `file`, which must have exactly the names and shapes of `wanted`, cast to `dtype`.

    Names and shapes are compared before anything is read, so that a file which does not fit costs
    neither time nor memory. `rename` turns a name of the file into ours, or into None to pass over it.
    Raises CheckpointError for a missing, truncated or corrupt file, TensorMismatch for other tensors.
    """
    with opened(file) as tensors:
        names = {ours: theirs for theirs in tensors.keys() if (ours := rename(theirs)) is not None}
        found = {ours: tuple(tensors.get_slice(theirs).get_shape()) for ours, theirs in names.items()}
        missing = [name for name in wanted if name not in found]
        unexpected = [name for name in found if name not in wanted]
        misshaped = [(name, found[name], shape) for name, shape in wanted.items()
                     if found.get(name, shape) != shape]
        if missing or unexpected or misshaped:
            raise TensorMismatch(file, missing, unexpected, misshaped)
        # A copy, since a tensor as read is a view of the file, which may be replaced on disk.
        return {ours: tensors.get_tensor(theirs).to(device, dtype, copy=True)
                for ours, theirs in names.items()}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a module, which may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@contextmanager
def opened(file: Path):
    """A safetensors file, open for reading; its errors become sentences."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise missing_file(file) from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); "
                              "copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
