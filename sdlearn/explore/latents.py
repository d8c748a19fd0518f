"""Latents to look at: spectra, channels as maps, text drawn small; a widget that edits a latent and decodes it.

B  images        Z  channels of the latent        H, W  pixels        h, w  rows and columns of a latent
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from ipywidgets import Dropdown, FloatSlider, HBox, Image, IntSlider, Layout, Text
from matplotlib import colormaps
from PIL import Image as Images
from PIL import ImageDraw, ImageFont
from torch import Tensor, nn

from ..data import BACKGROUNDS, SIDE, Scene
from ..images import psnr, to_images, to_tensor
from ..vae import VAE, DiagonalGaussian
from .figures import Drawing, _grid, portrait, show_images
from .widgets import WithStill

BANDS = 16              # of a spectrum


# --- numbers ------------------------------------------------------------------------------------------

def rings(height: int, width: int) -> Tensor:
    """How fast each entry of an image's Fourier transform waves, (H, W): 0 the mean, 1 the fastest, along rows or
    along columns, whichever is more. All entries up to r are r squared of the numbers, as in a picture of r times
    the side."""
    along = [2 * torch.fft.fftfreq(side).abs() for side in (height, width)]
    return torch.maximum(along[0][:, None], along[1])


def low_pass(pixels: Tensor, limit: float) -> Tensor:
    """Images (B, 3, H, W) without all that waves faster than `limit`, in 0...1 of the fastest."""
    kept = rings(*pixels.shape[2:]) <= limit
    return torch.fft.ifft2(torch.fft.fft2(pixels) * kept).real


def spectrum(pixels: Tensor, bands: int = BANDS) -> tuple[Tensor, Tensor]:
    """Middles of `bands` equal bands of 0...1, and the variance that images (B, 3, H, W) have in each, (bands,).

    They sum up to the mean square of the images' deviation from the mean colour of each. Parseval: the sum of
    squares of the transform is that of the image times the number of pixels.
    """
    height, width = pixels.shape[2:]
    power = torch.zeros(height, width, dtype=torch.double)
    for image in pixels:                                              # one by one: complex doubles are large
        power += torch.fft.fft2(image.double()).abs().square().mean(dim=0) / (height * width) ** 2 / len(pixels)
    power[0, 0] = 0                                                     # the mean colour
    place = (rings(height, width) * bands).ceil().long().clamp(1, bands) - 1
    found = torch.zeros(bands, dtype=power.dtype).index_add(0, place.flatten(), power.flatten())
    return (torch.arange(bands) + 0.5) / bands, found


def linear_probe(known: Tensor, classes: Tensor, asked: Tensor, *, penalty: float = 0.1) -> Tensor:
    """The class that a linear map gives to each of `asked` (M, ...), (M,) of int: ridge regression on `known` (N, ...),
    whose classes are (N,), towards one-hot targets.

    Every number is brought to mean 0 and variance 1 over `known`, and all of them together to length 1 on average, so
    that one penalty suits inputs of any size.
    """
    mean, std = known.flatten(1).mean(dim=0), known.flatten(1).std(dim=0) + 1e-6
    fit, test = (((one.flatten(1) - mean) / std).double() / len(mean) ** 0.5 for one in (known, asked))
    targets = F.one_hot(classes).double()                                   # (N, classes)
    alike = fit @ fit.T + 1                                                 # the 1 is what a bias adds
    weights = torch.linalg.solve(alike + penalty * torch.eye(len(fit), dtype=torch.double), targets)
    return ((test @ fit.T + 1) @ weights).argmax(dim=1)


def kept_bytes(network: nn.Module, *inputs) -> int:
    """Bytes of what a pass of the network keeps for the way back, each tensor once, parameters not counted: the memory
    that training takes beyond that of sampling, up to what is made and dropped on the way."""
    parameters = {one.untyped_storage().data_ptr() for one in network.parameters()}
    found: dict[int, int] = {}
    held = []                       # so that no two tensors have one address after the other

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(*inputs)
    return sum(found.values())


def reach(encode: Callable[[Tensor], DiagonalGaussian], pixels: Tensor, cell: tuple[int, int] | None = None) -> Tensor:
    """How much a cell of the latent of an image (1, 3, H, W) depends on each pixel, (H, W), 1 where it does most.

    cell: its row and column; the middle one by default. The gradient of the cell's squares, its magnitude summed over
    the colours; 1e-9 at the least, so that it has a logarithm.
    """
    with torch.enable_grad():
        given = pixels.detach().clone().requires_grad_()
        [mean] = encode(given).mean                                         # (Z, h, w)
        row, column = cell or (mean.shape[1] // 2, mean.shape[2] // 2)
        [gradient] = torch.autograd.grad(mean[:, row, column].square().sum(), given)
    seen = gradient.abs().sum(dim=1)[0]                                     # (H, W)
    return (seen / seen.max()).clamp(min=1e-9)


def colour_read(norm: Callable, groups: int, channels: int = 16) -> float:
    """The share of a flat map's colour that a linear map reads off after group normalisation: 1 all of it, 0 nothing.

    norm: `norm(x, groups, weight, bias)`. 512 colours are mixed into the channels; half of them fit the map, the
    others measure it.
    """
    draw = torch.Generator().manual_seed(0)
    colours = 2 * torch.rand(512, 3, generator=draw) - 1
    flat = (colours @ torch.randn(3, channels, generator=draw))[..., None, None]            # (512, C, 1, 1)
    after = norm(flat, groups, torch.ones(channels), torch.zeros(channels))
    x = F.pad(after[:, :, 0, 0], (0, 1), value=1.0)                                         # (512, C+1)
    off = x[256:] @ torch.linalg.lstsq(x[:256], colours[:256], driver="gelsd").solution - colours[256:]
    return max(0.0, 1 - (off.square().mean() / colours.var()).item())


def letters_read(through: Callable[[Tensor], Tensor], height: int) -> float:
    """The share of the 26 letters, each between two n and `height` pixels tall, that are still read right after
    `through`, which maps images (B, 3, H, W) to such. Read right: nearer to its own clean image than to the other
    25."""
    texts = [written(f"n{chr(97 + i)}n", height, 96, 64, place=(47, 30)) for i in range(26)]
    clean = to_tensor(texts)                                                                # (26, 3, 64, 96)
    nearest = torch.cdist(through(clean).flatten(1), clean.flatten(1)).argmin(dim=1)
    return (nearest == torch.arange(26)).double().mean().item()


def face_error(through: Callable[[Tensor], Tensor], name: str, size: int) -> float:
    """The squared error that `through` makes on the pixels of a face of `size` pixels, in the middle of images of
    four colours, as a share of the face's variance."""
    clean = to_tensor([framed(portrait(name, None, rgb, size)) for rgb in list(BACKGROUNDS.values())[:4]])
    own = slice((SIDE - size) // 2, (SIDE + size) // 2)
    there, after = (some[:, :, own, own] for some in (clean, through(clean)))
    return ((after - there).square().mean() / there.var(dim=(2, 3)).mean()).item()


# --- images -----------------------------------------------------------------------------------------

def framed(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A square image in the middle of a larger one, (side, side, 3), whose ground is that of its edge."""
    rim = side - image.shape[0]
    pad = (rim // 2, rim - rim // 2)
    return np.pad(image, (pad, pad, (0, 0)), mode="edge")


def written(text: str, size: int, width: int = 64, height: int = 64, *, ink=(0, 0, 0), paper=(255, 255, 255),
            place: tuple[float, float] | None = None) -> np.ndarray:
    """An image, uint8 (H, W, 3), with `text` in letters of `size` pixels around `place`, its middle by default."""
    image = Images.new("RGB", (width, height), paper)
    ImageDraw.Draw(image).text(place or (width / 2, height / 2), text, fill=ink, anchor="mm",
                                 font=ImageFont.load_default(size))
    return np.asarray(image)


def heat(values: Tensor, low: float | None = None, high: float | None = None, colours: str = "magma") -> np.ndarray:
    """Numbers (h, w) as an image in colours, uint8 (h, w, 3): low...high, by default from the least to the largest."""
    values = values.detach().double()
    low, high = float(values.min()) if low is None else low, float(values.max()) if high is None else high
    share = ((values - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    return (255 * colormaps[colours](share)[..., :3]).round().astype(np.uint8)


def enlarged(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Each number a square, up to rows of `side` pixels."""
    times = max(1, side // image.shape[0])
    return image.repeat(times, axis=0).repeat(times, axis=1)


def channel_maps(latent: Tensor) -> list[np.ndarray]:
    """The channels of a latent (Z, h, w) as images, blue below zero and red above, white at zero."""
    reach = float(latent.abs().max())
    return [enlarged(heat(one, -reach, reach, "RdBu_r")) for one in latent]


def latent_sheet(rows: Mapping[str, tuple[np.ndarray, Tensor, Sequence[np.ndarray]]], heads: Sequence[str] = (), *,
                 title: str) -> Drawing:
    """By name, rows of an image (H, W, 3), the channels of its latent (Z, h, w), and more images at the end.

    heads: what the images at the end are. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("there is nothing to show: give at least one row")
    images, captions = [], []
    for place, (image, latent, more) in enumerate(rows.values()):
        images += [image, *channel_maps(latent), *more]
        named = ["image", *(f"channel {i}" for i in range(len(latent))), *heads]
        captions += named if place == len(rows) - 1 else [""] * len(named)
    return _grid(images, captions, len(images) // len(rows), title, rows=list(rows))


# --- the widget ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Edit:
    """An image, a scene or a text, and what is done to its scaled latent before it is decoded."""

    scene: int = 0
    mix: float = 0.0        # with the latent of the next scene
    text: str = ""          # in place of the scene
    size: int = 20          # of the text's letters, in pixels
    noise: float = 0.0      # standard deviation of what is added
    lost: int | None = None     # a channel that becomes zero


class LatentExplorer(WithStill):
    """An image, the channels of its latent, and what comes back when the latent has been changed.

    The image is a scene, or a text to type. A scene's latent can be mixed with that of the next one; noise can be
    added, a channel lost. Beneath: the image, the channels, what is decoded, where it differs. A text that is
    larger than the image is cut by its border.

    Raises ValueError for fewer than two scenes.
    """

    def __init__(self, vae: VAE, scenes: Sequence[Scene], *, title: str = "A latent, opened"):
        if len(scenes) < 2:
            raise ValueError("a latent is mixed with that of the next scene: give two scenes at least")
        self.vae, self.scenes, self.title = vae, list(scenes), title
        wide = {"layout": Layout(width="330px"), "style": {"description_width": "90px"}}
        late = {"continuous_update": False, **wide}
        channels = range(vae.config.latent_channels)
        self.controls = {
            "scene": IntSlider(0, min=0, max=len(self.scenes) - 1, description="scene", **late),
            "mix": FloatSlider(0, min=0, max=1, step=0.1, description="mix with next", **late),
            "text": Text("", description="or a text", **late),
            "size": IntSlider(Edit.size, min=6, max=48, description="its size", **late),
            "noise": FloatSlider(0, min=0, max=2, step=0.1, description="noise", **late),
            "lost": Dropdown(options=[("none", None), *((str(i), i) for i in channels)], description="lost channel",
                             **wide)}
        self.image = Image(format="png")
        pairs = list(self.controls.values())
        super().__init__([*(HBox(pairs[i:i + 2]) for i in (0, 2, 4)), self.image])
        for control in pairs:
            control.observe(lambda _: self.show(), "value")
        self.show()

    def edit(self) -> Edit:
        """What is set."""
        return Edit(**{name: control.value for name, control in self.controls.items()})

    def source(self, edit: Edit) -> np.ndarray:
        """The image to encode, uint8 (H, W, 3)."""
        return written(edit.text, edit.size, SIDE, SIDE) if edit.text else self.scenes[edit.scene].image

    @torch.no_grad()
    def latent(self, edit: Edit) -> Tensor:
        """The scaled latent after all changes, (Z, h, w); the noise is the same at every call."""
        [latent] = self.vae.to_latent(to_tensor([self.source(edit)]))
        if edit.mix and not edit.text:
            after = self.scenes[(edit.scene + 1) % len(self.scenes)]
            [other] = self.vae.to_latent(to_tensor([after.image]))
            latent = (1 - edit.mix) * latent + edit.mix * other
        latent = latent + edit.noise * torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        kept = torch.tensor([i != edit.lost for i in range(len(latent))])
        return latent * kept[:, None, None]

    @torch.no_grad()
    def row(self, edit: Edit) -> tuple[list[np.ndarray], list[str]]:
        """The image, the channels, the decoded latent and the difference; and what each is."""
        source, latent = self.source(edit), self.latent(edit)
        decoded, pixels = self.vae.to_pixels(latent[None]).clamp(-1, 1), to_tensor([source])
        [back] = to_images(decoded)
        difference = heat((decoded - pixels).abs().mean(dim=1)[0] / 2, 0, 1)                # (H, W, 3)
        names = [f"channel {i}" for i in range(len(latent))]
        return ([source, *channel_maps(latent), back, difference],
                ["image", *names, f"decoded, {psnr(decoded, pixels).item():.1f} dB", "difference"])

    def show(self):
        images, captions = self.row(self.edit())
        self.image.value = show_images(images, captions, title=self.title, columns=len(images)).png()

    def still(self) -> Drawing:
        """What is set, and other settings beneath."""
        edit = self.edit()
        others = {"": edit, "mixed with the next": replace(edit, mix=0.5),
                  "with noise of 0.5": replace(edit, noise=0.5),
                  "channel 0 lost": replace(edit, lost=0), "a text": replace(edit, text="latent")}
        images, captions = [], []
        for said, one in others.items():
            row, names = self.row(one)
            images += row
            captions += [said or names[0], *names[1:]]
        return show_images(images, captions, title=self.title, columns=len(row))
