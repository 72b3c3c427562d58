"""Benchmark, peers and precision: what is timed is the same work, and the numbers are what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from ddim_lab.data.base import without_images
from ddim_lab.data.images import to_uint8
from ddim_lab.device import allocator
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.extractor import Pixels
from ddim_lab.metrics.speed import (
    Contention,
    PeakMemory,
    StepClock,
    device_seconds,
    forward_flops,
    product_ceiling,
)
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.models.obtain import obtain_model
from ddim_lab.sampler import Sampler
from ddim_lab.store import Store
from ddim_lab.store.objects import is_locked
from ddim_lab.tasks import benchmark, peers, speed_peers
from ddim_lab.tasks.base import Job
from ddim_lab.tasks.walks import start

SMALL = ("model.block_out_channels=[8,8]", "model.weights=random", "logger=csv", "steps=4")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    config = tiny.configure("task=speed_peers", *SMALL)
    store, runtime = Store(tmp_path_factory.mktemp("outputs")), Runtime.resolve(config.runtime)
    data = without_images(config.data)
    model = obtain_model(config, data, runtime, store, lambda: None)
    return Job(config, data, model, runtime, store, "")


def cell(outputs: Path) -> dict[str, Any]:
    (file,) = (outputs / "cells").glob("*/result.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# -- what a time and a size depend on --------------------------------------------------------------------

HOG = "while True: pass"


def tells_what_waits() -> bool:
    with contextlib.suppress(OSError):
        return any(map(int, Path("/proc/self/schedstat").read_text().split()))
    return False


@pytest.mark.skipif(not tells_what_waits(), reason="this system does not tell what waits for a core")
def test_a_rival_for_the_same_core_is_seen() -> None:
    """It need not be a job of this project: whatever takes a core makes threads wait."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rival = subprocess.Popen([sys.executable, "-c", HOG], start_new_session=True)  # inherits the one core
    try:
        one, crowded, on_a_gpu = (Contention(lambda: False, threads=threads) for threads in (1, 2, 0))
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
        assert one.look()
        assert one.seen
        assert not crowded.look()  # two threads on one core wait for each other
        assert not on_a_gpu.look()
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, cores)


def test_another_job_on_the_device_is_seen() -> None:
    jobs = iter([True, False])
    contention = Contention(lambda: next(jobs), threads=0)
    assert not contention.seen
    assert (contention.look(), contention.look(), contention.seen) == (True, False, True)


def test_peak_memory_on_a_cpu_is_not_known() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(2**20).sum()
    assert peak.nbytes is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_of_what_runs_in_it() -> None:
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated(device)
    torch.ones(300 * 2**20, device=device).sum()
    with PeakMemory(device) as peak:
        torch.ones(50 * 2**20, device=device).sum()
    assert peak.nbytes is not None
    assert 200 * 2**20 <= peak.nbytes - before < 300 * 2**20


# -- what an untrained network is for --------------------------------------------------------------------


def test_an_untrained_network_is_the_same_one_every_time(job: Job) -> None:
    one, two = job.model.load().state_dict(), job.model.load().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert job.model.weights == "random"
    assert job.model.parameters == sum(value.numel() for value in one.values())


def test_an_untrained_network_is_not_measured_for_quality() -> None:
    with pytest.raises(ConfigError, match="is an untrained network"):
        tiny.configure("model.weights=random")


def test_peers_are_given_a_walk_that_they_have() -> None:
    with pytest.raises(ConfigError, match="walks that all peers have"):
        tiny.configure("task=speed_peers", "sampler=ddpm_large")
    with pytest.raises(ConfigError, match="needs a U-Net"):
        tiny.configure("task=speed_peers", "model=gaussian")


def test_a_line_needs_three_points() -> None:
    with pytest.raises(ConfigError, match="3 different numbers"):
        tiny.configure("task=benchmark", "task.fitted_steps=[2,2,3]")
    with pytest.raises(ConfigError, match="fitted_steps"):
        tiny.configure("task=benchmark", "task.fitted_steps=[2,3,1001]")


def test_an_exact_model_on_a_short_schedule_is_timed(tmp_path: Path) -> None:
    line = ("model=gaussian", "schedule.num_timesteps=20", "steps=3", "task.fitted_steps=[1,2,3]", "logger=csv")
    assert tiny.run(tmp_path, "task=benchmark", "batch_size=2", "task.rounds=3", *line, settings=()) == 0


@pytest.mark.slow
def test_no_data_set_is_read(tmp_path: Path) -> None:
    """data.root names an empty folder: any other task but speed_peers (tests/test_experiments.py) is refused there."""
    (tmp_path / "none").mkdir()
    arguments = ["data=cifar10", f"data.root={tmp_path / 'none'}", "model=cifar10", *SMALL, "task=benchmark"]
    arguments += ["model.attention=[false,false]", "model.norm_num_groups=8", "task.rounds=3", "batch_size=2"]
    arguments += ["task.fitted_steps=[1,2,3]", "task.fitted_batches=3"]
    assert tiny.run(tmp_path / "outputs", *arguments, settings=()) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert row["status"] == "done"
    assert row["weights"] == "random"
    assert float(row["images_per_second"]) > 0
    assert float(row["one_image_seconds"]) > 0


# -- the peers do the same work --------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_papers_loop_is_the_sampler(eta: float, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = job.sampler.schedule
    sampler, network = Sampler(schedule, 4, eta=eta), job.model.load()
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "randn_like", lambda _: z)
    found = peers.papers_loop(x_T, sampler, network, torch.tensor(schedule.betas, dtype=torch.float32))
    expected = sampler.sample(network, x_T, noise=lambda *_: z)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("optimised", [False, True])
def test_diffusers_pipeline_walks_as_the_sampler_does(
    optimised: bool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: x_T)
    given = peers.Given(job.model.load(), job.sampler, job.data.shape, torch.device("cpu"), compiled=False)
    images = peers.pipeline(given, optimised=optimised)(3).images  # type: ignore[attr-defined]
    expected = job.sampler.sample(job.model.load(), x_T).add(1).div(2).clamp(0, 1).mul(255).round()
    found = torch.stack([torch.tensor(np.array(image)).view(1, 8, 8) for image in images])
    assert (found - expected).abs().max() <= 1


@pytest.mark.parametrize(("batch", "parts"), [(2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_what_others_make_in_one_batch_ours_makes_in_its_own(
    batch: int, parts: list[int], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[int] = []
    forwards: list[int] = []

    def network(of: Job, size: int) -> nn.Module:
        engines.append(size)
        found: nn.Module = of.model.load()
        found.register_forward_pre_hook(lambda _, given: forwards.append(len(given[0])))
        return found

    monkeypatch.setattr(Job, "network", network)
    smaller = dataclasses.replace(job, config=job.config.model_copy(update={"batch_size": batch}))
    images = speed_peers._ours(smaller, 5)(5)
    assert engines == [parts[0]], "of a fixed size, smaller batches would be filled up"
    assert forwards == [part for part in parts for _ in range(job.sampler.nfe)]
    whole = job.sampler.sample(
        job.model.load(), start(job, torch.arange(5)), indices=torch.arange(5), noise=job.runtime.noise(job.config.seed)
    )
    assert (images.int() - to_uint8(whole).int()).abs().max() <= 1


@pytest.mark.parametrize(("asked", "made"), [(None, 4), (6, 6), (3, 3)])
def test_everybody_makes_as_many_images_as_are_asked_for(
    asked: int | None, made: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, set[int]] = {}

    class Noting:
        contended = False

        def __init__(self, name: str) -> None:
            self.name = name

        def seconds(self, count: int) -> float:
            counts.setdefault(self.name, set()).add(count)
            return 1.0

        def forget(self) -> None:
            pass

    names = (peers.DIFFUSERS, peers.OPTIMISED, peers.PAPER)
    monkeypatch.setattr(speed_peers, "peers", lambda given: contextlib.nullcontext([Noting(name) for name in names]))
    task = job.task.model_copy(update={"images": asked, "rounds": 3})
    its = dataclasses.replace(job, config=job.config.model_copy(update={"batch_size": 4, "task": task}))
    found = task.measure(its, tmp_path, tmp_path)
    assert counts == {peers.DIFFUSERS: {1, made}, peers.OPTIMISED: {made}, peers.PAPER: {1, made}}
    values = {value.name: value for value in found.values}
    assert values["speed_images"].value == made
    assert values["times_diffusers"].count == made
    assert values["seconds_per_image"].count == min(4, made), "times of cells compare where as many are made at once"
    how = " in one batch, ours in batches of 4" if made > 4 else " at once"
    assert [table.title for table in found.tables] == [
        "1 image at once, 3 rounds in turns",
        f"{made} images{how}, 3 rounds in turns",
    ]


@pytest.mark.parametrize("asked", ["1", "0", "true", "2.5"])
def test_a_batch_of_others_is_two_images_or_more(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.images"):
        tiny.configure("task=speed_peers", f"task.images={asked}")


@pytest.mark.slow
def test_peers_run_apart_with_the_allocator_as_it_comes(job: Job) -> None:
    """In a process each: what is set here for our own is not set there. One that fails says how; none is left over."""
    given = peers.Given(_Allocator(), job.sampler, job.data.shape, torch.device("cpu"), compiled=False)
    with peers.peers(given, [peers.PAPER]) as (paper,):
        with pytest.raises(RuntimeError, match=f"^paper's code: ValueError: {allocator.AS_IT_COMES}$"):
            paper.seconds(2)
        (process,) = torch.multiprocessing.active_children()
    assert not process.is_alive()
    with pytest.raises(RuntimeError, match="its process has ended"):
        paper.seconds(2)


class _Allocator(nn.Module):
    """Says what the allocator of its process is like before anything has asked for ours."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> None:
        asked = allocator.keep_freed_memory.cache_info().currsize
        raise ValueError(allocator.KEPT if asked else allocator.AS_IT_COMES)


# -- memory ----------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys
from importlib import import_module
from ddim_lab.device import allocator
library = import_module(sys.argv[1])
allocator.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    library.ones(2**24, dtype=library.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(allocator.malloc_settings(), "|", min([faults() for _ in range(20)][-5:]))
"""


@pytest.mark.skipif(not allocator._is_glibc(), reason="the C library is another")
@pytest.mark.parametrize(
    ("library", "variables"),
    [
        ("torch", {}),
        ("numpy", {}),  # which takes its memory from malloc, too, and is imported in a tenth of the time
        ("numpy", {"MALLOC_TOP_PAD_": "0"}),
        ("numpy", {"GLIBC_TUNABLES": "glibc.malloc.check=0"}),
    ],
)
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise(
    library: str, variables: dict[str, str]
) -> None:
    """64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB; memory that was kept has all of its own already."""
    environment = {**os.environ, **variables}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, library], env=environment, capture_output=True, text=True, check=True
    ).stdout
    words, faults = found.split(" | ")
    assert words == (allocator.AS_IT_COMES if variables else allocator.KEPT)
    assert (int(faults) >= 32) == bool(variables)


# -- the numbers -----------------------------------------------------------------------------------------


def test_operations_are_counted() -> None:
    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return SimpleNamespace(sample=self.conv(x))

    class Attends(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            rows = x.flatten(2).transpose(1, 2)[:, None]  # [B, 1, 64, 64]
            return nn.functional.scaled_dot_product_attention(rows, rows, rows)

    cpu = torch.device("cpu")
    assert forward_flops(Known(), (3, 8, 8), cpu) == 2 * 3 * 5 * 9 * 64
    assert forward_flops(Attends(), (64, 8, 8), cpu) == 2 * (2 * 64**3)  # of scores, and of values


def test_the_ceiling_is_above_what_a_network_gets(job: Job) -> None:
    network, device = job.model.load(), torch.device("cpu")
    x, t = torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)
    network(x, t)
    rate = (
        64
        * forward_flops(network, (1, 8, 8), device)
        / min(device_seconds(lambda: network(x, t), device) for _ in range(3))
    )
    assert 0 < rate < product_ceiling(torch.float32, device)


def test_the_walk_with_noise_is_the_same_walk_at_eta_1() -> None:
    for overrides, eta, variance in (
        (("sampler.spacing=quadratic",), 1.0, "posterior"),
        (("sampler.eta=0.3",), 0.3, "posterior"),
        (("sampler=ddpm_large",), 1.0, "large"),
    ):
        config = tiny.configure("task=benchmark", *SMALL, *overrides)
        job = cast(
            "Job",
            SimpleNamespace(config=config, sampler=config.build_sampler(), model=SimpleNamespace(prediction="eps")),
        )
        noisy = benchmark._with_noise(job)
        assert (noisy.eta, noisy.variance) == (eta, variance)
        assert [step.t for step in noisy.transitions] == [step.t for step in job.sampler.transitions]


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that slows down under everyone changes no ratio."""
    ours = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = speed_peers._ratio([3.0 * value for value in ours], ours)
    assert ratio.low == ratio.median == ratio.high == 3.0


def test_the_interval_of_a_ratio_covers_its_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(4000, 9))
    found = [speed_peers._Ratio(list(row)) for row in draws]
    assert found[0].coverage == pytest.approx(1 - 2 * 10 / 2**9)  # all but the lowest and the highest of nine
    covered = np.mean([ratio.low <= np.log(2) <= ratio.high for ratio in found])
    assert covered == pytest.approx(found[0].coverage, abs=4 * (0.04 * 0.96 / 4000) ** 0.5)
    assert speed_peers._Ratio([1.0, 2.0, 3.0]).coverage == 0.75


@pytest.mark.parametrize("task", ["precision", "search_timesteps"])
def test_references_are_taken_on_the_device_of_the_samples(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of one and of the other device are not the same, least of all in TF32."""
    module = importlib.import_module(f"ddim_lab.tasks.{task}")
    if task == "search_timesteps":
        pytest.importorskip("optuna")
    real, devices = module.obtain_reference, []

    def noted(*arguments: Any, device: torch.device | None = None, **named: Any) -> Any:
        devices.append(device)
        return real(*arguments, device=device, **named)

    monkeypatch.setattr(module, "obtain_reference", noted)
    more = ("task.trials=8", "task.search_samples=40") if task == "search_timesteps" else ()
    line = (f"task={task}", "model=gaussian", "metrics.features=pixels", "steps=3", "logger=csv", *more)
    assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == 0
    assert devices
    assert set(devices) == {torch.device("cpu")}


@pytest.mark.parametrize("task", ["precision", "consistency", "search_timesteps"])
def test_features_of_samples_are_taken_on_the_device_of_the_samples(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task == "search_timesteps":
        pytest.importorskip("optuna")
    devices = []

    class Noted(Pixels):
        def to(self, device: torch.device) -> Pixels:
            devices.append(device)
            return self

    monkeypatch.setattr("ddim_lab.metrics.extractor.Pixels", Noted)
    for module in ("precision", "search_timesteps"):
        moments = FeatureSums.of([torch.randn(200, 64)]).moments()
        found = SimpleNamespace(moments=moments)
        monkeypatch.setattr(f"ddim_lab.tasks.{module}.obtain_reference", lambda *_, found=found, **__: found)
    more = ("task.trials=8", "task.search_samples=40") if task == "search_timesteps" else ()
    line = (f"task={task}", "model=gaussian", "metrics.features=pixels", "steps=3", "logger=csv", *more)
    assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == 0
    assert devices == [torch.device("cpu")]


# -- precision -------------------------------------------------------------------------------------------


def test_a_standard_error_needs_three_samples() -> None:
    with pytest.raises(ConfigError, match="task=precision needs 3 samples for a standard error, got 2"):
        tiny.configure("task=precision", "num_samples=2")


@pytest.mark.slow
def test_both_runtimes_are_timed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, held = Sampler.sample, []

    def look(self: Sampler, *arguments: Any, **named: Any) -> torch.Tensor:
        held.append(any(is_locked(lock) for lock in (tmp_path / "locks").glob("timed-*.lock")))
        return sample(self, *arguments, **named)

    monkeypatch.setattr(Sampler, "sample", look)
    precision(tmp_path)
    # The images of fp32 and of the default; then a batch of each to warm up, and three of each in turns.
    assert held == [False] * 6 + [True] * 8


def precision(outputs: Path, *more: str) -> dict[str, Any]:
    arguments = ["task=precision", "metrics.features=pixels", "steps=3", "logger=csv", "seed=3", *more]
    assert tiny.run(outputs, *arguments, settings=(*tiny.TINY, "num_samples=44")) == 0
    return tiny.measured(cell(outputs))


def test_fp32_beside_itself_differs_by_nothing(tmp_path: Path) -> None:
    found = precision(tmp_path, "runtime=deterministic")
    for name in ("max_abs_diff", "mse", "fd_change", "fd_change_se", "fd_percent"):
        assert found[f"precision_{name}"] == 0.0


@pytest.mark.slow
def test_16_bits_differ_and_the_difference_is_paired(tmp_path: Path) -> None:
    found = precision(tmp_path, "runtime.precision=bf16")
    assert 0.0 < found["precision_mse"] < 1e-2
    assert found["precision_max_abs_diff"] > found["precision_mse"] ** 0.5
    assert found["precision_fd_change_se"] < 0.5 * found["precision_fd_reference_se"], "the shared noise cancels"
    assert found["precision_fd_percent"] == pytest.approx(
        100 * found["precision_fd_change"] / found["precision_fd_reference"]
    )


def test_the_clock_of_a_walk_sees_each_step_and_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks on a made-up clock: two steps of 5 and 3 seconds, with forwards of 4 and 1 in them."""
    marks = iter([10.0, 14.0, 15.0, 16.0, 18.0])
    monkeypatch.setattr("ddim_lab.metrics.speed.time", SimpleNamespace(perf_counter=lambda: next(marks)))
    clock = StepClock(lambda x_t, t: x_t + t, torch.device("cpu"))
    assert [clock(torch.tensor(1), torch.tensor(t)).item() for t in (2, 3)] == [3, 4]
    clock.mark()
    assert clock.steps().tolist() == [[5.0, 4.0], [3.0, 1.0]]
