"""Task `precision`: what a runtime changes in the images, beside fp32 on deterministic kernels from the same x_T."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.device.memory import Halving
from ddim_lab.metrics.base import BY_INFLUENCE
from ddim_lab.metrics.references import obtain_reference, reference_of
from ddim_lab.metrics.speed import timed, timed_libraries
from ddim_lab.store import content_key
from ddim_lab.store.records import Pictured, Value
from ddim_lab.tasks.base import Job, Outcome, Task, drawn, need_error, need_room
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.walks import (
    extract,
    mean_and_se,
    network_in_place,
    sample_states,
    squared_error,
    start,
    states_identity,
)

__all__ = ["Precision"]

REFERENCE_VERSION: Final = 1

MEASURED_VERSION: Final = 3
"""Raised whenever the same cell would be measured otherwise."""

SHOWN: Final = 12
RUNTIME: Final = "the same x_T under this runtime and in fp32 on deterministic kernels"


@final
class Precision(Task):
    """conf/task/precision: what a runtime changes in the images, beside fp32 from the same x_T."""

    takes_labels: ClassVar[bool] = True

    name: Literal["precision"]

    def check(self, config: Config) -> None:
        need_room(config)
        need_error(config)

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.forwards

    def shared(self, config: Config) -> tuple[Hashable, int]:
        return (drawn(config), config.steps), config.num_samples * config.forwards

    def measuring_forwards(self, config: Config) -> int:
        """Of both runtimes; the cell that is its own reference is not timed, and costs nothing."""
        return 2 * (1 + config.metrics.speed_repeats) * config.first_batch * config.forwards

    def identity(self, job: Job) -> dict[str, Any]:
        """The images that are compared with, what distances are taken of, and the libraries whose kernels are timed."""
        return {
            "version": MEASURED_VERSION,
            "libraries": timed_libraries(),
            "yardstick": content_key(_yardstick(job)),
            "features": job.features[0].digest,
            "reference": reference_of(job.config.metrics, job.features[0], job.data),
        }

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Sample under both runtimes, and compare; writes preview.png and against_fp32.png into `folder`."""
        from ddim_lab.metrics.frechet import FrechetDistance

        clock = time.perf_counter()
        plain = _of_yardstick(job)
        referred = time.perf_counter()
        same = job.runtime.recipe() == job.runtime.yardstick().recipe()
        images = plain if same else _sampled(job)
        sampled = time.perf_counter()
        speedup = 1.0 if same else _speedup(job)
        in_turns = time.perf_counter()
        device, split = job.runtime.torch_device, job.config.metrics.reference
        reference = obtain_reference(job.features[0], job.data, split, job.store, device=device).moments
        distance = FrechetDistance(reference, device)
        of_fp32, found = (distance.of(features) for features in extract(job, plain, images))
        fp32, change, change_se = of_fp32.value, found.value - of_fp32.value, found.paired_se(of_fp32)
        mse, mse_se = mean_and_se(squared_error(images, plain))
        preview(folder, images)
        sheet(folder / "against_fp32.png", torch.stack([images[:SHOWN], plain[:SHOWN]]))
        return Outcome(
            nfe=job.sampler.nfe,
            headline=f"FD {change / fp32:+.3%} ± {change_se / fp32:.3%} of fp32's {fp32:.4g}, MSE {mse:.2g},"
            + (" not timed: another process was on the device" if speedup is None else f" {speedup:.2f} × as fast"),
            values=[
                Value(
                    name="precision_fd_percent",
                    value=100.0 * change / fp32,
                    heading="Change of the Fréchet distance against fp32, in percent",
                    facts=f"{RUNTIME}; paired",
                    se=100.0 * change_se / fp32,
                    error=f"{BY_INFLUENCE}, paired",
                    count=len(images),
                ),
                Value(
                    name="precision_mse",
                    value=mse,
                    heading="MSE to fp32",
                    facts=f"{RUNTIME}, a dimension, on the [0, 1] scale",
                    se=mse_se,
                    error="over images",
                    count=len(images),
                    better="lower",
                ),
                Value(
                    name="precision_speedup",
                    value=speedup,
                    heading="Times the speed of fp32",
                    facts="images a second under this runtime over those in fp32 on deterministic kernels",
                ),
                Value(name="precision_fd_change", value=change, se=change_se, error=f"{BY_INFLUENCE}, paired"),
                Value(name="precision_fd_reference", value=fp32, se=of_fp32.se, error=BY_INFLUENCE),
                Value(name="precision_max_abs_diff", value=float((images - plain).abs().max())),
                Value(name="precision_mean_diff", value=float((images - plain).double().mean())),
                Value(name="compared_images", value=len(images)),
            ],
            phases={
                "reference": referred - clock,
                "sampling": sampled - referred,
                "speed": in_turns - sampled,
                "metrics": time.perf_counter() - in_turns,
            },
            pictures=[
                Pictured(title="Each runtime over fp32 from the same x_T", file="against_fp32.png", caption=""),
            ],
        )


def _sampled(job: Job) -> Tensor:
    """The job's x_0, float32 [N, C, H, W] on the CPU."""
    with network_in_place(job) as network:
        return sample_states(job, job.sampler, network, job.config.num_samples)


def _speedup(job: Job) -> float | None:
    """How many times as fast a full batch is as in fp32, both timed in turns, the median of the rounds.

    None where another process was on the device meanwhile.
    """
    ratios = []
    with job.timed_alone("times") as meanwhile:
        plain, own = _walk(replace(job, runtime=job.runtime.yardstick())), _walk(job)
        for _ in range(job.config.metrics.speed_repeats):
            meanwhile.begin()
            ratios.append(plain() / own())
            meanwhile.look()
    return None if meanwhile.seen else float(np.median(ratios))


def _walk(job: Job) -> Callable[[], float]:
    """Gives the seconds of a full batch under the job's runtime, again and again; warmed up."""
    runtime, sampler, device = job.runtime, job.sampler, job.runtime.torch_device
    count = min(job.config.batch_size, job.config.num_samples)
    network = Halving(job.network(count))
    indices, noise = torch.arange(count, device=device), runtime.noise(job.config.seed)
    x_T = start(job, indices)

    def seconds() -> float:
        with runtime.applied(), torch.inference_mode():
            return timed(lambda: sampler.sample(network, x_T, indices=indices, noise=noise), device)[1]

    seconds()
    return seconds


def _yardstick(job: Job) -> dict[str, Any]:
    return {
        "kind": "yardstick",
        "version": REFERENCE_VERSION,
        **states_identity(job, job.sampler, job.runtime.yardstick()),
    }


def _of_yardstick(job: Job) -> Tensor:
    """The fp32 images: from the store, or sampled and kept there."""

    def build(folder: Path) -> None:
        np.savez(folder / "states.npz", states=_sampled(replace(job, runtime=job.runtime.yardstick())).numpy())

    folder, _ = job.store.obtain("references", content_key(_yardstick(job)), build)
    with np.load(io.BytesIO((folder / "states.npz").read_bytes()), allow_pickle=False) as file:
        return torch.from_numpy(file["states"])
