"""Many processes on one outputs folder: one training, every cell once, nothing damaged."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import tiny

from ddim_lab.device.ranks import devices_of_ranks
from ddim_lab.device.runtime import Runtime
from ddim_lab.store import Store, read_record
from ddim_lab.store.__main__ import main as housekeeping

LINE = (
    *("training.max_steps=6", "training.warmup_steps=0", "training.batch_size=8", "model.block_out_channels=[8,8]"),
    *("model.attention=[false,false]", "metrics.features=pixels", "num_samples=24", "batch_size=8", "logger=csv"),
    *("sampler.eta=0.5", "steps=2,3", "-m"),
)


@pytest.mark.slow
def test_eight_processes_that_start_together(tmp_path: Path) -> None:
    assert tiny.run(tmp_path / "alone", *LINE, settings=()) == 0  # all that is imported is, before the forks
    outputs = tmp_path / "outputs"
    begin = time.monotonic() + 0.5

    def run() -> int:
        time.sleep(max(0.0, begin - time.monotonic()))
        return tiny.run(outputs, *LINE, settings=())

    logs = [tmp_path / f"{number}.log" for number in range(8)]
    children = [forked.start(run, log) for log in logs]
    statuses = [forked.wait(child) for child in children]
    assert statuses == [0] * 8, [log.read_text() for log in logs]
    assert sum(log.read_text().count("training the eps-model") for log in logs) == 1
    pointers = [read_record(path) for path in outputs.glob("sweeps/*/jobs/*/pointer.json")]
    assert len(pointers) == 16
    built = [pointer["cell"] for pointer in pointers if not pointer["cached"]]
    assert len(built) == len(set(built)) == 2
    assert {pointer["cell"] for pointer in pointers} == set(built)
    expected = tiny.numbers(tiny.sweeps(tmp_path / "alone")[0])
    for sweep in tiny.sweeps(outputs):
        assert tiny.numbers(sweep) == expected
    assert len(tiny.sweeps(outputs)) == 8
    assert housekeeping(["verify", "--outputs-dir", str(outputs)]) == 0
    assert not [path for kind in ("models", "references", "cells") for path in (outputs / kind).glob(".*")]


def _take(root: Path, names: list[str], log: Path) -> None:
    with Store(root).one_of(names, waiting_for="a GPU") as name:
        started = time.monotonic()
        time.sleep(0.3)
        with log.open("a") as file:
            file.write(f"{name} {started} {time.monotonic()}\n")


def test_jobs_side_by_side_take_one_gpu_each(tmp_path: Path) -> None:
    names = ["gpu-a", "gpu-b"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take, args=(tmp_path, names, tmp_path / "log")) for _ in range(5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    taken = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(taken) == 5
    assert {name for name, _, _ in taken} == set(names)
    for name in names:
        spans = sorted((float(start), float(stop)) for used, start, stop in taken if used == name)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_ranks_take_gpus_that_no_other_job_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of four: the job has cuda:2, another one cuda:0."""
    store, theirs = Store(tmp_path), Store(tmp_path)
    runtime = replace(Runtime.resolve(tiny.configure("runtime.device=cpu").runtime), device="cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device.index}"))
    other = replace(runtime, device="cuda:0")
    with theirs.one_of([other.job_lock], waiting_for=""), store.one_of([runtime.job_lock], waiting_for=""):
        for count, sampled, trained in [
            (2, ["cuda:2", "cuda:1"], ["cuda:2", "cuda:1"]),
            (4, ["cuda:2", "cuda:1", "cuda:3"], ["cuda:2", "cuda:1", "cuda:3", "cuda:0"]),
        ]:
            with devices_of_ranks(store, runtime, count) as devices:
                assert devices == sampled
                with devices_of_ranks(theirs, other, 4) as others:
                    assert others == (["cuda:0", "cuda:3"] if count == 2 else ["cuda:0"])
            with devices_of_ranks(store, runtime, count, all_of_them=True) as devices:
                assert devices == trained
    with devices_of_ranks(store, replace(runtime, device="cpu"), 3) as devices:
        assert devices == ["cpu"] * 3
