"""Evaluation under Lightning's test loop: sample names in, one callable per batch."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
from torch import Tensor, nn

from ddim_lab.loaders import SampleIndices
from ddim_lab.module import DiffusionModule
from ddim_lab.runtime import Runtime
from ddim_lab.schedule import NoiseSchedule

__all__ = ["run_over_samples"]


def run_over_samples(
    evaluate: Callable[[Tensor], None],
    network: nn.Module,
    schedule: NoiseSchedule,
    runtime: Runtime,
    num_samples: int,
    batch_size: int,
) -> None:
    """Call `evaluate` with the indices 0 ... num_samples - 1 in batches, as the test loop of a `DiffusionModule`."""
    trainer = pl.Trainer(
        accelerator=runtime.accelerator,
        devices=1 if runtime.torch_device.index is None else [runtime.torch_device.index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = DiffusionModule(network, schedule, evaluate=evaluate)
    trainer.test(module, datamodule=SampleIndices(num_samples, batch_size), verbose=False)
