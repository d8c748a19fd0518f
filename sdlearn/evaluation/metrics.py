"""Measures of images, and of what an image encoder sees in them.

B  images        H, W  pixels        S  channels of the encoders' shared space        D  of the image encoder

Images are bytes, uint8 (B, H, W, 3) or a list of (H, W, 3) or PIL images of one size, or pixels (B, 3, H, W)
in [-1, 1]. Every function raises ValueError for what it cannot measure.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import images as _images
from ..clip import CLIP
from ..images import to_tensor

LUMINANCE = (77 / 256, 150 / 256, 29 / 256)     # of red, green, blue: ITU-R BT.601, as in the scenes' edge maps
EDGE = 40.0                             # jump of luminance between neighbours, of 255, that is an edge: as there
BATCH_SIZE = 64                            # images in a batch of the image encoder


def as_pixels(images) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], float32."""
    if isinstance(images, Tensor) and images.is_floating_point():
        pixels = images
    else:
        arrays = [np.asarray(one) for one in images]
        if not arrays or any(one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3 for one in arrays):
            raise ValueError("images are bytes (B, H, W, 3), PIL images in RGB, or pixels (B, 3, H, W) in [-1, 1]")
        pixels = to_tensor(arrays)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(f"pixels are (B, 3, H, W) with one image at least, not {tuple(pixels.shape)}")
    return pixels.float()


# --- one image ------------------------------------------------------------------------------------

def saturation(images) -> Tensor:
    """Mean saturation of each image, (B,), 0 grey to 1: (max - min) / max over the channels, as in HSV."""
    levels = (as_pixels(images).clamp(-1, 1) + 1) / 2
    high, low = levels.amax(dim=1), levels.amin(dim=1)                                # (B, H, W)
    return ((high - low) / high.clamp(min=1e-6)).mean(dim=(1, 2))


def clipped_share(images, *, margin: float = 1 / 255) -> Tensor:
    """Share of each image's numbers, (B,), that lie within `margin` (of the range 0...1) of black or white: where
    guidance is too strong, channels run into the ends of the range."""
    levels = (as_pixels(images) + 1) / 2
    return ((levels <= margin) | (levels >= 1 - margin)).float().mean(dim=(1, 2, 3))


def edges(images, *, threshold: float = EDGE) -> Tensor:
    """Where luminance jumps by more than `threshold` (of 255) from the pixel on the left or above: bool (B, H, W).

    The rule of the scenes' own edge maps, which know the objects' borders as well.
    """
    levels = ((as_pixels(images).clamp(-1, 1) + 1) * 127.5).round()                   # the bytes that are shown
    grey = (levels * torch.tensor(LUMINANCE, device=levels.device)[:, None, None]).sum(dim=1)   # (B, H, W)
    jump = torch.zeros(grey.shape, dtype=torch.bool, device=grey.device)
    jump[:, :, 1:] |= grey.diff(dim=2).abs() > threshold
    jump[:, 1:] |= grey.diff(dim=1).abs() > threshold
    return jump


# --- an image and what it should be ----------------------------------------------------------------

def ssim(a, b, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """`images.ssim` of images in any form: (B,), 1 for equal ones."""
    return _images.ssim(*map(as_pixels, (a, b)), window=window, sigma=sigma)


def edge_agreement(images, maps, *, tolerance: int = 1) -> dict[str, float]:
    """How well the edges of images follow edge maps: precision, recall and F1, over all pixels of all pairs.

    maps: (B, H, W), bytes or bool, above 0 (and the hint of a ControlNet as well) an edge. An edge within
    `tolerance` pixels, diagonals included, agrees. See `edge_chance` for what pairs that do not belong together get.
    """
    found = edges(images)
    wanted = torch.as_tensor(np.asarray(maps)).to(found.device) > 0
    if found.shape != wanted.shape:
        raise ValueError(f"there must be one edge map of an image's size for each, but the images are "
                         f"{tuple(found.shape)} and the maps {tuple(wanted.shape)}")
    return _agreement(found, wanted, tolerance)


def edge_chance(images, maps, *, tolerance: int = 1) -> dict[str, float]:
    """`edge_agreement` where each image is compared with the next one's map: what no relation at all would give.
    Raises ValueError for fewer than two pairs."""
    if len(maps) < 2:
        raise ValueError("chance needs two pairs at least, so that an image can be compared with another's map")
    return edge_agreement(images, np.roll(np.asarray(maps), 1, axis=0), tolerance=tolerance)


def _agreement(found: Tensor, wanted: Tensor, tolerance: int) -> dict[str, float]:
    def near(some: Tensor) -> Tensor:
        side = 2 * tolerance + 1
        return F.max_pool2d(some[:, None].float(), side, stride=1, padding=tolerance)[:, 0] > 0

    def share(part: Tensor, whole: Tensor) -> float:
        return float((part & whole).sum() / whole.sum()) if whole.any() else float(not part.any())

    precision, recall = share(near(wanted), found), share(near(found), wanted)
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}


# --- many images ----------------------------------------------------------------------------------

def pairwise_distance(vectors: Tensor) -> float:
    """Mean Euclidean distance of all pairs of rows (B, anything). Raises ValueError for a single one."""
    if len(vectors) < 2:
        raise ValueError("diversity is a distance between images, so it needs two at least")
    return float(torch.pdist(vectors.flatten(1).double()).mean())


def pixel_diversity(images) -> float:
    """How different images of one prompt are: mean over pairs of the root mean square difference of their pixels,
    in [-1, 1]. 0 for copies of one image."""
    pixels = as_pixels(images)
    return pairwise_distance(pixels) / pixels[0].numel() ** 0.5


def feature_diversity(clip: CLIP, images) -> float:
    """How different images of one prompt are to the image encoder: mean over pairs of 1 - cosine."""
    embeds = image_embeds(clip, images)
    if len(embeds) < 2:
        raise ValueError("diversity is a distance between images, so it needs two at least")
    rows, columns = torch.triu_indices(len(embeds), len(embeds), offset=1)
    return float((1 - embeds @ embeds.T)[rows, columns].mean())


def concept_fidelity(clip: CLIP, images, references) -> float:
    """How much images show a concept: mean cosine, in the image encoder's eyes, of all pairs of an image and a
    reference image. DreamBooth's CLIP-I (Ruiz et al. 2023), with this course's encoders."""
    return float((image_embeds(clip, images) @ image_embeds(clip, references).T).mean())


@torch.no_grad()
def image_embeds(clip: CLIP, images) -> Tensor:
    """Unit vectors (B, S) in the space that images and texts share, on the CPU."""
    device = clip.logit_scale.device
    return torch.cat([clip.encode_image(part.to(device)).float().cpu() for part in as_pixels(images).split(BATCH_SIZE)])


@torch.no_grad()
def vision_features(clip: CLIP, images) -> Tensor:
    """The image encoder's pooled features (B, D) before the projection, on the CPU: for the Fréchet distance."""
    device = clip.logit_scale.device
    return torch.cat([clip.vision_model(part.to(device)).pooled.float().cpu()
                      for part in as_pixels(images).split(BATCH_SIZE)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of two clouds of features (B, D), each taken as a Gaussian. Heusel et al. 2017.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). It is biased upwards for few images: compare
    with the floor, the distance of two halves of real images, at the same counts.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features are (images, channels), two images at least, of one width, not "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)   # (D, D)
    root = _root(cov_a)
    # tr (cov_a cov_b)^(1/2) through a symmetric matrix with the same eigenvalues, root cov_b root.
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((apart + cov_a.trace() + cov_b.trace() - 2 * shared).clamp(min=0))


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues, (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet_with_floor(clip: CLIP, images, real, others) -> tuple[float, float]:
    """The Fréchet distance of images to real ones, and the floor: that of `others`, as many real images as
    there are `images`, to the same real ones."""
    if len(images) != len(others):
        raise ValueError(f"the floor needs as many real images as there are made ones, {len(images)}, not "
                         f"{len(others)}: the distance depends on the count")
    made, wanted, rest = (vision_features(clip, some) for some in (images, real, others))
    return frechet_distance(made, wanted), frechet_distance(rest, wanted)


def group_by_prompt(items: Sequence, prompts: Sequence) -> dict:
    """Items grouped by their prompt, for measures of images of one prompt."""
    groups: dict = {}
    for item, prompt in zip(items, prompts, strict=True):
        groups.setdefault(prompt, []).append(item)
    return groups
