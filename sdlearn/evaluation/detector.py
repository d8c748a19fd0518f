"""The judge: a small network that finds the objects of an image, their colours, and the background.

B  batch        H, W  pixels                    K  objects at most in an image, the rest is padding
h, w  cells, H/4 and W/4                        N  classes of objects        C  colours and "none"

It follows Zhou et al. 2019, "Objects as points": an object is a peak in the heatmap of its class, and the cell
of the peak says how far off the centre lies, how large the object is and what colour it has. It is trained on
scenes alone, never on images that a model made, so that it has no opinion about any model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import BACKGROUNDS, COLOURS, OBJECTS
from ..data.world import (
    BLUE,
    GREEN,
    GREEN_SHADE,
    LIGHT_BLUE,
    ORANGE,
    ORANGE_SHADE,
    PURPLE,
    PURPLE_SHADE,
    RED,
    RED_SHADE,
    YELLOW,
    YELLOW_SHADE,
)

STRIDE = 4              # pixels of a cell
DEEPEST = 16            # pixels of a cell of the lowest level: sides are padded to a multiple of it
UNIT = 32.0             # pixels; sizes are learnt as logarithms of multiples of it

# What a natural fill is called. An apple's natural red is the very red that a tint gives, so the two cannot be told
# apart in an image: the judge names the colour that is seen, whether it is a tint or nature's.
NAMED = {
    RED: "red", RED_SHADE: "red", ORANGE: "orange", ORANGE_SHADE: "orange", YELLOW: "yellow", YELLOW_SHADE: "yellow",
    GREEN: "green", GREEN_SHADE: "green", BLUE: "blue", LIGHT_BLUE: "blue", PURPLE: "purple", PURPLE_SHADE: "purple",
}


def visible_colour(name: str, colour: str | None) -> str | None:
    """The colour that an object shows: its tint, or its natural one; None for classes that come in one look only,
    and where the natural colour is none of COLOURS."""
    fills = OBJECTS[name].fills
    return colour or (NAMED.get(fills[0]) if fills else None)


@dataclass(frozen=True)
class DetectorConfig:
    """What the judge can name, and the size of its network."""

    objects: tuple[str, ...] = tuple(OBJECTS)
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    channels: tuple[int, int, int] = (40, 80, 112)      # at 1/4, 1/8 and 1/16 of the sides
    blocks: tuple[int, int, int] = (1, 2, 2)            # ResBlocks on the way down
    head: int = 64                                      # channels of the map that is read off
    threshold: float = 0.3                              # score from which a peak is an object

    @classmethod
    def read(cls, told: dict) -> "DetectorConfig":
        """From JSON, whose lists become tuples. Raises ValueError for a field that is not known."""
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
        except TypeError as error:
            raise ValueError(f"this is not the config of a judge ({error}); write it anew with its weights") from None

    def told(self) -> dict:
        return asdict(self)


class Heads(NamedTuple):
    """What the network says of each cell, and of the whole image."""

    heat: Tensor                    # (B, N, h, w) logits: an object of this class has its centre here
    offset: Tensor                  # (B, 2, h, w) x and y of the centre in the cell, 0...1
    size: Tensor                    # (B, 2, h, w) log of width and height in UNITs
    colour: Tensor                  # (B, C, h, w) logits, "none" last
    background: Tensor              # (B, backgrounds) logits


class Targets(NamedTuple):
    """What is in a batch of scenes."""

    boxes: Tensor                   # (B, K, 4) left, top, right, bottom in pixels
    classes: Tensor                 # (B, K) place in the config's objects; -1 is padding
    colours: Tensor                 # (B, K) place in its colours, C - 1 for none; -1 where nothing can be said
    background: Tensor              # (B,)


class CellNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell alone: a picture of another size changes no cell's numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x = conv(norm(...)) + x, twice a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = CellNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.conv1(self.norm(x)))) + x


class Detector(nn.Module):
    """Down to 1/16 of the image's sides and up again to 1/4, where everything is read off."""

    def __init__(self, config: DetectorConfig | None = None):
        super().__init__()
        self.config = config = config or DetectorConfig()
        first, second, third = config.channels
        self.stem = nn.Conv2d(12, first, 3, stride=2, padding=1)
        self.down1 = nn.Sequential(*(Block(first) for _ in range(config.blocks[0])))
        self.shrink1 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.down2 = nn.Sequential(*(Block(second) for _ in range(config.blocks[1])))
        self.shrink2 = nn.Conv2d(second, third, 3, stride=2, padding=1)
        self.down3 = nn.Sequential(*(Block(third) for _ in range(config.blocks[2])))
        self.grow2 = nn.Conv2d(third, second, 1)
        self.up2 = Block(second)
        self.grow1 = nn.Conv2d(second, config.head, 1)
        self.across1 = nn.Conv2d(first, config.head, 1)
        self.up1 = Block(config.head)
        self.norm = CellNorm(config.head)
        self.widths = (len(config.objects), 2, 2, len(config.colours) + 1, len(config.backgrounds), 1)
        self.read = nn.Conv2d(config.head, sum(self.widths), 1)
        nn.init.constant_(self.read.bias[:len(config.objects)], -4.6)   # a probability of 0.01: most cells are empty

    def forward(self, pixels: Tensor) -> Heads:
        """Pixels (B, 3, H, W) in [-1, 1], H and W multiples of 4. Raises ValueError for other images."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % STRIDE or pixels.shape[3] % STRIDE:
            raise ValueError(f"the judge reads images (batch, 3, height, width) with sides that are multiples of "
                             f"{STRIDE}, not {tuple(pixels.shape)}: crop or resize them")
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -width % DEEPEST, 0, -height % DEEPEST), mode="replicate")
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x1 = self.down1(self.stem(F.pixel_unshuffle(pixels, 2)))                      # (B, first, h, w)
        x2 = self.down2(self.shrink1(x1))                                             # (B, second, h/2, w/2)
        x3 = self.down3(self.shrink2(x2))                                             # (B, third, h/4, w/4)
        x2 = self.up2(x2 + F.interpolate(self.grow2(x3), scale_factor=2.0))
        x1 = self.up1(self.across1(x1) + F.interpolate(self.grow1(x2), scale_factor=2.0))
        cells = self.read(F.silu(self.norm(x1)))[..., :height // STRIDE, :width // STRIDE]
        heat, offset, size, colour, ground, weight = cells.float().split(self.widths, dim=1)
        weight = weight.flatten(2).softmax(dim=2)                                     # (B, 1, h w)
        return Heads(heat, offset.sigmoid(), size, colour, (ground.flatten(2) * weight).sum(dim=2))

    def targets(self, scenes: Sequence) -> Targets:
        """What the scenes hold, as tensors to learn from."""
        config = self.config
        most = max(1, *(len(one.objects) for one in scenes))
        boxes, classes = torch.zeros(len(scenes), most, 4), torch.full((len(scenes), most), -1)
        colours = classes.clone()
        for i, one in enumerate(scenes):
            for k, placed in enumerate(one.objects):
                boxes[i, k] = torch.tensor(placed.box, dtype=torch.float32)
                classes[i, k] = config.objects.index(placed.name)
                if OBJECTS[placed.name].tintable:
                    colours[i, k] = colour_index(config.colours, visible_colour(placed.name, placed.colour))
        background = torch.tensor([config.backgrounds.index(one.background) for one in scenes])
        return Targets(boxes, classes, colours, background)


def colour_index(colours: tuple[str, ...], colour: str | None) -> int:
    return len(colours) if colour is None else colours.index(colour)


def detection_loss(heads: Heads, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    """Focal loss of the heatmaps, distances of centre and size, cross-entropy of colour and background.

    Zhou et al. 2019, section 3, with sizes as logarithms, so that a pixel matters more on a small object.
    """
    batch, kinds, rows, columns = heads.heat.shape
    shown = targets.classes >= 0                                                      # (B, K)
    centre = (targets.boxes[..., :2] + targets.boxes[..., 2:]) / 2 / STRIDE           # (B, K, 2) in cells
    extent = targets.boxes[..., 2:] - targets.boxes[..., :2]
    column = centre[..., 0].long().clamp(0, columns - 1)
    row = centre[..., 1].long().clamp(0, rows - 1)
    heat = heat_targets(column, row, extent, targets.classes, shown, (kinds, rows, columns))
    count = shown.sum().clamp(min=1)
    focal = focal_loss(heads.heat, heat) / count
    index = torch.arange(batch, device=row.device)[:, None].expand_as(row)[shown]
    cell = index, slice(None), row[shown], column[shown]
    offset = (heads.offset[cell] - (centre[shown] - torch.stack([column, row], -1)[shown])).abs().sum() / count
    size = (heads.size[cell] - (extent[shown] / UNIT).log()).abs().sum() / count
    colour = F.cross_entropy(heads.colour[cell], targets.colours[shown], ignore_index=-1, reduction="sum") / count
    background = F.cross_entropy(heads.background, targets.background)
    loss = focal + offset + size + colour + 0.5 * background
    return loss, {"focal": focal, "offset": offset, "size": size, "colour": colour, "background": background}


def heat_targets(column: Tensor, row: Tensor, extent: Tensor, classes: Tensor, shown: Tensor,
                 shape: tuple[int, int, int]) -> Tensor:
    """(B, N, h, w): 1 at each object's cell and a Gaussian around it, a tenth as wide as the object."""
    kinds, rows, columns = shape
    device = column.device
    x, y = torch.arange(columns, device=device), torch.arange(rows, device=device)[:, None]
    away = (x - column[..., None, None]) ** 2 + (y - row[..., None, None]) ** 2       # (B, K, h, w)
    sigma = (extent.amin(dim=-1) / STRIDE * 0.1).clamp(min=0.6)[..., None, None]
    bumps = (-away / (2 * sigma ** 2)).exp() * shown[..., None, None]
    heat = torch.zeros(len(column), kinds, rows, columns, device=device)
    every = torch.arange(len(column), device=device)
    for k in range(column.shape[1]):
        kind = classes[:, k].clamp(min=0)
        heat[every, kind] = torch.maximum(heat[every, kind], bumps[:, k])
    return heat


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Sum over all cells: easy ones count little, and those beside a peak little as well (Law and Deng 2018)."""
    peak = heat == 1
    chance = logits.sigmoid()
    right = F.logsigmoid(logits) * (1 - chance) ** 2
    wrong = F.logsigmoid(-logits) * chance ** 2 * (1 - heat) ** 4
    return -torch.where(peak, right, wrong).sum()
