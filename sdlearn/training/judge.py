"""Training the judge: an object detector that sees scenes alone, never an image that a model made."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageFilter
from torch import Tensor

from ..data import COLOURS, FULL, OBJECTS, Scene, World, compose_scene, draw_scene
from ..evaluation.accuracy import measure_on_scenes
from ..evaluation.detector import Detector, Targets, detection_loss
from ..images import save_sheet, to_tensor

SEEN_FROM = 2**20       # seeds of training scenes start here; those below are for measuring


def draw_uniform_scene(seed: int, world: World = FULL) -> Scene:
    """A scene in which every combination is as likely as any other, those that the model's training leaves out
    included: the judge may have no opinion on whether an apple can be blue."""
    rng = random.Random(f"sdlearn judge {seed}")
    number = rng.choice((1, 2, 2, 3))
    names = [rng.choice(world.objects)] * number if rng.random() < 0.25 else rng.choices(world.objects, k=number)
    alike = rng.random() < 0.5                      # so that colours of equal things are equal half of the time
    drawn = {}
    colours = []
    for name in names:
        colour = rng.choice((None, *COLOURS)) if OBJECTS[name].tintable else None
        colours.append(drawn.setdefault(name, colour) if alike else colour)
    return compose_scene(names, colours=colours, seed=seed)


def add_distractor_blobs(image: np.ndarray, masks: np.ndarray, seed: int) -> np.ndarray:
    """A scene uint8 (H, W, 3) with blobs behind its objects: outlined, in the objects' colours, and nothing.

    A model that has not learnt much draws such things, and a judge that has never seen any takes them for whatever
    comes nearest. masks: bool (objects, H, W), what of each object can be seen.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]

    def smooth(cells: int) -> np.ndarray:
        coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))

    field = smooth(rng.integers(3, 9))
    inside = field > np.quantile(field, rng.uniform(0.75, 0.97))                      # (H, W)
    around = np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    palette = [ImageColor.getrgb(tint) for tints in COLOURS.values() for tint in tints] + [(255, 255, 255)]
    first, second = (np.array(palette[i], np.float32) for i in rng.integers(len(palette), size=2))
    share = (smooth(rng.integers(3, 9)) > rng.uniform(0, 2))[..., None]
    ground = ~masks.any(axis=0)
    littered = np.where((around & ground)[..., None], 0, image)
    return np.where((inside & ground)[..., None], np.where(share, second, first), littered).astype(np.uint8)


def blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """(B, 3, H, W), each image blurred by a Gaussian of its own `sigma` (B,), in pixels."""
    reach = torch.arange(-3.0, 4.0, device=pixels.device)
    kernel = (-reach ** 2 / (2 * sigma[:, None] ** 2)).exp()                          # (B, 7)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)   # (3B, 7)
    flat = F.pad(pixels.flatten(0, 1)[None], (3, 3, 3, 3), mode="replicate")          # (1, 3B, H+6, W+6)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(pixels)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes (B, 3, H, W) with what an autoencoder may do to them, and somewhat more: blur, noise of fine and of
    coarse grain, and shifts of colour. So the judge looks at what is drawn, not at how crisply."""
    count, _, height, width = pixels.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def noise(grain: int, high: float) -> Tensor:
        small = torch.randn(count, 3, -(-height // grain), -(-width // grain), generator=generator)
        grown = F.interpolate(small, (height, width), mode="bilinear") if grain > 1 else small
        return uniform(0, high, count, 1, 1, 1) * grown

    pixels = blur(pixels, uniform(0.2, 1.3, count))
    pixels = pixels * uniform(0.9, 1.06, count, 1, 1, 1) + uniform(-0.06, 0.06, count, 3, 1, 1)
    return (pixels + noise(1, 0.06) + noise(4, 0.08)).clamp(-1, 1)


class JudgeRecipe:
    name = "judge"
    warmup = 100
    decay_share = 0.4

    def __init__(self, *, model: Detector | None = None, world: World = FULL, batch_size: int = 32,
                 learning_rate: float = 2e-3):
        self.model = model or Detector()
        self.world, self.batch_size, self.learning_rate = world, batch_size, learning_rate

    def batch(self, generator: torch.Generator):
        seeds = torch.randint(SEEN_FROM, 2**40, (self.batch_size,), generator=generator).tolist()
        drawn = [(draw_scene if i % 2 else draw_uniform_scene)(seed, world=self.world) for i, seed in enumerate(seeds)]
        drawn = [replace(one, objects=()) if one.seed % 100 < 6 else one for one in drawn]      # blobs alone
        pixels = to_tensor([self._image(one) for one in drawn])
        crisp = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.25          # so that clean scenes stay easy
        return torch.where(crisp, pixels, augment(pixels, generator)), *self.model.targets(drawn)

    def _image(self, one: Scene) -> np.ndarray:
        return add_distractor_blobs(one.image, one.masks, one.seed) if one.seed % 10 < 3 else one.image

    def loss(self, model, pixels, *targets):
        return detection_loss(model(pixels), Targets(*targets))

    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        figures, sheet = measure_on_scenes(averaged)
        save_sheet(sheet, folder / f"{self.name}-{step:07d}.png")
        return figures
