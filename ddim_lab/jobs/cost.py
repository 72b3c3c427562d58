"""Estimates a sweep's cost before it starts: image-forwards, and hours on this device.

An image-forward is the network evaluated once on one image: the unit that every sampler spends.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import nn

from ddim_lab.config.job import Config
from ddim_lab.config.model import CheckpointOptions, UNetConfig
from ddim_lab.console import duration
from ddim_lab.device.runtime import Runtime
from ddim_lab.metrics.speed import ForwardTime, time_forwards
from ddim_lab.models.obtain import with_batch_size
from ddim_lab.models.second_moment import FORWARDS_AN_IMAGE
from ddim_lab.transitions import gamma_needed_at

__all__ = [
    "ForwardTime",
    "describe_cost",
    "forward_time",
    "forwards_by_cell",
    "image_forwards",
    "variance_forwards_by_cell",
]

WORTH_MEASURING: Final = 1_000_000
"""Image-forwards from which the hours are said: below, the measurement would cost more than it tells."""

TRAINING_FORWARDS: Final = 3
"""Cost of one image in one training step, in forwards: the backward pass is about two."""

COMPILED_GAIN: Final = 1.1
"""How many times as fast a compiled U-Net is on a CPU, in the same precision: 0.9 to 1.5 in "Batches, memory and
compiling" of ddim_lab/README.md, where it was measured."""

COMPILING: Final = 70.0
"""Seconds that it took at most to compile one of them there; it is done again for each cell."""

REPAID: Final = 3.0
"""How many times over the seconds saved must repay compiling for it to be recommended."""


def image_forwards(cells: Sequence[Config]) -> int:
    """Image-forwards that the cells' samples cost if none is stored; what measures them comes on top."""
    return sum(forwards_by_cell(cells))


def forwards_by_cell(cells: Sequence[Config]) -> list[int]:
    """What each cell adds to `image_forwards`, in their order.

    What several cells share, as the states that they are all compared with, is paid for by the first of them.
    """
    paid: set[Hashable] = set()
    costs = []
    for config in cells:
        cost = config.task.forwards(config)
        if (shared := config.task.shared(config)) is not None:
            what, forwards = shared
            cost += 0 if (config.task.name, what) in paid else forwards
            paid.add((config.task.name, what))
        costs.append(cost)
    return costs


def variance_forwards_by_cell(cells: Sequence[Config]) -> list[int]:
    """What sampler.variance=analytic adds to each cell, in their order: the first of a model and timesteps pays."""
    paid: set[Hashable] = set()
    costs = []
    for config in cells:
        cost = 0
        analytic = config.sampler.variance == "analytic"
        for walk in (config.build_sampler(), *config.task.further_walks(config)) if analytic else ():
            timesteps = tuple(gamma_needed_at(walk.transitions))
            model = config.data, config.model, config.schedule, config.training
            one = *model, config.variance_images, config.batch_size, config.runtime.device, timesteps
            cost += 0 if one in paid else FORWARDS_AN_IMAGE * config.variance_images * len(timesteps)
            paid.add(one)
        costs.append(cost)
    return costs


def forward_time(config: Config, runtime: Runtime) -> ForwardTime | None:
    """Time one batch of the cell's network on its device; None for an exact model, which has no network.

    In batches as `time_forwards` has them, so that this costs a few seconds on any device. A network that is still to
    be trained is timed as it is initialised, and none is compiled for this: that would take longer than it tells.
    """
    if (network := _network(config)) is None:
        return None
    takes_labels = getattr(network, "class_embedding", None) is not None
    device, runtime = runtime.torch_device, replace(runtime, compile=False, cuda_graphs=False)
    at_once = config.first_batch
    with runtime.applied(), torch.inference_mode():
        wrapped = runtime.wrap(network.to(device), at_once)
        return time_forwards(wrapped, config.data.shape, at_once, takes_labels, device)


def _network(config: Config) -> nn.Module | None:
    """The network whose time is wanted; of a class-conditional one the number of classes takes no time."""
    if isinstance(config.model, UNetConfig):
        from ddim_lab.models.unet import build_unet

        with torch.random.fork_rng(devices=[]):
            classes = 1 if config.model.conditional else None
            fresh: nn.Module = build_unet(config.model, config.data.shape, classes)
        return fresh.eval()
    if isinstance(config.model, CheckpointOptions):
        from ddim_lab.models.inspection import inspect_pretrained

        return inspect_pretrained(config.model, config.schedule, config.data.name, config.data.shape).load()
    return None


def describe_cost(cells: Sequence[Config]) -> str:
    """One line for the user: a sweep's image-forwards and, from WORTH_MEASURING on, the time that they take here.

    Each network is timed once under each runtime, whatever the cells that use it; each training is counted once.

    Args:
        cells: of the sweep.

    Raises:
        ConfigError: a device is not there.
    """
    runtimes = {config.runtime: Runtime.resolve(config.runtime) for config in cells}
    cells = [with_batch_size(config, runtimes[config.runtime]) for config in cells]
    runtime = runtimes[cells[0].runtime]
    at_most = "at most " if cells[0].grows else ""
    again = [_made_again(config) for config in cells]
    measuring = [sum(each.task.measuring_forwards(each) for each in config.looks) for config in cells]
    cells = [config.looks[-1] for config in cells]
    costs = [cost + more for cost, more in zip(forwards_by_cell(cells), again, strict=True)]
    estimating = variance_forwards_by_cell(cells)
    total = sum(costs)
    text = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
    if total == 0:
        return text
    text += f", {at_most}{total:,} image-forwards for samples"
    if any(estimating):
        text += f"{',' if any(measuring) else ' and'} {sum(estimating):,} for the analytic variance"
    if any(measuring):
        text += f" and {sum(measuring):,} to measure them"
    if total + sum(estimating) + sum(measuring) < WORTH_MEASURING:
        return text
    times: dict[tuple[object, ...], ForwardTime | None] = {}
    faster: dict[tuple[object, ...], float | None] = {}
    trainings: dict[tuple[object, ...], float] = {}
    seconds, thousand, saved = 0.0, 0.0, 0.0
    for config, cost, estimated, beside in zip(cells, costs, estimating, measuring, strict=True):
        if cost + estimated + beside == 0:
            continue
        network = config.data, config.model, config.runtime, config.batch_size
        if network not in times:
            times[network] = forward_time(config, runtimes[config.runtime])
        if (time := times[network]) is None:
            continue
        seconds += (cost + estimated + beside) * time.seconds
        if network not in faster:
            faster[network] = _if_fast(config, runtimes[config.runtime], time)
        if (fast := faster[network]) is not None:
            gained = (cost + beside) * (time.seconds - fast)
            saved += gained - COMPILING if gained > REPAID * COMPILING else 0.0
        thousand += (cost * min(1.0, 1000 / config.num_samples) + estimated + beside) * time.seconds
        training = config.training
        if isinstance(config.model, UNetConfig) and config.model.weights != "random":
            one = config.data, config.model, config.schedule, training, config.runtime.device
            trainings[one] = training.max_steps * training.batch_size * TRAINING_FORWARDS * time.seconds
    timed_networks = [time for time in times.values() if time is not None]
    if not timed_networks:
        return text
    each = ", ".join(f"{time.seconds * 1e3:.3g} ms each in a batch of {time.images}" for time in timed_networks)
    compiled = ", uncompiled" if runtime.compile else ""
    text += f": about {duration(seconds)} on {runtime.device_name} ({each}{compiled}); what is stored costs nothing"
    if trainings:
        what = "training, if this model is" if len(trainings) == 1 else f"{len(trainings)} trainings, if they are"
        text += f"; {what} not stored, about {duration(sum(trainings.values()))}"
    if saved:
        text += f"; runtime=fast compiles the network, and would save about {duration(saved)}"
    if max(config.num_samples for config in cells) > 1000:
        text += f"; num_samples=1000 samples in {duration(thousand)}"
    return text


def _made_again(config: Config) -> int:
    """Image-forwards of num_samples=auto beyond those of the largest N: a look's last batch, where it is not whole."""
    return config.forwards * sum(look.num_samples % config.batch_size for look in config.looks[:-1])


def _if_fast(config: Config, runtime: Runtime, time: ForwardTime) -> float | None:
    """Seconds of an image-forward under `runtime=fast`, on a CPU that it compiles for; None where it would not.

    Args:
        config: a cell.
        runtime: the cell's.
        time: a forward's under it.
    """
    fast = Runtime.resolve(config.runtime.model_copy(update={"aim": "speed"}))
    if fast.torch_device.type != "cpu" or config.runtime.aim == "speed" or runtime.compile or not fast.compile:
        return None
    uncompiled = time if fast.precision == runtime.precision else forward_time(config, fast)
    return None if uncompiled is None else uncompiled.seconds / COMPILED_GAIN
