"""Images, masks and condition images that a caller gives, as the tensors that the model takes.

An image may be a PIL image of any mode, bytes (H, W, 3) or (H, W), a batch of either, or a tensor that is
ready: (B, 3, H, W), pixels in [-1, 1], condition images in [0, 1], masks (B, 1, H, W) of 0 and 1. One
image serves the whole batch; a batch of images gives one to each.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..inpaint import binary_mask
from .settings import SettingsError, as_settings_error


def to_pixels(image, what: str = "image") -> Tensor:
    """(B, 3, H, W) in [-1, 1]. Raises SettingsError for what is no image."""
    if isinstance(image, Tensor):
        return _checked(image, what, -1.0)
    return _bytes(image, "RGB", what).float() / 127.5 - 1


def to_hint(image, what: str = "hint") -> Tensor:
    """(B, 3, H, W) in [0, 1], as a ControlNet reads it. Raises SettingsError for what is no image."""
    if isinstance(image, Tensor):
        return _checked(image, what, 0.0)
    return _bytes(image, "RGB", what).float() / 255


def to_mask(mask, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) of 0 and 1, 1 where the image is to be made anew; `size` is the image's (width, height).

    Raises SettingsError for a mask of another size, one that is not binary, and one that keeps everything.
    """
    values = mask if isinstance(mask, Tensor) else _bytes(mask, "L", "mask")
    if (found := tuple(values.shape[:-3:-1])) != size:
        raise SettingsError(f"the mask is {found[0]}x{found[1]} pixels, but the image {size[0]}x{size[1]}; "
                            "make both of one size")
    return as_settings_error(binary_mask, values)


def _checked(image: Tensor, what: str, low: float) -> Tensor:
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise SettingsError(f"the {what} is a tensor {image.dtype} {tuple(image.shape)}; give floating-point "
                            "numbers (batch, 3, height, width)")
    if not bool(((image >= low - 1e-3) & (image <= 1 + 1e-3)).all()):     # NaN is neither
        raise SettingsError(f"the {what} has values outside of [{low:g}, 1]; scale it, or give a PIL image")
    return image.detach().float().cpu()


def _bytes(image, mode: str, what: str) -> Tensor:
    """(B, channels of `mode`, H, W), uint8."""
    batch = image if isinstance(image, Sequence) or getattr(image, "ndim", 0) == 4 else [image]
    arrays = [np.asarray(_pil(one, what).convert(mode)) for one in batch]
    if not arrays or len({array.shape for array in arrays}) > 1:
        raise SettingsError(f"the {what}s must be of one size, but are "
                            f"{', '.join(f'{a.shape[1]}x{a.shape[0]}' for a in arrays) or 'none'}")
    stacked = torch.from_numpy(np.stack(arrays).reshape(*np.shape(arrays)[:3], -1))  # (B, H, W, channels)
    return stacked.permute(0, 3, 1, 2).contiguous()         # another layout would round otherwise in GroupNorm


def _pil(image, what: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise SettingsError(f"the {what} is {array.dtype} {array.shape}; give a PIL image, or bytes "
                            "(height, width) or (height, width, 3)")
    return Image.fromarray(array)
