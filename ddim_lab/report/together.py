"""What the values of a table say together: their mean over training seeds, and paired differences between rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.metrics.estimates import paired_se
from ddim_lab.report.cells import Cell
from ddim_lab.report.numbers import DASH, decimals, number
from ddim_lab.report.series import Row, Series
from ddim_lab.report.tables import Entry, TextTable, ValueTable

# -- over training seeds --------------------------------------------------------------------------------


def over_training_seeds(of: ValueTable) -> TextTable | None:
    """The mean of the table's values over the networks of each row that was trained more than once, ± their deviation.

    None where no row has two networks: another training seed is another network only where something is trained. And
    where the values have no replicates: it is not known then what of their error all networks share.
    """
    if not any(value.replicates for value in of.values.values()):
        return None
    families: dict[str, list[Row]] = {}
    for row in of.table.rows:
        families.setdefault(row.series.family, []).append(row)
    networks = {name: [_network(row) for row in rows] for name, rows in families.items()}
    families = {name: rows for name, rows in families.items() if len(set(networks[name]) - {None}) > 1}
    if not families:
        return None
    # a row without a result would have been a network of its own
    planned = {name: len(set(networks[name]) - {None}) + networks[name].count(None) for name in families}

    def measured(rows: Sequence[Row], column: int | None) -> Iterator[tuple[float, float | None]]:
        """Value and standard error of one cell of each network, where it has a value."""
        found = {_network(row): row.cells[column] for row in rows if column in row.cells and _network(row) is not None}
        for cell in found.values():
            if (value := of.number_of(cell)) is not None:
                yield value, of.se_of(cell)

    found = {(name, s): list(measured(rows, s)) for name, rows in families.items() for s in of.table.columns}
    means = {place: statistics.fmean(value for value, _ in pairs) for place, pairs in found.items() if pairs}
    spreads = {place: statistics.stdev(value for value, _ in pairs) for place, pairs in found.items() if len(pairs) > 1}
    places = decimals(means.values(), spreads.values())

    def entry(place: tuple[str, int | None]) -> Entry:
        if place not in spreads:
            return Entry(DASH)
        count, of_all = len(found[place]), planned[place[0]]
        errors = [se for _, se in found[place] if se is not None]
        more = [f"se {number(statistics.fmean(errors), places)}"] if errors else []
        more += [f"{count} of {of_all}"] if count != of_all else []
        text = f"{number(means[place], places)} ± {number(spreads[place], places)}"
        return Entry(text, means[place], aside="; ".join(more) or None)

    return TextTable(
        f"{of.heading} over {' or '.join(map(str, sorted(set(planned.values()))))} training seeds",
        of.facts,
        of.table.headings,
        tuple((name, tuple(entry((name, column)) for column in of.table.columns)) for name in families),
        (
            "Mean ± standard deviation over networks that were trained from other seeds: of one network's value, not "
            "of the mean. All start from the same x_T, so the sampling error is mostly common to them and not in the "
            "deviation. The mean keeps it: se is the jackknife standard error of one value, averaged over networks.",
        ),
        field=of.value.name,
        better=of.value.better,
    )


def _network(row: Row) -> str | None:
    """The digest of the weights trained here that the row's cells share; None where that is not known, or not so."""
    trained = [cell for cell in row.cells.values() if cell.recipe("model", "training_seed") is not None]
    digests = {str(cell.recipe("model", "digest")) for cell in trained}
    return digests.pop() if len(digests) == 1 else None


# -- paired differences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The value of the second cell minus that of the first, with the paired standard error (both in its unit)."""

    value: float
    se: float


def paired_difference(of: ValueTable, first: Cell, second: Cell) -> Difference | None:
    """The paired difference of two cells of a table, or None where they can't be paired.

    They pair where both have the jackknife's values over as many groups of the same samples: same seed, so that group
    g starts from the same x_T in both.
    """
    before, after = of.number_of(first), of.number_of(second)
    if before is None or after is None or first.labels.get("seed") != second.labels.get("seed"):
        return None
    x, y = of.values[first.number], of.values[second.number]
    a, b = x.replicates or (), y.replicates or ()
    se = paired_se(a, b, x.interactions, y.interactions) if len(a) == len(b) > 1 else None
    return None if se is None else Difference(after - before, se)


@dataclass(frozen=True)
class Comparison:
    """Two series and their paired differences (second minus first) by column; `adjacent`: neighbours in the table."""

    first: Series
    second: Series
    differences: Mapping[int | None, Difference]
    adjacent: bool


def neighbours(of: ValueTable) -> list[Comparison]:
    """Each series of the table against the next, and the next of its sweep, where a column can be paired."""
    comparisons = []
    of_sweep: dict[Any, list[int]] = {}
    for position, row in enumerate(of.table.rows):
        of_sweep.setdefault(next(iter(row.cells.values())).labels.get("sweep"), []).append(position)
    pairs = {pair for positions in of_sweep.values() for pair in itertools.pairwise(positions)}
    pairs |= set(itertools.pairwise(range(len(of.table.rows))))
    for i, j in sorted(pairs):
        first, second = of.table.rows[i], of.table.rows[j]
        differences = {
            column: difference
            for column in of.table.columns
            if column in first.cells and column in second.cells
            if (difference := paired_difference(of, first.cells[column], second.cells[column])) is not None
        }
        if differences:
            comparisons.append(Comparison(first.series, second.series, differences, adjacent=j == i + 1))
    return comparisons


def against_ddim(of: ValueTable) -> list[tuple[str, Mapping[int | None, Difference]]]:
    """Each solver that is not the DDIM family's against DDIM at as many forwards or steps, by column, under its label.

    That is DDIM on the same spacing, and DDIM on the spacing that scores best in that column; without clipping, on the
    same network, from the same x_T.
    """

    def is_ddim(row: Row) -> bool:
        labels = labels_of(row)
        walk = labels.get("formula"), labels.get("variance", "posterior"), labels.get("clip", "none")
        return labels.get("eta") == 0 and walk == (None, "posterior", "none")

    def labels_of(row: Row) -> Mapping[str, Any]:
        return next(iter(row.cells.values())).labels

    def spacing(row: Row) -> Any:
        return labels_of(row).get("spacing")

    def common(row: Row) -> tuple[Any, ...]:
        return tuple(labels_of(row).get(name) for name in ("sweep", "data", "model", "training_seed", "seed"))

    ddim = [row for row in of.table.rows if is_ddim(row)]
    solvers = [row for row in of.table.rows if labels_of(row).get("formula") is not None]
    found: list[tuple[str, Mapping[int | None, Difference]]] = []
    for row in solvers:
        rivals = [other for other in ddim if common(other) == common(row)]
        alike = (other.cells for other in rivals if spacing(other) == spacing(row) != "custom")
        same: Mapping[int | None, Cell] = next(alike, {})
        for told, others in ((f"DDIM on {spacing(row)}", same), ("DDIM's best", _best(of, rivals))):
            differences = {
                column: difference
                for column, cell in row.cells.items()
                if column in others and (difference := paired_difference(of, others[column], cell)) is not None
            }
            if differences:
                found.append((f"{row.series.label} − {told}", differences))
    return found


def _best(of: ValueTable, rows: Sequence[Row]) -> dict[int | None, Cell]:
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
