"""The search for timesteps: every list valid, the spacings as they are, nothing lost to them, a preset that works."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ddim_lab.config.folders import config_folder
from ddim_lab.data.images import NonFiniteError
from ddim_lab.metrics.extractor import Pixels
from ddim_lab.schedule import WHOLE_SPACINGS, spaced_timesteps
from ddim_lab.tasks import search_timesteps as task
from ddim_lab.tasks.search.gaps import log_gaps, timesteps_of_log_gaps, warped
from ddim_lab.tasks.search_timesteps import builtin_timesteps, search

pytest.importorskip("optuna")

TRIALS = 16
"""The built-in spacings, a few lists at random, and some by the optimiser's model of those."""

SEARCH = (
    *("task=search_timesteps", "model=gaussian", "metrics.features=pixels", "logger=csv"),
    *(f"task.trials={TRIALS}", "task.search_samples=40", "steps=4", "batch_size=40", "num_samples=60"),
)


def started(outputs: Path, *more: str) -> dict[str, Any]:
    """Run a tiny search; its result.json."""
    assert tiny.run(outputs, *SEARCH, *more, settings=()) == 0
    (row,) = tiny.results(tiny.sweeps(outputs)[-1])
    result: dict[str, Any] = json.loads((outputs / "cells" / row["cell"] / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "outputs"
    started(folder)
    return folder


def cell(outputs: Path) -> Path:
    return outputs / "cells" / tiny.results(tiny.sweeps(outputs)[0])[0]["cell"]


# lists and gaps


def timesteps_found(folder: Path) -> list[int]:
    """The list that a cell found."""
    return [int(t) for t in tiny.measured(json.loads((folder / "result.json").read_text()))["timesteps"].split()]


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], int]:
    total = draw(st.integers(1, 1200))
    chosen = draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=min(total, 60)))
    return sorted(chosen), total


@given(lists())
def test_gaps_stand_for_the_list_they_were_made_from(case: tuple[list[int], int]) -> None:
    timesteps, total = case
    assert timesteps_of_log_gaps(log_gaps(timesteps, total), total) == tuple(timesteps)
    assert timesteps_of_log_gaps(warped(log_gaps(timesteps, total), 0.0, 0.0, [0.0] * 4), total) == tuple(timesteps)


@given(st.integers(1, 1200), st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_any_gaps_stand_for_a_strictly_increasing_list(total: int, z: list[float]) -> None:
    steps = len(z) - 1
    if steps > total:
        with pytest.raises(ValueError, match="take 2 to"):
            timesteps_of_log_gaps(z, total)
        return
    valid(timesteps_of_log_gaps(z, total), steps, total)


@given(lists(), st.floats(-20, 20), st.floats(-20, 20), st.lists(st.floats(-20, 20), max_size=8))
def test_any_warp_of_a_list_is_a_list_of_its_length(
    case: tuple[list[int], int], bottom: float, top: float, coefficients: list[float]
) -> None:
    timesteps, total = case
    z = warped(log_gaps(timesteps, total), bottom, top, coefficients)
    valid(timesteps_of_log_gaps(z, total), len(timesteps), total)


def valid(timesteps: Sequence[int], steps: int, total: int) -> None:
    assert len(timesteps) == steps
    assert timesteps[0] >= 0
    assert timesteps[-1] < total
    assert (np.diff(timesteps) >= 1).all()


@pytest.mark.parametrize("z", [[0.0], [[0.0, 1.0]], [0.0, -1.0], [float("nan"), 0.0], [float("inf"), 0.0]])
def test_what_no_list_can_be_made_of_is_refused(z: Any) -> None:
    with pytest.raises(ValueError, match="gaps"):
        timesteps_of_log_gaps(z, 1000)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 4], [-1, 4], [4, 1000]])
def test_lists_that_have_no_gaps_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps must strictly increase"):
        log_gaps(timesteps, 1000)


def test_a_warp_moves_what_it_says() -> None:
    z = log_gaps(spaced_timesteps("uniform", 10).tolist(), 1000)
    moved = warped(z, 1.0, -0.5, [0.3])
    assert moved[0] - z[0] == 1.0
    assert moved[-1] - z[-1] == -0.5
    change = (moved - z)[1:-1]
    assert change[0] == pytest.approx(0.3 * np.cos(np.pi / 18))
    assert change.sum() == pytest.approx(0.0)
    assert (np.diff(change) < 0).all()


# the spacings at the same number of forwards


@pytest.mark.parametrize("nfe", [1, 2, 3, 10, 50, 100])
def test_every_spacing_is_there_with_as_many_forwards(nfe: int) -> None:
    found = builtin_timesteps(nfe, 1000)
    assert {name for names in found for name in names.split(", ")} == set(WHOLE_SPACINGS)
    for names, timesteps in found.items():
        valid(timesteps, nfe, 1000)
        for name in names.split(", "):
            # the list is the spacing's own, at the smallest S that gives so many
            steps = next(s for s in range(nfe, 1001) if len(spaced_timesteps(name, s)) == nfe)
            assert timesteps == tuple(spaced_timesteps(name, steps))


def test_spacings_that_agree_are_scored_once() -> None:
    assert list(builtin_timesteps(2, 2)) == [", ".join(WHOLE_SPACINGS)]


# the search


def far_from(target: Sequence[int]) -> Any:
    return lambda timesteps: float(np.abs(np.array(timesteps) - np.array(target)).sum())


def test_the_spacings_are_the_first_trials_as_they_are() -> None:
    starts = builtin_timesteps(10, 1000)
    tried = search(far_from(range(0, 500, 50)), starts, 1000, trials=8, seed=0)
    assert [(trial.proposed_by, trial.timesteps) for trial in tried[: len(starts)]] == list(starts.items())
    assert [trial.proposed_by for trial in tried[len(starts) :]] == ["search"] * (8 - len(starts))


@pytest.mark.slow
def test_it_finds_what_no_spacing_has() -> None:
    starts = builtin_timesteps(6, 1000)
    score = far_from([10, 60, 150, 300, 520, 800])
    tried = search(score, starts, 1000, trials=50, seed=0)
    at_start = min(trial.fd for trial in tried[: len(starts)])
    assert min(trial.fd for trial in tried) < 0.75 * at_start
    assert all(trial.fd == score(trial.timesteps) for trial in tried)
    for trial in tried:
        valid(trial.timesteps, 6, 1000)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_trials_and_another_others() -> None:
    def run(seed: int) -> Any:
        return search(far_from([10, 60, 300]), builtin_timesteps(3, 1000), 1000, trials=20, seed=seed)

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_timesteps_can_be_searched_too(steps: int) -> None:
    for trial in search(far_from([40] * steps), builtin_timesteps(steps, 50), 50, trials=18, seed=0):
        valid(trial.timesteps, steps, 50)


def test_lists_whose_samples_are_not_finite_do_not_stop_it() -> None:
    score = far_from([10, 60, 300])
    tried = search(
        lambda t: float("inf") if t[0] > 20 else score(t), builtin_timesteps(3, 1000), 1000, trials=20, seed=0
    )
    assert np.isfinite(min(trial.fd for trial in tried))


# the task


@pytest.mark.slow
def test_no_spacing_is_better_where_it_searched(outputs: Path) -> None:
    with (cell(outputs) / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == TRIALS
    starts = [float(row["fd"]) for row in trials if row["proposed_by"] != "search"]
    assert len(starts) == len(builtin_timesteps(4, 1000))
    best = min(trials, key=lambda row: float(row["fd"]))
    assert float(best["fd"]) <= min(starts)
    found = timesteps_found(cell(outputs))
    assert [int(t) for t in best["timesteps"].split()] == found


def test_every_spacing_stands_beside_it_at_the_final_seed(outputs: Path) -> None:
    result = json.loads((cell(outputs) / "result.json").read_text())
    scores, history = result["tables"]
    assert "seed 0 (not the search's)" in scores["title"]
    assert {row[0] for row in scores["rows"]} == {*builtin_timesteps(4, 1000), "found"}
    assert {row[1] for row in scores["rows"]} == {4}
    by_name = {row[0]: dict(zip(scores["columns"], row, strict=True)) for row in scores["rows"]}
    found = by_name.pop("found")
    assert found["above the found list"] is None
    for row in by_name.values():
        assert row["above the found list"] == pytest.approx(row["FD"] - found["FD"])
        assert row["± (paired)"] > 0
    lowest = [row[3] for row in history["rows"]]
    assert len(lowest) == TRIALS
    assert lowest == sorted(lowest, reverse=True)
    for picture in result["pictures"]:
        assert (cell(outputs) / picture["file"]).read_bytes().startswith(b"\x89PNG")


def test_the_preset_is_a_preset(outputs: Path) -> None:
    preset = yaml.safe_load((outputs / "presets" / "sampler" / "searched_digits_S4.yaml").read_text())
    built_in = yaml.safe_load((config_folder() / "sampler" / "ddim.yaml").read_text())
    assert set(preset) == set(built_in)
    found = timesteps_found(cell(outputs))
    assert preset == {**built_in, "name": "searched_digits_S4", "timesteps": found}


def test_a_cell_of_the_preset_measures_what_the_search_said(outputs: Path) -> None:
    said = tiny.measured(json.loads((cell(outputs) / "result.json").read_text()))
    arguments = ("--config-dir", str(outputs / "presets"), "model=gaussian", "metrics.features=pixels", "logger=csv")
    sizes = ("batch_size=40", "num_samples=60", "steps=4")
    assert tiny.run(outputs, *arguments, *sizes, "sampler=ddim,searched_digits_S4,ddpm", "-m", settings=()) == 0
    ddim, found, ddpm = tiny.results(tiny.sweeps(outputs)[-1])
    assert [row["sampler"] for row in (ddim, found, ddpm)] == ["ddim", "searched_digits_S4", "ddpm"]
    assert found["spacing"] == "custom"
    assert float(found["fd"]) == pytest.approx(said["found_fd"], rel=1e-6)
    assert float(found["fd_se"]) == pytest.approx(said["found_fd_se"], rel=1e-5)
    (scores, _) = json.loads((cell(outputs) / "result.json").read_text())["tables"]
    (uniform,) = [row for row in scores["rows"] if "uniform" in row[0]]
    assert float(ddim["fd"]) == pytest.approx(uniform[2], rel=1e-6)


def test_the_report_and_the_table_say_what_was_found(outputs: Path) -> None:
    sweep = tiny.sweeps(outputs)[0]
    row = tiny.results(sweep)[0]
    assert float(row["found_fd"]) > 0
    assert row["spacings"] == str(len(builtin_timesteps(4, 1000)))
    assert "## Fréchet distance of the timesteps that were found" in (sweep / "table.md").read_text()
    page = (sweep / "report.html").read_text()
    assert "Where the timesteps lie" in page
    assert "above the found list" in page


def test_the_command_is_in_the_headline(outputs: Path) -> None:
    headline = tiny.measured(json.loads((cell(outputs) / "result.json").read_text()))["headline"]
    assert headline.endswith(f"python -m ddim_lab --config-dir {outputs}/presets sampler=searched_digits_S4")


def test_the_same_command_does_nothing_twice_but_puts_the_preset_back(outputs: Path) -> None:
    preset = outputs / "presets" / "sampler" / "searched_digits_S4.yaml"
    before = preset.read_text()
    preset.unlink()
    started(outputs)
    assert json.loads((tiny.sweeps(outputs)[-1] / "jobs" / "0" / "pointer.json").read_text())["cached"]
    assert preset.read_text() == before


def test_another_final_seed_scores_the_same_search(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim_lab.tasks.search_timesteps.search", None)  # would fail if it searched
    first = tiny.measured(json.loads((cell(outputs) / "result.json").read_text()))
    again = tiny.measured(started(outputs, "seed=7"))
    assert again["timesteps"] == first["timesteps"]
    assert again["found_fd"] != first["found_fd"]


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_list(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = task._features, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 15:
            raise RuntimeError("power cut")
        return original(*arguments, **named)

    monkeypatch.setattr(task, "_features", interrupted)
    assert tiny.run(tmp_path, *SEARCH, settings=()) == 1
    (work,) = (tmp_path / "references").glob("*.partial")
    with (work / "scores.jsonl").open("a") as file:
        file.write('{"timesteps": [1, 2')  # cut short
    calls[:] = [None] * 15
    resumed = started(tmp_path)
    assert len(calls) - 15 <= TRIALS - 14 + 1 + len(builtin_timesteps(4, 1000)) + 1
    assert not list((tmp_path / "references").glob("*.partial"))
    assert [int(t) for t in tiny.measured(resumed)["timesteps"].split()] == timesteps_found(cell(outputs))


def test_a_fault_is_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are not finite are the list's fault, and remembered; any other error ends the search."""
    original, calls = task._features, []

    def faulty(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 2:
            raise NonFiniteError("the images hold NaN")
        if len(calls) == 4:
            raise ValueError("the model returned shape (1, 2, 3)")
        return original(*arguments, **named)

    monkeypatch.setattr(task, "_features", faulty)
    assert tiny.run(tmp_path, *SEARCH, settings=()) == 1
    assert "the model returned shape" in tiny.results(tiny.sweeps(tmp_path)[0])[0]["error"]
    (work,) = (tmp_path / "references").glob("*.partial")
    scores = [json.loads(line) for line in (work / "scores.jsonl").read_text().splitlines()]
    assert [tuple(score["timesteps"]) for score in scores] == calls[:3]
    assert [np.isinf(score["fd"]) for score in scores] == [False, True, False]


def test_a_score_after_a_torn_line_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    task.RememberedScores(path).add((1, 2), 0.5)
    with path.open("a") as file:
        file.write('{"timesteps": [1, 3')  # cut short
    task.RememberedScores(path).add((1, 4), 0.25)
    kept = task.RememberedScores(path)
    assert (kept.get((1, 2)), kept.get((1, 3)), kept.get((1, 4))) == (0.5, None, 0.25)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.slow
def test_the_feature_network_is_loaded_once_for_all_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Counted(Pixels):
        def __init__(self) -> None:
            super().__init__()
            loaded.append(self)

    monkeypatch.setattr("ddim_lab.metrics.extractor.Pixels", Counted)
    started(tmp_path, "task.trials=8")
    assert len(loaded) == 2  # for the reference, and for the samples


# what is refused before any work

WRONG = {
    "task.search_seed=0": r"task.search_seed=0 is the seed of the final score, too: make them differ",
    "task.trials=5": r"task.trials=5: must be at least 6, the built-in spacings are the first",
    "task.search_samples=1": r"task.search_samples=1: must be at least 2",
    "task.preset=ddim": r"task.preset=ddim is a built-in preset: choose another name",
    "task.preset=../x": r"task.preset=../x: .*",
    "sampler.timesteps=[1,2]": r"task=search_timesteps looks for the timesteps: leave sampler.timesteps=null",
    "steps=1000": r"task=search_timesteps has nothing to choose at steps=1000: set steps below the schedule's 1000",
    "num_samples=2": r"task=search_timesteps needs 3 samples for a standard error, got 2",
    "save_samples=true": r"save_samples=true is not for task=search_timesteps",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_settings_are_one_line(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(tmp_path / "outputs", *SEARCH, change, settings=()) == 2
    assert re.fullmatch(rf"ddim_lab: {WRONG[change]}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "outputs").exists()


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tiny.run(tmp_path / "outputs", *SEARCH, settings=()) == 2
    assert capsys.readouterr().err == ("ddim_lab: task=search_timesteps needs optuna: pip install 'ddim-lab[search]'\n")
    assert not (tmp_path / "outputs").exists()
