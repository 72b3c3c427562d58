"""scikit-learn's handwritten digits, inside its package: nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from ddim_lab.data.base import DataSet

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["Digits"]


@final
class Digits(DataSet):
    """conf/data/digits: grey, 8x8, ten classes."""

    name: Literal["digits"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def find(self) -> tuple[Path, ...]:
        return ()

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        from ddim_lab.data.images import ImageData, MemoryImages

        pixels, labels = load_digits(return_X_y=True)
        levels = torch.tensor(pixels).mul(255.0 / 16.0).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        train, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
        targets = torch.tensor(labels, dtype=torch.int64)
        return ImageData(
            name="digits",
            train=MemoryImages(levels[train], targets[train]),
            held_out=MemoryImages(levels[held_out], targets[held_out]),
            preprocessing="digits v1: 0..16 scaled to 0..255 and rounded; stratified split 1437/360, random_state=0",
        )
