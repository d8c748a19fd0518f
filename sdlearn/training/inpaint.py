"""Training the inpainting U-Net: the base, widened to nine channels, on scenes with a part missing.

B  batch    C, h, w  channels, rows and columns of the latent    H, W  pixels

It starts as the base: the weights of the five new channels, mask and masked latent, are zero, as they
were when Stable Diffusion was made to inpaint.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..config import ModelConfig
from ..data import SIDE, Scene, contact_sheet, draw_scene
from ..images import psnr, save_sheet, to_images, to_tensor
from ..inpaint import latent_mask, masked_pixels, nine_channels
from ..unet import UNet
from .unet import LatentCache, LatentRecipe

SHOWN = 12                      # unseen scenes on the sheet


# --- masks ------------------------------------------------------------------------------------------

def _rectangle(pen: ImageDraw.ImageDraw, rng: random.Random, drawn: Scene):
    width, height = rng.randint(24, 96), rng.randint(24, 96)
    left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=255)


def _blob(pen: ImageDraw.ImageDraw, rng: random.Random, drawn: Scene):
    """A few ellipses that hang together."""
    x, y = rng.randint(24, SIDE - 24), rng.randint(24, SIDE - 24)
    for _ in range(rng.randint(2, 5)):
        across, down = rng.randint(12, 32), rng.randint(12, 32)
        pen.ellipse((x - across, y - down, x + across, y + down), fill=255)
        x, y = x + rng.randint(-across, across), y + rng.randint(-down, down)


def _strokes(pen: ImageDraw.ImageDraw, rng: random.Random, drawn: Scene):
    """A brush, once or twice across, with round ends and corners."""
    for _ in range(rng.randint(1, 2)):
        half = rng.randint(6, 14)
        points = [(rng.randint(16, SIDE - 16), rng.randint(16, SIDE - 16)) for _ in range(rng.randint(2, 5))]
        pen.line(points, fill=255, width=2 * half)
        for x, y in points:
            pen.ellipse((x - half, y - half, x + half, y + half), fill=255)


def _box(pen: ImageDraw.ImageDraw, rng: random.Random, drawn: Scene):
    """One object's own box with some ground around it: to put another thing there, or to take it away."""
    left, top, right, bottom = rng.choice(drawn.objects).box
    some = rng.randint(2, 10)
    pen.rectangle((left - some, top - some, right + some, bottom + some), fill=255)


def _whole(pen: ImageDraw.ImageDraw, rng: random.Random, drawn: Scene):
    pen.rectangle((0, 0, SIDE, SIDE), fill=255)


# How often each is drawn. Stable Diffusion's inpainting model, too, was shown no image at all one time in four.
MASKS = {_rectangle: 0.2, _blob: 0.15, _strokes: 0.15, _box: 0.25, _whole: 0.25}


def random_mask(drawn: Scene, rng: random.Random) -> np.ndarray:
    """A mask for a scene, bool (H, W), True where the image is to be made anew; never empty, also in cells."""
    mask = Image.new("L", (SIDE, SIDE))
    kind, = rng.choices(tuple(MASKS), tuple(MASKS.values()))
    kind(ImageDraw.Draw(mask), rng, drawn)
    return np.asarray(mask) > 0


def first_object_mask(drawn: Scene) -> np.ndarray:
    """The mask of the report, bool (H, W): the first object's box, which is to be made anew from the caption."""
    mask = Image.new("L", (SIDE, SIDE))
    _box(ImageDraw.Draw(mask), random.Random(f"hole {drawn.seed}"), replace(drawn, objects=drawn.objects[:1]))
    return np.asarray(mask) > 0


def mask_tensor(masks) -> torch.Tensor:
    """Masks, bool (H, W) each, as (B, 1, H, W) of 0 and 1."""
    return torch.from_numpy(np.stack(masks)).float()[:, None]


# --- what is cached ---------------------------------------------------------------------------------

class MaskCache:
    """Masks (N, 1, h, w) and masked images' latents (N, C, h, w) for the rows of a LatentCache, on disk.

    Encoding the masked images of a whole batch takes about as long as training on it, so a row keeps its
    mask for a while: `refresh` gives some rows a new one. `seeds` says for which scene a row's mask was drawn;
    when the row has got another scene since, the mask no longer counts.
    """

    def __init__(self, folder: Path, cache: LatentCache, first: int = 600):
        self.cache = cache
        mine = folder / f"masked-{cache.meta['made_by']}"
        for other in folder.glob("masked-*"):           # of another autoencoder or world
            if other != mine:
                shutil.rmtree(other)
        mine.mkdir(parents=True, exist_ok=True)
        capacity, channels, *cells = cache.arrays["latents"].shape
        self.masks = self._array(mine / "masks.u8", np.uint8, (capacity, 1, *cells))
        self.masked = self._array(mine / "masked.f16", np.float16, (capacity, channels, *cells))
        self.seeds = self._array(mine / "seeds.i64", np.int64, (capacity,))           # the scene's plus one; 0: none
        self.seeds[~self.masked.any(axis=(1, 2, 3))] = 0        # never written out: see LatentCache
        generator = torch.Generator().manual_seed(0)
        if (missing := min(first, len(cache)) - len(self.rows())) > 0:
            for _ in tqdm(range(-(-missing // 30)), desc="masks", unit="mask", unit_scale=30):
                self.refresh(30, generator)

    @staticmethod
    def _array(file: Path, kind, shape: tuple[int, ...]) -> np.memmap:
        whole = file.exists() and file.stat().st_size == np.dtype(kind).itemsize * np.prod(shape)
        return np.memmap(file, kind, "r+" if whole else "w+", shape=shape)

    def rows(self) -> np.ndarray:
        """All rows whose mask belongs to their scene."""
        rows = np.arange(len(self.cache))
        return rows[self.seeds[rows] == self.cache.seeds(rows) + 1]

    @torch.no_grad()
    def refresh(self, count: int, generator: torch.Generator):
        """Draw new masks for `count` rows at random."""
        if count == 0:
            return
        rows = np.unique(self.cache.draw(count, generator))
        seeds = self.cache.seeds(rows)
        drawn = [draw_scene(seed, world=self.cache.world) for seed in seeds.tolist()]
        rng = random.Random(int(torch.randint(2**60, (), generator=generator)))
        mask = mask_tensor([random_mask(one, rng) for one in drawn])                 # (B, 1, H, W)
        vae = self.cache.vae
        pixels = to_tensor([one.image for one in drawn]).to(next(vae.parameters()).device)
        masked = vae.to_latent(masked_pixels(pixels, mask.to(pixels.device)))        # (B, C, h, w)
        self.seeds[rows] = 0                            # until both are written
        self.masks[rows] = latent_mask(mask, vae.config.factor).numpy()
        self.masked[rows] = masked.cpu().numpy()
        self.seeds[rows] = seeds + 1

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (B, 1, h, w) and masked latents (B, C, h, w) of rows (B,)."""
        return torch.from_numpy(self.masks[rows]).float(), torch.from_numpy(self.masked[rows]).float()


# --- the recipe -------------------------------------------------------------------------------------

def widen_unet(unet: UNet) -> UNet:
    """A U-Net that reads mask and masked latent, too, and pays no heed to them yet: its output is the base's."""
    latent = unet.config.out_channels
    wide = UNet(replace(unet.config, in_channels=2 * latent + 1))
    weights = unet.state_dict()
    conv = torch.zeros_like(wide.conv_in.weight)
    conv[:, :latent] = weights["conv_in.weight"]
    wide.load_state_dict({**weights, "conv_in.weight": conv})
    return wide.to(unet.conv_in.weight)


class InpaintRecipe(LatentRecipe):
    name = "inpaint"
    warmup = 100

    def __init__(self, config: ModelConfig, unet: UNet, *frozen, learning_rate: float = 3e-4, masks: int = 6,
                 first_masks: int = 600, **options):
        """`frozen` and other `options` as in `LatentRecipe`; `masks`: rows that get a new one at every step."""
        super().__init__(widen_unet(unet), config, *frozen, learning_rate=learning_rate, **options)
        self.masks = masks
        self.masked = MaskCache(self.cache.meta_file.parent, self.cache, first_masks)

    def draw(self, generator: torch.Generator) -> np.ndarray:
        self.masked.refresh(self.masks, generator)
        rows = self.masked.rows()
        return rows[torch.randint(len(rows), (self.batch_size,), generator=generator).numpy()]

    def extra_inputs(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        return self.masked.take(rows)

    def network(self, model, masks: torch.Tensor, masked: torch.Tensor) -> Callable:
        return nine_channels(model, masks, masked)

    @torch.no_grad()
    def report(self, averaged: UNet, folder: Path, step: int) -> dict[str, float]:
        """A sheet of unseen scenes, what of them is shown, and the results."""
        drawn = [draw_scene(seed, "test", self.world) for seed in range(SHOWN)]
        results = self.inpaint(averaged, drawn)
        sheet = contact_sheet(self.strips(drawn, results), [one.caption for one in drawn], columns=3)
        save_sheet(sheet, folder / f"{self.name}-{step:07d}.png")
        return {**self.known_psnr(drawn, results), **self.shuffled_conditioning_losses(averaged)}

    def strips(self, drawn: list[Scene], *images) -> list[np.ndarray]:
        """Each scene, what is shown of it and, at its right, the images made from that, uint8 (H, n W, 3)."""
        pixels, mask = to_tensor([one.image for one in drawn]), mask_tensor([first_object_mask(one) for one in drawn])
        shown = to_images(masked_pixels(pixels, mask))
        return [np.concatenate([one.image, *row], axis=1) for one, *row in zip(drawn, shown, *images, strict=True)]

    def inpaint(self, unet: UNet, drawn: list[Scene], steps: int = 20) -> np.ndarray:
        """Scenes whose `first_object_mask` was inpainted from the caption, uint8 (B, H, W, 3); nothing is pasted."""
        return self.sample(self.network(unet, *self.given(drawn)), [one.caption for one in drawn], steps)

    @torch.no_grad()
    def given(self, drawn: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (B, 1, h, w) and masked latents (B, C, h, w) of scenes with their `first_object_mask`."""
        device = self.empty.device
        mask = mask_tensor([first_object_mask(one) for one in drawn]).to(device)
        pixels = masked_pixels(to_tensor([one.image for one in drawn]).to(device), mask)
        masked = torch.cat([self.vae.to_latent(part) for part in pixels.split(16)])
        return latent_mask(mask, self.vae.config.factor), masked

    @torch.no_grad()
    def known_psnr(self, drawn: list[Scene], results: np.ndarray) -> dict[str, float]:
        """PSNR in dB of what was to stay as it is, in the results, and through the autoencoder alone."""
        pixels = to_tensor([one.image for one in drawn])
        known = 1 - mask_tensor([first_object_mask(one) for one in drawn])
        latents = self.vae.to_latent(pixels.to(self.empty.device))
        through = self.vae.to_pixels(latents, at_once=8).clamp(-1, 1).cpu()
        return {f"known_psnr{name}": float(psnr(made, pixels, where=known).mean())
                for name, made in (("", to_tensor(results)), ("_ceiling", through))}

    @torch.no_grad()
    def shuffled_conditioning_losses(self, unet: UNet, count: int = 64, step: int = 700) -> dict[str, float]:
        """The loss in the hole at one timestep, with the right captions and what is around it, and with the
        captions, then the surroundings, of other scenes: what is heard, and what is seen."""
        drawn = [draw_scene(1000 + seed, "test", self.world) for seed in range(count)]
        masks, masked = self.given(drawn)
        noisy, t, contexts, target = self.probe(drawn, step)
        figures = {}
        for name, context, around in (("right", contexts, masked), ("wrong", contexts.roll(1, dims=0), masked),
                                      ("unseen", contexts, masked.roll(1, dims=0))):
            error = F.mse_loss(nine_channels(unet, masks, around)(noisy, t, context), target, reduction="none")
            figures[f"{name}@{step}"] = float((error * masks).sum() / (masks.sum() * error.shape[1]))
        return figures
