"""Where the audited samples come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from ddim_lab.conventions.protocol import Factor, Made
from ddim_lab.data.images import ImageSet
from ddim_lab.data.samples import Samples

__all__ = ["FileSource", "Source"]


class Source(ABC):
    """Samples that are audited: a set of images, or a model that makes them; abstract.

    Attributes:
        name: in words.
        count: N.
        shape: (C, H, W) of an image.
        keeps_levels: whether images can be had before they became 256 levels.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    keeps_levels: bool

    @abstractmethod
    def factors(self) -> Sequence[Factor]:
        """What can be changed of how the samples are made, each with what can't be tried and why."""

    @abstractmethod
    def key(self, made: Made, *, levels: bool = False) -> str:
        """Identifies the images that `images` gives, before they are made."""

    @abstractmethod
    def forwards(self, made: Made, *, levels: bool = False) -> int:
        """Image-forwards that `images` would cost now; 0 where they are there."""

    @abstractmethod
    def images(self, made: Made, *, levels: bool = False) -> ImageSet:
        """The first `count` samples, made so; what is there is not made again.

        Args:
            made: what is changed.
            levels: as float32 from 0 to 255, not rounded, where `keeps_levels`; else uint8.

        Raises:
            NonFiniteError: the samples diverged.
        """

    @abstractmethod
    def forward_seconds(self) -> float:
        """Seconds of an image-forward, measured once; 0.0 where none is ever needed."""


@final
class FileSource(Source):
    """Images in a file or folder, which are what they are."""

    keeps_levels = False

    def __init__(self, samples: Samples) -> None:
        self.name, self.count, self.shape = samples.name, len(samples.images), samples.images.shape
        self._samples = samples

    def factors(self) -> Sequence[Factor]:
        return ()

    def key(self, made: Made, *, levels: bool = False) -> str:
        assert not made
        return self._samples.digest

    def forwards(self, made: Made, *, levels: bool = False) -> int:
        return 0

    def images(self, made: Made, *, levels: bool = False) -> ImageSet:
        assert not made
        assert not levels
        return self._samples.images

    def forward_seconds(self) -> float:
        return 0.0
