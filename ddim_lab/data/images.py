"""Images in memory and on disk, and the only conversion between uint8 and [-1, 1]."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddim_lab.data.files import name_bytes

__all__ = [
    "DiskImages",
    "ImageData",
    "ImageSet",
    "JoinedImages",
    "MemoryImages",
    "NoImages",
    "NonFiniteError",
    "Split",
    "from_uint8",
    "to_uint8",
]

Split = Literal["train", "held_out", "all"]


class NonFiniteError(ValueError):
    """Images hold NaN or infinity: what made them diverged. Nothing else is wrong with them."""


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded to the nearest level (not truncated) and clamped; inverse of `from_uint8`.

    Raises:
        NonFiniteError: the images hold NaN or infinity, which no uint8 stands for.
    """
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteError("the images hold NaN or infinite values")
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ImageSet(ABC, Dataset[dict[str, Tensor]]):
    """Labelled images of one shape, read in batches; abstract.

    Attributes:
        labels: int64 [M]; all 0 where the data have no labels.
    """

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""

    @abstractmethod
    def batch(self, indices: Tensor) -> Tensor:
        """The images of these indices (int64 [B]): uint8 [B, C, H, W]."""

    @abstractmethod
    def content(self) -> Iterator[bytes]:
        """The bytes that identify images and labels."""

    def batches(self, size: int, count: int | None = None) -> Iterator[Tensor]:
        """The first `count` images (None: all of them) in order, `size` at a time, the last batch partial."""
        for indices in torch.split(torch.arange(len(self) if count is None else min(count, len(self))), size):
            yield self.batch(indices)

    def first(self, count: int) -> Tensor:
        """The first `count` images (all, if there are fewer) in one tensor."""
        return self.batch(torch.arange(min(count, len(self))))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__(torch.tensor([index])).items()}

    def __getitems__(self, indices: Tensor) -> dict[str, Tensor]:
        """A whole batch at once, with its labels."""
        return {"images": self.batch(indices), "labels": self.labels[indices.to(self.labels.device)]}


@final
class MemoryImages(ImageSet):
    """Images held as one tensor.

    Args:
        images: uint8 [M, C, H, W].
        labels: int64 [M].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return int(channels), int(height), int(width)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[indices.to(self.images.device)]

    def to(self, device: torch.device) -> MemoryImages:
        """The same images on a device."""
        return MemoryImages(self.images.to(device), self.labels.to(device))

    def content(self) -> Iterator[bytes]:
        yield repr(tuple(self.images.shape)).encode()
        yield self.images.numpy().tobytes()
        yield self.labels.numpy().tobytes()


@final
class NoImages(ImageSet):
    """The shape of images, and none of them: for a job that times a network and reads no data.

    Args:
        shape: (C, H, W).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self.labels = torch.empty(0, dtype=torch.int64)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def batch(self, indices: Tensor) -> Tensor:
        raise RuntimeError("this job was to read no images")

    def content(self) -> Iterator[bytes]:
        yield repr(self._shape).encode()


@final
class DiskImages(ImageSet):
    """Images that stay on disk and are decoded when they are asked for.

    Args:
        names: one an image, in the set's order.
        labels: int64 [M].
        shape: (C, H, W) of every decoded image.
        read: decodes the image of a name: uint8 [C, H, W].
        digest: identifies the content behind the names.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Tensor,
        shape: tuple[int, int, int],
        read: Callable[[str], Tensor],
        digest: str,
    ) -> None:
        self.labels = labels
        self._names, self._shape, self._read, self._digest = names, shape, read, digest

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def batch(self, indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), *self._shape, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            images[row] = self._read(self._names[index])
        return images

    def content(self) -> Iterator[bytes]:
        yield repr((len(self), *self._shape)).encode()
        yield self._digest.encode()
        yield name_bytes("\n".join(self._names))
        yield self.labels.numpy().tobytes()


@final
class JoinedImages(ImageSet):
    """Two sets of the same shape, one after the other."""

    def __init__(self, first: ImageSet, second: ImageSet) -> None:
        self.labels = torch.cat([first.labels, second.labels])
        self._first, self._second = first, second

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._first.shape

    def batch(self, indices: Tensor) -> Tensor:
        in_first = indices < len(self._first)
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        images[in_first] = self._first.batch(indices[in_first])
        images[~in_first] = self._second.batch(indices[~in_first] - len(self._first))
        return images

    def content(self) -> Iterator[bytes]:
        yield from self._first.content()
        yield from self._second.content()


@final
@dataclass(frozen=True)
class ImageData:
    """A data set with its fixed split.

    Attributes:
        name: as in conf/data.
        train, held_out: the two splits; `train` is what models and references see.
        preprocessing: what was done to the images, in words that are part of the identity.
        files: what of a folder was taken for images and what was passed over, in words; None where that is no question.
    """

    name: str
    train: ImageSet
    held_out: ImageSet
    preprocessing: str
    files: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.train.shape

    @cached_property
    def num_classes(self) -> int:
        """Number of labels in the training split; 1 where the data have none."""
        return int(self.train.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content, labels, split and preprocessing."""
        digest = hashlib.sha256(self.preprocessing.encode())
        for split in (self.train, self.held_out):
            for part in split.content():
                digest.update(part)
        return digest.hexdigest()

    def split(self, name: Split) -> ImageSet:
        """The named split; "all" is both, train first."""
        if name == "train":
            return self.train
        if name == "held_out":
            return self.held_out
        return JoinedImages(self.train, self.held_out)
