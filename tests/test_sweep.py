"""The main job end to end, tiny: one training for nine cells, nothing twice, holes marked, W&B equal to the files."""

from __future__ import annotations

import json
import platform
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from wandb_offline import read_run

from ddim_lab.report import read_sweep, rows
from ddim_lab.sampler import Sampler
from ddim_lab.store import Store

NINE = ("sampler.eta=0,0.5,1", "steps=3,5,9", "-m")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, digits: Callable[[Path], Path]) -> Path:
    """Outputs of the nine-cell sweep, run once."""
    folder = digits(tmp_path_factory.mktemp("nine") / "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert tiny.run(folder, *NINE) == 0
    return folder


@pytest.fixture(scope="module")
def table(outputs: Path) -> list[dict[str, str]]:
    return tiny.results(tiny.sweeps(outputs)[0])


@pytest.mark.slow
def test_nine_cells_and_one_training(outputs: Path, table: list[dict[str, str]]) -> None:
    assert len(table) == 9
    assert {row["status"] for row in table} == {"done"}
    assert len({row["cell"] for row in table}) == 9
    trained = [
        path for path in (outputs / "models").iterdir() if (path / "diffusion_pytorch_model.safetensors").is_file()
    ]
    assert len(trained) == 1
    trainings = [run for run in _wandb_runs(tiny.sweeps(outputs)[0]) if run.job_type == "train"]
    assert len(trainings) == 1


def test_every_cell_has_exactly_the_samples_asked_for(table: list[dict[str, str]]) -> None:
    assert {row["num_samples"] for row in table} == {"44"}
    assert [int(row["nfe"]) for row in table] == [3, 5, 9] * 3


def test_determinism_is_as_theory_says(table: list[dict[str, str]]) -> None:
    for row in table:
        assert row["repeat_identical"] == "True"
        assert float(row["repeat_max_abs_diff"]) == 0.0
        variance = float(row["noise_variance"])
        assert (variance == 0.0) == (float(row["eta"]) == 0.0)
    for steps in ("3", "5", "9"):
        by_eta = [float(row["noise_variance"]) for row in table if row["steps"] == steps]
        assert by_eta == sorted(by_eta)


def test_the_two_batch_sizes_are_two(outputs: Path, table: list[dict[str, str]]) -> None:
    for row in table:
        result = json.loads((outputs / "cells" / row["cell"] / "result.json").read_text())
        found = next(value for value in result["values"] if value["name"] == "batch_max_abs_diff")
        assert "The two batch sizes: 16 and 8." in found["notes"]
        assert 0 <= found["value"] < 1e-4


@pytest.mark.slow
def test_the_same_sweep_again_computes_nothing(
    outputs: Path, table: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass in a sweep that was there")

    monkeypatch.setattr(Sampler, "predict_eps", refuse)
    monkeypatch.setattr("ddim_lab.models.obtain.Model.load", refuse, raising=False)
    before = _kept(outputs)
    assert tiny.run(outputs, *NINE) == 0
    assert _kept(outputs) == before
    again = tiny.results(tiny.sweeps(outputs)[-1])
    assert {row["cached"] for row in again} == {"True"}
    of_this_run = {"cached", "job_seconds"}
    assert [{k: v for k, v in row.items() if k not in of_this_run} for row in again] == [
        {k: v for k, v in row.items() if k not in of_this_run} for row in table
    ]


@pytest.mark.slow
def test_a_failing_cell_leaves_a_hole_and_the_others(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Sampler.sample

    def fail_at_four_steps(sampler: Sampler, *arguments: Any, **named: Any) -> Any:
        if sampler.steps == 4:
            raise RuntimeError("the device fell off the bus")
        return original(sampler, *arguments, **named)

    monkeypatch.setattr(Sampler, "sample", fail_at_four_steps)
    assert tiny.run(outputs, "steps=3,4,6", "-m") == 1
    sweep = tiny.sweeps(outputs)[-1]
    found = tiny.results(sweep)
    assert [row["status"] for row in found] == ["done", "failed", "done"]
    assert found[1]["fd"] == ""
    assert "the device fell off the bus" in found[1]["error"]
    assert "the device fell off the bus" in (sweep / "report.html").read_text()
    assert "Traceback" not in capsys.readouterr().err
    states = {run.config["steps"]: run.exit_code for run in _wandb_runs(sweep) if run.job_type == "cell"}
    assert states == {3: 0, 4: 1, 6: 0}


def test_the_wandb_files_hold_what_the_report_holds(outputs: Path, table: list[dict[str, str]]) -> None:
    sweep = tiny.sweeps(outputs)[0]
    runs = _wandb_runs(sweep)
    assert sorted(run.job_type for run in runs) == ["cell"] * 9 + ["report", "train"]
    assert {run.group for run in runs} == {sweep.name}
    assert {run.exit_code for run in runs} == {0}
    cells = {run.summary["cell"]: run for run in runs if run.job_type == "cell"}
    for row in table:
        run = cells[row["cell"]]
        for column in ("fd", "fd_se", "images_per_second", "seconds_per_image", "noise_variance"):
            assert run.summary[column] == pytest.approx(float(row[column]), rel=1e-12), column
        assert run.summary["sha256"] == row["sha256"]
        assert run.config["steps"] == int(row["steps"])
        assert run.config["sampler"]["eta"] == float(row["eta"])
    training = next(run for run in runs if run.job_type == "train")
    assert training.summary["loss"] > 0


def test_artifacts_join_the_training_to_its_cells(outputs: Path) -> None:
    """What the training made is, digest for digest, what every cell used; so are the statistics it compared with."""
    runs = _wandb_runs(tiny.sweeps(outputs)[0])
    (made,) = next(run.artifacts for run in runs if run.job_type == "train")
    assert (made.name, made.kind, made.used) == ("digits-model", "model", False)
    assert made.files["diffusion_pytorch_model.safetensors"].parent == outputs / "models" / made.metadata["key"]
    assert all(path.is_file() for path in made.files.values())
    cells = [run for run in runs if run.job_type == "cell"]
    assert len(cells) == 9
    for run in cells:
        used = {artifact.kind: artifact for artifact in run.artifacts if artifact.kind != "run_table"}
        assert all(artifact.used for artifact in used.values())
        assert used["model"].digest == made.digest
        assert used["model"].name == made.name
        assert (outputs / "references" / used["reference"].metadata["key"]).is_dir()
        assert used["feature-network"].name == "digits-feature-network"
    assert len({tuple(sorted(a.digest for a in run.artifacts if a.kind == "reference")) for run in cells}) == 1


def test_the_summary_run_draws_fd_over_steps_by_eta(outputs: Path, table: list[dict[str, str]]) -> None:
    sweep = tiny.sweeps(outputs)[0]
    report = next(run for run in _wandb_runs(sweep) if run.job_type == "report")
    assert report.axes == {"*": "steps"}
    for row in table:
        drawn = {r["steps"]: r[key] for r in report.history if (key := f"fd/η {float(row['eta']):g}") in r}
        assert drawn[int(row["steps"])] == float(row["fd"])
    (paper,) = report.values("FD (digits classifier).path")
    folder = next(f for f in sorted((sweep / "wandb").glob("offline-run-*")) if read_run(f).job_type == "report")
    logged = json.loads((folder / "files" / paper).read_text())
    assert logged["columns"] == ["", "S = 3", "S = 5", "S = 9"]
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert all("| " + " | ".join(line) + " |" in markdown for line in logged["data"])


@pytest.mark.slow
def test_an_unreachable_wandb_fails_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key, and nobody at the server's address: one warning a sweep, results and offline runs are there."""
    import wandb

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    wandb.teardown()  # else what an earlier test set up stays
    arguments = ("model=gaussian", "metrics.features=pixels", "steps=3,5", "-m")
    assert tiny.run(tmp_path, *arguments, settings=tiny.SMALL) == 0
    sweep = tiny.sweeps(tmp_path)[0]
    out, err = capsys.readouterr()
    assert [row["status"] for row in tiny.results(sweep)] == ["done", "done"]
    assert err.count("W&B did not take the run") == 1
    assert sorted(run.job_type for run in _wandb_runs(sweep)) == ["cell", "cell", "report"]
    assert f"wandb sync {sweep}/wandb/offline-run-*" in out
    wandb.teardown()


def test_logger_csv_writes_no_wandb(tmp_path: Path) -> None:
    line = ("logger=csv", "model=empirical", "metrics.features=pixels", "steps=3")
    assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == 0
    assert not (tiny.sweeps(tmp_path)[0] / "wandb").exists()


@pytest.mark.slow
def test_images_do_not_depend_on_the_process(outputs: Path, table: list[dict[str, str]], tmp_path: Path) -> None:
    """A new process, the stored model: bitwise the same images at eta = 0."""
    import os
    import subprocess
    import sys

    fresh = tmp_path / "outputs"
    fresh.mkdir()
    (fresh / "models").symlink_to(outputs / "models")
    command = [sys.executable, "-m", "ddim_lab", *tiny.TINY, f"outputs_dir={fresh}", "steps=5", "logger=csv"]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "WANDB_MODE": "offline"})
    there = next(row for row in table if row["steps"] == "5" and float(row["eta"]) == 0.0)
    assert tiny.results(tiny.sweeps(fresh)[0])[0]["sha256"] == there["sha256"]


def test_report_is_rebuilt_from_the_files(outputs: Path) -> None:
    """Before any cell keeps its samples, which a report names from then on."""
    from ddim_lab.report import build

    sweep = tiny.sweeps(outputs)[0]
    before = {name: (sweep / name).read_bytes() for name in ("results.csv", "table.md", "table.tex", "report.html")}
    for name in before:
        (sweep / name).unlink()
    build(sweep)
    assert {name: (sweep / name).read_bytes() for name in before} == before
    assert len(rows(read_sweep(sweep))) == 9


def test_saved_samples_are_the_cells_images(outputs: Path, table: list[dict[str, str]]) -> None:
    import hashlib

    assert tiny.run(outputs, "steps=5", "save_samples=true", "logger=csv") == 0
    row = tiny.results(tiny.sweeps(outputs)[-1])[0]
    with np.load(outputs / "cells" / row["cell"] / "samples.npz", allow_pickle=False) as file:
        images = file["arr_0"]
    assert images.shape == (44, 8, 8, 1)
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest() == row["sha256"]
    assert row["sha256"] in {other["sha256"] for other in table}


@pytest.mark.slow
def test_a_cell_that_can_not_be_reproduced_is_refused_not_replaced(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddim_lab.tasks import samples_file as task

    original, busy = task.sample_uint8, []

    def others(*arguments: Any) -> torch.Tensor:
        busy.append(Store(outputs).busy(f"{platform.node()}-cpu"))
        return original(*arguments) ^ 1

    assert tiny.run(outputs, "steps=7", "logger=csv") == 0
    cell = tiny.results(tiny.sweeps(outputs)[-1])[0]["cell"]
    before = (outputs / "cells" / cell / "result.json").read_bytes()
    monkeypatch.setattr(task, "sample_uint8", others)
    shutil.rmtree(outputs / "samples")  # else its images are taken from there
    assert tiny.run(outputs, "steps=7", "save_samples=true", "logger=csv") == 1
    assert "sampling again gave other images" in tiny.results(tiny.sweeps(outputs)[-1])[0]["error"]
    assert (outputs / "cells" / cell / "result.json").read_bytes() == before
    assert busy == [True] * 3  # who is timed meanwhile knows


def test_two_names_of_one_sampler_are_one_cell(outputs: Path) -> None:
    assert tiny.run(outputs, "sampler=ddpm,ddim_eta1", "steps=3", "logger=csv", "-m") == 0
    first, second = tiny.results(tiny.sweeps(outputs)[-1])
    assert first["cell"] == second["cell"]
    assert (first["sampler"], second["sampler"]) == ("ddpm", "ddim_eta1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "num_samples=45",
        "batch_size=17",
        "sampler.clip=x0",
        "sampler.spacing=trailing",
        "metrics.features=pixels",
    ],
)
def test_what_changes_a_number_changes_the_cell(outputs: Path, table: list[dict[str, str]], change: str) -> None:
    assert tiny.run(outputs, "steps=5", "logger=csv", change) == 0
    assert tiny.results(tiny.sweeps(outputs)[-1])[0]["cell"] not in {row["cell"] for row in table}


def test_plan_and_pointers_are_relocatable(outputs: Path) -> None:
    plan = json.loads((tiny.sweeps(outputs)[0] / "plan.json").read_text())
    assert plan["outputs_dir"] == "../.."


QUICK = ("model=gaussian", "metrics.features=pixels", "logger=csv", "save_samples=true", "steps=2,3", "-m")
"""Two cells with nothing to train."""


@pytest.mark.parametrize("linked", ["sweeps", "outputs", "named", "named, not there yet"])
def test_a_sweeps_folder_may_be_reached_through_a_link(linked: str, tmp_path: Path) -> None:
    """To a place at another depth, where a path that is put together of names alone leads astray."""
    outputs, far = tmp_path / "outputs", tmp_path / "a" / "disk" / "of" / "its" / "own"
    far.mkdir(parents=True)
    more: list[str] = []
    if linked == "sweeps":
        outputs.mkdir()
        (outputs / "sweeps").symlink_to(far)
    elif linked == "outputs":
        outputs.symlink_to(far)
    else:
        (tmp_path / "link").symlink_to(far / "mine" if linked.endswith("yet") else far)
        more = [f"hydra.sweep.dir={tmp_path / 'link'}"]
    assert tiny.run(outputs, *QUICK, *more, settings=tiny.SMALL) == 0
    sweep = tmp_path / "link" if more else tiny.sweeps(outputs)[0]
    assert [row["status"] for row in tiny.results(sweep)] == ["done", "done"]
    links = re.findall(r"`(.*/samples\.npz)`", (sweep / "table.md").read_text(encoding="utf-8"))
    assert len(links) == 2
    assert all((sweep.resolve() / link).is_file() for link in links)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"outputs", "a", *({"link"} if more else ())}
    assert {path.name for path in (tmp_path / "a" / "disk" / "of" / "its").iterdir()} == {"own"}
    for folder in (sweep, sweep.resolve()):  # by either name
        assert len(read_sweep(folder).cells) == 2
        assert {cell.status for cell in read_sweep(folder).cells} == {"done"}


@pytest.mark.parametrize("name", ["back\\slash", "${HOME}", "\\${x} and \\", "it's, a=[b] {c}", '%j *?\n"é'], ids=repr)
def test_a_working_directory_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / name
    here.mkdir()
    monkeypatch.chdir(here)
    assert tiny.run(Path("outputs"), *QUICK, settings=tiny.SMALL) == 0
    assert [row["status"] for row in tiny.results(tiny.sweeps(here / "outputs")[0])] == ["done", "done"]
    assert tiny.run(Path("outputs"), *QUICK[:-2], "steps=2", settings=tiny.SMALL) == 0  # a single job has its own way
    assert tiny.results(tiny.sweeps(here / "outputs")[1])[0]["cached"] == "True"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in here.iterdir()] == ["outputs"]


def _wandb_runs(sweep: Path) -> list[Any]:
    return [read_run(folder) for folder in sorted((sweep / "wandb").glob("offline-run-*"))]


def _kept(outputs: Path) -> dict[Path, int]:
    """Modification times of all that the store keeps."""
    kinds = ("models", "references", "cells")
    return {path: path.stat().st_mtime_ns for kind in kinds for path in (outputs / kind).rglob("*") if path.is_file()}
