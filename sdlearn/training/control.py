"""Training ControlNets for a finished U-Net: outlines and depth, exact, from the scenes themselves.

B  batch    H, W  pixels

Latents and text features come from the U-Net's cache. A hint is drawn anew from its scene's seed whenever
it is wanted: that takes under a millisecond, a hundredth of what training on it takes, and no disk.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..config import ModelConfig
from ..controlnet import Control, ControlNet, add_control
from ..data import Scene, contact_sheet, draw_scene
from ..images import save_sheet, to_images, to_tensor
from ..unet import UNet
from .unet import LatentRecipe

HINTS: dict[str, Callable[[Scene], np.ndarray]] = {     # uint8 (H, W) of a scene
    "edges": lambda drawn: drawn.edge_map,
    "depth": lambda drawn: drawn.depth_map,
}
# Of the hint's network at full size, half, a quarter ...: 0.15 M parameters of the ControlNet's 7.6 M for three
# levels of halving. Lines and flat shades need no more; Stable Diffusion's (16, 32, 96, 256) has 0.5 M.
HINT_WIDTHS = (16, 32, 64, 64)
SHOWN = 12                      # unseen scenes on the sheet


def hint_widths(factor: int) -> tuple[int, ...]:
    """The widths for an autoencoder whose cells are `factor` pixels wide: one, and one for each halving."""
    halvings = factor.bit_length() - 1
    return (HINT_WIDTHS + HINT_WIDTHS[-1:] * halvings)[:halvings + 1]


def hint_tensor(maps) -> torch.Tensor:
    """Maps, uint8 (H, W) each, as hints (B, 3, H, W) in [0, 1]."""
    grey = torch.from_numpy(np.stack(maps)).float() / 255                            # (B, H, W)
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()                          # (B, 3, H, W)


class ControlRecipe(LatentRecipe):
    """A ControlNet for one kind of hint; the U-Net stays as it is.

    Half of the captions are dropped (Zhang et al. 2023, section 3.3). Where the caption says what is there,
    the U-Net alone does well and little is left to learn from the hint; without it the hint is all there
    is, so the copy learns to see what it shows and not only where lines are.
    """

    warmup = 50

    def __init__(self, config: ModelConfig, unet: UNet, *frozen, hint: str, dropout: float = 0.5,
                 learning_rate: float = 1e-3, **options):
        """`frozen` and other `options` as in `LatentRecipe`; `hint`: one of HINTS, and the stage's name."""
        net = ControlNet.from_unet(unet, hint_widths=hint_widths(config.vae.factor))
        super().__init__(net.requires_grad_(True), config, *frozen, dropout=dropout, learning_rate=learning_rate,
                         **options)
        self.name, self.hint_of = hint, HINTS[hint]
        self.unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def extra_inputs(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Hints (B, 3, H, W) of the rows' scenes."""
        return self.given([draw_scene(seed, world=self.world) for seed in self.cache.seeds(rows).tolist()])

    def given(self, drawn: list[Scene]) -> tuple[torch.Tensor, ...]:
        """Hints (B, 3, H, W) of scenes."""
        return hint_tensor([self.hint_of(one) for one in drawn]),

    def network(self, model, hints: torch.Tensor) -> Callable:
        return lambda x, t, context: self.unet(x, t, context, model(x, t, context, hints))

    @torch.no_grad()
    def report(self, averaged: ControlNet, folder: Path, step: int) -> dict[str, float]:
        """A sheet of hints, images with them and images without, the same noise for both; how far they agree."""
        drawn = [draw_scene(seed, "test", self.world) for seed in range(SHOWN)]
        captions = [one.caption for one in drawn]
        with_control, baseline = self.sample_with_control(averaged, drawn), self.sample(self.unet, captions)
        sheet = contact_sheet(self.strips(drawn, with_control, baseline), captions, columns=3)
        save_sheet(sheet, folder / f"{self.name}-{step:07d}.png")
        return {**self.agreement(drawn, with_control, baseline), **self.shuffled_hint_losses(averaged)}

    @torch.no_grad()
    def shuffled_hint_losses(self, net: ControlNet, count: int = 64, step: int = 700) -> dict[str, float]:
        """The loss at one timestep with the right hints, with those of other scenes, and with no ControlNet."""
        drawn = [draw_scene(1000 + seed, "test", self.world) for seed in range(count)]
        noisy, t, contexts, target = self.probe(drawn, step)
        hints, = (part.to(noisy.device) for part in self.given(drawn))
        networks = {"right": self.network(net, hints), "wrong": self.network(net, hints.roll(1, dims=0)),
                    "without": self.unet}
        return {f"{name}@{step}": float(F.mse_loss(network(noisy, t, contexts), target))
                for name, network in networks.items()}

    def strips(self, drawn: list[Scene], *images) -> list[np.ndarray]:
        """Each hint and, at its right, the images of its scene, uint8 (H, n W, 3)."""
        return [np.concatenate([np.stack([self.hint_of(one)] * 3, axis=2), *row], axis=1)
                for one, *row in zip(drawn, *images, strict=True)]

    def sample_with_control(self, net: ControlNet, drawn: list[Scene], steps: int = 20) -> np.ndarray:
        """Images of scenes' captions that follow their hints, uint8 (B, H, W, 3)."""
        control = Control(net, *(hints.to(self.empty.device) for hints in self.given(drawn)))
        return self.sample(add_control(self.unet, [control]), [one.caption for one in drawn], steps)

    @torch.no_grad()
    def agreement(self, drawn: list[Scene], with_control, baseline) -> dict[str, float]:
        """How well images with the hint and without agree with it, and the scenes' own through the autoencoder."""
        agree = {"edges": edge_f1, "depth": foreground_iou}[self.name]
        pixels = to_tensor([one.image for one in drawn]).to(self.empty.device)
        through = to_images(self.vae.to_pixels(self.vae.to_latent(pixels), at_once=8))
        return {f"{agree.__name__}_{name}": float(np.mean([agree(image, self.hint_of(one))
                                                           for image, one in zip(images, drawn, strict=True)]))
                for name, images in (("with_hint", with_control), ("without", baseline), ("ceiling", through))}


def edge_f1(image: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> float:
    """F1 of the edges of an image, uint8 (H, W, 3), against an edge map (H, W), above 0 where edges are.

    An edge pixel is right if there is one of the other map within `tolerance` pixels, diagonals included.
    """
    grey = image.astype(np.int32) @ np.array([77, 150, 29])                          # 256 times luminance
    found = np.zeros(grey.shape, bool)
    found[:, 1:] |= np.abs(np.diff(grey, axis=1)) > 256 * 40            # as `Scene.edge_map` has it
    found[1:] |= np.abs(np.diff(grey, axis=0)) > 256 * 40
    wanted = wanted > 0
    precision = (found & _grown(wanted, tolerance)).sum() / max(1, found.sum())
    recall = (wanted & _grown(found, tolerance)).sum() / max(1, wanted.sum())
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def foreground_iou(image: np.ndarray, depth: np.ndarray, jump: int = 40) -> float:
    """How far what stands out from the ground of an image, uint8 (H, W, 3), is where a depth map (H, W) is
    above 0: their intersection over their union. The ground is the commonest colour along the border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    found = (np.abs(image.astype(int) - np.median(border, axis=0)) > jump).any(axis=2)
    return float((found & (depth > 0)).sum() / max(1, (found | (depth > 0)).sum()))


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask (H, W) and all pixels around it."""
    grown = F.max_pool2d(torch.from_numpy(mask).float()[None], 2 * pixels + 1, stride=1, padding=pixels)
    return grown[0].numpy() > 0
