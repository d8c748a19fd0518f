"""Sizes of images: what the U-Net makes of them level by level, buckets of shapes, and noise that fits a size.

A size is (width, height) in pixels, as in Pillow; rows and columns are (height, width) in cells, as in tensors.
"""

import math
from collections.abc import Sequence

import numpy as np

from .config import ModelConfig
from .schedule import NoiseSchedule

Size = tuple[int, int]
Box = tuple[float, float, float, float]


def level_sizes(size: Size, config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of the U-Net's feature maps at each level, from the latent's own down, for an image.

    size: (width, height), multiples of the autoencoder's factor, or ValueError. A half that is no whole number is
    rounded up, as a convolution of stride 2 with a padding of 1 does. Self-attention has rows * columns tokens.
    """
    width, height = size
    factor = config.vae.factor
    if min(size) < factor or width % factor or height % factor:
        raise ValueError(f"an image of {width}x{height} has no latent: give sides that are multiples of {factor}")
    rows, columns = height // factor, width // factor
    found = [(rows, columns)]
    for _ in config.unet.channels[1:]:
        rows, columns = -(-rows // 2), -(-columns // 2)
        found.append((rows, columns))
    return found


def size_multiple(config: ModelConfig) -> int:
    """The multiple of image sides, in pixels, that halve evenly at every level. 64 for Stable Diffusion."""
    return config.vae.factor * 2 ** (len(config.unet.channels) - 1)


def fit_size(size: Size, side: int, step: int) -> Size:
    """(width, height) of about the shape of `size` and the area side * side; both multiples of `step`."""
    width, height = size
    zoom = side / math.sqrt(width * height)
    return max(1, round(width * zoom / step)) * step, max(1, round(height * zoom / step)) * step


def make_buckets(side: int, step: int, stretch: float = 2.0) -> list[Size]:
    """Sizes of training of about one area: for each width the tallest whose area is at most side * side.

    Widths and heights are multiples of `step`, and from side / stretch to side * stretch. The idea is NovelAI's (2022);
    SDXL's list holds all that `make_buckets(1024, 64)` gives (Podell et al. 2023, appendix I).
    """
    found = []
    for width in range(step, int(side * stretch) + 1, step):
        height = side * side // width // step * step
        if min(width, height) >= side / stretch and height <= side * stretch:
            found.append((width, height))
    return found


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose shape, width / height, is nearest by ratio: the least |log| of one over the other.

    By ratio, because 2:1 is as far from a square as 1:2. The first of those that are equally near; ValueError when
    there is none.
    """
    if not sizes:
        raise ValueError("there is no bucket to choose: give at least one (width, height)")
    width, height = size
    return min(sizes, key=lambda other: abs(math.log(width / height) - math.log(other[0] / other[1])))


def shift_timestep(schedule: NoiseSchedule, t: float, times: float) -> float:
    """The timestep at which an image `times` as wide and as high is as noisy as one of the usual size is at t.

    Compared at one scale: averages over `times` x `times` cells keep the signal of an image that was enlarged, and
    divide the deviation of its noise by `times`. So sigma / alpha has to be `times` as large. Between whole timesteps
    sigma / alpha is interpolated linearly; the result stays within the schedule, where what is wanted lies outside.
    Hoogeboom et al. 2023, "Simple diffusion": log SNR is shifted by -2 log(times).
    """
    if times <= 0:
        raise ValueError(f"an image cannot be {times} times as wide: give a number above 0")
    alpha, sigma = schedule.at(t)
    wanted = times * sigma / alpha if alpha else math.inf
    return float(np.interp(wanted, schedule.ve_sigmas, range(schedule.num_train_timesteps)))


def measure_spacing(boxes: Sequence[Sequence[Box]], size: Size, own: int) -> tuple[float, float]:
    """How far the middles of things lie from the nearest border, and from that of the next thing in their image.

    boxes: a list for each image, of (left, top, right, bottom) in pixels. Both are means over all things, in native
    widths of `own` pixels; NaN where there is none, and for the second where no image holds two.
    """
    border, following = [], []
    for of_image in boxes:
        middles = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in of_image]
        border += [min(x, size[0] - x, y, size[1] - y) / own for x, y in middles]
        if len(middles) > 1:
            following += [min(math.dist(one, other) for j, other in enumerate(middles) if j != i) / own
                          for i, one in enumerate(middles)]
    return tuple(sum(values) / len(values) if values else math.nan for values in (border, following))
