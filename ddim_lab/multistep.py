"""Solvers of higher order: of the probability-flow ODE, whose first-order step is DDIM, and of its SDE (eta = 1).

With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma), the half log-SNR, and
rho = sigma / alpha = exp(-lambda), the ODE from a level s to a less noisy one t is solved exactly by either of

    x_t = (alpha_t / alpha_s) x_s - alpha_t  int_s^t exp(-lambda) eps(lambda) d lambda
    x_t = (sigma_t / sigma_s) x_s + sigma_t  int_s^t exp(+lambda) x_0(lambda) d lambda

(Lu et al. 2022, "DPM-Solver", 2206.00927, Prop. 3.1; "DPM-Solver++", 2211.01095, Prop. 4.1). Holding the model's output
constant over a step gives DDIM from both. The solvers here also use what the model said at earlier timesteps, one
forward a step: `Deis`, `Ipndm` and `Pndm` its eps, `DpmSolverPP` and `UniPC` its x_0. `Heun` takes two a step.

The walk's last step reaches alpha_bar = 1, where lambda is infinite. A polynomial in lambda through x_0 diverges
there, so that this step is of first order in `DpmSolverPP` and `UniPC`: x = x_0. In eps the integral is finite.

`DpmSolverPPSde` adds DDPM's noise, named as everywhere by seed, sample and timestep.

All coefficients are float64, and enter the steps as Python floats.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from ddim_lab.diffusion import x0_from_eps
from ddim_lab.sampler import Draw, Formula, Predict, State
from ddim_lab.sampler import step as ddim_step
from ddim_lab.transitions import Transition, check_choice, sigma

__all__ = [
    "Bh",
    "Correction",
    "Deis",
    "DpmSolverPP",
    "DpmSolverPPSde",
    "Heun",
    "Ipndm",
    "Multistep",
    "Pndm",
    "UniPC",
    "half_log_snr",
]

Correction = Literal["published", "full"]
"""Of DPM-Solver++(3M)'s second difference; see `DpmSolverPP`."""

Bh = Literal["bh1", "bh2"]
"""UniPC's B(h): h (bh1) or 1 - exp(-h) (bh2); see `UniPC`."""


def half_log_snr(alpha_bar: float) -> float:
    """lambda = log(alpha / sigma) = log(alpha_bar / (1 - alpha_bar)) / 2; infinite at alpha_bar = 1."""
    return math.inf if alpha_bar == 1.0 else 0.5 * (math.log(alpha_bar) - math.log1p(-alpha_bar))


class Quiet(Formula):
    """A formula that adds no noise, and is for transitions that have none; abstract."""

    def noise_std(self, transition: Transition) -> float:
        return 0.0

    def check(self, transitions: Sequence[Transition]) -> None:
        if any(transition.sigma or transition.noise_std for transition in transitions):
            raise ValueError(f"{type(self).__name__} solves the ODE, without noise: eta must be 0")


class Multistep(Formula):
    """A step from x_t by the model's outputs at this timestep and at earlier ones; abstract. One forward a step.

    The first steps have fewer outputs to go by, and are of lower order.

    Args:
        order: most outputs that a step goes by, at least 1.
        lower_order_final: a step goes by no more outputs than there are steps left, itself included, so that the last
            one is DDIM's. False: by `order` of them to the end (where the last level allows it).
    """

    MOST: int = 4

    def __init__(self, order: int, lower_order_final: bool = True) -> None:
        if not 1 <= order <= self.MOST:
            raise ValueError(f"order must be from 1 to {self.MOST}, got {order}")
        self.order: Final = order
        self.lower_order_final: Final = lower_order_final

    @abstractmethod
    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        """x_prev [B, ...] of the first level's transition.

        Args:
            x: state at that level's t.
            levels: transitions from the levels gone by, this one first.
            outputs: what `output` made of the model's eps at each of them.
        """

    def output(self, transition: Transition, x_t: Tensor, eps: Tensor) -> Tensor:
        """What is kept of an evaluation: eps."""
        return eps

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return self._noised(transition, self.advance(x_t, [transition], [self.output(transition, x_t, eps)]), z)

    def _noised(self, transition: Transition, mean: Tensor, z: Tensor | None) -> Tensor:
        """The mean, which is this walk's own, with noise where the step has any."""
        return mean if z is None else mean.add_(z, alpha=self.noise_std(transition))

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        past: deque[tuple[Transition, Tensor]] = deque(maxlen=self.order)
        x, origin = x_T, x_T
        levels: list[Transition] = []
        outputs: list[Tensor] = []
        yield State(transitions[0].t, x)
        left = _moving(transitions)
        for transition in transitions:
            eps = predict(x, transition.t)
            predicted = functools.partial(self.x0, transition, x, eps)
            if transition.t_prev == transition.t:  # a repeated timestep moves nothing
                yield State(transition.t, x, predicted)
                continue
            output = self.output(transition, x, eps)
            if past:
                x = self.corrected(x, origin, levels, outputs, output)
            past.appendleft((transition, output))
            used = list(past)[: left if self.lower_order_final else None]
            levels, outputs = [level for level, _ in used], [of for _, of in used]
            left -= 1
            z = draw(transition.t, x) if self.noise_std(transition) > 0.0 else None
            x_prev = self._noised(transition, self.advance(x, levels, outputs), z)
            yield State(transition.t_prev, x_prev, predicted)
            x, origin = x_prev, x

    def corrected(
        self, x: Tensor, origin: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor], ahead: Tensor
    ) -> Tensor:
        """The state x again, once the model has been asked there: the one that the next step is taken from.

        Args:
            x: what `advance` made of the others.
            origin, levels, outputs: as it was given them.
            ahead: what `output` made of the model's eps at x.
        """
        return x

    def recipe(self) -> dict[str, Any]:
        name = type(self).__name__.lower()
        return {"name": name, "order": self.order, "lower_order_final": self.lower_order_final}


@final
class Deis(Quiet, Multistep):
    """The integral of eps with eps a polynomial in lambda through the last `order` outputs.

        x_t = (alpha_t / alpha_s) x_s - alpha_t sum_j c_j eps_j,   c_j = int_s^t exp(-lambda) L_j(lambda) d lambda

    with L_j the Lagrange polynomials. Order 1 is DDIM. Source: Zhang & Chen 2022, "Fast Sampling of Diffusion Models
    with Exponential Integrator", 2204.13902, with the polynomial in log rho = -lambda instead of t.
    """

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return self.order

    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        now = levels[0]
        start, stop = half_log_snr(now.alpha_bar), half_log_snr(now.alpha_bar_prev)
        nodes = [half_log_snr(level.alpha_bar) - start for level in levels]
        weights = _weights(nodes, _decaying_moments(stop - start, len(nodes)))
        scale = -math.sqrt(now.alpha_bar_prev) * math.exp(-start)
        return _linear(
            x, math.sqrt(now.alpha_bar_prev / now.alpha_bar), outputs, [scale * weight for weight in weights]
        )


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
    """iPNDM after a first step by the trapezoidal rule, one forward more: NFE = S + 1.

    The first step is DDIM's; with eps the mean of its two ends' it is taken again. Source: Liu et al. 2022, "Pseudo
    Numerical Methods for Diffusion Models on Manifolds", 2202.09778, with the second-order start of their S-PNDM
    instead of their Runge-Kutta start (9 forwards more).
    """

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return ddim_step(transition, x_t, eps)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        """S + 1; where one step alone moves, which ends at the image, it is DDIM's."""
        return len(transitions) + (_moving(transitions) > 1)

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return 2

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        past: deque[Tensor] = deque(maxlen=4)
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            predicted = functools.partial(self.x0, transition, x, eps)
            if transition.t_prev != transition.t:
                past.appendleft(eps)
                x_prev = ddim_step(transition, x, _adams_bashforth(past))
                if len(past) == 1 and transition.t_prev >= 0:
                    ahead = predict(x_prev, transition.t_prev)
                    x_prev = ddim_step(transition, x, torch.add(eps, ahead).mul_(0.5))
                x = x_prev
            yield State(transition.t_prev, x, predicted)

    def recipe(self) -> dict[str, Any]:
        return {"name": "pndm", "start": "linear"}


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


class _OfImages(Multistep):
    """A multistep solver that goes by x_0; abstract."""

    MOST = 3

    def output(self, transition: Transition, x_t: Tensor, eps: Tensor) -> Tensor:
        return x0_from_eps(x_t, eps, transition.alpha_bar)


@final
class DpmSolverPP(Quiet, _OfImages):
    """DPM-Solver++(2M) and (3M): x_0 with its first, and second, difference in lambda. Order 1 is DDIM.

    With h = lambda_t - lambda_s, h_1 and h_2 the steps before it, r = h_1 / h, r' = h_2 / h, D = x_0(s) and

        D' = (D - D_1) / r,   D'_1 = (D_1 - D_2) / r',   phi = 1 - exp(-h):
        2M   x_t = (sigma_t / sigma_s) x_s + alpha_t phi (D + D' / 2)
        3M   x_t = (sigma_t / sigma_s) x_s + alpha_t (phi D + (1 - phi / h) d_1 + c (phi / h^2 - 1 / h + 1 / 2) d_2)
             d_1 = D' + (D' - D'_1) r / (r + r'),   d_2 = (D' - D'_1) / (r + r')

    d_2 is half of the second derivative in lambda / h. As published c = 1, which makes the solver one of second order;
    with c = 2 (`correction="full"`) it is of third. Source: Lu et al. 2022, 2211.01095, Algorithm 2 (2M); the authors'
    code for 3M (`multistep_dpm_solver_third_update`).

    Args:
        order: 1 to 3.
        correction: "published" or "full"; without a meaning below order 3.
        lower_order_final: see `Multistep`; the step to alpha_bar = 1 is of first order in any case.
    """

    def __init__(self, order: int, correction: Correction = "published", lower_order_final: bool = True) -> None:
        check_choice("correction", correction, get_args(Correction))
        super().__init__(order, lower_order_final)
        self.correction: Final = correction

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return self.order

    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        now = levels[0]
        signal = math.sqrt(now.alpha_bar_prev)
        lambdas = [half_log_snr(now.alpha_bar_prev), *(half_log_snr(level.alpha_bar) for level in levels)]
        h = lambdas[0] - lambdas[1]
        if math.isinf(h):
            return outputs[0]
        phi = -math.expm1(-h)
        ratios = [(lambdas[k] - lambdas[k + 1]) / h for k in range(1, len(levels))]
        weights = [phi]
        if len(levels) == 2:
            slope = 0.5 * phi / ratios[0]
            weights = [phi + slope, -slope]
        elif len(levels) == 3:
            r, r_1 = ratios
            first = 1.0 - phi / h
            second = (phi / h**2 - 1.0 / h + 0.5) * (2.0 if self.correction == "full" else 1.0)
            newer = first * (1.0 + r / (r + r_1)) + second / (r + r_1)  # of D'
            older = -first * r / (r + r_1) - second / (r + r_1)  # of D'_1
            weights = [phi + newer / r, older / r_1 - newer / r, -older / r_1]
        return _linear(x, _noise_ratio(now), outputs, [signal * weight for weight in weights])

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "correction": self.correction}


@final
class DpmSolverPPSde(_OfImages):
    """SDE-DPM-Solver++(2M): the reverse SDE instead of the ODE, with as much noise as DDPM adds, which is its order 1.

    With phi = 1 - exp(-2 h) and D, D' as in `DpmSolverPP`,

        x_t = (sigma_t / sigma_s) exp(-h) x_s + alpha_t phi (D + D' / 2) + sigma_t sqrt(phi) z

    where sigma_t sqrt(phi) is sigma(eta = 1) of Song et al. 2021, Eq. 16. Source: Lu et al. 2022, 2211.01095.

    Args:
        order: 1 or 2.
        lower_order_final: see `Multistep`; the step to alpha_bar = 1 is x = x_0 in any case.
    """

    MOST = 2

    def check(self, transitions: Sequence[Transition]) -> None:
        for each in transitions:
            if not each.sigma == each.noise_std == sigma(1.0, each.alpha_bar, each.alpha_bar_prev):
                raise ValueError(f"{type(self).__name__} solves the SDE: eta must be 1, and variance posterior")

    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        now = levels[0]
        start, stop = half_log_snr(now.alpha_bar), half_log_snr(now.alpha_bar_prev)
        h = stop - start
        if math.isinf(h):
            return outputs[0]
        whole = -math.sqrt(now.alpha_bar_prev) * math.expm1(-2.0 * h)
        weights = [whole]
        if len(levels) == 2:
            slope = 0.5 * whole * h / (start - half_log_snr(levels[1].alpha_bar))
            weights = [whole + slope, -slope]
        return _linear(x, _noise_ratio(now) * math.exp(-h), outputs, weights)


@final
class UniPC(Quiet, _OfImages):
    """The unified predictor UniP-p and, with it, the corrector UniC-p: no forward more than the predictor's.

    With h = lambda_t - lambda_s, u_k = (lambda_k - lambda_s) / h for earlier levels (u < 0) and u = 1 for t,

        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - exp(-h)) D + alpha_t B sum_k a_k (D_k - D) / u_k
        B sum_k a_k u_k^(n-1) = b_n,   n = 1, 2, ...

    where b_n = h int_0^1 exp(-h (1 - u)) u^n du: polynomials in u up to that power are integrated exactly. The
    predictor goes by p - 1 earlier levels. The corrector goes by them and by t itself: the evaluation there, which is
    the next step's, corrects x_t before the next step is taken from it. For one unknown the paper sets a = 1/2 instead
    of solving. Source: Zhao et al. 2023, "UniPC", 2302.04867, in the form that predicts x_0.

    Args:
        order: p, 1 to 3.
        corrector: with UniC; without it is UniP-p.
        bh: B(h), "bh1" h, "bh2" 1 - exp(-h): it matters where a = 1/2 is set.
        lower_order_final: see `Multistep`; the step to alpha_bar = 1 is of first order, and not corrected, in any case.
    """

    def __init__(self, order: int, corrector: bool = True, bh: Bh = "bh2", lower_order_final: bool = True) -> None:
        check_choice("bh", bh, get_args(Bh))
        super().__init__(order, lower_order_final)
        self.corrector: Final = corrector
        self.bh: Final = bh

    def claimed_order(self, transitions: Sequence[Transition]) -> int | None:
        return self.order + self.corrector

    def advance(self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor]) -> Tensor:
        if math.isinf(half_log_snr(levels[0].alpha_bar_prev)):
            return outputs[0]
        return self._taken(x, levels, outputs)

    def corrected(
        self, x: Tensor, origin: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor], ahead: Tensor
    ) -> Tensor:
        return self._taken(origin, levels, outputs, ahead) if self.corrector else x

    def _taken(
        self, x: Tensor, levels: Sequence[Transition], outputs: Sequence[Tensor], ahead: Tensor | None = None
    ) -> Tensor:
        """The step from the first level, by x_0 at the levels and, corrected, `ahead` of it, at the step's end."""
        now = levels[0]
        start, stop = half_log_snr(now.alpha_bar), half_log_snr(now.alpha_bar_prev)
        h = stop - start
        at = [(half_log_snr(level.alpha_bar) - start) / h for level in levels[1:]]
        values = list(outputs[1:])
        if ahead is not None:
            at.append(1.0)
            values.append(ahead)
        phi = -math.expm1(-h)
        if len(at) == 1:
            weights = [0.5 * (h if self.bh == "bh1" else phi)]
        else:
            moments = _rising_moments(h, len(at))
            weights = np.linalg.solve(np.vander(at, increasing=True).T, moments).tolist() if at else []
        signal = math.sqrt(now.alpha_bar_prev)
        slopes = [signal * weight / u for weight, u in zip(weights, at, strict=True)]
        return _linear(x, _noise_ratio(now), [outputs[0], *values], [signal * phi - math.fsum(slopes), *slopes])

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "corrector": self.corrector, "bh": self.bh}


def _moving(transitions: Sequence[Transition]) -> int:
    """How many of them lead anywhere: a repeated timestep costs a forward, and moves nothing."""
    return sum(transition.t_prev != transition.t for transition in transitions)


# -- numbers ----------------------------------------------------------------------------------------------


_NODES, _GAUSS = (array.tolist() for array in np.polynomial.legendre.leggauss(48))


def _decaying_moments(h: float, count: int) -> list[float]:
    """int_0^h exp(-u) u^k du, k = 0 ... count - 1; k! where h is infinite. To rounding, for steps up to h = 30."""
    if math.isinf(h):
        return [float(math.factorial(k)) for k in range(count)]
    half = 0.5 * h
    at = [half * (1.0 + node) for node in _NODES]
    return [
        half * math.fsum(weight * math.exp(-u) * u**k for weight, u in zip(_GAUSS, at, strict=True))
        for k in range(count)
    ]


def _rising_moments(h: float, count: int) -> list[float]:
    """h int_0^1 exp(-h (1 - u)) u^n du, n = 1 ... count."""
    at = [0.5 * (1.0 + node) for node in _NODES]
    return [
        0.5 * h * math.fsum(weight * math.exp(-h * (1.0 - u)) * u**n for weight, u in zip(_GAUSS, at, strict=True))
        for n in range(1, count + 1)
    ]


def _weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights w with sum_j w_j u_j^k = moments[k]: the rule that is exact for polynomials through the nodes."""
    found: list[float] = np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()
    return found


def _adams_bashforth(outputs: Sequence[Tensor]) -> Tensor:
    """The next eps of equal steps, by up to four outputs, the newest first."""
    weights = _ADAMS_BASHFORTH[min(len(outputs), 4) - 1]
    return outputs[0] if len(outputs) == 1 else _linear(outputs[0], weights[0], list(outputs)[1:4], weights[1:])


_ADAMS_BASHFORTH: Final = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _noise_ratio(transition: Transition) -> float:
    """sigma_t / sigma_s."""
    return math.sqrt((1.0 - transition.alpha_bar_prev) / (1.0 - transition.alpha_bar))


def _linear(x: Tensor, factor: float, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """factor x + sum of weights times others, in one new tensor."""
    result = x * factor
    for other, weight in zip(others, weights, strict=True):
        result.add_(other, alpha=weight)
    return result
