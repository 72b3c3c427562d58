"""Task `benchmark`: how fast a network and the walk around it are, over batch sizes, S and N."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from pydantic import Field, StrictInt
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.estimates import Line, fit_line
from ddim_lab.metrics.speed import (
    Contention,
    PeakMemory,
    device_seconds,
    forward_flops,
    larger,
    product_ceiling,
    speed_values,
    timed,
    timed_libraries,
)
from ddim_lab.sampler import Sampler
from ddim_lab.store.records import Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.walks import start

__all__ = ["Benchmark"]

MEASURED_VERSION: Final = 2
"""Raised whenever the same cell would be measured otherwise."""


COLUMNS: Final = (
    *("images at once", "images/s", "ms a step", "ms a forward", "loop over forwards", "with noise"),
    *("TFLOP/s", "of the ceiling", "first forward, s", "peak memory, MB"),
)
"""Of the table with a row a batch size."""


@final
class Benchmark(Task):
    """conf/task/benchmark: speed alone."""

    reads_images: ClassVar[bool] = False

    any_formula: ClassVar[bool] = False  # it times the walk with noise, too
    name: Literal["benchmark"]
    batch_sizes: tuple[PositiveInt, ...]
    fitted_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=3)]
    fitted_batches: Annotated[StrictInt, Field(ge=3)]
    rounds: Annotated[StrictInt, Field(ge=3)]

    def further_walks(self, config: Config) -> Iterator[Sampler]:
        return (config.build_sampler(steps=steps) for steps in self.fitted_steps)

    def check(self, config: Config) -> None:
        if config.sampler.variance == "analytic":
            raise ConfigError(
                "task=benchmark reads no images, and sampler.variance=analytic is estimated from them: a step takes as"
                " long with sampler.variance=posterior sampler.eta=1"
            )
        try:
            for steps in self.fitted_steps:
                config.build_transitions(steps=steps)
        except ValueError as error:
            raise ConfigError(f"task.fitted_steps: {error}") from None
        if len(set(self.fitted_steps)) < 3:
            raise ConfigError("task.fitted_steps needs 3 different numbers of steps for a line")

    def forwards(self, config: Config) -> int:
        return 0  # it takes what time it takes, whatever N is

    def identity(self, job: Job) -> dict[str, Any]:
        """Beyond the task's own settings: what is measured, and the libraries whose kernels are timed."""
        return {"version": MEASURED_VERSION, "libraries": timed_libraries()}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Time forwards and walks in turns; each batch size has a network of its own, warmed up first.

        Compilation, recording and the choice of algorithms are in the first forward, which is timed apart.
        """
        runtime, device = job.runtime, job.runtime.torch_device
        sizes = sorted({*self.batch_sizes, job.config.batch_size})
        phases: dict[str, float] = {}
        with runtime.applied(), job.timed_alone("times") as meanwhile, torch.inference_mode():
            network = job.model.load().to(device)
            flops = forward_flops(network, job.data.shape, device)
            ceiling = product_ceiling(runtime.product_dtype(network), device)
            del network  # it would count as memory of the first size
            rows: list[dict[str, Any]] = []
            timing: _Timing | None = None
            for size in sizes:
                clock = time.perf_counter()
                timing = None  # its network would count as memory of the next size
                timing = _Timing(job, job.network(size), size)
                rows.append(timing.measured(self.rounds, meanwhile))
                phases[f"batch {size}"] = time.perf_counter() - clock
            assert timing is not None
            clock = time.perf_counter()
            samplers = [
                job.config.build_sampler(job.model.prediction, steps=steps) for steps in sorted(set(self.fitted_steps))
            ]
            batches = range(1, self.fitted_batches + 1)
            seconds = timing.in_turns([(sampler, 1) for sampler in samplers], self.rounds, meanwhile)
            of_steps = [(sampler.nfe, value) for sampler, value in zip(samplers, seconds, strict=True)]
            seconds = timing.in_turns([(samplers[0], count) for count in batches], self.rounds, meanwhile)
            of_samples = [(count * size, value) for count, value in zip(batches, seconds, strict=True)]
            memory = [timing.peak_memory(samplers[0], count) for count in batches]
            phases["lines"] = time.perf_counter() - clock
        growth = None if not memory[0] or memory[-1] is None else memory[-1] / memory[0] - 1.0
        steps_line, samples_line = _line(of_steps), _line(of_samples)
        largest = rows[-1]
        nfe = job.sampler.nfe
        rate = largest["images_per_second"] * nfe * flops
        one = next((row["seconds_median"] for row in rows if row["images"] == 1), None)
        return Outcome(
            nfe=nfe,
            headline=f"{largest['images_per_second']:,.1f} images/s, {rate / 1e12:.3g} TFLOP/s"
            f" ({rate / ceiling:.0%} of a matrix product), loop {largest['loop_overhead']:+.1%}"
            f" ({largest['noisy_loop_overhead']:+.1%} with noise)",
            values=[
                Value(
                    name="ceiling_share",
                    value=rate / ceiling,
                    heading="Share of a matrix product's speed",
                    facts="operations a second of the network at the largest batch, over those of a large square"
                    " product of the same precision in the same run",
                ),
                Value(
                    name="loop_overhead",
                    value=largest["loop_overhead"],
                    heading="Loop over forwards alone",
                    facts="time of the walk, its noise included, over that of as many forwards in a row, less 1; median"
                    " over rounds",
                    better="lower",
                ),
                Value(
                    name="noisy_loop_overhead",
                    value=largest["noisy_loop_overhead"],
                    heading="Loop with noise over forwards alone",
                    facts="the same of the walk with noise in every step but the last: at η 1 where the cell draws"
                    " none",
                    better="lower",
                ),
                Value(name="one_image_seconds", value=one, unit="s"),
                Value(name="flops_per_forward", value=flops),
                Value(name="teraflops", value=rate / 1e12),
                Value(name="ceiling_teraflops", value=ceiling / 1e12),
                Value(name="forwards_per_second", value=largest["images_per_second"] * nfe),
                Value(name="steps_r_squared", value=steps_line.r_squared),
                Value(name="samples_r_squared", value=samples_line.r_squared),
                Value(
                    name="memory_growth",
                    value=growth,
                ),
                *speed_values({**largest, "contended": meanwhile.seen}),
            ],
            phases=phases,
            tables=[
                Tabled(
                    title=f"S = {job.sampler.steps}: median (quartiles) of {self.rounds} rounds",
                    columns=COLUMNS,
                    rows=tuple(_row(row, nfe, flops, ceiling) for row in rows),
                ),
                Tabled(
                    title=f"Lines at {sizes[-1]} images at once",
                    columns=("seconds against", "points", "slope, s", "intercept, s", "R²"),
                    rows=(
                        ("S (forwards)", _points(of_steps), *_digits(steps_line)),
                        (f"N (S = {samplers[0].steps})", _points(of_samples), *_digits(samples_line)),
                    ),
                ),
            ],
        )


def _with_noise(job: Job) -> Sampler:
    """The job's walk with noise in every step but the last: at eta = 1, if it draws none."""
    if job.sampler.eta > 0.0:
        return job.sampler
    sampler = job.config.sampler.model_copy(update={"eta": 1.0})
    return job.config.model_copy(update={"sampler": sampler}).build_sampler(job.model.prediction)


class _Timing:
    """A network with a batch for it.

    Args:
        job: names noise, sampler and device.
        network: under the job's runtime.
        size: images at once.
    """

    def __init__(self, job: Job, network: nn.Module, size: int) -> None:
        self._job, self._network, self._size = job, network, size
        self._device = job.runtime.torch_device
        self._noise = job.runtime.noise(job.config.seed)
        self._indices = torch.arange(size, device=self._device)
        self._x_T: Tensor = start(job, self._indices)
        self._t = job.sampler.timestep_tensor(job.sampler.transitions[0].t, size, self._device)
        # A CUDA graph's memory is allocated here, as it is recorded; its replays allocate none.
        with PeakMemory(self._device) as peak:
            self.first_seconds = timed(lambda: network(self._x_T, self._t), self._device)[1]
        self._first_memory = peak.nbytes

    def _forwards(self, count: int) -> None:
        for _ in range(count):
            self._network(self._x_T, self._t)

    def _walk(self, sampler: Sampler, batches: int = 1) -> None:
        for _ in range(batches):
            sampler.sample(self._network, self._x_T, indices=self._indices, noise=self._noise)

    def measured(self, rounds: int, meanwhile: Contention) -> dict[str, Any]:
        """Forwards in a row, the walk and the walk with noise, in turns after one of each.

        Medians and quartiles of the walk; the loop's own share of both walks.
        """
        sampler, noisy, device = self._job.sampler, _with_noise(self._job), self._device
        memory = larger(self._first_memory, self.peak_memory(sampler))
        self._walk(noisy)
        alone, walks, noisy_walks = [], [], []
        for _ in range(rounds):
            meanwhile.begin()
            alone.append(device_seconds(lambda: self._forwards(sampler.nfe), device))
            walks.append(device_seconds(lambda: self._walk(sampler), device))
            noisy_walks.append(device_seconds(lambda: self._walk(noisy), device))
            meanwhile.look()
        first, median, third = np.quantile(walks, (0.25, 0.5, 0.75)).tolist()
        return {
            "images": self._size,
            "repeats": rounds,
            "seconds": walks,
            "seconds_median": median,
            "seconds_q1": first,
            "seconds_q3": third,
            "images_per_second": self._size / median,
            "seconds_per_image": median / self._size,
            "forward_seconds": float(np.median(alone)) / sampler.nfe,
            "forward_share": float(np.median(np.divide(alone, walks))),
            "loop_overhead": float(np.median(np.divide(walks, alone))) - 1.0,
            "noisy_loop_overhead": float(np.median(np.divide(noisy_walks, alone))) - 1.0,
            "warmup_seconds": self.first_seconds,
            "peak_memory_bytes": memory,
        }

    def in_turns(self, walks: Sequence[tuple[Sampler, int]], rounds: int, meanwhile: Contention) -> list[float]:
        """Median seconds of each walk over its batches; in turns, so that a device that drifts bends no line."""
        seconds = []
        for _ in range(rounds):
            meanwhile.begin()
            seconds.append(
                [device_seconds(partial(self._walk, sampler, batches), self._device) for sampler, batches in walks]
            )
            meanwhile.look()
        return [float(value) for value in np.median(seconds, axis=0)]

    def peak_memory(self, sampler: Sampler, batches: int = 1) -> int | None:
        """`PeakMemory` of a walk over so many batches, in bytes."""
        with PeakMemory(self._device) as peak:
            self._walk(sampler, batches)
        return peak.nbytes


def _line(points: list[tuple[int, float]]) -> Line:
    line = fit_line(*zip(*points, strict=True))
    assert line is not None  # config.py asks for three points or more
    return line


def _row(row: dict[str, Any], nfe: int, flops: int, ceiling: float) -> tuple[str, ...]:
    rate = row["images_per_second"] * nfe * flops
    step, low, high = (1e3 * row[name] / nfe for name in ("seconds_median", "seconds_q1", "seconds_q3"))
    memory = row["peak_memory_bytes"]
    return (
        f"{row['images']:,}",
        f"{row['images_per_second']:,.4g}",
        f"{step:.4g} ({low:.4g} – {high:.4g})",
        f"{1e3 * row['forward_seconds']:.4g}",
        f"{row['loop_overhead']:+.2%}",
        f"{row['noisy_loop_overhead']:+.2%}",
        f"{rate / 1e12:.3g}",
        f"{rate / ceiling:.1%}",
        f"{row['warmup_seconds']:.3g}",
        "" if memory is None else f"{memory / 1e6:,.0f}",
    )


def _points(points: list[tuple[int, float]]) -> str:
    return ", ".join(f"{x:,}: {y:.4g} s" for x, y in points)


def _digits(line: Line) -> list[str]:
    r_squared = "" if line.r_squared is None else f"{line.r_squared:.5f}"
    return [f"{line.slope:.4g}", f"{line.intercept:.3g}", r_squared]
