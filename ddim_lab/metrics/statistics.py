"""Statistics of images that need no metric library: sums of features, nearest neighbours."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureSums", "Moments", "median_nearest_distance"]


@final
@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance compares: mean [D] and covariance [D, D] of feature vectors, float64 on the CPU.

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


def median_nearest_distance(images: Tensor, others: Tensor) -> float:
    """Median over `images` of the Euclidean distance to the nearest of `others`; both [*, C, H, W] in [-1, 1].

    Samples that sit much nearer to the training images than held-out images do were memorised.
    """
    flat = others.flatten(1).double()
    nearest = [torch.cdist(part.flatten(1).double(), flat).amin(1) for part in torch.split(images, 1024)]
    return float(torch.cat(nearest).median())
