"""The report's own arithmetic: a straight line, a Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x by least squares, from `points` points.

    `r_squared` is None where it says nothing: from two points, or where all y are equal.
    """

    slope: float
    intercept: float
    r_squared: float | None
    points: int


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The least-squares line through (x, y), or None with fewer than two distinct x."""
    if len(set(x)) < 2:
        return None
    from scipy.stats import linregress  # a second to import: only when there is a line to fit

    fit = linregress(x, y)
    telling = len(x) > 2 and len(set(y)) > 1
    return Line(
        slope=float(fit.slope),
        intercept=float(fit.intercept),
        r_squared=float(fit.rvalue) ** 2 if telling else None,
        points=len(x),
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats: none has both coordinates as low and one lower.

    Ordered by the first coordinate. Of equal points all are on the front.
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and (other[0] < point[0] or other[1] < point[1])
            for other in points
        )

    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])
