"""Every file in experiments/: it composes, every cell is valid, it starts at a tiny size and ends in a report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hydra._internal.utils import get_args_parser

from ddim_lab.__main__ import BASIC_SWEEPER, _compose, _composer, _plan

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
LESSONS = {
    "eta_effect",
    "step_counts",
    "ddpm_vs_ddim",
    "ddpm_cannot_skip",
    "spacings",
    "reconstruction",
    "interpolation",
    "consistency",
}


def plan(*arguments: str) -> dict[str, Any]:
    """The plan of a command line: every cell composed and checked, nothing run."""
    with _composer(asked := get_args_parser().parse_args(list(arguments))):
        return _plan(asked, arguments)[1]


def starts(outputs: Path, name: str, *more: str) -> Path:
    """Run an experiment at a tiny size, with an exact model of the digits; its sweep's folder."""
    arguments = [f"+experiments={name}", "data=digits", "model=gaussian", "training=digits", "logger=csv"]
    with _composer(get_args_parser().parse_args([])):
        composed = _compose(arguments, hydra_too=True)
    if composed.hydra.sweeper.get("_target_") != BASIC_SWEEPER:
        pytest.skip("its sweeper chooses the cells while it runs: it has a test of its own")
    arguments += [*tiny.SMALL, "metrics.features=pixels", "metrics.noise_seeds=3", "metrics.speed_repeats=1"]
    if composed.task.name == "consistency":
        arguments.append("task.reference_steps=8")
    if composed.task.name == "search_timesteps":
        pytest.importorskip("optuna")
        arguments += ["task.trials=8", "task.search_samples=40"]
    if not any(text.startswith("steps=") for text in more):
        arguments.append("steps=3,8")
    assert tiny.run(outputs, *arguments, *more, settings=()) == 0
    return tiny.sweeps(outputs)[-1]


def test_the_lessons_are_there() -> None:
    assert set(NAMES) >= LESSONS


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert f"python -m ddim_lab +experiments={name}" in text
    content = yaml.safe_load(text)
    assert content["study"]["title"]
    assert content["study"]["notes"]
    assert content["hydra"]["mode"] == "MULTIRUN"


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_valid_as_it_is_written(name: str) -> None:
    assert len(plan(f"+experiments={name}")["cells"]) >= 1


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_and_ends_in_a_table_and_a_picture(name: str, tmp_path: Path) -> None:
    sweep = starts(tmp_path, name)
    assert {row["status"] for row in tiny.results(sweep)} == {"done"}
    assert "|---|" in (sweep / "table.md").read_text(encoding="utf-8")
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert "the picture is missing" not in page
    assert page.count('src="data:image/png') >= 2


# what each lesson shows


def column(sweep: Path, name: str) -> list[float]:
    return [float(row[name]) for row in tiny.results(sweep)]


def test_eta_effect(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "eta_effect", "steps=10")
    variances = column(sweep, "noise_variance")
    assert column(sweep, "eta") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert variances[0] == 0.0
    assert variances[:4] == sorted(set(variances[:4]))
    # nothing of x_T is left by then, and few steps of the posterior variance leave too little spread: of the exact
    # model at S = 10 the recursion of the variance gives 0.17 at eta 0.75 and 0.15 at eta 1
    assert variances[4] == pytest.approx(variances[3], rel=0.25)
    assert column(sweep, "noise_mse") == [variance / 2 for variance in variances]
    assert re.search(r"## Variance across noise seeds.*\| η 0 \| 0 \|", (sweep / "table.md").read_text(), re.DOTALL)
    assert "noise_variance_against_eta" in (sweep / "report.html").read_text()


def test_step_counts(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "step_counts", "steps=50,20,5", "task.reference_steps=50")
    assert (mses := column(sweep, "consistency_mse"))[0] == 0.0
    assert mses == sorted(set(mses))
    assert "## MSE to the reference steps (digits)" in (sweep / "table.md").read_text()


def test_ddpm_vs_ddim(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "ddpm_vs_ddim", "steps=10")
    ddim, ddpm = column(sweep, "noise_mse")
    assert ddim == 0.0
    assert ddpm > 0.001
    assert "times as fast as the slowest" in (sweep / "report.html").read_text()


def test_ddpm_cannot_skip(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "ddpm_cannot_skip", "steps=10")
    wrong, right = column(sweep, "mse_to_sampler")
    assert right < 1e-9 < 1e-2 < wrong
    table = (sweep / "table.md").read_text()
    assert "task.alphas=per\\_step" in table
    assert "task.alphas=cumulative" in table


def test_spacings(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "spacings", "steps=100")
    forwards = dict(zip((row["spacing"] for row in tiny.results(sweep)), column(sweep, "nfe"), strict=True))
    assert forwards["uniform"] == 100
    assert forwards["quadratic"] == 96
    assert forwards["log"] < 100
    assert "fd_against_forwards" in (sweep / "report.html").read_text()


def test_reconstruction(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "reconstruction", "steps=10,20,50")
    mses = column(sweep, "reconstruction_mse")
    assert mses == sorted(set(mses), reverse=True)
    table = (sweep / "table.md").read_text()
    assert "## Reconstruction MSE (digits)" in table
    assert re.search(r"\| η 0 \| \S+ ± \S+ / 0.014 \| \S+ ± \S+ / 0.0065 \| \S+ ± \S+ / 0.0023 \|", table)
    assert "another metric, so no difference is given" in table


def test_interpolation(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "interpolation", "steps=5")
    page = (sweep / "report.html").read_text()
    assert "Lines between pairs of x_T (slerp)" in page
    assert "Grid between four x_T" in page


def test_consistency(tmp_path: Path) -> None:
    sweep = starts(tmp_path, "consistency", "steps=5,50", "task.reference_steps=50")
    ddim, itself, ddpm, ddpm_itself = column(sweep, "consistency_mse")
    assert itself == ddpm_itself == 0.0
    assert ddim < ddpm
