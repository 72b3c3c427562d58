"""Sampling time against the number of network forwards: which cells may share a line, and the line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.metrics.estimates import Line, fit_line
from ddim_lab.report.series import Series
from ddim_lab.report.sweep import Cell


@dataclass(frozen=True)
class Fit:
    """Seconds an image = intercept + slope · NFE, for one series, or for all of them (`series` None)."""

    series: Series | None
    line: Line
    forwards: tuple[int, int]


def forwards(cell: Cell) -> int | None:
    """Network forwards a sample (NFE); the steps asked for where the result does not say."""
    nfe = cell.result.measurements.nfe if cell.result else None
    return nfe if nfe is not None else cell.steps


def timed(cells: Sequence[Cell]) -> list[tuple[Cell, int, float]]:
    """The cells with a time that counts: (cell, forwards, seconds an image). Contended ones are left out."""
    return [
        (cell, count, seconds)
        for cell in cells
        if (seconds := cell.seconds_per_image) is not None and (count := forwards(cell)) is not None
    ]


def contended(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that were timed while something else was at work."""
    return [cell for cell in cells if cell.speed is not None and cell.speed.contended]


def conditions(cell: Cell) -> tuple[Any, ...]:
    """What must be equal for times to compare: the runtime as resolved, images a batch, data (their size), network."""
    result = cell.result
    return (
        json.dumps(result.recipe_value("runtime"), sort_keys=True) if result else None,
        cell.speed.images if cell.speed else None,
        cell.plan.labels.get("data"),
        result.recipe_value("model", "name") if result else None,
        result.recipe_value("model", "parameters") if result else None,
    )


def timing_fits(cells: Sequence[Cell], series: dict[int, Series]) -> list[Fit]:
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
