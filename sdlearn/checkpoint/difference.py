"""A network stored as its difference to the base it was trained from, in a fifth of the room.

A ControlNet starts as a copy of the U-Net's encoder, an inpainting model as the whole U-Net, and training
moves their weights a little. What they moved by is stored, of each tensor in one of three forms:

    <name>                      the tensor itself: what the base does not have, or has in another shape
    <name>.difference           what to add to the base's tensor, whole: biases, norms, small weights
    <name>.up, <name>.down      (M, R) and (R, N): their product is what to add, as one matrix (M, N) with
                                everything behind the first dimension in its columns

The last is the singular value decomposition, cut off: of all matrices of rank R the nearest (Eckart and
Young 1936). The header tells the fingerprint of the base, since with any other one the sum is nonsense.
"""

import hashlib
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError
from .files import check_shapes, copy_tensors, get_shapes, open_tensors, write_tensors

Tensors = dict[str, Tensor]
STORED = torch.float16
SMALL = 1024            # numbers; what has fewer is stored whole


def fingerprint_file(file: Path) -> str:
    """Of the tensors of a file, as they are stored: 16 hexadecimal digits, the same wherever they are equal."""
    with open_tensors(file) as opened:
        return fingerprint_tensors((name, opened.read(name)) for name in sorted(opened.shapes))


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of named tensors, in the order in which they come: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def compute_difference(tensors: Tensors, base: Tensors, budget: int, moments: Tensors | None = None) -> Tensors:
    """What to store of `tensors` so that `restore_tensors` gives them back nearly: at most about `budget` bytes of it.

    What is stored whole costs what it costs. The rest of the budget goes to singular values, the largest
    square for its bytes first, over all matrices: so the sum of all squared errors is as small as it can
    be. moments: of some matrices, how their inputs x are spread, the mean of x x^T, (N, N); then the errors
    that count are those of the layers' outputs on such inputs, and what the inputs never contain costs
    nothing. Raises ValueError for a budget that what is stored whole exceeds.
    """
    stored, left = {}, budget
    triples: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float().cpu()
        if name not in base or base[name].shape != tensor.shape:
            stored[name] = tensor
        elif tensor.ndim < 2 or tensor.numel() <= SMALL:
            stored[f"{name}.difference"] = tensor - base[name].float().cpu()
        else:
            moved = (tensor - base[name].float().cpu()).flatten(1)                   # (M, N)
            triples[name] = _decomposed(moved, None if moments is None else moments.get(name))
    left -= sum(tensor.numel() for tensor in stored.values()) * STORED.itemsize
    if left < 0:
        raise ValueError(f"a budget of {budget:,} bytes is too small by {-left:,} for what must be stored whole: "
                         "give more")
    ranks = _ranks(triples, left)
    for name, (up, values, down) in triples.items():
        root = values[:ranks[name]].sqrt()                      # half to each, so that neither leaves fp16's range
        stored[f"{name}.up"] = up[:, :ranks[name]] * root                              # (M, R)
        stored[f"{name}.down"] = root[:, None] * down[:ranks[name]]                    # (R, N)
    return stored


def _decomposed(moved: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K), (K,), (K, N), the product of which is `moved` (M, N), the parts that matter most first.

    With the inputs' moment L L^T the mean squared error of the output is || (moved - near) L ||^2, so it is
    moved L that is decomposed.
    """
    if moment is None:
        return torch.linalg.svd(moved, full_matrices=False)
    ridge = 0.01 * moment.diagonal().mean() + 1e-12             # inputs of another kind count a little, too
    root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)))            # (N, N)
    up, values, down = torch.linalg.svd(moved @ root, full_matrices=False)
    return up, values, torch.linalg.solve_triangular(root, down, upper=False, left=False)


def _ranks(triples: dict[str, tuple[Tensor, Tensor, Tensor]], budget: int) -> dict[str, int]:
    """How many singular values of each matrix fit into `budget` bytes when the best for their bytes go first."""
    names = list(triples)
    if not names:
        return {}
    costs = {name: (len(up) + down.shape[1]) * STORED.itemsize for name, (up, _, down) in triples.items()}
    worth = torch.cat([values.square() / costs[name] for name, (_, values, _) in triples.items()])
    whose = torch.cat([torch.full((len(triples[name][1]),), i) for i, name in enumerate(names)])
    order = worth.argsort(descending=True)
    order = order[worth[order] > 0]
    spent = torch.tensor([costs[name] for name in names])[whose[order]].cumsum(0)
    taken = whose[order][spent <= budget].bincount(minlength=len(names))
    return dict(zip(names, taken.tolist(), strict=True))


def write_difference(file: Path, stored: Tensors, base_file: Path):
    """Not atomic by itself: for use inside `write_atomically`."""
    write_tensors(file, stored, STORED, metadata={"base": fingerprint_file(base_file)})


def check_base(file: Path, base_file: Path):
    """Raise CheckpointError unless the differences in `file` were taken from the tensors in `base_file`."""
    with open_tensors(file) as opened:
        wanted = opened.metadata.get("base")
    if wanted is None:
        raise CheckpointError(f"{file} does not say which base it belongs to; write it again with `train package`.")
    if fingerprint_file(base_file) != wanted:
        raise CheckpointError(f"{file} belongs to another base than {base_file}, whose weights have changed since; "
                              "train and ship it again with this base, or take both from one model.")


def restore_tensors(file: Path, module: nn.Module, base: Tensors) -> Tensors:
    """All tensors of `module`, which may be on the meta device, in float32: the base's plus the differences in `file`.

    `check_base` has said that it is the right base. Raises CheckpointError for a file that is missing or
    damaged, TensorMismatch for one that does not fit the module.
    """
    wanted = get_shapes(module)
    with open_tensors(file) as opened:
        forms = dict(_forms(opened.shapes, wanted))
        check_shapes(file, {name: shape for name, (_, shape) in forms.items()}, wanted)
        stored = copy_tensors(file, ((name, name, opened.read(name)) for name in opened.shapes), "cpu", torch.float32)
    whole = {}
    for name, (form, shape) in forms.items():
        if form == "":
            whole[name] = stored[name]
        elif form == "difference":
            whole[name] = base[name] + stored[f"{name}.difference"]
        else:
            whole[name] = base[name] + (stored[f"{name}.up"] @ stored[f"{name}.down"]).reshape(shape)
    return whole


def _forms(found: dict[str, tuple[int, ...]], wanted: dict) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """(name, (form, shape)) of the tensors that a file with such names and shapes gives."""
    for key, shape in found.items():
        name, _, form = key.rpartition(".")
        if key in wanted or form not in ("difference", "up", "down"):
            yield key, ("", shape)
        elif form == "difference":
            yield name, (form, shape)
        elif form == "up":
            down = found.get(f"{name}.down", (0, 0))
            full = wanted.get(name, ())
            fits = shape[1:] == down[:1] and full[:1] == shape[:1] and prod(full[1:]) == down[-1]
            yield name, (form, full if fits else (*shape, *down))
        elif f"{name}.up" not in found:
            yield key, ("", shape)                              # half of a pair: told as unexpected


def relative_error(tensors: Tensors, approximate: Tensors, base: Tensors) -> float:
    """|| tensors - approximate || / || tensors - base || over all tensors that the base has in the same shape."""
    shared = [name for name in tensors if name in base and base[name].shape == tensors[name].shape]
    lost = sum(float((tensors[name] - approximate[name]).double().square().sum()) for name in shared)
    moved = sum(float((tensors[name] - base[name]).double().square().sum()) for name in shared)
    return (lost / max(moved, 1e-30)) ** 0.5
