"""Whether a difference is more than its error: Student's t, Holm's correction, how many samples would tell.

Plain numbers in, plain numbers out. scipy is loaded when the first t is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["critical_t", "first_threshold", "holm", "samples_to_settle", "two_sided_p", "welch"]


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) for Student's t with so many degrees of freedom (> 0, whole or not)."""
    from scipy.special import stdtr

    return float(2.0 * stdtr(freedom, -abs(t)))


def critical_t(p: float, freedom: float) -> float:
    """The t > 0 at which `two_sided_p` is p, for 0 < p < 1."""
    from scipy.special import stdtrit

    return float(-stdtrit(freedom, p / 2.0))


def welch(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent variances: (sum v_i)^2 / sum v_i^2 / nu_i.

    Source: Satterthwaite (1946), Eq. 17; Welch (1947).

    Args:
        parts: each one's estimated variance v_i >= 0, as it enters the sum, and its degrees of freedom nu_i > 0. Where
            all variances are 0, the fewest degrees of freedom are returned.
    """
    whole = math.fsum(variance for variance, _ in parts)
    if whole == 0.0:
        return min(freedom for _, freedom in parts)
    return 1.0 / math.fsum((variance / whole) ** 2 / freedom for variance, freedom in parts)


def holm(p: Sequence[float]) -> list[float]:
    """Each p after Holm's step-down correction, in the order given.

    p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) over the m values in ascending order. Rejecting where p~ <= alpha
    keeps the probability of any false rejection at alpha or below, however the tests depend on each other.

    Source: Holm, A simple sequentially rejective multiple test procedure (Scand. J. Statist. 6, 1979).
    """
    corrected, largest = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = largest
    return corrected


def first_threshold(corrected: Sequence[float], alpha: float) -> float | None:
    """What the p of one more comparison would have to be, all others as they are; None where all are rejected.

    Holm's procedure stops at the first p above alpha / (m - r), where r have been rejected. A comparison that is not
    rejected is as soon as its own p is at most that.
    """
    left = sum(p > alpha for p in corrected)
    return alpha / left if left else None


def samples_to_settle(difference: float, se: float, samples: int, critical: float, fixed_se: float = 0.0) -> int | None:
    """How many samples would bring a difference of this size to `critical` standard errors, rounded up to two digits.

    The error falls with 1/sqrt N but for a part that more samples leave as it is:

        N' = N c^2 (se^2 - fixed^2) / (difference^2 - c^2 fixed^2).

    Args:
        difference: of any sign.
        se: its standard error from `samples` = N samples, `fixed_se` included in squares.
        samples: N.
        critical: c.
        fixed_se: the part of the error that is not of the samples.

    Returns:
        N', or None where no number of samples would: the difference is 0, or `fixed_se` alone is too large.
    """
    room = difference**2 - (critical * fixed_se) ** 2
    if room <= 0.0:
        return None
    needed = samples * critical**2 * (se**2 - fixed_se**2) / room
    if not 0.0 < needed < 1e18:
        return None
    digits = int(10 ** max(0, math.floor(math.log10(needed)) - 1))
    return math.ceil(needed / digits) * digits
