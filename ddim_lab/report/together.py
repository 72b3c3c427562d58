"""Which values of a table are compared, and how far apart they are: the difference, its error, and what that is of.

Values of the same sampling seed start from the same x_T and are compared pair by pair. Of several sampling seeds the
differences are averaged: each seed is other samples, so their errors are independent.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddim_lab.metrics.estimates import GROUPS, paired_se
from ddim_lab.metrics.significance import welch
from ddim_lab.report.cells import Cell
from ddim_lab.report.published import not_comparable, published, stands_beside
from ddim_lab.report.series import Row
from ddim_lab.report.tables import ValueTable
from ddim_lab.store.records import Published, Value

Kind = Literal["solvers", "rows", "published", "level", "steps"]
"""What is compared: a solver with DDIM, neighbouring rows, ours with a published number or with the value's level,
neighbouring columns of a row."""


@dataclass(frozen=True)
class Difference:
    """A second thing minus a first, in the value's unit.

    Attributes:
        value: the difference.
        se: its standard error.
        freedom: degrees of freedom of the standard error.
        samples: how many it is of, on either side; None where that is not known.
        fixed_se: the part of `se` that more samples leave as it is.
        of: the numbers of the cells compared, first and second; a published number has none.
    """

    value: float
    se: float
    freedom: float = GROUPS - 1.0
    samples: int | None = None
    fixed_se: float = 0.0
    of: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True)
class Comparison:
    """Two things of a table and their differences (second minus first) by place.

    Attributes:
        kind: what is compared.
        first, second: in words: rows' labels, or columns' headings.
        differences: by column's heading, or by row's label where columns are compared.
        adjacent: of rows, whether they are neighbours in the table.
    """

    kind: Kind
    first: str
    second: str
    differences: Mapping[str, Difference]
    adjacent: bool = True


# -- two cells ------------------------------------------------------------------------------------------


def paired_difference(of: ValueTable, first: Cell, second: Cell) -> Difference | None:
    """The paired difference of two cells of a table, or None where they can't be paired.

    They pair where both have replicates over as many groups of the same samples: same seed, so that group
    g starts from the same x_T in both. Its degrees of freedom are those of the groups, G - 1.
    """
    before, after = of.number_of(first), of.number_of(second)
    if before is None or after is None or first.labels.get("seed") != second.labels.get("seed"):
        return None
    one, two = of.values[first.number], of.values[second.number]
    a, b = one.replicates or (), two.replicates or ()
    if not len(a) == len(b) > 1:
        return None
    se = paired_se(a, b, one.interactions, two.interactions)
    samples = one.count if one.count == two.count else None
    return Difference(after - before, se, len(a) - 1.0, samples, of=((first.number,), (second.number,)))


def freedom_of(value: Value) -> float:
    """Degrees of freedom of a value's own standard error: one less than it has replicates.

    An error without replicates may be of as few groups as the jackknife's, or of as few images as the value is of.
    """
    if value.replicates and len(value.replicates) > 1:
        return len(value.replicates) - 1.0
    return max(1.0, min(GROUPS, value.count or GROUPS) - 1.0)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of differences at other sampling seeds: errors add in squares, Welch and Satterthwaite's freedom.

    It is of the samples of all seeds together.
    """
    if len(differences) == 1:
        return differences[0]
    k = len(differences)
    counts = [d.samples for d in differences if d.samples is not None]
    return Difference(
        statistics.fmean(d.value for d in differences),
        math.sqrt(math.fsum(d.se**2 for d in differences)) / k,
        welch([(d.se**2, d.freedom) for d in differences]),
        sum(counts) if len(counts) == k else None,
        of=(tuple(n for d in differences for n in d.of[0]), tuple(n for d in differences for n in d.of[1])),
    )


# -- the comparisons of a table -------------------------------------------------------------------------


def comparisons(of: ValueTable, reference: Published | None) -> list[Comparison]:
    """All that a table compares; each pair of values is there once for each kind."""
    return [*against_ddim(of), *neighbours(of), *against_published(of, reference), *against_level(of), *over_steps(of)]


def neighbours(of: ValueTable) -> list[Comparison]:
    """Each row of the table against the next, and the next of its sweep, where a column can be paired.

    Rows are compared at the same training seed and the same sampling seed. Over sampling seeds the differences of two
    rows are averaged; each network is compared by itself.
    """
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in of.table.rows:
        alike.setdefault((_labels(row).get("training_seed"), _labels(row).get("seed")), []).append(row)
    found = _Pairs("rows", of)
    for rows in alike.values():
        of_sweep: dict[Any, list[int]] = {}
        for position, row in enumerate(rows):
            of_sweep.setdefault(_labels(row).get("sweep"), []).append(position)
        pairs = {pair for positions in of_sweep.values() for pair in itertools.pairwise(positions)}
        pairs |= set(itertools.pairwise(range(len(rows))))
        for i, j in sorted(pairs):
            first, second = rows[i], rows[j]
            names = first.series.without_seed, second.series.without_seed
            found.add(*names, first.cells, second.cells, adjacent=j == i + 1)
    return found.comparisons()


def over_steps(of: ValueTable) -> list[Comparison]:
    """Each column of the table against the next, row by row; over sampling seeds as `neighbours`."""
    found = _Pairs("steps", of)
    for before, after in itertools.pairwise(column for column in of.table.columns if column is not None):
        for row in of.table.rows:
            if before in row.cells and after in row.cells:
                headings = of.table.heading(before), of.table.heading(after)
                found.add_at(row.series.without_seed, *headings, row.cells[before], row.cells[after])
    return found.comparisons()


def against_ddim(of: ValueTable) -> list[Comparison]:
    """Each solver that is not the DDIM family's against DDIM on the same spacing, at as many forwards or steps.

    Without clipping, on the same network, from the same x_T; over sampling seeds as `neighbours`.
    """

    def alike(row: Row, rivals: Iterable[Row]) -> Mapping[int | None, Cell]:
        return next((other.cells for other in rivals if _spacing(other) == _spacing(row) != "custom"), {})

    return _solvers(of, alike)


def against_best_ddim(of: ValueTable) -> list[Comparison]:
    """As `against_ddim`, against DDIM on the spacing that scores best in each column.

    That one is chosen once the values are known, so no test of these differences holds.
    """
    return _solvers(of, lambda _, rivals: _best(of, rivals), best=True)


def against_published(of: ValueTable, reference: Published | None) -> list[Comparison]:
    """Ours against the published number of the same protocol, which is taken as exact to its printed digits.

    Over sampling seeds ours is the mean.
    """
    if reference is None or not stands_beside(reference, of.value):
        return []

    def other(cell: Cell, value: Value) -> float | None:
        return None if not_comparable(reference, cell, value) is not None else published(reference, cell)

    found: dict[str, dict[str, Difference]] = {}
    for label, heading, cells in _over_seeds(of):
        own = [_own(of, cell, number) for cell in cells if (number := other(cell, of.values[cell.number])) is not None]
        if own:
            found.setdefault(label, {})[heading] = mean_difference(own)
    return [Comparison("published", "the published number", label, by) for label, by in found.items()]


def against_level(of: ValueTable) -> list[Comparison]:
    """Ours against the value's level, as held-out images, where that has an error.

    It must be of as many images, unless the value's expectation does not depend on their number. The two are
    independent: their errors add in squares. More samples leave the level's as it is.
    """

    def level(cell: Cell) -> Value | None:
        value = of.values[cell.number]
        found = cell.values.get(value.level) if value.level else None
        alike = found is not None and found.finite_se is not None and found.number is not None
        comparable = found is not None and (found.count == value.count is not None or value.unbiased)
        return found if alike and comparable else None

    found: dict[tuple[str, str], dict[str, Difference]] = {}
    for label, heading, cells in _over_seeds(of):
        levels = [(cell, beside) for cell in cells if (beside := level(cell)) is not None]
        if len({(beside.number, beside.se) for _, beside in levels}) != 1:
            continue  # each sampling seed has one of its own, or there is none
        beside = levels[0][1]
        mean = mean_difference([_own(of, cell, beside.number or 0.0) for cell, _ in levels])
        fixed = beside.finite_se or 0.0
        freedom = welch([(mean.se**2, mean.freedom), (fixed**2, freedom_of(beside))])
        name = beside.label or of.value.level_says
        found.setdefault((name, label), {})[heading] = replace(
            mean, se=math.hypot(mean.se, fixed), fixed_se=fixed, freedom=freedom
        )
    return [Comparison("level", name, label, by) for (name, label), by in found.items()]


# -- how they are gathered ------------------------------------------------------------------------------


class _Pairs:
    """Paired differences by what is compared and by place, averaged over sampling seeds in the end."""

    def __init__(self, kind: Kind, of: ValueTable) -> None:
        self._kind: Kind = kind
        self._of = of
        self._found: dict[tuple[str, str], dict[str, list[Difference]]] = {}
        self._adjacent: dict[tuple[str, str], bool] = {}

    def add(
        self,
        first: str,
        second: str,
        before: Mapping[int | None, Cell],
        after: Mapping[int | None, Cell],
        adjacent: bool = True,
    ) -> None:
        """Two rows, by column; whichever columns can be paired."""
        for column in self._of.table.columns:
            if column in before and column in after:
                place = self._of.table.heading(column)
                self.add_at(place, first, second, before[column], after[column], adjacent)

    def add_at(self, place: str, first: str, second: str, before: Cell, after: Cell, adjacent: bool = True) -> None:
        """Two cells, if they can be paired."""
        if (difference := paired_difference(self._of, before, after)) is not None:
            self._found.setdefault((first, second), {}).setdefault(place, []).append(difference)
            self._adjacent[first, second] = adjacent

    def comparisons(self) -> list[Comparison]:
        return [
            Comparison(
                self._kind, *names, {place: mean_difference(of) for place, of in by.items()}, self._adjacent[names]
            )
            for names, by in self._found.items()
        ]


def _over_seeds(of: ValueTable) -> Iterator[tuple[str, str, list[Cell]]]:
    """Rows and columns with the cells of all sampling seeds there that have a value and its standard error."""
    families: dict[str, list[Row]] = {}
    for row in of.table.rows:
        families.setdefault(row.series.without_seed, []).append(row)
    for label, rows in families.items():
        for column in of.table.columns:
            cells = [row.cells[column] for row in rows if column in row.cells]
            cells = [cell for cell in cells if of.number_of(cell) is not None and of.se_of(cell) is not None]
            if cells:
                yield label, of.table.heading(column), cells


def _own(of: ValueTable, cell: Cell, other: float) -> Difference:
    """A cell's value minus a number, with the error of the cell's value."""
    value = of.values[cell.number]
    difference = (of.number_of(cell) or 0.0) - other
    return Difference(difference, of.se_of(cell) or 0.0, freedom_of(value), value.count, of=((), (cell.number,)))


def _labels(row: Row) -> Mapping[str, Any]:
    return next(iter(row.cells.values())).labels


def _spacing(row: Row) -> Any:
    return _labels(row).get("spacing")


_Rivals = Callable[[Row, Sequence[Row]], Mapping[int | None, Cell]]


def _solvers(of: ValueTable, chosen: _Rivals, best: bool = False) -> list[Comparison]:
    """Each solver against what is chosen among DDIM's rows of the same sweep, data, model and seeds."""

    def is_ddim(row: Row) -> bool:
        labels = _labels(row)
        walk = labels.get("formula"), labels.get("variance", "posterior"), labels.get("clip", "none")
        return labels.get("eta") == 0 and walk == (None, "posterior", "none")

    def common(row: Row) -> tuple[Any, ...]:
        return tuple(_labels(row).get(name) for name in ("sweep", "data", "model", "training_seed", "seed"))

    ddim = [row for row in of.table.rows if is_ddim(row)]
    found = _Pairs("solvers", of)
    for row in of.table.rows:
        if _labels(row).get("formula") is not None:
            others = chosen(row, [other for other in ddim if common(other) == common(row)])
            told = "DDIM's best" if best else f"DDIM on {_spacing(row)}"
            found.add(told, row.series.without_seed, others, row.cells)
    return found.comparisons()


def _best(of: ValueTable, rows: Iterable[Row]) -> dict[int | None, Cell]:
    """In each column the cell of these rows that scores best; nothing where values have no better and worse."""
    if of.value.better is None:
        return {}
    sign = 1.0 if of.value.better == "lower" else -1.0
    best = {}
    for column in of.table.columns:
        cells = [row.cells[column] for row in rows if column in row.cells]
        scored = [(sign * value, cell.number, cell) for cell in cells if (value := of.number_of(cell)) is not None]
        if scored:
            best[column] = min(scored)[-1]
    return best
