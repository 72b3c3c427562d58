"""The kernel distance ("KID" in Inception's features)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, final

from pydantic import Field, StrictBool, StrictInt

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import NO_IMAGES, Comparison, Metric, Running
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    from ddim_lab.metrics.base import Vectors

__all__ = ["Kid"]


@final
class Kid(Metric):
    """See `ddim_lab.metrics.kernel`.

    Attributes:
        kid: whether it is measured.
        kid_subsets, kid_subset_size: random subsets that it is averaged over, and the vectors of either set in one.
    """

    name: ClassVar[str] = "kid"
    needs_vectors: ClassVar[bool] = True

    kid: StrictBool
    kid_subsets: PositiveInt
    kid_subset_size: Annotated[StrictInt, Field(ge=2)]

    @property
    def on(self) -> bool:
        return self.kid

    def start(self, comparison: Comparison) -> Running:
        return _KernelDistance(self, comparison)


@final
class _KernelDistance(Running):
    def __init__(self, options: Kid, comparison: Comparison) -> None:
        self._options, self._comparison = options, comparison

    def compute(self, vectors: Vectors | None) -> list[Value]:
        from ddim_lab.metrics.kernel import kernel_distance

        options, comparison = self._options, self._comparison
        heading = "KID" if comparison.features.is_fid else "Kernel distance"
        if vectors is None or comparison.reference.features is None:
            return [Value(name="kid", value=None, why_not=NO_IMAGES, heading=heading)]
        asked = options.kid_subsets, options.kid_subset_size
        found = kernel_distance(vectors, comparison.reference.features, *asked, comparison.device)
        value = Value(
            name="kid",
            value=found.value,
            heading=heading,
            spread=found.spread,
            error="over subsets",
            count=len(vectors),
            better="lower",
            comparable=comparison.comparable(subsets=found.subsets, subset_size=found.subset_size),
        )
        return [value]
