"""Uncertainty of what is measured, and lines through it; plain numbers in, plain numbers out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "GROUPS",
    "PAIRED_GROUPS",
    "Components",
    "Estimate",
    "Line",
    "fit_line",
    "jackknife_se",
    "paired_se",
    "variance_components",
]

GROUPS: Final = 100
"""Groups of samples over which an error is taken, at most: sample i is in group i mod min(N, 100)."""

PAIRED_GROUPS: Final = 20
"""Groups whose pairs are looked at for the second order of an error, at most."""


def jackknife_se(leave_one_out: Sequence[float], interactions: Sequence[float] = ()) -> float:
    """Standard error by the delete-a-group jackknife, less what it has too much at second order.

        se^2 = (G - 1)/G sum_g (d_g - mean d)^2 - sum_p c_p^2

    The first term is Efron and Tibshirani, An Introduction to the Bootstrap (1993), Eq. 11.5, with groups for points.
    Of a statistic that is quadratic in the samples' distribution, as a distance is near its minimum, it counts second
    order twice (Efron and Stein 1981, The Jackknife Estimate of Variance): up to sqrt(2) times the error. The second
    term is one of the two. It is never more than half of the first, which is where nothing is left but second order.

    It covers the drawing of samples alone: neither the training seed nor the bias of a Fréchet distance in N.

    Args:
        leave_one_out: d_g, the statistic with group g of G left out, in the statistic's unit; G >= 2.
        interactions: c_p of each pair of groups, as `Estimate.interactions`; none where they are not known.
    """
    groups = len(leave_one_out)
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, not {groups}")
    mean = math.fsum(leave_one_out) / groups
    variance = (groups - 1) / groups * math.fsum((d - mean) ** 2 for d in leave_one_out)
    return math.sqrt(variance - min(math.fsum(c * c for c in interactions), 0.5 * variance))


def paired_se(
    first: Sequence[float],
    second: Sequence[float],
    first_interactions: Sequence[float] = (),
    second_interactions: Sequence[float] = (),
) -> float:
    """Standard error of the difference of two statistics over the same groups, pairing group by group.

    Group g must hold the same samples (the same x_T) in both; then what they share cancels.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    interactions: list[float] = []
    if len(first_interactions) == len(second_interactions):
        interactions = [b - a for a, b in zip(first_interactions, second_interactions, strict=True)]
    return jackknife_se(differences, interactions)


@dataclass(frozen=True)
class Estimate:
    """A statistic of samples with what its error, and that of its difference to another's, are taken from.

    Attributes:
        value: the statistic.
        replicates: it without each group of samples, to first order in the group; none of a single sample.
        interactions: c of each pair of PAIRED_GROUPS groups (1, 2), (1, 3), ..., in the statistic's unit: the sum of
            their squares is the variance that its second order has. None of few samples.
    """

    value: float
    replicates: tuple[float, ...]
    interactions: tuple[float, ...]

    @property
    def se(self) -> float | None:
        """Its standard error; None of a single sample."""
        return jackknife_se(self.replicates, self.interactions) if len(self.replicates) > 1 else None

    def paired_se(self, other: Estimate) -> float:
        """Of the difference to another's of the same samples."""
        return paired_se(self.replicates, other.replicates, self.interactions, other.interactions)


@dataclass(frozen=True)
class Components:
    """What of the variance of a value y_ij comes from where, y_ij = mu + a_i + b_j + e_ij, and the mean's error.

    Attributes:
        mean: of all y_ij.
        rows: variance of a_i.
        columns: variance of b_j.
        rest: variance of e_ij.
        se: standard error of the mean, sqrt(rows / I + columns / J + rest / (I J)).
    """

    mean: float
    rows: float
    columns: float
    rest: float
    se: float


def variance_components(values: Sequence[Sequence[float]]) -> Components:
    """Variance components of a full two-way layout without repeats, by the method of moments.

    With mean squares M_a, M_b and M_e of rows, columns and the rest: rest = M_e, rows = (M_a - M_e) / J and columns =
    (M_b - M_e) / I, none below 0.

    Source: Searle, Casella and McCulloch, Variance Components (1992), chapter 4.

    Args:
        values: y_ij, I >= 2 rows of J >= 2 each.
    """
    count, width = len(values), len(values[0])
    if count < 2 or width < 2 or any(len(row) != width for row in values):
        raise ValueError("variance components need a full layout of at least 2 rows and 2 columns")
    mean = statistics.fmean(value for row in values for value in row)
    of_rows = [statistics.fmean(row) for row in values]
    of_columns = [statistics.fmean(column) for column in zip(*values, strict=True)]
    mean_square_rows = width * statistics.variance(of_rows)
    mean_square_columns = count * statistics.variance(of_columns)
    left = math.fsum(
        (values[i][j] - of_rows[i] - of_columns[j] + mean) ** 2 for i in range(count) for j in range(width)
    )
    rest = left / ((count - 1) * (width - 1))
    rows = max(0.0, (mean_square_rows - rest) / width)
    columns = max(0.0, (mean_square_columns - rest) / count)
    return Components(mean, rows, columns, rest, math.sqrt(rows / count + columns / width + rest / (count * width)))


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
