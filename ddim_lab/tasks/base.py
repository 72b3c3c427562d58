"""What every task is given and what it gives back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import nn

from ddim_lab.config.job import Config
from ddim_lab.data.images import ImageData
from ddim_lab.device.runtime import Runtime
from ddim_lab.metrics.features import Features, obtain_features
from ddim_lab.models.obtain import Model
from ddim_lab.sampler import Sampler
from ddim_lab.store import Store

__all__ = ["Job", "Measured"]


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

    @cached_property
    def sampler(self) -> Sampler:
        """The configured sampler, for what the model predicts."""
        return self.config.build_sampler(self.model.prediction)

    @cached_property
    def features(self) -> Features:
        """The feature network that conf/metrics names; trained at first use if need be."""
        return obtain_features(self.config.metrics.network, self.data, self.store)

    def network(self, batch_size: int) -> nn.Module:
        """The network on its device under the runtime's settings.

        Its weights are ordinary tensors in inference mode, too: to torch.compile they are others than those of
        inference mode, and what one task compiled would be compiled again for the next.
        """
        with torch.inference_mode(False):
            return self.runtime.wrap(self.model.load().to(self.runtime.torch_device), batch_size)

    def alone(self, waiting_for: str) -> AbstractContextManager[None]:
        """One process at a time on this hardware, so that times are of it alone; says what it waits for."""
        runtime = self.runtime
        return self.store.lock(f"timed-{runtime.hardware}", waiting_for=f"{waiting_for} on {runtime.device}")


@final
@dataclass(frozen=True)
class Measured:
    """What a task found.

    Attributes:
        measurements: as in result.json; "nfe" and "headline" (one line for the console) at least.
        phases: seconds that each phase took.
        tables: {"title", "columns", "rows"} for the report.
        pictures: {"title", "file", "caption"}, files beside result.json, for the report.
    """

    measurements: dict[str, Any]
    phases: dict[str, float]
    tables: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
