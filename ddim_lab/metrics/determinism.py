"""Does the same start give the same image? Repeats, batch splits, and the spread over noise seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImagesHash", "max_abs_diff", "nhwc", "noise_variance"]


def max_abs_diff(runs: Sequence[Tensor]) -> float:
    """Largest |difference| of any element between the first run and the others; exactly 0 if bitwise equal."""
    first = runs[0]
    return max((float((run - first).abs().max()) for run in runs[1:]), default=0.0)


def noise_variance(runs: Sequence[Tensor]) -> Tensor:
    """Unbiased variance across runs [B, ...] that share x_T but not the noise: mean over elements, float64 [B].

    Computed from differences to the first run, so that runs that agree bitwise give exactly 0.
    """
    differences = torch.stack([(run - runs[0]).double() for run in runs])
    return differences.var(dim=0).flatten(1).mean(1)


def nhwc(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 images [B, C, H, W] as samples.npz holds them: [B, H, W, C]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@final
class ImagesHash:
    """SHA-256 of uint8 images as bytes in NHWC order (`nhwc`), batch by batch."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, images: Tensor) -> None:
        """Add the next images, [B, C, H, W]."""
        self._sha256.update(nhwc(images).tobytes())

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._sha256.hexdigest()
