"""How long an image takes: side by side with diffusers, and from the plain sampling loop to the fast one, step by step.

    python -m sdlearn bench --preset mini --steps 20 --against diffusers
    python -m sdlearn optimizations --preset sd15 --device cuda
"""

from .comparison import IMPLEMENTATIONS, SAMPLERS, Benchmark, ImagesDiffer, run_benchmark
from .optimizations import OptimizationStep, list_steps, run_steps

__all__ = ["IMPLEMENTATIONS", "SAMPLERS", "Benchmark", "ImagesDiffer", "OptimizationStep", "list_steps",
           "run_benchmark", "run_steps"]
