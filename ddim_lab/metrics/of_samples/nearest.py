"""How far samples are from their nearest real images: those that sit much nearer to the training images than held-out
images do were memorised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

from ddim_lab.metrics.base import Batch, Comparison, Metric, Running
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.metrics.base import Vectors

__all__ = ["Nearest"]

NEAREST_WORK: Final = 10**11
"""Products, at most, of the search for the nearest: it costs samples x training images x pixels."""

SAYS: Final = (
    ("nearest_samples_to_train", "sample → nearest training image"),
    ("nearest_samples_to_held_out", "sample → nearest held-out image"),
    ("nearest_held_out_to_train", "held-out → nearest training image"),
)


NOTE: Final = (
    "Median Euclidean distance over pixels, with values in [−1, 1]. A model that copies has samples much nearer to "
    "the training images than held-out real images are: the first column far below the last. New images give about "
    "the same in both."
)


@final
class Nearest(Metric):
    """Always measured, where the search is not too large: see `ddim_lab.metrics.statistics.median_nearest_distance`."""

    name: ClassVar[str] = "nearest"
    needs_images: ClassVar[bool] = True

    def start(self, comparison: Comparison) -> Running:
        return _Search(comparison)


@final
class _Search(Running):
    """Keeps the images that are looked up, on the CPU."""

    def __init__(self, comparison: Comparison) -> None:
        from ddim_lab.data.images import MemoryImages
        from ddim_lab.metrics.statistics import NEAREST_AT_MOST

        data = comparison.data
        assert data is not None
        self._train, self._held_out = data.train, data.held_out
        self._images: list[Tensor] = []
        self._at_most, self._count = 0, 0
        self._why_not: str | None = None
        if comparison.num_samples > NEAREST_AT_MOST:
            self._why_not = f"nearest neighbours are looked up for {NEAREST_AT_MOST:,} samples at most"
        elif not (isinstance(data.train, MemoryImages) and isinstance(data.held_out, MemoryImages)):
            self._why_not = "nearest neighbours are looked up among images in memory, and these stay on disk"
        else:
            self._at_most = min(NEAREST_AT_MOST, NEAREST_WORK // data.train.images.numel())

    def update(self, batch: Batch) -> None:
        assert batch.images is not None
        if missing := self._at_most - self._count:
            self._images.append(batch.images[:missing])
            self._count += len(self._images[-1])

    def compute(self, vectors: Vectors) -> list[Value]:
        if self._why_not is not None:
            return []  # it says nothing of the samples: their number, or the data set's, is too large to look them up
        import torch

        from ddim_lab.data.images import from_uint8
        from ddim_lab.metrics.statistics import median_nearest_distance

        train, unseen = from_uint8(self._train.first(len(self._train))), from_uint8(self._held_out.first(self._at_most))
        images = from_uint8(torch.cat(self._images))
        pairs = (images, train), (images, unseen), (unseen, train)
        return [
            Value(
                name=name,
                value=median_nearest_distance(some, others),
                section="Nearest neighbours",
                column=column,
                notes=(NOTE,),
                count=len(some),
            )
            for (name, column), (some, others) in zip(SAYS, pairs, strict=True)
        ]
