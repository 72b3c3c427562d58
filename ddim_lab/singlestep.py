"""Steps that ask the model several times, and remember nothing: Heun's method and DPM-Solver-2.

Both solve the probability-flow ODE, in which DDIM is the step of first order (the variables are those of
`ddim_lab.multistep`): their steps are DDIM's with an eps that stands for the whole step instead of its beginning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from ddim_lab.sampler import Draw, Formula, Predict, State
from ddim_lab.sampler import step as ddim_step
from ddim_lab.schedule import NoiseSchedule, half_log_snr, to_timestep
from ddim_lab.transitions import Level, TimestepsAs, Transition

__all__ = ["DpmSolver2", "Heun", "Quiet", "linear", "moving", "part"]


class Quiet(Formula):
    """A formula that adds no noise, and is for transitions that have none; abstract."""

    def noise_std(self, transition: Transition) -> float:
        return 0.0

    def check(self, transitions: Sequence[Transition]) -> None:
        if any(transition.sigma or transition.noise_std for transition in transitions):
            raise ValueError(f"{type(self).__name__} solves the ODE, without noise: eta must be 0")


@final
class Heun(Quiet):
    """Heun's method in rho: DDIM's step, and again with the mean of the eps at both its ends. NFE = 2S - 1.

        x_t / alpha_t = x_s / alpha_s + (rho_t - rho_s) (eps_s + eps_t) / 2

    The last step, whose end the model does not know, is DDIM's. Source: Karras et al. 2022, "Elucidating the Design
    Space of Diffusion-Based Generative Models", 2206.00364, Algorithm 1, in the variables of this ODE.
    """

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        return 2 * len(transitions) - 1

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return 2

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            x_prev = ddim_step(transition, x, eps)
            if transition.t_prev >= 0:
                x_prev = ddim_step(transition, x, torch.add(eps, predict(x_prev, transition.t_prev)).mul_(0.5))
            yield State(transition.t_prev, x_prev, functools.partial(self.x0, transition, x, eps))
            x = x_prev

    def recipe(self) -> dict[str, Any]:
        return {"name": "heun"}


@final
class DpmSolver2(Quiet):
    """DPM-Solver-2: the eps of a step is extrapolated from its beginning through a level inside it. NFE = 2S - 1.

    With h = lambda_t - lambda_s and the level m at lambda_m = lambda_s + r h, which DDIM's step leads to,

        u = (alpha_m / alpha_s) x_s - sigma_m (exp(r h) - 1) eps_s
        x_t = (alpha_t / alpha_s) x_s - sigma_t (exp(h) - 1) (eps_s + (eps_m(u) - eps_s) / (2 r))

    and r = 1/2: m lies in the middle, in lambda, at a timestep that is not whole in general. Where timesteps must be
    whole, m is the nearest whole one strictly between the step's ends, with the r that it has; where there is none, it
    is the step's end (r = 1), which makes the step Heun's. All of them are of second order. The step to the clean
    image, where lambda is infinite, is DDIM's. Source: Lu et al. 2022, "DPM-Solver", 2206.00927, Algorithm 1; any r
    as in its Algorithm 4.
    """

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        """2S - 1, less 1 for each repeated timestep."""
        return len(transitions) + sum(map(self._asks_between, transitions))

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return 2

    def between(
        self, transitions: Sequence[Transition], schedule: NoiseSchedule, timesteps_as: TimestepsAs
    ) -> Sequence[Level | None]:
        return [_middle(each, schedule, timesteps_as) if self._asks_between(each) else None for each in transitions]

    @staticmethod
    def _asks_between(transition: Transition) -> bool:
        return 0 <= transition.t_prev < transition.t

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            predicted = functools.partial(self.x0, transition, x, eps)
            if transition.between is None:
                x = ddim_step(transition, x, eps)
            else:
                middle = transition.between
                inside = predict(ddim_step(part(transition, middle), x, eps), middle.t)
                weight = 0.5 / _share(transition, middle)
                x = ddim_step(transition, x, linear(eps, 1.0 - weight, [inside], [weight]))
            yield State(transition.t_prev, x, predicted)

    def recipe(self) -> dict[str, Any]:
        return {"name": "dpm_solver_2"}


def _middle(transition: Transition, schedule: NoiseSchedule, timesteps_as: TimestepsAs) -> Level:
    """The level in the middle of a step in lambda; the step's end where no timestep lies between its ends."""
    t, t_prev = transition.t, transition.t_prev
    middle = schedule.timestep(0.5 * (half_log_snr(transition.alpha_bar) + half_log_snr(transition.alpha_bar_prev)))
    if timesteps_as == "integer":
        middle = min(max(round(middle), t_prev + 1), t - 1)
    middle = to_timestep(middle)
    if not t_prev < middle < t:
        middle = t_prev
    return Level(middle, schedule.alpha_bar(middle))


def _share(transition: Transition, level: Level) -> float:
    """r, of the way in lambda from t to t_prev that a level stands at."""
    start, stop = half_log_snr(transition.alpha_bar), half_log_snr(transition.alpha_bar_prev)
    return (half_log_snr(level.alpha_bar) - start) / (stop - start)


# -- what steps are made of ---------------------------------------------------------------------------------


def part(transition: Transition, level: Level) -> Transition:
    """The transition as far as a level inside it."""
    return replace(transition, t_prev=level.t, alpha_bar_prev=level.alpha_bar, between=None)


def moving(transitions: Sequence[Transition]) -> int:
    """How many of them lead anywhere: a repeated timestep costs a forward, and moves nothing."""
    return sum(transition.t_prev != transition.t for transition in transitions)


def linear(x: Tensor, factor: float, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """factor x + sum of weights times others, in one new tensor."""
    result = x * factor
    for other, weight in zip(others, weights, strict=True):
        result.add_(other, alpha=weight)
    return result
