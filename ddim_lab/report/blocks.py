"""What a page is made of: sections of blocks, each with its place in the template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ddim_lab.report.charts import Chart
from ddim_lab.report.numbers import DASH, exact, in_column, is_digest
from ddim_lab.report.pictures import Embedded
from ddim_lab.store.records import Value


@dataclass(frozen=True)
class Box:
    """One place of a grid. `exact` is the value as results.csv has it, under the name `field` of cell `cell`.

    `link` is a file's path, relative to the report's folder.
    """

    text: str
    error: str = ""
    exact: str | None = None
    field: str | None = None
    cell: int | None = None
    under: tuple[str, ...] = ()
    tint: str | None = None
    strength: float = 0.0
    mark: int | None = None
    head: bool = False
    code: bool = False
    link: str | None = None

    @classmethod
    def of(cls, value: Value | None, cell: int) -> Box:
        """A cell's value, short to look at and exact behind that; a dash where there is none."""
        if value is None or value.value is None:
            return cls(DASH)
        around = next((error for error in (value.se, value.spread) if error), None)
        return cls(
            in_column(value),
            error="" if around is None else f"{around:.2g}",
            exact=exact(value.value),
            field=value.name,
            cell=cell,
            code=isinstance(value.value, str) and is_digest(value.value),
        )


@dataclass(frozen=True)
class Grid:
    """A table with a heading, and notes under it."""

    kind: ClassVar[str] = "grid"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Box, ...], ...]
    facts: str = ""
    footnotes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    wide: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str
    wide: bool = True


@dataclass(frozen=True)
class Points:
    """Sentences under a heading; those past the first FIRST are one click away."""

    FIRST: ClassVar[int] = 8
    kind: ClassVar[str] = "points"
    title: str
    lines: tuple[str, ...]
    wide: bool = True

    @property
    def shown(self) -> tuple[str, ...]:
        """All, where folding would hide a single one."""
        return self.lines if len(self.lines) <= self.FIRST + 1 else self.lines[: self.FIRST]

    @property
    def folded(self) -> tuple[str, ...]:
        return self.lines[len(self.shown) :]


@dataclass(frozen=True)
class Figure:
    """A chart that the page's script draws."""

    kind: ClassVar[str] = "figure"
    chart: Chart
    wide: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures one under another, each with its label, at the same width."""

    kind: ClassVar[str] = "strip"
    title: str
    pictures: tuple[tuple[str, Embedded | None, str], ...]
    wide: bool = True


@dataclass(frozen=True)
class Folds:
    """Texts one click away: (summary, text)."""

    kind: ClassVar[str] = "folds"
    items: tuple[tuple[str, str], ...]
    wide: bool = True


Block = Grid | Prose | Points | Figure | Strip | Folds


@dataclass(frozen=True)
class Section:
    """A part of the page, with a heading that the contents link to."""

    id: str
    title: str
    blocks: tuple[Block, ...]
