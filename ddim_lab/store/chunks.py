"""The samples of an unfinished cell, durable chunk by chunk: a cell that was killed goes on from its last chunk.

    outputs/cells/<key>.partial/000000000-000001024-<digest>.safetensors      samples 0 ... 1023, whole batches
    outputs/cells/<key>.partial/<name>-<digest>.tensor                        what was measured beside them

A chunk is a few batches in a row with all that the measurements need of them, so that they are taken from the chunks
alone, batch by batch in the order of the indices: where a cell was cut, and by how many processes it was made, changes
no number but the times.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from safetensors.torch import load, save
from torch import Tensor

from ddim_lab.store import write_bytes

__all__ = ["Batch", "SampleChunks", "kept"]

log = logging.getLogger("ddim_lab")

CHUNK_BYTES: Final = 2**28
"""A chunk is written when it holds this much, whatever the time."""

_NAME: Final = re.compile(r"(\d{9,})-(\d{9,})-([0-9a-f]{16})\.safetensors")


@final
@dataclass(frozen=True)
class Batch:
    """Samples start ... start + B - 1, as they were made.

    Attributes:
        start: index of the first.
        images: uint8 [B, C, H, W] on the CPU.
        tensors: what else was taken of them, by name, on the CPU.
        seconds: of the parts of the work, by name.
        warm: whether its process had made another batch before.
        contended: whether other processes were busy on the device.
    """

    start: int
    images: Tensor
    tensors: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    warm: bool
    contended: bool

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.images.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())


@final
class SampleChunks:
    """Batches on disk, written as they come, read in the order of their indices.

    Args:
        folder: where the chunks lie; made when the first is written.
        num_samples: N; the samples are 0 ... N - 1.
        batch_size: samples of a batch; the last one is partial.
        every_seconds: a chunk is written when this much time has passed since the one before.
    """

    def __init__(self, folder: Path, num_samples: int, batch_size: int, every_seconds: float) -> None:
        self._folder, self._num_samples, self._batch_size = folder, num_samples, batch_size
        self._every_seconds = every_seconds
        self._held: list[Batch] = []
        self._written_at = time.monotonic()
        self._paths: dict[range, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if (name := _NAME.fullmatch(path.name)) is None:
                continue
            if _digest(path.read_bytes()) == name[3]:
                self._paths[range(int(name[1]), int(name[2]))] = path
            else:
                log.warning("%s is damaged: its samples are made again", path)
                path.unlink()

    def missing(self) -> list[range]:
        """The batches that no chunk holds, as ranges of indices."""
        there = sorted(self._paths, key=lambda chunk: chunk.start)
        starts = range(0, self._num_samples, self._batch_size)
        batches = [range(start, min(start + self._batch_size, self._num_samples)) for start in starts]
        return [batch for batch in batches if not any(batch.start in chunk for chunk in there)]

    def add(self, batch: Batch) -> None:
        """Take a batch; it is durable at the latest when `flush` returns."""
        if self._held and self._held[-1].start + len(self._held[-1]) != batch.start:
            self.flush()  # a chunk has no gap
        self._held.append(batch)
        late = time.monotonic() - self._written_at >= self._every_seconds
        if late or sum(held.nbytes for held in self._held) >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a chunk."""
        self._written_at = time.monotonic()
        if not self._held:
            return
        start, stop = self._held[0].start, self._held[-1].start + len(self._held[-1])
        content = save({name: tensor.contiguous() for batch in self._held for name, tensor in _named(batch)})
        path = self._folder / f"{start:09d}-{stop:09d}-{_digest(content)}.safetensors"
        write_bytes(path, content)
        self._paths[range(start, stop)] = path
        self._held = []

    def __iter__(self) -> Iterator[Batch]:
        """All batches in the order of their indices, one chunk in memory at a time.

        Raises:
            RuntimeError: some are missing, or a chunk changed since it was found.
        """
        expected = 0
        for chunk in sorted(self._paths, key=lambda chunk: chunk.start):
            for batch in _read(self._paths[chunk]):
                if batch.start == expected:  # what two processes made is taken once
                    yield batch
                    expected = batch.start + len(batch)
        if expected != self._num_samples:
            raise RuntimeError(f"{self._num_samples} samples were asked for, {expected} are there")


def _named(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """All of a batch as tensors, named <start>.<kind>.<name>."""
    yield f"{batch.start}.images.", batch.images
    yield f"{batch.start}.warm.", torch.tensor(batch.warm)
    yield f"{batch.start}.contended.", torch.tensor(batch.contended)
    for name, tensor in batch.tensors.items():
        yield f"{batch.start}.tensors.{name}", tensor
    for name, value in batch.seconds.items():
        yield f"{batch.start}.seconds.{name}", torch.tensor(value, dtype=torch.float64)


def kept(folder: Path, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made once: the file <name>-<digest>.tensor of the folder has it from then on."""
    for path in folder.glob(f"{name}-*.tensor"):
        content = path.read_bytes()
        if path.stem == f"{name}-{_digest(content)}":
            return load(content)["kept"]
        log.warning("%s is damaged: it is made again", path)
        path.unlink()
    tensor = make().contiguous()
    content = save({"kept": tensor})
    write_bytes(folder / f"{name}-{_digest(content)}.tensor", content)
    return tensor


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(path: Path) -> Sequence[Batch]:
    content = path.read_bytes()
    if not path.stem.endswith(_digest(content)):
        raise RuntimeError(f"{path} changed while it was in use: run the command again")
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in load(content).items():
        start, kind, name = key.split(".", 2)
        found.setdefault(int(start), {"tensors": {}, "seconds": {}}).setdefault(kind, {})[name] = tensor
    return [
        Batch(
            start=start,
            images=parts["images"][""],
            tensors=parts["tensors"],
            seconds={name: float(value) for name, value in parts["seconds"].items()},
            warm=bool(parts["warm"][""]),
            contended=bool(parts["contended"][""]),
        )
        for start, parts in sorted(found.items())
    ]
