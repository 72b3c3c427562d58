"""LightningDataModules: batches and samples by name, so that nothing depends on where a run was started or cut."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, Final, final

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ddim_lab.data.images import ImageSet, MemoryImages
from ddim_lab.device.cores import allowed_cores

__all__ = ["SampleIndices", "TrainingBatches", "rank_part"]

MOST_WORKERS: Final = 16
"""Processes that decode images for a rank, at most; all ranks' together are no more than the cores there are."""

RESIDENT_AT_MOST: Final = 4 * 2**30
"""Bytes of images that may live on a GPU while it trains; those of larger sets are copied batch by batch."""


def rank_part(batch_size: int, rank: int, world_size: int) -> slice:
    """The rows of a batch that are a rank's; parts of equal size."""
    size = batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


@final
class _StepBatches(Sampler[Tensor]):
    """Batches of indices named by (seed, step): an endless chain of permutations, cut every `batch_size`.

    Step k takes elements k*B ... (k+1)*B - 1 of the chain, so a run may start at any step. Of several ranks each has
    its `part` of every batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, first_step: int, part: slice = slice(None)) -> None:
        self._size, self._batch_size, self._seed, self._first_step = size, batch_size, seed, first_step
        self._part = part

    def __iter__(self) -> Iterator[Tensor]:
        position = self._first_step * self._batch_size
        epoch, order = position // self._size, self._order(position // self._size)
        while True:
            parts, missing = [], self._batch_size
            while missing:
                if position // self._size != epoch:
                    epoch, order = position // self._size, self._order(position // self._size)
                start = position % self._size
                part = order[start : start + missing]
                parts.append(part)
                position, missing = position + len(part), missing - len(part)
            yield torch.cat(parts)[self._part]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self._size, generator=generator)


@final
class _Indices(Dataset[Tensor]):
    """A data set whose items are their own indices: the images are looked up where they lie, on the device."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)

    def __getitems__(self, indices: Tensor) -> Tensor:
        return indices


def _leave_signals_to_the_parent(worker: int) -> None:
    """Schedulers signal a whole group: a worker that died of it would be an error in the middle of the way out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


@final
class TrainingBatches(pl.LightningDataModule):
    """Training batches named by (seed, global step); a resumed trainer gets the batch of its own step.

    Images in memory move to the device once, if they fit (`RESIDENT_AT_MOST`), and each batch is one lookup there;
    images on disk are decoded by worker processes.

    Args:
        images: the training split.
        batch_size: images a step, of all ranks together.
        seed: training.seed.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        super().__init__()
        self._images, self._batch_size, self._seed = images, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        first_step, part, ranks = 0, slice(None), 1
        if self.trainer is not None:
            first_step = self.trainer.global_step
            ranks = self.trainer.world_size
            part = rank_part(self._batch_size, self.trainer.global_rank, ranks)
        batches = _StepBatches(len(self._images), self._batch_size, self._seed, first_step, part)
        if isinstance(self._images, MemoryImages):
            return DataLoader(_Indices(), batch_sampler=batches, collate_fn=_as_it_is)  # type: ignore[arg-type]
        workers = min(MOST_WORKERS, max(1, allowed_cores() // ranks))
        return DataLoader(
            self._images,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_parent,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Tensor]:
        """Bring a batch to the device without making the host wait for it."""
        if isinstance(batch, Tensor):
            assert isinstance(self._images, MemoryImages)
            if self._images.images.device != device and self._images.images.numel() <= RESIDENT_AT_MOST:
                self._images = self._images.to(device)
            batch = self._images.__getitems__(batch.to(self._images.images.device, non_blocking=True))
        return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


@final
class SampleIndices(pl.LightningDataModule):
    """The names of samples, batch by batch.

    Args:
        batches: int64 [B] each; has a length, or Lightning reads one batch ahead.
    """

    def __init__(self, batches: Iterable[Tensor]) -> None:
        super().__init__()
        self._batches = batches

    def test_dataloader(self) -> Iterable[Tensor]:
        return self._batches
