"""Which cells belong on one line, what that line is called, and which lines may share a table.

A series is a sampler with all its settings but the number of steps. Its name says what varies in the sweep and
nothing else. A table holds cells of one metric, one feature network, one reference and one N: values that differ
in any of these can't be compared, so they never share a table.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ddim_lab.metrics.estimates import paired_se
from ddim_lab.report.sweep import Cell, Quality, RowSampler, Sweep, finite

SIGMA_HAT = "σ̂"


@dataclass(frozen=True)
class Series:
    """Cells that differ in the number of steps. `index` orders the series and picks their colour.

    `family` is the label without the training seed: series of one family differ in nothing else.
    """

    index: int
    label: str
    family: str


@dataclass(frozen=True)
class Metric:
    """What a Fréchet distance is a distance of; two values compare only where all five are equal."""

    name: str
    features: str | None
    reference: str | None
    num_samples: int | None
    reference_key: str | None

    @classmethod
    def of(cls, quality: Quality) -> Metric:
        return cls(quality.name, quality.features, quality.reference, quality.num_samples, quality.reference_key)

    @property
    def facts(self) -> str:
        """Features (a digest as its first 12 digits) and reference, to stand beside every value."""
        features = self.features or "not said"
        if re.fullmatch(r"[0-9a-f]{32,}", features):
            features = features[:12]
        return f"features: {features} · reference: {self.reference or 'not said'}"


@dataclass(frozen=True)
class Row:
    """One line of a table: a series, and its cell at each number of steps (planned ones only)."""

    series: Series
    cells: dict[int | None, Cell]


@dataclass(frozen=True)
class PaperTable:
    """A table shaped as the paper's Table 1: series down, steps across.

    `metric` is None where no cell has a Fréchet distance; the table then shows `measure`.
    """

    metric: Metric | None
    columns: tuple[int | None, ...]
    rows: tuple[Row, ...]

    @property
    def cells(self) -> list[Cell]:
        """The cells, row by row."""
        return [row.cells[steps] for row in self.rows for steps in self.columns if steps in row.cells]

    @property
    def measure(self) -> Literal["fd", "seconds_per_image", "status"]:
        if self.metric is not None:
            return "fd"
        timed = any(cell.seconds_per_image is not None for cell in self.cells)
        return "seconds_per_image" if timed else "status"


def noise_label(labels: dict[str, Any]) -> str:
    """ "η 0.5", or "σ̂" for the paper's larger variance."""
    if labels.get("variance") == "large":
        return SIGMA_HAT
    eta = labels.get("eta")
    return str(labels.get("sampler") or "cell") if eta is None else f"η {eta:g}"


def _training_seed(value: Any) -> str:
    return f"training seed {value}"


_NAMED: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("sweep", str),
    ("spacing", str),
    ("clip", lambda value: f"clip {value}"),
    ("data", str),
    ("model", lambda value: f"model {value}"),
    ("training_seed", _training_seed),
    ("seed", lambda value: f"seed {value}"),
    ("batch_size", lambda value: f"batch {value}"),
)


def name_series(cells: Sequence[Cell]) -> dict[int, Series]:
    """The series of each cell, by cell number.

    Settings are added to the names in a fixed order, each only if it tells apart cells that the names so far do not:
    the noise first (η or σ̂), then in a comparison the sweep, then spacing, clipping, data, model, seeds, batch size,
    then the preset's name, and at last, where two different jobs would still share a place, the overrides that differ.
    """
    names: dict[int, tuple[str, ...]] = {cell.number: (noise_label(cell.plan.labels),) for cell in cells}

    for field, show in _NAMED:
        values = {cell.number: cell.plan.labels.get(field) for cell in cells}
        if len({(names[n], repr(values[n])) for n in names}) > len(set(names.values())):
            names = {n: (*names[n], show(values[n])) for n in names}

    presets = {cell.number: str(cell.plan.labels.get("sampler")) for cell in cells}
    _tell_apart(names, presets, _clusters(names.items()))

    crowded: dict[tuple[Any, ...], set[tuple[str, ...]]] = {}
    for cell in cells:
        place = (names[cell.number], cell.steps, _population(cell))
        crowded.setdefault(place, set()).add(tuple(sorted(cell.plan.overrides)))
    if any(len(jobs) > 1 for jobs in crowded.values()):
        shared = set.intersection(*(set(cell.plan.overrides) for cell in cells))
        own = {
            cell.number: " ".join(
                text
                for text in cell.plan.overrides
                if text not in shared and text.partition("=")[0].lstrip("+") not in ("steps", "num_samples")
            )
            for cell in cells
        }
        _tell_apart(names, own, _clusters(names.items()))

    seeds = {cell.number: _training_seed(cell.plan.labels.get("training_seed")) for cell in cells}
    first = {cell.number: position for position, cell in enumerate(cells)}
    noise = {cell.number: _noise_order(cell.plan.labels) for cell in cells}
    order = sorted(names, key=lambda n: (noise[n], first[n]))
    series: dict[tuple[str, ...], Series] = {}
    for number in order:
        name = names[number]
        seed = seeds[number]
        parts = [part for part in name if part]
        family = " · ".join(part for part in parts if part != seed)
        series.setdefault(name, Series(len(series), " · ".join(parts), family))
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


def _noise_order(labels: dict[str, Any]) -> tuple[bool, float]:
    eta = labels.get("eta")
    return labels.get("variance") == "large", float(eta) if isinstance(eta, int | float) else -1.0


def _population(cell: Cell) -> tuple[Any, ...]:
    """What a cell's plan says of the table it belongs to."""
    labels = cell.plan.labels
    return cell.plan.task, labels.get("data"), labels.get("num_samples")


def paper_tables(sweep: Sweep) -> list[PaperTable]:
    """The sweep's tables: one for each metric, network, reference and N, in order of first appearance.

    A hole has no metric; it goes to the first table of the same task, data and N that has its place free. Cells
    without a Fréchet distance share a table for each task, data and N. Of two equal jobs the first that is done
    is shown.
    """
    series = name_series(sweep.cells)
    groups: dict[tuple[Metric | None, tuple[Any, ...]], dict[tuple[int, int | None], Cell]] = {}

    def place(cell: Cell) -> tuple[int, int | None]:
        return series[cell.number].index, cell.steps

    for cell in sweep.cells:
        if cell.quality is not None:
            metric = Metric.of(cell.quality)
            # data of the same reference share a table; the plan's own values only place the holes
            key = next((k for k in groups if k[0] == metric), (metric, _population(cell)))
            groups.setdefault(key, {}).setdefault(place(cell), cell)
    for cell in sweep.cells:
        if cell.quality is None:
            fitting = [
                key
                for key, taken in groups.items()
                if cell.status != "done"
                and place(cell) not in taken
                and any(_population(other) == _population(cell) for other in taken.values())
            ]
            key = fitting[0] if fitting else (None, _population(cell))
            taken = groups.setdefault(key, {})
            if place(cell) not in taken or taken[place(cell)].status != "done":
                taken[place(cell)] = cell

    by_index = {s.index: s for s in series.values()}
    return [_arrange(key[0], taken, by_index) for key, taken in groups.items()]


def _arrange(metric: Metric | None, taken: dict[tuple[int, int | None], Cell], series: dict[int, Series]) -> PaperTable:
    columns = sorted({steps for _, steps in taken}, key=lambda steps: (steps is None, steps or 0))
    rows = tuple(
        Row(series[index], {steps: cell for (i, steps), cell in taken.items() if i == index})
        for index in sorted({index for index, _ in taken})
    )
    return PaperTable(metric, tuple(columns), rows)


@dataclass(frozen=True)
class Level:
    """A Fréchet distance of real images to the reference, with its standard error where that is known."""

    value: float
    se: float | None


def held_out_levels(table: PaperTable) -> dict[int, Level]:
    """FD(real, held-out real) by the number of images it was measured at.

    At one number it is one value whatever the cell: the first is taken.
    """
    levels: dict[int, Level] = {}
    for cell in table.cells:
        equal_n = cell.quality.equal_n if cell.quality else None
        if equal_n is not None and (value := finite(equal_n.fd_held_out)) is not None:
            levels.setdefault(equal_n.num_samples, Level(value, finite(equal_n.fd_held_out_se)))
    return levels


@dataclass(frozen=True)
class Difference:
    """FD of the second cell minus that of the first, with the paired standard error (both in FD's unit)."""

    value: float
    se: float


def paired_difference(first: Cell, second: Cell) -> Difference | None:
    """The paired difference of two cells, or None where they can't be paired.

    They pair where both have leave-one-out values over as many groups of the same samples: same metric, same N,
    same seed, so that group g starts from the same x_T in both.
    """
    a, b = first.quality, second.quality
    if a is None or b is None or first.fd is None or second.fd is None:
        return None
    same_start = first.plan.labels.get("seed") == second.plan.labels.get("seed")
    d_a, d_b = a.leave_one_out or (), b.leave_one_out or ()
    if Metric.of(a) != Metric.of(b) or not same_start or len(d_a) < 2 or len(d_a) != len(d_b):
        return None
    return Difference(second.fd - first.fd, paired_se(d_a, d_b))


@dataclass(frozen=True)
class Comparison:
    """Two series and their paired differences (second minus first) by steps; `adjacent`: neighbours in the table."""

    first: Series
    second: Series
    differences: dict[int | None, Difference]
    adjacent: bool


def neighbours(table: PaperTable) -> list[Comparison]:
    """Each series of the table against the next, and the next of its sweep, where a number of steps can be paired."""
    comparisons = []
    of_sweep: dict[Any, list[int]] = {}
    for position, row in enumerate(table.rows):
        of_sweep.setdefault(next(iter(row.cells.values())).plan.labels.get("sweep"), []).append(position)
    pairs = {pair for positions in of_sweep.values() for pair in itertools.pairwise(positions)}
    pairs |= set(itertools.pairwise(range(len(table.rows))))
    for i, j in sorted(pairs):
        first, second = table.rows[i], table.rows[j]
        differences = {
            steps: difference
            for steps in table.columns
            if steps in first.cells and steps in second.cells
            if (difference := paired_difference(first.cells[steps], second.cells[steps])) is not None
        }
        if differences:
            comparisons.append(Comparison(first.series, second.series, differences, adjacent=j == i + 1))
    return comparisons


def published(sweep: Sweep, cell: Cell) -> float | None:
    """The reference's number for a cell: row by what its sampler is (eta, variance, clipping), column by steps.

    What the preset is called and how its settings came about does not matter. A list of timesteps (spacing "custom")
    is no row's: it was made for one S and one model.
    """
    reference, labels = sweep.plan.reference, cell.plan.labels
    if reference is None or cell.steps is None or labels.get("spacing") == "custom":
        return None
    ours = tuple(labels.get(field) for field in RowSampler.model_fields)
    for name, sampler in reference.samplers.items():
        if tuple(sampler.model_dump().values()) == ours and str(cell.steps) in reference.rows.get(name, {}):
            return reference.rows[name][str(cell.steps)]
    return None


def kept_samples(sweep: Sweep) -> dict[int, str]:
    """Where the images of the cells that kept them are, by cell number: relative to the sweep's folder, with "/"."""
    found: dict[int, str] = {}
    for cell in sweep.cells:
        file = cell.folder / "samples.npz" if cell.folder else None
        if file is not None and file.is_file():
            found[cell.number] = Path(os.path.relpath(file, sweep.folder)).as_posix()
    return found


def name_cells(cells: Sequence[Cell], series: dict[int, Series]) -> dict[int, str]:
    """A short name for each cell, by cell number: its series and steps, and N or the job's number if need be."""
    several_n = len({cell.plan.labels.get("num_samples") for cell in cells}) > 1
    names: dict[int, str] = {}
    for cell in cells:
        parts = [series[cell.number].label]
        if cell.steps is not None:
            parts.append(f"S = {cell.steps}")
        if several_n:
            parts.append(f"N = {cell.plan.labels.get('num_samples')}")
        names[cell.number] = ", ".join(parts)
    taken = list(names.values())
    return {n: f"{name} (job {n})" if taken.count(name) > 1 else name for n, name in names.items()}
