"""How a statistic answers to each of its samples: its expansion to second order, from which its error is taken.

A statistic theta of N samples' distribution F_N, near that of all possible samples F:

    theta(F_N) = theta(F) + 1/N sum_i a(x_i) + 1/(2 N^2) sum_ij b(x_i, x_j) + ...

a is the influence function, b its second order (von Mises 1947; Serfling 1980, Approximation Theorems of Mathematical
Statistics, chapter 6). The variance is Var a / N + Var b / (2 N^2). Near its minimum a distance has no a: all of its
error is of second order, which a jackknife counts twice (`ddim_lab.metrics.estimates.jackknife_se`).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from ddim_lab.metrics.estimates import GROUPS, PAIRED_GROUPS, Estimate

__all__ = ["estimate", "paired_groups"]

FEWEST: Final = 5
"""Groups below which their pairs say nothing of the second order: each is compared with the mean of all."""

A_GROUP: Final = 4
"""Samples, at least, of a group whose pairs are looked at."""


def paired_groups(count: int) -> int:
    """Into how many groups `count` samples are split for `estimate`'s pairs: sample i is in group i mod that; or 0."""
    groups = min(PAIRED_GROUPS, count // A_GROUP)
    return groups if groups >= FEWEST else 0


def estimate(value: float, influence: Tensor, pairs: Tensor | None) -> Estimate:
    """The statistic with its error.

    Args:
        value: theta(F_N).
        influence: a(x_i) of each sample, taken at F_N, float64 [N].
        pairs: the second derivative of theta in the directions F_g - F_N and F_h - F_N of groups g and h, float64
            [K, K] with K = `paired_groups`(N); None where K is 0, or where it is not known.
    """
    influence = influence.double().cpu()
    count = len(influence)
    groups = min(GROUPS, count)
    member = torch.arange(count) % groups
    sizes = torch.bincount(member, minlength=groups).double()
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, member, influence)
    # A group's mean varies by its size: scaled as if all had the same.
    means = sums / (sizes * count / groups).sqrt()
    replicates = (value - means / max(1, groups - 1)).tolist() if groups > 1 else []
    return Estimate(value, tuple(replicates), () if pairs is None else _interactions(pairs.double().cpu()))


def _interactions(pairs: Tensor) -> tuple[float, ...]:
    """`Estimate.interactions` of second derivatives [K, K] in the directions of groups less their mean.

    Each direction holds its share of the mean of all, by which the diagonal leaks into every pair: that is taken out.
    K (K - 3) / 2 of the pairs are free; their mean square, over 2 K^2, is the variance of the second order.
    """
    groups = len(pairs)
    diagonal = pairs.diagonal()
    mean = diagonal.mean()
    own = (diagonal - mean) / (groups - 2)
    free = pairs + mean / (groups - 1) + own[:, None] + own[None, :]
    above = torch.triu_indices(groups, groups, offset=1)
    scale = 1.0 / (groups * math.sqrt(groups * (groups - 3)))
    return tuple((scale * free[above[0], above[1]]).tolist())
