"""One flat row a cell, for results.csv and the tables of W&B."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from ddim_lab.report.cells import Cell
from ddim_lab.report.numbers import exact
from ddim_lab.report.read import Sweep
from ddim_lab.store.records import ROW, Value

CONTRACT = (
    *("data", "model", "sampler", "eta", "variance", "spacing", "clip", "steps", "nfe", "num_samples", "batch_size"),
    *("seed", "training_seed", "weights", "fd", "fd_se", "fd_features", "fd_reference"),
    *("images_per_second", "seconds_per_image", "forward_share", "peak_memory", "repeat_max_abs_diff"),
    *("repeat_identical", "noise_variance", "sha256", "precision", "device", "status", "cell"),
)
"""The columns that results.csv always has, in this order. Others follow where a cell has a value."""

LABELS = (
    *("data", "model", "sampler", "eta", "variance", "spacing", "clip", "steps", "nfe_asked", "num_samples"),
    *("batch_size", "seed", "training_seed", "sweep", "guidance"),
)


def columns_of(sweep: Sweep) -> list[str]:
    """The columns of the sweep's results.csv: the contract's, then values as cells have them, then the cell's own."""
    rows = [*map(_measured, sweep.cells), *map(_about, sweep.cells)]
    return list(dict.fromkeys((*CONTRACT, *(name for row in rows for name, value in row.items() if value is not None))))


def sweep_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell, in the plan's order, with all of the sweep's columns; None where there is no value.

    Times are in seconds, memory in bytes.
    """
    empty: dict[str, Any] = dict.fromkeys(columns_of(sweep))
    found = [{**_measured(cell), **_about(cell)} for cell in sweep.cells]
    return [{name: row.get(name) for name in empty} for row in found]


def _about(cell: Cell) -> dict[str, Any]:
    """What a row says of the cell itself: the entries of ROW."""
    pointer, result = cell.pointer, cell.result
    row: dict[str, Any] = dict.fromkeys(ROW)
    row |= {name: cell.labels.get(name) for name in LABELS}
    row |= {"status": cell.status, "cell": cell.key, "task": cell.plan.task, "number": cell.number}
    row |= {"cached": pointer.cached if pointer else None, "job_seconds": pointer.seconds if pointer else None}
    row |= {"error": cell.error, "overrides": " ".join(cell.plan.overrides)}
    if result is None:
        return row
    row |= {name: cell.recipe("runtime", name) for name in ("precision", "device", "device_name", "compile")}
    # resolved, where the plan says "auto"
    batch_size = cell.recipe("batch_size") or row["batch_size"]
    return row | {"nfe": result.nfe, "weights": cell.recipe("model", "weights"), "batch_size": batch_size}


def measured(values: Sequence[Value]) -> dict[str, Any]:
    """A cell's values and what belongs to them, by the name of their column."""
    row: dict[str, Any] = {}
    leading = next((value for value in values if value.heading and value.comparable), None)
    for value in values:
        row[value.name] = value.value
        compared = {f"{value.name}_{part}": given for part, given in value.comparable.items()}
        own = value is leading or _compares_otherwise(value, leading)
        row |= {name: given for name, given in compared.items() if own or name in CONTRACT}
        row |= {f"{value.name}_se": value.se, f"{value.name}_spread": value.spread}
    # a count that no value or comparison has said
    said = {given for given in row.values() if type(given) is int}
    return row | {f"{value.name}_count": value.count for value in values if value.count not in said}


def _compares_otherwise(value: Value, leading: Value | None) -> bool:
    """Whether a value says by the same parts as the leading one that something else must be equal for it."""
    if leading is None or value.comparable == leading.comparable:
        return False
    return value.comparable.keys() == leading.comparable.keys()


def _measured(cell: Cell) -> dict[str, Any]:
    return measured(cell.result.values) if cell.result else {}


def csv_text(sweep: Sweep) -> str:
    """results.csv (RFC 4180 but for the line ends, which are "\\n")."""
    columns, buffer = columns_of(sweep), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([exact(row[name]) for name in columns] for row in sweep_rows(sweep))
    return buffer.getvalue()
