"""Published numbers beside ours: which one is a cell's, and whether their difference would mean anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddim_lab.report.cells import Cell
from ddim_lab.report.series import PaperTable
from ddim_lab.store.records import Published, RowSampler, Value

UNKNOWN_WEIGHTS: Final = ("unknown", "pretrained")
"""What a cell calls weights of which nobody says whether they are averaged; the second in records until 2026-11."""


def stands_beside(reference: Published, value: Value) -> bool:
    """Whether the published numbers are of this metric, or of one that is akin to it."""
    metric = reference.metric.casefold()
    return metric == value.heading.casefold() or any(metric.startswith(name.casefold()) for name in value.akin)


def published(reference: Published | None, cell: Cell) -> float | None:
    """The published number for a cell: row by what its sampler is (eta, variance, clipping), column by steps.

    What the preset is called and how its settings came about does not matter. A list of timesteps (spacing "custom")
    is no row's: it was made for one S and one model. Nor is a formula that is not the DDIM family's.
    """
    if reference is None or cell.steps is None or cell.labels.get("spacing") == "custom":
        return None
    if cell.labels.get("formula") is not None:
        return None
    ours = tuple(cell.labels.get(field) for field in RowSampler.model_fields)
    for name, sampler in reference.samplers.items():
        if tuple(sampler.model_dump().values()) == ours and str(cell.steps) in reference.rows.get(name, {}):
            return reference.rows[name][str(cell.steps)]
    return None


def not_comparable(reference: Published, cell: Cell, value: Value) -> str | None:
    """Why a cell's value minus the published number would mean nothing, in words; None where it means something."""
    if value.heading.casefold() != reference.metric.casefold():
        return f"ours is {value.heading}, another metric"
    labels = cell.labels
    if reference.data not in (None, labels.get("data")):
        return f"ours is of {labels.get('data')}, theirs of {reference.data}"
    if reference.num_samples not in (None, value.count):
        ours = "an unknown number of" if value.count is None else f"{value.count:,}"
        return f"ours is of {ours} images, theirs of {reference.num_samples:,}"
    if "reference" in value.comparable:  # it is a distance to a split of real images
        if (statistics := cell.recipe("metrics", "reference_statistics")) is not None:
            name = Path(str(statistics)).name
            return f"ours is to the statistics in {name}, theirs to the {reference.reference} images"
        if reference.reference not in (None, split := cell.recipe("metrics", "reference")):
            return f"ours is to the {split} images, theirs to the {reference.reference} images"
    if cell.recipe("model", "classes") is not None:
        return "ours is of a class-conditional network"
    weights = cell.recipe("model", "weights")
    if reference.weights is not None and weights in UNKNOWN_WEIGHTS:
        return (
            f"it is not known whether our network's weights are averaged (theirs are {reference.weights});"
            " model.weights=ema or raw says so"
        )
    if reference.weights not in (None, weights):
        return f"ours is of {weights} weights, theirs of {reference.weights}"
    schedule = cell.recipe("schedule")
    if reference.schedule not in (None, schedule):
        return f"ours has {_schedule(schedule)}, theirs {_schedule(reference.schedule)}"
    spacing = reference.spacing_at(cell.steps)
    if spacing not in (None, labels.get("spacing")):
        return f"ours has {labels.get('spacing')} timesteps, theirs {spacing}"
    return None


def _schedule(of: Any) -> str:
    """A schedule as name and numbers."""
    if not isinstance(of, dict):
        return "an unknown schedule"
    numbers = ", ".join(f"{name} {value}" for name, value in of.items() if name != "name")
    return f"schedule {of.get('name')} ({numbers})"


def paper_note(reference: Published, table: PaperTable, refused: Mapping[int, str | None]) -> str:
    """What stands at each place, and why no difference does where none is given.

    Args:
        reference: the published numbers.
        table: where they stand.
        refused: by cell number the reason, None where the difference is given; of the cells with a published number.
    """
    places: dict[str, list[str]] = {}
    for row in table.rows:
        reasons = {column: refused[cell.number] for column, cell in row.cells.items() if cell.number in refused}
        for reason in dict.fromkeys(reason for reason in reasons.values() if reason):
            at = [table.heading(c) for c in table.columns if c in reasons and reasons[c] == reason]
            whole = len(at) == len(reasons)
            places.setdefault(reason, []).append(row.series.label if whole else f"{row.series.label}, {', '.join(at)}")
    if places and all(refused.values()):
        told = "; ".join(places) if len(places) == 1 else _told(places)
        return f"Each place: ours / paper ({reference.metric}; {reference.source}). No difference is given: {told}."
    note = f"Each place: ours / paper / ours − paper. Paper: {reference.source}."
    return f"{note} No difference is given where it would mean nothing: {_told(places)}." if places else note


def _told(places: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{reason} ({'; '.join(where)})" for reason, where in places.items())
