"""Improved precision and recall: shares of samples that look real, and of real images that samples look like."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, NO_IMAGES, Comparison, Metric, Running
from ddim_lab.store import content_key
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from ddim_lab.metrics.base import Vectors

__all__ = ["PrecisionRecall"]


DRIFT: Final = "Precision and recall drift with the number of images: compare them at equal N alone."


@final
class PrecisionRecall(Metric):
    """See `ddim_lab.metrics.precision_recall`.

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

    def compute(self, vectors: Vectors | None) -> list[Value]:
        from ddim_lab.metrics.precision_recall import precision_recall

        reference, k = self._comparison.reference.features, self._neighbours
        if vectors is None or reference is None:
            return self._values(None, why_not=NO_IMAGES)
        if min(len(vectors), len(reference)) <= k:
            return self._values(None, why_not=f"{k} neighbours need more than {k} images")
        found = precision_recall(vectors, reference, k, self._radii(reference), self._comparison.device)
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

    def _radii(self, reference: Vectors) -> Vectors:
        """The reference's radii, which are the same for every cell: from the store, or computed."""
        import numpy as np

        from ddim_lab.metrics.precision_recall import squared_radii

        comparison, k = self._comparison, self._neighbours

        def build(folder: Path) -> None:
            np.save(folder / "radii.npy", squared_radii(reference, k, comparison.device))

        key = content_key({"reference": comparison.reference.key, "kept": len(reference), "neighbours": k})
        folder, _ = comparison.store.obtain("references", key, build)
        radii: Vectors = np.load(io.BytesIO((folder / "radii.npy").read_bytes()), allow_pickle=False)
        return radii
