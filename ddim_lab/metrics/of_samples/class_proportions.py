"""How the samples fall into the data set's classes, beside the reference: by the luck of the draw, or by the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.metrics.base import BESIDE, Batch, Comparison, Metric, Running
from ddim_lab.store.records import Tabled, Value

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.metrics.base import Vectors

__all__ = ["ClassProportions"]

NOTE: Final = (
    "Class distance: half the sum over classes of |share of the samples − share of the reference|, both as the"
    " classifier sees them. By luck: what it is on average of as many samples drawn with the reference's shares."
)


@final
class ClassProportions(Metric):
    """The share of each class among the samples, where a network at hand tells the classes.

    Attributes:
        class_proportions: whether they are measured.
    """

    name: ClassVar[str] = "class_proportions"

    class_proportions: StrictBool

    @property
    def on(self) -> bool:
        return self.class_proportions

    def start(self, comparison: Comparison) -> Running:
        return _Shares(comparison)


@final
class _Shares(Running):
    """Counts; in the network that tells the classes."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._counts: Tensor | None = None
        classes = comparison.classes
        own = classes is not None and comparison.features.tells_classes
        self._shares = classes.shares if classes is not None and own else None

    def update(self, batch: Batch) -> None:
        if self._shares is not None and batch.classes is not None:
            import torch

            counts = torch.bincount(batch.classes, minlength=len(self._shares))
            self._counts = counts if self._counts is None else self._counts + counts

    def compute(self, vectors: Vectors) -> list[Value]:
        if self._shares is None or self._counts is None:
            return []
        count = int(self._counts.sum())
        apart = self._counts.double() / count - self._shares
        # The mean of |a binomial share less its expectation|, nearly normal.
        by_luck = (2.0 / math.pi * self._shares * (1.0 - self._shares) / count).sqrt().sum()
        shown: dict[str, Any] = {"table": BESIDE, "notes": (NOTE,), "count": count}
        return [
            Value(name="class_distance", value=float(0.5 * apart.abs().sum()), column="class distance", **shown),
            Value(name="class_distance_by_luck", value=float(0.5 * by_luck), column="class distance by luck", **shown),
        ]

    def tables(self) -> list[Tabled]:
        if self._shares is None or self._counts is None:
            return []
        count = int(self._counts.sum())
        rows = []
        for number, (own, share) in enumerate(zip(self._counts.tolist(), self._shares.tolist(), strict=True)):
            ours = own / count
            error = (share * (1.0 - share) / count) ** 0.5
            rows.append((number, ours, share, (ours - share) / error if error else None))
        classes = self._comparison.classes
        assert classes is not None
        return [
            Tabled(
                title=f"Class proportions, by {classes.by}",
                columns=("class", "of the samples", "of the reference", "difference in standard errors of the draw"),
                rows=tuple(rows),
            )
        ]
