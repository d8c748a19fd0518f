"""How many steps a sampler needs until the image shows what was asked: the ablation `steps`, as a panel of curves."""

from collections.abc import Sequence

from ..ablations import load_ablation
from .curves import Panel


def judged_by_steps(names: Sequence[str]) -> Panel:
    """The share of prompts of which the judge says that their image is right, over calls of the U-Net with the
    prompt, a line for each sampler in `names`.

    Raises KeyError for a sampler that was not measured, and what `load_ablation` raises.
    """
    found = load_ablation("steps")
    lines = {}
    for name in names:
        one = found["variants"][name]
        readings, calls = one["measurements"], one["changed"]["calls of the U-Net a step"]
        lines[name] = [calls * reading["step"] for reading in readings], [reading["right"] for reading in readings]
    return Panel(f"judged right, measured {found['date']}", "calls of the U-Net", "share of prompts", lines, log="x")
