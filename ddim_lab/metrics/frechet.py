"""Fréchet distance between feature distributions, with its error.

    FD = |mu - m|^2 + tr(S + C - 2 (C^(1/2) S C^(1/2))^(1/2))       (Dowson & Landau 1982; Heusel et al. 2017)

mu and S are mean and covariance of the samples' features, m and C those of the reference, which counts as known. Means
and covariances come from float64 sums. The trace of the root is the sum of the roots of the eigenvalues of a symmetric
matrix, which always converges. The eigenvalues of S C, which others take (torchmetrics), are the same in theory; but
S C is not symmetric, and where a covariance is singular, as of fewer samples than features, MKL may give up on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, final

import torch
from torch import Tensor

from ddim_lab.metrics.estimates import Estimate
from ddim_lab.metrics.influence import estimate, paired_groups
from ddim_lab.metrics.statistics import Moments

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EXTRAPOLATED_FROM", "FrechetDistance", "Strata", "frechet_distance"]

BLOCK: Final = 8192
"""Feature vectors in float64 at once."""

SAMPLES_A_PART: Final = 10
"""Samples a feature, at least, in the parts that a distance is extrapolated from."""

EXTRAPOLATED_FROM: Final = 2 * SAMPLES_A_PART
"""Samples a feature from which a distance is extrapolated: of two parts."""

PARTS: Final = 4
"""Into which the samples are split for it, at most."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """FD between two distributions; NaN where they hold what is no number.

    Not below 0, where rounding alone would bring it.
    """
    moments = (first.mean, first.covariance, second.mean, second.covariance)
    if not all(bool(part.isfinite().all()) for part in moments):
        return math.nan
    return _distance(first, second, _inner(_root(first.covariance), second.covariance)[0])


def _root(covariance: Tensor) -> Tensor:
    """C^(1/2), symmetric; eigenvalues that rounding brought below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root


def _inner(root: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of C^(1/2) S C^(1/2)."""
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    return values, vectors


def _distance(first: Moments, second: Moments, squares: Tensor) -> float:
    """FD, by the eigenvalues of `_inner`."""
    apart = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    distance = float(apart - 2.0 * squares.clamp(min=0.0).sqrt().sum())
    return 0.0 if distance < 0.0 else distance  # NaN stays


@final
@dataclass(frozen=True)
class Strata:
    """Classes of samples, and the shares that they are weighted to.

    Attributes:
        of: the class of each sample, int64 [N], 0 ... K - 1.
        shares: of each class in the population, float64 [K]; they add up to 1.
    """

    of: Tensor
    shares: Tensor

    def weights(self) -> Tensor:
        """w_i = share of the sample's class in the population / its share of the samples; float64 [N], of mean 1.

        Raises:
            ValueError: a class of the population has fewer than two samples; names it.
        """
        counts = torch.bincount(self.of, minlength=len(self.shares))
        if few := [c for c in range(len(self.shares)) if counts[c] < 2 and self.shares[c] > 0]:
            raise ValueError(f"{int(counts[few[0]])} of the samples look like class {few[0]}, and 2 are needed")
        each = self.shares * len(self.of) / counts.clamp(min=1)
        weights: Tensor = each[self.of]
        return weights


@final
class FrechetDistance:
    """The distance of samples to a reference.

    Its error is taken from the distance's expansion (`ddim_lab.metrics.influence`). With W = I - T and
    T = C^(1/2) (C^(1/2) S C^(1/2))^(-1/2) C^(1/2), the optimal map from the samples' Gaussian to the reference's:

        a(x) = 2 (mu - m) . (x - mu) + (x - mu)^T W (x - mu) - tr W S

    and, for a change dS of S and y = U^T C^(1/2) dS C^(1/2) U in the eigenvectors of C^(1/2) S C^(1/2), whose
    eigenvalues are s_i^2, the second derivative is sum_ij y_ij y'_ij / (s_i s_j (s_i + s_j)). Directions in which one
    of them has no variance are left out of T: there the distance has no derivative.

    Args:
        reference: m and C.
        device: where it is computed, in float64; None for the CPU.
        divisor: of the samples' sums of squares where all weigh 1: "n-1", by which S is unbiased, or "n".
    """

    def __init__(
        self, reference: Moments, device: torch.device | None = None, divisor: Literal["n-1", "n"] = "n-1"
    ) -> None:
        self._device, self._less = device, 1 if divisor == "n-1" else 0
        self._reference = Moments(reference.mean.to(device), reference.covariance.to(device), reference.count)

    @cached_property
    def _root(self) -> Tensor:
        return _root(self._reference.covariance)

    def of(self, vectors: np.ndarray[Any, Any] | Tensor, strata: Strata | None = None) -> Estimate:
        """The distance of feature vectors [N, D]; sample i has place i. A memory-mapped array is read in blocks.

        Args:
            vectors: at least two, finite.
            strata: post-stratified: samples are weighted so that each class has its share of the population. What is
                then left of the luck of the draw is within classes (Holt & Smith 1979, Post Stratification).

        Raises:
            ValueError: as `Strata.weights`; or there are fewer than two vectors.
        """
        return estimate(*self._looked_at(vectors, strata))

    def value(self, vectors: np.ndarray[Any, Any] | Tensor) -> float:
        """The distance without its error."""
        moments = self._moments(vectors, torch.ones(len(vectors), device=self._device))
        return _distance(self._reference, moments, _inner(self._root, moments.covariance)[0])

    def extrapolated(self, vectors: np.ndarray[Any, Any] | Tensor, whole: Estimate) -> Estimate:
        """The distance at infinite N, by a line through FD against 1/N (Chong & Forsyth 2020, section 4).

        FD of n samples is about FD_inf + b/n, so that of all N is compared with the mean of k parts of N/k samples, i
        in part i mod k, for k = 2 ... N / (10 D), 4 at most: all samples are in each, and what they have by chance to
        first order is the same. At fewer than 10 D samples a part, the line is none: it is off by many errors.

        Args:
            vectors, whole: all N, and `of` them.

        Raises:
            ValueError: there are fewer than 20 D vectors.
        """
        count, size = vectors.shape
        most = min(PARTS, count // (SAMPLES_A_PART * size))
        if most < 2:
            needed = EXTRAPOLATED_FROM * size
            raise ValueError(f"an extrapolation in {size} features needs {needed:,} samples, got {count:,}")
        parts = torch.arange(1, most + 1, dtype=torch.float64)
        centred = parts - parts.mean()  # least squares: the intercept is a sum of the values with these weights
        shares = (1.0 / most - parts.mean() * centred / centred.square().sum()).tolist()
        value, influence = 0.0, torch.zeros(count, dtype=torch.float64)
        for k, share in enumerate(shares[1:], start=2):
            for part in range(k):
                value_of_part, influence_of_part, _ = self._looked_at(vectors[part::k], None, pairs=False)
                value += share * value_of_part / k
                influence[part::k] += share * influence_of_part.cpu()
        # How much more the second order varies than in one distance: each pair of samples counts in the k in which
        # both are in one part.
        period = math.lcm(*range(1, most + 1))
        counted = [
            sum(share * k for k, share in enumerate(shares, start=1) if apart % k == 0) for apart in range(period)
        ]
        more = math.sqrt(math.fsum(c * c for c in counted) / period)
        parted = estimate(value, influence, None)
        return Estimate(
            shares[0] * whole.value + parted.value,
            tuple(shares[0] * a + b for a, b in zip(whole.replicates, parted.replicates, strict=True)),
            tuple(more * c for c in whole.interactions),
        )

    def _looked_at(
        self, vectors: np.ndarray[Any, Any] | Tensor, strata: Strata | None, *, pairs: bool = True
    ) -> tuple[float, Tensor, Tensor | None]:
        """Value, influence of each sample, second derivatives of pairs of groups: `estimate`'s arguments."""
        count = len(vectors)
        if count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {count}")
        weights = torch.ones(count, dtype=torch.float64) if strata is None else strata.weights()
        weights = weights.to(self._device)
        classes = torch.zeros(count, dtype=torch.int64) if strata is None else strata.of
        classes = classes.to(self._device)
        moments = self._moments(vectors, weights)
        groups = paired_groups(count) if pairs else 0
        inner = _inner(self._root, moments.covariance)
        value = _distance(self._reference, moments, inner[0])
        return value, *self._expanded(vectors, moments, inner, weights, classes, groups)

    def _moments(self, vectors: np.ndarray[Any, Any] | Tensor, weights: Tensor) -> Moments:
        """Weighted mean and covariance; with the divisor n - 1 the latter is unbiased where all weights are 1."""
        count, total, outer = len(vectors), None, None
        for start, block in _blocks(vectors, self._device):
            weighted = block * weights[start : start + len(block), None]
            total = weighted.sum(0) if total is None else total + weighted.sum(0)
            outer = weighted.T @ block if outer is None else outer + weighted.T @ block
        assert total is not None
        assert outer is not None
        mean = total / count
        return Moments(mean, (outer - count * torch.outer(mean, mean)) / (count - self._less), count)

    def _expanded(
        self,
        vectors: np.ndarray[Any, Any] | Tensor,
        moments: Moments,
        inner: tuple[Tensor, Tensor],
        weights: Tensor,
        classes: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor | None]:
        count, size = len(vectors), len(moments.mean)
        values, axes = inner
        kept = values > size * torch.finfo(values.dtype).eps * values[-1]
        roots, axes = values[kept].sqrt(), self._root @ axes[:, kept]
        slope = torch.eye(size, dtype=values.dtype, device=values.device) - (axes / roots) @ axes.T
        shift = 2.0 * (moments.mean - self._reference.mean)

        strata = int(classes.max()) + 1
        influence = torch.empty(count, dtype=torch.float64, device=values.device)
        # sums of weighted samples over groups, and over classes: of x - mu, and of the squares of what moves S
        means = torch.zeros(groups, size, dtype=torch.float64, device=values.device)
        squares = torch.zeros(groups, len(roots), len(roots), dtype=torch.float64, device=values.device)
        class_means = torch.zeros(strata, size, dtype=torch.float64, device=values.device)
        class_squares = torch.zeros(strata, *squares.shape[1:], dtype=torch.float64, device=values.device)
        for start, block in _blocks(vectors, self._device):
            x, stop = block - moments.mean, start + len(block)
            influence[start:stop] = x @ shift + ((x @ slope) * x).sum(1)
            if groups:
                y, w, named = x @ axes, weights[start:stop, None], torch.arange(start, stop, device=x.device) % groups
                for g in range(groups):
                    mine = named == g
                    means[g] += (w[mine] * x[mine]).sum(0)
                    squares[g] += (w[mine] * y[mine]).T @ y[mine]
                for c in range(strata):
                    mine = classes[start:stop] == c
                    class_means[c] += x[mine].sum(0)
                    class_squares[c] += y[mine].T @ y[mine]
        sizes = torch.bincount(classes, minlength=strata).double()
        by_class = torch.zeros(strata, dtype=torch.float64, device=values.device).index_add_(0, classes, influence)
        influence = weights * (influence - (by_class / sizes.clamp(min=1.0))[classes])
        if not groups:
            return influence, None
        named = torch.arange(count, device=values.device) % groups
        each = torch.bincount(named, minlength=groups).double()
        # sum of weights of each class in each group: how much of the class's mean the group is compared with
        held = torch.zeros(groups, strata, dtype=torch.float64, device=values.device)
        held.index_put_((named, classes), weights, accumulate=True)
        held /= sizes.clamp(min=1.0)
        means = (means - held @ class_means) / each[:, None]
        curvature = 1.0 / (roots[:, None] * roots[None, :] * (roots[:, None] + roots[None, :]))
        for g in range(groups):  # in place: they are the largest there is
            for c in range(strata):
                squares[g] -= held[g, c] * class_squares[c]
            squares[g] *= curvature.sqrt() / each[g]
        flat = squares.flatten(1)
        pairs = flat @ flat.T + 2.0 * means @ (means - means @ slope).T
        return influence, pairs


def _blocks(vectors: np.ndarray[Any, Any] | Tensor, device: torch.device | None) -> Iterator[tuple[int, Tensor]]:
    """(start, float64 block on the device), in order."""
    import numpy as np

    for start in range(0, len(vectors), BLOCK):
        part = vectors[start : start + BLOCK]
        block = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        yield start, block.to(device).double()
