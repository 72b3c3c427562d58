"""The records that jobs write and reports read, each declared once: a sweep's plan, a job's pointer, a cell's result.

    outputs/sweeps/<name>/plan.json                    Plan, with a PlanCell a job
    outputs/sweeps/<name>/jobs/<number>/pointer.json   Pointer: how a job ended, and which cell it stands for
    outputs/cells/<key>/result.json                    Result: what the cell is, and its Values
    outputs/samples/<key>/identity.json                Samples: what makes them

Needs no torch. Readers leave unknown entries alone: a later version may write more.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from ddim_lab.store.schema1 import upgraded

__all__ = [
    "ROW",
    "EarlierLook",
    "Pictured",
    "Plan",
    "PlanCell",
    "Pointer",
    "Published",
    "Result",
    "RowSampler",
    "Samples",
    "StopRule",
    "Tabled",
    "Value",
    "WandbRun",
]

ROW: Final = (
    *("data", "model", "sampler", "eta", "variance", "spacing", "clip", "steps", "nfe", "num_samples", "batch_size"),
    *("seed", "training_seed", "weights", "precision", "device", "status", "cell"),
    *("device_name", "compile", "task", "number", "cached", "job_seconds", "error", "overrides", "sweep"),
    *("nfe_asked", "guidance"),
)
"""What a row of results.csv says of the cell itself: no value can be called so."""


class Record(BaseModel):
    """A record of a file. Unknown entries are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Written(Record):
    """A record that is a file of its own and carries the version of its form as `schema`."""

    SCHEMA: ClassVar[int] = 1

    @classmethod
    def read(cls, content: object) -> Self:
        """The record that a file's JSON holds.

        Raises:
            ValueError: it is not one; a `pydantic.ValidationError` names the entry.
        """
        return cls.model_validate(_of_schema(content, cls.SCHEMA))

    def content(self) -> dict[str, Any]:
        """What is written: the entries that were given."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json", exclude_unset=True)}


class Using(Written):
    """A record that stands on objects of the store.

    Attributes:
        objects: (kind, key) of those; not pruned as long as the record is there.
    """

    objects: tuple[tuple[str, str], ...] = ()


def _of_schema(content: object, *known: int) -> dict[str, Any]:
    """A JSON object, of a schema that this version reads."""
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if content.get("schema") not in known:
        raise ValueError(f"its schema is {content.get('schema')!r}, this version reads {' and '.join(map(str, known))}")
    return content


# -- the plan -------------------------------------------------------------------------------------------


class PlanCell(Record):
    """One job as it was planned.

    Attributes:
        number: its place in the sweep.
        task: what it measures, as in conf/task.
        overrides: as Hydra takes them.
        labels: the resolved values that name it: data, model, sampler, steps, ...
        image_forwards: network forwards that it costs, times images.
    """

    number: int
    task: str = "generate"
    overrides: tuple[str, ...] = ()
    labels: dict[str, Any] = {}
    image_forwards: int | float = 0


class RowSampler(Record):
    """What the sampler of a published row is."""

    eta: float
    variance: str
    clip: str


class Published(Record):
    """Published numbers to stand beside ours: rows by sampler preset, columns by steps.

    `samplers` says what each row's sampler is. The others say what the numbers were taken with; None where that is not
    said: data, number of images, split of the real images, weights, timesteps (one spacing, or by steps) and schedule.
    Whatever else study.published says is kept.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    source: str
    metric: str
    data: str | None = None
    num_samples: int | None = None
    reference: str | None = None
    weights: str | None = None
    spacing: str | dict[str, str] | None = None
    schedule: dict[str, Any] | None = None
    rows: dict[str, dict[str, float]] = {}
    samplers: dict[str, RowSampler] = {}

    def spacing_at(self, steps: int | None) -> str | None:
        """The spacing at a number of steps, if it is said."""
        return self.spacing.get(str(steps)) if isinstance(self.spacing, dict) else self.spacing


class Elsewhere(Record):
    """Published numbers that stand apart, since no row here was taken as they were: no difference is ever given.

    Attributes:
        metric: what they are, as its authors call it.
        source: where they were published.
        protocol: of which network, timesteps, images and reference they are, in words.
        unit: what `rows` goes by: steps, or forwards.
        rows: a name -> steps or forwards -> number.
    """

    metric: str
    source: str
    protocol: str
    unit: Literal["S", "NFE"] = "S"
    rows: dict[str, dict[str, float]] = {}


class StopRule(Record):
    """Of a sweep whose N is not fixed: when its comparisons have samples enough, and where it came to.

    Attributes:
        counts: N of each look that may be made, the largest last.
        se: an error of a comparison that is enough, too.
        hours: after which no further look is begun.
        spending: how the probability of a false finding is shared out over the looks.
        reached: N of the last look that is complete; None before the first.
        ended: why no look follows: all comparisons need no more, N is the largest, the clock, or there was nothing to
            compare; None while it goes on, or where it was cut short.
    """

    counts: tuple[int, ...] = Field(min_length=1)
    se: float | None = None
    hours: float | None = None
    spending: str = ""
    reached: int | None = None
    ended: Literal["enough", "samples", "hours", "nothing"] | None = None

    @property
    def made(self) -> tuple[int, ...]:
        """N of the looks that are complete."""
        return tuple(count for count in self.counts if self.reached is not None and count <= self.reached)

    @property
    def shown(self) -> int:
        """N of the look that a report is of."""
        return self.counts[0] if self.reached is None else self.reached


class Plan(Written):
    """plan.json: what the sweep set out to do; earlier versions called the published numbers "reference"."""

    created: str = ""
    command: str = ""
    name: str = ""
    title: str | None = None
    notes: str | None = None
    published: Published | None = Field(default=None, validation_alias=AliasChoices("published", "reference"))
    elsewhere: tuple[Elsewhere, ...] = ()
    outputs_dir: str = "../.."
    environment: dict[str, Any] = {}
    phases: dict[str, float] = {}
    stop: StopRule | None = None
    cells: tuple[PlanCell, ...] = ()


# -- a job's pointer ------------------------------------------------------------------------------------


class WandbRun(Record):
    """A W&B run that a job left: its mode, and its folder."""

    mode: str
    directory: str


class EarlierLook(Record):
    """The cell that a job measured at a smaller N, in a sweep whose N is not fixed."""

    num_samples: int
    cell: str = Field(pattern=r"^[A-Za-z0-9_-]+$")


class Pointer(Using):
    """pointer.json: how one job ended, and which cell it stands for.

    Attributes:
        number: the job's, in its sweep.
        status: how it ended; `error` says in a line why it failed.
        cell: the cell's key, if it is done.
        cached: whether the cell was there already.
        seconds: the job took, at all looks; `phases` says on what, at the last.
        wandb: its runs.
        images_there: how many of the images that it measured were made before.
        num_samples: N, in a sweep where that is not fixed.
        earlier: the cells at smaller N there, ascending.
    """

    number: int = 0
    status: Literal["done", "failed"]
    cell: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    cached: bool = False
    error: str | None = None
    seconds: float | None = None
    phases: dict[str, float] = {}
    wandb: tuple[WandbRun, ...] | None = ()
    images_there: int = 0
    num_samples: int | None = None
    earlier: tuple[EarlierLook, ...] = ()


# -- samples ----------------------------------------------------------------------------------------------


class Samples(Written):
    """identity.json of a folder of samples, which grows.

    Attributes:
        key: the folder's.
        identity: what the key is the digest of: all that makes the images, but not how many they are.
        words: the same in a line for readers.
        nfe: network forwards a sample.
        batch_size: samples of a whole batch.
    """

    key: str
    identity: dict[str, Any] = {}
    words: str = ""
    nfe: int = Field(ge=0)
    batch_size: int = Field(ge=1)


# -- a cell's result ------------------------------------------------------------------------------------


class Value(Record):
    """One number of a cell with all that it means nothing without.

    A value with a heading gets a table of its own, series down and steps across, and a chart. One with a column stands
    in a table with a row a cell. Every value stands in results.csv.

    Attributes:
        name: what results.csv calls it, unique in its cell.
        value: the number (or a truth value, a word); None where it could not be measured: `why_not` says why.
        why_not: the reason, one line.
        unit: "s/image" for the time that the speed section is about, "images/s", "B" for bytes, "share" for what is
            read in percent, "s"; "" for a pure number.
        heading: what its own table is called; "" if it has none.
        facts: what one value means, one line under the heading.
        section: title of the report's section that shows it; "" for "Results".
        table: title of the table there that it is a column of.
        column: heading of that column; "" if it is in no such table.
        beside: name of the value with a heading under which that table stands, with its facts; None for the first.
        notes: sentences under that table, each told once.
        label: a few words for it as a row beside the values that it is the level of.
        against: what its chart is drawn against; None for no chart.
        se: its standard error; `error` says how it was taken, after "± is one standard error".
        spread: another ± than a standard error, as of subsets; `error` says which, after "±".
        error: how the error or the spread was taken, as "by the influence of each sample, to second order".
        quartiles: the first and third, where the value is a median of repeats.
        count: how many `counted` it is of.
        counted: "images", "lines"; "" where tables are to say "N = 50,000".
        better: whether rows may be ranked by it, and how.
        level: the name of another value of the cell, of the same unit, to stand beside it; `level_says` what that is.
            With a `label` and the same count it is a line in the chart, too.
        level_as: whether the level is told in a note under the table, or is its last row.
        replicates: the value without each group of samples, for paired differences between cells.
        interactions: what the second order of the error is taken from, likewise: `ddim_lab.metrics.estimates.Estimate`.
        comparable: what must be equal for two values of this name to share a table: name -> what it is here,
            as {"features": "3f1c...", "reference": "digits train, n=1437"}. results.csv has those of the cell's first
            such value as <value>_<name>, and those of others that go by the same names to other ones.
        unbiased: whether its expectation does not depend on how many it is of, so that its level may be of other N.
        akin: a published metric whose name begins so may stand beside it, though no difference is given.
        fair: False for a time taken while something else was at work: it is marked, and kept out of charts and fits.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    value: float | int | bool | str | None
    why_not: str | None = None
    unit: str = ""
    heading: str = ""
    facts: str = ""
    section: str = ""
    table: str = ""
    column: str = ""
    beside: str | None = None
    notes: tuple[str, ...] = ()
    label: str = ""
    against: Literal["steps", "eta"] | None = "steps"
    se: float | None = None
    spread: float | None = None
    error: str = ""
    quartiles: tuple[float, float] | None = None
    count: int | None = None
    counted: str = "images"
    better: Literal["lower", "higher"] | None = None
    level: str | None = None
    level_says: str = ""
    level_as: Literal["note", "row"] = "note"
    replicates: tuple[float, ...] | None = None
    interactions: tuple[float, ...] = ()
    comparable: dict[str, str | int | None] = {}
    unbiased: bool = False
    akin: tuple[str, ...] = ()
    fair: bool = True

    @field_validator("name")
    @classmethod
    def _is_no_column_of_the_row(cls, name: str) -> str:
        if name in ROW:
            raise ValueError(f"{name} is what results.csv calls something else: give the value another name")
        return name

    @property
    def number(self) -> float | None:
        """The value, if it is a finite number."""
        if self.value is None or isinstance(self.value, bool | str) or not math.isfinite(self.value):
            return None
        return self.value

    @property
    def finite_se(self) -> float | None:
        """The standard error, if it is a finite number."""
        return self.se if self.se is not None and math.isfinite(self.se) else None


class Tabled(Record):
    """A table that a task adds to its cell, shown as it is.

    `drawn` names two of its columns, x and y, of positive numbers: the cells' tables of one title are drawn together,
    log-log, a line a cell.
    """

    title: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    drawn: tuple[str, str] | None = None


class Pictured(Record):
    """A picture that a task adds to its cell: a file beside result.json."""

    title: str = ""
    file: str
    caption: str = ""


class Result(Written):
    """result.json: what a cell is (its recipe) and what was measured of it.

    Attributes:
        key: the cell's.
        task: what measured it.
        identity: what the key is the digest of.
        recipe: the same in words that a reader understands.
        nfe: network forwards a sample.
        headline: one line for the console.
        common_start: whether sample i starts from the same noise x_T in every cell of a seed.
        values: in the order in which they are shown; the first with a heading leads.
        tables, pictures: of the task.
        phases: seconds that each took.
        objects: the store's objects that were used, as (kind, key).
        environment: versions and commit.
        created: when.
    """

    SCHEMA: ClassVar[int] = 2

    key: str
    task: str = "generate"
    identity: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    nfe: int | None = None
    headline: str = ""
    common_start: bool = True
    values: tuple[Value, ...] = ()
    tables: tuple[Tabled, ...] = ()
    pictures: tuple[Pictured, ...] = ()
    phases: dict[str, float] = {}
    objects: tuple[tuple[str, str], ...] = ()
    environment: dict[str, Any] = {}
    created: str = ""

    @field_validator("values")
    @classmethod
    def _names_are_unique(cls, values: tuple[Value, ...]) -> tuple[Value, ...]:
        names = [value.name for value in values]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two values are called {twice[0]}")
        return values

    @classmethod
    def read(cls, content: object) -> Self:
        """As `Written.read`; a result of schema 1, as cells from before schema 2 hold it, gives the same values."""
        found = _of_schema(content, 1, cls.SCHEMA)
        return cls.model_validate(upgraded(found) if found["schema"] == 1 else found)

    def recipe_value(self, *path: str) -> Any:
        """The recipe's entry at `path`, or None where the recipe has no such entry."""
        value: Any = self.recipe
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value
