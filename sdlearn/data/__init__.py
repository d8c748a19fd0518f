"""OpenMoji scenes: images, captions and exact layouts from a seed, with no download."""

from .captions import vocabulary, with_article
from .scenes import SIDE, PlacedObject, Scene, compose_scene, draw_scene, draw_scenes
from .sheet import contact_sheet
from .world import BACKGROUNDS, COLOURS, CORE, FULL, OBJECTS, UNTAUGHT, WORLDS, World

__all__ = ["BACKGROUNDS", "COLOURS", "CORE", "FULL", "OBJECTS", "SIDE", "UNTAUGHT", "WORLDS", "PlacedObject", "Scene",
           "World", "contact_sheet", "draw_scene", "compose_scene", "draw_scenes", "vocabulary", "with_article"]
