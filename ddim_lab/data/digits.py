"""scikit-learn's handwritten digits, inside its package: nothing to download."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from ddim_lab.data.base import DataSet
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["Digits"]

HELD_OUT: Final = 360
"""Images that are not trained on."""


@final
class Digits(DataSet):
    """conf/data/digits: grey, 8x8, ten classes."""

    known_classes: ClassVar[int | None] = 10

    name: Literal["digits"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def held_out_count(self) -> int:
        return HELD_OUT

    def find(self) -> tuple[Path, ...]:
        return ()

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch

        from ddim_lab.data.images import ImageData, MemoryImages

        pixels, labels = _read()
        levels = torch.tensor(pixels).mul(255.0 / 16.0).round().to(torch.uint8).reshape(-1, 1, 8, 8)
        train, held_out = (torch.from_numpy(numbers) for numbers in _stratified_split(labels, HELD_OUT))
        targets = torch.tensor(labels, dtype=torch.int64)
        return ImageData(
            name="digits",
            train=MemoryImages(levels[train], targets[train]),
            held_out=MemoryImages(levels[held_out], targets[held_out]),
            preprocessing="digits v1: 0..16 scaled to 0..255 and rounded; stratified split 1437/360, random_state=0",
        )


def _read() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels, 0 to 16, of shape (1797, 64), and labels: what scikit-learn's `load_digits` reads, from the same file.

    Not by it: importing it takes a second and more, which a command pays whose cells are all stored.

    Raises:
        ConfigError: scikit-learn is not there, or has the file elsewhere.
    """
    package = importlib.util.find_spec("sklearn")
    folders = (package and package.submodule_search_locations) or ()
    files = [Path(folder, "datasets", "data", "digits.csv.gz") for folder in folders]
    if not (found := [file for file in files if file.is_file()]):
        raise ConfigError("data=digits reads scikit-learn's datasets/data/digits.csv.gz, which is not there")
    table = np.loadtxt(found[0], delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


def _stratified_split(labels: NDArray[np.int64], held_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images to train on and of those held out, each class in its proportion.

    Draw by draw what scikit-learn's `train_test_split(..., stratify=labels, random_state=0)` gives, on which models
    have been trained, whatever later versions of it do.
    """
    random = np.random.RandomState(0)
    sizes = np.bincount(labels)
    kept = _in_proportion(sizes, len(labels) - held_out, random)
    others = _in_proportion(sizes - kept, held_out, random)
    train, rest = [], []
    for label, size in enumerate(sizes):
        shuffled = np.flatnonzero(labels == label)[random.permutation(size)]
        train.append(shuffled[: kept[label]])
        rest.append(shuffled[kept[label] : kept[label] + others[label]])
    return random.permutation(np.concatenate(train)), random.permutation(np.concatenate(rest))


def _in_proportion(sizes: NDArray[np.int64], total: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """`total` shared out among classes: rounded down, then one more by largest remainder, ties broken at random."""
    exact = sizes / sizes.sum() * total
    shares = np.floor(exact)
    remainders = exact - shares
    for value in np.unique(remainders)[::-1]:
        if missing := int(total - shares.sum()):
            tied = np.flatnonzero(remainders == value)
            shares[random.choice(tied, size=min(len(tied), missing), replace=False)] += 1
    whole: NDArray[np.int64] = shares.astype(np.int64)
    return whole
