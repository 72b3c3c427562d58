"""Estimates a sweep's cost up front: image-forwards, and hours on this device.

An image-forward is the network evaluated once on one image: the unit that every sampler spends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import nn

from ddim_lab.config import (
    AUTO,
    BenchmarkConfig,
    Config,
    ConsistencyConfig,
    InterpolateConfig,
    PrecisionConfig,
    PretrainedConfig,
    ReconstructConfig,
    SearchTimestepsConfig,
    SpeedPeersConfig,
    UNetConfig,
)
from ddim_lab.metrics.speed import timed
from ddim_lab.runtime import Runtime
from ddim_lab.schedule import SPACINGS

__all__ = ["ForwardTime", "describe_cost", "forward_time", "image_forwards"]

WORTH_MEASURING: Final = 1_000_000
"""Image-forwards from which the hours are said: below, the measurement would cost more than it tells."""

LONG_ENOUGH: Final = 0.25
"""Seconds that a timed batch must take, unless it is a whole one."""

TRAINING_FORWARDS: Final = 3
"""Cost of one image in one training step, in forwards: the backward pass is about two."""


def image_forwards(cells: Sequence[Config]) -> int:
    """Image-forwards that the cells' samples cost if none is stored; what measures speed and determinism comes on top.

    A reference (of task consistency, or precision) counts once for all cells that share it.
    """
    references: dict[tuple[object, ...], int] = {}
    total = 0
    for config in cells:
        task, count, nfe = config.task, config.num_samples, config.build_sampler().nfe
        if isinstance(task, BenchmarkConfig | SpeedPeersConfig):
            continue  # these take what time they take, whatever N is
        if isinstance(task, ReconstructConfig):
            total += 2 * count * nfe
        elif isinstance(task, InterpolateConfig):
            total += (2 * (count // 2) * task.points + task.grid**2) * nfe
        elif isinstance(task, SearchTimestepsConfig):
            total += (task.trials * task.search_samples + (len(SPACINGS) + 1) * count) * config.steps
        else:
            total += count * nfe
            model = config.data, config.model, config.schedule, config.training
            if isinstance(task, PrecisionConfig):
                references[*model, config.sampler, config.seed, count, config.batch_size, config.steps] = count * nfe
            if isinstance(task, ConsistencyConfig):
                reference = config.build_sampler(steps=task.reference_steps)
                own = *model, config.sampler, config.seed, count, config.batch_size, config.runtime
                references[*own, task.reference_steps] = count * reference.nfe
                if reference.transitions == config.build_sampler().transitions:
                    total -= count * nfe
    return total + sum(references.values())


@final
@dataclass(frozen=True)
class ForwardTime:
    """Seconds that one image takes in a forward of `images` images."""

    seconds: float
    images: int


def forward_time(config: Config, runtime: Runtime) -> ForwardTime | None:
    """Time one batch of the cell's network on its device; None for an exact model, which has no network.

    Batches double from one image until one takes LONG_ENOUGH or is as large as the cell's, so that this costs about a
    second on any device. A network that is still to be trained is timed as it is initialised, and none is compiled for
    this: that would take longer than it tells.
    """
    network = _network(config)
    if network is None:
        return None
    device, runtime = runtime.torch_device, replace(runtime, compile=False, cuda_graphs=False)
    at_once = config.num_samples if config.batch_size == AUTO else min(config.batch_size, config.num_samples)
    with runtime.applied(), torch.inference_mode():
        network = runtime.wrap(network.to(device), at_once)
        images = 1
        while True:
            x = torch.zeros(images, *config.data.shape, device=device)
            t = torch.zeros(images, dtype=torch.int64, device=device)
            network(x, t)  # chooses the kernels of this size
            _, seconds = timed(lambda x=x, t=t: network(x, t), device)  # type: ignore[misc]
            if seconds >= LONG_ENOUGH or 2 * images > at_once:
                return ForwardTime(seconds / images, images)
            images *= 2


def _network(config: Config) -> nn.Module | None:
    if isinstance(config.model, UNetConfig):
        from ddim_lab.unet import build_unet

        with torch.random.fork_rng(devices=[]):
            fresh: nn.Module = build_unet(config.model, config.data.shape)
        return fresh.eval()
    if isinstance(config.model, PretrainedConfig):
        from ddim_lab.pretrained import inspect_pretrained
        from ddim_lab.unet import load_unet

        found = inspect_pretrained(config.model.path, config.schedule, config.data.name, config.data.shape)
        return load_unet(found.folder)
    return None


def describe_cost(cells: Sequence[Config], runtime: Runtime) -> str:
    """One line for the user: a sweep's image-forwards and, from WORTH_MEASURING on, the time that they take here."""
    first, total = cells[0], image_forwards(cells)
    text = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
    if total == 0:
        return text
    text += f", {total:,} image-forwards at most"
    if total < WORTH_MEASURING or (time := forward_time(first, runtime)) is None:
        return text
    text += (
        f": about {_duration(total * time.seconds)} on {runtime.device_name}"
        f" ({time.seconds * 1e3:.3g} ms each in a batch of {time.images}); what is stored costs nothing"
    )
    if isinstance(first.model, UNetConfig):
        training = first.training
        spent = training.max_steps * training.batch_size * TRAINING_FORWARDS * time.seconds
        text += f"; training, if this model is not stored, about {_duration(spent)}"
    if first.num_samples > 1000:
        share = 1000 / first.num_samples
        text += f"; num_samples=1000 samples in {_duration(total * share * time.seconds)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
