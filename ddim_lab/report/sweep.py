"""Read what a sweep left on disk: its plan, each job's pointer, each cell's result.

Everything is checked as it is read. A plan that can't be read is an error, for without it there is nothing to
report; a pointer or a result that can't be read is a hole, which the report marks and explains.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddim_lab.errors import ConfigError
from ddim_lab.store import fault, read_json, read_record

SCHEMA = 1
Status = Literal["done", "failed", "missing"]


class ReportError(ConfigError):
    """The folder can't be reported on; the message says what is wrong and what to do."""


class _Record(BaseModel):
    """A record of a file. Unknown entries are left alone: a task may keep more than the report shows."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class PlanCell(_Record):
    """One job as it was planned: its overrides, and the resolved values that name it."""

    number: int
    task: str = "generate"
    overrides: tuple[str, ...] = ()
    labels: dict[str, Any] = {}


class RowSampler(_Record):
    """What the sampler of a published row is."""

    eta: float
    variance: str
    clip: str


class Reference(_Record):
    """Published numbers to stand beside ours: rows by sampler preset, columns by steps.

    `samplers` says what each row's sampler is. The others say what the numbers were taken with; None where that is not
    said: data, number of images, split of the real images, weights, timesteps (one spacing, or by steps) and schedule.
    """

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


class Plan(_Record):
    """plan.json: what the sweep set out to do."""

    created: str = ""
    command: str = ""
    name: str = ""
    title: str | None = None
    notes: str | None = None
    reference: Reference | None = None
    outputs_dir: str = "../.."
    environment: dict[str, Any] = {}
    phases: dict[str, float] = {}
    cells: tuple[PlanCell, ...] = ()


class Pointer(_Record):
    """pointer.json: how one job ended, and which cell it stands for."""

    status: Literal["done", "failed"]
    cell: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$")
    cached: bool = False
    error: str | None = None
    seconds: float | None = None
    phases: dict[str, float] = {}


class EqualN(_Record):
    """Fréchet distances of samples and of held-out real images (± its standard error), at the same number of images."""

    num_samples: int
    fd_samples: float | None = None
    fd_held_out: float | None = None
    fd_held_out_se: float | None = None


class Nearest(_Record):
    """Median distances to the nearest neighbour: Euclidean, over pixels in [-1, 1]."""

    samples_to_train: float | None = None
    samples_to_held_out: float | None = None
    held_out_to_train: float | None = None


class Quality(_Record):
    """A Fréchet distance with the four things it means nothing without: metric, features, reference, N."""

    fd: float | None = None
    fd_se: float | None = None
    name: str = "FD"
    features: str | None = None
    reference: str | None = None
    reference_key: str | None = None
    num_samples: int | None = None
    kid: float | None = None
    kid_spread: float | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    inception_score: float | None = None
    inception_score_spread: float | None = None
    precision: float | None = None
    recall: float | None = None
    leave_one_out: tuple[float, ...] | None = None
    equal_n: EqualN | None = None
    nearest: Nearest | None = None


class Speed(_Record):
    """Seconds of one batch of `images` images, over repeats; `seconds_per_image` is the median's share."""

    images: int | None = None
    forward_images: int | None = None
    repeats: int | None = None
    seconds_median: float | None = None
    seconds_q1: float | None = None
    seconds_q3: float | None = None
    images_per_second: float | None = None
    seconds_per_image: float | None = None
    forward_share: float | None = None
    warmup_seconds: float | None = None
    peak_memory_bytes: int | None = None
    contended: bool = False


class Determinism(_Record):
    """Differences between runs that should be equal, and the variance that the sampler's own noise makes."""

    images: int | None = None
    repeat_max_abs_diff: float | None = None
    repeat_identical: bool | None = None
    batch_max_abs_diff: float | None = None
    batch_sizes: tuple[int, ...] | None = None
    noise_seeds: int | None = None
    noise_images: int | None = None
    noise_variance: float | None = None
    noise_variance_se: float | None = None
    sha256: str | None = None


class Measurements(_Record):
    """What one cell measured; a task leaves out what it does not measure."""

    nfe: int | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    determinism: Determinism | None = None
    # task reconstruct: squared errors a dimension on the [0, 1] scale, and the moments of the codes
    reconstruction_mse: float | None = None
    reconstruction_mse_se: float | None = None
    reconstruction_mse_median: float | None = None
    reconstruction_images: int | None = None
    code_mean: float | None = None
    code_variance: float | None = None
    # task consistency
    consistency_mse: float | None = None
    consistency_mse_se: float | None = None
    feature_distance: float | None = None
    feature_distance_se: float | None = None
    unrelated_mse: float | None = None
    unrelated_feature_distance: float | None = None
    reference_steps: int | None = None
    compared_images: int | None = None
    # task interpolate: lengths in units of the straight line, distances in pixels of [-1, 1]
    interpolation_path_length: float | None = None
    interpolation_largest_step: float | None = None
    lerp_path_length: float | None = None
    lerp_largest_step: float | None = None
    midpoint_to_train: float | None = None
    lerp_midpoint_to_train: float | None = None
    crossfade_midpoint_to_train: float | None = None
    ends_to_train: float | None = None
    interpolation_lines: int | None = None
    interpolation_points: int | None = None
    # task trajectory
    first_prediction_mse: float | None = None
    halfway_prediction_mse: float | None = None
    # task cannot_skip
    mse_to_sampler: float | None = None
    mse_to_sampler_se: float | None = None
    # task search_timesteps: the found list and the best built-in spacing of the same NFE, at the final noise
    found_fd: float | None = None
    found_fd_se: float | None = None
    best_builtin: str | None = None
    best_builtin_fd: float | None = None
    found_gain: float | None = None
    found_gain_se: float | None = None
    found_images: int | None = None
    spacings: int | None = None
    # task benchmark, and of speed_peers one_image_seconds: of one image alone; the rest at the largest batch
    one_image_seconds: float | None = None
    loop_overhead: float | None = None
    noisy_loop_overhead: float | None = None
    flops_per_forward: int | None = None
    teraflops: float | None = None
    ceiling_teraflops: float | None = None
    ceiling_share: float | None = None
    forwards_per_second: float | None = None
    steps_r_squared: float | None = None
    samples_r_squared: float | None = None
    memory_growth: float | None = None
    # task speed_peers: how many times as long the others took
    times_diffusers: float | None = None
    times_diffusers_low: float | None = None
    times_diffusers_high: float | None = None
    times_diffusers_coverage: float | None = None
    times_diffusers_optimised: float | None = None
    times_papers_code: float | None = None
    one_image_times_diffusers: float | None = None
    # task precision: beside fp32 on deterministic kernels, from the same x_T
    precision_fd_change: float | None = None
    precision_fd_change_se: float | None = None
    precision_fd_percent: float | None = None
    precision_fd_percent_se: float | None = None
    precision_fd_reference: float | None = None
    precision_fd_reference_se: float | None = None
    precision_max_abs_diff: float | None = None
    precision_mse: float | None = None
    precision_mse_se: float | None = None
    precision_mean_diff: float | None = None
    precision_speedup: float | None = None
    spacings_beaten: int | None = None


TASK_FIELDS = tuple(
    name for name in Measurements.model_fields if name not in ("nfe", "quality", "speed", "determinism")
)
"""Names of the numbers that tasks add."""


class TaskTable(_Record):
    """A table that a task adds to its cell, shown as it is."""

    title: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


class TaskPicture(_Record):
    """A picture that a task adds to its cell: a file beside result.json."""

    title: str = ""
    file: str
    caption: str = ""


class Result(_Record):
    """result.json: what a cell is (its recipe) and what was measured of it."""

    key: str
    task: str = "generate"
    recipe: dict[str, Any] = {}
    measurements: Measurements = Measurements()
    phases: dict[str, float] = {}
    environment: dict[str, Any] = {}
    tables: tuple[TaskTable, ...] = ()
    pictures: tuple[TaskPicture, ...] = ()

    def recipe_value(self, *path: str) -> Any:
        """The recipe's entry at `path`, or None where the recipe has no such entry."""
        value: Any = self.recipe
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


@dataclass(frozen=True)
class Cell:
    """One planned job and what became of it.

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
    def key(self) -> str | None:
        return self.pointer.cell if self.pointer else None

    @property
    def steps(self) -> int | None:
        steps = self.plan.labels.get("steps")
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    @property
    def forwards(self) -> int | None:
        """Network forwards a sample, as counted by the job; below the steps where a spacing drops repeats."""
        return self.result.measurements.nfe if self.result else None

    @property
    def quality(self) -> Quality | None:
        return self.result.measurements.quality if self.result else None

    @property
    def speed(self) -> Speed | None:
        return self.result.measurements.speed if self.result else None

    @property
    def determinism(self) -> Determinism | None:
        return self.result.measurements.determinism if self.result else None

    @property
    def fd(self) -> float | None:
        """The Fréchet distance, if it was measured and is a number."""
        return finite(self.quality.fd) if self.quality else None

    def value(self, field: str) -> float | None:
        """A number of the cell's measurements or its determinism by name; None where it is absent or not finite."""
        if self.result is None:
            return None
        found = getattr(self.result.measurements, field, None)
        return finite(getattr(self.determinism, field, None) if found is None else found)

    @property
    def seconds_per_image(self) -> float | None:
        """Seconds to sample one image; None where it was not timed, or timed beside other work."""
        if self.speed is None or self.speed.contended:
            return None
        return finite(self.speed.seconds_per_image)


@dataclass(frozen=True)
class Sweep:
    """A sweep's plan and its cells, in the plan's order; a comparison's `members` are the sweeps it is made of."""

    folder: Path
    outputs: Path
    plan: Plan
    cells: tuple[Cell, ...]
    members: dict[str, Sweep] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.plan.title or f"Sweep {self.plan.name or self.folder.name}"


def finite(value: float | None) -> float | None:
    """`value`, or None if it is absent, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


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
        plan = Plan.model_validate(_of_schema(read_record(path)))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} can't be used: {_one_line(error)}") from error
    if not plan.cells:
        raise ReportError(f"{path} plans no cell; there is nothing to report")
    outputs = folder / plan.outputs_dir
    cells = tuple(_read_cell(folder, outputs, planned) for planned in plan.cells)
    return Sweep(folder=folder, outputs=outputs, plan=plan, cells=cells)


def _read_cell(folder: Path, outputs: Path, planned: PlanCell) -> Cell:
    def hole(status: Status, error: str, pointer: Pointer | None = None) -> Cell:
        return Cell(planned, status, error, pointer, None, None)

    path = folder / "jobs" / str(planned.number) / "pointer.json"
    if not path.is_file():
        return hole("missing", "the job left no record: it was stopped, or has not run")
    try:
        pointer = Pointer.model_validate(_of_schema(read_record(path)))
    except (OSError, ValueError) as error:
        return hole("failed", f"pointer.json is damaged: {_one_line(error)}")
    if pointer.status == "failed":
        return hole("failed", _one_line(pointer.error or "the job failed and gave no reason"), pointer)
    if pointer.cell is None:
        return hole("failed", "pointer.json is damaged: the job is done but names no cell", pointer)

    cell = outputs / "cells" / pointer.cell
    path = cell / "result.json"
    if not path.is_file():
        return hole("missing", f"cells/{pointer.cell[:12]}…/result.json is not there", pointer)
    try:
        result = Result.model_validate(_of_schema(read_json(path)))
        damage = fault(cell, only=[path.name])
    except (OSError, ValueError) as error:
        return hole("failed", f"result.json is damaged: {_one_line(error)}", pointer)
    if damage is not None or result.key != pointer.cell:
        words = damage or f"result.json calls itself cell {result.key[:12]}"
        return hole("failed", f"cell {pointer.cell[:12]} is damaged: {words}", pointer)
    return Cell(planned, "done", None, pointer, result, cell)


def _of_schema(value: Any) -> Any:
    """A JSON object, of the schema that this version reads."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if value.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {value.get('schema')!r}, this version reads {SCHEMA}")
    return value


def _one_line(error: object) -> str:
    """An error as one line of at most 300 characters."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        text = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    else:
        text = str(error)
    return re.sub(r"\s+", " ", text).strip()[:300]


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
        fingerprint = cell.result.recipe_value("model", "fingerprint") if cell.result else None
        if not isinstance(fingerprint, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", fingerprint):
            continue
        if fingerprint in curves:
            continue
        assert cell.folder is not None
        model = cell.folder.parents[1] / "models" / fingerprint
        points = [] if fault(model, only=[CURVE]) else _read_curve(model / CURVE)
        if points:
            labels = cell.plan.labels
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
