"""Sampling batch after batch, and what is shared by all that samples.

`Batches` is the one loop: every task's `for`, and the test loop of the Lightning module where `evaluate` is used. Only
what measures the samples of a cell goes through Lightning, since importing it takes seconds and its teardown takes the
network off the device, where other tasks walk again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ddim_lab.console import Progress
from ddim_lab.data.images import NonFiniteError, to_uint8
from ddim_lab.device.imports import large_imports
from ddim_lab.device.memory import Halving
from ddim_lab.device.runtime import Runtime
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.tasks.base import Job

__all__ = [
    "Batches",
    "check_finite",
    "evaluate",
    "extract",
    "finite",
    "mean_and_se",
    "network_in_place",
    "sample_states",
    "sample_uint8",
    "squared_error",
    "start",
    "states_identity",
]


@final
class Batches:
    """Indices of samples, batch by batch, int64 [B] on the job's device; their progress is shown meanwhile.

    Args:
        job: names the device, the size of a batch and what the bar says in front.
        samples: the batches as ranges of indices; or a number, for the samples 0 ... number - 1.
        total: of how many samples these are the last, for the progress; None where they are all.
        bar: whether progress is shown.
    """

    def __init__(self, job: Job, samples: Sequence[range] | int, *, total: int | None = None, bar: bool = True) -> None:
        size = job.config.batch_size
        if isinstance(samples, int):
            samples = [range(first, min(first + size, samples)) for first in range(0, samples, size)]
        self._job: Final = job
        self._named: Final = samples
        self._count: Final = sum(map(len, samples))
        self._total: Final = self._count if total is None else total
        self._bar: Final = bar

    def __len__(self) -> int:
        """Number of batches; without it, Lightning would take one batch more than it has sampled."""
        return len(self._named)

    def __iter__(self) -> Iterator[Tensor]:
        done = self._total - self._count
        with Progress(self._job.progress, self._total, "image", done=done, shown=self._bar) as progress:
            for named in self._named:
                yield torch.arange(named.start, named.stop, device=self._job.runtime.torch_device)
                progress.update(len(named))


def evaluate(batches: Batches, each: Callable[[Tensor], None], network: nn.Module, job: Job) -> None:
    """Call `each` with the indices of every batch, as the test loop of a `DiffusionModule`.

    Args:
        batches: what is sampled.
        each: samples a batch by the network.
        network: on the job's device; Lightning leaves it on the CPU.
        job: names schedule and device.
    """
    with large_imports():  # Lightning takes seconds to import: only here
        from ddim_lab.data.loaders import SampleIndices
        from ddim_lab.device.lightning import interruptible, trainer
        from ddim_lab.models.training import DiffusionModule

    index = job.runtime.torch_device.index
    tester = trainer(
        accelerator=job.runtime.accelerator, devices=1 if index is None else [index], enable_checkpointing=False
    )
    module = DiffusionModule(network, job.sampler.schedule, evaluate=each)
    with interruptible():
        tester.test(module, datamodule=SampleIndices(batches), verbose=False)


@contextlib.contextmanager
def network_in_place(job: Job) -> Iterator[nn.Module]:
    """The job's network on its device, under its runtime's settings; the device is marked busy meanwhile."""
    runtime = job.runtime
    with runtime.applied(), job.store.presence(runtime.hardware), torch.inference_mode():
        at_once = min(job.config.batch_size, job.config.num_samples)
        yield Halving(job.network(at_once))


def start(job: Job, indices: Tensor) -> Tensor:
    """x_T of the named samples, float32 [B, C, H, W] on the device of `indices`."""
    return NamedNoise(job.config.seed).initial(
        indices, torch.empty(len(indices), *job.data.shape, device=indices.device)
    )


def states_identity(job: Job, sampler: Sampler, runtime: Runtime) -> dict[str, Any]:
    """What the job's x_0 are a function of, by this sampler under this runtime."""
    return {
        "model": job.model.recipe(),
        "sampler": sampler.recipe(),
        "seed": job.config.seed,
        "num_samples": job.config.num_samples,
        "batch_size": job.config.batch_size,
        "runtime": runtime.recipe(),
    }


def sample_states(job: Job, sampler: Sampler, network: nn.Module, count: int) -> Tensor:
    """x_0 of the first `count` samples, as the sampler leaves it: float32 [count, C, H, W] on the CPU, not clamped.

    Raises:
        NonFiniteError: as `check_finite`.
    """
    noise = job.runtime.noise(job.config.seed)
    parts = []
    for indices in Batches(job, count):
        walk = partial(sampler.sample, x_T=start(job, indices), indices=indices, noise=noise)
        parts.append(finite(walk, network, sampler).cpu())
    return torch.cat(parts)


def sample_uint8(
    sampler: Sampler,
    network: nn.Module,
    indices: Tensor,
    shape: tuple[int, int, int],
    noise: NamedNoise,
    device: torch.device,
) -> Tensor:
    """The named samples as uint8 [B, C, H, W] on the device.

    Raises:
        NonFiniteError: as `check_finite`.
    """
    indices = indices.to(device)
    x_T = noise.initial(indices, torch.empty(len(indices), *shape, device=device))
    return to_uint8(finite(partial(sampler.sample, x_T=x_T, indices=indices, noise=noise), network, sampler))


def finite(walk: Callable[[EpsModel], Tensor], network: nn.Module, sampler: object) -> Tensor:
    """What a walk with this network gives, on the device.

    Raises:
        NonFiniteError: as `check_finite`.
    """
    x = walk(network)
    check_finite(x, walk, network, sampler)
    return x


def check_finite(x: Tensor, walk: Callable[[EpsModel], object], network: nn.Module, sampler: object) -> None:
    """Refuse samples that are not finite: the walk is taken again, to find the step at which that began.

    Args:
        x: what the walk gave.
        walk: samples once more with the model it is given.
        network: the model.
        sampler: for the message.

    Raises:
        NonFiniteError: x holds NaN or infinity; names the step.
    """
    if bool(torch.isfinite(x).all()):
        return
    steps: list[float] = []

    def watched(x: Tensor, t: Tensor, *labels: Tensor) -> Any:
        if not bool(torch.isfinite(x).all()):
            raise _Began(f"after step {len(steps)} (t = {steps[-1]:g})" if steps else "in x_T")
        if not (labels and steps[-1:] == [float(t[0])]):  # guidance asks twice at a step
            steps.append(float(t[0]))
        output = network(x, t, *labels)
        if not bool(torch.isfinite(output if isinstance(output, Tensor) else output.sample).all()):
            raise _Began(f"in the network's output at step {len(steps)} (t = {steps[-1]:g})")
        return output

    try:
        walk(watched)
        began = f"after the last step, {len(steps)} (t = {steps[-1]:g})"
    except _Began as found:
        began = str(found)
    raise NonFiniteError(f"the images hold NaN or infinite values, first {began}: {sampler} diverged on this model")


class _Began(Exception):
    """Ends a walk where it is no longer finite."""


def extract(job: Job, *sets: Tensor) -> list[Tensor]:
    """Features of sets of images, on the job's device as those of the references they may be compared with.

    Args:
        job: names the feature network, by the first of metrics.features.
        sets: x_0 [N, C, H, W] each, rounded and clamped to uint8 first.

    Returns:
        One float32 [N, D] a set, on the device.
    """
    device = job.runtime.torch_device
    network = job.features[0].load().to(device)
    with torch.inference_mode():
        return [torch.cat([network(to_uint8(part.to(device))) for part in torch.split(x, 512)]) for x in sets]


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference a dimension on the [0, 1] scale, image by image: mean ((a - b) / 2)^2, float64 [B].

    Args:
        a, b: [B, ...] with images spanning [-1, 1]; not clamped.
    """
    return ((a.double() - b.double()) / 2.0).square().flatten(1).mean(1)


def mean_and_se(values: Tensor) -> tuple[float, float | None]:
    """Mean over images [B] and its standard error, s / sqrt(B); no error for a single image."""
    count = len(values)
    return float(values.mean()), float(values.std() / count**0.5) if count > 1 else None
