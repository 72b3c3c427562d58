"""Looking often: what a p is worth where it was looked at before, and would have ended the sampling if it were small.

At look k a test has seen the fraction t_k of the samples that it may see at most. Under no difference its z at all
looks are those of a Brownian motion, Z_k = B(t_k) / sqrt(t_k). A two-sided test of level alpha spends

    alpha*(t; alpha) = 2 (2 - 2 Phi(z_{alpha/4} / sqrt(t)))

of its level until t, half of it on either side: next to nothing early, all of it at t = 1. Its boundary b_k at look k
is where the probability of |Z_k| >= b_k, and of no such look before, is what was spent since the last look. The p of a
look is the smallest alpha whose boundary it reaches. Where there is no difference at any look, P(some p_k <= alpha) <=
alpha: so it holds wherever one stops, and Holm's correction of such p holds as well. What an earlier look reached does
not count later: the expectation of a Fréchet distance moves with N, and a difference may be another at another N.

Looks that share more samples than these fractions say, as where the number of one side is fixed, are more alike than
the theory has them, and reach a boundary less often. Near the reference a distance is of second order: its looks are
less alike (correlation t_k/t_l instead of its root), and 5 % are 5.6 % over five looks.

Sources: Lan and DeMets, Discrete sequential boundaries for clinical trials (Biometrika 70, 1983), alpha*_1, whose alpha
is one-sided; the recursion of Armitage, McPherson and Rowe (J. R. Statist. Soc. A 132, 1969); p after several looks:
Jennison and Turnbull, Group Sequential Methods (2000), chapter 9; with Holm: Ye, Li, Liu and Yao (Statist. Med. 32,
2013).

Plain numbers in, plain numbers out. numpy and scipy are loaded when the first boundary is looked up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SPENDING", "boundaries", "nominal_p", "sequential_p", "spent"]

SPENDING: Final = "O'Brien-Fleming type (Lan and DeMets 1983)"
"""How the level is spent, in words."""

NODES: Final = 40
"""Of the quadrature over half of a Brownian motion's range: the boundaries of 20 looks are good to 1e-6 with them."""

SMALLEST: Final = 8.0
"""z_{alpha/2} of the smallest p that is told apart, 1.2e-15."""

BETWEEN: Final = 0.1
"""Distance of the z_{alpha/2} whose boundaries are computed; between them p is interpolated, to 0.1 % of itself."""


def spent(fraction: float, alpha: float) -> float:
    """alpha*(t): how much of alpha may be spent until the fraction t in (0, 1] of the samples."""
    from scipy.special import ndtr, ndtri

    return float(4.0 * ndtr(ndtri(alpha / 4.0) / math.sqrt(fraction)))


def boundaries(fractions: Sequence[float], alpha: float) -> list[float]:
    """b_k: the |z| that settles at each look.

    Args:
        fractions: t_1 < t_2 < ... <= 1 of the looks, 1/20 apart or more.
        alpha: the level, two-sided, in (0, 1).
    """
    import numpy as np
    from scipy.special import ndtri

    found, paths = [], _Paths.none(np.array([-ndtri(alpha / 2.0)]))
    for t in _increasing(fractions):
        paths = paths.until(t)
        found.append(float(paths.boundary[0]))
    return found


def sequential_p(fractions: Sequence[float], p: float) -> float:
    """The p of the last of several looks: the smallest alpha whose boundary it reaches.

    Of one look at t = 1 it is that look's own p, down to 1.2e-15.

    Args:
        fractions: t_k of the looks so far, as in `boundaries`.
        p: two-sided p of the last look by itself.
    """
    import numpy as np
    from scipy.special import ndtr, ndtri

    reached = np.interp(-ndtri(p / 2.0), _paths(_increasing(fractions)).boundary, _levels(), left=0.0)
    return float(2.0 * ndtr(-reached))


def nominal_p(fractions: Sequence[float], alpha: float) -> float:
    """The p that the last look by itself must have to settle at level alpha: that of its boundary."""
    import numpy as np
    from scipy.special import ndtr, ndtri

    boundary = np.interp(-ndtri(alpha / 2.0), _levels(), _paths(_increasing(fractions)).boundary)
    return float(2.0 * ndtr(-boundary))


def _increasing(fractions: Sequence[float]) -> tuple[float, ...]:
    found = tuple(map(float, fractions))
    assert 0.0 < found[0] <= found[-1] <= 1.0, found
    assert list(found) == sorted(set(found)), found
    return found


@functools.lru_cache(maxsize=1)
def _levels() -> np.ndarray:
    """z_{alpha/2}, which the boundaries of a look are all but proportional to."""
    import numpy as np

    return np.arange(BETWEEN, SMALLEST + BETWEEN / 2, BETWEEN)


@functools.lru_cache(maxsize=256)
def _paths(fractions: tuple[float, ...]) -> _Paths:
    """After these looks, by `_levels`; what fewer looks gave is taken on from there."""
    before = _paths(fractions[:-1]) if len(fractions) > 1 else _Paths.none(_levels())
    return before.until(fractions[-1])


@final
@dataclass(frozen=True)
class _Paths:
    """Brownian paths that have reached no boundary up to t, for several levels (the first axis of all arrays).

    B has a density f on (-a, a), a = boundary sqrt(t). It is even, so half of it is kept, at the nodes of Gauss and
    Legendre.

    Attributes:
        levels: z_{alpha/2}.
        t: of the last look.
        boundary: b there.
        at: B at the nodes, 0 < B < a.
        mass: f there, times the nodes' weights.
    """

    levels: np.ndarray
    t: float
    boundary: np.ndarray
    at: np.ndarray
    mass: np.ndarray

    @classmethod
    def none(cls, levels: np.ndarray) -> _Paths:
        """Before the first look: B(0) = 0, half of it on this side."""
        import numpy as np

        column = np.zeros((len(levels), 1))
        return cls(levels, 0.0, np.full(len(levels), np.inf), column, column + 0.5)

    def until(self, t: float) -> _Paths:
        """One look on."""
        import numpy as np

        a = self._reached(t)
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        new = a[:, None] * (nodes + 1.0) / 2.0
        there, here, step = new[:, :, None], self.at[:, None, :], math.sqrt(t - self.t)
        kernel = sum(np.exp(-(((there - side * here) / step) ** 2) / 2.0) for side in (1.0, -1.0))
        density = (kernel @ self.mass[:, :, None])[:, :, 0] / (step * math.sqrt(2.0 * math.pi))
        return _Paths(self.levels, t, a / math.sqrt(t), new, density * a[:, None] * weights / 2.0)

    def _reached(self, t: float) -> np.ndarray:
        """a at t: where so many paths get outside as may be spent since the last look, by Newton's method.

        The logarithm of how many do is concave in a, so that from the right every step stays there.
        """
        import numpy as np
        from scipy.special import log_ndtr, logsumexp, ndtr, ndtri

        step, quarter = math.sqrt(t - self.t), -ndtri(ndtr(-self.levels) / 2.0)  # z_{alpha/4}
        until = 4.0 * ndtr(-quarter / math.sqrt(t))
        wanted = until - (4.0 * ndtr(-quarter / math.sqrt(self.t)) if self.t else 0.0)
        a = -ndtri(wanted / 2.0) * math.sqrt(t)  # outside of it are as few of all paths, so fewer of those left
        log_mass = np.log(2.0 * self.mass)
        for _ in range(30):
            sides = np.stack([(side * self.at - a[:, None]) / step for side in (1.0, -1.0)])
            outside = logsumexp(log_ndtr(sides) + log_mass, axis=(0, 2))
            slope = logsumexp(-(sides**2) / 2.0 + log_mass, axis=(0, 2)) - math.log(step * math.sqrt(2.0 * math.pi))
            change = (outside - np.log(wanted)) * np.exp(outside - slope)
            a = np.maximum(a + change, 0.0)
            if np.abs(change).max() < 1e-11:
                break
        return np.asarray(a)
