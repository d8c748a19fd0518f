"""What becomes of a mask in the latent, nine channels side by side, and a pad to paint the mask on.

H, W  pixels    h, w  cells of the latent
"""

import html
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from ipywidgets import HTML, BoundedIntText, Button, Dropdown, FloatSlider, HBox, IntSlider, VBox
from PIL import Image as Images
from torch import Tensor

from ..images import to_images, to_tensor
from ..inpaint import latent_mask, paste
from ..pipeline import PromptWarning, StableDiffusion
from .figures import Drawing, show_images
from .latents import channel_maps, enlarged, heat
from .pad import DrawingPad, Stroke
from .widgets import WithStill

BOTH, LEFT, MORE = (90, 75, 176), (209, 60, 60), (240, 170, 60)     # see `cell_map`
SEEN_THROUGH = 0.6
GRID = 0.12             # how much darker the lines between cells are
KEPT = 4                # images that stay to compare with
NINE, BLENDED = "nine channels", "blended"
RESAMPLED = 4


def cell_map(image, mask, factor: int) -> np.ndarray:
    """An image (H, W, 3) under its mask (H, W) and the mask that is left in the latent, uint8 (H, W, 3).

    Violet: in the mask, and in a cell that is repainted. Red: in the mask, in a cell that is not. Yellow: not in the
    mask, and repainted all the same. Lines part the cells, factor x factor pixels. A mask of which nothing is left
    is shown red.
    """
    pixels, asked = np.asarray(image, float), np.asarray(mask) > 0
    try:
        cells = latent_mask(torch.from_numpy(asked).float()[None, None], factor)[0, 0].numpy() > 0
    except ValueError:
        cells = np.zeros([side // factor for side in asked.shape], bool)
    done = cells.repeat(factor, axis=0).repeat(factor, axis=1)
    for colour, where in ((BOTH, asked & done), (LEFT, asked & ~done), (MORE, done & ~asked)):
        pixels = np.where(where[..., None], pixels * (1 - SEEN_THROUGH) + np.array(colour) * SEEN_THROUGH, pixels)
    lines = np.zeros(asked.shape, bool)
    lines[::factor] = lines[:, ::factor] = True
    return np.where(lines[..., None], pixels * (1 - GRID), pixels).round().astype(np.uint8)


def nine_maps(x: Tensor, mask: Tensor, masked_latent: Tensor, *, title: str) -> Drawing:
    """What an inpainting U-Net reads, channel by channel: x (4, h, w), mask (1, h, w), masked_latent (4, h, w)."""
    shown = [*channel_maps(x), enlarged(heat(mask[0], 0, 1, "gray")), *channel_maps(masked_latent)]
    count = len(x)
    names = [*(f"{i}: noisy latent" for i in range(count)), f"{count}: mask",
             *(f"{count + 1 + i}: masked latent" for i in range(len(masked_latent)))]
    return show_images(shown, names, title=title, columns=len(shown))


class InpaintExplorer(WithStill):
    """Paint a mask over an image with the mouse, say what is to be there, choose how; the last images stay.

    base, nine: the model as it is, and the one that reads nine channels. "Go on from it" takes the last image as
    the one to paint on. The image of the first strokes is drawn at once. What no image can be made with is told
    beneath the pad; nothing is raised.
    """

    def __init__(self, base: StableDiffusion, nine: StableDiffusion, image, prompt: str,
                 strokes: Sequence[Stroke] = (), *, steps: int = 12, guidance: float = 3.0):
        wide = {"style": {"description_width": "70px"}}
        self.ways = {NINE: (nine, 1), BLENDED: (base, 1), f"{BLENDED}, {RESAMPLED} times": (base, RESAMPLED)}
        self.given = {"num_inference_steps": steps, "guidance_scale": guidance}
        self.way = Dropdown(options=list(self.ways), description="how", **wide)
        self.strength = FloatSlider(1, min=0.2, max=1, step=0.1, description="strength", **wide)
        self.seam = IntSlider(3, min=0, max=12, description="seam", **wide)
        self.seed = BoundedIntText(0, min=0, max=2**31 - 1, description="seed", **wide)
        self.on = Button(description="Go on from it", icon="arrow-up")
        self.on.on_click(lambda _: self.go_on())
        self.message = HTML()
        self.rows: list[tuple[str, Images.Image]] = []            # the newest first
        super().__init__([])
        self._open(image, prompt, strokes)

    def _open(self, image, prompt: str, strokes: Sequence[Stroke] = ()):
        self.ground = np.array(Images.fromarray(np.asarray(image)).convert("RGB"))       # (H, W, 3)
        self.pad = DrawingPad(self.ground, width=16, prompt=prompt, make=self.make, strokes=strokes,
                              title="A mask painted by hand, and what is made of it")
        self.children = [self.pad, HBox([VBox([self.way, self.strength]), VBox([self.seam, self.seed]), self.on]),
                         self.message]

    def make(self, drawn: np.ndarray, prompt: str) -> Images.Image:
        """The image with what was drawn, (H, W), made anew, and the original pasted back. Raises ValueError."""
        model, times = self.ways[self.way.value]
        more = {"resample": times, "sampler": "euler"} if times > 1 else {}        # one that does not look back
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            [made] = model.inpaint(prompt, self.ground, drawn, strength=self.strength.value, seed=self.seed.value,
                                   **self.given, **more)
        self.message.value = "<br>".join(html.escape(said) for _, said in model.prompt_warnings(prompt))
        mask = torch.from_numpy(drawn > 0).float()[None, None]                       # (1, 1, H, W)
        pasted = paste(to_tensor([self.ground]), to_tensor([np.asarray(made)]), mask, seam=self.seam.value)
        image = Images.fromarray(to_images(pasted)[0])
        self.rows = [(f"{prompt}; {self.way.value}, strength {self.strength.value:g}", image), *self.rows][:KEPT]
        return image

    def go_on(self):
        """Paint on the last image from now on."""
        if self.rows:
            self._open(self.rows[0][1], self.pad.prompt.value)

    def still(self) -> Drawing:
        seen = Images.fromarray(self.pad._seen())
        return show_images([seen, *(image for _, image in self.rows)], ["painted", *(said for said, _ in self.rows)],
                           title=self.pad.title, columns=1 + len(self.rows))
