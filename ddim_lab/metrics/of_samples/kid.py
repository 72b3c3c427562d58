"""Kernel distance: an unbiased squared maximum mean discrepancy between feature sets ("KID" in Inception's features).

    k(a, b) = (a . b / D + 1)^3
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Source: Bińkowski et al. (2018), Demystifying MMD GANs. Its expectation does not depend on the number of samples.

torch-fidelity's `kid_features_to_metric` gives the same values, as a test shows. It is not used, because it takes all
vectors in memory, computes on the CPU alone, takes the kernels anew for every subset, and refuses sets that are smaller
than a subset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, final

from pydantic import Field, StrictBool, StrictInt

from ddim_lab.config.options import PositiveInt
from ddim_lab.metrics.base import BESIDE, NO_IMAGES, Comparison, Metric, Running
from ddim_lab.metrics.features import KEPT_AT_MOST
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ddim_lab.metrics.base import Vectors

__all__ = ["KernelDistance", "Kid", "kernel_distance"]


@final
class Kid(Metric):
    """The kernel distance of samples to the reference.

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

    def compute(self, vectors: Vectors) -> list[Value]:
        options, comparison = self._options, self._comparison
        shown: dict[str, Any] = {
            "column": "KID" if comparison.features.is_fid else "kernel distance",
            "table": BESIDE,
            "error": "a spread over parts of the images, no standard error",
        }
        notes = ("On the features of the Fréchet distance.",)
        if comparison.reference.features is None:
            return [Value(name="kid", value=None, why_not=NO_IMAGES, notes=notes, **shown)]
        asked = options.kid_subsets, options.kid_subset_size
        vectors = vectors[:KEPT_AT_MOST]
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


# -- the arithmetic -----------------------------------------------------------------------------------

SUBSET_SEED: Final = 2020
"""Of numpy's RandomState, from which torch-fidelity draws the same subsets."""

TOGETHER_AT_MOST: Final = 4096
"""Vectors whose kernel matrices are small enough (128 MiB) to be taken once for all subsets."""


@final
@dataclass(frozen=True)
class KernelDistance:
    """An average over subsets.

    Attributes:
        value: mean of MMD^2; about 0, and as often below as above, where both sets have one distribution.
        spread: standard deviation over the subsets, as the field prints it; they overlap, so it is not a standard
            error. None where there is one subset.
        subsets, subset_size: how many, and of how many vectors of either set.
    """

    value: float
    spread: float | None
    subsets: int
    subset_size: int


def kernel_distance(
    samples: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    subsets: int,
    subset_size: int,
    device: torch.device | None = None,
) -> KernelDistance:
    """Kernel distance of samples to a reference, averaged over random subsets of both; the same ones every time.

    Args:
        samples, reference: features [N, D] and [M, D]; memory-mapped arrays are accepted.
        subsets: how many.
        subset_size: vectors of either set in a subset; all of the smaller set where it has fewer.
        device: where it is computed, in float64; None for the CPU.

    Raises:
        ValueError: a set has fewer than two vectors.
    """
    import numpy as np
    import torch

    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 vectors of either set, got {size}")
    if size == len(samples) == len(reference):
        subsets = 1  # all would be the same

    def on(vectors: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(np.asarray(vectors), dtype=torch.float64, device=device)

    generator = np.random.RandomState(SUBSET_SEED)
    chosen = [
        (generator.choice(len(samples), size, replace=False), generator.choice(len(reference), size, replace=False))
        for _ in range(subsets)
    ]
    if max(len(samples), len(reference)) <= TOGETHER_AT_MOST and subsets > 1:
        in_x, in_y = (
            torch.zeros(len(both), subsets, dtype=torch.float64, device=device) for both in (samples, reference)
        )
        for number, pair in enumerate(chosen):
            for member, indices in zip((in_x, in_y), pair, strict=True):
                member[torch.from_numpy(indices).to(member.device), number] = 1.0
        values = _discrepancies(on(samples), on(reference), in_x, in_y, size)
    else:
        every = torch.ones(size, 1, dtype=torch.float64, device=device)
        values = torch.cat([_discrepancies(on(samples[i]), on(reference[j]), every, every, size) for i, j in chosen])
    spread = float(values.std(correction=0)) if subsets > 1 else None
    return KernelDistance(float(values.mean()), spread, subsets, size)


def _discrepancies(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor, size: int) -> Tensor:
    """MMD^2 of each subset: column s of in_x [N, S] and in_y [M, S] is 1 at the members of subset s, `size` of each."""
    within = [(member * (_kernel(z, z).fill_diagonal_(0.0) @ member)).sum(0) for z, member in ((x, in_x), (y, in_y))]
    across = (in_x * (_kernel(x, y) @ in_y)).sum(0)
    return (within[0] + within[1]) / (size * (size - 1)) - 2.0 * across / size**2


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    product = (a @ b.T).div_(a.shape[1]).add_(1.0)
    return product * product * product
