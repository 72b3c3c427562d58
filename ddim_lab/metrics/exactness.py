"""What a sampler does on models whose solution is known: a mixture of Gaussians, one Gaussian, a single point.

Two pixels, float64, on the CPU: no network's error is in it, and a walk takes milliseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ddim_lab.analytic import GaussianEps, GaussianMixtureEps
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule, half_log_snr
from ddim_lab.transitions import Gamma, Transition

__all__ = [
    "TARGET",
    "Errors",
    "Moments",
    "OnePoint",
    "Watched",
    "ddpm_moments",
    "errors_on_a_mixture",
    "even_in_lambda",
    "gaussian",
    "gaussian_gamma",
    "mixture",
    "moments_of",
    "ode_solution",
    "on_one_point",
    "one_thread",
    "starts",
]

SHAPE: Final = (1, 1, 2)
"""Of the images: whatever takes images takes these."""

_MEANS: Final = torch.tensor([[-0.8, 0.3], [0.7, 0.5], [0.1, -0.9]], dtype=torch.float64).view(3, *SHAPE)
_VARIANCES: Final = torch.tensor([0.10, 0.15, 0.20], dtype=torch.float64)

_MEAN: Final = torch.tensor([0.3, -0.5], dtype=torch.float64).view(SHAPE)
_VARIANCE: Final = torch.tensor([0.25, 0.04], dtype=torch.float64).view(SHAPE)


def mixture(schedule: NoiseSchedule) -> GaussianMixtureEps:
    """Exact eps of three Gaussians."""
    return GaussianMixtureEps(schedule, _MEANS, _VARIANCES)


def gaussian(schedule: NoiseSchedule) -> GaussianEps:
    """Exact eps of one Gaussian with another variance in each pixel."""
    return GaussianEps(schedule, _MEAN, _VARIANCE)


def gaussian_gamma(schedule: NoiseSchedule) -> Gamma:
    """Gamma(t) = E |eps|^2 / d of `gaussian`: (1 - ab) / (ab v + 1 - ab), averaged over its pixels' variances v."""
    variances: list[float] = _VARIANCE.flatten().tolist()

    def gamma(t: float) -> float:
        ab = schedule.alpha_bar(t)
        return sum((1.0 - ab) / (ab * v + 1.0 - ab) for v in variances) / len(variances)

    return gamma


def starts(count: int, seed: int = 0) -> Tensor:
    """x_T, float64 [count, 1, 1, 2]."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: for two pixels, threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@final
class Watched:
    """`mixture`, which remembers the timesteps it was asked for.

    Attributes:
        announced: timesteps that the sampler's transitions, and the levels inside them, are said to visit.
        asked: those it was asked for, in order, one a call.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._model: Final = mixture(sampler.schedule)
        inner = {each.between.t for each in sampler.transitions if each.between is not None}
        self.announced: Final = inner | {each.t for each in sampler.transitions}
        self.asked: Final[list[float]] = []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append(t[0].item())
        return self._model(x_t, t)


# -- the ODE -------------------------------------------------------------------------------------------------------


def ode_solution(model: GaussianMixtureEps, x: Tensor, alpha_bar: float, alpha_bar_end: float) -> Tensor:
    """Where the probability-flow ODE carries x from one level to a less noisy one, by DOP853 to 1e-12.

    With rho = sqrt(1 - ab) / sqrt(ab), d(x / sqrt(ab)) / d rho = eps (Song, Meng, Ermon 2021, Eq. 14), which is
    integrated over u = asinh(rho): of equal steps in log rho where rho is large, and up to rho = 0.

    Args:
        model: gives eps at any level.
        x: states [B, ...], float64.
        alpha_bar, alpha_bar_end: of x and of what is returned; alpha_bar <= alpha_bar_end <= 1.
    """
    if alpha_bar == alpha_bar_end:
        return x

    def slope(u: float, scaled: Any) -> Any:
        rho = math.sinh(u)
        level = 1.0 / (1.0 + rho * rho)
        here = torch.from_numpy(scaled).view(x.shape) * math.sqrt(level)
        eps = model.at_level(here, torch.full((1, 1), level, dtype=torch.float64))
        return math.cosh(u) * eps.flatten().numpy()

    between = [math.asinh(math.sqrt((1.0 - level) / level)) for level in (alpha_bar, alpha_bar_end)]
    scaled = (x / math.sqrt(alpha_bar)).flatten().numpy()
    found = solve_ivp(slope, between, scaled, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(found.y[:, -1]).view(x.shape) * math.sqrt(alpha_bar_end)


@final
@dataclass(frozen=True)
class Errors:
    """Root mean square errors of one walk, over starts and pixels; infinite or NaN where the walk's states are.

    Attributes:
        steps, nfe: S and forwards.
        before: at the last level before the image, to the ODE's solution there.
        last_step: of the step from there to alpha_bar = 1 alone: to the ODE's solution from the walk's own state.
        image: of the image, to the ODE's solution.
        largest_step: of the steps before the last one in lambda = log(alpha_bar / (1 - alpha_bar)) / 2.
    """

    steps: int
    nfe: int
    before: float
    last_step: float
    image: float
    largest_step: float


def errors_on_a_mixture(sampler: Sampler, x_T: Tensor) -> Errors:
    """How far a deterministic walk is from the ODE's solution, from the same x_T."""
    model = mixture(sampler.schedule)
    first, last = sampler.transitions[0], sampler.transitions[-1]
    *_, before, image = (state.x.to(x_T) for state in sampler.walk(model, x_T))
    exact = ode_solution(model, x_T, first.alpha_bar, last.alpha_bar)
    from_here = ode_solution(model, before, last.alpha_bar, 1.0) if torch.isfinite(before).all() else before
    return Errors(
        steps=sampler.steps,
        nfe=sampler.nfe,
        before=_rms(before - exact),
        last_step=_rms(image - from_here),
        image=_rms(image - ode_solution(model, exact, last.alpha_bar, 1.0)),
        largest_step=_largest_step(sampler.transitions),
    )


@final
@dataclass(frozen=True)
class OnePoint:
    """A walk on data that is a single point.

    Attributes:
        noise_left: root mean square distance of the images from the point: nothing random may be left.
        off_level: how far a state is, at most, from where it should be at the t that the model is told with it: the
            root mean square of what eps moves by, times sqrt(1 - ab); where noise is added, which moves it, too, what
            the noise's variance differs from 1 - ab by, or 0 where chance does that. None where it was not looked at.
        off_at: the first t at which it is that far; None as before.
    """

    noise_left: float
    off_level: float | None
    off_at: float | None


BY_CHANCE: Final = 5.5
"""Standard errors that a mean square may be off: of a thousand states one in 10,000 walks is, by chance."""


def on_one_point(sampler: Sampler, x_T: Tensor, *, levels: bool = True) -> OnePoint:
    """A walk on one point, where eps = (x - sqrt(ab) mu) / sqrt(1 - ab) is the noise in x.

    A solver of any order is exact there, and states that are at the level which the model is told give one and the same
    eps, or with noise one that is standard normal. (The point is a Gaussian of variance 1e-24: eps must exist.)

    Args:
        sampler: takes the walk.
        x_T: from here; hundreds of them where it adds noise.
        levels: whether to look at the states, too.
    """
    model, level = GaussianEps(sampler.schedule, _MEAN, 1e-24), sampler.schedule.alpha_bar
    said: list[tuple[float, Tensor]] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        said.append((float(t[0]), eps))
        return eps

    left = _rms(sampler.sample(watched, x_T) - _MEAN)
    if not levels:
        return OnePoint(left, None, None)
    if sampler.is_random:
        by_chance = BY_CHANCE * math.sqrt(2.0 / x_T.numel())
        off = [abs(_rms(eps) ** 2 - 1.0) for _, eps in said]
        moved = [
            (1.0 - level(t)) * (share if share > by_chance else 0.0) for share, (t, _) in zip(off, said, strict=True)
        ]
    else:
        moved = [math.sqrt(1.0 - level(t)) * _rms(eps - said[0][1]) for t, eps in said]
    most, at = max(
        zip(moved, [t for t, _ in said], strict=True), key=lambda each: (not math.isfinite(each[0]), each[0])
    )
    return OnePoint(left, most, at)


def even_in_lambda(schedule: NoiseSchedule, total: int) -> NoiseSchedule:
    """Another schedule of `total` timesteps between the same levels, lambda evenly spaced: for those that visit all."""
    levels = np.linspace(schedule.half_log_snr(0), schedule.half_log_snr(schedule.num_timesteps - 1), total)
    alpha_bars = 1.0 / (1.0 + np.exp(-2.0 * levels))
    return NoiseSchedule(1.0 - alpha_bars / np.concatenate([np.ones(1), alpha_bars[:-1]]))


def _largest_step(transitions: Sequence[Transition]) -> float:
    levels = [half_log_snr(transition.alpha_bar) for transition in transitions]
    return max((after - before for before, after in itertools.pairwise(levels)), default=math.inf)


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


# -- the SDE -------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Moments:
    """Mean and variance of the pixels, [2] each, and the covariance of the two."""

    mean: tuple[float, ...]
    variance: tuple[float, ...]
    covariance: float = 0.0

    def deviations(self, expected: Moments, count: int) -> list[float]:
        """Of moments measured over `count` samples: each difference over its standard error, for normal pixels."""
        sd = [math.sqrt(variance) for variance in expected.variance]
        means = [(a - b) / (s / math.sqrt(count)) for a, b, s in zip(self.mean, expected.mean, sd, strict=True)]
        pairs = zip(self.variance, expected.variance, strict=True)
        variances = [(a - b) / (b * math.sqrt(2.0 / (count - 1))) for a, b in pairs]
        return [*means, *variances, (self.covariance - expected.covariance) / (math.prod(sd) / math.sqrt(count))]


TARGET: Final = Moments(tuple(_MEAN.flatten().tolist()), tuple(_VARIANCE.flatten().tolist()))
"""Of the data that `gaussian` is of."""


def moments_of(sampler: Sampler, count: int) -> Moments:
    """Of the images that the sampler makes of `count` x_T on `gaussian`."""
    images = sampler.sample(gaussian(sampler.schedule), starts(count)).flatten(1)
    mean = images.mean(0)
    covariance = torch.cov(images.T)
    return Moments(tuple(mean.tolist()), tuple(covariance.diagonal().tolist()), float(covariance[0, 1]))


def ddpm_moments(schedule: NoiseSchedule, transitions: Sequence[Transition]) -> Moments:
    """What the DDIM family's steps make of N(0, 1) on `gaussian`, exactly: the step is linear there.

    With eps = k (x - sqrt(ab) mu), k = sqrt(1 - ab) / (ab v + 1 - ab), and x_prev = a x + b eps + std z (Eq. 12),

        m_prev = a m + b k (m - sqrt(ab) mu),     V_prev = (a + b k)^2 V + std^2
    """
    means, variances = [], []
    for mu, v in zip(TARGET.mean, TARGET.variance, strict=True):
        m, spread = 0.0, 1.0
        for step in transitions:
            ab = step.alpha_bar
            k = math.sqrt(1.0 - ab) / (ab * v + 1.0 - ab)
            a = math.sqrt(step.alpha_bar_prev / ab)
            b = math.sqrt(max(1.0 - step.alpha_bar_prev - step.sigma**2, 0.0)) - a * math.sqrt(1.0 - ab)
            m = a * m + b * k * (m - math.sqrt(ab) * mu)
            spread = (a + b * k) ** 2 * spread + step.noise_std**2
        means.append(m)
        variances.append(spread)
    return Moments(tuple(means), tuple(variances))
