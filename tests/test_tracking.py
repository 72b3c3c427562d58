"""W&B mirrors the files and never disturbs a job: real offline runs, read back; real dead and dying servers."""

from __future__ import annotations

import http.server
import io
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import yaml
from wandb_offline import read_run

from ddim_lab import dashboard
from ddim_lab.config.folders import config_folder
from ddim_lab.jobs import tracking
from ddim_lab.jobs.tracking import MODES, TrackingConfig, check_mode, offline_sync_hint, track
from ddim_lab.report import read_sweep

KEY = "5e1f" * 10  # the form of an API key; it opens nothing
NOBODY_LISTENS = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither this machine's account nor the network, and a wandb that has seen nothing yet."""
    import wandb

    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY_LISTENS)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    tracking._unreachable.clear()
    yield
    wandb.teardown()


@pytest.fixture
def config(tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(logger="wandb", directory=tmp_path / "runs", init_timeout_seconds=2)


def track_cell(config: TrackingConfig, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"job_type": "cell", "name": "cell", "group": "sweep", "run_config": {}}
    return track(config, **(arguments | changes))


def png(size: int = 8) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).save(buffer, format="PNG")
    return buffer.getvalue()


def tracking_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == tracking.__name__ and r.levelno >= logging.WARNING]


def assert_nowhere(text: str, folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if text.encode() in path.read_bytes()] == []


# --- What is in the files


def test_what_was_logged_is_read_back(config: TrackingConfig, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><p>σ̂</p>", encoding="utf-8")
    picture = tmp_path / "samples.png"
    picture.write_bytes(png())
    third = 1 / 3
    with track_cell(config) as run:
        run.log({"fd": third, "images_per_second": 812.5}, step=50)
        run.log({"lpips": float("nan")})
        run.image("samples", picture, "eta 0")
        run.image("grid", png(16))
        run.table("cells", ["steps", "note"], [[10, "a"], [None, 2.5]])
        run.html("report", page)
        run.summary({"fd_se": 0.25, "sha256": "c0ffee"})
        assert run.mode == "offline"
    read = read_run(run.directory)

    assert read.values("fd") == [third]
    assert read.values("steps")[0] == 50
    assert [math.isnan(value) for value in read.values("lpips")] == [True]
    assert read.values("samples.caption") == ["eta 0"]
    files = run.directory / "files"
    assert (files / read.values("samples.path")[0]).read_bytes() == png()
    assert read.values("grid.width") == [16]
    table = json.loads((files / read.values("cells.path")[0]).read_text())
    assert table == {"columns": ["steps", "note"], "data": [[10, "a"], [None, 2.5]]}
    assert (files / read.values("report.path")[0]).read_bytes() == page.read_bytes()
    assert read.summary["fd"] == third
    assert read.summary["fd_se"] == 0.25
    assert read.summary["sha256"] == "c0ffee"
    assert read.exit_code == 0


def test_a_long_run_is_read_back_over_the_blocks_of_its_file(config: TrackingConfig) -> None:
    with track(config, job_type="train", name="n", group="g", run_config={"long": "x" * 70_000}) as run:
        for step in range(300):
            run.log({"loss": step / 7}, step=step)
    read = read_run(run.directory)
    assert read.config == {"long": "x" * 70_000}
    assert read.values("loss") == [step / 7 for step in range(300)]


@pytest.mark.parametrize(
    ("job_type", "axis"), [("train", "trainer/global_step"), ("cell", "steps"), ("report", "steps")]
)
def test_curves_have_an_axis_and_its_values_come_in_any_order(config: TrackingConfig, job_type: Any, axis: str) -> None:
    with track_cell(config, job_type=job_type) as run:
        for step in (50, 10, 25):
            run.log({"fd": step / 2}, step=step)
    read = read_run(run.directory)
    assert read.axes == {"*": axis}
    assert read.values(axis) == [50, 10, 25]
    assert read.values("fd") == [25.0, 5.0, 12.5]


def test_two_jobs_are_two_runs(config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    monkeypatch.setenv("WANDB_RUN_GROUP", "another")
    recipe = {"sampler": {"eta": 0.5}, "steps": [10, 25]}
    # The training starts inside the cell that needs it, and ends first.
    with track(config, job_type="cell", name="c", group="sweep", run_config=recipe, tags=["ddim", "x" * 70]) as cell:
        cell.log({"fd": 1.0}, step=10)
        with track(config, job_type="train", name="t", group="sweep", run_config={"lr": 1e-3}) as train:
            train.log({"loss": 2.0}, step=0)
        cell.log({"fd": 3.0}, step=25)
    assert cell.directory != train.directory
    assert sorted((config.directory / "wandb").iterdir()) == sorted([cell.directory, train.directory])
    a, b = read_run(cell.directory), read_run(train.directory)
    assert (a.job_type, a.name, a.group, a.project) == ("cell", "c", "sweep", "ddim_lab")
    assert (b.job_type, b.name, b.group, b.project) == ("train", "t", "sweep", "ddim_lab")
    assert a.config == recipe
    assert b.config == {"lr": 1e-3}
    assert a.tags == ("ddim", "x" * 64)
    assert (a.values("fd"), a.values("loss")) == ([1.0, 3.0], [])
    assert (b.values("fd"), b.values("loss")) == ([], [2.0])
    assert (a.exit_code, b.exit_code) == (0, 0)


def test_nothing_about_the_machine_goes_along(config: TrackingConfig) -> None:
    with track_cell(config) as run:
        run.log({"fd": 1.0}, step=10)
    read = read_run(run.directory)
    assert read.host == ""
    assert read.record_types.isdisjoint({"environment", "stats", "output", "output_raw"})
    assert [path for path in (run.directory / "files").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("error", [ValueError("the job's own"), KeyboardInterrupt(), SystemExit(3)])
def test_a_raising_job_is_marked_failed(config: TrackingConfig, error: BaseException) -> None:
    runs = []

    def job() -> None:
        with track_cell(config) as run:
            runs.append(run)
            run.log({"fd": 1.0}, step=10)
            raise error

    with pytest.raises(type(error)) as caught:
        job()
    assert caught.value is error
    read = read_run(runs[0].directory)
    assert read.exit_code == 1
    assert read.values("fd") == [1.0]


# --- Which mode


def test_offline_and_silent_where_nobody_is_logged_in(
    config: TrackingConfig, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with track_cell(config) as run:
        run.log({"fd": 1.0}, step=10)
    assert run.mode == "offline"
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.partition(".")[0] != "wandb"] == []


def test_asked_to_be_online_without_an_account(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = TrackingConfig(logger="wandb", directory=tmp_path, mode="online")
    with track_cell(online) as run:
        assert run.mode == "offline"
    (warning,) = tracking_warnings(caplog)
    assert "wandb login" in warning


@pytest.mark.parametrize(("mode", "expected"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "off")])
def test_the_environment_decides_even_with_an_account(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, mode: str, expected: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", mode)
    with track_cell(config) as run:
        run.log({"fd": 1.0}, step=10)
        run.image("grid", png())
    assert run.mode == expected
    assert (config.directory / "wandb").exists() == (expected == "offline")


def test_csv_does_not_import_wandb(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from ddim_lab.jobs.tracking import TrackingConfig, track
config = TrackingConfig(logger="csv", directory=Path(sys.argv[1]))
with track(config, job_type="cell", name="n", group="g", run_config={}) as run:
    run.log({"fd": 1.0}, step=10)
    run.summary({"fd": 1.0})
    run.image("a", b"no picture", "b")
    run.table("a", ["b"], [[1]])
    run.html("a", Path("no such file"))
assert (run.mode, run.directory) == ("off", None)
assert not any(name.partition(".")[0] == "wandb" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_the_modes_are_those_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    assert set(MODES) == set(get_args(wandb.Settings.model_fields["mode"].annotation))
    for mode in ("", *MODES):
        monkeypatch.setenv("WANDB_MODE", mode)
        check_mode("auto")


def test_a_mode_that_is_none_is_one_line_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert tiny.run(tmp_path / "outputs", "model=gaussian", settings=tiny.SMALL) == 2
    said = r"ddim_lab: WANDB_MODE=ofline in the environment is no mode of W&B; online, offline, disabled, .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert not (tmp_path / "outputs").exists()
    assert dashboard.main(["somebody/ddim_lab"]) == 2
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("mode", ["", "ofline", "online"])
def test_what_the_command_line_says_of_the_mode_holds(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with track_cell(TrackingConfig(logger="wandb", directory=tmp_path, mode="offline")) as run:
        run.log({"fd": 1.0}, step=10)
    assert run.mode == "offline"
    assert read_run(run.directory).values("fd") == [1.0]
    assert os.environ["WANDB_MODE"] == mode


def test_a_setting_that_wandb_refuses_is_named(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_DISABLE_GIT", "perhaps")
    with track_cell(config) as run:
        assert run.mode == "off"
    (warning,) = tracking_warnings(caplog)
    assert "not tracked" in warning
    assert "setting disable_git=perhaps: Input should be a valid boolean" in warning


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [(None, None, "ddim_lab"), (None, "theirs", "theirs"), ("ours", "theirs", "ours"), ("ours", None, "ours")],
)
def test_the_environment_names_the_project_where_the_command_line_does_not(
    asked: str | None, environment: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_PROJECT", environment)
    with track_cell(TrackingConfig(logger="wandb", directory=tmp_path, project=asked)) as run:
        pass
    assert read_run(run.directory).project == expected


# --- Under `wandb agent`


@pytest.fixture
def under_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in which `wandb agent` starts a command."""
    parameters = tmp_path / "wandb" / "sweep-s7" / "config-r42.yaml"
    parameters.parent.mkdir(parents=True)
    parameters.write_text("wandb_version: 1\n\nsampler.eta:\n  value: 0.5\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s7")
    monkeypatch.setenv("WANDB_RUN_ID", "r42")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    monkeypatch.setenv("WANDB_PROJECT", "the-sweeps")


def runs_of(outputs: Path) -> list[Any]:
    return [read_run(folder) for folder in sorted(outputs.glob("sweeps/*/wandb/offline-run-*"))]


def test_the_agents_run_is_one_and_the_others_are_outside_its_sweep(
    under_an_agent: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(logger="wandb", directory=tmp_path, project="ours")
    with track_cell(config, agents=True, run_config={"steps": 10}) as cell:
        with track(config, job_type="train", name="t", group="sweep", run_config={}) as train:
            train.log({"loss": 2.0}, step=0)
        cell.log({"fd": 3.0}, step=10)
    a, b = read_run(cell.directory), read_run(train.directory)
    assert (a.id, a.sweep, a.project) == ("r42", "s7", "the-sweeps")
    assert a.config == {"steps": 10, "sampler.eta": 0.5}
    assert (b.sweep, b.project, b.config) == ("", "ours", {})
    assert b.id not in ("", "r42")
    assert os.environ["WANDB_RUN_ID"] == "r42"  # for the processes of a launcher
    assert tracking_warnings(caplog) == []


def test_parameters_that_are_gone_cost_nothing_else(under_an_agent: None, config: TrackingConfig) -> None:
    Path(os.environ["WANDB_SWEEP_PARAM_PATH"]).unlink()
    with track_cell(config, agents=True) as run:
        run.log({"fd": 1.0}, step=10)
    read = read_run(run.directory)
    assert (read.id, read.values("fd")) == ("r42", [1.0])


@pytest.mark.slow
def test_of_several_cells_the_report_is_the_agents_run(under_an_agent: None, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    line = ("model=gaussian", "metrics.features=pixels", "steps=2,3", "-m")
    assert tiny.run(outputs, *line, settings=tiny.SMALL) == 0
    runs = runs_of(outputs)
    assert {run.job_type: run.id for run in runs if run.sweep == "s7"} == {"report": "r42"}
    (report,) = (run for run in runs if run.job_type == "report")
    found = read_sweep(tiny.sweeps(outputs)[0]).findings
    assert report.summary["findings"].splitlines()[0] == found.summary
    settled, tested = len(found.settled), len(found.tested)
    assert (report.summary["settled"], report.summary["not_settled"]) == (settled, tested - settled)
    assert len({run.id for run in runs}) == len(runs) == 3


@pytest.mark.slow
def test_the_agent_runs_one_job_and_finds_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own agent, on the command of conf/README.md's sweep: what it does once the server has chosen the values."""
    from wandb.wandb_agent import Agent

    page = (config_folder() / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    sweep = yaml.safe_load(text)
    small = dict(word.split("=") for word in (*tiny.SMALL, "model=gaussian", "metrics.features=pixels"))
    values = {"sampler.eta": 0.5, "sampler.spacing": "trailing", "steps": 3, **small, "outputs_dir": "outputs"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(tracking.__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them in its own process, too
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s7")
    agent = Agent(api=None, queue=None, sweep_id="s7")
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": "r42", "program": sweep["program"], "args": arguments})
    assert agent._run_processes["r42"].wait() == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    (run,) = [run for run in runs_of(tmp_path / "outputs") if run.sweep == "s7"]
    assert (run.id, run.job_type, run.exit_code) == ("r42", "cell", 0)
    assert {name: run.config[name] for name in values} == values
    for metric in (sweep["metric"]["name"], "seconds_per_image"):
        assert run.summary[metric] == run.values(metric)[0] == float(row[metric])
    assert run.summary["sha256"] == row["sha256"]


# --- When W&B fails


@pytest.mark.slow
def test_an_unreachable_server_costs_the_bound_once(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    start = time.monotonic()
    with track_cell(config) as first:
        first.log({"fd": 1.5}, step=10)
    middle = time.monotonic()
    with track_cell(config) as second:
        second.log({"fd": 2.5}, step=25)
    end = time.monotonic()
    assert (first.mode, second.mode) == ("offline", "offline")
    assert 1.5 < middle - start < 8  # it did try
    assert end - middle < 1
    assert read_run(first.directory).values("fd") == [1.5]
    assert read_run(second.directory).values("fd") == [2.5]
    assert len(tracking_warnings(caplog)) == 1
    assert_nowhere(KEY, config.directory)


@pytest.mark.slow
def test_a_server_that_never_answers_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from ddim_lab.jobs.tracking import TrackingConfig, track
config = TrackingConfig(logger="wandb", directory=Path(sys.argv[1]), init_timeout_seconds=1)
with track(config, job_type="cell", name="n", group="g", run_config={}) as run:
    run.log({"fd": 1.5}, step=10)
print(run.mode)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_ERROR_REPORTING")}
        environment |= {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
        )
        seconds = time.monotonic() - start
    assert done.stdout == "offline\n"
    assert KEY not in done.stderr
    assert seconds < 12  # wandb's own error reports would make it 20 more


class _Server(http.server.ThreadingHTTPServer):
    """Takes a run, as W&B would, and from then on keeps everybody waiting."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: list[str] = []
        self.closing = threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/graphql" or b"upsertBucket" not in body:
            self.server.closing.wait()
            return
        name = json.loads(body)["variables"]["name"]
        self.server.runs.append(name)
        project = {"name": "ddim_lab", "entity": {"name": "somebody"}}
        bucket = {"id": "1", "name": name, "displayName": name, "config": "{}", "historyLineCount": 0}
        answer = {"data": {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: object) -> None:
        """Not on the console."""


@pytest.mark.slow
def test_a_server_that_dies_under_the_run_leaves_it_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(logger="wandb", directory=tmp_path / "runs", finish_timeout_seconds=2)
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        with track_cell(config) as first:
            first.log({"fd": 1.5}, step=10)
            assert first.mode == "online"
            assert len(server.runs) == 1
            start = time.monotonic()
        with track_cell(config) as second:
            second.log({"fd": 2.5}, step=25)
        assert time.monotonic() - start < 8
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
    assert (first.mode, second.mode) == ("offline", "offline")
    assert read_run(first.directory).values("fd") == [1.5]
    assert read_run(second.directory).values("fd") == [2.5]
    assert len(tracking_warnings(caplog)) == 1
    assert str(first.directory) in (offline_sync_hint([first.directory, second.directory]) or "")
    assert_nowhere(KEY, config.directory)


def test_a_dead_helper_process_costs_one_run(config: TrackingConfig, caplog: pytest.LogCaptureFixture) -> None:
    import wandb

    with track_cell(config) as first:
        helper = wandb.setup().ensure_service()._proc._process
        helper.send_signal(signal.SIGKILL)
        helper.wait()
        for step in range(3):
            first.log({"fd": 1.0}, step=step)
        first.summary({"fd": 1.0})
    assert len(tracking_warnings(caplog)) == 1
    with track_cell(config) as second:
        second.log({"fd": 2.5}, step=25)
    assert read_run(second.directory).values("fd") == [2.5]
    assert len(tracking_warnings(caplog)) == 1


def test_an_artifact_is_neither_copied_nor_changed(config: TrackingConfig, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "raw").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "raw" / "weights.safetensors").write_bytes(b"w" * 1000)
    with track_cell(config, job_type="train") as maker:
        maker.artifact(folder, "digits-model", "model", "output", {"key": "ab"})
    with track_cell(config) as user:
        user.artifact(folder, "digits-model", "model", "input", {"key": "ab"})
    (made,), (used,) = read_run(maker.directory).artifacts, read_run(user.directory).artifacts
    assert (made.used, used.used) == (False, True)
    assert (made.digest, made.name, made.metadata) == (used.digest, used.name, {"key": "ab"})
    assert made.files == {name: folder / name for name in ("config.json", "raw/weights.safetensors")}
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and b"w" * 1000 in path.read_bytes()]
    assert copies == [folder / "raw" / "weights.safetensors"]


def test_of_a_large_folder_the_small_files_go(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "UPLOAD_AT_MOST", 2000)
    monkeypatch.setattr(tracking, "SMALL_FILE", 100)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"w" * 3000)
    with track_cell(config, job_type="train") as run:
        run.artifact(tmp_path / "model", "digits-model", "model", "output", {})
    (made,) = read_run(run.directory).artifacts
    assert list(made.files) == ["config.json"]
    assert made.metadata == {"left_out": ["weights.safetensors"]}


def test_what_wandb_refuses_is_a_warning(config: TrackingConfig, caplog: pytest.LogCaptureFixture) -> None:
    with track_cell(config) as run:
        run.log({"fd": 1.5}, step=10)
        run.image("samples", Path("no such picture.png"))
        run.image("samples", b"no picture")
    read = read_run(run.directory)
    assert read.values("fd") == [1.5]
    assert read.exit_code == 0
    assert len(tracking_warnings(caplog)) == 1


def test_a_run_that_cannot_start_is_a_warning(config: TrackingConfig, caplog: pytest.LogCaptureFixture) -> None:
    refused = TrackingConfig(logger="wandb", directory=config.directory, project="no/such#project")
    with track_cell(refused) as run:
        run.log({"fd": 1.5}, step=10)
    assert run.mode == "off"
    assert len(tracking_warnings(caplog)) == 1


# --- Beside it


def test_sync_hint(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    runs = [folder / f"offline-run-2026-{name}" for name in "ab"]
    cut_short = folder / "run-2026-c"
    for run in [*runs, cut_short]:
        run.mkdir(parents=True)
    assert offline_sync_hint([]) is None
    assert offline_sync_hint(runs[:1]) == f"wandb sync '{runs[0]}'"
    assert offline_sync_hint(runs) == f"wandb sync '{folder}'/offline-run-*"
    assert (
        offline_sync_hint([*runs, cut_short]) == f"wandb sync --include-online '{folder}'/offline-run-* '{cut_short}'"
    )
