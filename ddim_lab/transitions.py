"""The walk from noise to image in numbers: which levels it visits, and how much noise each step adds.

A walk visits timesteps t_1 > t_2 > ... and ends at the clean image. One `Transition` says what its step from t to
t_prev needs to know (Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, Eq. 16):

    sigma(eta) = eta sqrt((1 - ab_prev) / (1 - ab_t)) sqrt(1 - ab_t / ab_prev)

where `ab` is alpha_bar. eta = 0 is DDIM, which adds no noise, and eta = 1 is DDPM. How much noise a step adds around
its mean is a choice of its own, `Variance`.

All numbers are float64. Needs no torch: a configuration is checked with these alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple, final, get_args

from ddim_lab.schedule import CLEAN, NoiseSchedule, is_whole, spaced_timesteps, timestep_pairs, to_whole

__all__ = [
    "PREDICTIONS",
    "Clip",
    "EncodeAt",
    "Gamma",
    "Level",
    "Prediction",
    "TimestepsAs",
    "Transition",
    "Variance",
    "analytic_std",
    "are_whole",
    "check_choice",
    "faintest",
    "gamma_needed_at",
    "largest_eta",
    "sigma",
    "transitions",
    "visited",
    "x0_share",
]

Variance = Literal["posterior", "large", "analytic", "learned"]
"""Of the noise that a step adds; see `transitions`."""

Gamma = Callable[[float], float]
"""t -> Gamma(t) = E |eps(x_t, t)|^2 / d of a model's eps on d pixel values, over x_0 of the data and x_t given x_0."""

Clip = Literal["none", "x0", "x0_eps"]
"""What a step does with a predicted image that leaves [-1, 1]; see `ddim_lab.sampler.step`."""

EncodeAt = Literal["source", "target"]
"""Where a step backwards evaluates the model; see `ddim_lab.sampler.Sampler.encode`."""

TimestepsAs = Literal["given", "integer"]
"""Whether timesteps that are not whole are visited as they are, or rounded; see `transitions`."""

Prediction = Literal["eps", "x0", "v"]
"""What a network predicts; see `ddim_lab.diffusion`."""

PREDICTIONS: Final[tuple[Prediction, ...]] = get_args(Prediction)


def sigma(eta: float, alpha_bar: float, alpha_bar_prev: float) -> float:
    """sigma(eta) of Eq. 16; eta scales the standard deviation. Exactly 0 where ab_prev = 1 (the last step)."""
    return eta * math.sqrt((1.0 - alpha_bar_prev) / (1.0 - alpha_bar)) * math.sqrt(1.0 - alpha_bar / alpha_bar_prev)


class Level(NamedTuple):
    """A timestep t, an int where it is whole, and its alpha_bar."""

    t: float
    alpha_bar: float


@final
@dataclass(frozen=True)
class Transition:
    """One step's numbers, float64.

    Attributes:
        t, t_prev: from and to, ints where they are whole; t_prev = -1 is the clean image.
        alpha_bar, alpha_bar_prev: at t and at t_prev.
        sigma: the sigma in the mean's sqrt(1 - ab_prev - sigma^2).
        noise_std: standard deviation of the noise added to the mean; 0 draws none. NaN where it is not known: of the
            analytic variance without the model's Gamma(t). Of the learned variance, its lower bound.
        between: the level between t and t_prev where the step asks the model, too; None where it asks at none.
            `ddim_lab.sampler.Formula.between` chooses it.
    """

    t: float
    t_prev: float
    alpha_bar: float
    alpha_bar_prev: float
    sigma: float
    noise_std: float
    between: Level | None = None

    def backwards(self) -> Transition:
        """From t_prev to t, without noise."""
        return Transition(
            t=self.t_prev,
            t_prev=self.t,
            alpha_bar=self.alpha_bar_prev,
            alpha_bar_prev=self.alpha_bar,
            sigma=0.0,
            noise_std=0.0,
        )


def transitions(
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 0.0,
    variance: Variance = "posterior",
    spacing: str = "uniform",
    timesteps: Sequence[float] | None = None,
    timesteps_as: TimestepsAs = "given",
    gamma: Gamma | None = None,
) -> tuple[Transition, ...]:
    """The walk from noise to image, one transition a step.

    Args:
        schedule: the noise schedule the model was trained on.
        steps: S, number of timesteps asked for, 1..T. Ignored if `timesteps` is given.
        eta: 0 (DDIM, deterministic) to 1 (DDPM); above 1 up to the bound sigma^2 <= 1 - alpha_bar_prev.
        variance: "posterior" adds noise of standard deviation sigma(eta). "large" is the paper's sigma-hat
            (appendix D.3): sqrt(1 - ab_t / ab_prev) around the eta = 1 mean, and no noise on the last step. "analytic"
            is the optimal one around the mean of any eta, `analytic_std`, as Analytic-DPM's authors sample with it:
            none on the last step, and on a step to t = 0 no more than `faintest`. "learned" is what a network that
            learned its variance says, pixel by pixel, around the eta = 1 mean, between sigma(1) and sqrt(1 - ab_t /
            ab_prev), and none on the last step (Nichol and Dhariwal 2021); `Transition.noise_std` is the lower bound.
        spacing: a name of `ddim_lab.schedule.SPACINGS`.
        timesteps: the visited timesteps themselves, in either order, instead of steps and spacing.
        timesteps_as: "given" visits them as they are, whole or not; "integer" rounds each to the nearest whole one and
            drops the repeats this makes.
        gamma: of the model, for variance "analytic". Asked for the t of each step that adds noise. Without it the
            levels are known, and the noise of these steps is NaN.

    Returns:
        In the order of the walk. Fewer than S where repeats are dropped.

    Raises:
        ValueError: any argument outside its range; the message names the valid one.
    """
    check_choice("variance", variance, get_args(Variance))
    check_choice("timesteps_as", timesteps_as, get_args(TimestepsAs))
    if not (math.isfinite(eta) and eta >= 0.0):
        raise ValueError(f"eta must be a number from 0 up, got {eta}")
    if timesteps is None:
        timesteps = spaced_timesteps(spacing, steps, schedule).tolist()
    pairs = timestep_pairs(timesteps, schedule.num_timesteps)
    if timesteps_as == "integer":
        pairs = timestep_pairs(to_whole([t for t, _ in pairs]), schedule.num_timesteps)
    if variance == "large" and eta != 1.0:
        raise ValueError(f"variance=large is DDPM's upper bound and needs eta=1, got eta={eta:g}")
    if variance == "learned" and eta != 1.0:
        raise ValueError(f"variance=learned was learned around DDPM's mean and needs eta=1, got eta={eta:g}")
    limit = largest_eta(schedule, pairs)
    if eta > limit:
        raise ValueError(
            f"eta={eta:g} is too large for these {len(pairs)} timesteps: sigma^2 would exceed 1 - alpha_bar_prev;"
            f" the largest valid eta is {math.floor(limit * 1e4) / 1e4:.4f}"
        )
    return tuple(_transition(schedule, t, t_prev, eta, variance, gamma) for t, t_prev in pairs)


def analytic_std(gamma: float, in_mean: float, alpha_bar: float, alpha_bar_prev: float) -> float:
    """The standard deviation of a reverse step that is optimal around its mean, for images in [-1, 1].

    Bao, Li, Zhu, Zhang, "Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic
    Models" (ICLR 2022), Theorem 1, in alpha_bar; the last factor is the mean variance of a pixel of x_0 given x_t:

        std^2 = in_mean^2 + (sqrt(ab_prev) - sqrt(1 - ab_prev - in_mean^2) sqrt(ab / (1 - ab)))^2 var
        var   = (1 - ab) / ab (1 - Gamma)

    Of images in [-1, 1] var lies in [0, 1], and var is clamped there: these are the bounds of Theorem 2. Skipped
    timesteps change nothing in it, since it knows t and t_prev alone. Where all of x_0 given x_t varies alike and eps
    is exact, as on an isotropic Gaussian, the step has the exact mean and variance.

    Args:
        gamma: Gamma(t), see `Gamma`.
        in_mean: the sigma in the mean's sqrt(1 - ab_prev - sigma^2); the paper's lambda.
        alpha_bar, alpha_bar_prev: at t and t_prev.
    """
    var = min(max((1.0 - alpha_bar) / alpha_bar * (1.0 - gamma), 0.0), 1.0)
    return math.sqrt(in_mean**2 + x0_share(in_mean, alpha_bar, alpha_bar_prev) ** 2 * var)


def x0_share(in_mean: float, alpha_bar: float, alpha_bar_prev: float) -> float:
    """What x_0 is multiplied by in a step's mean, the rest of which is a multiple of x_t.

    sqrt(ab_prev) - sqrt(1 - ab_prev - in_mean^2) sqrt(ab / (1 - ab))
    """
    from_eps = math.sqrt(max(1.0 - alpha_bar_prev - in_mean**2, 0.0))
    return math.sqrt(alpha_bar_prev) - from_eps * math.sqrt(alpha_bar / (1.0 - alpha_bar))


def faintest(eta: float) -> float:
    """The largest standard deviation of the noise that an analytic step to t = 0 adds: that noise is in the image.

    Its mean absolute value, std sqrt(2 / pi), is at most 1 grey level of 255 at eta = 0, and 2 above: what Bao et al.'s
    code does (clip_sigma_idx = 1, clip_pixel) in Analytic-DDIM, and in Analytic-DDPM on the linear schedule. Left out
    are the 1 of their Analytic-DDPM on the cosine schedule, and walks that end above t = 0, of which
    they have none: noise before such a last step is far from being in the image, and is the optimal one.
    """
    return (1 if eta == 0.0 else 2) * 2.0 / 255.0 * math.sqrt(math.pi / 2.0)


def gamma_needed_at(walk: Sequence[Transition]) -> list[float]:
    """The t at which `transitions` needs Gamma(t), and had none: of each step whose noise is not known, each t once."""
    return list(dict.fromkeys(each.t for each in walk if math.isnan(each.noise_std)))


def visited(schedule: NoiseSchedule, timesteps: Sequence[float]) -> tuple[Transition, ...]:
    """The walk that visits these timesteps in the order in which they are given, without noise, to the clean image.

    Raises:
        ValueError: one of them is no timestep of the schedule.
    """
    ends = pairwise([*timesteps, CLEAN])
    return tuple(
        Transition(t, t_prev, schedule.alpha_bar(t), schedule.alpha_bar(t_prev), 0.0, 0.0) for t, t_prev in ends
    )


def are_whole(walk: Sequence[Transition]) -> bool:
    """Whether every timestep at which a walk asks the model is a whole number."""
    asked = [t for each in walk for t in (each.t, each.t_prev, *(each.between or ())[:1])]
    return all(map(is_whole, asked))


def largest_eta(schedule: NoiseSchedule, pairs: Sequence[tuple[float, float]]) -> float:
    """The largest eta with sigma(eta)^2 <= 1 - ab_prev at every step: min sqrt((1 - ab_t) / (1 - ab_t / ab_prev)).

    At least 1 for every walk; infinite for a single step, which adds no noise at any eta.

    Args:
        schedule: gives alpha_bar.
        pairs: (t, t_prev) of each step, as `ddim_lab.schedule.timestep_pairs` gives them.
    """
    limit = math.inf
    for t, t_prev in pairs:
        if t_prev in (CLEAN, t):
            continue
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        limit = min(limit, math.sqrt((1.0 - ab) / (1.0 - ab / ab_prev)))
    return limit


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, with the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")


def _transition(
    schedule: NoiseSchedule, t: float, t_prev: float, eta: float, variance: Variance, gamma: Gamma | None
) -> Transition:
    ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    in_mean = sigma(eta, ab, ab_prev)
    # eta at its bound makes sigma^2 equal 1 - ab_prev up to rounding; the step takes the root of the difference.
    in_mean = min(in_mean, math.sqrt(1.0 - ab_prev))
    std = in_mean
    if variance == "large":
        std = 0.0 if t_prev == CLEAN else math.sqrt(1.0 - ab / ab_prev)
    elif variance == "analytic":
        if t_prev in (CLEAN, t):  # a repeated timestep moves nothing
            std = 0.0
        elif gamma is None:
            std = math.nan
        else:
            std = analytic_std(gamma(t), in_mean, ab, ab_prev)
            std = min(std, faintest(eta)) if t_prev == 0 else std
    return Transition(t, t_prev, ab, ab_prev, in_mean, std)
