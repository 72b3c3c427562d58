"""What the tasks measure, against theory: orders of convergence, exact zeros, and what must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ddim_lab.analytic import GaussianEps
from ddim_lab.errors import ConfigError
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.tasks import interpolate, trajectory
from ddim_lab.tasks.cannot_skip import DDPMFormula
from ddim_lab.tasks.interpolate import path_lengths
from ddim_lab.tasks.pictures import sheet
from ddim_lab.tasks.trajectory import shown_moments

EXACT = ("model=gaussian", "logger=csv", "metrics.features=pixels")
ONE_BATCH = ("batch_size=44", "-m")
"""A sweep of long walks: an exact model's cost goes by the forward, not by the image."""


def cells(outputs: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run, and read the cells' result.json in the order of the sweep."""
    assert tiny.run(outputs, *EXACT, *arguments, settings=tiny.SMALL) == 0
    keys = [row["cell"] for row in tiny.results(tiny.sweeps(outputs)[-1])]
    return [json.loads((outputs / "cells" / key / "result.json").read_text()) for key in keys]


def measured(outputs: Path, *arguments: str) -> list[dict[str, Any]]:
    return [tiny.measured(cell) for cell in cells(outputs, *arguments)]


def slope(x: list[float], y: list[float]) -> float:
    """Of log y on log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# reconstruct


@pytest.mark.parametrize("at", ["source", "target"])
def test_reconstruction_error_is_of_order_one_in_the_step(tmp_path: Path, at: str) -> None:
    """The map's error falls as 1/S, so its square as 1/S^2, when the model is exact."""
    steps = [50, 100, 200, 500]
    found = measured(tmp_path, "task=reconstruct", f"task.at={at}", f"steps={','.join(map(str, steps))}", *ONE_BATCH)
    mses = [m["reconstruction_mse"] for m in found]
    assert slope(steps, mses) == pytest.approx(-2.0, abs=0.25)
    assert {m["reconstruction_images"] for m in found} == {44}
    assert [m["nfe"] for m in found] == steps


def test_codes_look_like_the_starting_noise(tmp_path: Path) -> None:
    """Of a Gaussian fitted to the data, the ODE carries data of its moments to mean 0 and variance 1."""
    (found,) = measured(tmp_path, "task=reconstruct", "steps=500", "num_samples=360", "batch_size=360")
    assert found["code_mean"] == pytest.approx(0.0, abs=0.05)
    assert found["code_variance"] == pytest.approx(1.0, abs=0.1)


def test_no_more_images_than_are_held_out(tmp_path: Path) -> None:
    (found,) = measured(tmp_path, "task=reconstruct", "steps=2", "num_samples=5000", "batch_size=360")
    assert found["reconstruction_images"] == 360


# consistency


def test_consistency_with_itself_is_exactly_zero_and_falls_with_the_square_of_the_step(tmp_path: Path) -> None:
    steps = [10, 20, 40, 400]
    found = measured(tmp_path, "task=consistency", "task.many_steps=400", "steps=10,20,40,400", *ONE_BATCH)
    assert found[-1]["consistency_mse"] == 0.0
    assert found[-1]["feature_distance"] == 0.0
    mses = [m["consistency_mse"] for m in found[:-1]]
    assert slope(steps[:-1], mses) == pytest.approx(-2.0, abs=0.4)  # the reference itself is 1/400 off
    assert all(m["consistency_mse"] < m["unrelated_mse"] for m in found)


def test_the_reference_is_sampled_once_for_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    original = Sampler.sample

    def counted(self: Sampler, *arguments: Any, **named: Any) -> torch.Tensor:
        sampled.append(self.steps)
        return original(self, *arguments, **named)

    monkeypatch.setattr(Sampler, "sample", counted)
    batches = math.ceil(44 / 16)
    measured(tmp_path, "task=consistency", "task.many_steps=40", "steps=2,5,40", "-m")
    assert [sampled.count(steps) for steps in (2, 5, 40)] == [batches] * 3
    assert len(list((tmp_path / "references").glob("*/states.npy"))) == 1
    measured(tmp_path, "task=consistency", "task.many_steps=40", "steps=7")
    assert sampled.count(40) == batches
    measured(tmp_path, "task=consistency", "task.many_steps=40", "steps=7", "seed=1")
    assert sampled.count(40) == 2 * batches


def test_a_stochastic_sampler_is_not_consistent(tmp_path: Path) -> None:
    """At eta 1 another number of steps is another image; with its own it is still itself."""
    settings = ("task=consistency", "task.many_steps=200", "sampler=ddim,ddpm", "steps=50,200", *ONE_BATCH)
    ddim, _, ddpm, itself = measured(tmp_path, *settings)
    assert ddpm["consistency_mse"] > 20 * ddim["consistency_mse"]
    assert itself["consistency_mse"] == 0.0


# interpolate


def test_slerp_is_the_smoother_way(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "task=interpolate", "steps=20")
    found = tiny.measured(cell)
    assert found["interpolation_lines"] == 22
    assert found["interpolation_path_length"] >= 1.0
    # the exact model of a Gaussian is affine in x_T, so decoded lerp is the straight line itself
    assert found["lerp_path_length"] == pytest.approx(1.0, abs=1e-5)
    assert found["lerp_largest_step"] == pytest.approx(0.1, abs=1e-5)
    assert found["lerp_midpoint_to_train"] == pytest.approx(found["crossfade_midpoint_to_train"], rel=1e-4)
    # and slerp between orthogonal starts is a quarter circle: pi / 2 / sqrt(2) of its chord
    assert found["interpolation_path_length"] == pytest.approx(math.pi / 2 / math.sqrt(2), abs=0.05)
    (table,) = cell["tables"]
    assert [row[0] for row in table["rows"]] == ["slerp", "lerp", "cross-fade", "the ends themselves"]


def test_path_lengths_by_hand() -> None:
    straight = torch.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1)
    jump = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]).reshape(1, 5, 1, 1, 1)
    lengths, largest = path_lengths(torch.cat([straight, jump]))
    assert lengths.tolist() == pytest.approx([1.0, 1.0])
    assert largest.tolist() == pytest.approx([0.25, 1.0])
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]).reshape(1, 3, 1, 1, 2)
    assert [float(value) for value in path_lengths(corner)] == pytest.approx([7 / 5, 4 / 5])


# trajectory


def test_the_predicted_image_approaches_the_image(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "task=trajectory", "task.columns=6", "steps=20")
    (table,) = cell["tables"]
    timesteps, errors = zip(*table["rows"], strict=True)
    assert timesteps == (950, 750, 550, 350, 150, "image")
    assert errors[-1] == 0.0
    assert list(errors) == sorted(errors, reverse=True)
    assert tiny.measured(cell)["first_prediction_mse"] == errors[0]


@pytest.mark.parametrize(("nfe", "columns"), [(1, 2), (1, 11), (3, 11), (10, 11), (50, 11), (1000, 7)])
def test_shown_moments(nfe: int, columns: int) -> None:
    moments = shown_moments(nfe, columns)
    assert moments[0] == 0
    assert moments[-1] == nfe
    assert len(moments) == len(set(moments)) == min(columns, nfe + 1)


def test_of_a_trajectory_only_what_is_shown_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N may be what it is for other tasks: the states of all samples at all moments would not fit."""
    kept: dict[str, tuple[int, ...]] = {}
    monkeypatch.setattr(trajectory, "preview", lambda folder, images: kept.update(preview=images.shape))
    monkeypatch.setattr(trajectory, "sheet", lambda path, rows: kept.update({path.name: rows.shape}))
    cells(tmp_path, "task=trajectory", "task.columns=6", "steps=20", "batch_size=3")
    assert kept == {"preview": (12, 1, 8, 8), "trajectory.png": (8, 6, 1, 8, 8)}


def test_of_lines_only_some_midpoints_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolate, "NEAREST_AT_MOST", 5)
    lines, way = NamedNoise(0).initial(torch.arange(12), torch.empty(12, 3, 1, 2, 2)), interpolate._Way()
    for part in torch.split(lines, 4):
        way.add(part)
    assert torch.equal(torch.cat(way.midpoints), lines[:5, 1])
    assert sum(part.untyped_storage().nbytes() for part in way.midpoints) == 5 * 4 * 4
    assert way.count == 12
    assert way.path == tuple(float(values.median()) for values in path_lengths(lines))


@pytest.mark.parametrize("task", ["consistency", "precision"])
def test_more_states_than_memory_holds_are_refused(task: str) -> None:
    most = 2**33 // (3 * 256 * 256 * 4)
    settings = (f"task={task}", "data=lsun_church", "metrics.features=inception")
    tiny.configure(*settings, f"num_samples={most}")
    with pytest.raises(ConfigError, match=rf"num_samples={most + 1} is too many for task={task}.*: at most {most} "):
        tiny.configure(*settings, f"num_samples={most + 1}")


# cannot_skip


def test_it_needs_timesteps_that_have_a_beta() -> None:
    words = ("task=cannot_skip", "sampler=ddpm", "steps=10", "sampler.spacing=logsnr")
    with pytest.raises(
        ConfigError, match=r"needs beta\(t\), which whole timesteps alone have: set sampler\.timesteps_as"
    ):
        tiny.configure(*words)
    assert tiny.configure(*words, "sampler.timesteps_as=integer").build_sampler().whole


def gaussian(schedule: NoiseSchedule, count: int = 4096) -> tuple[GaussianEps, torch.Tensor]:
    model = GaussianEps(schedule, mean=torch.tensor([0.5, -0.3]), variance=torch.tensor([0.04, 0.2]))
    return model, NamedNoise(0).initial(torch.arange(count), torch.empty(count, 2))


def test_without_skipping_both_forms_are_the_sampler() -> None:
    schedule = NoiseSchedule.linear(200, 5e-4, 0.1)
    model, x_T = gaussian(schedule, 64)
    expected = Sampler(schedule, steps=200, eta=1.0).sample(model, x_T, seed=3)
    for alphas in ("per_step", "cumulative"):
        textbook = Sampler(schedule, steps=200, eta=1.0, formula=DDPMFormula(schedule, alphas))
        torch.testing.assert_close(textbook.sample(model, x_T, seed=3), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing"])
def test_when_skipping_the_cumulative_form_alone_is_the_sampler(spacing: str) -> None:
    schedule = NoiseSchedule.linear(200, 5e-4, 0.1)
    model, x_T = gaussian(schedule)

    def by(formula: DDPMFormula | None) -> torch.Tensor:
        return Sampler(schedule, steps=20, eta=1.0, spacing=spacing, formula=formula).sample(model, x_T, seed=3)

    expected = by(None)
    right, wrong = by(DDPMFormula(schedule, "cumulative")), by(DDPMFormula(schedule, "per_step"))
    torch.testing.assert_close(right, expected, rtol=0, atol=2e-5)
    # the noise stays in: the variance is far above the data's, and above the right form's
    assert float((wrong.var(0) / right.var(0)).min()) > 1.5


@pytest.mark.slow
def test_the_lesson_in_the_harness(tmp_path: Path) -> None:
    settings = ("task=cannot_skip", "sampler=ddpm", "schedule.num_timesteps=40", "schedule.beta_end=0.4")
    found = measured(tmp_path, *settings, "task.alphas=per_step,cumulative", "steps=40,10", "-m")
    all_wrong, wrong, all_right, right = found
    assert all_wrong["mse_to_sampler"] == pytest.approx(0.0, abs=1e-10)
    assert all_right["mse_to_sampler"] == pytest.approx(0.0, abs=1e-10)
    assert right["mse_to_sampler"] == pytest.approx(0.0, abs=1e-10)
    assert wrong["mse_to_sampler"] > 1e-3
    assert wrong["fd"] > 1.5 * right["fd"]
    assert all_wrong["fd"] == pytest.approx(all_right["fd"], rel=1e-3)


# all of them


TASKS = ("reconstruct", "interpolate", "consistency", "trajectory")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that the tasks share: one training, one set of references."""
    return tmp_path_factory.mktemp("together")


@pytest.mark.slow
@pytest.mark.parametrize("models", ["gaussian,empirical", "digits"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_on_every_model_and_is_cached(together: Path, models: str, task: str) -> None:
    settings = tiny.TINY if models == "digits" else tiny.SMALL
    arguments = [f"task={task}", f"model={models}", "steps=3,6", "logger=csv", "metrics.features=pixels", "-m"]
    if task == "consistency":
        arguments.append("task.many_steps=6")
    assert tiny.run(together, *arguments, settings=settings) == 0
    assert tiny.run(together, *arguments, settings=settings) == 0
    first, second = (tiny.results(sweep) for sweep in tiny.sweeps(together)[-2:])
    cells = 2 * len(models.split(","))
    assert [(row["status"], row["cached"]) for row in first] == [("done", "False")] * cells
    assert [row["cached"] for row in second] == ["True"] * cells
    for row in first:
        folder = together / "cells" / row["cell"]
        result = json.loads((folder / "result.json").read_text())
        assert result["pictures"]
        for picture in result["pictures"]:
            with Image.open(folder / picture["file"]) as image:
                assert min(image.size) >= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("task=reconstruct", "sampler.eta=0.5"),
            "task=reconstruct needs the deterministic sampler: set sampler.eta=0",
        ),
        (("task=reconstruct", "sampler.clip=x0"), "set sampler.clip=none, got x0"),
        (("task=reconstruct", "task.at=middle"), "task.at=middle: must be 'source' or 'target'"),
        (("task=interpolate", "sampler=ddpm"), "task=interpolate needs the deterministic sampler"),
        (("task=interpolate", "num_samples=3"), "needs 4 samples"),
        (("task=interpolate", "task.points=2"), "task.points=2: must be at least 3"),
        (("task=interpolate", "task.points=10"), "task.points=10 must be odd"),
        (
            ("task=consistency", "task.many_steps=1001"),
            "task.many_steps=1001: steps must be between 1 and 1000",
        ),
        (("task=consistency", "schedule.num_timesteps=500"), "steps must be between 1 and 500"),
        (("task=cannot_skip",), "set sampler=ddpm"),
        (("task=cannot_skip", "sampler=ddpm_large"), "set sampler=ddpm"),
        (("task=trajectory", "save_samples=true"), "save_samples=true is not for task=trajectory"),
        (("task=trajectory", "task.points=4"), "no such option"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert tiny.run(tmp_path / "outputs", *EXACT, *arguments, settings=tiny.SMALL) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_sheet_is_the_images_pixel_for_pixel(tmp_path: Path) -> None:
    rows = torch.zeros(2, 3, 1, 4, 5)
    rows[0, 1], rows[1, 2], rows[1, 0] = 1.0, -1.0, 7.0
    sheet(tmp_path / "sheet.png", rows)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (9, 17)
    assert set(np.unique(pixels[:4, 6:11])) == {255}
    assert set(np.unique(pixels[5:, 12:])) == {0}
    assert set(np.unique(pixels[5:, :5])) == {255}
    assert set(np.unique(pixels[4])) == {128}
