"""Read what a sweep left on disk: its plan, each job's pointer, each cell's result.

Everything is checked as it is read. A plan that can't be read is an error, for without it there is nothing to
report; a pointer or a result that can't be read is a hole, which the report marks and explains.
"""

from __future__ import annotations

import csv
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from ddim_lab.errors import ConfigError
from ddim_lab.report.cells import Cell, Status
from ddim_lab.report.findings import Findings, findings
from ddim_lab.report.series import PaperTable, Series, name_cells, name_series, paper_tables
from ddim_lab.report.tables import ValueTable, value_tables
from ddim_lab.store import fault, read_json, read_record
from ddim_lab.store.records import Plan, PlanCell, Pointer, Result


class ReportError(ConfigError):
    """The folder can't be reported on; the message says what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's plan and its cells, in the plan's order; a comparison's `members` are the sweeps it is made of.

    Of a sweep whose N is not fixed the cells are those of the last look, and `earlier` is the same sweep as it was at
    each look before.

    What the cells are called and which tables they share is settled here, once for all that shows them.
    """

    folder: Path
    plan: Plan
    cells: tuple[Cell, ...]
    members: dict[str, Sweep] = field(default_factory=dict)
    earlier: tuple[Sweep, ...] = ()

    @property
    def title(self) -> str:
        return self.plan.title or f"Sweep {self.plan.name or self.folder.name}"

    @cached_property
    def series(self) -> dict[int, Series]:
        """The series of each cell, by cell number."""
        return name_series(self.cells)

    @cached_property
    def names(self) -> dict[int, str]:
        """A short name for each cell, by cell number."""
        return name_cells(self.cells, self.series)

    @cached_property
    def tables(self) -> tuple[PaperTable, ...]:
        """The cells, arranged by what compares."""
        return tuple(paper_tables(self.cells, self.series))

    @cached_property
    def shown(self) -> tuple[tuple[PaperTable, tuple[ValueTable, ...]], ...]:
        """The tables, each with the values that are shown in its shape."""
        return tuple((table, tuple(value_tables(table))) for table in self.tables)

    @cached_property
    def findings(self) -> Findings:
        """What the comparisons of its values settle."""
        return findings(
            self._values,
            self.plan.published,
            self.plan.stop,
            [look._values for look in self.earlier],
        )

    @property
    def _values(self) -> list[ValueTable]:
        return [values for _, found in self.shown for values in found]

    @property
    def by_series(self) -> list[Cell]:
        """The cells, series by series, by steps."""
        return sorted(self.cells, key=lambda cell: (self.series[cell.number].index, cell.steps or 0, cell.number))


def read_sweep(folder: Path) -> Sweep:
    """Read the sweep in `folder`.

    Raises:
        ReportError: if `folder` holds no plan.json, or one that can't be used.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give a sweep's folder, as outputs/sweeps/<date-time>")
    path = folder / "plan.json"
    if not path.is_file():
        raise ReportError(f"{folder} has no plan.json; give a sweep's folder, as outputs/sweeps/<date-time>")
    try:
        plan = Plan.read(read_record(path))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} can't be used: {_one_line(error)}") from error
    if not plan.cells:
        raise ReportError(f"{path} plans no cell; there is nothing to report")
    outputs = (folder / plan.outputs_dir).resolve()
    if plan.stop is None:
        return Sweep(folder, plan, tuple(_read_cell(folder, outputs, planned) for planned in plan.cells))
    *earlier, last = (_at_look(folder, outputs, plan, count) for count in plan.stop.made or (plan.stop.shown,))
    return replace(last, plan=plan, earlier=tuple(earlier))


def _at_look(folder: Path, outputs: Path, plan: Plan, count: int) -> Sweep:
    """The sweep as it was when it had looked at N = `count`."""
    assert plan.stop is not None
    planned = (cell.model_copy(update={"labels": {**cell.labels, "num_samples": count}}) for cell in plan.cells)
    cells = tuple(_read_cell(folder, outputs, cell, count) for cell in planned)
    return Sweep(folder, plan.model_copy(update={"stop": plan.stop.model_copy(update={"reached": count})}), cells)


def _pointer_at(pointer: Pointer, count: int) -> Pointer:
    """The pointer as it was at a look, or said of a job that has no cell there."""
    if pointer.num_samples in (None, count):
        return pointer
    cell = next((look.cell for look in pointer.earlier if look.num_samples == count), None)
    status, error = ("failed", f"there is no cell at N = {count:,}") if cell is None else ("done", None)
    return pointer.model_copy(update={"cell": cell, "status": status, "error": error})


def _read_cell(folder: Path, outputs: Path, planned: PlanCell, count: int | None = None) -> Cell:
    def hole(status: Status, error: str, pointer: Pointer | None = None) -> Cell:
        return Cell(planned, status, error, pointer, None, None)

    path = folder / "jobs" / str(planned.number) / "pointer.json"
    if not path.is_file():
        return hole("missing", "the job left no record: it was stopped, or has not run")
    try:
        pointer = Pointer.read(read_record(path))
    except (OSError, ValueError) as error:
        return hole("failed", f"pointer.json is damaged: {_one_line(error)}")
    if count is not None:
        pointer = _pointer_at(pointer, count)
    if pointer.status == "failed":
        return hole("failed", _one_line(pointer.error or "the job failed and gave no reason"), pointer)
    if pointer.cell is None:
        return hole("failed", "pointer.json is damaged: the job is done but names no cell", pointer)

    cell = outputs / "cells" / pointer.cell
    path = cell / "result.json"
    if not path.is_file():
        return hole("missing", f"cells/{pointer.cell[:12]}…/result.json is not there", pointer)
    try:
        result = Result.read(read_json(path))
        damage = fault(cell, only=[path.name])
    except (OSError, ValueError) as error:
        return hole("failed", f"result.json is damaged: {_one_line(error)}", pointer)
    if damage is not None or result.key != pointer.cell:
        words = damage or f"result.json calls itself cell {result.key[:12]}"
        return hole("failed", f"cell {pointer.cell[:12]} is damaged: {words}", pointer)
    return Cell(planned, "done", None, pointer, result, cell)


def _one_line(error: object) -> str:
    """An error as one line of at most 300 characters."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        text = f"{place}: {first['msg']}" if place else first["msg"]
    else:
        text = str(error)
    return re.sub(r"\s+", " ", text).strip()[:300]


def kept_samples(sweep: Sweep) -> dict[int, str]:
    """Where the images of the cells that kept them are, by cell number: relative to the sweep's folder, with "/"."""
    found: dict[int, str] = {}
    for cell in sweep.cells:
        file = cell.folder / "samples.npz" if cell.folder else None
        if file is not None and file.is_file():
            found[cell.number] = Path(os.path.relpath(file, sweep.folder.resolve())).as_posix()
    return found


@dataclass(frozen=True)
class TrainingCurve:
    """The loss of one training run over its optimiser steps."""

    name: str
    fingerprint: str
    points: tuple[tuple[float, float], ...]


CURVE = "training_curve.csv"


def training_curves(sweep: Sweep, most_points: int = 300) -> list[TrainingCurve]:
    """The training curves of the models that the cells used, thinned by averaging neighbours.

    A curve that is not there, or can't be read, is left out: a given model has none.
    """
    curves: dict[str, TrainingCurve] = {}
    for cell in sweep.cells:
        fingerprint = cell.recipe("model", "fingerprint")
        if not isinstance(fingerprint, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", fingerprint):
            continue
        if fingerprint in curves:
            continue
        assert cell.folder is not None
        model = cell.folder.parents[1] / "models" / fingerprint
        points = [] if fault(model, only=[CURVE]) else _read_curve(model / CURVE)
        if points:
            labels = cell.labels
            name = f"{labels.get('model', 'model')}, training seed {labels.get('training_seed', '?')}"
            curves[fingerprint] = TrainingCurve(name, fingerprint, tuple(_thin(points, most_points)))
    return list(curves.values())


def _read_curve(path: Path) -> list[tuple[float, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            pairs = [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [(step, loss) for step, loss in pairs if math.isfinite(step) and math.isfinite(loss)]


def _thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    width = math.ceil(len(points) / most)
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(s for s, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]
