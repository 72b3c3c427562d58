"""The kernel distance ("KID" in Inception's features)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, final

from pydantic import Field, StrictBool, StrictInt

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, NO_IMAGES, Comparison, Metric, Running
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
        shown: dict[str, Any] = {
            "column": "KID" if comparison.features.is_fid else "kernel distance",
            "table": BESIDE,
            "error": "a spread over parts of the images, no standard error",
        }
        notes = ("On the features of the Fréchet distance.",)
        if vectors is None or comparison.reference.features is None:
            return [Value(name="kid", value=None, why_not=NO_IMAGES, notes=notes, **shown)]
        asked = options.kid_subsets, options.kid_subset_size
        found = kernel_distance(vectors, comparison.reference.features, *asked, comparison.device)
        subsets = "subset" if found.subsets == 1 else "subsets"
        told = f"Kernel distance: mean over {found.subsets} {subsets} of {found.subset_size:,} images."
        if found.subset_size >= comparison.num_samples and found.subsets > 1:
            count = comparison.num_samples
            told += f" All {count:,} samples are in each: its spread is over subsets of the reference alone."
        value = Value(
            name="kid",
            value=found.value,
            spread=found.spread,
            count=len(vectors),
            better="lower",
            notes=(*notes, told),
            **shown,
        )
        return [value]
