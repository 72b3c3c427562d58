"""Inception Score: how sure a classifier is of each image, and how varied its answers are.

    IS = exp( mean_x KL( p(y|x) || p(y) ) ),  p(y) = mean_x p(y|x)

Source: Salimans et al. (2016), Improved Techniques for Training GANs. From 1 (all images look alike) to the number of
classes. It does not look at real images; the classes are those that the feature network knows, if any.

torch-fidelity's `isc_features_to_metric` gives the same values, as a test shows. It is not used, because it takes the
logits of all samples in memory, and their probabilities twice: 400 MB each for 50,000 samples and Inception's 1,008
classes in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, Batch, Comparison, Metric, Running
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.metrics.base import Vectors

__all__ = ["InceptionScore", "OfClasses"]


@final
class OfClasses(Metric):
    """The Inception Score of samples.

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
        self._comparison = comparison
        self._score = InceptionScore(options.inception_score_splits)

    def update(self, batch: Batch) -> None:
        if self._comparison.head is not None:
            self._score.update(self._comparison.head(batch.features), batch.indices)

    def compute(self, vectors: Vectors) -> list[Value]:
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


@final
class InceptionScore:
    """The score of streamed logits, as mean and spread over splits; sample i is in split i mod `splits`.

    Memory is one sum of K probabilities a split, whatever the number of samples.

    Args:
        splits: 10 in the literature; the score depends on how many there are.
    """

    def __init__(self, splits: int) -> None:
        import torch

        self._splits: Final = splits
        self._counts = torch.zeros(splits, dtype=torch.float64)
        self._negative_entropy = torch.zeros(splits, dtype=torch.float64)  # sum of sum_y p log p
        self._probabilities: Tensor | None = None

    def update(self, logits: Tensor, indices: Tensor) -> None:
        """Add logits [B, K] of the samples `indices` [B]."""
        from torch.nn.functional import one_hot

        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        member = one_hot(indices.to(p.device) % self._splits, self._splits).double().T
        total = (member @ p).cpu()
        self._counts += member.sum(1).cpu()
        self._negative_entropy += (member @ (p * log_p).sum(1)).cpu()
        self._probabilities = total if self._probabilities is None else self._probabilities + total

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits.

        Raises:
            ValueError: a split has fewer than two samples.
        """
        import torch

        if self._probabilities is None or self._counts.min() < 2:
            raise ValueError(f"an Inception Score needs 2 samples a split, {2 * self._splits} in all")
        marginal = self._probabilities / self._counts[:, None]
        divergence = self._negative_entropy / self._counts - torch.special.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))
