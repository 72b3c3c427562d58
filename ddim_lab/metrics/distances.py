"""Squared distances between sets of feature vectors, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

__all__ = ["squared_distances", "squared_nearest", "squared_radii"]

BLOCK: Final = 2**24
"""Squared distances held at once, at most, 4 bytes each; 50,000 x 50,000 of them would be 10 GB."""


def squared_distances(
    points: np.ndarray[Any, Any], others: np.ndarray[Any, Any], device: torch.device | None = None
) -> Iterator[Tensor]:
    """|p - o|^2 for some points at a time [P, M] and all others, in the points' order; float32.

    Args:
        points, others: [N, D] and [M, D]; memory-mapped arrays are accepted.
        device: where it is computed; None for the CPU.
    """
    import numpy as np
    import torch

    def on(vectors: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(np.asarray(vectors), dtype=torch.float32, device=device)

    # Distances do not change by a shift; near the origin |p|^2 + |o|^2 - 2 p.o loses the fewest digits.
    centre = torch.from_numpy(np.mean(others, axis=0, dtype=np.float64)).to(device, torch.float32)
    columns = on(others) - centre
    norms = columns.square().sum(1)
    rows = max(1, BLOCK // len(columns))
    for start in range(0, len(points), rows):
        part = on(points[start : start + rows]) - centre
        yield torch.addmm(norms, part, columns.T, alpha=-2.0).add_(part.square().sum(1)[:, None]).clamp_(min=0.0)


def squared_nearest(
    points: np.ndarray[Any, Any], others: np.ndarray[Any, Any], device: torch.device | None = None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Squared distance of each point [N, D] to the nearest of others [M, D]: float32 [N]."""
    import numpy as np

    return np.concatenate([part.amin(1).cpu().numpy() for part in squared_distances(points, others, device)])


def squared_radii(
    features: np.ndarray[Any, Any], neighbours: int, device: torch.device | None = None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Squared distance of each point [N, D] to its k-th nearest other point: float32 [N].

    Raises:
        ValueError: there are no k others.
    """
    if len(features) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need at least {neighbours + 1} points, got {len(features)}")
    import numpy as np

    # The point itself, at distance 0, is the first of k + 1.
    parts = [
        distances.topk(neighbours + 1, dim=1, largest=False).values[:, -1].cpu().numpy()
        for distances in squared_distances(features, features, device)
    ]
    return np.concatenate(parts)
