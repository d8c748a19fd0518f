"""How many threads a CPU is given.

PyTorch starts a thread for each core that it sees. In a container it sees all cores of the machine, of which the
container may be allowed a few; threads that are not allowed to run are waited for, and images take many times as
long. So there are never more threads than CPUs that may be used.
"""

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")     # the user's own choice, which stays


def allowed_cpus(root: Path = CGROUP) -> float | None:
    """CPUs that a container's quota allows, 1.5 for instance; None where there is no quota, or no Linux."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):     # of version 2, and of 1
        try:
            quota, period = " ".join((root / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def fit_threads(root: Path = CGROUP) -> int:
    """Lower PyTorch's number of threads to the CPUs that are allowed; never raise it. The number that it is now."""
    allowed = allowed_cpus(root)
    if allowed is not None and not any(os.environ.get(name) for name in CHOSEN):
        fitting = max(1, round(allowed))
        if fitting < torch.get_num_threads():
            torch.set_num_threads(fitting)
    return torch.get_num_threads()
