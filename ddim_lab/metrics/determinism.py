"""Does the same start give the same image? Repeats, batch splits, and the spread over noise seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["max_abs_diff", "noise_variance", "uint8_sha256"]


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


def uint8_sha256(images: Tensor) -> str:
    """SHA-256 of uint8 images [N, C, H, W] as bytes in NHWC order, which is how samples.npz holds them."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    return hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes()).hexdigest()
