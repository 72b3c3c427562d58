"""One planned job and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from ddim_lab.store.records import PlanCell, Pointer, Result, Value

Status = Literal["done", "failed", "missing"]
BudgetUnit = Literal["S", "NFE"]

SECONDS_AN_IMAGE: Final = "s/image"
"""The unit of the time that cells are compared by."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One planned job.

    `result` is there exactly if `status` is "done"; otherwise `error` says in one line why it is not.
    """

    plan: PlanCell
    status: Status
    error: str | None
    pointer: Pointer | None
    result: Result | None
    folder: Path | None

    @property
    def number(self) -> int:
        return self.plan.number

    @property
    def labels(self) -> dict[str, Any]:
        return self.plan.labels

    @property
    def key(self) -> str | None:
        return self.pointer.cell if self.pointer else None

    @property
    def steps(self) -> int | None:
        return _whole(self.labels.get("steps"))

    @property
    def budget(self) -> int | None:
        """What it may cost, as it was asked for: the forwards (NFE) where the plan says them, else the steps S."""
        asked = _whole(self.labels.get("nfe_asked"))
        return self.steps if asked is None else asked

    @property
    def budget_unit(self) -> BudgetUnit:
        return "S" if _whole(self.labels.get("nfe_asked")) is None else "NFE"

    @property
    def forwards(self) -> int | None:
        """Network forwards a sample, as counted by the job; below the steps where a spacing drops repeats."""
        return self.result.nfe if self.result else None

    @cached_property
    def values(self) -> dict[str, Value]:
        """What was measured, by name, in the order in which it is shown."""
        return {value.name: value for value in self.result.values} if self.result else {}

    def number_of(self, name: str | None) -> float | None:
        """A value by its name; None where it is absent or no finite number."""
        found = self.values.get(name) if name else None
        return found.number if found else None

    @cached_property
    def compared_by(self) -> Value | None:
        """The value that says which cells share a table with this one: the first that says what it compares by."""
        return next((value for value in self.values.values() if value.heading and value.comparable), None)

    @cached_property
    def time(self) -> Value | None:
        """Seconds to sample one image, as measured, fair or not."""
        return next((value for value in self.values.values() if value.unit == SECONDS_AN_IMAGE), None)

    @property
    def seconds(self) -> float | None:
        """Seconds to sample one image; None where it was not timed, or timed beside other work."""
        return self.time.number if self.time and self.time.fair else None

    def recipe(self, *path: str) -> Any:
        """An entry of the result's recipe; None where there is none."""
        return self.result.recipe_value(*path) if self.result else None


def _whole(label: Any) -> int | None:
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def contended(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that were timed while something else was at work."""
    return [cell for cell in cells if cell.time is not None and not cell.time.fair]
