"""LightningDataModules: batches and samples by name, so that nothing depends on where a run was started or cut."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any, final

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ddim_lab.data import ImageSet

__all__ = ["SampleIndices", "TrainingBatches"]

# Lightning announces devices, tips and its own reasons for stopping, and sets its level when it is imported: the one
# place that every use of Lightning passes turns that down to warnings.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


@final
class _StepBatches(Sampler[list[int]]):
    """Batches of indices named by (seed, step): an endless chain of permutations, cut every `batch_size`.

    Step k takes elements k*B ... (k+1)*B - 1 of the chain, so a run may start at any step.
    """

    def __init__(self, size: int, batch_size: int, seed: int, first_step: int) -> None:
        self._size, self._batch_size, self._seed, self._first_step = size, batch_size, seed, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first_step
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            batch: list[int] = []
            for position in range(step * self._batch_size, (step + 1) * self._batch_size):
                if position // self._size != epoch:
                    epoch = position // self._size
                    generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
                    order = torch.randperm(self._size, generator=generator)
                batch.append(int(order[position % self._size]))
            yield batch
            step += 1


def _as_it_is(batch: Any) -> Any:
    return batch


@final
class TrainingBatches(pl.LightningDataModule):
    """Training batches named by (seed, global step); a resumed trainer gets the batch of its own step.

    Args:
        images: the training split.
        batch_size: images a step.
        seed: training.seed.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        super().__init__()
        self._images, self._batch_size, self._seed = images, batch_size, seed

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        first_step = self.trainer.global_step if self.trainer is not None else 0
        batches = _StepBatches(len(self._images), self._batch_size, self._seed, first_step)
        return DataLoader(self._images, batch_sampler=batches, collate_fn=_as_it_is)


@final
class SampleIndices(pl.LightningDataModule):
    """The names 0 ... num_samples - 1 of the samples, in batches, the last one partial."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        super().__init__()
        self._num_samples, self._batch_size = num_samples, batch_size

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.arange(self._num_samples), batch_size=self._batch_size)  # type: ignore[arg-type]
