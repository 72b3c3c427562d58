"""Memorisation: whether samples are nearer to the training images than new real images are.

d(x) is the distance of an image's features to those of the nearest training image. A sample s is set beside n held-out
images h by the share of them that are nearer to the training images than it is,

    r(s) = 1/n sum_h ( 1[d(h) < d(s)] + 1/2 1[d(h) = d(s)] )

and of M samples two shares are given:

    nearer  = 1 - 1/M sum_s r(s)           of pairs of a sample and a held-out image, those with the sample nearer
    nearest = 1/M sum_s 1[r(s) < 1/20]     of samples, those nearer than 95 % of the held-out images

Source: Meehan, Chaudhuri and Dasgupta (2020), A Non-Parametric Test to Detect Data-Copying in Generative Models. The
first is their statistic of the whole space, Mann and Whitney's U / (M n), with the sides exchanged. Of new images like
the held-out ones it is 1/2 on average, and 1/2 + c/2 where a share c are copies; the second is then 1/20 and
1/20 + 19/20 c, and sees few copies better.

A sample may be near the training images without being a copy, as blurred images are: a share above chance says that it
is worth looking at the pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.metrics.base import BESIDE, NO_IMAGES, Comparison, Metric, Running
from ddim_lab.metrics.distances import squared_nearest
from ddim_lab.metrics.features import KEPT_AT_MOST
from ddim_lab.store.records import Value

if TYPE_CHECKING:
    import numpy as np

    from ddim_lab.metrics.base import Vectors
    from ddim_lab.metrics.estimates import Estimate

__all__ = ["Memorisation", "chance", "memorised"]

CLOSEST: Final = 20
"""One held-out image in so many: a sample nearer than all others counts as nearest."""

NO_HELD_OUT: Final = "it needs the training images as reference, and at least two held-out images beside them"

NEARER: Final = "nearer to training than held-out"

NEAREST: Final = "nearer than 95 % of held-out"

ERROR: Final = "by the influence of each sample. The training and held-out images count as known"


@final
class Memorisation(Metric):
    """How many samples are nearer to the training images than held-out images are.

    Attributes:
        memorisation: whether it is measured.
    """

    name: ClassVar[str] = "memorisation"
    needs_vectors: ClassVar[bool] = True

    memorisation: StrictBool

    @property
    def on(self) -> bool:
        return self.memorisation

    def start(self, comparison: Comparison) -> Running:
        return _Copies(comparison)


@final
class _Copies(Running):
    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def compute(self, vectors: Vectors) -> list[Value]:
        comparison, vectors = self._comparison, vectors[:KEPT_AT_MOST]
        reference, held_out = comparison.reference.features, comparison.held_out
        shown: dict[str, Any] = {"unit": "share", "table": BESIDE}
        if reference is None or held_out is None or held_out.features is None:
            why_not = NO_IMAGES if reference is None else NO_HELD_OUT
            return [Value(name="memorisation", value=None, why_not=why_not, column=NEARER, **shown)]
        distances = squared_nearest(vectors, reference, comparison.device)
        nearer, nearest = memorised(distances, comparison.held_out_to_reference())
        count, n = len(vectors), len(held_out.features)
        training = "training image"
        if len(reference) == KEPT_AT_MOST:
            training = f"{training} of the first {KEPT_AT_MOST:,}"
        shares = (
            (
                "memorisation",
                NEARER,
                f"pairs with held-out images of which the sample is nearer to a {training}",
                nearer,
            ),
            (
                "memorisation_nearest",
                NEAREST,
                f"samples nearer to a {training} than 95 % of held-out images are",
                nearest,
            ),
        )
        return [
            Value(
                name=name,
                value=found.value,
                se=found.se,
                error=ERROR,
                replicates=found.replicates,
                count=count,
                column=column,
                notes=(
                    f"{column.capitalize()}: the share of {of}; by chance {100 * level:.3g} % ± {100 * spread:.2g} %,"
                    f" with {n:,} held-out images.",
                ),
                comparable=comparison.comparable(held_out=n),
                **shown,
            )
            for (name, column, of, found), (level, spread) in zip(shares, chance(count, n), strict=True)
        ]


# -- the arithmetic -----------------------------------------------------------------------------------


def memorised(samples: np.ndarray[Any, Any], held_out: np.ndarray[Any, Any]) -> tuple[Estimate, Estimate]:
    """The two shares of this module, from 0 to 1, with their errors; the held-out images count as known.

    Args:
        samples, held_out: distance of each sample [M] and each held-out image [n] to its nearest training image, or the
            distances' squares: their order alone counts.
    """
    import numpy as np
    import torch

    from ddim_lab.metrics.influence import estimate

    ordered = np.sort(held_out)
    nearer, not_farther = (np.searchsorted(ordered, samples, side=side) for side in ("left", "right"))
    ranks = torch.from_numpy((nearer + not_farther) / (2 * len(ordered)))
    shares = 1.0 - ranks, (ranks < 1 / CLOSEST).double()
    first, second = (estimate(float(each.mean()), each - each.mean(), None) for each in shares)
    return first, second


def chance(samples: int, held_out: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and standard deviation of the two shares over draws of M samples and n held-out images of one distribution.

    Without ties a sample is as likely to have any of the n + 1 places among the held-out images: the first share has
    mean 1/2 and variance (M + n + 1) / (12 M n) (Mann and Whitney 1947). The second counts those in the first k =
    ceil(n / 20) places; the probability of that, given the held-out images, is distributed as Beta(k, n + 1 - k).

    Args:
        samples, held_out: M and n.
    """
    m, n = samples, held_out
    k = math.ceil(n / CLOSEST)
    p = k / (n + 1)
    between = p * (1.0 - p) / (n + 2)
    within = (p * (1.0 - p) - between) / m
    return (0.5, math.sqrt((m + n + 1) / (12 * m * n))), (p, math.sqrt(between + within))
