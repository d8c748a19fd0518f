"""Reading and writing files of JSON and tensors, strictly, and never half-written.

Tensors are written as safetensors. The pickles that torch.save writes are read too, but nothing in them
is run: PyTorch's own reader takes tensors, numbers and containers and refuses anything else.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError, TensorMismatch, TensorsNotFinite, first_line

Shape = tuple[int, ...]
Key = Hashable

PICKLES = (".ckpt", ".pt", ".pth", ".bin")      # what torch.save wrote goes by these names
# Left in the files of the first Stable Diffusions by the code that trained them.
IGNORED_CLASSES = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar",
         "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType", "_codecs.encode")


def read_json(file: Path) -> dict:
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file_error(file) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:         # broken JSON or broken UTF-8
        raise CheckpointError(f"{file} is not a JSON file ({error}); copy or save it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds a {type(values).__name__} where an object with keys is needed.")
    return values


def missing_file_error(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} is missing; the model folder is not whole, copy or save it again.")


def write_json(file: Path, values: dict):
    """Not atomic by itself: for use inside `write_atomically`, as is `write_tensors`."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, *,
                  metadata: dict[str, str] | None = None, source: str | None = None):
    """A safetensors file as transformers and diffusers read it; floating-point tensors become `dtype`.

    `metadata` is written into its header; `source` is its name in errors, its folder's name by default.
    """
    file = Path(file)
    cast = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
            for name, tensor in tensors.items()}
    if bad := [name for name, tensor in cast.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"nothing was saved: '{bad[0]}' of {source or file.parent.name} is not finite in "
                              f"{dtype}; save in float32, or take weights from before the training diverged.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    mode = file.stat().st_mode              # the user's usual one: safetensors makes files for the user alone
    try:
        save_file(cast, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:        # such as a full disk
        raise OSError(str(error)) from error
    file.chmod(mode)


def read_tensors(file: Path, wanted: dict[str, Shape], *, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu",
                 rename: Callable[[str], str | None] = lambda name: name) -> dict[str, Tensor]:
    """The tensors of `file`, which must have exactly the names and shapes of `wanted`, cast to `dtype`.

    Names and shapes are compared before anything is read, so that a file which does not fit costs
    neither time nor memory. `rename` turns a name of the file into ours, or into None to pass over it.
    Raises CheckpointError for a missing, truncated or corrupt file and for one with NaN or infinity,
    TensorMismatch for other tensors.
    """
    with open_tensors(file) as opened:
        names = {ours: theirs for theirs in opened.shapes if (ours := rename(theirs)) is not None}
        check_shapes(file, {ours: opened.shapes[theirs] for ours, theirs in names.items()}, wanted)
        return copy_tensors(file, ((ours, theirs, opened.read(theirs)) for ours, theirs in names.items()),
                            device, dtype)


def check_shapes(file: Path, found: dict[str, Shape], wanted: dict[str, Shape], **wording: str):
    """Raises TensorMismatch, with `wording` for the sentence, unless both have the same names and shapes."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [(name, found[name], shape) for name, shape in wanted.items() if found.get(name, shape) != shape]
    if missing or unexpected or misshaped:
        raise TensorMismatch(file, missing, unexpected, misshaped, **wording)


def copy_tensors(file: Path, tensors: Iterable[tuple[Key, str, Tensor]], device: str | torch.device,
           dtype: torch.dtype) -> dict[Key, Tensor]:
    """(key, name in the file, tensor) as they are read, one by one copied to `device` as `dtype`.

    Raises CheckpointError for a tensor that holds no floating-point numbers, TensorsNotFinite for those with NaN.
    """
    copies, bad = {}, []
    for key, name, tensor in tensors:
        if not tensor.is_floating_point():
            raise CheckpointError(f"'{name}' of {file} is {tensor.dtype}, where weights are floating-point "
                                  "numbers; use a file that is not quantised.")
        # A copy, since a tensor as read is a view of the file, which may be replaced on disk.
        copies[key] = tensor.to(device, dtype, copy=True).contiguous()
        if not copies[key].isfinite().all():
            bad.append(name)
    if bad:
        raise TensorsNotFinite(file, list(dict.fromkeys(bad)), dtype)
    return copies


def get_shapes(module: nn.Module) -> dict[str, Shape]:
    """Name and shape of every tensor of a module, which may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


# --- files of tensors, open -------------------------------------------------------------------------

@dataclass(frozen=True)
class TensorFile:
    """The tensors of an open file: their shapes, `read` that gives one by name, and the header's texts."""

    shapes: dict[str, Shape]
    read: Callable[[str], Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_tensors(file: Path):
    """A file of tensors, open for reading: safetensors, or a pickle by its suffix. Errors are sentences."""
    if Path(file).suffix.lower() in PICKLES:
        yield open_pickle(file)
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            sizes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            yield TensorFile(sizes, tensors.get_tensor, tensors.metadata() or {})
    except FileNotFoundError:
        raise missing_file_error(file) from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}); "
                              "copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error


class IgnoredObject:
    """Stands for what old training code left beside the weights in a pickle; it does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def open_pickle(file: Path) -> TensorFile:
    """The tensors of a file that torch.save wrote, mapped into memory, so that nothing is read yet."""
    check_archive(file)
    try:
        with torch.serialization.safe_globals([(IgnoredObject, name) for name in IGNORED_CLASSES]):
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} holds more than tensors and was not opened, since that may run code on "
                              f"this machine{_culprit(error)}; use a .safetensors file of the model.") from error
    except Exception as error:      # PyTorch raises whatever a made-up pickle leads it to
        raise CheckpointError(f"{file} cannot be read as tensors ({type(error).__name__}: {first_line(error)}); "
                              "use another copy, or a .safetensors file of the model.") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise CheckpointError(f"{file} holds no table of tensors; give a file with the weights of a model.")
    return TensorFile({str(name): tuple(one.shape) for name, one in tensors.items()}, tensors.__getitem__)


def check_archive(file: Path):
    """Compares every part with its checksum: PyTorch reads a damaged or packed part without a word."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0] if packed else archive.testzip()
    except FileNotFoundError:
        raise missing_file_error(file) from None
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is truncated or not a file that torch.save wrote ({error}); "
                              "copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
    if damaged:
        raise CheckpointError(f"{file} is damaged: its part {damaged} is not what was written; "
                              "copy or download it again.")


def _culprit(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it asks for {found[1]})" if found else ""
