"""DDPM and DDIM as one family: sigma(eta), one step, and the walk from noise to image (and back).

Song, Meng, Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021), Eq. 12, written with alpha_bar:

    x_0hat = (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t)
    x_prev = sqrt(ab_prev) x_0hat + sqrt(1 - ab_prev - sigma^2) eps + std z,       z ~ N(0, I)

    sigma(eta) = eta sqrt((1 - ab_prev) / (1 - ab_t)) sqrt(1 - ab_t / ab_prev)     (Eq. 16)

`variance="posterior"`: std = sigma(eta). `variance="large"`: the paper's sigma-hat, std = sqrt(1 - ab_t / ab_prev)
around the eta = 1 mean, and no noise on the last step (appendix D.3). eta = 0 is DDIM, eta = 1 is DDPM.

Torch and numpy only. Coefficients are computed in float64 and enter the step as Python floats: nothing is copied
to the device, nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor

from ddim_lab.diffusion import PREDICTIONS, Prediction, eps_from, x0_from_eps
from ddim_lab.noise import NamedNoise, NoiseSource
from ddim_lab.schedule import CLEAN, NoiseSchedule, spaced_timesteps, timestep_pairs

__all__ = ["Clip", "EncodeAt", "Moment", "Sampler", "Transition", "Variance", "largest_eta", "sigma", "step"]

Variance = Literal["posterior", "large"]
Clip = Literal["none", "x0", "x0_eps"]
EncodeAt = Literal["source", "target"]
EpsModel = Callable[[Tensor, Tensor], Any]


def sigma(eta: float, alpha_bar: float, alpha_bar_prev: float) -> float:
    """sigma(eta) of Eq. 16; eta scales the standard deviation. Exactly 0 where ab_prev = 1 (the last step)."""
    return eta * math.sqrt((1.0 - alpha_bar_prev) / (1.0 - alpha_bar)) * math.sqrt(1.0 - alpha_bar / alpha_bar_prev)


@final
@dataclass(frozen=True)
class Transition:
    """One step's numbers, float64.

    Attributes:
        t, t_prev: from and to; t_prev = -1 is the clean image.
        alpha_bar, alpha_bar_prev: at t and at t_prev.
        sigma: the sigma in the mean's sqrt(1 - ab_prev - sigma^2).
        noise_std: standard deviation of the noise added to the mean; 0 draws none.
    """

    t: int
    t_prev: int
    alpha_bar: float
    alpha_bar_prev: float
    sigma: float
    noise_std: float


def step(transition: Transition, x_t: Tensor, eps: Tensor, noise: Tensor | None = None, clip: Clip = "none") -> Tensor:
    """x_prev from x_t and the predicted eps: Eq. 12, the one step of the whole family.

    Args:
        transition: the step's numbers.
        x_t: state [B, ...].
        eps: predicted noise, same shape and dtype.
        noise: z, same shape; required if and only if `transition.noise_std` > 0.
        clip: `none` leaves x_0hat; `x0` clamps it to [-1, 1] and keeps eps (diffusers' default, an inconsistent
            pair); `x0_eps` clamps it and re-derives eps = (x_t - sqrt(ab_t) x_0hat) / sqrt(1 - ab_t).

    The mean is linear in two tensors, so each branch is two scalar coefficients. With ab_prev = ab_t and sigma = 0
    they are exactly (1, 0) for `none` and `x0_eps`: a repeated timestep moves nothing, to the last bit.
    """
    ab, ab_prev = transition.alpha_bar, transition.alpha_bar_prev
    direction = math.sqrt(max(1.0 - ab_prev - transition.sigma**2, 0.0))  # negative only through rounding
    if clip == "none":
        keep = math.sqrt(ab_prev / ab)
        mean = torch.add(x_t * keep, eps, alpha=direction - keep * math.sqrt(1.0 - ab))
    else:
        x_0 = x0_from_eps(x_t, eps, ab).clamp(-1.0, 1.0)
        if clip == "x0":
            mean = torch.add(x_0 * math.sqrt(ab_prev), eps, alpha=direction)
        else:
            keep = direction / math.sqrt(1.0 - ab)
            mean = torch.add(x_t * keep, x_0, alpha=math.sqrt(ab_prev) - keep * math.sqrt(ab))
    if transition.noise_std == 0.0:
        return mean
    if noise is None:
        raise ValueError(f"the step from t={transition.t} adds noise: give it")
    return torch.add(mean, noise, alpha=transition.noise_std)


@final
@dataclass(frozen=True)
class Moment:
    """One moment of a trajectory: the state x at timestep t (-1: the image), and the x_0 predicted on the way there.

    `x0` is what the step used, clamped where it clips; None at the start, where nothing has been predicted yet.
    """

    t: int
    x: Tensor
    x0: Tensor | None


@final
class Sampler:
    """A sampler of the DDIM family on a fixed list of timesteps.

    Args:
        schedule: the noise schedule the model was trained on.
        steps: S, number of timesteps asked for, 1..T. Ignored if `timesteps` is given.
        eta: 0 (DDIM, deterministic) to 1 (DDPM); above 1 up to the bound sigma^2 <= 1 - alpha_bar_prev.
        variance: "posterior" or "large" (sigma-hat; needs eta = 1).
        spacing: a name of `ddim_lab.schedule.SPACINGS`.
        clip: "none", "x0" or "x0_eps"; see `step`.
        timesteps: the visited timesteps themselves, in either order, instead of steps and spacing.
        prediction: what the model predicts: "eps", "x0" or "v".

    Attributes:
        steps: S as asked.
        nfe: number of function evaluations: the forwards really done a sample.
        transitions: the walk, from noise to image.

    Raises:
        ValueError: any argument outside its range; the message names the valid one.

    A model is any callable (x_t [B, ...], t [B] int64) -> output of x_t's shape, or an object with such a tensor
    as `.sample` (diffusers). The state is float32, or float64 if x_T is; the model is given it in its own dtype.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int = 50,
        eta: float = 0.0,
        variance: Variance = "posterior",
        spacing: str = "uniform",
        clip: Clip = "none",
        timesteps: Sequence[int] | None = None,
        prediction: Prediction = "eps",
    ) -> None:
        _check_choice("variance", variance, get_args(Variance))
        _check_choice("clip", clip, get_args(Clip))
        _check_choice("prediction", prediction, PREDICTIONS)
        if not (math.isfinite(eta) and eta >= 0.0):
            raise ValueError(f"eta must be a number from 0 up, got {eta}")
        if timesteps is None:
            visited: Sequence[int] = spaced_timesteps(spacing, steps, schedule.num_timesteps).tolist()
        else:
            visited, steps = timesteps, len(timesteps)
        pairs = timestep_pairs(visited, schedule.num_timesteps)
        if variance == "large" and eta != 1.0:
            raise ValueError(f"variance=large is DDPM's upper bound and needs eta=1, got eta={eta:g}")
        limit = largest_eta(schedule, pairs)
        if eta > limit:
            raise ValueError(
                f"eta={eta:g} is too large for these {len(pairs)} timesteps: sigma^2 would exceed 1 - alpha_bar_prev;"
                f" the largest valid eta is {math.floor(limit * 1e4) / 1e4:.4f}"
            )
        self.schedule: Final = schedule
        self.steps: Final = int(steps)
        self.eta: Final = float(eta)
        self.variance: Final = variance
        self.spacing: Final = spacing if timesteps is None else "custom"
        self.clip: Final = clip
        self.prediction: Final = prediction
        self.transitions: Final = tuple(_transition(schedule, t, t_prev, eta, variance) for t, t_prev in pairs)

    @property
    def nfe(self) -> int:
        """Forwards a sample costs. Below `steps` where a spacing drops repeats."""
        return len(self.transitions)

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(transition.noise_std > 0.0 for transition in self.transitions)

    def recipe(self) -> dict[str, Any]:
        """What its samples are a function of, beside model and noise; for keys."""
        return {
            "schedule": self.schedule.digest,
            "transitions": [[step.t, step.t_prev, step.sigma, step.noise_std] for step in self.transitions],
            "clip": self.clip,
        }

    @torch.no_grad()
    def sample(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        """The images that x_T becomes.

        Args:
            model: see the class.
            x_T: starting noise [B, ...], standard normal.
            seed: names the noise of the steps (with index and timestep); unused if `noise` is given.
            indices: names of the samples, int64 [B]; default 0..B-1.
            noise: source of the steps' noise; default `NamedNoise(seed)`. Never called where nothing is added.

        Returns:
            x_0 [B, ...], not clamped, on x_T's device.
        """
        x, indices, noise = _prepare(x_T, seed, indices, noise)
        for transition in self.transitions:
            x, _ = self._advance(model, transition, x, indices, noise)
        return x

    @torch.no_grad()
    def trajectory(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Iterator[Tensor]:
        """The states x_T, ..., x_0 one by one (`nfe` + 1 of them). Arguments as `sample`; nothing is kept."""
        for moment in self.moments(model, x_T, seed, indices, noise):
            yield moment.x

    @torch.no_grad()
    def moments(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Iterator[Moment]:
        """The trajectory with its timesteps and the image predicted at each step. Arguments as `sample`."""
        x, indices, noise = _prepare(x_T, seed, indices, noise)
        yield Moment(self.transitions[0].t, x, None)
        for transition in self.transitions:
            x_prev, eps = self._advance(model, transition, x, indices, noise)
            x0 = x0_from_eps(x, eps, transition.alpha_bar)
            yield Moment(transition.t_prev, x_prev, x0 if self.clip == "none" else x0.clamp(-1.0, 1.0))
            x = x_prev

    @torch.no_grad()
    def encode(self, model: EpsModel, x_0: Tensor, at: EncodeAt = "source") -> Tensor:
        """x_T of an image: the eta = 0 walk backwards, on the same timesteps (paper section 5.4; Eq. 14 as an ODE).

            x_t = sqrt(ab_t) (x_prev - sqrt(1 - ab_prev) eps) / sqrt(ab_prev) + sqrt(1 - ab_t) eps

        Args:
            model: see the class.
            x_0: images [B, ...] in [-1, 1].
            at: the timestep that eps is evaluated at: "source", the level one is at (max(t_prev, 0)), or "target",
                the level being reached (diffusers' inverse scheduler). The paper does not say.

        Returns:
            x at the first timestep of the walk, [B, ...]; `sample` on it returns near x_0, with an error of order
            1/S (the eps of the two directions are taken at different points).

        Raises:
            ValueError: the walk is not invertible: it adds noise (eta > 0) or clips.
        """
        _check_choice("at", at, get_args(EncodeAt))
        if self.eta != 0.0:
            raise ValueError(f"encoding needs the deterministic walk: eta must be 0, got {self.eta:g}")
        if self.clip != "none":
            raise ValueError(f"encoding needs an invertible step: clip must be 'none', got {self.clip!r}")
        x = _state(x_0)
        for transition in reversed(self.transitions):
            t = max(transition.t_prev, 0) if at == "source" else transition.t
            eps = self._predict_eps(model, x, t, self.schedule.alpha_bar(t))
            x = step(_reversed(transition), x, eps)
        return x

    def _advance(
        self, model: EpsModel, transition: Transition, x: Tensor, indices: Tensor, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        eps = self._predict_eps(model, x, transition.t, transition.alpha_bar)
        z = noise(indices, transition.t, x) if transition.noise_std > 0.0 else None
        return step(transition, x, eps, z, self.clip), eps

    def _predict_eps(self, model: EpsModel, x: Tensor, t: int, alpha_bar: float) -> Tensor:
        timesteps = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        output = model(x.to(_input_dtype(model, x.dtype)), timesteps)
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)  # diffusers wraps its tensor
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}: it must return a tensor, or an object with one as .sample"
            )
        if output.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; "
                "a model that also predicts a variance must be wrapped to return the mean prediction alone"
            )
        return eps_from(self.prediction, output.to(x.dtype), x, alpha_bar)

    def __repr__(self) -> str:
        return (
            f"Sampler(steps={self.steps}, nfe={self.nfe}, eta={self.eta:g}, variance={self.variance!r}, "
            f"spacing={self.spacing!r}, clip={self.clip!r}, prediction={self.prediction!r})"
        )


def largest_eta(schedule: NoiseSchedule, pairs: Sequence[tuple[int, int]]) -> float:
    """The largest eta with sigma(eta)^2 <= 1 - ab_prev at every step: min sqrt((1 - ab_t) / (1 - ab_t / ab_prev)).

    At least 1 for every walk; infinite for a single step, which adds no noise at any eta.
    """
    limit = math.inf
    for t, t_prev in pairs:
        if t_prev in (CLEAN, t):
            continue
        ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
        limit = min(limit, math.sqrt((1.0 - ab) / (1.0 - ab / ab_prev)))
    return limit


def _transition(schedule: NoiseSchedule, t: int, t_prev: int, eta: float, variance: Variance) -> Transition:
    ab, ab_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    in_mean = sigma(eta, ab, ab_prev)
    # eta at its bound makes sigma^2 equal 1 - ab_prev up to rounding; the step takes the root of the difference.
    in_mean = min(in_mean, math.sqrt(1.0 - ab_prev))
    std = in_mean
    if variance == "large":
        std = 0.0 if t_prev == CLEAN else math.sqrt(1.0 - ab / ab_prev)
    return Transition(t, t_prev, ab, ab_prev, in_mean, std)


def _reversed(transition: Transition) -> Transition:
    return Transition(
        t=transition.t_prev,
        t_prev=transition.t,
        alpha_bar=transition.alpha_bar_prev,
        alpha_bar_prev=transition.alpha_bar,
        sigma=0.0,
        noise_std=0.0,
    )


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _prepare(
    x_T: Tensor, seed: int, indices: Tensor | None, noise: NoiseSource | None
) -> tuple[Tensor, Tensor, NoiseSource]:
    if indices is None:
        indices = torch.arange(x_T.shape[0], device=x_T.device)
    return _state(x_T), indices, noise if noise is not None else NamedNoise(seed)


def _input_dtype(model: EpsModel, state: torch.dtype) -> torch.dtype:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return state


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(choices)}")
