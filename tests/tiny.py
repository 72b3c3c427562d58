"""The harness at a tiny size, run in this process: the same code, seconds instead of minutes."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ddim_lab.__main__ import main
from ddim_lab.config.job import Config
from ddim_lab.device.runtime import _missing_for_compiling
from ddim_lab.jobs.compose import compose, composer
from ddim_lab.report.rows import measured as values_by_column
from ddim_lab.store.records import Result, Value

needs_compiler = pytest.mark.skipif(
    _missing_for_compiling(on_gpu=False) is not None, reason="needs a C++ compiler and Python's headers"
)

SMALL = ("num_samples=44", "batch_size=16")
"""For exact models, which have nothing to train."""

TINY = (
    "training.max_steps=12",
    "training.warmup_steps=2",
    "training.checkpoint_every=5",
    "training.batch_size=16",
    "model.block_out_channels=[8,8]",
    *SMALL,
)


def run(outputs: Path, *arguments: str, settings: Sequence[str] = TINY) -> int:
    """`python -m ddim_lab` with tiny settings; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddim_lab", *settings, f"outputs_dir={outputs}", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def configure(*overrides: str) -> Config:
    """The checked configuration of one job, as Hydra composes it."""
    with composer(argparse.Namespace(config_dir=None, overrides=[])):
        return Config.from_hydra(compose(overrides))


def sweeps(outputs: Path) -> list[Path]:
    """The sweep folders, oldest first."""
    return sorted((outputs / "sweeps").iterdir())


def results(sweep: Path) -> list[dict[str, str]]:
    """The rows of a sweep's results.csv."""
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def columns(values: Sequence[Value]) -> dict[str, Any]:
    """Values by the names of results.csv, what belongs to them beside them."""
    return values_by_column(values)


def measured(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's result.json says, by the names of results.csv; its nfe and headline beside them."""
    found = Result.read(dict(result))
    return {"nfe": found.nfe, "headline": found.headline, **columns(found.values)}


TIMES = {
    *("images_per_second", "seconds_per_image", "seconds_median", "seconds_q1", "seconds_q3", "warmup_seconds"),
    *("job_seconds", "forward_share", "peak_memory", "contended", "speed_repeats"),
}
"""Columns of results.csv that no two runs share."""


def numbers(sweep: Path) -> list[dict[str, str]]:
    """The rows of results.csv in all that does not depend on the clock, the outputs' place or who was first."""
    left_out = TIMES | {"overrides", "cached"}
    return [{name: value for name, value in row.items() if name not in left_out} for row in results(sweep)]
