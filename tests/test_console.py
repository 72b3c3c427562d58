"""What a command prints: progress in a log, and outputs that are not UTF-8, full, closed or not there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from ddim_lab import console
from ddim_lab.console import Progress, forgiving_output, show_progress, tick


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands until `now` is set; progress is as its default has it."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(console, "_mode", "auto")
    return found


def test_a_log_has_a_line_every_thirty_seconds_at_most(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("[3/9] ddim eta=0 S=50", 1437, "image", done=256) as progress:
        for clock.now in (10.0, 20.0, 29.9):
            tick()
        assert capsys.readouterr().err == ""
        clock.now = 31.0
        tick()
        tick()
        assert capsys.readouterr().err == "[3/9] ddim eta=0 S=50: 256 of 1,437 images, 4 forwards into the next\n"
        clock.now = 64.0
        progress.note("loss 0.1")
        progress.update(256)
        assert (
            capsys.readouterr().err == "[3/9] ddim eta=0 S=50: 512 of 1,437 images, 4 images/s, 4 min left, loss 0.1\n"
        )
    tick()
    assert capsys.readouterr().err == ""


def test_what_took_longer_than_all_others_will_is_left_out_of_the_rate(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first training step compiles for minutes: by its time the rest would take days."""
    with Progress("training", 102, "step") as progress:
        clock.now = 150.0
        progress.update(in_rate=False)
        assert capsys.readouterr().err == "training: 1 of 102 steps\n"
        clock.now = 200.0
        progress.update(50)
    assert capsys.readouterr().err == "training: 51 of 102 steps, 1 steps/s, 51 s left\n"


def test_the_innermost_work_is_told(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("outer", 2, "list"), Progress("inner", 5, "walk"):
        clock.now = 40.0
        tick()
    assert capsys.readouterr().err == "inner: 0 of 5 walks, 1 forwards into the next\n"


@pytest.mark.parametrize(
    ("mode", "terminal", "shown"),
    [
        ("auto", False, "lines"),
        ("auto", True, "bar"),
        ("lines", True, "lines"),
        ("bar", False, "bar"),
        ("none", True, ""),
    ],
)
def test_what_shows_progress(
    mode: Any, terminal: bool, shown: str, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    err = io.StringIO()
    err.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", err)
    show_progress(mode)
    with Progress("work", 4, "image") as progress:
        clock.now = 31.0
        progress.update(2)
    told = err.getvalue()
    assert ("work: 2 of 4 images," in told) == (shown == "lines")
    assert ("\r" in told) == (shown == "bar")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "η 0 → 4.67 ± 0.05"),
        ("ascii", "eta 0 -> 4.67 +- 0.05"),
        ("latin-1", "eta 0 -> 4.67 ± 0.05"),
        ("cp1252", "eta 0 -> 4.67 ± 0.05"),
        ("cp437", "eta 0 -> 4.67 ± 0.05"),
    ],
)
def test_what_an_encoding_lacks_is_said_in_its_characters(
    encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with forgiving_output():
        print("η 0 → 4.67 ± 0.05")
    assert written.getvalue().decode(encoding) == f"{expected}\n"


def test_a_reader_who_has_left_and_a_full_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    full = "ddim_lab: stdout can't be written (No space left on device); the files are\n"
    for number, told in ((writing, ""), (os.open("/dev/full", os.O_WRONLY), full)):
        with os.fdopen(number, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with forgiving_output():
                for _ in range(3):
                    print("a" * 10_000, flush=True)
        assert capsys.readouterr().err == told


def test_outputs_that_were_closed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with forgiving_output():
        print("nobody reads this")
        assert not sys.stderr.isatty()
        with Progress("work", 1, "image") as progress:
            progress.update()


@pytest.mark.slow
def test_no_output_costs_a_cell(tmp_path: Path) -> None:
    """Help in ASCII; a sweep whose stderr is closed and whose stdout is full."""
    command = [sys.executable, "-m", "ddim_lab"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([*command, "--help"], capture_output=True, env=ascii_only, check=True)
    assert b"ddim_lab: one eps-model is trained once" in shown.stdout
    assert shown.stderr == b""
    arguments = [*tiny.SMALL, "model=gaussian", "metrics.features=pixels", "steps=2", "logger=csv"]
    line = subprocess.list2cmdline([*command, *arguments, f"outputs_dir={tmp_path}"])
    assert subprocess.run(f"{line} >/dev/full 2>&-", shell=True, env=ascii_only, check=False).returncode == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path)[0])
    assert row["status"] == "done"
