"""The records that jobs write and reports read, each declared once: what a value is, a cell's result.

Needs no torch. Unknown entries are left alone by readers: a later version may write more.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Value"]


class Record(BaseModel):
    """A record of a file. Unknown entries are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Value(Record):
    """One number of a cell with all that it means nothing without.

    Attributes:
        name: what results.csv calls it, unique in its cell.
        value: the number (or a truth value, a word); None where it could not be measured: `why_not` says why.
        why_not: the reason, one line.
        unit: "s", "B", "images/s"; "" for a pure number.
        heading: what tables call it; "" for a value that stands in results.csv alone.
        facts: what one value means, one line under the heading.
        se: its standard error; `error` says how it was taken.
        spread: another ± than a standard error, as of subsets; `error` says which.
        error: how the error or the spread was taken, as "by the delete-a-group jackknife over groups of samples".
        count: how many `counted` it is of.
        counted: "images", "lines".
        better: whether rows may be ranked by it, and how.
        level: the name of another value of the cell, of the same unit, to stand beside it; `level_says` what that is.
        replicates: the jackknife's values without each group, for paired differences between cells.
        comparable: what must be equal for two values of this name to share a table: name -> what it is here,
            as {"features": "3f1c...", "reference": "digits train, n=1437"}.
    """

    name: str
    value: float | int | bool | str | None
    why_not: str | None = None
    unit: str = ""
    heading: str = ""
    facts: str = ""
    se: float | None = None
    spread: float | None = None
    error: str = ""
    count: int | None = None
    counted: str = "images"
    better: Literal["lower", "higher"] | None = None
    level: str | None = None
    level_says: str = ""
    replicates: tuple[float, ...] | None = None
    comparable: dict[str, str | int | None] = {}
