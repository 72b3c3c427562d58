"""Fréchet distance between feature distributions, and what its standard error needs.

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))       (Dowson & Landau 1982; Heusel et al. 2017)

Means and covariances come from float64 sums; the distance itself is torchmetrics'.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.fid import _compute_fid

from ddim_lab.metrics.estimates import GROUPS
from ddim_lab.metrics.statistics import FeatureSums, Moments

__all__ = ["FrechetDistance"]


@final
class FrechetDistance(Metric):
    """Fréchet distance of streamed features to a reference, with what its standard error needs.

    Memory is 20 sums of D x D float64, whatever the number of samples; sums add up over processes.

    Args:
        reference: statistics of the real images.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    counts: Tensor
    totals: Tensor
    outers: Tensor

    def __init__(self, reference: FeatureSums | Moments, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reference = reference.moments() if isinstance(reference, FeatureSums) else reference
        size = len(self._reference.mean)
        self.add_state("counts", torch.zeros(GROUPS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(GROUPS, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(GROUPS, size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add features [B, D] of the samples `indices` [B]."""
        features = features.double()
        group = indices.to(features.device) % GROUPS
        for g in sorted(set(group.tolist())):
            chosen = features[group == g]
            self.counts[g] += len(chosen)
            self.totals[g] += chosen.sum(0)
            self.outers[g] += chosen.T @ chosen

    @property
    def num_samples(self) -> int:
        """How many samples have been added."""
        return int(self.counts.sum())

    def sums(self) -> FeatureSums:
        """Of all samples added, on the CPU."""
        return FeatureSums(self.num_samples, self.totals.sum(0).cpu(), self.outers.sum(0).cpu())

    def compute(self) -> Tensor:
        """FD of all samples added, a float64 scalar.

        Raises:
            ValueError: fewer than two samples: no covariance.
        """
        return torch.tensor(self.between(self._reference, self.sums().moments()), dtype=torch.float64)

    @staticmethod
    def between(reference: FeatureSums | Moments, other: FeatureSums | Moments) -> float:
        """FD between two distributions that are known already; by the eigenvalues of S_1 S_2, as torchmetrics does.

        Not below 0, where rounding alone would bring it.
        """
        first, second = (x.moments() if isinstance(x, FeatureSums) else x for x in (reference, other))
        distance = float(_compute_fid(first.mean, first.covariance, second.mean, second.covariance))
        return 0.0 if distance < 0.0 else distance  # NaN stays

    def leave_one_out(self) -> list[float]:
        """FD without group g, for each g that holds samples: the jackknife's replicates."""
        reference, every = _RootedReference(self._reference), self.sums()
        return [
            reference.distance(
                FeatureSums(
                    every.count - count, every.total - self.totals[g].cpu(), every.outer - self.outers[g].cpu()
                ).moments()
            )
            for g, count in enumerate(self.counts.tolist())
            if count > 0 and every.count - count >= 2
        ]


@final
class _RootedReference:
    """The same distance for many sets of samples: the reference's root R = S_1^(1/2) is taken once.

    tr (S_1 S_2)^(1/2) = tr (R S_2 R)^(1/2), and R S_2 R is symmetric: its eigenvalues cost a fraction of those of
    S_1 S_2, which is what counts where D is 2048.
    """

    def __init__(self, reference: Moments) -> None:
        self._reference = reference
        values, vectors = torch.linalg.eigh(reference.covariance)
        self._root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T

    def distance(self, other: Moments) -> float:
        values = torch.linalg.eigvalsh(self._root @ other.covariance @ self._root)
        overlap = values.clamp(min=0.0).sqrt().sum()
        shift = (self._reference.mean - other.mean).square().sum()
        return float(shift + (self._reference.covariance + other.covariance).trace() - 2.0 * overlap)
