"""To look at and to play with: figures and widgets for the notebooks."""

from .architecture import architecture_diagram
from .figures import Drawing, portrait, show_images, step_strip
from .widgets import PromptExplorer, StepSlider

__all__ = ["Drawing", "PromptExplorer", "StepSlider", "architecture_diagram", "portrait", "show_images", "step_strip"]
