"""To look at and to play with: figures and widgets for the notebooks."""

from .architecture import architecture_diagram
from .figures import Drawing, portrait, show_images, step_strip
from .pad import DrawingPad, Stroke
from .widgets import PromptExplorer, StepSlider

__all__ = ["Drawing", "DrawingPad", "PromptExplorer", "StepSlider", "Stroke", "architecture_diagram", "portrait",
           "show_images", "step_strip"]
