"""The Fréchet distance ("FID" in Inception's features), and what held-out real images score at the same N."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

from ddim_lab.metrics.base import JACKKNIFE, Batch, Comparison, Metric, Running
from ddim_lab.metrics.estimates import jackknife_se
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from ddim_lab.metrics.base import Vectors
    from ddim_lab.metrics.statistics import FeatureSums

__all__ = ["Frechet"]


BEYOND: Final = (
    "It covers sampling only: neither the training seed nor the bias that a finite N gives the Fréchet distance"
)


@final
class Frechet(Metric):
    """Always measured: see `ddim_lab.metrics.frechet`."""

    name: ClassVar[str] = "frechet"

    def start(self, comparison: Comparison) -> Running:
        return _Distance(comparison)


@final
class _Distance(Running):
    """Keeps sums alone, whatever the number of samples."""

    def __init__(self, comparison: Comparison) -> None:
        from ddim_lab.metrics.frechet import FrechetDistance  # torchmetrics: seconds to import

        self._comparison, held_out = comparison, comparison.held_out
        self._distance = FrechetDistance(comparison.reference.moments).to(comparison.device)
        self._equal_n = 0 if held_out is None else held_out.num_images
        self._first: FeatureSums | None = None

    def update(self, batch: Batch) -> None:
        from ddim_lab.metrics.statistics import FeatureSums

        self._distance.update(batch.features, batch.indices)
        start = int(batch.indices[0])
        if start < self._equal_n:
            first = FeatureSums.of([batch.features[: self._equal_n - start]])
            self._first = first if self._first is None else self._first + first

    def compute(self, vectors: Vectors | None) -> list[Value]:
        comparison, replicates = self._comparison, self._distance.leave_one_out()
        beside, name = self._at_equal_n(), comparison.features.name
        whole = Value(
            name="fd",
            value=float(self._distance.compute()),
            heading=name,
            facts=comparison.facts,
            se=jackknife_se(replicates) if len(replicates) > 1 else None,
            error=f"{JACKKNIFE}. {BEYOND}",
            count=comparison.num_samples,
            counted="",
            better="lower",
            level="fd_held_out_at_equal_n" if beside else None,
            level_says=f"{name} of held-out real images against the same reference",
            replicates=tuple(replicates),
            comparable=comparison.comparable(),
            akin=("FID", "FD"),
        )
        return [whole, *beside]

    def _at_equal_n(self) -> list[Value]:
        """The distances of as many samples as there are held-out images, and of those."""
        comparison, held_out, count = self._comparison, self._comparison.held_out, self._equal_n
        if held_out is None or self._first is None or self._first.count != count:
            return []
        heading = f"{comparison.features.name} at N = {count:,}, beside held-out real images"
        samples = Value(
            name="fd_at_equal_n",
            value=self._distance.between(comparison.reference.moments, self._first),
            # at the cell's own N it is the distance itself
            heading="" if count == comparison.num_samples else heading,
            facts=comparison.facts,
            against=None,
            count=count,
            counted="",
            better="lower",
            level="fd_held_out_at_equal_n",
            level_says="Held-out real images",
            level_as="row",
            comparable={"num_samples": count},
        )
        real = Value(
            name="fd_held_out_at_equal_n",
            value=held_out.fd,
            se=held_out.fd_se,
            error="by the delete-a-group jackknife over groups of images",
            label="held-out real images",
            facts="one draw of them",
            count=count,
            counted="",
        )
        return [Value(name="equal_n", value=count), samples, real]
