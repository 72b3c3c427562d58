"""Images brought to the size that a network takes, each way as the code that made it common does it.

All take images [B, 3, H, W] with values from 0 to 255 and stretch them to a square: the aspect is not kept, nothing is
cut off, unless `centre_square` did so before. On photographs Pillow's and torch's bicubic are 0.3 of a level apart on
average, and tens at an edge; TF1's bilinear is 5 to 9 from both.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Levels = np.ndarray[Any, np.dtype[np.float32]]

__all__ = [
    "centre_square",
    "pillow_bicubic",
    "pillow_bicubic_float",
    "pillow_bilinear",
    "tf1_bilinear",
    "torch_bicubic",
    "torch_bilinear",
]


def pillow_bicubic(images: Tensor, size: int) -> Tensor:
    """By Pillow itself: bicubic (a = -1/2), antialiased, the width first, each pass rounded and clamped to 8 bits.

    Args:
        images: uint8 [B, 3, H, W], on any device; Pillow computes on the CPU, an image a thread.
        size: of the result, in pixels.

    Returns:
        uint8 [B, 3, size, size], on the images' device.
    """
    return _in_8_bits(images, size, Image.Resampling.BICUBIC)


def pillow_bilinear(images: Tensor, size: int) -> Tensor:
    """By Pillow itself: bilinear, antialiased where it shrinks, the width first, each pass rounded to 8 bits.

    Args:
        images: uint8 [B, 3, H, W], on any device; Pillow computes on the CPU, an image a thread.
        size: of the result, in pixels.

    Returns:
        uint8 [B, 3, size, size], on the images' device.
    """
    return _in_8_bits(images, size, Image.Resampling.BILINEAR)


def _in_8_bits(images: Tensor, size: int, by: Image.Resampling) -> Tensor:
    def resized(pixels: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(pixels).resize((size, size), by))

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock
        found = np.stack(list(pool.map(resized, images.permute(0, 2, 3, 1).cpu().contiguous().numpy())))
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(images.device)


def pillow_bicubic_float(images: Tensor, size: int) -> Tensor:
    """By Pillow in float32, a channel at a time: bicubic (a = -1/2), antialiased, never rounded, clamped at the end.

    Args:
        images: uint8 or float32 [B, 3, H, W], on any device; Pillow computes on the CPU, an image a thread.
        size: of the result, in pixels.

    Returns:
        float32 [B, 3, size, size] from 0 to 255, on the images' device.
    """

    def resized(planes: Levels) -> Levels:
        by = Image.Resampling.BICUBIC
        return np.stack([np.asarray(Image.fromarray(plane).resize((size, size), by)) for plane in planes])

    with ThreadPoolExecutor() as pool:
        found = np.stack(list(pool.map(resized, images.float().cpu().contiguous().numpy())))
    return torch.from_numpy(found.clip(0, 255)).to(images.device)


def torch_bicubic(images: Tensor, size: int) -> Tensor:
    """By torch in float32: the same filter as Pillow's, but neither rounded nor clamped: an edge overshoots 0 to 255.

    Args:
        images: uint8 or float32 [B, 3, H, W].
        size: of the result, in pixels.

    Returns:
        float32 [B, 3, size, size].
    """
    return functional.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)


def torch_bilinear(images: Tensor, size: int, *, antialias: bool = False, corners: bool = False) -> Tensor:
    """By torch in float32: bilinear.

    Args:
        images: uint8 or float32 [B, 3, H, W].
        size: of the result, in pixels.
        antialias: whether more pixels than the next two count where it shrinks; where it enlarges, nothing differs.
        corners: whether the centres of corner pixels are aligned; else their outer edges are (half-pixel centres).

    Returns:
        float32 [B, 3, size, size].
    """
    return functional.interpolate(
        images.float(), size=(size, size), mode="bilinear", antialias=antialias, align_corners=corners
    )


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """As TensorFlow 1 did it: bilinear, not antialiased, pixel corners aligned at the top left; torch-fidelity's.

    Args:
        images: uint8 or float32 [B, 3, H, W].
        size: of the result, in pixels.

    Returns:
        float32 [B, 3, size, size].
    """
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    found: Tensor = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(size, size), align_corners=False)
    return found


def centre_square(images: Tensor) -> Tensor:
    """The largest square in the middle; where a side's surplus is odd, the pixel more is cut at the right or below."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]
