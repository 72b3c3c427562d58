"""Statistics of images that need no metric library: sums of features, nearest neighbours."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NEAREST_AT_MOST",
    "VECTORS",
    "FeatureSums",
    "Moments",
    "VectorFile",
    "median_nearest_distance",
    "read_vectors",
]

VECTORS: Final = "features.npy"
"""What a file of feature vectors is called."""

NEAREST_AT_MOST: Final = 10_000
"""Images whose nearest neighbours are looked up, at most: `median_nearest_distance` costs images x others."""


@final
@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance compares: mean [D] and covariance [D, D] of feature vectors, float64.

    Attributes:
        count: of how many vectors; None where that is not known.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None


@final
@dataclass(frozen=True)
class FeatureSums:
    """Sufficient statistics of feature vectors f [n, D]: n, sum f, sum f f^T, float64 on the CPU."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> FeatureSums:
        """Sums over batches of features [B, D]."""
        count, total, outer = 0, None, None
        for batch in batches:
            features = batch.double()
            count += len(features)
            total = features.sum(0) if total is None else total + features.sum(0)
            outer = features.T @ features if outer is None else outer + features.T @ features
        if total is None or outer is None:
            raise ValueError("no features to sum")
        return cls(count, total.cpu(), outer.cpu())

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def moments(self) -> Moments:
        """Mean and unbiased covariance.

        Raises:
            ValueError: fewer than two vectors: no covariance.
        """
        if self.count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.count}")
        mean = self.total / self.count
        return Moments(mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1), self.count)

    def save(self, path: Path) -> None:
        """Write as .npz with arrays count, total, outer."""
        np.savez(path, count=self.count, total=self.total.numpy(), outer=self.outer.numpy())

    @classmethod
    def load(cls, path: Path) -> FeatureSums:
        """Read what `save` wrote; nothing is unpickled."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                return cls(int(file["count"]), torch.from_numpy(file["total"]), torch.from_numpy(file["outer"]))
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} does not hold feature statistics: {error}") from None


@final
class VectorFile:
    """Feature vectors [n, D], float32, streamed into an .npy file and read back through a memory map.

    They are written by ordinary writes: on a full disk those raise OSError, where a memory map kills the process.

    Args:
        path: where; made, or begun anew.
        shape: (n, D).
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path, self._left, self._size = path, *shape
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def add(self, vectors: Tensor) -> None:
        """Append vectors [B, D]; those beyond n are left out. Raises ValueError where D is another."""
        if vectors.shape[1:] != (self._size,):
            raise ValueError(f"vectors of {tuple(vectors.shape[1:])} were given, of {self._size} are kept")
        kept = vectors[: self._left].float().cpu().contiguous()
        with self.path.open("ab") as file:
            file.write(kept.numpy().astype("<f4", copy=False).tobytes())
        self._left -= len(kept)


def read_vectors(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The vectors of a `VectorFile`, in memory only where they are looked at."""
    vectors: np.ndarray[Any, np.dtype[np.float32]] = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors


def median_nearest_distance(images: Tensor, others: Tensor) -> float:
    """Median over `images` of the Euclidean distance to the nearest of `others`; both [*, C, H, W] in [-1, 1].

    Samples that sit much nearer to the training images than held-out images do were memorised.
    """
    flat = others.flatten(1).double()
    nearest = [torch.cdist(part.flatten(1).double(), flat).amin(1) for part in torch.split(images, 1024)]
    return float(torch.cat(nearest).median())
