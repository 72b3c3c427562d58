"""Jobs side by side, whatever starts them: the same sweep folder and report, one training, every cell once."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from ddim_lab.config.trust import LAUNCHERS
from ddim_lab.errors import Terminated
from ddim_lab.jobs.workers import known_to_its_command, may_begin

ROOT = Path(__file__).resolve().parents[1]
LINE = (
    *("training.max_steps=6", "training.warmup_steps=0", "training.batch_size=8", "model.block_out_channels=[8,8]"),
    *("model.attention=[false,false]", "metrics.features=pixels", "num_samples=24", "batch_size=8", "logger=csv"),
    *("sampler.eta=0,1", "steps=2", "-m"),
)


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def start(outputs: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ddim_lab", *LINE, *arguments, f"outputs_dir={outputs}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("basic")
    assert tiny.run(folder, *LINE, settings=()) == 0
    return tiny.numbers(tiny.sweeps(folder)[0])


def same(sweep: Path, expected: list[dict[str, str]]) -> bool:
    """The numbers, whatever threads the launcher gives a job: those are part of a cell's name."""
    left_out = {"cell", "batch_max_abs_diff"}
    found = tiny.numbers(sweep)
    return [{k: v for k, v in row.items() if k not in left_out} for row in found] == [
        {k: v for k, v in row.items() if k not in left_out} for row in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("hydra/launcher=joblib",), marks=needs("joblib"), id="joblib"),
        pytest.param(("hydra/launcher=submitit_local",), marks=needs("submitit"), id="submitit"),
    ],
)
def test_a_sweep_side_by_side(arguments: tuple[str, ...], expected: list[dict[str, str]], tmp_path: Path) -> None:
    process = start(tmp_path, *arguments)
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == 0, printed
    assert "ConfigStore" not in printed  # which Hydra says in every worker, of conf/hydra/launcher
    (sweep,) = tiny.sweeps(tmp_path)
    assert same(sweep, expected)
    assert (sweep / "report.html").is_file()
    assert len([path for path in (tmp_path / "models").iterdir() if (path / "raw").is_dir()]) == 1
    assert f"report: {sweep}/report.html" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=needs("joblib")),
        pytest.param("submitit_local", marks=needs("submitit")),
    ],
)
def test_what_ends_a_command_ends_its_jobs_in_order(launcher: str, tmp_path: Path) -> None:
    """One trains, the other waits for the model; a job that only now begins does not."""
    process = start(tmp_path, f"hydra/launcher={launcher}", "training.max_steps=1000000")
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("sweeps/*/jobs/*/process"))) < 2 or not list(tmp_path.glob("models/*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(2.0)
    jobs = [int(path.read_text().split()[-1]) for path in tmp_path.glob("sweeps/*/jobs/*/process")]
    assert process.pid not in jobs
    assert len(set(jobs)) == 2
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 143, printed
    assert not [job for job in jobs if "ddim_lab" in _command(job) or launcher[:6] in _command(job)]
    assert printed.count("terminated; the same command goes on from what is done") == 1
    assert not list(tmp_path.glob("sweeps/*/jobs/*/process"))
    assert not list(tmp_path.glob("models/.*"))  # a build that is killed leaves its folder
    (sweep,) = tiny.sweeps(tmp_path)
    assert [row["status"] for row in tiny.results(sweep)] == ["missing"] * 2
    with pytest.raises(Terminated), known_to_its_command(sweep / "jobs" / "1"):
        raise AssertionError("it has begun")
    may_begin(sweep)
    with known_to_its_command(sweep / "jobs" / "1"):
        assert (sweep / "jobs" / "1" / "process").is_file()
    assert not (sweep / "jobs" / "1" / "process").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("ray")
def test_nine_cells_on_ray_with_a_worker_killed_in_mid_sweep(tmp_path: Path) -> None:
    """Two workers of a real local cluster; at most a second call, and all nine are there."""
    line = ("sampler.eta=0,0.5,1", "steps=2,3,4", "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")
    process = start(tmp_path, *line)
    deadline = time.monotonic() + 400
    while len(list(tmp_path.glob("sweeps/*/jobs/*/pointer.json"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    victim = next(pid for pid in _descendants(process.pid) if "ray::" in _command(pid) and "IDLE" not in _command(pid))
    os.kill(victim, signal.SIGKILL)
    printed = process.communicate(timeout=400)[0]
    if process.returncode != 0:
        second = start(tmp_path, *line)
        printed += second.communicate(timeout=400)[0]
        assert second.returncode == 0, printed
    rows = tiny.results(tiny.sweeps(tmp_path)[-1])
    assert [row["status"] for row in rows] == ["done"] * 9
    assert len({row["cell"] for row in rows}) == 9
    assert len([path for path in (tmp_path / "models").iterdir() if (path / "raw").is_dir()]) == 1


def _descendants(parent: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("choice", "extra"),
    [("joblib", "joblib"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_says_which_extra_it_needs(
    choice: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim_lab.config.trust._installed", lambda target: False)
    assert tiny.run(tmp_path, *LINE, f"hydra/launcher={choice}", settings=()) == 2
    assert capsys.readouterr().err == (
        f"ddim_lab: hydra/launcher={choice} needs a plugin: pip install 'ddim-lab[{extra}]'\n"
    )


@pytest.mark.parametrize("target", LAUNCHERS)
def test_every_launcher_has_its_file(target: str) -> None:
    files = [file.read_text(encoding="utf-8") for file in (ROOT / "conf" / "hydra" / "launcher").glob("*.yaml")]
    assert any(f"_target_: {target}\n" in text for text in files)
