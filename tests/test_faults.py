"""What goes wrong under way: a clear line, a hole in the report, the other cells, an exit status that is not 0."""

from __future__ import annotations

import ctypes
import html
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor, nn

from ddim_lab.data.disk import root_of
from ddim_lab.data.images import NonFiniteError
from ddim_lab.device.memory import Halving
from ddim_lab.device.ranks import on_ranks
from ddim_lab.errors import TERMINATED, ConfigError, Terminated, terminable, terminating
from ddim_lab.models.obtain import Model
from ddim_lab.models.training import DiffusionModule
from ddim_lab.noise import NamedNoise
from ddim_lab.report import build
from ddim_lab.report.drawing import chart_library
from ddim_lab.sampler import Ddim, Sampler, Transition
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.tasks.walks import sample_uint8

EXACT = ("model=gaussian", "metrics.features=pixels", "logger=csv")


def swept(outputs: Path) -> list[dict[str, str]]:
    """The rows of the last sweep; each hole is on the page, too."""
    sweep = tiny.sweeps(outputs)[-1]
    page = html.unescape((sweep / "report.html").read_text(encoding="utf-8"))
    rows = tiny.results(sweep)
    for row in rows:
        assert row["status"] == "done" or row["error"][:40] in page
    return rows


# -- the disk ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    """No file may exceed 3 MB: the chunk of 30,000 samples does."""
    line = (*EXACT, "num_samples=44,30000,50", "batch_size=10000", "steps=2", "-m")

    def run() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
        return tiny.run(tmp_path / "outputs", *line, settings=())

    status, printed = forked.run(run, tmp_path / "log")
    assert status == 1, printed
    assert "Traceback" not in printed
    rows = swept(tmp_path / "outputs")
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "File too large" in rows[1]["error"]
    assert not [path for path in (tmp_path / "outputs" / "cells").iterdir() if path.name.startswith(".")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MB."""
    place = tmp_path / "small"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("only root may mount")
    try:
        yield place
    finally:
        libc.umount2(bytes(place), 2)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_done(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = small_disk / "outputs"
    assert tiny.run(tmp_path / "outputs", *EXACT, "steps=2,3", "-m", settings=tiny.SMALL) == 0
    whole = tiny.numbers(tiny.sweeps(tmp_path / "outputs")[0])
    capsys.readouterr()
    (small_disk / "filler").write_bytes(bytes(900_000))
    assert tiny.run(outputs, *EXACT, "steps=2,3", "-m", settings=tiny.SMALL) == 1
    printed = capsys.readouterr().err
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    (small_disk / "filler").unlink()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"tmpfs", bytes(small_disk), b"tmpfs", 32, b"size=64m") == 0
    assert tiny.run(outputs, *EXACT, "steps=2,3", "-m", settings=tiny.SMALL) == 0
    assert tiny.numbers(tiny.sweeps(outputs)[-1]) == whole


def test_a_folder_that_may_no_longer_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a share is mounted read-only while a sweep runs; root may write everywhere, so a file is in the way."""
    outputs = tmp_path / "outputs"
    original = Sampler.sample

    def lose(sampler: Sampler, *arguments: Any, **named: Any) -> Tensor:
        if sampler.steps == 3 and (outputs / "cells").is_dir():
            (outputs / "cells").rename(outputs / "moved")
            (outputs / "cells").touch()
        return original(sampler, *arguments, **named)

    monkeypatch.setattr(Sampler, "sample", lose)
    assert tiny.run(outputs, *EXACT, "steps=2,3,4", "-m", settings=tiny.SMALL) == 1
    assert [row["status"] for row in tiny.results(tiny.sweeps(outputs)[0])] == ["missing", "failed", "failed"]
    (outputs / "cells").unlink()
    (outputs / "moved").rename(outputs / "cells")
    assert tiny.run(outputs, *EXACT, "steps=2", settings=tiny.SMALL) == 0
    assert swept(outputs)[0]["cached"] == "True"


# -- numbers that are none ------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """An eps-model that gives NaN at one timestep."""

    def __init__(self, network: nn.Module, at: int) -> None:
        super().__init__()
        self.network, self.at = network, at

    def forward(self, x: Tensor, t: Tensor) -> Any:
        output = self.network(x, t)
        return output * float("nan") if int(t[0]) == self.at else output


@pytest.mark.parametrize("task", ["generate", "consistency", "reconstruct", "interpolate", "trajectory"])
def test_images_that_are_not_finite_name_the_step(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Model.__init__

    def poison(self: Model, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        whole = self.load
        object.__setattr__(self, "load", lambda: Poisoned(whole(), at=500))

    monkeypatch.setattr(Model, "__init__", poison)
    line = (*EXACT, f"task={task}", "steps=3,4", "-m")
    assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == 1
    rows = swept(tmp_path)
    # uniform, 3 steps: 666, 333, 0; 4 steps: 750, 500, 250, 0
    if task != "consistency":  # its reference visits every timestep
        assert [row["status"] for row in rows] == ["done", "failed"]
    assert "NaN or infinite values, first in the network's output at step" in rows[1]["error"]
    assert "(t = 500)" in rows[1]["error"]


def test_only_what_is_not_finite_is_called_diverged() -> None:
    sampler, indices = Sampler(NoiseSchedule.linear(), steps=2), torch.arange(3)

    def sampled(network: nn.Module) -> Tensor:
        return sample_uint8(sampler, network, indices, (1, 4, 4), NamedNoise(0), torch.device("cpu"))

    with pytest.raises(ValueError, match=r"returned shape \(3, 0, 4, 4\)") as wrong:
        sampled(Function(lambda x: x[:, :0]))
    assert not isinstance(wrong.value, NonFiniteError)
    assert "diverged" not in str(wrong.value)
    with pytest.raises(NonFiniteError, match=r"at step 1 \(t = 500\).* diverged on this model"):
        sampled(Function(lambda x: x * float("inf")))


class Function(nn.Module):
    """A model of the state alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x)


def test_a_state_that_overflows_names_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ddim.step

    def overflow(self: Ddim, transition: Transition, *others: Any) -> Tensor:
        x = original(self, transition, *others)
        return x * float("inf") if transition.t == 250 else x

    monkeypatch.setattr(Ddim, "step", overflow)
    assert tiny.run(tmp_path, *EXACT, "steps=4", settings=tiny.SMALL) == 1
    assert "first after step 3 (t = 250)" in swept(tmp_path)[0]["error"]


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DiffusionModule.training_step

    def poisoned(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return step(self, batch, batch_idx) * (float("nan") if self.global_step + 1 == 7 else 1.0)

    monkeypatch.setattr(DiffusionModule, "training_step", poisoned)
    assert tiny.run(tmp_path, "metrics.features=pixels", "logger=csv", "steps=2") == 1
    assert swept(tmp_path)[0]["error"] == "the training loss is nan at step 7"


# -- data that go away ----------------------------------------------------------------------------------


def test_an_image_that_goes_missing_in_mid_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    data = ("data=image_folder", f"data.root={folder}", "data.image_size=8", "data.channels=1")
    line = (*data, "metrics.features=pixels", "logger=csv", "steps=2", "num_samples=8", "batch_size=8")
    unet = (
        *("training.max_steps=3", "training.warmup_steps=0", "training.batch_size=4"),
        *("model.block_out_channels=[8,8]", "model.attention=[false,false]", "model.norm_num_groups=4"),
    )
    gone = folder / "07.png"
    original = DiffusionModule.training_step

    def lose(self: DiffusionModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        gone.unlink(missing_ok=True)
        return original(self, batch, batch_idx)

    content = gone.read_bytes()
    state = gone.stat()
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", lose)
        patch.setattr("ddim_lab.data.loaders.MOST_WORKERS", 0)
        assert tiny.run(tmp_path / "outputs", *line, *unet, settings=()) == 1
    error = swept(tmp_path / "outputs")[0]["error"]
    assert "07.png can't be read" in error or "07.png" in error
    gone.write_bytes(content)
    os.utime(gone, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert tiny.run(tmp_path / "outputs", *line, *unet, settings=()) == 0


# -- memory ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network on a device that has room for so many images."""

    def __init__(self, network: nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room = network, room
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.seen.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.network(x, t)


def test_a_batch_halves_itself_until_it_fits() -> None:
    small = Small(_Shift(), room=5)
    halving = Halving(small)
    x, t = torch.randn(18, 1, 2, 2), torch.arange(18)
    assert torch.equal(halving(x, t), _Shift()(x, t))
    assert halving.at_most == 5
    assert small.seen == [18, 9, 5, 5, 5, 3]
    small.seen.clear()
    assert torch.equal(halving(x, t), _Shift()(x, t))
    assert small.seen == [5, 5, 5, 3]  # it remembers


class _Shift(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t.view(-1, 1, 1, 1)


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of memory with a single image a forward: CUDA out of memory"):
        Halving(Small(_Shift(), room=0))(torch.zeros(3, 1, 2, 2), torch.zeros(3))


def test_out_of_memory_changes_no_noise_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (*EXACT, "sampler=ddpm", "steps=3", "batch_size=16")
    assert tiny.run(tmp_path / "roomy", *line, settings=tiny.SMALL) == 0
    original = Model.__init__

    def shrink(self: Model, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        whole = self.load
        object.__setattr__(self, "load", lambda: Small(whole(), room=4))

    monkeypatch.setattr(Model, "__init__", shrink)
    assert tiny.run(tmp_path / "small", *line, settings=tiny.SMALL) == 0
    assert "out of memory with 8 images a forward: 4 from here on, same noise" in capsys.readouterr().err
    roomy, small = tiny.sweeps(tmp_path / "roomy")[0], tiny.sweeps(tmp_path / "small")[0]
    (first,), (second,) = tiny.numbers(roomy), tiny.numbers(small)
    assert (first.pop("forward_images"), second.pop("forward_images")) == ("16", "4")
    assert first == second  # SHA-256 of the images included


def test_no_memory_names_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        return torch.from_numpy(np.empty(2**55))

    monkeypatch.setattr(Sampler, "sample", refuse)
    assert tiny.run(tmp_path, *EXACT, "steps=2", settings=tiny.SMALL) == 1
    assert swept(tmp_path)[0]["error"].endswith("lower batch_size, or num_samples")


# -- what a machine lacks -------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_home_and_no_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run as a user of the host's."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "DDIM_LAB_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[f"getpwuid(): uid not found: {uid}"])
    chart_library.cache_clear()
    monkeypatch.chdir(tmp_path)
    assert tiny.run(tmp_path / "outputs", *EXACT, "steps=2,3", "-m", settings=tiny.SMALL) == 0
    assert [row["status"] for row in swept(tmp_path / "outputs")] == ["done", "done"]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    with pytest.raises(ConfigError, match=r"there is no home folder; .* set data.root, or \$DDIM_LAB_DATA"):
        root_of(tiny.configure("data=cifar10").data)


@pytest.mark.parametrize("broken", ["ddim_lab.report.files.page", "ddim_lab.jobs.run.static_charts"])
def test_a_report_that_can_not_be_drawn_costs_no_cell(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("no fonts")

    line = (*EXACT[:2], "steps=2", "logger=wandb")
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == int("page" in broken)
    (sweep,) = tiny.sweeps(tmp_path)
    said = (
        "no report: KeyError: 'no fonts'; the cells are kept, python -m ddim_lab.report"
        if "page" in broken
        else ("the report is not mirrored in W&B: KeyError: 'no fonts'")
    )
    assert f"ddim_lab: {said}" in capsys.readouterr().err
    build(sweep)
    assert swept(tmp_path)[0]["status"] == "done"


@pytest.mark.parametrize(
    "choice", ["job_logging=disabled", "job_logging=none", "job_logging=stdout", "hydra_logging=none"]
)
def test_hydras_own_choices_of_a_log_fail_no_cell(choice: str, tmp_path: Path) -> None:
    def run() -> int:
        return tiny.run(tmp_path / "outputs", *EXACT, "steps=2", f"hydra/{choice}", settings=tiny.SMALL)

    status, printed = forked.run(run, tmp_path / "log")  # in a fork: what is disabled would stay so
    assert status == 0, printed
    assert [row["status"] for row in swept(tmp_path / "outputs")] == ["done"]
    assert ("[1/1] ddim" in printed) == (choice in ("job_logging=stdout", "hydra_logging=none"))


def test_a_folder_beside_the_jobs_ends_no_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    line = (*EXACT, "steps=2,3", "-m", f"hydra.sweep.dir={folder}")
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    shutil.copytree(folder / "jobs" / "0", folder / "jobs" / "0 copy")
    assert tiny.run(tmp_path / "outputs", *line, "force=true", settings=tiny.SMALL) == 0


# -- Ctrl-C and SIGTERM ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)
@pytest.mark.parametrize("phase", ["training", "sampling"])
def test_a_signal_stops_within_seconds_and_says_how_to_go_on(
    phase: str, number: signal.Signals, status: int, word: str, tmp_path: Path
) -> None:
    outputs, busy = tmp_path / "outputs", tmp_path / "busy"
    line = ("metrics.features=pixels", "logger=csv", "steps=2,3", "-m", "checkpoint_seconds=0.000001")

    def run() -> int:
        with pytest.MonkeyPatch.context() as patch:
            if phase == "training":
                slow, name = DiffusionModule, "training_step"
            else:
                slow, name = Sampler, "sample"
            original = getattr(slow, name)

            def slowly(self: Any, *arguments: Any, **named: Any) -> Any:
                if phase == "training" or self.steps == 3:
                    busy.touch()
                    time.sleep(1.0)
                return original(self, *arguments, **named)

            patch.setattr(slow, name, slowly)
            return tiny.run(outputs, *line)

    child = forked.start(run, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not busy.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    asked = time.monotonic()
    os.kill(child, number)
    assert forked.wait(child) == status, (tmp_path / "log").read_text()
    assert time.monotonic() - asked < 20
    printed = (tmp_path / "log").read_text()
    assert printed.count(f"{word}; the same command goes on from what is done") == 1
    assert "Traceback" not in printed
    rows = tiny.results(tiny.sweeps(outputs)[0])
    assert [row["status"] for row in rows] == (["missing"] * 2 if phase == "training" else ["done", "missing"])
    assert (tiny.sweeps(outputs)[0] / "report.html").is_file()
    assert tiny.run(outputs, *line) == 0
    assert [row["cached"] for row in swept(outputs)] == (["False"] * 2 if phase == "training" else ["True", "False"])
    shutil.rmtree(outputs)


@pytest.mark.slow
def test_ranks_do_not_outlive_a_command_that_is_terminated(tmp_path: Path) -> None:
    """They would be waited for at its end, however long they work."""

    def run() -> int:
        with terminable():
            try:
                on_ranks(2, forked.linger, tmp_path)
            except Terminated:
                for left in (ranks := active_children()):  # as Python does at its end, but not for as long as it takes
                    left.join(20)
                return 1 if any(left.is_alive() for left in ranks) else TERMINATED
        return 0

    child = forked.start(run, tmp_path / "log")
    deadline = time.monotonic() + 120
    while len(ranks := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    assert forked.wait(child) == 143, (tmp_path / "log").read_text()
    deadline = time.monotonic() + 20
    while any(_state(rank) not in ("Z", None) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_signal_does_not_cut_short_what_the_first_one_began() -> None:
    """Schedulers repeat themselves: the report that follows from the first SIGTERM is built to its end."""
    with terminable():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        assert terminating()
        os.kill(os.getpid(), signal.SIGTERM)
    assert not terminating()
    with terminable(), pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)


def _state(process: int) -> str | None:
    """A process's state as Linux has it; None where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
