"""PNG sheets of small images, pixel for pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from ddim_lab.data.images import to_uint8

__all__ = ["preview", "sheet"]

PREVIEW: Final = 12
"""Images of preview.png, one row; the same x_T in every cell of the same seed."""

GREY: Final = 128


def sheet(path: Path, rows: Tensor, *, gap: int = 1) -> None:
    """Write rows of images with grey lines between them.

    Args:
        path: a .png file.
        rows: [R, K, C, H, W] in [-1, 1], clamped here; C is 1 or 3.
        gap: pixels between images.
    """
    count, across, channels, height, width = rows.shape
    levels = to_uint8(rows.clamp(-1.0, 1.0)).cpu()
    down, right = count * (height + gap) - gap, across * (width + gap) - gap
    canvas = torch.full((down, right, channels), GREY, dtype=torch.uint8)
    for r in range(count):
        for k in range(across):
            top, left = r * (height + gap), k * (width + gap)
            canvas[top : top + height, left : left + width] = levels[r, k].permute(1, 2, 0)
    pixels = canvas.numpy()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(path)


def preview(folder: Path, images: Tensor) -> None:
    """preview.png: the first images of a cell [N, C, H, W] in one row, for the report's comparison of cells."""
    sheet(folder / "preview.png", images[None, :PREVIEW], gap=0)
