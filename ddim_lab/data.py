"""Images: where they come from, how they are split, and the only conversion between uint8 and [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddim_lab.config import DataConfig

__all__ = ["ImageData", "ImageSet", "Split", "from_uint8", "load_data", "to_uint8"]

Split = Literal["train", "held_out", "all"]


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded to the nearest level (not truncated) and clamped; inverse of `from_uint8`.

    Raises:
        ValueError: the images hold NaN or infinity, which no uint8 stands for.
    """
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the images hold NaN or infinite values")
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


@final
class ImageSet(Dataset[dict[str, Tensor]]):
    """Labelled images in memory.

    Args:
        images: uint8 [M, C, H, W].
        labels: int64 [M].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch at once; the loaders below pass it on as it is."""
        chosen = torch.as_tensor(indices)
        return {"images": self.images[chosen], "labels": self.labels[chosen]}


@final
@dataclass(frozen=True)
class ImageData:
    """A data set with its fixed split.

    Attributes:
        name: as in conf/data.
        train, held_out: the two splits; `train` is what models and references see.
        preprocessing: what was done to the images, in words that are part of the identity.
    """

    name: str
    train: ImageSet
    held_out: ImageSet
    preprocessing: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return int(channels), int(height), int(width)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the pixels, labels, split and preprocessing."""
        digest = hashlib.sha256(self.preprocessing.encode())
        for split in (self.train, self.held_out):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update(split.images.numpy().tobytes())
            digest.update(split.labels.numpy().tobytes())
        return digest.hexdigest()

    def split(self, name: Split) -> ImageSet:
        """The named split; "all" is both, train first."""
        if name == "train":
            return self.train
        if name == "held_out":
            return self.held_out
        return ImageSet(
            torch.cat([self.train.images, self.held_out.images]), torch.cat([self.train.labels, self.held_out.labels])
        )


def load_data(config: DataConfig) -> ImageData:
    """The data set that conf/data names."""
    return _digits()


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    levels = torch.tensor(pixels).mul(255.0 / 16.0).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    train, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    targets = torch.tensor(labels, dtype=torch.int64)
    return ImageData(
        name="digits",
        train=ImageSet(levels[train], targets[train]),
        held_out=ImageSet(levels[held_out], targets[held_out]),
        preprocessing="digits v1: 0..16 scaled to 0..255 and rounded; stratified split 1437/360, random_state=0",
    )
