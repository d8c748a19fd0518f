"""From the network's cells to a list of objects; the judge's weights on disk.

    judge = load_judge()
    [seen] = judge.detect([image])
    seen.objects, seen.background
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.files import get_shapes, read_json, read_tensors, write_json, write_tensors
from ..data import OBJECTS
from ..files import write_atomically
from ..images import to_tensor
from .detector import STRIDE, UNIT, Detector, DetectorConfig, Heads

WEIGHTS = Path(__file__).parents[1] / "weights" / "judge"
CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_DETECTIONS = 24               # objects at most in an image


@dataclass(frozen=True)
class Detection:
    """One object that the judge has found. `box` is left, top, right, bottom in pixels."""

    name: str
    box: tuple[float, float, float, float]
    score: float
    colour: str | None      # that it shows, see `detector.visible_colour`; None for classes that come in one look only

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Detections:
    """What the judge has found in one image; `objects` by falling score."""

    objects: tuple[Detection, ...]
    background: str


class Judge:
    """A trained detector and how it is asked."""

    def __init__(self, detector: Detector):
        self.detector, self.config = detector.eval(), detector.config

    @torch.no_grad()
    def detect(self, images, *, at_once: int = 32) -> list[Detections]:
        """What is in each image: PIL images or bytes (H, W, 3) of one size, or pixels (B, 3, H, W) in [-1, 1].

        Raises ValueError for sides that are no multiples of 4.
        """
        pixels = images if isinstance(images, Tensor) else to_tensor([np.asarray(one) for one in images])
        device = self.detector.stem.weight.device
        return [seen for part in pixels.split(at_once)
                for seen in decode_heads(self.detector(part.to(device).float()), self.config)]


def decode_heads(heads: Heads, config: DetectorConfig) -> Iterator[Detections]:
    """The objects and the background of each image of a batch."""
    chance = heads.heat.sigmoid()
    peaks = chance * (chance == F.max_pool2d(chance, 3, stride=1, padding=1))         # (B, N, h, w)
    columns = peaks.shape[3]
    for i, background in enumerate(heads.background.argmax(dim=1).tolist()):
        scores, places = peaks[i].flatten().topk(min(MAX_DETECTIONS, peaks[i].numel()))         # by falling score
        found = []
        for score, flat in zip(scores.tolist(), places.tolist(), strict=True):
            if score < config.threshold:
                break
            kind, cell = divmod(flat, peaks[i, 0].numel())
            row, column = divmod(cell, columns)
            one = decode_cell(heads, config, i, kind, row, column, score)
            if not any(are_duplicates(one.box, other.box) for other in found):
                found.append(one)
        yield Detections(tuple(found), config.backgrounds[background])


def decode_cell(heads: Heads, config: DetectorConfig, i: int, kind: int, row: int, column: int,
                score: float) -> Detection:
    """What image i's cell says of an object of class `kind`."""
    x, y = (STRIDE * (start + part) for start, part in
            zip((column, row), heads.offset[i, :, row, column].tolist(), strict=True))
    width, height = (heads.size[i, :, row, column].exp() * UNIT).tolist()
    name = config.objects[kind]
    colour = int(heads.colour[i, :, row, column].argmax())
    colour = config.colours[colour] if OBJECTS[name].tintable and colour < len(config.colours) else None
    return Detection(name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), score, colour)


def are_duplicates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes are of one thing: they share more than 0.6 of the area that they cover together."""
    return box_iou(a, b) > 0.6


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


# --- on disk ----------------------------------------------------------------------------------------

def save_judge(folder: Path, detector: Detector, *, dtype: torch.dtype = torch.float16) -> Path:
    """Write a detector as a folder: its config, and its tensors as `dtype`."""
    with write_atomically(folder) as beside:
        write_json(beside / CONFIG, detector.config.told())
        write_tensors(beside / TENSORS, detector.state_dict(), dtype, source="the judge")
    return Path(folder)


def load_judge(folder: str | Path = WEIGHTS, *, device: str | torch.device = "cpu") -> Judge:
    """The shipped judge, or one from a folder that `save_judge` wrote.

    Raises CheckpointError for a folder without a judge, and for tensors that are not its config's.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"there is no judge in {folder}; train one with `train judge`, and write it with "
                              "`train package-judge`")
    try:
        config = DetectorConfig.read(read_json(folder / CONFIG))
        with torch.device("meta"):
            detector = Detector(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not the config of a judge ({error})") from error
    tensors = read_tensors(folder / TENSORS, get_shapes(detector), device=device)
    detector.load_state_dict(tensors, assign=True)
    return Judge(detector.requires_grad_(False))
