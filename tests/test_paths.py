"""Paths as people write them: `~` is the home folder, in every option and argument that is one."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from ddim_lab import score
from ddim_lab.config.options import user_path
from ddim_lab.data.disk import root_of
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.compose import quoted
from ddim_lab.report.__main__ import main as report
from ddim_lab.store.__main__ import main as store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with betas, images, statistics and choices, beside the folder where commands are typed."""
    place = tmp_path / "home"
    (place / "images").mkdir(parents=True)
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
    np.savetxt(place / "betas.txt", np.linspace(1e-4, 0.02, 1000))
    np.savez(place / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    (place / "conf" / "sampler").mkdir(parents=True)
    (place / "conf" / "sampler" / "mine.yaml").write_text(
        "name: mine\neta: 0.25\nvariance: posterior\nspacing: uniform\nclip: none\ntimesteps: null\n"
    )
    monkeypatch.setenv("HOME", str(place))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return place


OPTIONS = {
    "outputs_dir": "outputs_dir={path}",
    "data.root": "data=image_folder data.root={path} metrics.features=pixels",
    "schedule.path": "schedule=file schedule.path={path}",
    "model.path": "model=pretrained model.path={path}",
    "metrics.inception_weights": "metrics.features=inception metrics.inception_weights={path}",
    "metrics.dinov2_weights": "metrics.features=dinov2 metrics.dinov2_weights={path}",
    "metrics.clip_weights": "metrics.features=clip metrics.clip_weights={path}",
    "metrics.reference_statistics": "metrics.reference_statistics={path} metrics.features=pixels",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_that_is_a_path_knows_the_home_folder(option: str, home: Path) -> None:
    given = OPTIONS[option].format(path="'~/betas.txt'").split()
    value = tiny.configure(*given).model_dump()
    for part in option.split("."):
        value = value[part]
    assert value == f"{home}/betas.txt"
    with pytest.raises(ConfigError) as refused:
        tiny.configure(*OPTIONS[option].format(path="'~nobody-of-this-name/x'").split())
    assert re.fullmatch(rf"{option}=~nobody\S+: there is no home folder ~nobody-of-this-name; .*", str(refused.value))
    with pytest.raises(ConfigError, match=rf"{option}=caf.*: the name is not UTF-8: rename it, or link to it under "):
        tiny.configure(*OPTIONS[option].format(path="'caf\udce9'").split())


def test_what_only_looks_like_a_home_folder_is_a_name(home: Path) -> None:
    Path("~nobody-of-this-name").mkdir()
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert user_path("./~") == Path("~")
    assert user_path("a/~") == Path("a/~")
    assert user_path("~") == home


def test_the_download_folder_is_a_path_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.configure("data=cifar10").data
    monkeypatch.delenv("DDIM_LAB_DATA", raising=False)
    assert root_of(data) == home / ".cache" / "ddim_lab" / "cifar10"
    monkeypatch.setenv("DDIM_LAB_DATA", "~/data")
    assert root_of(data) == home / "data" / "cifar10"


@pytest.mark.slow
def test_a_command_whose_paths_the_shell_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sweep, report, store and score: nothing is made beside, no folder is called ~."""
    line = "--config-dir ~/conf sampler=mine data=image_folder data.root=~/images data.image_size=8 data.channels=1"
    line += " model=gaussian schedule=file schedule.path=~/betas.txt"
    line += " metrics.features=pixels metrics.reference_statistics=~/statistics.npz"
    line += " metrics.features=pixels steps=2 -m hydra.sweep.dir=~/outputs/sweeps/mine logger=csv"
    assert tiny.run(Path("~/outputs"), *shlex.split(line), settings=tiny.SMALL) == 0, capsys.readouterr().err
    sweep = home / "outputs" / "sweeps" / "mine"
    assert [row["status"] for row in tiny.results(sweep)] == ["done"]
    assert report(["~/outputs/sweeps/mine", "--figures", "~/figures"]) == 0
    assert report(["a=~/outputs/sweeps/mine", "b=~/outputs/sweeps/none", "--output", "~/both"]) == 2
    assert f"{home}/outputs/sweeps/none" in capsys.readouterr().err
    assert list((home / "figures").glob("*.svg"))
    assert store(["verify", "--outputs-dir", "~/outputs"]) == 0
    arguments = "~/images --reference ~/statistics.npz --json ~/score.json metrics.features=pixels"
    monkeypatch.setattr(sys, "argv", ["score", *arguments.split(), "outputs_dir=~/outputs"])
    with pytest.raises(SystemExit) as stop:
        score.main()
    assert stop.value.code == 0
    assert (home / "score.json").is_file()
    assert list(Path().iterdir()) == []


def test_values_that_hydra_wants_quoted_need_no_quotes() -> None:
    for argument, expected in (
        ("data.root=~/a b", "data.root='~/a b'"),
        ("schedule.path=~/a,~me/b,c", "schedule.path='~/a','~me/b',c"),
        ("+x=[~/a,b]", "+x=['~/a',b]"),
        ("data.root=/data/café", "data.root='/data/café'"),
        ("data.root=caf\udce9,b,é", "data.root='caf\udce9',b,'é'"),
        ("model.path='~/a'", "model.path='~/a'"),
        ("~data.name", "~data.name"),
        ("data.root=a~b", "data.root=a~b"),
        ("--config-dir=~/a", "--config-dir=~/a"),
    ):
        assert quoted(argument) == expected


def test_no_such_home_folder_is_one_clear_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--config-dir", "~nobody-of-this-name"], ["outputs_dir=~nobody-of-this-name"]):
        assert tiny.run(Path("o"), *arguments, "model=gaussian", settings=tiny.SMALL) == 2
        assert re.fullmatch(r"ddim_lab: .*there is no home folder ~nobody-of-this-name.*\n", capsys.readouterr().err)
    assert report(["~nobody-of-this-name"]) == 2
    assert "there is no home folder" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
