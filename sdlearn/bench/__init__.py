"""How long an image takes: side by side with diffusers, and rung by rung from the plain loop to the fast one.

    python -m sdlearn bench --preset mini --steps 20 --against diffusers
    python -m sdlearn ladder --preset sd15 --device cuda
"""

from .ladder import Rung, climb, rungs_for
from .race import CONTENDERS, SAMPLERS, ImagesDiffer, Race, run

__all__ = ["CONTENDERS", "SAMPLERS", "ImagesDiffer", "Race", "Rung", "climb", "run", "rungs_for"]
