"""Which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


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
