"""Peaks of GPUs: the most arithmetic and the most memory traffic that a chip can do.

FLOP/s  floating-point operations a second; a multiplication and its addition are two    B/s  bytes a second
"""

from dataclasses import dataclass

from ..machine import describe_environment


@dataclass(frozen=True)
class Peak:
    """Peaks of a GPU. flops: dense bfloat16 on tensor cores, FLOP/s. bandwidth: of its memory, B/s."""

    flops: float
    bandwidth: float


# From the makers' data sheets: dense, without sparsity; server cards in their SXM form; for the T4, which has no
# bfloat16, the figure of float16. A key is looked for in the driver's name of the GPU; the first one found counts.
PEAKS = {
    "H200": Peak(989e12, 4.8e12), "H100": Peak(989e12, 3.35e12), "A100": Peak(312e12, 2.04e12),
    "L40S": Peak(362e12, 0.864e12), "L4": Peak(121e12, 0.3e12), "RTX 4090": Peak(165e12, 1.01e12),
    "T4": Peak(65e12, 0.32e12),
}


def find_peak(name: str) -> Peak | None:
    """The peak of a GPU by its driver's name; None for a GPU that is not in the table, and for a CPU."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def describe_machine(device: str) -> dict:
    """`describe_environment` with diffusers' version and the GPU's peak, written with every benchmark."""
    found = describe_environment(device, ("sdlearn", "torch", "diffusers"))
    peak = find_peak(found["machine"]) if device.startswith("cuda") else None
    return found | ({"peak TFLOP/s, bfloat16": peak.flops / 1e12} if peak else {})
