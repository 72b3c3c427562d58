"""Maximum mean discrepancy with a Gaussian kernel: a distance that no difference of two distributions escapes.

    k(a, b) = exp(-|a - b|^2 / (2 sigma^2))
    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Source: Gretton et al. (2012), A Kernel Two-Sample Test, Eq. 3: unbiased, so that its expectation does not depend on N.
The kernel is characteristic: MMD is 0 for equal distributions alone, where a Fréchet distance is 0 for equal means and
covariances, and a polynomial kernel of degree 3 for equal moments up to the third.

Neither torchmetrics nor torch-fidelity has it with this kernel over all pairs, nor with an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, final

from pydantic import Field, StrictBool

from ddim_lab.metrics.base import BESIDE, BY_INFLUENCE, NO_IMAGES, Comparison, Metric, Running
from ddim_lab.metrics.distances import squared_distances
from ddim_lab.metrics.features import KEPT_AT_MOST
from ddim_lab.store import content_key, read_json, write_json
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ddim_lab.metrics.base import Vectors
    from ddim_lab.metrics.estimates import Estimate

__all__ = ["GaussianKernel", "Mmd", "half_median_distance"]

TIMES: Final = 1000.0
"""The values' unit: MMD^2 of good samples is small."""


@final
class Mmd(Metric):
    """The discrepancy of samples to the reference.

    Attributes:
        mmd: whether it is measured.
        mmd_bandwidth: sigma, 1e-6 to 1e6; None for half the median distance between images of the reference.
    """

    name: ClassVar[str] = "mmd"
    needs_vectors: ClassVar[bool] = True

    mmd: StrictBool
    mmd_bandwidth: Annotated[float, Field(ge=1e-6, le=1e6, strict=True)] | None

    @property
    def on(self) -> bool:
        return self.mmd

    def start(self, comparison: Comparison) -> Running:
        return _Discrepancy(self.mmd_bandwidth, comparison)


@final
class _Discrepancy(Running):
    def __init__(self, bandwidth: float | None, comparison: Comparison) -> None:
        self._bandwidth, self._comparison = bandwidth, comparison

    def compute(self, vectors: Vectors) -> list[Value]:
        heading = f"{TIMES:.0f} MMD² ({self._comparison.features.sees})"
        shown: dict[str, Any] = {"heading": heading, "column": f"{TIMES:.0f} MMD²", "table": BESIDE}
        chosen = "half the median distance in the reference" if self._bandwidth is None else "given"
        told = f"sees any difference · Gaussian kernel, σ = {{bandwidth:.4g}} ({chosen})"
        values = self._values("mmd", vectors, self._bandwidth, told, **shown)
        if (known := self._comparison.features.kernel) is not None:
            told = f"Gaussian kernel, σ = {{bandwidth:.4g}}, biased, times {TIMES:.0f}, as published ({known.source})"
            shown = {"heading": known.name, "column": known.name, "table": BESIDE}
            values += self._values(known.name.lower(), vectors, known.bandwidth, told, biased=True, **shown)
        return values

    def _values(
        self, name: str, vectors: Vectors, bandwidth: float | None, told: str, *, biased: bool = False, **shown: Any
    ) -> list[Value]:
        """A discrepancy and, where there are held-out images, theirs.

        Args:
            name: the value's.
            bandwidth: sigma; None for half the median distance.
            told: what facts say of it, a template that is given the bandwidth.
            biased: as `GaussianKernel.of`.
            shown: heading, column and table.
        """
        comparison = self._comparison
        reference = comparison.reference.features
        if reference is None or min(len(vectors), len(reference)) < 2:
            why_not = NO_IMAGES if reference is None else "a discrepancy needs at least 2 images of either set"
            return [Value(name=name, value=None, why_not=why_not, facts=comparison.facts, **shown)]
        kernel = self._kernel(reference, bandwidth)
        found = kernel.of(vectors[:KEPT_AT_MOST], reference, biased=biased)
        estimator = {"estimator": "biased"} if biased else {}
        real = comparison.of_held_out(
            " ".join(["mmd", repr(kernel.bandwidth), *estimator.values()]),
            lambda images: kernel.of(images, reference, biased=biased),
        )
        told = told.format(bandwidth=kernel.bandwidth)
        whole = _value(
            name,
            found,
            **shown,
            facts=f"{comparison.facts} · {told}",
            better="lower",
            unbiased=not biased,
            level=f"{name}_held_out" if real is not None else None,
            level_says=f"{shown['heading']} of held-out real images against the same reference",
            replicates=tuple(TIMES * r for r in found.replicates),
            interactions=tuple(TIMES * c for c in found.interactions),
            count=min(comparison.num_samples, KEPT_AT_MOST),
            comparable=comparison.comparable(bandwidth=f"{kernel.bandwidth:.9g}", **estimator),
        )
        if real is None or comparison.held_out is None:
            return [whole]
        count = comparison.held_out.count
        return [whole, _value(f"{name}_held_out", real, label="held-out real images", count=count)]

    def _kernel(self, reference: Vectors, given: float | None) -> GaussianKernel:
        """The kernel, with its mean over the reference, the same for every cell: from the store, or computed."""
        comparison = self._comparison

        def build(folder: Path) -> None:
            bandwidth = half_median_distance(reference, comparison.device) if given is None else given
            kernel = GaussianKernel(bandwidth, comparison.device)
            write_json(folder / "kernel.json", {"bandwidth": bandwidth, "within": kernel.within(reference)})

        key = content_key({"kernel": given, "reference": comparison.reference.key, "kept": len(reference)})
        folder, _ = comparison.store.obtain("references", key, build)
        kept = read_json(folder / "kernel.json")
        return GaussianKernel(kept["bandwidth"], comparison.device, kept["within"])


def _value(name: str, found: Estimate, **more: Any) -> Value:
    se = None if found.se is None else TIMES * found.se
    return Value(name=name, value=TIMES * found.value, se=se, error=BY_INFLUENCE, counted="", **more)


# -- the arithmetic -----------------------------------------------------------------------------------

MEDIAN_OF: Final = 2000
"""Images, at most, whose distances the median is of."""


def half_median_distance(reference: np.ndarray[Any, Any], device: torch.device | None = None) -> float:
    """Half the median of the distances between the reference's first 2,000 images; of equal images 1."""
    import torch

    first = reference[:MEDIAN_OF]
    squares = torch.cat([part.cpu() for part in squared_distances(first, first, device)])
    above = torch.triu_indices(len(first), len(first), offset=1)
    return 0.5 * math.sqrt(float(squares[above[0], above[1]].median())) or 1.0


@final
class GaussianKernel:
    """MMD^2 with a Gaussian kernel.

    Its error is taken from its expansion (`ddim_lab.metrics.influence`), in which it ends:
    a(x) = 2 (E k(x, X) - E k(x, Y)) less its mean, b(x, x') = 2 k(x, x') less its means. The reference counts as known.

    Args:
        bandwidth: sigma, above 0.
        device: where it is computed, in float32 with sums in float64; None for the CPU.
        reference_mean: `within` of the reference, where it is known.
    """

    def __init__(
        self, bandwidth: float, device: torch.device | None = None, reference_mean: float | None = None
    ) -> None:
        self.bandwidth = bandwidth
        self._device, self._reference_mean = device, reference_mean

    def within(self, vectors: np.ndarray[Any, Any]) -> float:
        """mean_{i != j} k of one set [M, D]."""
        count, total = len(vectors), 0.0
        for part in squared_distances(vectors, vectors, self._device):
            total += float(self._kernel(part).double().sum())
        return (total - count) / (count * (count - 1))

    def of(self, samples: np.ndarray[Any, Any], reference: np.ndarray[Any, Any], *, biased: bool = False) -> Estimate:
        """MMD^2 of samples [N, D] to a reference [M, D]; at least two of each.

        Args:
            samples, reference: the two sets.
            biased: with k(x_i, x_i) = 1 and k(y_i, y_i) = 1 in the means (Gretton et al. 2012, Eq. 5): never below 0,
                and above the unbiased by (1 - mean k(x_i, x_j)) / N + (1 - mean k(y_i, y_j)) / M.
        """
        import torch

        from ddim_lab.metrics.influence import estimate, paired_groups

        count = len(samples)
        groups = paired_groups(count)
        within = torch.empty(count, dtype=torch.float64)  # mean of k(x_i, x_j) over j other than i
        by_group = torch.zeros(count, groups, dtype=torch.float64)  # sum of the same over the group's j
        start = 0
        named = torch.arange(count, device=self._device) % max(1, groups)
        for part in squared_distances(samples, samples, self._device):
            rows = torch.arange(len(part), device=part.device)
            kernel = self._kernel(part).double()
            kernel[rows, start + rows] = 0.0
            stop = start + len(part)
            within[start:stop] = kernel.sum(1).cpu() / (count - 1)
            if groups:
                sums = torch.zeros(len(part), groups, dtype=torch.float64, device=part.device)
                by_group[start:stop] = sums.index_add_(1, named, kernel).cpu()
            start = stop
        across = torch.cat(
            [self._kernel(part).double().mean(1).cpu() for part in squared_distances(samples, reference, self._device)]
        )
        known = self.within(reference) if self._reference_mean is None else self._reference_mean
        if biased:
            within = (within * (count - 1) + 1.0) / count
            known = (known * (len(reference) - 1) + 1.0) / len(reference)
        influence = 2.0 * (within - across)
        return estimate(
            float(within.mean() + known - 2.0 * across.mean()),
            influence - influence.mean(),
            _pairs(by_group, groups) if groups else None,
        )

    def _kernel(self, squares: torch.Tensor) -> torch.Tensor:
        return squares.mul_(-0.5 / self.bandwidth**2).exp_()


def _pairs(by_group: torch.Tensor, groups: int) -> torch.Tensor:
    """2 k averaged over the pairs of two groups, less the means: the second derivative in the groups' directions."""
    import torch

    member = torch.arange(len(by_group)) % groups
    sizes = torch.bincount(member, minlength=groups).double()
    sums = torch.zeros(groups, groups, dtype=torch.float64).index_add_(0, member, by_group)
    means = 2.0 * sums / (sizes[:, None] * sizes[None, :])
    shares = sizes / sizes.sum()
    rows = means @ shares
    return means - rows[:, None] - rows[None, :] + shares @ rows
