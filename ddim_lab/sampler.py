"""DDPM and DDIM as one family: one step, and the walk from noise to image (and back).

Song, Meng, Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021), Eq. 12, written with alpha_bar:

    x_0hat = (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t)
    x_prev = sqrt(ab_prev) x_0hat + sqrt(1 - ab_prev - sigma^2) eps + std z,       z ~ N(0, I)

The numbers ab, sigma and std of each step come from `ddim_lab.transitions`: all of the family is in them. What is no
number, another way from x_t to x_prev, is a `Formula` given to the `Sampler`.

What a class-conditional network is told is a sample's label, which its index names; guidance makes one eps of two.

Torch and numpy only. Coefficients are computed in float64 and enter the step as Python floats: nothing is copied
to the device, nothing waits for it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Final, final, get_args

import torch
from torch import Tensor

from ddim_lab.diffusion import eps_from, x0_from_eps
from ddim_lab.labels import NamedLabels
from ddim_lab.noise import NamedNoise, NoiseSource
from ddim_lab.schedule import NoiseSchedule, is_whole
from ddim_lab.transitions import (
    PREDICTIONS,
    Clip,
    EncodeAt,
    Gamma,
    Level,
    Prediction,
    TimestepsAs,
    Transition,
    Variance,
    are_whole,
    check_choice,
    gamma_needed_at,
    largest_eta,
    sigma,
    transitions,
    visited,
)

__all__ = [
    "Clip",
    "Ddim",
    "Draw",
    "EncodeAt",
    "EpsModel",
    "Formula",
    "Predict",
    "Sampler",
    "State",
    "Transition",
    "Variance",
    "largest_eta",
    "sigma",
    "step",
]

EpsModel = Callable[..., Any]
"""(x_t [B, ...], t [B]) -> output; a class-conditional one is given labels [B], too."""

Predict = Callable[[Tensor, float], Tensor]
"""(x [B, ...], t) -> the model's eps, of x's shape and dtype: one forward, or two with guidance."""

Draw = Callable[[float, Tensor], Tensor]
"""(t, x [B, ...]) -> the standard normal noise that is named by t, of x's shape and dtype."""


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
        signal_ratio = math.sqrt(ab_prev / ab)
        mean = torch.add(x_t * signal_ratio, eps, alpha=direction - signal_ratio * math.sqrt(1.0 - ab))
    else:
        x_0 = x0_from_eps(x_t, eps, ab).clamp(-1.0, 1.0)
        if clip == "x0":
            mean = torch.add(x_0 * math.sqrt(ab_prev), eps, alpha=direction)
        else:
            noise_ratio = direction / math.sqrt(1.0 - ab)
            mean = torch.add(x_t * noise_ratio, x_0, alpha=math.sqrt(ab_prev) - noise_ratio * math.sqrt(ab))
    if transition.noise_std == 0.0:
        return mean
    if noise is None:
        raise ValueError(f"the step from t={transition.t} adds noise: give it")
    return torch.add(mean, noise, alpha=transition.noise_std)


@final
@dataclass(frozen=True, eq=False)
class State:
    """Where a walk is: x at timestep t (-1: the image).

    Attributes:
        t, x: as said; x [B, ...].
        predict_x0: computes `x0`; None at the start, where nothing has been predicted yet.
    """

    t: float
    x: Tensor
    predict_x0: Callable[[], Tensor] | None = None

    @functools.cached_property
    @torch.no_grad()
    def x0(self) -> Tensor | None:
        """The image predicted on the way here, of x's shape: what the step went by, clamped where it clips.

        None at the start. Computed when first asked for.
        """
        return None if self.predict_x0 is None else self.predict_x0()


class Formula(ABC):
    """A way from x_t to x_prev, to be given to a `Sampler`; abstract.

    Most need `step` alone. One that needs past evaluations, or several of them a step, writes a `walk` of its own and
    says in `nfe` what it costs, and in `between` at which further levels it asks the model.
    """

    dtype: ClassVar[torch.dtype] = torch.float64
    """The precision that its numbers have at most, whatever x_T's: float32 where it computes in that alone."""

    @abstractmethod
    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        """x_prev [B, ...] from the state and the eps predicted there.

        Args:
            transition: the step's numbers.
            x_t: state [B, ...], float32 or float64.
            eps: predicted noise, same shape and dtype.
            z: standard normal noise, same shape and dtype; None where `noise_std` is 0.
        """

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What it is, as JSON: its name and settings. It enters keys, so that no two formulas may say the same."""

    def bind(self, schedule: NoiseSchedule, steps: int, timesteps: Sequence[float] | None = None) -> Formula:
        """This formula for one walk; a `Sampler` asks when it is made. Most are for all walks, and give themselves.

        Args:
            schedule, steps, timesteps: as `Sampler`.

        Raises:
            ValueError: it can't take such a walk; says why.
        """
        return self

    @property
    def visits(self) -> Sequence[float] | None:
        """The timesteps at which its walk asks the model, in order, where it chooses them itself once it is bound.

        None leaves them to the spacing; with a choice of its own the transitions add no noise, whatever eta is.
        """
        return None

    def noise_std(self, transition: Transition) -> float:
        """Standard deviation of the noise that this step adds; where it is 0 none is drawn."""
        return transition.noise_std

    @property
    def noise_from(self) -> str | None:
        """Where its noise comes from, in words, where that is not the noise that other rows have at its timesteps."""
        return None

    @property
    def keeps_levels(self) -> bool:
        """Whether its noise leaves each state at the level of its t: not where another size of it is chosen."""
        return True

    @property
    def diverges(self) -> str | None:
        """Why no model can have a finite image from this walk, in one line, where that is known beforehand."""
        return None

    @property
    def noise_is_dear(self) -> bool:
        """Whether its noise takes milliseconds a sample and step: moments of thousands of samples are out of reach."""
        return False

    def is_random(self, transitions: Sequence[Transition]) -> bool:
        """Whether images depend on more than x_T."""
        return any(self.noise_std(transition) != 0.0 for transition in transitions)  # NaN: not known yet

    def x0(self, transition: Transition, x_t: Tensor, eps: Tensor) -> Tensor:
        """The image [B, ...] that the step from x_t goes by."""
        return x0_from_eps(x_t, eps, transition.alpha_bar)

    def between(
        self, transitions: Sequence[Transition], schedule: NoiseSchedule, timesteps_as: TimestepsAs
    ) -> Sequence[Level | None]:
        """A level for each transition: where inside the step the walk asks the model, too. Most ask nowhere.

        A walk may ask at timesteps that are announced: those of its transitions, and these. Each is there as its
        transition's `between`.

        Args:
            transitions: of the walk, in order.
            schedule: gives the levels.
            timesteps_as: "integer" where each t must be whole.

        Raises:
            ValueError: there is no such level where one is needed; says what to do.
        """
        return [None] * len(transitions)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        """Calls of `predict` that these transitions cost."""
        return len(transitions)

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        """The order of convergence that its authors say it has on the probability-flow ODE, as task=order checks it.

        The error at a level shrinks as NFE^-order where all steps in lambda shrink together. None where nothing is
        said, or where these transitions follow no ODE.
        """
        return None

    def check(self, transitions: Sequence[Transition]) -> None:  # noqa: B027 (most take any)
        """Raise ValueError, saying what is possible, where it can't take these; a `Sampler` asks when it is made."""

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        """The states from noise to image, x_T first: one after each transition.

        Args:
            predict: the model.
            x_T: starting noise [B, ...], float32 or float64.
            transitions: of the walk, in order.
            draw: the noise of the transition from t is `draw(t, x)`.
        """
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            x_prev = self.step(transition, x, eps, draw(transition.t, x) if self.noise_std(transition) > 0.0 else None)
            yield State(transition.t_prev, x_prev, functools.partial(self.x0, transition, x, eps))
            x = x_prev

    def __repr__(self) -> str:
        settings = {name: value for name, value in self.recipe().items() if name != "name"}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


@final
class Ddim(Formula):
    """The step of DDPM, DDIM and all between: `step`, for every eta and variance.

    With learned variance the noise z of a step is not scaled by one number, but each of its values by

        std = exp((share log beta'_t + (1 - share) log beta~_t) / 2),   beta' = 1 - ab / ab_prev,   beta~ = sigma(1)^2

    where the network says the share; Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (ICML
    2021), Eq. 15, on the timesteps that are visited.

    Args:
        clip: "none", "x0" or "x0_eps"; see `step`.
        learned: whether the network says how much noise is added.
    """

    def __init__(self, clip: Clip = "none", learned: bool = False) -> None:
        check_choice("clip", clip, get_args(Clip))
        self.clip: Final = clip
        self.learned: Final = learned

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return step(transition, x_t, eps, z, self.clip)

    def x0(self, transition: Transition, x_t: Tensor, eps: Tensor) -> Tensor:
        x_0 = super().x0(transition, x_t, eps)
        return x_0 if self.clip == "none" else x_0.clamp(-1.0, 1.0)

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        """1 for DDIM; None with noise, and where the predicted image is clamped."""
        noisy = any(transition.sigma or transition.noise_std for transition in transitions)
        return None if noisy or self.clip != "none" else 1

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        if not self.learned:
            yield from super().walk(predict, x_T, transitions, draw)
            return
        assert isinstance(predict, _Asked), "what a network learned beside eps is asked for through a Sampler"
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps, share = predict.with_share(x, transition.t)
            x_prev = step(replace(transition, noise_std=0.0), x, eps, None, self.clip)
            if self.noise_std(transition) > 0.0:
                lower = 2.0 * math.log(transition.noise_std)
                upper = math.log(1.0 - transition.alpha_bar / transition.alpha_bar_prev)
                x_prev = torch.addcmul(x_prev, ((lower + share * (upper - lower)) / 2.0).exp(), draw(transition.t, x))
            yield State(transition.t_prev, x_prev, functools.partial(self.x0, transition, x, eps))
            x = x_prev

    def recipe(self) -> dict[str, Any]:
        return {"clip": self.clip, **({"variance": "learned"} if self.learned else {})}


@final
class Sampler:
    """A formula on a fixed list of timesteps; by default one of the DDIM family.

    Args:
        schedule, steps, eta, variance, spacing, timesteps, timesteps_as, gamma: the walk's numbers; see
            `ddim_lab.transitions.transitions`.
        clip: "none", "x0" or "x0_eps", for the default formula; see `step`.
        prediction: what the model predicts: "eps", "x0" or "v".
        formula: how each step is taken; None is `Ddim(clip)`.
        labels: of the samples, for a class-conditional model; None for another.
        guidance: classifier-free guidance: w below, for labels that have a null class; None is 1.

    Attributes:
        steps: S as asked.
        nfe: number of function evaluations: the forwards really done a sample, twice as many with guidance.
        transitions: the walk, from noise to image.
        whole: whether all timesteps at which it asks the model are whole.

    Raises:
        ValueError: any argument outside its range; the message names the valid one.

    A model is any callable (x_t [B, ...], t [B]) -> output of x_t's shape, or an object with such a tensor as `.sample`
    (diffusers), in memory that it does not write to again: solvers keep outputs. The state is float32, or float64 if
    x_T is; the model is given it in its own dtype. A class-conditional one is given labels, int64 [B], as its third
    argument. With w = `guidance` eps is, as in diffusers' guidance_scale,

        eps = eps(x_t, t, none) + w (eps(x_t, t, label) - eps(x_t, t, none))

    (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2021, Eq. 6, whose own w is one less): 1 is the conditional
    model and 0 the unconditional one, each in one forward; all others take two.

    t is int64 where the walk is `whole`, and float32 in all forwards of a walk that is not, since what is compiled or
    recorded is so for one dtype.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int = 50,
        eta: float = 0.0,
        variance: Variance = "posterior",
        spacing: str = "uniform",
        clip: Clip = "none",
        timesteps: Sequence[float] | None = None,
        prediction: Prediction = "eps",
        formula: Formula | None = None,
        timesteps_as: TimestepsAs = "given",
        gamma: Gamma | None = None,
        labels: NamedLabels | None = None,
        guidance: float | None = None,
    ) -> None:
        check_choice("prediction", prediction, PREDICTIONS)
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance must be a number, got {guidance}")
        if guidance not in (None, 1.0) and labels is not None and labels.null_class is None:
            raise ValueError(f"guidance={guidance:g} needs a model with a null class, which is to be told no class")
        if formula is not None and clip != "none":
            raise ValueError(f"clip={clip} is for the default formula: {formula} says itself whether it clips")
        learned = variance == "learned"
        if learned and formula is not None:
            raise ValueError(f"variance=learned is for the default formula: {formula} does not ask for it")
        self.formula: Final = Ddim(clip, learned) if formula is None else formula.bind(schedule, steps, timesteps)
        if (visits := self.formula.visits) is None:
            walk = transitions(schedule, steps, eta, variance, spacing, timesteps, timesteps_as, gamma)
        else:
            walk = visited(schedule, visits)
        self.formula.check(walk)
        levels = self.formula.between(walk, schedule, timesteps_as)
        self.transitions: Final = tuple(
            each if level is None else replace(each, between=level) for each, level in zip(walk, levels, strict=True)
        )
        self.whole: Final = are_whole(self.transitions)
        self.schedule: Final = schedule
        self.steps: Final = int(steps) if timesteps is None else len(timesteps)
        self.eta: Final = float(eta)
        self.variance: Final = variance
        self.spacing: Final = "custom" if timesteps is not None else spacing if visits is None else "its own"
        self.clip: Final[Clip] = self.formula.clip if isinstance(self.formula, Ddim) else "none"
        self.prediction: Final = prediction
        self.labels: Final = labels
        self.guidance: Final = guidance

    @property
    def guided(self) -> bool:
        """Whether each eps is made of two."""
        return self.guidance not in (None, 0.0, 1.0)

    @property
    def is_random(self) -> bool:
        """Whether images depend on more than x_T."""
        return self.formula.is_random(self.transitions)

    @property
    def nfe(self) -> int:
        """Forwards a sample costs. Below `steps` where a spacing drops repeats."""
        return self.formula.nfe(self.transitions) * (2 if self.guided else 1)

    def timestep_tensor(self, t: float, count: int, device: torch.device) -> Tensor:
        """t [count] as the model is given it: int64 where the walk is whole, or else float32.

        Raises:
            ValueError: the walk is whole and t is not: its formula asks at a t that it has not announced.
        """
        if self.whole and not is_whole(t):
            raise ValueError(f"{self.formula} asks the model at t={t}: its method `between` must announce it")
        return torch.full((count,), t, dtype=torch.int64 if self.whole else torch.float32, device=device)

    def recipe(self) -> dict[str, Any]:
        """What its samples are a function of, beside model and noise; for keys."""
        recipe: dict[str, Any] = {
            "schedule": self.schedule.digest,
            "transitions": [
                [transition.t, transition.t_prev, transition.sigma, transition.noise_std]
                for transition in self.transitions
            ],
            "clip": self.clip,
        }
        if any(transition.between for transition in self.transitions):
            recipe["between"] = [transition.between and transition.between.t for transition in self.transitions]
        if self.labels is not None:
            recipe |= {"labels": self.labels.recipe(), "guidance": 1.0 if self.guidance is None else self.guidance}
        if isinstance(self.formula, Ddim):
            return recipe | {name: value for name, value in self.formula.recipe().items() if name != "clip"}
        return {**recipe, "formula": self.formula.recipe()}

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
            noise: source of the steps' noise; default `NamedNoise(seed)`. Never called in walks that add none.

        Returns:
            x_0 [B, ...], not clamped, on x_T's device.
        """
        # The states are let go at once: through one, its step's x_t and eps would take memory during the next forward.
        (x_0,) = deque(map(attrgetter("x"), self._states(model, x_T, seed, indices, noise)), maxlen=1)
        assert isinstance(x_0, Tensor)
        return x_0

    @torch.no_grad()
    def walk(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Iterator[State]:
        """The states from x_T to the image, one by one, with the image predicted at each step. Arguments as `sample`.

        As many as there are transitions, and x_T. Nothing is computed before it is asked for, and nothing is kept.
        """
        yield from self._states(model, x_T, seed, indices, noise)

    @torch.no_grad()
    def trajectory(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Iterator[Tensor]:
        """x_T, ..., x_0 alone, as `walk` visits them. Arguments as `sample`."""
        yield from map(attrgetter("x"), self._states(model, x_T, seed, indices, noise))

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
            ValueError: the walk is not invertible: it adds noise (eta > 0, or variance "analytic"), clips, or is of
                another formula; or the model is class-conditional.
        """
        check_choice("at", at, get_args(EncodeAt))
        if not isinstance(self.formula, Ddim):
            raise ValueError(f"encoding inverts the DDIM step, and this sampler steps by {self.formula}")
        if self.labels is not None:
            raise ValueError("encoding is of models without classes: whose label is an image to be encoded with?")
        if self.eta != 0.0:
            raise ValueError(f"encoding needs the deterministic walk: eta must be 0, got {self.eta:g}")
        if self.variance == "analytic":
            raise ValueError("encoding needs the deterministic walk: variance=analytic adds noise at every eta")
        if self.clip != "none":
            raise ValueError(f"encoding needs an invertible step: clip must be 'none', got {self.clip!r}")
        x = _state(x_0)
        for transition in reversed(self.transitions):
            t = max(transition.t_prev, 0) if at == "source" else transition.t
            eps = self.predict_eps(model, x, t)
            x = step(transition.backwards(), x, eps)
        return x

    def _states(
        self, model: EpsModel, x_T: Tensor, seed: int, indices: Tensor | None, noise: NoiseSource | None
    ) -> Iterator[State]:
        if unknown := gamma_needed_at(self.transitions):
            raise ValueError(f"variance=analytic needs the model's Gamma(t), at t={unknown[0]:g} first: give gamma")
        names = torch.arange(x_T.shape[0], device=x_T.device) if indices is None else indices
        source = NamedNoise(seed) if noise is None else noise
        predict = _Asked(self, model, None if self.labels is None else self.labels(names.to(x_T.device)))
        return self.formula.walk(predict, _state(x_T), self.transitions, lambda t, x: source(names, t, x))

    def predict_eps(self, model: EpsModel, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """The model's eps as the walk takes it, of x's shape and dtype: one forward, or two with guidance.

        Args:
            model: see the class.
            x: states [B, ...] at t.
            t: their timestep.
            labels: int64 [B] of a class-conditional model.

        Raises:
            TypeError, ValueError: the model returned something else than a tensor of x's shape, or twice its channels.
        """
        return self.predict(model, x, t, labels)[0]

    def predict(
        self, model: EpsModel, x: Tensor, t: float, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """eps as `predict_eps`, and the second half of the channels of a model that learned its variance, else None.

        With guidance the variance is that of the labels.
        """
        if labels is None or self.guidance in (None, 1.0):
            return self._one_forward(model, x, t, labels)
        assert self.labels is not None
        assert self.labels.null_class is not None
        without, variance = self._one_forward(model, x, t, torch.full_like(labels, self.labels.null_class))
        if not self.guided:
            return without, variance
        assert self.guidance is not None
        eps, variance = self._one_forward(model, x, t, labels)
        return torch.lerp(without, eps, self.guidance), variance

    def _one_forward(self, model: EpsModel, x: Tensor, t: float, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        told = () if labels is None else (labels,)
        output = model(x.to(_input_dtype(model, x.dtype)), self.timestep_tensor(t, len(x), x.device), *told)
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)  # diffusers wraps its tensor
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model returned {type(output).__name__}: it must return a tensor, or an object with one as .sample"
            )
        output, variance = output.to(x.dtype), None
        if x.ndim > 1 and output.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
            output, variance = output.chunk(2, dim=1)
        if output.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for a state of shape {tuple(x.shape)}; it must be that"
                " shape, or twice as many channels, of which the second half is a learned variance"
            )
        return eps_from(self.prediction, output, x, self.schedule.alpha_bar(t)), variance

    def __repr__(self) -> str:
        own = self.formula.visits is not None  # what the formula says itself is not repeated here, nor contradicted
        numbers = "" if own else f"eta={self.eta:g}, variance={self.variance!r}, spacing={self.spacing!r}, "
        numbers += "" if own else f"clip={self.clip!r}, "
        numbers += "" if self.guidance is None else f"guidance={self.guidance:g}, "
        formula = "" if isinstance(self.formula, Ddim) else f", formula={self.formula}"
        return f"Sampler(steps={self.steps}, nfe={self.nfe}, {numbers}prediction={self.prediction!r}{formula})"


@final
class _Asked:
    """A model as one walk asks it, a `Predict`: for the labels of the walk's samples."""

    def __init__(self, sampler: Sampler, model: EpsModel, labels: Tensor | None) -> None:
        self._sampler, self._model, self._labels = sampler, model, labels

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self._sampler.predict_eps(self._model, x, t, self._labels)

    def with_share(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """eps, and where between its bounds each log variance lies, of a network that learned it.

        The share is (v + 1) / 2 of the second half v of its output, 0 at the lower bound and 1 at the upper one.

        Raises:
            ValueError: the network gives no second half.
        """
        eps, variance = self._sampler.predict(self._model, x, t, self._labels)
        if variance is None:
            raise ValueError("variance=learned needs a network with twice the channels, which learned its variance")
        return eps, (variance + 1.0) / 2.0


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _input_dtype(model: EpsModel, state: torch.dtype) -> torch.dtype:
    if isinstance(model, torch.nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return state
