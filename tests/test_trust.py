"""Nothing that is loaded runs code, writes elsewhere or tells a key: files in --config-dir are data."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import tiny

import ddim_lab
from ddim_lab.__main__ import main
from ddim_lab.config.trust import check_secrets
from ddim_lab.errors import ConfigError

HANDLER = "hydra:\n  job_logging:\n    handlers:\n      console:\n        class: "
HOSTILE = {
    "a callback": (
        "hydra:\n  callbacks:\n    evil:\n      _target_: pathlib.Path.touch\n      self: {ran}\n",
        r"hydra\.callbacks is set by a file",
    ),
    "a launcher": ("hydra:\n  launcher:\n    _target_: os.system\n", r"hydra\.launcher is set by a file"),
    "a launcher's command": ("hydra:\n  launcher:\n    command: touch {ran}\n", r"Key 'command' not in"),
    "a launcher's setup": (
        "defaults:\n  - override /hydra/launcher: submitit_slurm\nhydra:\n  launcher:\n    setup: [touch {ran}]\n",
        r"hydra\.launcher is set by a file",
    ),
    "a sweeper": ("hydra:\n  sweeper:\n    _target_: os.system\n", r"hydra\.sweeper\._target_ is set by a file"),
    "a log handler": (HANDLER + "subprocess.Popen\n        args: [touch, {ran}]\n", r"hydra\.job_logging is set by a"),
    "a log file": (HANDLER + "logging.FileHandler\n        filename: {ran}\n", r"hydra\.job_logging is set by a file"),
    "a log factory": (
        "hydra:\n  hydra_logging:\n    filters:\n      evil:\n        (): os.system\n        command: touch {ran}\n",
        r"hydra\.hydra_logging is set by a file",
    ),
    "the environment": ("hydra:\n  job:\n    env_set:\n      LD_PRELOAD: {ran}\n", r"hydra\.job\.env_set is set by a"),
    "a folder": ("hydra:\n  sweep:\n    subdir: ../../../elsewhere\n", r"hydra\.sweep is set by a file"),
    "another folder": ("hydra:\n  run:\n    dir: {ran}\n", r"hydra\.run is set by a file"),
    "what is dumped": ("hydra:\n  output_subdir: {ran}\n", r"hydra\.output_subdir is set by a file"),
    "a search path": ("hydra:\n  searchpath: [pkg://evil]\n", r"searchpath"),
    "a target": (
        "study:\n  _target_: os.system\n  command: touch {ran}\n",
        r"study\._target_=os\.system: this target is not on the allow-list",
    ),
    "a target in a list": (
        "model:\n  attention: [{{_target_: os.system}}]\n",
        r"_target_=os\.system: this target is not on the allow-list",
    ),
    "Python in YAML": ("study:\n  title: !!python/object/apply:os.system [touch {ran}]\n", r"."),
    "a key": ("study:\n  title: key ${{oc.env:WANDB_API_KEY}}\n", r"study\.title holds the value of \$WANDB_API_KEY"),
    "a key that is a word": (
        "study:\n  title: key ${{oc.env:WANDB_${{oc.decode:'API'}}_KEY}}\n",
        r"study\.title holds the value of \$WANDB_API_KEY",
    ),
    "a preset's path": ("task:\n  preset: ../../evil\n", r"task\.preset"),
}
"""What a study in --config-dir could try, and the line that answers it."""


@pytest.mark.parametrize("help", [(), ("--help",)])
@pytest.mark.parametrize("attempt", HOSTILE)
def test_a_hostile_file_runs_nothing(
    attempt: str,
    help: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, message = HOSTILE[attempt]
    if help and attempt in ("a key", "a key that is a word", "a preset's path", "Python in YAML", "a search path"):
        pytest.skip("refused where it is used, not where it is shown")
    ran = tmp_path / "ran"
    study = tmp_path / "conf" / "experiments" / "evil.yaml"
    study.parent.mkdir(parents=True)
    study.write_text("# @package _global_\n" + text.format(ran=ran), encoding="utf-8")
    key = "swordfish" if attempt == "a key that is a word" else "0123456789abcdef" * 2
    monkeypatch.setenv("WANDB_API_KEY", key)
    more = ("task=search_timesteps",) if "preset" in attempt else ()
    arguments = ["--config-dir", str(tmp_path / "conf"), "+experiments=evil", *more, *help]
    monkeypatch.setattr(sys, "argv", ["ddim_lab", *arguments, f"outputs_dir={tmp_path / 'outputs'}"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2, printed
    assert re.fullmatch(rf"ddim_lab: .*{message}.*\n", printed.err), printed.err
    assert not ran.exists()
    assert not (tmp_path / "outputs").exists()
    assert key not in printed.out + printed.err


COMMAND_LINES = {
    "hydra.launcher._target_=os.system": r"hydra\.launcher\._target_=os\.system: this target is not on the allow-list",
    "+hydra.callbacks.evil._target_=os.system": r"_target_=os\.system: this target is not on the allow-list",
    "hydra.job_logging.handlers.console.class=subprocess.Popen": r"log handlers may be logging\.StreamHandler alone",
    "hydra.job_logging.handlers.console.stream=ext://os.environ": r"log streams may be ext://sys\.stderr or",
    "--config-name evil": r"--config-name can't be used here",
    "--config-path /tmp": r"--config-path can't be used here",
    "--experimental-rerun evil.pickle": r"--experimental-rerun can't be used here",
    "hydra/launcher=abacus": r"hydra/launcher=abacus: there is no such choice; use one of: .*joblib",
}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_command_line_names_nothing_to_be_called_either(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddim_lab", *line.split(), f"outputs_dir={tmp_path / 'outputs'}"])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(rf"ddim_lab: .*{COMMAND_LINES[line]}.*\n", printed), printed
    assert not (tmp_path / "outputs").exists()


def test_a_variable_with_key_in_its_name_that_holds_none_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is the name of a choice, or a folder that is there; a key itself is refused wherever it stands."""
    monkeypatch.setenv("DATASET_KEY", "fashion_mnist")
    monkeypatch.setenv("EXPERIMENT_KEYWORDS", "table1_cifar10")
    monkeypatch.setenv("KEYS_FOLDER", str(tmp_path))
    monkeypatch.setenv("SOME_TOKEN", "hunter2hunter2")
    check_secrets(
        {"data": {"name": "fashion_mnist", "root": f"{tmp_path}/images"}, "study": {"title": "table1_cifar10"}}
    )
    with pytest.raises(ConfigError, match=r"study\.notes holds the value of \$SOME_TOKEN"):
        check_secrets({"study": {"notes": "it is hunter2hunter2."}})


@pytest.mark.slow
def test_no_key_lands_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's key in the environment, as on any cluster: it is in nothing that a sweep leaves."""
    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert tiny.run(tmp_path, "model=gaussian", "metrics.features=pixels", "steps=2", settings=tiny.SMALL) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]


@pytest.mark.slow
def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    """Every call that could: torch.load has weights_only=True, numpy.load allow_pickle=False, the rest is not there."""
    package = Path(ddim_lab.__file__).parent
    calls = []
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert name not in ("eval", "exec", "__import__", "os.system", "joblib.load"), file
                assert not name.startswith(("pickle.", "cloudpickle.", "dill.", "shelve.", "marshal.", "yaml.")), file
                assert not name.endswith(("instantiate", "Unpickler")), file
                assert "shell" not in given, file
                if name.endswith("torch.load"):
                    assert given.get("weights_only") == "True", file
                    calls.append(name)
                if name in ("np.load", "numpy.load"):
                    assert given.get("allow_pickle") == "False", file
                    calls.append(name)
    assert len(calls) >= 3
