"""DDIM's step with an eps that is extrapolated by the rules for equal steps: iPNDM, and PNDM with its two starts.

The variables are those of `ddim_lab.multistep`. The rules are Adams and Bashforth's, in whatever variable the steps are
equal; PNDM calls a rule that moves by DDIM's step "pseudo".
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor

from ddim_lab.multistep import Multistep
from ddim_lab.sampler import Draw, Predict, State
from ddim_lab.sampler import step as ddim_step
from ddim_lab.schedule import NoiseSchedule, to_timestep
from ddim_lab.singlestep import Quiet, linear, moving, part
from ddim_lab.transitions import Level, TimestepsAs, Transition, check_choice

__all__ = ["Ipndm", "Pndm", "Start"]

Start = Literal["linear", "runge_kutta"]
"""How PNDM gets its first past outputs; see `Pndm`."""

RUNGE_KUTTA_STEPS: Final = 3
"""Steps that a Runge-Kutta start takes: the fourth has as many past outputs as it needs."""


@final
class Ipndm(Quiet, Multistep):
    """DDIM's step with eps extrapolated by Adams-Bashforth's weights for equal steps, of order 1 to 4.

        eps' = eps;  (3 eps - eps_1) / 2;  (23 eps - 16 eps_1 + 5 eps_2) / 12;
               (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24

    The weights stay these where the steps are not equal. Source: Zhang & Chen 2022, 2204.13902 (iPNDM).
    """

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return min(self.order, 2)

    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        return ddim_step(levels[0], x, _adams_bashforth(outputs))


@final
class Pndm(Quiet):
    """iPNDM of order 4 after a start that asks the model more often.

    `linear`: the first step is by the trapezoidal rule, DDIM's and then again with eps the mean of its two ends', and
    the next two are iPNDM's of order 2 and 3. NFE = S + 1. It is the start of the paper's S-PNDM.

    `runge_kutta`, the paper's own: the first three steps are the classical Runge-Kutta rule, moved by DDIM's step f,

        e_1 = eps(x, t),             e_2 = eps(f(x, e_1, t, m), m),    m = (t + t_prev) / 2
        e_3 = eps(f(x, e_2, t, m), m),    e_4 = eps(f(x, e_3, t, t_prev), t_prev)
        x_prev = f(x, (e_1 + 2 e_2 + 2 e_3 + e_4) / 6, t, t_prev)

    with 4 forwards each, of which e_1 is kept. NFE = S + 9, and S is at least 4. m may not be whole; where timesteps
    must be, it is rounded (of two, to the even one), and steps between neighbours are refused.

    Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2202.09778, Eq. 12 and 13.

    Args:
        start: "linear" or "runge_kutta".
        lower_order_final: see `ddim_lab.multistep.Multistep`; False is the paper's. A start stays what it is.
    """

    def __init__(self, start: Start = "linear", lower_order_final: bool = False) -> None:
        check_choice("start", start, get_args(Start))
        self.start: Final[Start] = start
        self.lower_order_final: Final = lower_order_final

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        """S + 1, but S where one step alone moves, which ends at the image and is DDIM's; or S + 9."""
        if self.start == "runge_kutta":
            return len(transitions) + 3 * RUNGE_KUTTA_STEPS
        return len(transitions) + (moving(transitions) > 1)

    def check(self, transitions: Sequence[Transition]) -> None:
        super().check(transitions)
        needed, steps = RUNGE_KUTTA_STEPS + 1, moving(transitions)
        if self.start == "runge_kutta" and steps < needed:
            raise ValueError(
                f"PNDM's Runge-Kutta start needs {needed} steps ({needed + 3 * RUNGE_KUTTA_STEPS} forwards) at least,"
                f" got {steps}: give more, or sampler.start=linear"
            )

    def between(
        self, transitions: Sequence[Transition], schedule: NoiseSchedule, timesteps_as: TimestepsAs
    ) -> Sequence[Level | None]:
        started = RUNGE_KUTTA_STEPS if self.start == "runge_kutta" else 0
        levels: list[Level | None] = []
        for each in transitions:
            starts = each.t_prev != each.t and sum(level is not None for level in levels) < started
            levels.append(_middle(each, schedule, timesteps_as) if starts else None)
        return levels

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return 2

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        past: deque[Tensor] = deque(maxlen=4)
        x, left = x_T, moving(transitions)
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            predicted = functools.partial(self.x0, transition, x, eps)
            if transition.t_prev != transition.t:
                past.appendleft(eps)
                if transition.between is not None:
                    x = ddim_step(transition, x, _runge_kutta(predict, transition, transition.between, x, eps))
                elif len(past) == 1 and transition.t_prev >= 0:
                    ahead = predict(ddim_step(transition, x, eps), transition.t_prev)
                    x = ddim_step(transition, x, torch.add(eps, ahead).mul_(0.5))
                else:
                    used = list(past)[: left if self.lower_order_final else None]
                    x = ddim_step(transition, x, _adams_bashforth(used))
                left -= 1
            yield State(transition.t_prev, x, predicted)

    def recipe(self) -> dict[str, Any]:
        lowered = {"lower_order_final": True} if self.lower_order_final else {}  # keys were made before it could be
        return {"name": "pndm", "start": self.start, **lowered}


def _middle(transition: Transition, schedule: NoiseSchedule, timesteps_as: TimestepsAs) -> Level:
    t, t_prev = transition.t, transition.t_prev
    middle = to_timestep(round((t + t_prev) / 2) if timesteps_as == "integer" else (t + t_prev) / 2)
    if not t_prev < middle < t:
        raise ValueError(
            f"PNDM's Runge-Kutta start needs a timestep between {t} and {t_prev}: give fewer steps,"
            " sampler.timesteps_as=given or sampler.start=linear"
        )
    return Level(middle, schedule.alpha_bar(middle))


def _runge_kutta(predict: Predict, transition: Transition, middle: Level, x: Tensor, eps: Tensor) -> Tensor:
    """The eps of a whole step by the classical Runge-Kutta rule: three forwards more."""
    half = part(transition, middle)
    second = predict(ddim_step(half, x, eps), middle.t)
    third = predict(ddim_step(half, x, second), middle.t)
    fourth = predict(ddim_step(transition, x, third), transition.t_prev)
    return linear(eps, 1 / 6, [second, third, fourth], [1 / 3, 1 / 3, 1 / 6])


def _adams_bashforth(outputs: Sequence[Tensor]) -> Tensor:
    """The next eps of equal steps, by up to four outputs, the newest first."""
    weights = _ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
    return outputs[0] if len(outputs) == 1 else linear(outputs[0], weights[0], list(outputs)[1:4], weights[1:])


_ADAMS_BASHFORTH: Final = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
