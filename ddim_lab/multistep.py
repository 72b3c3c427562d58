"""Solvers of higher order: of the probability-flow ODE, whose first-order step is DDIM, and of its SDE (eta = 1).

With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(alpha / sigma), the half log-SNR, and
rho = sigma / alpha = exp(-lambda), the ODE from a level s to a less noisy one t is solved exactly by either of

    x_t = (alpha_t / alpha_s) x_s - alpha_t  int_s^t exp(-lambda) eps(lambda) d lambda
    x_t = (sigma_t / sigma_s) x_s + sigma_t  int_s^t exp(+lambda) x_0(lambda) d lambda

(Lu et al. 2022, "DPM-Solver", 2206.00927, Prop. 3.1; "DPM-Solver++", 2211.01095, Prop. 4.1). Holding the model's output
constant over a step gives DDIM from both. The solvers here also use what the model said at earlier timesteps, one
forward a step: `Deis` its eps, `DpmSolverPP` and `UniPC` its x_0. Further ones, in eps: `ddim_lab.pndm`, and
`ddim_lab.singlestep`, whose steps take two forwards.

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
from torch import Tensor

from ddim_lab.diffusion import x0_from_eps
from ddim_lab.sampler import Draw, Formula, Predict, State
from ddim_lab.schedule import half_log_snr
from ddim_lab.singlestep import Quiet, linear, moving
from ddim_lab.transitions import Transition, check_choice, sigma

__all__ = [
    "Bh",
    "Correction",
    "Deis",
    "DpmSolverPP",
    "DpmSolverPPSde",
    "Multistep",
    "UniPC",
]

Correction = Literal["published", "full"]
"""Of DPM-Solver++(3M)'s second difference; see `DpmSolverPP`."""

Bh = Literal["bh1", "bh2"]
"""UniPC's B(h): h (bh1) or 1 - exp(-h) (bh2); see `UniPC`."""


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
        left = moving(transitions)
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
        return linear(x, math.sqrt(now.alpha_bar_prev / now.alpha_bar), outputs, [scale * weight for weight in weights])


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
        return linear(x, _noise_ratio(now), outputs, [signal * weight for weight in weights])

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
        return linear(x, _noise_ratio(now) * math.exp(-h), outputs, weights)


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
        return linear(x, _noise_ratio(now), [outputs[0], *values], [signal * phi - math.fsum(slopes), *slopes])

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "corrector": self.corrector, "bh": self.bh}


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


def _noise_ratio(transition: Transition) -> float:
    """sigma_t / sigma_s."""
    return math.sqrt((1.0 - transition.alpha_bar_prev) / (1.0 - transition.alpha_bar))
