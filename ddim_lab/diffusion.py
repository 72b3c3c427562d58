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

__all__ = ["PREDICTIONS", "Prediction", "eps_from", "eps_loss", "per_sample", "q_sample", "x0_from_eps"]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], in the dtype of `like` [B, ...]."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


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


def eps_loss(predicted: Tensor, eps: Tensor) -> Tensor:
    """L_simple = E |eps - eps_theta|^2, averaged over elements and batch (Ho et al. 2020, Eq. 14).

    The mean over elements, not their sum, is what the gradient clipping of the recipes refers to.
    """
    return torch.nn.functional.mse_loss(predicted.to(eps.dtype), eps)
