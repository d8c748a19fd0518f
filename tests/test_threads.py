"""PyTorch gets no more threads than a container's quota of CPUs."""

import pytest
import torch

from sdlearn.pipeline.threads import allowed_cpus, fit_threads


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quota(root, version, text):
    if version == 2:
        (root / "cpu.max").write_text(text)
    else:
        (root / "cpu").mkdir()
        for name, value in zip(("cpu.cfs_quota_us", "cpu.cfs_period_us"), text.split(), strict=True):
            (root / "cpu" / name).write_text(f"{value}\n")
    return root


@pytest.mark.parametrize(("version", "text", "cpus"), [
    (2, "150000 100000\n", 1.5), (2, "max 100000\n", None), (1, "400000 100000", 4.0), (1, "-1 100000", None),
    (2, "something else\n", None), (2, "", None), (2, "1 0", None),
])
def test_a_containers_quota_is_read(tmp_path, version, text, cpus):
    assert allowed_cpus(tmp_path) is None
    assert allowed_cpus(quota(tmp_path, version, text)) == cpus


@pytest.mark.parametrize(("text", "before", "after"), [
    ("200000 100000", 6, 2), ("150000 100000", 6, 2), ("20000 100000", 6, 1), ("800000 100000", 3, 3),
    ("max 100000", 5, 5),
])
def test_threads_are_lowered_to_it_and_never_raised(tmp_path, text, before, after):
    torch.set_num_threads(before)
    assert fit_threads(quota(tmp_path, 2, text)) == after == torch.get_num_threads()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_own_choice_stays(tmp_path, monkeypatch, name):
    """Set in either of the variables that PyTorch reads; an empty one is no choice."""
    torch.set_num_threads(6)
    root = quota(tmp_path, 2, "100000 100000")
    monkeypatch.setenv(name, "6")
    assert fit_threads(root) == 6
    monkeypatch.setenv(name, "")
    assert fit_threads(root) == 1
