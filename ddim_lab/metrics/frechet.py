"""Fréchet distance between feature distributions, and what its standard error needs.

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))       (Dowson & Landau 1982; Heusel et al. 2017)

Means and covariances come from float64 sums; the distance itself is torchmetrics'.
"""

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from ddim_lab.metrics.statistics import FeatureSums

__all__ = ["GROUPS", "FrechetDistance"]

GROUPS: Final = 20
"""Groups of samples whose sums are kept apart for the delete-a-group jackknife; sample i is in group i mod 20."""


@final
class _PassThrough(nn.Module):
    """Lets torchmetrics' FID take features where it expects images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _distance(reference: FeatureSums, count: int, total: Tensor, outer: Tensor) -> float:
    fid = FrechetInceptionDistance(feature=_PassThrough(len(total)))
    fid.orig_dtype = torch.float64
    fid.real_features_num_samples = torch.tensor(reference.count)
    fid.real_features_sum, fid.real_features_cov_sum = reference.total, reference.outer
    fid.fake_features_num_samples = torch.tensor(count)
    fid.fake_features_sum, fid.fake_features_cov_sum = total, outer
    fid._update_count = 1  # filled from sums, not by update()
    return float(fid.compute())


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

    def __init__(self, reference: FeatureSums, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reference = reference
        size = len(reference.total)
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

    def compute(self) -> Tensor:
        """FD of all samples added, a float64 scalar.

        Raises:
            ValueError: fewer than two samples: no covariance.
        """
        if self.num_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.num_samples}")
        sums = (self.num_samples, self.totals.sum(0).cpu(), self.outers.sum(0).cpu())
        return torch.tensor(_distance(self._reference, *sums), dtype=torch.float64)

    @staticmethod
    def between(reference: FeatureSums, other: FeatureSums) -> float:
        """FD between two finished sums, for real images against real ones."""
        return _distance(reference, other.count, other.total, other.outer)

    def leave_one_out(self) -> list[float]:
        """FD without group g, for each g that holds samples: the jackknife's replicates."""
        reference = _RootedReference(self._reference)
        count, total, outer = self.counts.sum(), self.totals.sum(0), self.outers.sum(0)
        return [
            reference.distance(
                int(count - self.counts[g]), (total - self.totals[g]).cpu(), (outer - self.outers[g]).cpu()
            )
            for g in range(GROUPS)
            if self.counts[g] > 0 and count - self.counts[g] >= 2
        ]


@final
class _RootedReference:
    """The same distance for many sets of samples: the reference's root R = S_1^(1/2) is taken once.

    tr (S_1 S_2)^(1/2) = tr (R S_2 R)^(1/2), and R S_2 R is symmetric: its eigenvalues cost a fraction of those of
    S_1 S_2, which is what counts where D is 2048.
    """

    def __init__(self, reference: FeatureSums) -> None:
        self._mean, self._covariance = _moments(reference.count, reference.total, reference.outer)
        values, vectors = torch.linalg.eigh(self._covariance)
        self._root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T

    def distance(self, count: int, total: Tensor, outer: Tensor) -> float:
        mean, covariance = _moments(count, total, outer)
        values = torch.linalg.eigvalsh(self._root @ covariance @ self._root)
        overlap = values.clamp(min=0.0).sqrt().sum()
        return float((self._mean - mean).square().sum() + (self._covariance + covariance).trace() - 2.0 * overlap)


def _moments(count: int, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance from sums."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)
