"""The forward process in numbers: beta -> alpha_bar, and the timesteps that a sampler visits.

Everything here is float64 numpy; nothing knows of networks, devices or files.

Notation (Ho et al. 2020; Song, Meng, Ermon 2021): t in {0, ..., T-1} is what the model is given, and

    alpha_bar(t) = prod_{s <= t} (1 - beta(s)),      alpha_bar(-1) = 1 exactly (a clean image).

DDIM's alpha is DDPM's alpha_bar; only alpha_bar is written here. Between two whole timesteps log alpha_bar is linear in
t: a sampler may visit any t in [0, T-1], where the model takes it. A timestep that is whole is an int everywhere; one
that is not is a float that float32 holds exactly, so that alpha_bar is taken at the very t that the model is given.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "CLEAN",
    "LEVEL_SPACINGS",
    "SPACINGS",
    "WHOLE_SPACINGS",
    "NoiseSchedule",
    "half_log_snr",
    "is_whole",
    "spaced_timesteps",
    "timestep_pairs",
    "to_timestep",
    "to_whole",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CLEAN: Final = -1
"""The timestep of a clean image: the t_prev of every sampler's last step. alpha_bar(CLEAN) = 1."""


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma) = log(alpha_bar / (1 - alpha_bar)) / 2; infinite at alpha_bar = 1."""
    return math.inf if alpha_bar == 1.0 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


def is_whole(t: float) -> bool:
    """Whether a timestep is a whole number."""
    return t == int(t)


def to_timestep(t: float) -> float:
    """A timestep as walks hold it: an int where it is whole, or else the float32 that is nearest to it."""
    single = float(np.float32(t))
    return int(single) if is_whole(single) else single


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
        self._log_alpha_bars: list[float] | None = None
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

    def alpha_bar(self, t: float) -> float:
        """alpha_bar(t) for t in {-1} and [0, T-1]; exactly 1 at t = -1.

        Between whole timesteps n and n + 1, with w = t - n,

            log alpha_bar(t) = (1 - w) log alpha_bar(n) + w log alpha_bar(n + 1).

        Raises:
            ValueError: t is anywhere else.
        """
        if not (t == CLEAN or 0 <= t <= self.num_timesteps - 1):
            raise ValueError(f"timestep {t} is outside -1..{self.num_timesteps - 1}: give -1, or 0 and above")
        below = math.floor(t)
        if below == t:
            return float(self._alpha_bars[below + 1])
        logs, weight = self._logs(), t - below
        return math.exp((1.0 - weight) * logs[below] + weight * logs[below + 1])

    def timestep(self, level: float) -> float:
        """The t in [0, T-1] whose half-logSNR is `level`: the inverse of `half_log_snr(alpha_bar(t))`, in float64.

        alpha_bar = 1 / (1 + exp(-2 lambda)), and t is linear in its logarithm from each whole timestep to the next.
        That of a whole timestep gives exactly this timestep.

        Raises:
            ValueError: no t in [0, T-1] has it.
        """
        lowest, highest = self.half_log_snr(self.num_timesteps - 1), self.half_log_snr(0)
        if not lowest <= level <= highest:
            raise ValueError(f"half-logSNR {level:g} is outside {lowest:.6g}..{highest:.6g}, which this schedule has")
        logs, wanted = self._logs(), -math.log1p(math.exp(-2.0 * level))
        above = bisect.bisect_left(logs, -wanted, 1, len(logs) - 1, key=operator.neg) if len(logs) > 1 else 0
        for whole in (above, above - 1, above + 1):
            if 0 <= whole < len(logs) and self.half_log_snr(whole) == level:
                return float(whole)
        higher, lower = logs[above - 1], logs[above]
        return above - 1 + min(max((higher - wanted) / (higher - lower), 0.0), 1.0)

    def half_log_snr(self, t: float) -> float:
        """lambda(t) = log(alpha_bar(t) / (1 - alpha_bar(t))) / 2; infinite at t = -1."""
        return half_log_snr(self.alpha_bar(t))

    def _logs(self) -> list[float]:
        """log alpha_bar(0), ..., log alpha_bar(T-1), by the C library, whose last digit depends on fewer machines."""
        if self._log_alpha_bars is None:
            self._log_alpha_bars = [math.log(level) for level in self.alpha_bars.tolist()]
        return self._log_alpha_bars

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


def _logsnr(steps: int, top: float, bottom: float) -> list[float]:
    if steps == 1:
        return [top]
    return [top + i / (steps - 1) * (bottom - top) for i in range(steps)]


def _karras(steps: int, top: float, bottom: float) -> list[float]:
    if steps == 1:
        return [top]
    largest, smallest = (math.exp(-level / KARRAS_RHO) for level in (top, bottom))  # rho^(1/7)
    roots = (largest + i / (steps - 1) * (smallest - largest) for i in range(steps))
    return [-KARRAS_RHO * math.log(root) for root in roots]


KARRAS_RHO: Final = 7.0
"""The exponent of `karras`, which its paper writes rho; larger ones put more of the levels near the image."""

WHOLE_SPACINGS: Final[dict[str, Callable[[int, int], Ints]]] = {
    "uniform": _uniform,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "quadratic_full": _quadratic_full,
    "log": _log,
}
"""Name -> function (S, T) -> strictly increasing whole timesteps. See `spaced_timesteps`."""

LEVEL_SPACINGS: Final[dict[str, Callable[[int, float, float], list[float]]]] = {
    "logsnr": _logsnr,
    "karras": _karras,
}
"""Name -> function (S, lambda(T-1), lambda(0)) -> S half-logSNRs from the first of them to the second."""

SPACINGS: Final = (*WHOLE_SPACINGS, *LEVEL_SPACINGS)
"""All names. See `spaced_timesteps`."""


def spaced_timesteps(spacing: str, steps: int, schedule: NoiseSchedule | int = 1000) -> Ints | Floats:
    """Timesteps of a named spacing, strictly increasing, each in {0, ..., T-1}, or in [0, T-1] for the last two.

    | spacing          | timesteps, i = 0 ... S-1                                   | top         |
    |------------------|------------------------------------------------------------|-------------|
    | `uniform`        | i*T // S (the paper's linear; the official code's if S divides T) | T - ceil(T/S) |
    | `trailing`       | ceil((i+1)*T/S) - 1 (Lin et al. 2023)                      | T-1         |
    | `linspace`       | round(i*(T-1)/(S-1)); S = 1: T-1                           | T-1         |
    | `quadratic`      | int(linspace(0, sqrt(0.8*T), S)^2), repeats dropped (official code) | about 0.8*T |
    | `quadratic_full` | the same without 0.8, capped at T-1                        | T-1         |
    | `log`            | floor(geomspace(1, T, S)) - 1, repeats dropped; S = 1: T-1 | T-1         |
    | `logsnr`         | lambda(t) evenly spaced from lambda(T-1) to lambda(0); S = 1: T-1 | T-1  |
    | `karras`         | rho(t)^(1/7) evenly spaced from rho(T-1) to rho(0); S = 1: T-1 | T-1     |

    with lambda(t) = log(alpha_bar / (1 - alpha_bar)) / 2, half of the logSNR, and rho = sqrt(1/alpha_bar - 1), which is
    exp(-lambda). `logsnr` is the grid of Lu et al. 2022 (2206.00927), `karras` that of Karras et al. 2022 (2206.00364,
    Eq. 5 with N = S, whose exponent is 7, and whose last level, 0, is the clean image). Their timesteps are not whole
    in general; each is the float32 nearest to it.

    Where repeats are dropped the sampler does fewer forwards than S: count them (`Sampler.nfe`).
    `quadratic` and `quadratic_full` visit only t = 0 when S = 1.

    Args:
        spacing: one of `SPACINGS`.
        steps: S, from 1 to T.
        schedule: of which these are timesteps; T alone is enough for `WHOLE_SPACINGS`.

    Returns:
        int64 of `WHOLE_SPACINGS`, float64 of `LEVEL_SPACINGS`.

    Raises:
        ValueError: unknown spacing, S not a whole number in 1..T, or T alone where it is not enough.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
    known = schedule if isinstance(schedule, NoiseSchedule) else None
    steps, total = _whole("steps", steps), known.num_timesteps if known else _whole("num_timesteps", schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total} (the schedule's timesteps), got {steps}")
    if spacing in WHOLE_SPACINGS:
        return WHOLE_SPACINGS[spacing](steps, total)
    if known is None:
        raise ValueError(f"spacing {spacing} depends on alpha_bar, not on T alone: give the schedule")
    levels = LEVEL_SPACINGS[spacing](steps, known.half_log_snr(total - 1), known.half_log_snr(0))
    ends = [0, total - 1] if steps > 1 else [total - 1]  # known, where the levels' are only to rounding
    return np.unique([*ends, *(to_timestep(known.timestep(level)) for level in levels[1:-1])]).astype(np.float64)


def to_whole(timesteps: Sequence[float]) -> list[int]:
    """Each timestep rounded to the nearest whole one (of two, to the even one), without the repeats this makes.

    Args:
        timesteps: ascending or descending. One that is there twice stays so.
    """
    found: list[int] = []
    before = math.nan
    for t in timesteps:
        nearest = round(t)
        if t == before or not found or found[-1] != nearest:
            found.append(nearest)
        before = t
    return found


def timestep_pairs(timesteps: Sequence[float] | Ints | Floats, num_timesteps: int) -> tuple[tuple[float, float], ...]:
    """The walk from noise to image: pairs (t, t_prev), descending, the last t_prev being -1.

    Args:
        timesteps: visited timesteps in either order. A repeated one is kept: it costs a forward pass and is a no-op
            (unless the step clips x_0 and keeps eps).
        num_timesteps: T.

    Returns:
        Whole timesteps are ints, others floats (`to_timestep`).

    Raises:
        ValueError: empty, not numbers, out of [0, T-1], or neither ascending nor descending.
    """
    values = [_number("timesteps", t) for t in timesteps]
    if not values:
        raise ValueError("timesteps is empty: name at least one")
    if min(values) < 0 or max(values) > num_timesteps - 1:
        raise ValueError(f"timesteps must lie in 0..{num_timesteps - 1}, got {min(values):g} to {max(values):g}")
    values = [to_timestep(t) for t in values]
    ordered = sorted(values, reverse=True)
    if values not in (ordered, ordered[::-1]):
        raise ValueError(f"timesteps must ascend or descend, got {values}")
    return tuple(zip(ordered, [*ordered[1:], CLEAN], strict=True))


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise ValueError(f"{name}: {value!r} is not a finite number")
    return number


def _whole(name: str, value: Any) -> int:
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or isinstance(value, bool) or whole != value:
        raise ValueError(f"{name}: {value!r} is not a whole number")
    return whole
