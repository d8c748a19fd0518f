"""Between pictures of bytes and tensors in [-1, 1]; how far two pictures are apart; writing a sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def to_tensor(images) -> torch.Tensor:
    """uint8 pictures (H, W, 3) as one tensor (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1] as uint8 (B, H, W, 3)."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture; pixels (B, 3, H, W) in [-1, 1], peak 2."""
    return 10 * torch.log10(4 / (a - b).square().mean(dim=(1, 2, 3)))


def save_sheet(sheet: Image.Image, file: Path):
    """Write a sheet as PNG, its folder with it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
