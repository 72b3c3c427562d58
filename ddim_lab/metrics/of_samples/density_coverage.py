"""Density and coverage: how densely real images surround the samples, and how many real images have a sample nearby.

Round each of N real images x_i lies a ball as large as the distance to its k-th nearest other real image. Of M samples:

    density  = 1 / (k M) sum_j |{i : sample j is in the ball of x_i}|
    coverage = 1 / N |{i : some sample is in the ball of x_i}|

Source: Naeem et al. (2020), Reliable Fidelity and Diversity Metrics for Generative Models, Eq. 3 and 4 (k = 5).

Balls are round real images alone, so that one foreign sample does not widen a region, as it does in recall; and a
sample counts by how many balls it is in, so that one real outlier with a large ball weighs little, where in precision
it makes all samples within it look real. Density may be above 1.

torch-fidelity and torchmetrics have neither of them.
"""

from __future__ import annotations

import math
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
    from ddim_lab.metrics.estimates import Estimate

__all__ = ["DensityCoverage", "density_coverage", "expected_coverage"]

OF_DENSITY: Final = "by the influence of each sample"

OF_COVERAGE: Final = "by what one group of samples alone covers, and two groups alone"


SAYS: Final = {
    "density": "how many real images surround a sample, as a multiple of those round a real image",
    "coverage": "the share of real images that have a sample as near as their k-th neighbour",
}


@final
class DensityCoverage(Metric):
    """Density and coverage of samples.

    Attributes:
        density_coverage: whether they are measured.
        density_coverage_neighbours: k.
    """

    name: ClassVar[str] = "density_coverage"
    needs_vectors: ClassVar[bool] = True

    density_coverage: StrictBool
    density_coverage_neighbours: PositiveInt

    @property
    def on(self) -> bool:
        return self.density_coverage

    def start(self, comparison: Comparison) -> Running:
        return _Balls(self, comparison)


@final
class _Balls(Running):
    def __init__(self, options: DensityCoverage, comparison: Comparison) -> None:
        self._neighbours, self._comparison = options.density_coverage_neighbours, comparison

    def compute(self, vectors: Vectors) -> list[Value]:
        comparison, k, vectors = self._comparison, self._neighbours, vectors[:KEPT_AT_MOST]
        reference = comparison.reference.features
        if reference is None or len(reference) <= k:
            why_not = NO_IMAGES if reference is None else f"{k} neighbours need more than {k} images"
            return [self._value(name, why_not=why_not) for name in SAYS]
        density, coverage = density_coverage(vectors, reference, k, comparison.radii(k), comparison.device)
        count = len(vectors)
        level = expected_coverage(count, len(reference), k)
        return [
            self._value("density", density, error=OF_DENSITY, count=count, of_equal="1"),
            self._value("coverage", coverage, error=OF_COVERAGE, count=count, of_equal=f"{level:.3f}"),
        ]

    def _value(self, name: str, found: Estimate | None = None, of_equal: str = "", **more: Any) -> Value:
        k = self._neighbours
        if found is not None:
            more |= {"value": found.value, "se": found.se}
            more |= {"replicates": found.replicates, "interactions": found.interactions}
            told = f"with k = {k}; of new images like the reference's {of_equal} is expected at this N"
            more["notes"] = (f"{name.capitalize()}: {SAYS[name]}, {told}.",)
        return Value(
            name=name,
            column=name,
            table=BESIDE,
            better="higher",
            comparable=self._comparison.comparable(neighbours=k),
            **{"value": None, **more},
        )


# -- the arithmetic -----------------------------------------------------------------------------------


def expected_coverage(samples: int, reference: int, neighbours: int) -> float:
    """Coverage of M samples of the same distribution as N real images, on average over both:

        1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k))

    Source: Naeem et al. (2020), section 3.3. The expected density is 1.

    Args:
        samples, reference: M and N > k.
        neighbours: k.
    """
    return 1.0 - math.prod((reference - i) / (samples + reference - i) for i in range(1, neighbours + 1))


def density_coverage(
    samples: np.ndarray[Any, Any],
    reference: np.ndarray[Any, Any],
    neighbours: int,
    reference_radii: np.ndarray[Any, Any] | None = None,
    device: torch.device | None = None,
) -> tuple[Estimate, Estimate]:
    """Density, from 0 up, and coverage, from 0 to 1, with their errors; the reference counts as known.

    A mean over samples is linear in their distribution: density's influence is what each sample adds. Coverage is not:
    leaving out a group of samples uncovers what it alone covers, which gives the jackknife's variance S_1. That counts
    an effect of r samples together r times, and pairs of groups give the S_2 that counts it r (r - 1) / 2 times, so
    that the variance lies between S_1 - S_2 and S_1 (as in Bonferroni's inequalities). The middle of the two is taken.

    Args:
        samples, reference: features [M, D] and [N, D]; memory-mapped arrays are accepted.
        neighbours: k.
        reference_radii: `squared_radii` of the reference, where they are known.
        device: where it is computed, in float32; None for the CPU.

    Raises:
        ValueError: the reference has no k-th neighbour.
    """
    import torch

    from ddim_lab.metrics.estimates import GROUPS
    from ddim_lab.metrics.influence import estimate, paired_groups

    radii = squared_radii(reference, neighbours, device) if reference_radii is None else reference_radii
    limits = torch.tensor(radii, device=device)
    count = len(samples)
    groups, paired = min(GROUPS, count), paired_groups(count)
    # reached[g, i]: a sample of group g is in the ball of real image i
    reached = torch.zeros(groups, len(reference), dtype=torch.bool, device=device)
    balls: list[torch.Tensor] = []
    start = 0
    for part in squared_distances(samples, reference, device):
        inside = part <= limits
        balls.append(inside.sum(1).double().cpu())
        row = 0
        while row < len(inside):  # samples of the groups g, g + 1, ... follow each other
            g = (start + row) % groups
            these = inside[row : row + groups - g]
            reached[g : g + len(these)] |= these
            row += len(these)
        start += len(inside)
    density = torch.cat(balls) / neighbours

    covered = reached.any(0)
    alone = (reached & (reached.sum(0) == 1)).double().mean(1).cpu()
    uncovered = (groups - 1) * alone[torch.arange(count) % groups]
    pairs = None
    if paired:
        by_pair = torch.stack([reached[g::paired].any(0) for g in range(paired)])
        by_two = by_pair[:, by_pair.sum(0) == 2].double()
        together = (by_two @ by_two.T / len(reference)).cpu().fill_diagonal_(0.0)
        # the second differences of leaving groups out, as derivatives: their rows add up to 0
        pairs = math.sqrt(0.5) * (paired - 1) ** 2 * (torch.diag(together.sum(1)) - together)
    return (
        estimate(float(density.mean()), density - density.mean(), None),
        estimate(float(covered.double().mean()), uncovered - uncovered.mean(), pairs),
    )
