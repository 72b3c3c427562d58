"""What a sweep is said to cost: against arithmetic, against what its tasks really spend, and the measured time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_experiments import composed

from ddim_lab.cost import ForwardTime, describe_cost, forward_time, image_forwards
from ddim_lab.models import _Function
from ddim_lab.runtime import Runtime

EXACT = ("data=digits", "model=gaussian", "training=digits", "metrics.features=pixels", *tiny.SMALL)


def test_the_papers_tables_cost_what_arithmetic_says() -> None:
    # quadratic visits 49 timesteps of 50, 96 of 100, 187 of 200, 422 of 500, 688 of 1000
    assert image_forwards(composed("table1_cifar10")) == 50_000 * 5 * (10 + 20 + 49 + 96)
    assert image_forwards(composed("table2_cifar10")) == 2 * 10_000 * (10 + 20 + 49 + 96 + 187 + 422 + 688)
    assert image_forwards(composed("table3_church")) == 50_000 * 2 * 180
    assert image_forwards(composed("table1_cifar10", "num_samples=1000")) == 1_000 * 5 * 175


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("reconstruction", ["steps=3,5"]),
        ("interpolation", ["steps=3", "task.points=4", "task.grid=3"]),
        ("consistency", ["steps=3,8", "task.reference_steps=8"]),
        ("trajectory", ["steps=3"]),
    ],
)
def test_tasks_spend_what_was_said(name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = 0
    forward = _Function.forward

    def count(self: _Function, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal spent
        spent += len(x_t)
        return forward(self, x_t, t)

    monkeypatch.setattr(_Function, "forward", count)
    arguments = [*EXACT, *more]
    assert tiny.run(tmp_path, f"+experiments={name}", "logger=csv", *arguments, settings=()) == 0
    assert spent == image_forwards(composed(name, *arguments))


def test_references_are_shared_by_the_cells_of_one_model_alone() -> None:
    one, two = (composed("consistency", *EXACT, "steps=3,5", f"training.seed={seed}") for seed in (0, 1))
    assert image_forwards([*one, *two]) == image_forwards(one) + image_forwards(two)
    precision = composed("precision", *EXACT, "steps=3")
    assert image_forwards(precision) == (len(precision) + 1) * 44 * 3  # each runtime, and fp32 once


def test_samples_spend_what_was_said_and_the_checks_come_on_top(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(tmp_path, *EXACT, "steps=3,5", "logger=csv", "-m", settings=()) == 0
    assert f"ddim_lab: 2 cells, {44 * 8} image-forwards at most\n" in capsys.readouterr().err


def test_a_forward_is_timed_on_the_cells_own_network() -> None:
    (small, *_) = composed("table1_digits", "batch_size=8")
    (large, *_) = composed("table1_digits", "batch_size=8", "model.block_out_channels=[128,128]")
    runtime = Runtime.resolve(small.runtime)
    times = [forward_time(config, runtime) for config in (small, large)]
    assert all(isinstance(time, ForwardTime) and time.images <= 8 for time in times)
    assert times[0].seconds < times[1].seconds  # type: ignore[union-attr]
    (exact, *_) = composed("table1_digits", *EXACT)
    assert forward_time(exact, runtime) is None


def test_the_line_for_the_user() -> None:
    cells: list[Any] = composed("table1_digits", "model.block_out_channels=[8,8]")
    line = describe_cost(cells, Runtime.resolve(cells[0].runtime))
    assert line.startswith(f"20 cells, {1437 * 5 * 180:,} image-forwards at most: about ")
    assert "training, if this model is not stored, about " in line
    assert "num_samples=1000 samples in " in line
    assert "\n" not in line


def test_measuring_moves_no_random_number() -> None:
    (config, *_) = composed("table1_digits")
    before = torch.random.get_rng_state()
    forward_time(config, Runtime.resolve(config.runtime))
    assert torch.equal(torch.random.get_rng_state(), before)
