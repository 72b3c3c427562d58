"""What a data set is: one class a file, found by its name; and the set that is loaded, kept while its files are.

Training and references see the same prepared images.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddim_lab.config.data import DataOptions
from ddim_lab.data.disk import Signature, signature

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["DataSet", "check_data", "data_set", "load_data", "without_images"]


class DataSet(DataOptions):
    """Where images come from: a set's files found and checked, read, prepared and split; abstract.

    The file data/NAME.py defines the class of data=NAME, whose fields are the options of conf/data/NAME.yaml. Torch and
    what reads the files are imported inside its methods: a command line is checked without them.
    """

    @abstractmethod
    def find(self) -> tuple[Path, ...]:
        """The files of the data set, whole as far as that shows before work starts; downloaded where that is allowed.

        Raises:
            ConfigError: one is missing and could not be downloaded, or is damaged; says what, where and what to do.
        """

    @abstractmethod
    def load(self, files: Sequence[Path]) -> ImageData:
        """The images in `files`, of `find`: prepared and split.

        Raises:
            ConfigError: a file is damaged.
        """

    def told(self) -> str | None:
        """What is to be said before any work of what the set was found to hold, one line; None for nothing."""
        return None

    def count(self, files: Sequence[Path]) -> int | None:
        """How many images there are in `files`, of `find`, if they stay on disk; None for a set that is in memory."""
        return None

    def held_out_count(self) -> int | None:
        """How many images are held out, where that is known before they are loaded."""
        return None

    def labels_fault(self, files: Sequence[Path]) -> str | None:
        """Why a classifier can't learn from these `files`, of `find`, of a set that may have labels; None if it can."""
        return None


def data_set(options: DataOptions) -> DataSet:
    """The data set that a configuration names."""
    assert isinstance(options, DataSet), f"data={options.name} is no DataSet"
    return options


def check_data(options: DataOptions) -> tuple[Path, ...]:
    """`DataSet.find` of the data set that a configuration names."""
    return data_set(options).find()


def load_data(options: DataOptions) -> ImageData:
    """The data set that a configuration names; the last one loaded is kept while its files are the same.

    Raises:
        ConfigError: as `DataSet.find` and `DataSet.load`.
    """
    data = data_set(options)
    return _load(data, signature(data.find()))


@functools.lru_cache(maxsize=1)
def _load(data: DataSet, found: Signature) -> ImageData:
    return data.load([Path(name) for name, _, _ in found])


def without_images(options: DataOptions) -> ImageData:
    """The shape of the data set alone, for a job that reads none of its images."""
    from ddim_lab.data.images import ImageData, NoImages

    none = NoImages(options.shape)
    return ImageData(options.name, none, none, "no images are read")
