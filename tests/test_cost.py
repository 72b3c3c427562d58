"""What a sweep is said to cost: against arithmetic, against what its tasks really spend, and the measured time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from test_experiments import composed

from ddim_lab.data.base import data_set, load_data
from ddim_lab.device.runtime import Runtime
from ddim_lab.jobs.compose import composer
from ddim_lab.jobs.cost import (
    ForwardTime,
    describe_cost,
    forward_time,
    forwards_by_cell,
    image_forwards,
)
from ddim_lab.jobs.plan import plan_sweep
from ddim_lab.models.obtain import _Function
from ddim_lab.tasks.generate import Generate

EXACT = ("data=digits", "model=gaussian", "training=digits", "metrics.features=pixels", *tiny.SMALL)


@pytest.mark.slow
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
        ("reconstruction", ["steps=2", "num_samples=1000"]),  # 360 of them are held out
        ("interpolation", ["steps=3", "task.points=5", "task.grid=3"]),
        ("consistency", ["steps=3,8", "task.many_steps=8"]),
        ("trajectory", ["steps=3"]),
        ("metric_power", ["steps=3", "task.draws=2", "task.fewer_steps=2", "task.reference_images=100"]),
    ],
)
def test_tasks_spend_what_was_said(name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = count_forwards(monkeypatch)
    arguments = [*EXACT, *more]
    assert tiny.run(tmp_path, f"+experiments={name}", "logger=csv", *arguments, settings=()) == 0
    assert sum(spent) == image_forwards(composed(name, *arguments))


def test_what_is_held_out_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    folder = ("data=image_folder", f"data.root={tmp_path}", "data.image_size=8", "data.channels=1", "data.held_out=0.3")
    for more in (folder, ("data=digits",)):
        data = tiny.configure("task=reconstruct", "sampler.clip=none", "model=gaussian", *more).data
        assert data_set(data).held_out_count() == len(load_data(data).held_out)


def test_references_are_shared_by_the_cells_of_one_model_alone() -> None:
    one, two = (composed("consistency", *EXACT, "steps=3,5", f"training.seed={seed}") for seed in (0, 1))
    assert image_forwards([*one, *two]) == image_forwards(one) + image_forwards(two)
    precision = composed("precision", *EXACT, "steps=3")
    assert image_forwards(precision) == (len(precision) + 1) * 44 * 3  # each runtime, and fp32 once


@pytest.mark.parametrize(
    "more",
    [
        ["steps=3,5"],
        ["steps=30", "batch_size=40", "metrics.noise_seeds=4"],
        ["steps=3", "num_samples=7", "batch_size=100", "sampler.eta=1"],
        ["steps=3", "task=precision"],
        ["steps=3", "task=precision", "runtime=deterministic"],
    ],
    ids=" ".join,
)
def test_cells_spend_what_was_said(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples and what measures them, forward by forward; a precision cell that is its own reference is not timed."""
    spent = count_forwards(monkeypatch)
    arguments = [*EXACT, *more, "logger=csv"]
    assert tiny.run(tmp_path, *arguments, "-m", settings=()) == 0
    _, plan, cells = planned(arguments)
    samples, measuring = image_forwards(cells), sum(config.task.measuring_forwards(config) for config in cells)
    assert f"{samples:,} image-forwards for samples and {measuring:,} to measure them\n" in capsys.readouterr().err
    assert samples == sum(cell.image_forwards for cell in plan.cells)
    if "runtime=deterministic" in more:
        samples, measuring = samples // 2, 0
    assert sum(spent) == samples + measuring


@pytest.mark.parametrize("num_samples", [120, 500, 1437, 5000])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_measuring_costs_a_fifth_of_the_samples_at_most(num_samples: int, steps: int) -> None:
    config = tiny.configure(f"num_samples={num_samples}", f"steps={steps}")
    assert 0 < config.task.measuring_forwards(config) <= config.task.forwards(config) / 5


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the last walk that measures, a cell takes that walk alone when it is started again."""
    arguments = [*EXACT, "steps=3", "logger=csv"]
    spent = count_forwards(monkeypatch)
    assert tiny.run(tmp_path / "whole", *arguments, settings=()) == 0
    whole = list(spent)
    forward = _Function.forward

    def stop(self: _Function, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if len(spent) == len(whole) - 1:
            spent.clear()
            raise RuntimeError("stopped")
        return forward(self, x_t, t)

    spent.clear()
    monkeypatch.setattr(_Function, "forward", stop)
    assert tiny.run(tmp_path / "stopped", *arguments, settings=()) == 1
    monkeypatch.setattr(_Function, "forward", forward)
    spent.clear()
    assert tiny.run(tmp_path / "stopped", *arguments, settings=()) == 0
    assert spent == whole[-3:]
    numbers = [tiny.numbers(tiny.sweeps(tmp_path / name)[-1]) for name in ("whole", "stopped")]
    assert numbers[0] == numbers[1]


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images of every forward from now on."""
    spent: list[int] = []
    forward = _Function.forward

    def count(self: _Function, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        spent.append(len(x_t))
        return forward(self, x_t, t)

    monkeypatch.setattr(_Function, "forward", count)
    return spent


def planned(arguments: list[str]) -> Any:
    asked = argparse.Namespace(config_dir=None, overrides=arguments, multirun=True)
    with composer(asked):
        return plan_sweep(asked, arguments)


def test_a_reference_is_paid_for_by_the_first_cell_that_needs_it() -> None:
    cells = composed("consistency", *EXACT, "sampler.eta=0", "steps=3,5,8", "task.many_steps=8")
    assert forwards_by_cell(cells[:3]) == [44 * (3 + 8), 44 * 5, 0]


def test_the_hours_are_those_of_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small and a large network in one sweep, in either order; two seeds are two trainings of one network."""
    seconds = {"[8,8]": 1e-3, "[16,16]": 1.0}

    def timed(config: Any, runtime: Runtime) -> ForwardTime:
        return ForwardTime(seconds[str(list(config.model.block_out_channels)).replace(" ", "")], 1)

    monkeypatch.setattr("ddim_lab.jobs.cost.forward_time", timed)
    monkeypatch.setattr(Generate, "measuring_forwards", lambda self, config: 0)
    small, large = (
        composed("table1_digits", "steps=1000", f"model.block_out_channels={channels}", "num_samples=1000")
        for channels in seconds
    )
    hours = len(small) * 1000 * 1000 * (1e-3 + 1.0) / 3600
    for cells in ([*small, *large], [*large, *small]):
        assert f": about {hours:,.1f} h on " in describe_cost(cells)
    other = composed("table1_digits", "steps=1000", "model.block_out_channels=[8,8]", "training.seed=1")
    trainings = 2 * small[0].training.max_steps * small[0].training.batch_size * 3 * 1e-3
    assert f"; 2 trainings, if they are not stored, about {trainings / 60:.0f} min" in describe_cost([*small, *other])


@tiny.needs_compiler
@pytest.mark.parametrize(
    ("each", "arguments", "saved"),
    [
        (1e-2, (), None),  # seven hours in all, but no cell of them would repay its compiling three times
        (1e-1, (), "2.8 h"),
        (1e-1, ("runtime=fast",), None),
        (1e-1, ("runtime=deterministic",), None),
    ],
)
def test_compiling_is_recommended_where_it_pays(
    each: float, arguments: tuple[str, ...], saved: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim_lab.device.runtime.multiplies_bf16", lambda: False)
    monkeypatch.setattr("ddim_lab.jobs.cost.forward_time", lambda config, runtime: ForwardTime(each, 1))
    monkeypatch.setattr(Generate, "measuring_forwards", lambda self, config: 0)
    cells = composed("table1_digits", "runtime.device=cpu", *arguments)
    line = describe_cost(cells)
    gained = [config.num_samples * config.forwards * each * 0.1 / 1.1 for config in cells]
    assert saved in (None, f"{sum(seconds - 70 for seconds in gained if seconds > 210) / 3600:.1f} h")
    assert (f"; runtime=fast compiles the network, and would save about {saved}" in line) == (saved is not None)
    assert ("runtime=fast" in line) == (saved is not None)


@tiny.needs_compiler
def test_what_a_low_precision_would_save_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the CPU has units for bf16: by the network in it, which is there without compiling."""
    monkeypatch.setattr("ddim_lab.device.runtime.multiplies_bf16", lambda: True)
    monkeypatch.setattr(
        "ddim_lab.jobs.cost.forward_time",
        lambda config, runtime: ForwardTime({"fp32": 1e-1, "bf16": 4e-2}[runtime.precision], 1),
    )
    monkeypatch.setattr(Generate, "measuring_forwards", lambda self, config: 0)
    cells = composed("table1_digits", "runtime.device=cpu", "model.block_out_channels=[64,64]")  # bf16's least width
    gained = [config.num_samples * config.forwards * (1e-1 - 4e-2 / 1.1) for config in cells]
    saved = sum(seconds - 70 for seconds in gained if seconds > 210) / 3600
    assert f"; runtime=fast compiles the network, and would save about {saved:.1f} h" in describe_cost(cells)


@pytest.mark.slow
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
    line = describe_cost(cells)
    assert line.startswith(f"20 cells, {1437 * 5 * 180:,} image-forwards for samples and ")
    assert "training, if this model is not stored, about " in line
    assert "num_samples=1000 samples in " in line
    assert "\n" not in line


def test_measuring_moves_no_random_number() -> None:
    (config, *_) = composed("table1_digits")
    before = torch.random.get_rng_state()
    forward_time(config, Runtime.resolve(config.runtime))
    assert torch.equal(torch.random.get_rng_state(), before)
