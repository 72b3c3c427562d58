"""The command line: wrong input is answered before any work, in one line, with a status that is not 0."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from ddim_lab.__main__ import main
from ddim_lab.jobs.compose import literal


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["ddim_lab", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code if isinstance(stop.value.code, int) else 1


WRONG = {
    "steps=0": r"steps=0: must be at least 1",
    "steps=-3": r"steps=-3: must be at least 1",
    "steps=1001": r"steps must be between 1 and 1000 .* got 1001",
    "steps=abc": r"steps=abc: must be a whole number",
    "steps=2.5": r"steps=2.5: must be a whole number",
    "steps=true": r"steps=True: must be a whole number",
    "nfe=0": r"nfe=0: must be at least 1",
    "nfe=10 steps=5": r"steps=5 and nfe=10 are both given, .*: drop one",
    "nfe=10 sampler.timesteps=[5,3]": r"nfe=10 chooses how many steps .* sampler.timesteps lists them: drop one",
    "nfe=10 sampler.spacing=cubic": r"unknown spacing 'cubic': use one of uniform, ",
    "sampler.eta=-1": r"sampler.eta=-1: must be at least 0",
    "sampler.eta=nan": r"sampler.eta=nan: must be a finite number",
    "sampler.eta=2 steps=10": r"eta=2 is too large .* the largest valid eta is 1\.0004",
    "sampler.etta=0.5": r"sampler.etta: there is no such option; did you mean sampler.eta\?",
    "+sampler.etta=0.5": r"sampler.etta: no such option",
    "data=nothing": r"data=nothing: there is no such choice; use one of: .*digits",
    "sampler=nothing": r"sampler=nothing: there is no such choice; use one of: .*ddpm_large",
    "+experiments=nothing": r"experiments=nothing: there is no such choice",
    "num_samples=0": r"num_samples=0: must be at least 2",
    "num_samples=1": r"num_samples=1: must be at least 2",
    "batch_size=0": r"batch_size=0: must be at least 1",
    "schedule.beta_start=0": r"beta_start must lie strictly between 0 and 1, got 0$",
    "schedule.beta_end=1.5": r"beta_end must lie strictly between 0 and 1, got 1.5$",
    "schedule.beta_start=0.02 schedule.beta_end=0.01": r"betas must not decrease",
    "schedule.num_timesteps=0": r"schedule.num_timesteps=0: must be at least 1",
    "schedule=file": r"schedule.path",
    "schedule=file schedule.path={nowhere}/betas.txt": r"no file of betas at \S+/nowhere/betas.txt",
    "sampler.variance=large sampler.eta=0.5": r"variance=large .* needs eta=1, got eta=0.5",
    "sampler.variance=large": r"variance=large .* needs eta=1, got eta=0",
    "sampler.spacing=cubic": r"unknown spacing 'cubic': use one of uniform, ",
    "sampler.clip=yes": r"sampler.clip=.*: must be 'none', 'x0' or 'x0_eps'",
    "sampler.timesteps=[5,3,4]": r"timesteps must ascend or descend",
    "sampler.timesteps=[1000]": r"timesteps must lie in 0..999",
    "sampler.timesteps=[]": r"timesteps is empty",
    "sampler.timesteps=[9,a]": r"sampler.timesteps.1=a: must be a finite number",
    "sampler.timesteps=[999.5]": r"timesteps must lie in 0..999, got 999.5 to 999.5",
    "sampler.timesteps_as=round": r"sampler.timesteps_as=round: must be 'given' or 'integer'",
    "seed=-1": r"seed=-1: must be at least 0",
    "runtime.device=abacus": r"runtime.device=abacus",
    "runtime.precision=fp8": r"runtime.precision=fp8: must be ",
    "runtime.keep_fp32=[inner]": r"runtime.keep_fp32=\[.inner.\]: must be auto or a list of edges, outer,"
    r" norms, narrow, stream, weights",
    "metrics.features=inseption": r"metrics.features=inseption: must be ",
    "training.learning_rate=0": r"training.learning_rate=0: must be above 0",
    "training.compile=maybe": r"training.compile=maybe: must be true, false or auto",
    "training.ema_decay=1": r"training.ema_decay=1: must be below 1",
    "sampling_devices=2 task=trajectory": r"sampling_devices=2 is not for task=trajectory: set it to 1",
    "training.devices=3": r"training.devices=3 must divide training.batch_size=128",
    "training.warmup_steps=2000": r"warmup_steps=2000 exceeds training.max_steps=750: set training.warmup_steps",
    "sampler.name=": r"sampler.name is empty: give a value, or drop it",
    "logger.project=": r"logger.project is empty",
    "data=image_folder data.root=": r"data.root is empty",
    "data.root=": r"data.root is empty",
    "metrics.inception_weights=": r"metrics.inception_weights is empty",
    "sampler.timesteps=5": r"sampler.timesteps=5: must be a list, as sampler.timesteps=\[A,B\]",
    "model.attention=true": r"model.attention=True: must be a list",
    "=3": r"=3: there is no option before the =; write option=value",
    "+=3": r"\+=3: there is no option before the =",
    "experiments=table1_digits": r"experiments: nothing is chosen of it yet; did you mean \+experiments=...\?",
    "hydra.mode=foo": r"hydra.mode=foo: .*RUN.*MULTIRUN.*",
    "hydra.foo=3": r"hydra.foo: there is no such option; --cfg hydra lists them",
    "hydra.sweeper.params.task=benchmark": r".*task=benchmark sets a part of an option that is null: give it whole",
    "--resolve steps=3": r"--resolve is for --cfg: add --cfg job",
    "--cfg job -m steps=3": r"--run, --multirun, --cfg, .* exclude each other: give one of them",
    "-sc -m install=bash": r".* exclude each other: give one of them",
    "sampler=glob(nothing*) -m": r"sampler=glob\(nothing\*\) stands for nothing: no choice matches",
    "model.attention=[true]": r"model.attention needs one true or false a level: 2, got 1",
    "model.block_out_channels=[30,30]": r"model.block_out_channels must be multiples of model.norm_num_groups=8",
    "save_samples=perhaps": r"save_samples=perhaps: must be true or false",
    "steps=10,25": r"steps=10,25 lists several values: add -m",
    "-m steps=10,25,0": r"steps=0: must be at least 1",
    "-m sampler.eta=0,0.5,7 steps=10,25,50": r"eta=7 is too large",
    "-m logger=csv,wandb": r"logger must be the same in all cells of a sweep",
    "-m study.title=a,b logger=csv": r"study must be the same in all cells of a sweep",
    "steps": r"steps",
    "--multirrun steps=10": r"unrecognized arguments: --multirrun",
    "hydra.run.dir=elsewhere": r"hydra.run.dir is fixed",
    "--config-dir {nowhere} steps=10": r"--config-dir: there is no folder \S+/nowhere",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_clear_line(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    words = line.replace("{nowhere}", str(tmp_path / "nowhere")).split()
    status = run([*words, f"outputs_dir={outputs}"], monkeypatch)
    printed = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(rf"ddim_lab: .*{WRONG[line]}.*\n", printed.err), printed.err
    assert printed.out == ""
    assert not outputs.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["runtime.device=cuda", f"outputs_dir={tmp_path}/o"], monkeypatch) == 2
    assert "runtime.device=cuda: this machine has no usable CUDA device; use auto or cpu" in capsys.readouterr().err


def test_an_outputs_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for option, place, more in (
        ("outputs_dir", f"{tmp_path}/file/outputs", ()),
        ("hydra.sweep.dir", f"{tmp_path}/file/sweep", ("-m", f"outputs_dir={tmp_path}/o")),
    ):
        assert run([f"{option}={place}", *more], monkeypatch) == 2
        said = rf"ddim_lab: {option}={place} can't be written: .*; set {option}.*\n"
        assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("inside", ["locks", "cells", "models", "references", "sweeps"])
def test_a_folder_in_the_outputs_that_cannot_be_written(
    inside: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Said before any work; root may write everywhere, so a file is in the way."""
    (tmp_path / inside).touch()
    assert run([f"outputs_dir={tmp_path}"], monkeypatch) == 2
    said = rf"ddim_lab: outputs_dir={tmp_path} can't be written: {inside} in it: .*; set outputs_dir, or make it .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [inside]


def test_an_empty_outputs_folder_is_not_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["outputs_dir=", "model=gaussian"], monkeypatch) == 2
    assert capsys.readouterr().err == "ddim_lab: outputs_dir is empty: give a value, or drop it\n"
    assert not list(tmp_path.iterdir())


def test_shell_completion_is_hydras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-sc", "install=bash"], monkeypatch) == 0
    assert "COMP_" in capsys.readouterr().out
    monkeypatch.setenv("COMP_LINE", "ddim-lab sampler=ddp")
    assert run(["-sc", "query=bash"], monkeypatch) == 0
    assert {"sampler=ddpm", "sampler=ddpm_large"} <= set(capsys.readouterr().out.split())


def test_a_pattern_of_choices_is_every_one_that_matches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["sampler=glob(ddpm*)", "steps=2", "model=gaussian", "metrics.features=pixels", "logger=csv", "-m"]
    assert run([*line, "num_samples=32", "batch_size=16", f"outputs_dir={tmp_path}"], monkeypatch) == 0
    assert "2 cells" in capsys.readouterr().err


def test_a_sweep_has_one_outputs_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["-m", "logger=csv", f"outputs_dir={tmp_path}/a,{tmp_path}/b"], monkeypatch) == 2
    assert capsys.readouterr().err == (
        "ddim_lab: outputs_dir must be the same in all cells of a sweep, which share one report:"
        " run the command for each\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_process_says_one_line_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddim_lab", "sampler.eta=2", "steps=10", f"outputs_dir={tmp_path}/o"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "largest valid eta is 1.0004" in done.stderr


def test_help_names_what_a_newcomer_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"], monkeypatch) == 0
    text = capsys.readouterr().out
    for word in ("+experiments=NAME", "sampler: ", "ddpm_large", "experiments: ", "num_samples", "report.html", "-m"):
        assert word in text, word


def test_cfg_job_prints_the_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--cfg", "job", "steps=7"], monkeypatch) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_cfg_job_of_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--cfg", "job", "stepps=7"], monkeypatch) == 2
    assert capsys.readouterr().err == "ddim_lab: stepps: there is no such option; did you mean steps?\n"


def test_a_path_of_any_characters_is_itself_to_hydra() -> None:
    parser, node = OverridesParser.create(), OmegaConf.create({"x": None, "y": "${x}/z"})
    for parts in itertools.product(["\\", "$", "${", "}", "'", '"', "a:b", " ", ",", "\n", "#", "=", "["], repeat=2):
        text = "".join(parts)
        (override,) = parser.parse_overrides([f"x={literal(text)}"])
        node.x = override.value()
        assert (node.x, node.y) == (text, f"{text}/z")
