"""Between images of bytes and tensors in [-1, 1]; how far two images are apart; writing a sheet."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def to_tensor(images) -> torch.Tensor:
    """uint8 images (H, W, 3) as one tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def psnr(a: torch.Tensor, b: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,), infinite for equal ones; pixels (B, 3, H, W) in [-1, 1],
    peak 2. where: (B, 1, H, W) of 0 and 1, the pixels that count; all by default."""
    error = (a - b).square().mean(dim=1, keepdim=True)                                # (B, 1, H, W)
    if where is None:
        return 10 * torch.log10(4 / error.mean(dim=(1, 2, 3)))
    return 10 * torch.log10(4 * where.sum(dim=(1, 2, 3)) / (error * where).sum(dim=(1, 2, 3)))


def ssim(a: torch.Tensor, b: torch.Tensor, *, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Structural similarity of each pair of images (B, 3, H, W) in [-1, 1]: (B,), 1 for equal ones. Wang et al. 2004.

    Gaussian window of 11 with sigma 1.5, K1 0.01, K2 0.03, the mean over channels and over places where the whole
    window lies inside the image; intensities from 0, as the paper compares means by their ratio.
    """
    a, b = ((some.double() + 1) / 2 for some in (a, b))
    if a.shape != b.shape or min(a.shape[2:]) < window:
        raise ValueError(f"SSIM compares images of one size, {window} pixels at least, not {tuple(a.shape)} with "
                         f"{tuple(b.shape)}")
    reach = torch.arange(window, dtype=torch.float64, device=a.device) - (window - 1) / 2
    weights = (-reach ** 2 / (2 * sigma ** 2)).exp()
    weights = weights / weights.sum()

    def blurred(x: torch.Tensor) -> torch.Tensor:
        flat = F.conv2d(x.flatten(0, 1)[:, None], weights[None, None, :, None])
        return F.conv2d(flat, weights[None, None, None])[:, 0].unflatten(0, x.shape[:2])

    mean_a, mean_b = blurred(a), blurred(b)                                           # (B, 3, H-10, W-10)
    var_a, var_b = blurred(a * a) - mean_a ** 2, blurred(b * b) - mean_b ** 2
    both = blurred(a * b) - mean_a * mean_b
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return value.mean(dim=(1, 2, 3)).float()


def save_sheet(sheet: Image.Image, file: Path):
    """Write a sheet as PNG, its folder with it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
