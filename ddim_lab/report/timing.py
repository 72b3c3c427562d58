"""Sampling time against network forwards: which cells may share a line, and the line; which points nothing beats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.metrics.estimates import Line, fit_line
from ddim_lab.report.cells import Cell
from ddim_lab.report.series import Series


@dataclass(frozen=True)
class Fit:
    """Seconds an image = intercept + slope · NFE, for one series, or for all of them (`series` None)."""

    series: Series | None
    line: Line
    forwards: tuple[int, int]


def timed(cells: Sequence[Cell]) -> list[tuple[Cell, int, float]]:
    """The cells with a time that counts: (cell, forwards, seconds an image). Contended ones are left out."""
    return [
        (cell, count, cell.seconds)
        for cell in cells
        if cell.seconds is not None and (count := cell.steps if cell.forwards is None else cell.forwards) is not None
    ]


def conditions(cell: Cell) -> tuple[Any, ...]:
    """What must be equal for times to compare: the runtime as resolved, images a batch, data (their size), network."""
    return (
        json.dumps(cell.recipe("runtime"), sort_keys=True),
        cell.time.count if cell.time else None,
        cell.labels.get("data"),
        cell.recipe("model", "name"),
        cell.recipe("model", "parameters"),
    )


def timing_fits(cells: Sequence[Cell], series: Mapping[int, Series]) -> list[Fit]:
    """A line for each series with two different numbers of forwards, after one for all series together.

    The common line is there only if there are several series, and all were timed under the same conditions.
    """
    points = timed(cells)

    def fit(of: Series | None, chosen: Sequence[tuple[Cell, int, float]]) -> list[Fit]:
        x, y = [count for _, count, _ in chosen], [seconds for _, _, seconds in chosen]
        line = fit_line(x, y)
        return [] if line is None else [Fit(of, line, (min(x), max(x)))]

    present = sorted({series[cell.number] for cell, _, _ in points}, key=lambda s: s.index)
    fits: list[Fit] = []
    if len(present) > 1 and len({conditions(cell) for cell, _, _ in points}) == 1:
        fits += fit(None, points)
    for one in present:
        fits += fit(one, [point for point in points if series[point[0].number] == one])
    return fits


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
