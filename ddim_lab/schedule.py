"""The forward process in numbers: beta -> alpha_bar, and the timesteps that a sampler visits.

Everything here is float64 numpy; nothing knows of networks, devices or files.

Notation (Ho et al. 2020; Song, Meng, Ermon 2021): t in {0, ..., T-1} is what the model is given, and

    alpha_bar(t) = prod_{s <= t} (1 - beta(s)),      alpha_bar(-1) = 1 exactly (a clean image).

DDIM's alpha is DDPM's alpha_bar; only alpha_bar is written here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

__all__ = ["CLEAN", "SPACINGS", "NoiseSchedule", "spaced_timesteps", "timestep_pairs"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CLEAN: Final = -1
"""The timestep of a clean image: the t_prev of every sampler's last step. alpha_bar(CLEAN) = 1."""

_FAINTEST: Final = float(np.finfo(np.float32).tiny)


@final
class NoiseSchedule:
    """A discrete variance-preserving noise schedule q(x_t | x_0) = N(sqrt(ab_t) x_0, (1 - ab_t) I).

    Args:
        betas: beta(0), ..., beta(T-1), shape [T], each strictly between 0 and 1.

    Raises:
        ValueError: betas are not one finite list inside (0, 1); or so small that alpha_bar stands still, or so many
            and large that alpha_bar falls below 1.2e-38, float32's smallest normal number: no signal is left.
    """

    def __init__(self, betas: npt.ArrayLike) -> None:
        values = np.array(betas, dtype=np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"betas must be one list of numbers, got shape {values.shape}")
        if not (np.isfinite(values).all() and (values > 0).all() and (values < 1).all()):
            raise ValueError(
                f"betas must lie strictly between 0 and 1, got values from {values.min():g} to {values.max():g}"
            )
        self._betas = values
        # The clean level is stored in front, so that index t + 1 also serves t = -1.
        self._alpha_bars = np.concatenate([np.ones(1), np.cumprod(1.0 - values)])
        if self._alpha_bars[-1] < _FAINTEST:
            raise ValueError(
                f"alpha_bar falls to {self._alpha_bars[-1]:.3g}: these {values.size} betas leave no signal at the last"
                " timestep; lower them (betas meant for 1000 timesteps scale with 1000 / num_timesteps)"
            )
        if not (np.diff(self._alpha_bars) < 0).all():
            raise ValueError(f"betas down to {values.min():g} are too small: alpha_bar must fall at every timestep")
        self._betas.setflags(write=False)
        self._alpha_bars.setflags(write=False)

    # -- constructors ------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta evenly spaced from beta_start to beta_end (Ho et al. 2020, section 4; the paper's choice)."""
        _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
        return cls(np.linspace(beta_start, beta_end, num_timesteps))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """sqrt(beta) evenly spaced: the official DDIM code's "quad", diffusers' "scaled_linear"."""
        _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
        return cls(np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_timesteps) ** 2)

    @classmethod
    def sigmoid(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta = beta_start + (beta_end - beta_start) * sigmoid(u), u evenly spaced in [-6, 6]."""
        _check(num_timesteps, beta_start=beta_start, beta_end=beta_end)
        weight = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))
        return cls(beta_start + (beta_end - beta_start) * weight)

    @classmethod
    def constant(cls, num_timesteps: int = 1000, beta_end: float = 0.02) -> NoiseSchedule:
        """The same beta at every step."""
        _check(num_timesteps, beta_end=beta_end)
        return cls(np.full(num_timesteps, beta_end))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar = f(u)/f(0), f(u) = cos^2(pi/2 (u + s)/(1 + s)), betas capped (Nichol & Dhariwal 2021, Eq. 17).

        Args:
            num_timesteps: T.
            offset: s, keeps the first betas from vanishing.
            max_beta: cap on beta, below 1, that keeps the last alpha_bar above 0.
        """
        _check(num_timesteps, max_beta=max_beta)
        u = np.arange(num_timesteps + 1) / num_timesteps
        f = np.cos(0.5 * np.pi * (u + offset) / (1.0 + offset)) ** 2
        return cls(np.minimum(1.0 - f[1:] / f[:-1], max_beta))

    @classmethod
    def from_file(cls, path: str | Path) -> NoiseSchedule:
        """Betas from a text file, one number a line (`numpy.loadtxt`), or from a .npy array (no pickle)."""
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"no file of betas at {file}")
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is not a list of betas, one number a line: it is empty")
        try:
            betas = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file, ndmin=1)
        except ValueError as error:
            raise ValueError(f"{file} is not a list of betas, one number a line: {error}") from None
        kind = betas.dtype if isinstance(betas, np.ndarray) else None  # an .npz under another name has several
        if kind is None or kind.kind not in "fiu":
            raise ValueError(f"{file} is not a list of betas: it holds {kind or 'several arrays'}")
        try:
            return cls(betas)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    # -- values ------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """T."""
        return int(self._betas.size)

    @property
    def betas(self) -> Floats:
        """beta(0), ..., beta(T-1), float64, read-only, shape [T]."""
        return self._betas

    @property
    def alpha_bars(self) -> Floats:
        """alpha_bar(0), ..., alpha_bar(T-1), float64, read-only, shape [T]."""
        return self._alpha_bars[1:]

    @property
    def digest(self) -> str:
        """SHA-256 of the betas: what names this schedule in keys, whatever it was made of."""
        return hashlib.sha256(self._betas.tobytes()).hexdigest()

    def alpha_bar(self, t: int) -> float:
        """alpha_bar(t) for t in {-1, 0, ..., T-1}; exactly 1 at t = -1."""
        if not CLEAN <= t < self.num_timesteps:
            raise ValueError(f"timestep {t} is outside -1..{self.num_timesteps - 1}")
        return float(self._alpha_bars[t + 1])

    def __repr__(self) -> str:
        return f"NoiseSchedule(num_timesteps={self.num_timesteps}, alpha_bar_last={self.alpha_bars[-1]:.6g})"


def _check(num_timesteps: int, **betas: float) -> None:
    """Raise ValueError, by name, unless T is a whole number above 0 and the betas lie in (0, 1) and do not decrease."""
    if _whole("num_timesteps", num_timesteps) < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    for name, beta in betas.items():
        if not 0.0 < beta < 1.0:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {beta:g}")
    for (first, low), (second, high) in pairwise(betas.items()):
        if high < low:
            raise ValueError(f"betas must not decrease: {second}={high:g} is below {first}={low:g}; swap them")


# -- spacings: which timesteps are visited -------------------------------------------------------------


def _uniform(steps: int, total: int) -> Ints:
    return np.arange(steps, dtype=np.int64) * total // steps


def _trailing(steps: int, total: int) -> Ints:
    return -(-(np.arange(1, steps + 1, dtype=np.int64) * total) // steps) - 1  # ceil in integers


def _linspace(steps: int, total: int) -> Ints:
    if steps == 1:
        return np.array([total - 1], dtype=np.int64)
    return np.round(np.arange(steps) * (total - 1) / (steps - 1)).astype(np.int64)


def _quadratic(steps: int, total: int) -> Ints:
    return np.unique((np.linspace(0.0, np.sqrt(0.8 * total), steps) ** 2).astype(np.int64))


def _quadratic_full(steps: int, total: int) -> Ints:
    squares = (np.linspace(0.0, np.sqrt(total), steps) ** 2).astype(np.int64)
    return np.unique(np.minimum(squares, total - 1))


def _log(steps: int, total: int) -> Ints:
    if steps == 1:
        return np.array([total - 1], dtype=np.int64)
    return np.unique(np.floor(np.geomspace(1.0, total, steps)).astype(np.int64) - 1)


SPACINGS: Final[dict[str, Callable[[int, int], Ints]]] = {
    "uniform": _uniform,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "quadratic_full": _quadratic_full,
    "log": _log,
}
"""Name -> function (S, T) -> strictly increasing timesteps. See `spaced_timesteps`."""


def spaced_timesteps(spacing: str, steps: int, num_timesteps: int = 1000) -> Ints:
    """Timesteps of a named spacing, strictly increasing, each in {0, ..., T-1}.

    | spacing          | timesteps, i = 0 ... S-1                                   | top         |
    |------------------|------------------------------------------------------------|-------------|
    | `uniform`        | i*T // S (the paper's linear; the official code's if S divides T) | T - ceil(T/S) |
    | `trailing`       | ceil((i+1)*T/S) - 1 (Lin et al. 2023)                      | T-1         |
    | `linspace`       | round(i*(T-1)/(S-1)); S = 1: T-1                           | T-1         |
    | `quadratic`      | int(linspace(0, sqrt(0.8*T), S)^2), repeats dropped (official code) | about 0.8*T |
    | `quadratic_full` | the same without 0.8, capped at T-1                        | T-1         |
    | `log`            | floor(geomspace(1, T, S)) - 1, repeats dropped; S = 1: T-1 | T-1         |

    Where repeats are dropped the sampler does fewer forwards than S: count them (`Sampler.nfe`).
    `quadratic` and `quadratic_full` visit only t = 0 when S = 1.

    Args:
        spacing: a key of `SPACINGS`.
        steps: S, from 1 to T.
        num_timesteps: T.

    Raises:
        ValueError: unknown spacing, or S not a whole number in 1..T.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    steps, num_timesteps = _whole("steps", steps), _whole("num_timesteps", num_timesteps)
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be between 1 and {num_timesteps} (the schedule's timesteps), got {steps}")
    return SPACINGS[spacing](steps, num_timesteps)


def timestep_pairs(timesteps: Sequence[int] | Ints, num_timesteps: int) -> tuple[tuple[int, int], ...]:
    """The walk from noise to image: pairs (t, t_prev), descending, the last t_prev being -1.

    Args:
        timesteps: visited timesteps in either order. A repeated one is kept: it costs a forward pass and is a no-op
            (unless the step clips x_0 and keeps eps).
        num_timesteps: T.

    Raises:
        ValueError: empty, not whole numbers, out of {0, ..., T-1}, or neither ascending nor descending.
    """
    values = [_whole("timesteps", t) for t in timesteps]
    if not values:
        raise ValueError("timesteps is empty: name at least one")
    if min(values) < 0 or max(values) >= num_timesteps:
        raise ValueError(f"timesteps must lie in 0..{num_timesteps - 1}, got {min(values)} to {max(values)}")
    ordered = sorted(values, reverse=True)
    if values not in (ordered, ordered[::-1]):
        raise ValueError(f"timesteps must ascend or descend, got {values}")
    return tuple(zip(ordered, [*ordered[1:], CLEAN], strict=True))


def _whole(name: str, value: Any) -> int:
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or isinstance(value, bool) or whole != value:
        raise ValueError(f"{name}: {value!r} is not a whole number")
    return whole
