"""The image itself, for images small enough."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from ddim_lab.data.base import DataSet
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.estimates import PAIRED_GROUPS
from ddim_lab.metrics.features import FeatureNetwork, Features
from ddim_lab.store import Store

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["PixelFeatures"]


@final
class PixelFeatures(FeatureNetwork):
    """metrics.features=pixels: no network at all."""

    name: ClassVar[str] = "pixels"

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Refuse images for which the sums that a Fréchet distance needs are larger than this machine."""
        needed = 8 * PAIRED_GROUPS * math.prod(data.shape) ** 2
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            channels, height, width = data.shape
            raise ConfigError(
                f"metrics.features=pixels takes {PAIRED_GROUPS} covariances of {math.prod(data.shape)} values"
                f" ({channels}x{height}x{width}): {needed / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}; set"
                " metrics.features=inception, or take smaller images"
            )

    def num_features(self, shape: tuple[int, int, int]) -> int:
        return math.prod(shape)

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics.extractor import Pixels

        channels, height, width = data.shape
        return Features(
            name=f"FD ({data.name} pixels)",
            digest=f"pixels-{channels}x{height}x{width}",
            num_features=math.prod(data.shape),
            load=Pixels,
            kept=False,
        )
