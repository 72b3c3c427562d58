"""The Inception Score, by the classes that the feature network knows, if any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, final

from pydantic import StrictBool

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, Batch, Comparison, Metric, Running
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from ddim_lab.metrics.base import Vectors

__all__ = ["OfClasses"]


@final
class OfClasses(Metric):
    """See `ddim_lab.metrics.inception_score`.

    Attributes:
        inception_score: whether it is measured.
        inception_score_splits: parts of the samples that it is averaged over.
    """

    name: ClassVar[str] = "inception_score"

    inception_score: StrictBool
    inception_score_splits: PositiveInt

    @property
    def on(self) -> bool:
        return self.inception_score

    def start(self, comparison: Comparison) -> Running:
        return _Score(self, comparison)


@final
class _Score(Running):
    def __init__(self, options: OfClasses, comparison: Comparison) -> None:
        from ddim_lab.metrics.inception_score import InceptionScore

        self._comparison = comparison
        self._score = InceptionScore(options.inception_score_splits)

    def update(self, batch: Batch) -> None:
        if self._comparison.head is not None:
            self._score.update(self._comparison.head(batch.features), batch.indices)

    def compute(self, vectors: Vectors | None) -> list[Value]:
        comparison = self._comparison
        shown: dict[str, Any] = {
            "column": "Inception Score",
            "table": BESIDE,
            "notes": ("On the features of the Fréchet distance.",),
            "error": "a spread over parts of the images, no standard error",
        }
        if comparison.head is None:
            why_not = f"{comparison.features.name}: the network knows no classes"
            return [Value(name="inception_score", value=None, why_not=why_not, **shown)]
        try:
            mean, spread = self._score.compute()
        except ValueError as error:
            return [Value(name="inception_score", value=None, why_not=str(error), **shown)]
        count = comparison.num_samples
        return [Value(name="inception_score", value=mean, spread=spread, count=count, better="higher", **shown)]
