"""Task `order`: what it finds where a sampler does what it says, and that it finds each way not to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from official import relative_difference
from torch import Tensor

from ddim_lab.analytic import GaussianEps, GaussianMixtureEps
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.exactness import (
    TARGET,
    ddpm_moments,
    errors_on_a_mixture,
    mixture,
    moments_of,
    ode_solution,
    on_one_point,
    starts,
)
from ddim_lab.multistep import DpmSolverPP
from ddim_lab.report.charts import sweep_charts
from ddim_lab.report.read import read_sweep
from ddim_lab.sampler import Draw, Formula, Predict, Sampler, State
from ddim_lab.sampler import step as ddim_step
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.singlestep import Heun
from ddim_lab.tasks.base import Outcome
from ddim_lab.tasks.order import Order
from ddim_lab.transitions import Transition

SCHEDULE = NoiseSchedule.linear()


# -- the ground truth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [999, 500, 20, 0])
def test_the_ode_of_one_gaussian_is_its_closed_form(t: int) -> None:
    mean = torch.tensor([[[0.3, -0.5]]], dtype=torch.float64)
    one = GaussianMixtureEps(SCHEDULE, mean[None], torch.tensor([0.2], dtype=torch.float64))
    x = starts(5)
    found = ode_solution(one, x, SCHEDULE.alpha_bar(t), 1.0)
    assert relative_difference(found, GaussianEps(SCHEDULE, mean, 0.2).ode_map(x, t)) < 1e-9


def test_two_ways_of_the_ode_are_one() -> None:
    model, x = mixture(SCHEDULE), starts(4)
    top, middle = SCHEDULE.alpha_bar(999), SCHEDULE.alpha_bar(300)
    at_once = ode_solution(model, x, top, 1.0)
    assert relative_difference(ode_solution(model, ode_solution(model, x, top, middle), middle, 1.0), at_once) < 1e-9
    assert torch.equal(ode_solution(model, x, top, top), x)


def test_errors_are_of_the_part_they_say() -> None:
    """At the last level before the image, of the last step from there, and of both together."""
    coarse, fine = (errors_on_a_mixture(Sampler(SCHEDULE, steps), starts(8)) for steps in (50, 250))
    assert fine.before < coarse.before / 4
    assert fine.last_step == pytest.approx(coarse.last_step, rel=0.1)  # from t = 0 in both
    assert fine.image < fine.before + 2 * fine.last_step
    assert fine.nfe == 250


@pytest.mark.parametrize(
    ("eta", "variance"), [(0.5, "posterior"), (1.0, "posterior"), (1.0, "large"), (0.0, "posterior")]
)
def test_the_moments_of_the_family_are_exact(eta: float, variance: Any) -> None:
    sampler = Sampler(SCHEDULE, 10, eta=eta, variance=variance)
    found = moments_of(sampler, 40_000)
    deviations = found.deviations(ddpm_moments(SCHEDULE, sampler.transitions), 40_000)
    assert len(deviations) == 5
    assert max(map(abs, deviations)) < 4.0
    assert max(map(abs, found.deviations(TARGET, 40_000))) > 20.0, "ten steps are not the target"


def test_no_noise_is_left_where_there_is_one_image() -> None:
    for sampler in (Sampler(SCHEDULE, 10, eta=1.0), Sampler(SCHEDULE, 10, formula=DpmSolverPP(3))):
        point = on_one_point(sampler, starts(4))
        assert point.noise_left < 1e-9
        assert point.off_level is not None
        assert sampler.variance != "posterior" or point.off_level < 1e-9


# -- what it finds -------------------------------------------------------------------------------------------------


def measured(formula: Formula | None, *overrides: str) -> Outcome:
    """The task's outcome for a formula on the DDIM presets' timesteps."""
    config = tiny.configure("task=order", "steps=10", "task.steps=[10,50,100,200]", "task.starts=4", *overrides)
    given = SimpleNamespace(
        build_sampler=lambda steps=None: config.build_sampler(steps=steps, formula=formula),
        steps_for=lambda nfe: nfe,
    )
    job: Any = SimpleNamespace(config=given, sampler=given.build_sampler())
    assert isinstance(config.task, Order)
    return config.task.measure(job, Path(), Path())


def verdicts(outcome: Outcome) -> dict[str, Any]:
    return {value.name: value.value for value in outcome.values if value.table == "On exact models"}


class Changed(Formula):
    """DDIM with something wrong; a subclass says what."""

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps)

    def noise_std(self, transition: Transition) -> float:
        return 0.0

    def recipe(self) -> dict[str, Any]:
        return {"name": type(self).__name__}


class Boasts(Changed):
    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return 2


class CountsWrong(Changed):
    def nfe(self, transitions: Sequence[Transition]) -> int:
        return len(transitions) - 1


class SeesItsNeighbours(Changed):
    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return super().step(transition, x_t, eps, z) + 1e-6 * x_t.mean()


class Forgets(Changed):
    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return super().step(transition, x_t, eps, z) + 1e-13 * torch.rand_like(x_t)


class Breaks(Changed):
    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        for state in super().walk(predict, x_T, transitions, draw):
            yield State(state.t, state.x / (0.0 if len(transitions) == 7 else 1.0))


class GoesElsewhere(Changed):
    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        return super().walk(lambda x, t: predict(x, max(t - 1, 0)), x_T, transitions, draw)


class LeavesNoise(Changed):
    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return super().step(transition, x_t, eps, z) + 1e-3 * eps


class StepsTooFar(Changed):
    """A timestep further than it says, but for the last step, which ends where all end."""

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        if transition.t_prev < 1:
            return super().step(transition, x_t, eps, z)
        further = replace(transition, alpha_bar_prev=SCHEDULE.alpha_bar(transition.t_prev - 1))
        return super().step(further, x_t, eps, z)


@pytest.mark.parametrize(
    ("wrong", "fails", "with_what"),
    [
        (CountsWrong(), "nfe_done", "fails: S = 1: 1, said 0, and at "),
        (SeesItsNeighbours(), "batch_alike", "fails: "),
        (Forgets(), "repeats", "fails: another image"),
        (Breaks(), "finite", "fails: S = 7: infinite or NaN"),
        (GoesElsewhere(), "timesteps_visited", "fails: "),
        (LeavesNoise(), "noise_left", "fails: S = 1: "),
        (StepsTooFar(), "levels", "fails: S = 3: 2.1e-03 at t = 333"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Formula) else "",
)
def test_what_is_wrong_is_found_and_nothing_else(
    wrong: Formula, fails: str, with_what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim_lab.tasks.order.FINITE_TO", 12)
    found = verdicts(measured(wrong))
    assert found[fails].startswith(with_what)
    others = {name: verdict for name, verdict in found.items() if name not in (fails, "order_reached", "moments")}
    if isinstance(wrong, LeavesNoise | SeesItsNeighbours):  # in states, too
        others.pop("levels")
    if not isinstance(wrong, GoesElsewhere):  # eps of another level is wrong in itself
        assert set(others.values()) == {"holds"}


def test_what_is_right_is_found_right() -> None:
    outcome = measured(None)
    assert verdicts(outcome) == {
        "order_reached": "not applicable",  # whole timesteps are too coarse near the image
        "moments": "not applicable",
        **dict.fromkeys(
            ("noise_left", "levels", "timesteps_visited", "nfe_done", "batch_alike", "repeats", "finite"), "holds"
        ),
    }
    values = {value.name: value.value for value in outcome.values}
    assert values["order"] == pytest.approx(1.0, abs=0.05)
    assert values["checks_failed"] == 0
    assert [row[:2] for row in outcome.tables[0].rows] == [(10, 10), (50, 50), (100, 100), (200, 200)]


def fine(formula: Formula | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The verdicts where every grid is taken for fine enough."""
    monkeypatch.setattr("ddim_lab.tasks.order.FINE", math.inf)
    monkeypatch.setattr("ddim_lab.tasks.order.FINITE_TO", 2)
    return verdicts(measured(formula))


@pytest.mark.slow
def test_an_order_that_is_not_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fine(None, monkeypatch)["order_reached"] == "holds"
    assert fine(Heun(), monkeypatch)["order_reached"] == "holds"
    assert fine(Boasts(), monkeypatch)["order_reached"].startswith("fails: 0.9")
    assert fine(Boasts(), monkeypatch)["order_reached"].endswith(", said 2")


class Diverges(Changed):
    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return super().step(transition, x_t, eps, z) * float("nan")


def test_what_diverges_is_a_finding_and_no_failure() -> None:
    outcome = measured(Diverges())
    assert verdicts(outcome)["finite"] == "fails: S = 1: infinite or NaN, and at 49 more of 50 up to S = 50"
    assert "order" not in {value.name for value in outcome.values}


class TooNoisy(Formula):
    """DDPM with a tenth more noise than it says."""

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps, None if z is None else 1.1 * z)

    def recipe(self) -> dict[str, Any]:
        return {"name": "too noisy"}


@pytest.mark.slow
@pytest.mark.parametrize("formula", [None, TooNoisy()])
def test_moments_of_samplers_with_noise(formula: Formula | None) -> None:
    outcome = measured(formula, "sampler.eta=1")
    found = verdicts(outcome)
    assert "order" not in {value.name for value in outcome.values}
    assert outcome.tables == []
    assert found["moments"].startswith("holds" if formula is None else "fails: ")
    assert {found["noise_left"], found["repeats"], found["batch_alike"]} == {"holds"}


# -- as a cell -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_it_needs_no_model_and_shows_its_tables(tmp_path: Path) -> None:
    line = ("task=order", "sampler=ddim,heun,ddim_eta1", "logger=csv", "task.steps=[10,50,100,200]", "-m")
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    (sweep,) = tiny.sweeps(tmp_path / "outputs")
    assert not (tmp_path / "outputs" / "models").exists()
    rows = tiny.results(sweep)
    assert [row["model"] for row in rows] == ["exact"] * 3
    assert [row["order_claimed"] for row in rows] == ["1", "2", ""]
    assert float(rows[1]["order"]) == pytest.approx(2.0, abs=0.2)
    assert {row["checks_failed"] for row in rows} == {"0"}
    html = (sweep / "report.html").read_text()
    assert "Does it do what it says?" in html
    assert "Errors over NFE" in html
    (chart,) = (chart for chart in sweep_charts(read_sweep(sweep)) if chart.table == "Errors over NFE")
    lines: dict[str, list[int]] = {}
    for point in chart.spec["datasets"]["points"]:
        lines.setdefault(point["series"], []).append(point["x"])
    assert list(lines.values()) == [[10, 50, 100, 200], [19, 99, 199, 399]]
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    assert {row["cached"] for row in tiny.results(tiny.sweeps(tmp_path / "outputs")[1])} == {"True"}


@pytest.mark.slow
def test_cells_of_one_step_are_told_apart_by_their_other_walks(tmp_path: Path) -> None:
    """At one step there is no noise at any eta; what the task walks is other."""
    line = ("task=order", "steps=1", "task.steps=[10,50,100,200]", "sampler=ddim,ddim_eta1", "logger=csv", "-m")
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    still, noisy = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert still["cell"] != noisy["cell"]
    assert (still["moments"], noisy["moments"]) == ("not applicable", "holds")
    assert (still["order"] != "", noisy["order"]) == (True, "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("steps=250", "sampler.eta=1.03"), r"task.steps=50: eta=1.03 is too large"),
        (("sampler.timesteps=[5,3]",), r"sampler.timesteps lists one: drop it"),
        (("task.steps=[10,60,70]",), r"task.steps needs 3 different numbers from task.fitted_from=50 on"),
        (("task.steps=[50,60,2000]",), r"task.steps=2000 exceeds the schedule's 1000 timesteps"),
    ],
)
def test_what_it_can_not_do_is_one_line(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.configure("task=order", *overrides)
