"""Ablations: what happens when one thing is left out or changed, all else equal.

    base = StableDiffusion.load()
    plan = Plan(steps=200, batch=32, scenes=1500, unseen=64, prompts=10, sampling_steps=20)
    for variant in ABLATIONS["dropout"].variants(base, plan):
        for measurement in variant.run():
            ...

The results that are shipped with the package: `load_ablation("steps")`.
"""

from .ablation import Ablation, Measurement, Plan, Variant
from .buckets import BUCKET_TUNING
from .concept import CONCEPT
from .dropout import DROPOUT
from .factor import FACTOR
from .measuring import check_model
from .pixels import PIXELS
from .running import RESULTS, default_minutes, load_ablation, load_or_fit_plan, run_ablation, write_results
from .sizes import SIZES
from .steps import STEPS
from .zero_conv import ZERO_CONV

ABLATIONS: dict[str, Ablation] = {one.name: one for one in (DROPOUT, FACTOR, PIXELS, ZERO_CONV, STEPS, SIZES,
                                                         BUCKET_TUNING, CONCEPT)}

__all__ = ["ABLATIONS", "RESULTS", "Ablation", "Measurement", "Plan", "Variant", "check_model", "default_minutes",
           "load_ablation", "load_or_fit_plan", "run_ablation", "write_results"]
