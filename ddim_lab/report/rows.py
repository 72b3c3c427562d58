"""One flat row a cell: results.csv, W&B tables, and whatever wants numbers without a page round them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from ddim_lab.report.sweep import TASK_FIELDS, Cell, Sweep

LABELS = ("data", "model", "sampler", "eta", "variance", "spacing", "clip", "steps")
COLUMNS = (
    *LABELS, "nfe", "num_samples", "batch_size", "seed", "training_seed", "weights",
    "fd", "fd_se", "fd_features", "fd_reference",
    "images_per_second", "seconds_per_image", "forward_share", "peak_memory",
    "repeat_max_abs_diff", "repeat_identical", "noise_variance", "noise_variance_se", "sha256",
    "precision", "device", "status", "cell",
    # what follows is beyond the contract, and may grow
    "fd_name", "fd_num_samples", "fd_reference_key",
    "kid", "kid_spread", "inception_score", "inception_score_spread", "improved_precision", "improved_recall",
    "equal_n", "fd_at_equal_n", "fd_held_out_at_equal_n", "fd_held_out_at_equal_n_se",
    "nearest_samples_to_train", "nearest_samples_to_held_out", "nearest_held_out_to_train",
    "speed_images", "forward_images", "speed_repeats", "seconds_median", "seconds_q1", "seconds_q3", "warmup_seconds",
    "contended", "determinism_images", "batch_max_abs_diff", "noise_seeds", "noise_images", "noise_mse",
    *TASK_FIELDS,
    "device_name", "compile", "task", "number", "cached", "job_seconds", "error", "overrides", "sweep",
)  # fmt: skip


def cell_row(cell: Cell) -> dict[str, Any]:
    """`cell` as a row of COLUMNS, None where there is no value. Times in seconds, memory in bytes."""
    labels, result, pointer = cell.plan.labels, cell.result, cell.pointer
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update({name: labels.get(name) for name in LABELS})
    row.update({name: labels.get(name) for name in ("num_samples", "batch_size", "seed", "training_seed")})
    row.update(
        status=cell.status,
        cell=cell.key,
        task=cell.plan.task,
        number=cell.number,
        cached=pointer.cached if pointer else None,
        job_seconds=pointer.seconds if pointer else None,
        error=cell.error,
        overrides=" ".join(cell.plan.overrides),
        sweep=labels.get("sweep"),
    )
    if result is None:
        return row
    row.update(
        nfe=result.measurements.nfe,
        batch_size=result.recipe_value("batch_size") or row["batch_size"],  # resolved, where the plan says "auto"
        weights=result.recipe_value("model", "weights"),
        precision=result.recipe_value("runtime", "precision"),
        device=result.recipe_value("runtime", "device"),
        device_name=result.recipe_value("runtime", "device_name"),
        compile=result.recipe_value("runtime", "compile"),
        **{name: getattr(result.measurements, name) for name in TASK_FIELDS},
    )
    if quality := cell.quality:
        row.update(
            fd=quality.fd,
            fd_se=quality.fd_se,
            fd_features=quality.features,
            fd_reference=quality.reference,
            fd_name=quality.name,
            fd_num_samples=quality.num_samples,
            fd_reference_key=quality.reference_key,
            kid=quality.kid,
            kid_spread=quality.kid_spread,
            inception_score=quality.inception_score,
            inception_score_spread=quality.inception_score_spread,
            improved_precision=quality.precision,  # `precision` is the arithmetic's
            improved_recall=quality.recall,
        )
        if equal_n := quality.equal_n:
            row.update(
                equal_n=equal_n.num_samples,
                fd_at_equal_n=equal_n.fd_samples,
                fd_held_out_at_equal_n=equal_n.fd_held_out,
                fd_held_out_at_equal_n_se=equal_n.fd_held_out_se,
            )
        if nearest := quality.nearest:
            row.update({f"nearest_{name}": value for name, value in nearest})
    if speed := cell.speed:
        row.update(
            speed_images=speed.images,
            speed_repeats=speed.repeats,
            peak_memory=speed.peak_memory_bytes,
            **speed.model_dump(exclude={"images", "repeats", "peak_memory_bytes"}),
        )
    if determinism := cell.determinism:
        row.update(
            determinism_images=determinism.images,
            # two runs differ by twice the variance; images on [0, 1] have a quarter of it
            noise_mse=None if determinism.noise_variance is None else determinism.noise_variance / 2,
            **determinism.model_dump(exclude={"images", "batch_sizes"}),
        )
    return row


def sweep_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a cell, in the plan's order."""
    return [cell_row(cell) for cell in sweep.cells]


def exact(value: Any) -> str:
    """A value as results.csv writes it: floats so that they read back as they were, None as nothing."""
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV (RFC 4180 but for the line ends, which are "\\n")."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([exact(row[name]) for name in COLUMNS] for row in rows)
    return buffer.getvalue()
