"""What a figure was measured on, and the most that this machine could do.

FLOP/s  floating-point operations a second; a multiplication and its addition are two    B/s  bytes a second
"""

import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version

import torch

from ..training.card import cpu_name


@dataclass(frozen=True)
class Peak:
    """The most of a GPU. flops: dense bfloat16 on tensor cores, FLOP/s. bandwidth: of its memory, B/s."""

    flops: float
    bandwidth: float


# From the makers' data sheets: dense, without sparsity; the cards of servers in their SXM form; of the T4, which has
# no bfloat16, the figure of float16. A name is sought in the one that the driver gives; the first that is there counts.
PEAKS = {
    "H200": Peak(989e12, 4.8e12), "H100": Peak(989e12, 3.35e12), "A100": Peak(312e12, 2.04e12),
    "L40S": Peak(362e12, 0.864e12), "L4": Peak(121e12, 0.3e12), "RTX 4090": Peak(165e12, 1.01e12),
    "T4": Peak(65e12, 0.32e12),
}


def peak_of(name: str) -> Peak | None:
    """The peak of a GPU by its driver's name, None for one that is not in the table, or a CPU."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def machine(device: str) -> dict:
    """Name, threads, date and versions, as they stand beside every figure."""
    gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if gpu else cpu_name()
    peak = peak_of(name) if gpu else None
    return {"machine": name, **({"peak TFLOP/s, bfloat16": peak.flops / 1e12} if peak else {}),
            "threads": torch.get_num_threads(), "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in (
                "sdlearn", "torch", "diffusers")}}}
