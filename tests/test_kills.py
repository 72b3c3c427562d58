"""kill -9 at any moment, the same command again: the numbers of a run that nothing disturbed.

A moment is named by what the run has written: the n-th time that it opens a file for writing, renames or removes one.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny

import ddim_lab.jobs.run
from ddim_lab.store.objects import KINDS

pytestmark = pytest.mark.slow

LINE = (
    *("training.max_steps=6", "training.warmup_steps=0", "training.checkpoint_every=2", "training.batch_size=8"),
    *("model.block_out_channels=[8,8]", "model.attention=[false,false]", "metrics.features=pixels"),
    *("metrics.kid=false", "metrics.precision_recall=false", "metrics.density_coverage=false"),
    *("metrics.memorisation=false", "metrics.mmd=false", "metrics.speed_repeats=1"),
    *("num_samples=24", "batch_size=8", "checkpoint_seconds=0.000001", "sampler.eta=0.5", "steps=2,3", "-m"),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

PHASES = {
    "plan": r"sweeps/[^/]+/\.?plan",
    "training": r"models/[0-9a-f]{64}\.partial",
    "model": r"models/",
    "references": r"references/",
    "sampling": r"samples/",
    "scoring": r"cells/",
    "pointer": r"sweeps/[^/]+/jobs/",
    "tables": r"sweeps/[^/]+/\.?(results|table)",
    "page": r"sweeps/[^/]+/\.?report",
    "W&B": r"sweeps/[^/]+/wandb",
}
"""Of a sweep, by the first of these that the path of a write matches."""


def phase(path: str) -> str | None:
    return next((name for name, pattern in PHASES.items() if re.match(pattern, path)), None)


def watched(outputs: Path, act: Callable[[int, str], None], logger: str) -> int:
    """The sweep in this process; `act` is called with number and path before each write under `outputs`."""
    count = 0
    prefix = f"{outputs}/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree"):
            path = arguments[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if path.startswith(prefix):
            act(count, path.removeprefix(prefix))
            count += 1

    sys.addaudithook(hook)
    return again(outputs, logger)


def again(outputs: Path, logger: str) -> int:
    """The sweep, in a fork: without charts as PNG for W&B, whose renderer does not survive a fork."""
    ddim_lab.jobs.run.static_charts = lambda sweep: {}
    return tiny.run(outputs, *LINE, f"logger={logger}", settings=())


def moments(outputs: Path, log: Path, logger: str) -> list[tuple[int, str]]:
    """(number, phase) of every write of an undisturbed sweep."""
    found = log.with_suffix(".moments")

    def note(number: int, path: str) -> None:
        if (name := phase(path)) is not None:
            os.write(descriptor, f"{number} {name}\n".encode())

    descriptor = os.open(found, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    status, printed = forked.run(lambda: watched(outputs, note, logger), log)
    assert status == 0, printed
    return [(int(number), name) for number, name in (line.split(" ", 1) for line in found.read_text().splitlines())]


def spread(chosen: list[int], count: int) -> list[int]:
    """`count` of them, the last included; not the first, before which is after the last of another phase."""
    return [chosen[round(i * (len(chosen) - 1) / count)] for i in range(1, count + 1)]


def killed(outputs: Path, at: int, log: Path, logger: str) -> int:
    def kill(number: int, path: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return forked.start(lambda: watched(outputs, kill, logger), log)


@pytest.mark.timeout(900)
def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    # Everything is imported once, here: forks have it.
    assert tiny.run(tmp_path / "warm", *LINE, "logger=csv", settings=()) == 0
    seen = moments(whole, tmp_path / "whole.log", "csv")
    expected = tiny.numbers(tiny.sweeps(whole)[0])
    assert [row["status"] for row in expected] == ["done", "done"]
    by_phase = {name: [number for number, at in seen if at == name] for name in PHASES if name != "W&B"}
    assert all(by_phase.values()), by_phase
    count = {"training": 3, "sampling": 3, "model": 2, "references": 2, "scoring": 2, "pointer": 2}
    chosen = sorted({n for name, numbers in by_phase.items() for n in spread(numbers, count.get(name, 1))})
    assert len(chosen) >= 16
    for first in range(0, len(chosen), 2):
        check({number: tmp_path / f"at{number}" for number in chosen[first : first + 2]}, "csv", expected)


def check(places: dict[int, Path], logger: str, expected: list[dict[str, str]]) -> None:
    """Kill sweeps at a write each, side by side; run them again; compare."""
    logs = {number: outputs.with_suffix(".log") for number, outputs in places.items()}
    children = {number: killed(outputs, number, logs[number], logger) for number, outputs in places.items()}
    for number, child in children.items():
        assert forked.wait(child) == -signal.SIGKILL, logs[number].read_text()

    children = {
        number: forked.start(partial(again, outputs, logger), logs[number]) for number, outputs in places.items()
    }
    for number, outputs in places.items():
        assert forked.wait(children[number]) == 0, (number, logs[number].read_text())
        assert tiny.numbers(tiny.sweeps(outputs)[-1]) == expected, number
        left = [path.name for kind in KINDS for path in (outputs / kind).iterdir()]
        assert all(re.fullmatch("[0-9a-f]{64}", name) for name in left), (number, left)


def test_killed_as_it_writes_to_wandb(tmp_path: Path) -> None:
    seen = moments(tmp_path / "whole", tmp_path / "whole.log", "wandb")
    expected = tiny.numbers(tiny.sweeps(tmp_path / "whole")[0])
    numbers = [number for number, at in seen if at == "W&B"]
    check({numbers[len(numbers) // 2]: tmp_path / "again"}, "wandb", expected)
