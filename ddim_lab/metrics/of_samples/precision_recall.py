"""Improved precision and recall: which samples look real, and how much of the real images the samples reach.

A set's region is the union of balls round its points, each as large as the distance to the point's k-th nearest
neighbour in the set. Precision is the share of samples in the region of the real images, recall the share of real
images in the region of the samples.

Source: Kynkäänniemi et al. (2019), Improved Precision and Recall Metric for Assessing Generative Models (k = 3).

torch-fidelity's `prc_features_to_metric` gives the same values, as a test shows. It is not used, because it takes all
vectors in memory, holds 10,000 x M distances at once (2 GB at 50,000) or all of them, and computes the radii of the
reference anew for every cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, NO_IMAGES, Comparison, Metric, Running
from ddim_lab.metrics.distances import squared_distances, squared_radii
from ddim_lab.metrics.features import KEPT_AT_MOST
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ddim_lab.metrics.base import Vectors

__all__ = ["PrecisionRecall", "precision_recall"]


DRIFT: Final = "Precision and recall drift with the number of images: compare them at equal N alone."


@final
class PrecisionRecall(Metric):
    """Precision and recall of samples.

    Attributes:
        precision_recall: whether they are measured.
        neighbours: k.
    """

    name: ClassVar[str] = "precision_recall"
    needs_vectors: ClassVar[bool] = True

    precision_recall: StrictBool
    neighbours: PositiveInt

    @property
    def on(self) -> bool:
        return self.precision_recall

    def start(self, comparison: Comparison) -> Running:
        return _Shares(self, comparison)


@final
class _Shares(Running):
    def __init__(self, options: PrecisionRecall, comparison: Comparison) -> None:
        self._neighbours, self._comparison = options.neighbours, comparison

    def compute(self, vectors: Vectors) -> list[Value]:
        reference, k, vectors = self._comparison.reference.features, self._neighbours, vectors[:KEPT_AT_MOST]
        if reference is None:
            return self._values(None, why_not=NO_IMAGES)
        if min(len(vectors), len(reference)) <= k:
            return self._values(None, why_not=f"{k} neighbours need more than {k} images")
        found = precision_recall(vectors, reference, k, self._comparison.radii(k), self._comparison.device)
        return self._values(found, count=len(vectors))

    def _values(
        self, found: tuple[float, float] | None, why_not: str | None = None, count: int | None = None
    ) -> list[Value]:
        # `precision` alone is the arithmetic's.
        says = (
            ("improved_precision", "precision", "share of samples that look like some real image"),
            ("improved_recall", "recall", "share of real images that look like some sample"),
        )
        notes = ("On the features of the Fréchet distance.", DRIFT)
        return [
            Value(
                name=name,
                value=value,
                why_not=why_not,
                column=column,
                table=BESIDE,
                notes=notes,
                facts=facts,
                count=count,
                better="higher",
            )
            for (name, column, facts), value in zip(says, found or (None, None), strict=True)
        ]


# -- the arithmetic -----------------------------------------------------------------------------------


def precision_recall(
    samples: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    neighbours: int,
    reference_radii: np.ndarray[Any, Any] | None = None,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Precision and recall, both from 0 to 1.

    Args:
        samples, reference: features [N, D] and [M, D]; memory-mapped arrays are accepted. N and M should be equal:
            more points make smaller balls.
        neighbours: k.
        reference_radii: `squared_radii` of the reference, where they are known.
        device: where it is computed, in float32; None for the CPU.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    radii = squared_radii(reference, neighbours, device) if reference_radii is None else reference_radii
    precision = _share_inside(samples, reference, radii, device)
    return precision, _share_inside(reference, samples, squared_radii(samples, neighbours, device), device)


def _share_inside(
    points: np.ndarray[Any, Any],
    centres: np.ndarray[Any, Any],
    radii: np.ndarray[Any, Any],
    device: torch.device | None,
) -> float:
    import torch

    limits = torch.tensor(radii, device=device)
    inside = sum(int((part <= limits).any(1).sum()) for part in squared_distances(points, centres, device))
    return inside / len(points)
