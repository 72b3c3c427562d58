"""Evaluation under Lightning's test loop: sample names in, one callable per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytorch_lightning as pl
from torch import Tensor, nn

from ddim_lab.data.loaders import SampleIndices
from ddim_lab.device.lightning import interruptible
from ddim_lab.device.runtime import Runtime
from ddim_lab.models.training import DiffusionModule
from ddim_lab.schedule import NoiseSchedule

__all__ = ["run_over_batches"]


def run_over_batches(
    evaluate: Callable[[Tensor], None],
    network: nn.Module,
    schedule: NoiseSchedule,
    runtime: Runtime,
    batches: Sequence[range],
) -> None:
    """Call `evaluate` with the indices of each batch, as the test loop of a `DiffusionModule`."""
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
    with interruptible():
        trainer.test(module, datamodule=SampleIndices(batches), verbose=False)
