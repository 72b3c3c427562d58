"""What stands in the paper-shaped tables: one for each value with a heading, series down and budgets across.

A value is shown by what it says of itself (`ddim_lab.store.records.Value`); no name of one is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

from ddim_lab.report.cells import Cell
from ddim_lab.report.numbers import DASH, counted, decimals, number, with_error
from ddim_lab.report.published import not_comparable, paper_note, published, stands_beside
from ddim_lab.report.series import PaperTable, Row
from ddim_lab.store.records import Elsewhere, Published, Value


@dataclass(frozen=True)
class Entry:
    """One place of a table: the text, the exact values behind it, what stands beside it, and why it is empty if so.

    `cell` is the number of the cell whose value it is; `ranked` whether it is one of the values that are compared.
    """

    text: str
    value: float | None = None
    se: float | None = None
    paper: float | None = None
    difference: float | None = None
    aside: str | None = None
    note: str | None = None
    cell: int | None = None
    ranked: bool = True


@dataclass(frozen=True)
class TextTable:
    """A paper-shaped table, ready to be written: heading, columns, labelled rows of entries, notes under it.

    `rows` pairs each series' label with its entries; a place that was not planned is None. `field` is the column of
    results.csv that has the values, `better` how they are ranked.
    """

    heading: str
    facts: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]
    notes: tuple[str, ...]
    field: str
    better: Literal["lower", "higher"] | None = None

    def footnotes(self) -> list[str]:
        """The reasons of the holes, each once, in reading order; a hole's mark is its place here + 1."""
        found = (entry.note for _, entries in self.rows for entry in entries if entry and entry.note)
        return list(dict.fromkeys(found))


@dataclass(frozen=True, eq=False)
class ValueTable:
    """One value of the cells of a table.

    Attributes:
        table: the cells, arranged; holes included.
        value: the first cell's, for what all share: heading, unit, ...
        leads: whether it is the first of these cells' values, which says why a cell has none.
    """

    table: PaperTable
    value: Value
    leads: bool

    @cached_property
    def values(self) -> dict[int, Value]:
        """By cell number, of the cells that have it."""
        name = self.value.name
        return {cell.number: cell.values[name] for cell in self.table.cells if name in cell.values}

    def number_of(self, cell: Cell) -> float | None:
        """The cell's value, if it is a finite number."""
        value = self.values.get(cell.number)
        return value.number if value else None

    def se_of(self, cell: Cell) -> float | None:
        """The standard error of the cell's value, if it has one."""
        value = self.values.get(cell.number)
        return value.finite_se if value else None

    @property
    def heading(self) -> str:
        """What is measured; and in brackets of which data, where nothing else says that."""
        data = ", ".join(dict.fromkeys(str(cell.labels.get("data")) for cell in self.table.cells))
        return self.value.heading if self.value.comparable else f"{self.value.heading} ({data})"

    @property
    def facts(self) -> str:
        """What keeps network, reference and N beside the values."""
        count = counted((value.count for value in self.values.values()), self.value.counted)
        return " · ".join(filter(None, (self.value.facts, count, *_shared_settings(self.table))))

    @cached_property
    def levels(self) -> dict[tuple[str, int | None], Value]:
        """What stands beside the values, by row and column."""
        found = {}
        for row in self.table.rows:
            for column, cell in row.cells.items():
                value = self.values.get(cell.number)
                level = cell.values.get(value.level) if value and value.level else None
                if level is not None and level.number is not None:
                    found[row.series.label, column] = level
        return found

    @cached_property
    def level(self) -> Value | None:
        """The level, where it is one number for the whole table."""
        levels = list(self.levels.values())
        return levels[0] if len({(level.value, level.count) for level in levels}) == 1 else None

    @property
    def level_fits(self) -> bool:
        """Whether the level may be drawn among the values: it says what it is, and is of as many images."""
        return self.level is not None and bool(self.level.label) and self.level.count == self.value.count

    @cached_property
    def places(self) -> int:
        """Decimals for all its numbers; none for counts."""
        if all(type(value.value) is int for value in self.values.values()):
            return 0
        # what agrees to rounding (1e-15) must not set the decimals of the others
        found = [[v for v in map(of, self.table.cells) if v and abs(v) >= 1e-6] for of in (self.number_of, self.se_of)]
        if self.value.level_as == "row" and self.level is not None:
            found[1] += filter(None, [self.level.finite_se])
        places = decimals(*found)
        return places if found[1] else min(6, places + 1)  # no error says how many are worth showing


def value_tables(table: PaperTable) -> list[ValueTable]:
    """A table for each value with a heading that the cells have, in the order of the first cell that has it.

    A value that does not compare between all cells has several. One that is a column elsewhere, too, has one only where
    there is a comparison to show: several cells have it, and not all are 0.
    """
    prototypes: dict[tuple[Any, ...], Value] = {}
    apart: dict[tuple[Any, ...], set[int]] = {}
    for cell in table.cells:
        for value in cell.values.values():
            if value.heading:
                key = value.name, tuple(sorted(value.comparable.items()))
                prototypes.setdefault(key, value)
                apart.setdefault(key, set()).add(cell.number)
    found: list[ValueTable] = []
    for key, value in prototypes.items():
        elsewhere = set().union(*(of for other, of in apart.items() if other[0] == key[0] and other != key))
        own = ValueTable(_without(table, elsewhere), value, leads=not found)
        numbers = [n for cell in own.table.cells if (n := own.number_of(cell)) is not None]
        measured = any(value.value is not None for value in own.values.values())
        if (measured or own.leads) and (not value.column or (len(numbers) > 1 and any(numbers))):
            found.append(own)
    return found


def _without(table: PaperTable, numbers: set[int]) -> PaperTable:
    """The table less some cells."""
    if not numbers:
        return table
    left = [Row(r.series, {s: c for s, c in r.cells.items() if c.number not in numbers}) for r in table.rows]
    rows = tuple(row for row in left if row.cells)
    return PaperTable(tuple(s for s in table.columns if any(s in row.cells for row in rows)), rows, table.unit)


# -- as texts -------------------------------------------------------------------------------------------


def value_text(reference: Published | None, of: ValueTable) -> TextTable:
    """The values ± their standard errors; published numbers of the same or a kindred metric beside them."""
    table, places = of.table, of.places
    beside = reference if reference is not None and stands_beside(reference, of.value) else None
    papers = {cell.number: published(beside, cell) for cell in table.cells}
    refused = {
        cell.number: not_comparable(beside, cell, value)
        for cell in table.cells
        if beside and papers[cell.number] is not None and (value := of.values.get(cell.number)) is not None
    }

    def entry(row: Row, column: int | None) -> Entry | None:
        cell = row.cells.get(column)
        if cell is None:
            return None
        value, se, paper = of.number_of(cell), of.se_of(cell), papers[cell.number]
        if value is None:
            why = _why_empty(of, cell)
            note = None if why is None else f"{row.series.label}, {table.heading(column)}: {why}"
            return Entry(DASH, paper=paper, note=note, cell=cell.number)
        if value == se == 0:
            se = None  # equal in every image: there is nothing that an error could be of
        difference = value - paper if paper is not None and refused[cell.number] is None else None
        return Entry(with_error(value, se, places), value, se, paper, difference, cell=cell.number)

    rows = [(row.series.label, tuple(entry(row, column) for column in table.columns)) for row in table.rows]
    notes = [paper_note(beside, table, refused)] if beside and any(p is not None for p in papers.values()) else []
    if any(of.se_of(cell) is not None for cell in table.cells):
        notes.append(f"{' '.join(['± is one standard error', of.value.error]).rstrip()}.")
    level = of.level
    if of.value.level_as == "row" and level is not None and level.number is not None:
        last = Entry(with_error(level.number, level.finite_se, places), level.number, level.finite_se, ranked=False)
        rows.append((level.label or of.value.level_says, (last,) * len(table.columns)))
        error = "" if level.finite_se is None else ", ± its standard error"
        told = f"Last row: {of.value.level_says}, the same in every column{error}"
        notes.append(f"{told}{level.facts and f': {level.facts}'}.")
    else:
        notes += _level_note(of)
    return TextTable(
        of.heading,
        of.facts,
        table.headings,
        tuple(rows),
        (*notes, *_forwards_done(table), *_noise_sources(table), *unnamed_differences(table)),
        field=of.value.name,
        better=of.value.better,
    )


def elsewhere_text(of: Elsewhere) -> TextTable:
    """Published numbers that stand apart."""
    columns = sorted({int(column) for row in of.rows.values() for column in row})

    def entries(row: Mapping[str, float]) -> tuple[Entry | None, ...]:
        """With as many decimals as the row's numbers were given with, at most 6."""
        places = min(6, max(-int(Decimal(repr(value)).normalize().as_tuple().exponent) for value in row.values()))
        found = (row.get(str(column)) for column in columns)
        return tuple(None if v is None else Entry(number(v, max(0, places)), v, ranked=False) for v in found)

    rows = zip(of.rows, map(entries, of.rows.values()), strict=True)
    note = "Of other networks, timesteps or images than the rows of this report: no difference would mean anything."
    headings = tuple(f"{of.unit} = {column}" for column in columns)
    return TextTable(
        f"{of.metric}, published elsewhere", f"{of.source} · {of.protocol}", headings, tuple(rows), (note,), ""
    )


def _level_note(of: ValueTable) -> list[str]:
    """The level in a sentence; by column where it is not the same for all."""

    def told(level: Value) -> str:
        return with_error(level.number or 0.0, level.finite_se, of.places)

    if not of.levels:
        return []
    if of.level is not None and of.level.count not in (None, of.value.count):
        at = f"{told(of.level)} at N = {of.level.count:,}{of.level.facts and f': {of.level.facts}'}"
        how = "On average it does not depend on N" if of.value.unbiased else "Compare it with samples at that N only"
        return [f"{of.value.level_says}: {at}. {how}."]
    if of.level is not None and of.level.facts:
        return [f"{of.value.level_says}: {told(of.level)}, {of.level.facts}."]
    by_column: dict[int | None, dict[str, str]] = {}
    for (label, column), level in of.levels.items():
        by_column.setdefault(column, {})[label] = told(level)
    texts = {text for rows in by_column.values() for text in rows.values()}
    places = list(texts) if len(texts) == 1 else []
    for column in filter(by_column.__contains__, of.table.columns if not places else ()):
        rows = by_column[column]
        if len(set(rows.values())) == 1:
            rows = {"": next(iter(rows.values()))}
        places += [f"{text} at {of.table.heading(column)}{label and f', {label}'}" for label, text in rows.items()]
    return [f"{of.value.level_says}: {'; '.join(places)}."]


def _why_empty(of: ValueTable, cell: Cell) -> str | None:
    """Why a cell shows no value in a table; None where the table of the leading value has said it."""
    if cell.error is not None:
        return f"{cell.status}: {cell.error}" if of.leads else None
    value = of.values.get(cell.number)
    if value is None or value.value is None:
        return f"not measured{f': {value.why_not}' if value and value.why_not else ''}"
    return f"the value is {value.value!r}"


def time_text(table: PaperTable) -> TextTable:
    """Of cells that measured nothing under a heading: their times; what became of them, where none was timed."""
    timed = any(cell.seconds is not None for cell in table.cells)

    def entry(row: Row, column: int | None) -> Entry | None:
        cell = row.cells.get(column)
        if cell is None:
            return None
        if not timed and cell.status == "done":
            return Entry("done", cell=cell.number)
        if cell.seconds is not None:
            return Entry(f"{cell.seconds * 1e3:.3g}", cell.seconds, cell=cell.number)
        why = "not timed" if cell.time is None else "timed beside other work, left out"
        if cell.error is not None:
            why = f"{cell.status}: {cell.error}"
        return Entry(DASH, note=f"{row.series.label}, {table.heading(column)}: {why}", cell=cell.number)

    times = [cell.time.name for cell in table.cells if cell.time is not None]
    labels = table.cells[0].labels
    return TextTable(
        "Milliseconds an image" if timed else "What became of each cell",
        f"{labels.get('data', 'data not said')}, {labels.get('num_samples', '?')} samples a cell",
        table.headings,
        tuple((row.series.label, tuple(entry(row, column) for column in table.columns)) for row in table.rows),
        (*_forwards_done(table), *unnamed_differences(table)),
        field=times[0] if timed else "status",
        better="lower" if timed else None,
    )


def _shared_settings(table: PaperTable) -> list[str]:
    """Weights, and spacing and clipping where all cells share them."""
    weights = sorted({str(w) for cell in table.cells if (w := cell.recipe("model", "weights"))})
    facts = [f"weights: {', '.join(weights)}"] if weights else []
    for field in ("spacing", "clip"):
        if len(values := {str(cell.labels.get(field)) for cell in table.cells}) == 1:
            facts.append(f"{field}: {values.pop()}")
    return facts


def _forwards_done(table: PaperTable) -> list[str]:
    """Where the forwards really done are fewer than the column says."""
    places = [
        f"{row.series.label} {cell.forwards} at {table.heading(column)}"
        for row in table.rows
        for column, cell in row.cells.items()
        if table.unit == "NFE" and cell.forwards not in (None, column)
    ]
    return [f"Forwards done where no number of steps costs what was asked: {', '.join(places)}."] if places else []


def _noise_sources(table: PaperTable) -> list[str]:
    """Rows whose noise is not the one that the others have at the same timesteps: no pair of images shares it."""
    rows: dict[str, list[str]] = {}
    for row in table.rows:
        for source in {cell.recipe("sampler", "noise_from") for cell in row.cells.values()} - {None}:
            rows.setdefault(str(source), []).append(row.series.label)
    return [f"Noise: {source} for {', '.join(labels)}; x_T is shared all the same." for source, labels in rows.items()]


def unnamed_differences(table: PaperTable) -> list[str]:
    """Notes on settings that differ between the rows though the rows' names do not say so.

    A row's name says no more than it needs to be told apart, so what goes along with it is said here: samplers that
    differ in more than their noise must not pass for samplers that differ in nothing else.
    """
    notes = []
    for field, say in (("spacing", "Spacing"), ("clip", "Clipping"), ("model", "Model"), ("seed", "Seed")):
        rows: dict[str, list[str]] = {}
        for row in table.rows:
            for value in dict.fromkeys(str(cell.labels.get(field)) for cell in row.cells.values()):
                rows.setdefault(value, []).append(row.series.label)
        if len(rows) > 1 and not all(value in label.split() for value, labels in rows.items() for label in labels):
            spelled = "; ".join(f"{value} for {', '.join(labels)}" for value, labels in rows.items())
            notes.append(f"{say} differs between the rows: {spelled}.")
    return notes
