"""What the tasks that look at single images share: a network in place, named starts, errors an image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim_lab.data.images import NonFiniteError, to_uint8
from ddim_lab.device.memory import Halving
from ddim_lab.device.runtime import Runtime
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.tasks.base import Job

__all__ = [
    "batches",
    "check_finite",
    "extract",
    "mean_and_se",
    "network_in_place",
    "sample_states",
    "squared_error",
    "start",
    "states_identity",
]


@contextlib.contextmanager
def network_in_place(job: Job) -> Iterator[nn.Module]:
    """The job's network on its device, under its runtime's settings; the device is marked busy meanwhile."""
    runtime = job.runtime
    with runtime.applied(), job.store.presence(runtime.hardware), torch.inference_mode():
        at_once = min(job.config.batch_size, job.config.num_samples)
        yield Halving(job.network(at_once))


def batches(job: Job, count: int) -> Iterator[Tensor]:
    """Indices 0 ... count - 1 in batches of `batch_size` on the device, under a progress bar."""
    with tqdm(total=count, desc=job.progress, unit="image", disable=None, leave=False) as bar:
        for indices in torch.split(torch.arange(count), job.config.batch_size):
            yield indices.to(job.runtime.torch_device)
            bar.update(len(indices))


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
    for indices in batches(job, count):

        def walk(model: EpsModel, indices: Tensor = indices) -> Tensor:
            return sampler.sample(model, start(job, indices), indices=indices, noise=noise)

        x_0 = walk(network)
        check_finite(x_0, walk, network, sampler)
        parts.append(x_0.cpu())
    return torch.cat(parts)


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
    steps: list[int] = []

    def watched(x: Tensor, t: Tensor) -> Any:
        if not bool(torch.isfinite(x).all()):
            raise _Began(f"after step {len(steps)} (t = {steps[-1]})" if steps else "in x_T")
        steps.append(int(t[0]))
        output = network(x, t)
        if not bool(torch.isfinite(output if isinstance(output, Tensor) else output.sample).all()):
            raise _Began(f"in the network's output at step {len(steps)} (t = {steps[-1]})")
        return output

    try:
        walk(watched)
        began = f"after the last step, {len(steps)} (t = {steps[-1]})"
    except _Began as found:
        began = str(found)
    raise NonFiniteError(f"the images hold NaN or infinite values, first {began}: {sampler} diverged on this model")


class _Began(Exception):
    """Ends a walk where it is no longer finite."""


def extract(job: Job, *sets: Tensor) -> list[Tensor]:
    """Features of sets of images, on the job's device as those of the references they may be compared with.

    Args:
        job: names the feature network.
        sets: x_0 [N, C, H, W] each, rounded and clamped to uint8 first.

    Returns:
        One float32 [N, D] a set, on the device.
    """
    device = job.runtime.torch_device
    network = job.features.load().to(device)
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
