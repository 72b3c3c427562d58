"""What a task is: one class a file, found by its name; what it is given, and what it gives back."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from ddim_lab.config.job import Config
from ddim_lab.config.kinds import TaskOptions
from ddim_lab.errors import ConfigError
from ddim_lab.store import Store
from ddim_lab.store.records import Pictured, Tabled, Value

if TYPE_CHECKING:
    from torch import nn

    from ddim_lab.data.images import ImageData
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.labels import NamedLabels
    from ddim_lab.metrics.features import Features
    from ddim_lab.metrics.speed import Contention
    from ddim_lab.models.obtain import Model
    from ddim_lab.models.second_moment import SecondMoments
    from ddim_lab.sampler import Sampler

__all__ = ["Job", "Outcome", "Task", "drawn", "need_determinism", "need_error", "need_room"]


class Task(TaskOptions):
    """One thing that can be measured of a cell; abstract. The file tasks/NAME.py defines the class of task=NAME.

    Its fields are the options of conf/task/NAME.yaml. Torch is imported inside its methods: a command line is checked
    without it.
    """

    @abstractmethod
    def identity(self, job: Job) -> dict[str, Any]:
        """The part of a cell's key that is the task's own, beyond its options."""

    @abstractmethod
    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Measure the cell.

        Args:
            job: the cell.
            folder: where its files go, beside result.json.
            work: what is left here is there again if the job is killed and started anew.
        """

    def finished(self, job: Job, cell: Path) -> Path:
        """Called with the cell's folder whenever it is there, measured now or before; gives the folder to read."""
        return cell


@final
@dataclass(frozen=True)
class Job:
    """One cell to be measured.

    Attributes:
        config, data, model, runtime, store: as configured, resolved.
        progress: what a progress bar says in front.
    """

    config: Config
    data: ImageData
    model: Model
    runtime: Runtime
    store: Store
    progress: str

    @property
    def task(self) -> Task:
        """What is measured."""
        assert isinstance(self.config.task, Task)
        return self.config.task

    @cached_property
    def sampler(self) -> Sampler:
        """The configured sampler, for what the model predicts."""
        return self.sampler_at()

    def sampler_at(self, steps: int | None = None) -> Sampler:
        """The same with that many steps (instead of a list of timesteps)."""
        moments = self.second_moments(steps)
        gamma = None if moments is None else moments.gamma
        return self.config.build_sampler(self.model.prediction, steps, gamma=gamma, labels=self.labels)

    @cached_property
    def labels(self) -> NamedLabels | None:
        """Of its samples, by their indices; None of a model without classes."""
        from ddim_lab.models.obtain import model_labels

        return model_labels(self.config, self.model, self.data)

    def second_moments(self, steps: int | None = None) -> SecondMoments | None:
        """Gamma(t) of the model where the walk needs it, for sampler.variance=analytic; estimated at first use.

        None where it needs none: of another variance, of one step, or of a task that brings models of its own.
        """
        if self.config.sampler.variance != "analytic":
            return None
        from ddim_lab.models.second_moment import obtain_second_moments
        from ddim_lab.transitions import gamma_needed_at

        config, walk = self.config, self.config.build_sampler(self.model.prediction, steps)
        if not gamma_needed_at(walk.transitions):
            return None
        return obtain_second_moments(
            self.model,
            self.data,
            walk,
            self.runtime,
            self.store,
            images=config.variance_images,
            batch_size=min(config.batch_size, config.variance_images),
            progress=self.progress,
        )

    @cached_property
    def features(self) -> tuple[Features, ...]:
        """The feature networks that conf/metrics names, in its order; trained at first use if need be.

        A task that compares in one network's features alone takes the first.
        """
        from ddim_lab.metrics.features import obtain_features

        return tuple(obtain_features(network, self.data, self.store) for network in self.config.metrics.networks)

    def network(self, batch_size: int) -> nn.Module:
        """The network on its device under the runtime's settings.

        Its weights are ordinary tensors in inference mode, too: to torch.compile they are others than those of
        inference mode, and what one task compiled would be compiled again for the next.
        """
        import torch

        with torch.inference_mode(False):
            return self.runtime.wrap(self.model.load().to(self.runtime.torch_device), batch_size)

    def alone(self, waiting_for: str) -> AbstractContextManager[None]:
        """One process at a time on this hardware, so that times are of it alone; says what it waits for."""
        runtime = self.runtime
        return self.store.lock(f"timed-{runtime.hardware}", waiting_for=f"{waiting_for} on {runtime.device}")

    @contextlib.contextmanager
    def timed_alone(self, waiting_for: str, *, lock: bool = True) -> Iterator[Contention]:
        """`alone`, and marked as busy on this hardware; yields what tells whether something else was there, too.

        Args:
            waiting_for: what it says it waits for.
            lock: without `alone` where False, for one of several processes that share the hardware.
        """
        from ddim_lab.metrics.speed import Contention

        alone = self.alone(waiting_for) if lock else contextlib.nullcontext()
        with alone, self.store.presence(self.runtime.hardware) as others_busy:
            yield Contention(others_busy, self.runtime.cpu_threads)


@final
@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        nfe: network forwards a sample.
        headline: one line for the console.
        values: each with all that it means nothing without; the first with a heading leads.
        phases: seconds that each phase took.
        tables: shown in the report as they are.
        pictures: files beside result.json, for the report.
        images_there: how many of the images that were measured had been made before.
    """

    nfe: int
    headline: str
    values: Sequence[Value]
    phases: Mapping[str, float]
    tables: Sequence[Tabled] = ()
    pictures: Sequence[Pictured] = ()
    images_there: int = 0


MOST_STATES: Final = 8 * 2**30
"""Bytes of float32 states of one set, at most, for tasks that compare two sets image by image in memory."""


# -- what several tasks check and share ------------------------------------------------------------------


def need_determinism(config: Config) -> None:
    """Raise ConfigError where the walk draws noise."""
    if config.sampler.variance == "analytic":
        raise ConfigError(
            f"task={config.task.name} needs the deterministic sampler, and sampler.variance=analytic adds noise at any"
            " eta: set sampler.variance=posterior"
        )
    if config.sampler.eta != 0:
        raise ConfigError(
            f"task={config.task.name} needs the deterministic sampler: set sampler.eta=0, got {config.sampler.eta:g}"
        )
    if config.sampler.formula is not None and config.build_sampler().is_random:
        raise ConfigError(
            f"task={config.task.name} needs a deterministic sampler: sampler={config.sampler.name} draws noise"
        )


def need_error(config: Config) -> None:
    """Raise ConfigError where the samples are too few for a standard error."""
    if config.num_samples < 3:
        raise ConfigError(f"task={config.task.name} needs 3 samples for a standard error, got {config.num_samples}")


def need_room(config: Config) -> None:
    """Raise ConfigError where all x_0 of a cell, which the task compares image by image, would not fit in memory."""
    size = math.prod(config.data.shape) * 4
    if config.num_samples * size > MOST_STATES:
        raise ConfigError(
            f"num_samples={config.num_samples} is too many for task={config.task.name}, which holds all states in"
            f" memory: at most {MOST_STATES // size} ({MOST_STATES // 2**30} GiB) for data={config.data.name}"
        )


def drawn(config: Config) -> tuple[Hashable, ...]:
    """What the x_0 of a cell are drawn from, steps and runtime aside: cells where it is equal can share them."""
    model = config.data, config.model, config.schedule, config.training
    sampler = config.sampler, config.variance_images if config.sampler.variance == "analytic" else None
    return *model, *sampler, config.seed, config.num_samples, config.batch_size
