"""The class that a sample is asked to be of, by its name: whatever the batch, order, process or device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, final

import torch
from torch import Tensor

from ddim_lab.noise import philox4x32

__all__ = ["NamedLabels"]

LABEL_WORD: Final = 2**32 - 1
"""The counter word that no noise has in its place: x_T's is 0 and a timestep's t + 1, see `ddim_lab.noise`."""


@final
class NamedLabels:
    """Labels drawn independently, sample by sample: label(seed, i) = k with probability shares[k].

    With u(seed, i) in (0, 1) from the counter-based generator that noise is made by, the label is the first k whose
    shares up to and with its own exceed u. Samples are so independent of each other as with labels drawn at random,
    and a cell that grows keeps the labels it has.

    Args:
        seed: the sampling seed, 0 <= seed < 2^64.
        shares: probability of each class, from class 0 up; their sum is 1 up to rounding.
        null_class: the label by which the network is told no class; None where it has none.

    Raises:
        ValueError: a share is negative, or they do not sum to 1.
    """

    def __init__(self, seed: int, shares: Sequence[float], null_class: int | None = None) -> None:
        if min(shares, default=-1.0) < 0.0 or abs(sum(shares) - 1.0) > 1e-9:
            raise ValueError(f"shares of classes must be 0 or more and sum to 1, got {list(shares)}")
        self.seed: Final = seed
        self.shares: Final = tuple(map(float, shares))
        self.null_class: Final = null_class

    def __call__(self, indices: Tensor) -> Tensor:
        """The labels of the samples `indices` (int64 [B]): int64 [B] on their device."""
        zero = torch.zeros_like(indices)
        words = philox4x32((zero, zero + LABEL_WORD, indices, zero), (self.seed & (2**32 - 1), self.seed >> 32))
        u = (words[0].double() + 0.5) * 2.0**-32
        # Summed on the host: on a GPU torch's sums of this kind were not deterministic in every version.
        upper = torch.tensor(list(accumulate(self.shares)), dtype=torch.float64, device=indices.device)
        drawn = torch.searchsorted(upper, u, right=True)
        last = max(k for k, share in enumerate(self.shares) if share > 0.0)
        return drawn.clamp(max=last)  # where rounding leaves the sum just below 1

    def recipe(self) -> dict[str, Any]:
        """What they are, beside the seed; for keys."""
        return {"shares": list(self.shares), "null_class": self.null_class}
