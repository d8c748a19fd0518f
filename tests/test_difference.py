"""Fingerprints of weights, and differences to a base: what is stored of them within a budget of bytes."""

import json
import struct
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdlearn.checkpoint import CheckpointError
from sdlearn.checkpoint.difference import (
    SMALL,
    check_base,
    compute_difference,
    fingerprint_file,
    fingerprint_tensors,
    relative_error,
    restore_tensors,
    write_difference,
)

ONE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2, 3), "c.bias": torch.zeros(2)}


# --- fingerprints -----------------------------------------------------------------------------------

@pytest.mark.parametrize("other", [
    {"x.weight": ONE["a.weight"], "b.weight": ONE["b.weight"], "c.bias": ONE["c.bias"]},
    {"a.weight": ONE["b.weight"], "b.weight": ONE["a.weight"], "c.bias": ONE["c.bias"]},
    {**ONE, "a.weight": ONE["a.weight"].reshape(3, 2)}, {**ONE, "a.weight": ONE["a.weight"].flatten()},
    {**ONE, "c.bias": torch.zeros(2, dtype=torch.int32)}, {**ONE, "c.bias": torch.zeros(2, dtype=torch.float16)},
    {**ONE, "c.bias": torch.tensor([0, 1e-45])}, {**ONE, "a.weight": -ONE["a.weight"]},
    {**ONE, "d.bias": torch.zeros(0)}, {name: ONE[name] for name in ("a.weight", "b.weight")},
], ids=["a name", "names exchanged", "shape", "dimensions", "type of equal bits", "type", "one bit", "sign",
        "an empty tensor more", "a tensor less"])
def test_a_fingerprint_depends_on_names_types_shapes_and_values(other, tmp_path):
    assert fingerprint_tensors(other.items()) != fingerprint_tensors(ONE.items())
    for name, tensors in (("one", ONE), ("other", other)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
    one, other = fingerprint_file(tmp_path / "one"), fingerprint_file(tmp_path / "other")
    assert other != one == fingerprint_tensors(sorted(ONE.items()))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_fingerprint_does_not_depend_on_the_order_in_a_file(tmp_path, names):
    """Written by hand: safetensors' own writer sorts the tensors."""
    values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]}
                         for i, name in enumerate(names)}).encode()
    data = b"".join(values[name].numpy().tobytes() for name in names)
    (tmp_path / "one").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert fingerprint_file(tmp_path / "one") == fingerprint_tensors(values.items())


def test_a_fingerprint_does_not_depend_on_memory_layout():
    weight = torch.randn(4, 3, 5, 5)
    same = {"contiguous": weight, "channels last": weight.to(memory_format=torch.channels_last),
            "view": torch.cat([weight, weight])[:4], "parameter": nn.Parameter(weight.clone())}
    assert len({fingerprint_tensors([("conv", tensor)]) for tensor in same.values()}) == 1
    assert fingerprint_tensors([("conv", weight)]) == fingerprint_tensors([("conv", weight)])


# --- differences ------------------------------------------------------------------------------------

def low_rank(rows, columns, values, seed):
    """A matrix (rows, columns) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=generator))[0] for size in (rows, columns))
    return left @ torch.diag(torch.tensor(values)) @ right.T


@pytest.mark.parametrize("costly, cheap, budget, wanted", [
    ([1.2, 1.1, 0.9], [1.0, 0.9, 0.8, 0.1], 1152 + 3 * 256, (1, 3)), ([3.0], [1.0, 1.0, 1.0, 1.0], 1152, (1, 0)),
    ([1.2, 1.1, 0.9], [1.0, 0.9, 0.8, 0.1], 3 * 256, (0, 3))], ids=["both", "few large values", "the cheap one"])
def test_the_budget_goes_where_it_saves_most_error_for_its_bytes(costly, cheap, budget, wanted):
    """No other choice of two ranks within the same bytes has a smaller squared error."""
    moved = {"costly": low_rank(64, 512, costly, 0), "cheap": low_rank(64, 64, cheap, 1)}
    base = {name: torch.zeros_like(matrix) for name, matrix in moved.items()}
    bytes_of = {"costly": 2 * (64 + 512), "cheap": 2 * (64 + 64)}

    def error(ranks):
        """Of the best matrices of these ranks (Eckart and Young)."""
        return sum(float(torch.linalg.svdvals(moved[name])[rank:].square().sum()) for name, rank in ranks.items())

    kept = compute_difference(moved, base, budget)
    ranks = {name: kept[f"{name}.up"].shape[1] for name in moved}
    assert tuple(ranks.values()) == wanted
    allowed = [dict(zip(moved, each, strict=True)) for each in product(range(4), range(5))]
    allowed = [each for each in allowed if sum(bytes_of[name] * rank for name, rank in each.items()) <= budget]
    assert error(ranks) == min(map(error, allowed))
    left = sum(float((moved[name] - kept[f"{name}.up"] @ kept[f"{name}.down"]).square().sum()) for name in moved)
    assert left == pytest.approx(error(ranks), rel=1e-3)


def test_a_budget_is_kept_to_the_byte():
    moved = {"w": low_rank(64, 64, [3.0, 2.0, 1.0], 0)}
    base = {"w": torch.zeros(64, 64)}
    for budget, rank in ((255, 0), (256, 1), (511, 1), (512, 2), (10**6, 3)):
        kept = compute_difference(moved, base, budget)
        assert min(3, kept["w.up"].shape[1]) == rank == min(3, len(kept["w.down"])), budget


def test_small_and_new_tensors_are_stored_whole():
    side = int(SMALL**0.5)
    base = {"small": torch.ones(side, side), "large": torch.ones(side, side + 1), "long bias": torch.ones(2 * SMALL),
            "reshaped": torch.ones(4)}
    kept = compute_difference({name: torch.full_like(one, 3) for name, one in base.items()} | {
        "reshaped": torch.full((5,), 3.0), "new": torch.full((3,), 3.0)}, base, 10**6)
    assert set(kept) == {"small.difference", "large.up", "large.down", "long bias.difference", "reshaped", "new"}
    assert all(bool((kept[f"{name}.difference"] == 2).all()) for name in ("small", "long bias"))
    assert all(bool((kept[name] == 3).all()) for name in ("reshaped", "new"))


def network(seed):
    torch.manual_seed(seed)
    return nn.ModuleDict({"conv": nn.Conv2d(12, 16, 3), "linear": nn.Linear(40, 40), "norm": nn.LayerNorm(8)})


def test_a_network_is_restored_from_its_base_and_refused_with_another(tmp_path):
    base, trained = network(0).state_dict(), network(1).state_dict()
    save_file(base, tmp_path / "base")
    write_difference(tmp_path / "stored", compute_difference(trained, base, 10**6), tmp_path / "base")
    check_base(tmp_path / "stored", tmp_path / "base")
    with torch.device("meta"):
        again = restore_tensors(tmp_path / "stored", network(0), base)
    assert again.keys() == trained.keys()
    assert relative_error(trained, again, base) < 2e-3                              # that of float16
    renamed = {name.replace("norm", "other"): tensor for name, tensor in base.items()}
    for other in (trained, renamed):
        save_file(other, tmp_path / "other")
        with pytest.raises(CheckpointError, match="belongs to another base"):
            check_base(tmp_path / "stored", tmp_path / "other")


def test_the_relative_error_is_what_is_lost_of_what_has_moved():
    base = {"a": torch.full((4,), 10.0), "b": torch.full((2,), -5.0)}
    moved = {"a": torch.full((4,), 3.0), "b": torch.full((2,), 4.0)}                # squares: 36 and 32

    def of(**shares):
        """The base with these shares of what has moved."""
        return {name: base[name] + shares[name] * moved[name] for name in base}

    tensors = of(a=1, b=1)
    assert relative_error(tensors, tensors, base) == 0
    assert relative_error(tensors, base, base) == pytest.approx(1)
    assert relative_error(tensors, of(a=0.75, b=0.75), base) == pytest.approx(0.25)
    assert relative_error(tensors, of(a=1, b=0), base) == pytest.approx((32 / 68) ** 0.5)
    assert relative_error({**tensors, "new": torch.ones(3)}, {**tensors, "new": torch.zeros(3)}, base) == 0
