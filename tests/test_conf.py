"""Every file under conf/ composes, is checked, and starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import hydra
import pytest
import shared_composing
import tiny
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddim_lab.config.folders import config_folder
from ddim_lab.config.sampler import FORMULAS, SamplerOptions
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.compose import compose, composer, explain

CHOICES = [
    (group.name, path.stem)
    for group in sorted(config_folder().iterdir())
    if group.is_dir() and group.name != "experiments"
    for path in sorted(group.glob("*.yaml"))
]

UNLABELLED = "metrics.features=pixels"
NEEDS = {
    ("schedule", "file"): ["schedule.path={folder}/betas.txt"],
    ("task", "cannot_skip"): ["sampler=ddpm"],
    ("data", "celeba"): [UNLABELLED],
    ("data", "lsun_bedroom"): [UNLABELLED],
    ("data", "lsun_church"): [UNLABELLED],
    ("data", "image_folder"): ["data.root={folder}"],
    ("model", "pretrained"): ["model.path={folder}"],
    ("model", "official"): ["model.path={folder}/a.ckpt"],
    ("model", "adm"): ["model.path={folder}/a.pt"],
    ("model", "edm"): ["model.path={folder}/a.pt"],
    ("model", "score_sde"): ["model.path={folder}/a.pth"],
    ("model", "celeba"): ["data=celeba", UNLABELLED],
    ("sampler", "checkpoint"): ["model=pretrained", "model.path={folder}"],
    ("model", "lsun_bedroom"): ["data=lsun_bedroom", UNLABELLED],
    ("model", "lsun_church"): ["data=lsun_church", UNLABELLED],
}
"""What a file leaves to the user."""

ELSEWHERE = {"data", "model", "training"}
"""Groups that come together; their files start in tests of their own."""


def test_there_is_something_to_test() -> None:
    assert ("sampler", "ddpm_large") in CHOICES
    assert len(CHOICES) >= 20


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_is_valid(group: str, choice: str, tmp_path: Path) -> None:
    (tmp_path / "betas.txt").write_text("\n".join(f"{1e-4 + 2e-5 * k}" for k in range(1000)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    overrides = [text.format(folder=tmp_path) for text in NEEDS.get((group, choice), [])]
    config = tiny.configure(f"{group}={choice}", *overrides)
    assert config.build_sampler().nfe > 0


ELSEWHERE_ALONE = {("sampler", "checkpoint")}
"""Choices that start in a test of their own: tests/test_schedulers.py."""


def starting() -> dict[str, list[str]]:
    """What starts in one sweep, by group: all of its choices that need no options of their own."""
    found: dict[str, list[str]] = {}
    for group, choice in CHOICES:
        if group not in ELSEWHERE | {"task"} and (group, choice) not in ELSEWHERE_ALONE:
            alone = group == "logger" or (group, choice) in NEEDS
            found.setdefault(f"{group}={choice}" if alone else group, []).append(choice)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "choices"), starting().items())
def test_every_choice_starts(name: str, choices: list[str], tmp_path: Path) -> None:
    group = name.partition("=")[0]
    (tmp_path / "betas.txt").write_text("\n".join(f"{1e-4 + 2e-5 * k}" for k in range(1000)))
    overrides = [text.format(folder=tmp_path) for choice in choices for text in NEEDS.get((group, choice), [])]
    arguments = ["model=gaussian", "metrics.features=pixels", "steps=4", f"{group}={','.join(choices)}", "-m"]
    if group != "logger":
        arguments.append("logger=csv")
    assert tiny.run(tmp_path / "outputs", *arguments, *overrides, settings=tiny.SMALL) == 0
    rows = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert [row["status"] for row in rows] == ["done"] * len(choices)
    assert all(float(row["fd"]) >= 0 for row in rows)


def test_every_sampler_preset_has_every_key() -> None:
    """A sweep over presets together with one of their keys must not find it missing in one of them.

    A formula has options of its own beside those that all have: the same in each of its presets.
    """
    files = sorted((config_folder() / "sampler").glob("*.yaml"))
    presets = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files}
    common = set(presets["ddim"])
    for name, preset in presets.items():
        assert isinstance(preset, dict)
        options = FORMULAS[preset["formula"]] if "formula" in preset else SamplerOptions
        assert preset["name"] in (name, "${sampler.scheduler}")
        assert set(preset) | {"formula"} == set(options.model_fields), name
        assert common <= set(preset)


def test_a_recipe_says_only_what_is_not_the_defaults() -> None:
    """What an option means stands in default.yaml alone: a file that repeats it would go stale."""
    default = OmegaConf.load(config_folder() / "training" / "default.yaml")
    for file in (config_folder() / "training").glob("*.yaml"):
        if file.stem != "default":
            own = OmegaConf.to_container(OmegaConf.load(file))
            assert own.pop("defaults") == ["default", "_self_"]
            assert all(default[name] != value for name, value in own.items()), file.name


@pytest.mark.parametrize(
    "overrides",
    [
        ["steps=10", "sampler.eta=0.3"],
        ["sampler.eta=0.3", "sampler=ddpm"],
        ["data=cifar10", "model.block_out_channels=[8,8]"],
        ["+experiments=eta_effect", "steps=3"],
        ["hydra/launcher=joblib", "steps=3"],
        ["study.published={source: x}", "study.published.source=y"],
        ["sampler={eta: 0.3}"],
        ["sampler=ddpm", "~study.title", "++new=3"],
        ["steps=5", "steps=6"],
        ["model=${data}"],
        ["~sampler"],
        ["+steps=3"],
        ["sampler.etta=1"],
        ["steps@study=3"],
        ["data=nothing", "steps=3"],
    ],
    ids=" ".join,
)
def test_what_is_composed_of_shared_files_is_what_hydra_composes(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: no configuration changes what the next one is made of. So with what the tests share among themselves."""

    def by_hydra(overrides: list[str]) -> DictConfig:
        try:
            return hydra.compose("config", overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error

    def outcome(composing: Callable[[list[str]], DictConfig]) -> object:
        try:
            return OmegaConf.to_container(composing(overrides), resolve=False)
        except ConfigError as error:
            return str(error)

    with composer(argparse.Namespace(config_dir=None, overrides=[])):
        shared = [outcome(by_hydra) for _ in range(2)]
        shared_composing.share_nothing(monkeypatch)
        expected = outcome(by_hydra)
        assert shared == [expected] * 2
        assert [outcome(compose) for _ in range(2)] == [expected] * 2
