"""Which cells belong on one line, what that line is called, and which lines may share a table.

A series is a sampler with all its settings but the number of steps, or of forwards where the sweep asks for those. Its
name says what varies in the sweep and nothing else. A table holds cells whose values compare: a distance of one metric,
one feature network, one reference and one N, for values that differ in any of these never share a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.report.cells import BudgetUnit, Cell
from ddim_lab.report.numbers import DASH

SIGMA_HAT = "σ̂"


@dataclass(frozen=True)
class Series:
    """Cells that differ in their budget (`Cell.budget`). `index` orders the series and picks their colour.

    `without_seed` is the label without the sampling seed, `family` without the training seed, too: series of one family
    differ in their seeds alone.
    """

    index: int
    label: str
    without_seed: str
    family: str


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: a series, and its cell at each budget (planned ones only)."""

    series: Series
    cells: dict[int | None, Cell]


@dataclass(frozen=True, eq=False)
class PaperTable:
    """Cells arranged as in the paper's Table 1: series down, budgets across, which are all steps (S) or all NFE."""

    columns: tuple[int | None, ...]
    rows: tuple[Row, ...]
    unit: BudgetUnit

    @property
    def cells(self) -> list[Cell]:
        """The cells, row by row."""
        return [row.cells[column] for row in self.rows for column in self.columns if column in row.cells]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(map(self.heading, self.columns))

    def heading(self, column: int | None) -> str:
        """Of one column, as "S = 10"."""
        return DASH if column is None else f"{self.unit} = {column}"


def noise_label(labels: dict[str, Any]) -> str:
    """ "η 0.5", or "σ̂" for the larger variance of the paper; of a formula from outside, its sampler's name.

    The analytic variance is told beside eta, whose mean it is around.
    """
    if labels.get("formula") is not None:
        eta = labels.get("eta")
        return f"{labels.get('sampler')}{f' · η {eta:g}' if eta else ''}"
    if labels.get("variance") == "large":
        return SIGMA_HAT
    eta = labels.get("eta")
    analytic = ", analytic" if labels.get("variance") == "analytic" else ""
    return str(labels.get("sampler") or "cell") if eta is None else f"η {eta:g}{analytic}"


def _training_seed(value: Any) -> str:
    return f"training seed {value}"


def _seed(value: Any) -> str:
    return f"seed {value}"


_NAMED: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("sweep", str),
    ("guidance", lambda value: "no guidance" if value is None else f"guidance {value:g}"),
    ("spacing", str),
    ("clip", lambda value: f"clip {value}"),
    ("data", str),
    ("model", lambda value: f"model {value}"),
    ("training_seed", _training_seed),
    ("seed", _seed),
    ("batch_size", lambda value: f"batch {value}"),
)


def name_series(cells: Sequence[Cell]) -> dict[int, Series]:
    """The series of each cell, by cell number.

    Settings are added to the names in a fixed order, each only if it tells apart cells that the names so far do not:
    the noise first (η or σ̂), then in a comparison the sweep, then guidance, spacing, clipping, data, model, seeds and
    batch size, then the preset's name, and at last, where two different jobs would still share a place, the overrides
    that differ.
    """
    names: dict[int, tuple[str, ...]] = {cell.number: (noise_label(cell.labels),) for cell in cells}

    for field, show in _NAMED:
        values = {cell.number: cell.labels.get(field) for cell in cells}
        if len({(names[n], repr(values[n])) for n in names}) > len(set(names.values())):
            names = {n: (*names[n], show(values[n])) for n in names}

    presets = {cell.number: str(cell.labels.get("sampler")) for cell in cells}
    _tell_apart(names, presets, _clusters(names.items()))

    crowded: dict[tuple[Any, ...], set[tuple[str, ...]]] = {}
    for cell in cells:
        place = (names[cell.number], cell.budget, _population(cell))
        crowded.setdefault(place, set()).add(tuple(sorted(cell.plan.overrides)))
    if any(len(jobs) > 1 for jobs in crowded.values()):
        shared = set.intersection(*(set(cell.plan.overrides) for cell in cells))
        own = {
            cell.number: " ".join(
                text
                for text in cell.plan.overrides
                if text not in shared and text.partition("=")[0].lstrip("+") not in ("steps", "nfe", "num_samples")
            )
            for cell in cells
        }
        _tell_apart(names, own, _clusters(names.items()))

    training = {cell.number: _training_seed(cell.labels.get("training_seed")) for cell in cells}
    sampling = {cell.number: _seed(cell.labels.get("seed")) for cell in cells}
    first = {cell.number: position for position, cell in enumerate(cells)}
    noise = {cell.number: _noise_order(cell.labels) for cell in cells}
    order = sorted(names, key=lambda n: (noise[n], first[n]))
    series: dict[tuple[str, ...], Series] = {}
    for number in order:
        name = names[number]
        parts = [part for part in name if part]
        without = [part for part in parts if part != sampling[number]]
        family = [part for part in without if part != training[number]]
        series.setdefault(name, Series(len(series), *map(" · ".join, (parts, without, family))))
    return {number: series[names[number]] for number in names}


def _clusters(pairs: Iterable[tuple[int, tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    clusters: dict[tuple[str, ...], list[int]] = {}
    for number, name in pairs:
        clusters.setdefault(name, []).append(number)
    return clusters


def _tell_apart(
    names: dict[int, tuple[str, ...]], values: dict[int, str], clusters: dict[tuple[str, ...], list[int]]
) -> None:
    """Add a cell's value to its name where cells of the same name differ in it."""
    for name, numbers in clusters.items():
        if len({values[number] for number in numbers}) > 1:
            for number in numbers:
                names[number] = (*name, values[number])


def _noise_order(labels: dict[str, Any]) -> tuple[bool, bool, float]:
    eta, variance = labels.get("eta"), labels.get("variance")
    return variance == "large", variance == "analytic", float(eta) if isinstance(eta, int | float) else -1.0


def _population(cell: Cell) -> tuple[Any, ...]:
    """What a cell's plan says of the table it belongs to."""
    labels = cell.labels
    return cell.plan.task, labels.get("data"), labels.get("num_samples"), cell.budget_unit


def paper_tables(cells: Sequence[Cell], series: Mapping[int, Series]) -> list[PaperTable]:
    """One table for each set of cells that compare (`Cell.compared_by`), in order of first appearance.

    A hole compares with nothing; it goes to the first table of the same task, data and N that has its place free. Cells
    without such a value share a table for each task, data and N. Of two equal jobs the first that is done is shown.
    """
    groups: dict[tuple[Any, ...], dict[tuple[int, int | None], Cell]] = {}

    def place(cell: Cell) -> tuple[int, int | None]:
        return series[cell.number].index, cell.budget

    for cell in cells:
        if (value := cell.compared_by) is not None:
            trait = value.name, cell.budget_unit, tuple(sorted(value.comparable.items()))
            # data of the same reference share a table; the plan's own values only place the holes
            key = next((k for k in groups if k[0] == trait), (trait, _population(cell)))
            groups.setdefault(key, {}).setdefault(place(cell), cell)
    for cell in cells:
        if cell.compared_by is None:
            fitting = [
                key
                for key, taken in groups.items()
                if cell.status != "done"
                and place(cell) not in taken
                and any(_population(other) == _population(cell) for other in taken.values())
            ]
            taken = groups.setdefault(fitting[0] if fitting else (None, _population(cell)), {})
            if place(cell) not in taken or taken[place(cell)].status != "done":
                taken[place(cell)] = cell

    by_index = {s.index: s for s in series.values()}
    return [_arrange(taken, by_index) for taken in groups.values()]


def _arrange(taken: Mapping[tuple[int, int | None], Cell], series: Mapping[int, Series]) -> PaperTable:
    columns = sorted({column for _, column in taken}, key=lambda column: (column is None, column or 0))
    rows = tuple(
        Row(series[index], {column: cell for (i, column), cell in taken.items() if i == index})
        for index in sorted({index for index, _ in taken})
    )
    return PaperTable(tuple(columns), rows, next(iter(taken.values())).budget_unit)


def name_cells(cells: Sequence[Cell], series: Mapping[int, Series]) -> dict[int, str]:
    """A short name for each cell, by cell number: its series and budget, and N or the job's number if need be."""
    several_n = len({cell.labels.get("num_samples") for cell in cells}) > 1
    names: dict[int, str] = {}
    for cell in cells:
        parts = [series[cell.number].label]
        if cell.budget is not None:
            parts.append(f"{cell.budget_unit} = {cell.budget}")
        if several_n:
            parts.append(f"N = {cell.labels.get('num_samples')}")
        names[cell.number] = ", ".join(parts)
    taken = list(names.values())
    return {n: f"{name} (job {n})" if taken.count(name) > 1 else name for n, name in names.items()}
