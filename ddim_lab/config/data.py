"""What a configuration knows of a data set: its options, and what its images look like. The sets themselves, each with
options of its own, are the files of `ddim_lab.data`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Final

from pydantic import BeforeValidator, SerializeAsAny

from ddim_lab.config.found import Kind
from ddim_lab.config.options import Options, PathOption, PositiveInt, Words

__all__ = ["DATA", "DataConfig", "DataOptions"]


class DataOptions(Options, ABC):
    """conf/data: the images to train on, to refer to and to hold out; abstract, see `ddim_lab.data.base.DataSet`.

    Attributes:
        has_labels: whether the images come with labels.
        known_classes: how many classes they are of, where that is known before they are read.
        name: as in conf/data.
        root: where it lies; None for the download folder.
        num_samples: how many images are generated to be compared with it, where `num_samples` is not given.
        features: the feature networks that they are compared in, where `metrics.features` is not given.
    """

    has_labels: ClassVar[bool] = True
    known_classes: ClassVar[int | None] = None

    name: Words
    root: PathOption | None
    num_samples: PositiveInt
    features: str | tuple[str, ...] = "classifier"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""


DATA: Final = Kind("data", "ddim_lab.data", DataOptions)  # type: ignore[type-abstract]

DataConfig = Annotated[SerializeAsAny[DataOptions], BeforeValidator(DATA.chosen)]
"""A field that holds the data set which its `name` finds."""
