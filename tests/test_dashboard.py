"""The dashboard: what it would create, panel by panel, and what it sends to a server."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import wandb
from wandb_offline import read_run

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")

from ddim_lab.dashboard import main, parts, workspace


def config_of(panel: Any) -> dict[str, Any]:
    found: dict[str, Any] = panel._to_model().model_dump(by_alias=True, exclude_none=True)["config"]
    return found


def test_fd_is_drawn_over_steps_by_row_of_the_table() -> None:
    quality = next(part for part in parts() if part.name == "Quality")
    lines = config_of(quality.panels[0])
    assert (lines["xAxis"], lines["metrics"]) == ("steps", ["fd"])
    assert (lines["groupBy"], lines["aggregate"]) == ("row.value", True)  # where W&B keeps the config's `row`
    assert lines["xLogScale"]
    assert lines["yLogScale"]
    front = config_of(quality.panels[1])
    assert (front["xAxis"], front["yAxis"]) == ("summary:seconds_per_image", "summary:fd")


def test_the_workspace_has_every_part() -> None:
    view = workspace("somebody", "ddim_lab")._to_model()
    sections = view.spec.section.panel_bank_config.sections
    assert [section.name for section in sections] == [part.name for part in parts()]
    assert (view.entity, view.project) == ("somebody", "ddim_lab")
    assert all(section.panels for section in sections)


@pytest.mark.slow
def test_every_panel_shows_what_a_sweep_logs(tmp_path: Path) -> None:
    """A panel of a metric that no run has would stay empty: compare with the files of a real sweep."""
    settings = (*tiny.TINY, "metrics.features=pixels")
    assert tiny.run(tmp_path, "sampler=ddim,ddpm_large", "steps=3,5", "-m", settings=settings) == 0
    runs = [read_run(folder) for folder in sorted((tiny.sweeps(tmp_path)[0] / "wandb").glob("offline-run-*"))]
    assert {run.config["row"] for run in runs if run.job_type == "cell"} == {"η 0", "σ̂"}
    for part in parts():
        logged: set[str] = set()
        for run in runs:
            if run.job_type == part.job_type:
                logged |= {key for row in run.history for key in row} | set(run.summary)
        assert logged, part.name
        for panel in part.panels:
            keys = set(re.findall(r"[\w/]+", json.dumps(wanted(panel))))
            assert all(any(key in (name, name.partition(".")[0]) for name in logged) for key in keys), (keys, logged)


def wanted(panel: Any) -> list[Any]:
    """The names of runs' values that a panel shows."""
    kind = type(panel).__name__
    if kind == "LinePlot":
        return [panel.x.name, *(metric.name for metric in panel.y)]
    if kind == "ScatterPlot":
        return [panel.x.name, panel.y.name]
    return list(panel.media_keys) if kind == "MediaBrowser" else [panel.table_name]


# the command


class _Server(http.server.ThreadingHTTPServer):
    """Answers as W&B does to somebody who is logged in, and keeps what is to be saved."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.saved: list[dict[str, Any]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(body) if self.path == "/graphql" else {}
        if "upsertView" in asked.get("query", ""):
            self.server.saved.append(asked["variables"])
        somebody = {"id": "1", "name": "n", "username": "somebody", "email": "", "admin": False, "entity": "somebody"}
        none: dict[str, Any] = {"edges": []}
        somebody |= {"flags": "{}", "deletedAt": None, "apiKeys": none, "teams": none}
        project = {"id": "1", "internalId": "1", "name": "ddim_lab", "entityName": "somebody"}
        node = {**project, "createdAt": "", "isBenchmark": False, "user": somebody}
        page = {"endCursor": "", "hasNextPage": False}
        data = {
            "viewer": somebody,
            "project": project,
            "models": {"edges": [{"node": node, "cursor": ""}], "pageInfo": page},
            "upsertView": {"view": {"id": "view1", "name": "view1"}, "inserted": True},
        }
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Not on the console."""


@pytest.fixture
def server() -> Iterator[_Server]:
    running = _Server()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def command(base_url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": base_url, "WANDB_MODE": "online"}
    return subprocess.run(
        [sys.executable, "-m", "ddim_lab.dashboard", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_what_is_sent_holds_every_panel(server: _Server) -> None:
    done = command(f"http://127.0.0.1:{server.server_port}", "somebody/ddim_lab")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr
    view, text = server.saved[-2:]
    assert (view["type"], text["type"]) == ("project-view", "runs")
    titles = [title for part in parts() for panel in part.panels if (title := getattr(panel, "title", None))]
    for saved in (view, text):
        assert (saved["entityName"], saved["projectName"]) == ("somebody", "ddim_lab")
        panels = saved["spec"]
        assert [title for title in titles if title not in panels] == []
    assert all(f'"value": "{part.job_type}"' in text["spec"].replace('":"', '": "') for part in parts())


def test_without_an_account_it_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    wandb.teardown()  # what an earlier test was logged in as
    assert main(["somebody/ddim_lab"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "wandb login" in err


@pytest.mark.parametrize("project", ["ddim_lab", "a/b/c", "/b", "a/"])
def test_what_is_no_project_is_one_line(capsys: pytest.CaptureFixture[str], project: str) -> None:
    assert main([project]) == 2
    assert "is no ENTITY/PROJECT" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['wandb_workspaces'] = None; import ddim_lab.dashboard as d; sys.exit(d.main(['a/b']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "ddim_lab: wandb-workspaces is not installed: pip install 'ddim-lab[dashboard]'\n"
