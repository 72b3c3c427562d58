"""Squared distances between sets of feature vectors, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

__all__ = ["squared_distances"]

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
