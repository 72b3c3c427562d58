"""The forward process on tensors, the three ways to predict, and the training loss.

    x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps              (Ho et al. 2020, Eq. 4)
    v   = sqrt(ab) eps - sqrt(1 - ab) x_0              (Salimans & Ho 2022)

`ab` is alpha_bar(t), a float or a tensor that broadcasts against x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddim_lab.transitions import PREDICTIONS, Prediction

__all__ = [
    "PREDICTIONS",
    "Prediction",
    "alpha_bars_at",
    "eps_from",
    "eps_loss",
    "per_sample",
    "q_sample",
    "timestep_shares",
    "timesteps_by_share",
    "x0_from_eps",
]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], in the dtype of `like` [B, ...]."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def alpha_bars_at(table: Tensor, t: Tensor) -> Tensor:
    """alpha_bar(t) of a batch of timesteps: as `NoiseSchedule.alpha_bar`, bitwise the table's value at a whole one.

    Args:
        table: alpha_bar(0), ..., alpha_bar(T-1), float64 [T].
        t: whole numbers, or any in [0, T-1], [B].

    Returns:
        float64 [B].
    """
    if not t.is_floating_point():
        return table[t]
    t = t.double()
    below = t.floor().long()
    weight, above = t - below, (below + 1).clamp(max=len(table) - 1)
    low, high = table[below], table[above]
    return torch.where(weight == 0.0, low, torch.exp((1.0 - weight) * low.log() + weight * high.log()))


def q_sample(x_0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps: a draw of q(x_t | x_0) for standard normal eps."""
    ab = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x_0.device)
    return ab.sqrt().to(x_0.dtype) * x_0 + (1.0 - ab).sqrt().to(x_0.dtype) * eps


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """The image that (x_t, eps) stands for: (x_t - sqrt(1 - ab) eps) / sqrt(ab) (DDIM, Eq. 9)."""
    return (x_t - math.sqrt(1.0 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def eps_from(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: float) -> Tensor:
    """The eps that a network's output stands for.

    eps: itself; x0: (x_t - sqrt(ab) x_0) / sqrt(1 - ab); v: sqrt(ab) v + sqrt(1 - ab) x_t.
    """
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    if prediction == "eps":
        return output
    if prediction == "x0":
        return (x_t - signal * output) / noise
    return signal * output + noise * x_t


def eps_loss(predicted: Tensor, eps: Tensor, weights: Tensor | None = None) -> Tensor:
    """L_simple = E |eps - eps_theta|^2, averaged over elements and batch (Ho et al. 2020, Eq. 14).

    The mean over elements, not their sum, is what the gradient clipping of the recipes refers to.

    Args:
        predicted, eps: [B, ...].
        weights: of each sample's loss [B], where its t was not drawn uniformly; None for 1.
    """
    predicted = predicted.to(eps.dtype)
    if weights is None:
        return torch.nn.functional.mse_loss(predicted, eps)
    return (per_sample(weights, eps) * (predicted - eps).square()).mean()


def timestep_shares(alpha_bars: Tensor) -> Tensor:
    """p(t) = (ab(t) / sum_s ab(s) + 1 / T) / 2: timesteps to train at, those with little noise more often.

    The gradient's variance is least where p(t) is proportional to the size of the gradient at t (importance sampling;
    for diffusion models Nichol & Dhariwal 2021, section 3.3, who estimate it as training goes). eps is harder to tell
    the less there is of it: on standard normal images the least loss at t is ab(t). The other half is uniform, so that
    no weight 1 / (T p) is above 2.

    Args:
        alpha_bars: ab(t) for t = 0 ... T - 1, float64 [T].

    Returns:
        float64 [T], which adds up to 1.
    """
    return (alpha_bars / alpha_bars.sum() + 1.0 / len(alpha_bars)) / 2.0


def timesteps_by_share(shares: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps drawn from p, and the weights 1 / (T p(t)) with which the expected loss is that of uniform ones.

    Args:
        shares: p(t), float64 [T].
        u: uniform in [0, 1), [B].

    Returns:
        t, int64 [B], the inverse of p's distribution function at u; and the weights, float64 [B].
    """
    t = torch.searchsorted(shares.cumsum(0), u.to(shares.dtype), right=True).clamp(max=len(shares) - 1)
    return t, 1.0 / (len(shares) * shares[t])
