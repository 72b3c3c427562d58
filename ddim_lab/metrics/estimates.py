"""Uncertainty of what is measured, and lines through it; plain numbers in, plain numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["GROUPS", "Line", "fit_line", "jackknife_se", "paired_se"]

GROUPS: Final = 20
"""Groups of samples whose sums are kept apart for the delete-a-group jackknife; sample i is in group i mod 20."""


def jackknife_se(leave_one_out: Sequence[float]) -> float:
    """Standard error by the delete-a-group jackknife: se^2 = (G - 1)/G sum_g (d_g - mean d)^2.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), Eq. 11.5, with groups for points.

    It covers the drawing of samples alone: neither the training seed nor the bias of a Fréchet distance in N.

    Args:
        leave_one_out: d_g, the statistic with group g of G left out, in the statistic's unit; G >= 2.
    """
    groups = len(leave_one_out)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, not {groups}")
    mean = math.fsum(leave_one_out) / groups
    return math.sqrt((groups - 1) / groups * math.fsum((d - mean) ** 2 for d in leave_one_out))


def paired_se(first: Sequence[float], second: Sequence[float]) -> float:
    """Standard error of the difference of two statistics over the same groups, pairing group by group.

    Group g must hold the same samples (the same x_T) in both; then what they share cancels.
    """
    return jackknife_se([b - a for a, b in zip(first, second, strict=True)])


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x by least squares, from `points` points.

    `r_squared` is None where it says nothing: from two points, or where all y are equal. `slope_se` is the slope's
    standard error by the scatter about the line, None from two points.
    """

    slope: float
    intercept: float
    r_squared: float | None
    points: int
    slope_se: float | None = None


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The least-squares line through (x, y), or None with fewer than two distinct x."""
    if len(set(x)) < 2:
        return None
    slope, intercept = statistics.linear_regression(x, y)
    telling = len(x) > 2 and len(set(y)) > 1
    r_squared = statistics.correlation(x, y) ** 2 if telling else None
    slope_se = None
    if len(x) > 2:
        about = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        spread = math.fsum((a - statistics.fmean(x)) ** 2 for a in x)
        slope_se = math.sqrt(about / (len(x) - 2) / spread)
    return Line(slope=slope, intercept=intercept, r_squared=r_squared, points=len(x), slope_se=slope_se)
