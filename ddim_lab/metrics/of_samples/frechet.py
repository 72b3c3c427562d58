"""The Fréchet distance ("FID" in Inception's features), and what held-out real images score at the same N.

Beside it, of the same samples: post-stratified, and at infinite N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.metrics.base import BESIDE, BY_INFLUENCE, Batch, Comparison, Metric, Running
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.metrics.base import Vectors
    from ddim_lab.metrics.estimates import Estimate
    from ddim_lab.metrics.frechet import FrechetDistance

__all__ = ["Frechet"]


BEYOND: Final = (
    "It covers sampling only: neither the training seed nor the bias that a finite N gives the Fréchet distance"
)

MOMENTS: Final = "sees two moments of the features only: mean and covariance"

EXTRAPOLATED: Final = (
    "Extrapolated: the intercept of a line through FD against 1/N (Chong & Forsyth 2020), ± its standard error; the"
    " reference stays as large as it is."
)


@final
class Frechet(Metric):
    """Always measured: see `ddim_lab.metrics.frechet`.

    Attributes:
        frechet_post_stratified: whether samples are weighted to the reference's class proportions, too, where a network
            at hand tells the classes.
        frechet_extrapolated: whether the distance at infinite N is estimated, too, where the samples are enough.
    """

    name: ClassVar[str] = "frechet"

    frechet_post_stratified: StrictBool
    frechet_extrapolated: StrictBool

    def start(self, comparison: Comparison) -> Running:
        return _Distance(self, comparison)


@final
class _Distance(Running):
    """Needs the vectors, and the classes of the samples where they are told."""

    def __init__(self, options: Frechet, comparison: Comparison) -> None:
        self._options, self._comparison = options, comparison
        self._classes: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        if batch.classes is not None:
            self._classes.append(batch.classes)

    def compute(self, vectors: Vectors) -> list[Value]:
        from ddim_lab.metrics.frechet import FrechetDistance

        comparison, options = self._comparison, self._options
        distance = FrechetDistance(comparison.reference.moments, comparison.device)
        found, name = distance.of(vectors), comparison.features.name
        known = f" · {comparison.features.known_as}" if comparison.features.known_as else ""
        beside = self._at_equal_n(vectors, distance, found)
        whole = _value(
            "fd",
            found,
            heading=name,
            facts=f"{comparison.facts}{known} · {MOMENTS}",
            error=f"{BY_INFLUENCE}. {BEYOND}",
            count=comparison.num_samples,
            level="fd_held_out_at_equal_n" if beside else None,
            level_says=f"{name} of held-out real images against the same reference",
            **_paired(found),
            comparable=comparison.comparable(),
            akin=comparison.features.akin,
        )
        values = [whole, *beside]
        if options.frechet_post_stratified and comparison.classes is not None:
            values.append(self._post_stratified(vectors, distance))
        if options.frechet_extrapolated:
            values.append(self._extrapolated(vectors, distance, found))
        return values

    def _at_equal_n(self, vectors: Vectors, distance: FrechetDistance, whole: Estimate) -> list[Value]:
        """The distances of as many samples as there are held-out images, and of those."""
        comparison, held_out = self._comparison, self._comparison.held_out
        if held_out is None or held_out.count is None:
            return []
        count = held_out.count
        real = comparison.of_held_out("fréchet", distance.of)
        assert real is not None
        # at the cell's own N it is the distance itself
        own = count == comparison.num_samples
        name = comparison.features.name
        samples = _value(
            "fd_at_equal_n",
            whole if own else distance.of(vectors[:count]),
            heading="" if own else f"{name} at N = {count:,}, beside held-out real images",
            column="" if own else f"FD at N = {count:,}",
            table=BESIDE,
            facts=comparison.facts,
            error=BY_INFLUENCE,
            against=None,
            count=count,
            level="fd_held_out_at_equal_n",
            level_says="Held-out real images",
            level_as="row",
            comparable={"num_samples": count},
        )
        images = _value(
            "fd_held_out_at_equal_n",
            real,
            error="by the influence of each image, to second order",
            label="held-out real images",
            facts="one draw of them",
            count=count,
            better=None,
        )
        return [Value(name="equal_n", value=count), samples, images]

    def _post_stratified(self, vectors: Vectors, distance: FrechetDistance) -> Value:
        import torch

        from ddim_lab.metrics.frechet import Strata

        comparison, classes = self._comparison, self._comparison.classes
        assert classes is not None
        shown: dict[str, Any] = {
            "name": "fd_post_stratified",
            "heading": f"{comparison.features.name}, post-stratified",
            "column": "FD, post-stratified",
            "table": BESIDE,
            "facts": f"{comparison.facts} · samples weighted to the reference's class proportions by {classes.by}",
            "count": comparison.num_samples,
            "counted": "",
            "better": "lower",
            "comparable": comparison.comparable(classes=classes.by),
        }
        if classes.shares is None:
            why_not = "the classes of the reference's images are not known"
            return Value(value=None, why_not=why_not, **shown)
        try:
            found = distance.of(vectors, Strata(torch.cat(self._classes), classes.shares))
        except ValueError as error:
            return Value(value=None, why_not=str(error), **shown)
        told = f"{BY_INFLUENCE}, within classes. {BEYOND}"
        return Value(value=found.value, se=found.se, error=told, **_paired(found), **shown)

    def _extrapolated(self, vectors: Vectors, distance: FrechetDistance, whole: Estimate) -> Value:
        shown: dict[str, Any] = {"name": "fd_extrapolated", "column": "FD, extrapolated", "table": BESIDE}
        try:
            found = distance.extrapolated(vectors, whole)
        except ValueError as error:
            return Value(value=None, why_not=str(error), **shown)
        shown |= {"count": self._comparison.num_samples, "error": BY_INFLUENCE, "notes": (EXTRAPOLATED,)}
        return Value(value=found.value, se=found.se, **_paired(found), **shown)


def _paired(found: Estimate) -> dict[str, Any]:
    """What the difference to another cell's value is taken from."""
    return {"replicates": found.replicates, "interactions": found.interactions}


def _value(name: str, found: Estimate, **more: Any) -> Value:
    return Value(name=name, value=found.value, se=found.se, **{"counted": "", "better": "lower", **more})
