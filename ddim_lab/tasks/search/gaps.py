"""A list of timesteps as the gaps between them: the numbers that a search for timesteps varies.

S timesteps t_0 < ... < t_{S-1} in {0, ..., T-1} cut the way from the clean image (-1) to T into S + 1 gaps,

    g_0 = t_0 + 1,    g_i = t_i - t_{i-1},    g_S = T - t_{S-1},        each at least 1, T + 1 in all.

A search varies their logarithms z_i = log g_i. Any z >= 0 stands for a list: each gap is given 1, and the T - S that
are left are shared out in proportion to exp(z_i) - 1,

    t_i = i + round((T - S) sum_{j <= i} (exp(z_j) - 1) / sum_j (exp(z_j) - 1)),

strictly increasing whatever z is, and exactly the list that z was made from.

A warp changes a list smoothly, by few numbers whatever S is: the two end gaps each by a factor, and the gaps between by
factors that are a short cosine series along the list,

    z_0 + b,    z_i + sum_k a_k cos(pi k (i - 1/2) / (S - 1)) for i = 1 ... S-1,    z_S + c.

A constant factor (k = 0) would change nothing but the proportion to the end gaps, which b and c do. float64 numpy;
nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["log_gaps", "timesteps_of_log_gaps", "warped"]

Floats = npt.NDArray[np.float64]


def log_gaps(timesteps: Sequence[int], num_timesteps: int) -> Floats:
    """z of a list of timesteps, shape [S + 1], each from 0 to log(T - S + 1).

    Args:
        timesteps: strictly increasing, each in {0, ..., T-1}.
        num_timesteps: T.

    Raises:
        ValueError: they are not.
    """
    gaps = np.diff(np.array([-1, *timesteps, num_timesteps], dtype=np.float64))
    if len(gaps) < 2 or (gaps < 1).any():
        raise ValueError(f"timesteps must strictly increase within 0..{num_timesteps - 1}, got {list(timesteps)}")
    return np.log(gaps)


def warped(z: npt.ArrayLike, bottom: float, top: float, coefficients: Sequence[float]) -> Floats:
    """z of a list after a warp; negative ones become 0, the gap of neighbours. All arguments 0: z itself.

    Args:
        z: of the list that is warped, shape [S + 1].
        bottom: b, added to the logarithm of the gap below the first timestep.
        top: c, of the gap above the last.
        coefficients: a_1, a_2, ...; a list of S timesteps has S - 2 of them at most.
    """
    moved = np.array(z, dtype=np.float64)
    between = moved.size - 2
    place = (np.arange(between) + 0.5) / max(between, 1)
    for k, a in enumerate(coefficients, start=1):
        moved[1:-1] += a * np.cos(np.pi * k * place)
    moved[0] += bottom
    moved[-1] += top
    return np.maximum(moved, 0.0)


def timesteps_of_log_gaps(z: npt.ArrayLike, num_timesteps: int) -> tuple[int, ...]:
    """The S strictly increasing timesteps in {0, ..., T-1} that z stands for; inverse of `log_gaps`.

    Args:
        z: shape [S + 1], finite, each at least 0; all 0 shares the rest out evenly.
        num_timesteps: T, at least S.

    Raises:
        ValueError: fewer than two values, more than T + 1, one that is negative or not finite.
    """
    values = np.asarray(z, dtype=np.float64)
    steps = values.size - 1
    if values.ndim != 1 or not 1 <= steps <= num_timesteps:
        raise ValueError(f"{num_timesteps} timesteps take 2 to {num_timesteps + 1} gaps, got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"logarithms of gaps must be finite and at least 0, got {values.tolist()}")
    # Proportions alone count: the largest is taken out before exp, so that none overflows.
    share = np.exp(values - values.max()) - np.exp(-values.max())
    if not share.sum() > 0.0:
        share = np.ones_like(values)
    rest = np.floor((num_timesteps - steps) * np.cumsum(share)[:-1] / share.sum() + 0.5).astype(np.int64)
    return tuple(int(t) for t in np.arange(steps) + rest)
