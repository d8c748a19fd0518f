"""Settings that all tests share: no network, the same numbers every time, no clock."""

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")    # read by huggingface_hub, and by the notebooks' kernels
# Nor does a run of the tests count as a learner's progress.
os.environ.setdefault("SDLEARN_PROGRESS", os.path.join(tempfile.mkdtemp(prefix="sdlearn-"), "progress.json"))

# Tests run in several processes (pytest-xdist): each, and the kernels that it starts, gets its share of the cores.
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

# A loaded machine is slow, not wrong: hypothesis measures no time here.
settings.register_profile(
    "sdlearn", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("sdlearn")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seed, whichever ran before it."""
    torch.manual_seed(0)
