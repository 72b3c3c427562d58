"""Improved precision and recall: which samples look real, and how much of the real images the samples reach.

A set's region is the union of balls round its points, each as large as the distance to the point's k-th nearest
neighbour in the set. Precision is the share of samples in the region of the real images, recall the share of real
images in the region of the samples.

Source: Kynkäänniemi et al. (2019), Improved Precision and Recall Metric for Assessing Generative Models (k = 3).

torch-fidelity's `prc_features_to_metric` gives the same values, as a test shows. It is not used, because it takes all
vectors in memory, holds 10,000 x M distances at once (2 GB at 50,000) or all of them, and computes the radii of the
reference anew for every cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

__all__ = ["precision_recall", "squared_radii"]

BLOCK: Final = 2**24
"""Squared distances held at once, at most, 4 bytes each; 50,000 x 50,000 of them would be 10 GB."""


def precision_recall(
    samples: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    neighbours: int,
    reference_radii: np.ndarray[Any, Any] | None = None,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Precision and recall, both from 0 to 1.

    Args:
        samples, reference: features [N, D] and [M, D]; memory-mapped arrays are accepted. N and M should be equal:
            more points make smaller balls.
        neighbours: k.
        reference_radii: `squared_radii` of the reference, where they are known.
        device: where it is computed, in float32; None for the CPU.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    radii = squared_radii(reference, neighbours, device) if reference_radii is None else reference_radii
    precision = _share_inside(samples, reference, radii, device)
    return precision, _share_inside(reference, samples, squared_radii(samples, neighbours, device), device)


def squared_radii(
    features: np.ndarray[Any, Any], neighbours: int, device: torch.device | None = None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Squared distance of each point [N, D] to its k-th nearest other point: float32 [N].

    Raises:
        ValueError: there are no k others.
    """
    if len(features) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need at least {neighbours + 1} points, got {len(features)}")
    # The point itself, at distance 0, is the first of k + 1.
    parts = [
        distances.topk(neighbours + 1, dim=1, largest=False).values[:, -1].cpu()
        for distances in _squared_distances(features, features, device)
    ]
    return torch.cat(parts).numpy()


def _share_inside(
    points: np.ndarray[Any, Any],
    centres: np.ndarray[Any, Any],
    radii: np.ndarray[Any, Any],
    device: torch.device | None,
) -> float:
    limits = torch.tensor(radii, device=device)
    inside = sum(int((part <= limits).any(1).sum()) for part in _squared_distances(points, centres, device))
    return inside / len(points)


def _squared_distances(
    points: np.ndarray[Any, Any], others: np.ndarray[Any, Any], device: torch.device | None
) -> Iterator[Tensor]:
    """|p - o|^2 for some points at a time and all others, in the points' order."""
    # Distances do not change by a shift; near the origin |p|^2 + |o|^2 - 2 p.o loses the fewest digits.
    centre = torch.from_numpy(np.mean(others, axis=0, dtype=np.float64)).to(device, torch.float32)
    columns = _on(others, device) - centre
    norms = columns.square().sum(1)
    rows = max(1, BLOCK // len(columns))
    for start in range(0, len(points), rows):
        part = _on(points[start : start + rows], device) - centre
        yield torch.addmm(norms, part, columns.T, alpha=-2.0).add_(part.square().sum(1)[:, None]).clamp_(min=0.0)


def _on(vectors: np.ndarray[Any, Any], device: torch.device | None) -> Tensor:
    return torch.tensor(np.asarray(vectors), dtype=torch.float32, device=device)
