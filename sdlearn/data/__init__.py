"""OpenMoji scenes: images, captions and exact layouts from a seed, with no download."""

from .captions import vocabulary, with_article
from .scenes import SIDE, Placed, Scene, scene, scene_of, scenes
from .sheet import contact_sheet
from .world import BACKGROUNDS, COLOURS, CORE, FULL, OBJECTS, UNTAUGHT, WORLDS, World

__all__ = ["BACKGROUNDS", "COLOURS", "CORE", "FULL", "OBJECTS", "SIDE", "UNTAUGHT", "WORLDS", "Placed", "Scene",
           "World", "contact_sheet", "scene", "scene_of", "scenes", "vocabulary", "with_article"]
