"""Exact eps of known data distributions: the ground truth that samplers are checked against.

With x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps, the best prediction of eps is E[eps | x_t] = -sqrt(1 - ab) grad log p_t(x_t)
(Vincent 2011). For the distributions here p_t is known in closed form, so a sampler run on them has no model error.

Each class is an eps-model: call it with x_t [B, ...] and t [B], of whole numbers or of any in [0, T-1].
"""

from __future__ import annotations

import math
from typing import Final, final

import torch
from torch import Tensor

from ddim_lab.diffusion import alpha_bars_at
from ddim_lab.schedule import NoiseSchedule

__all__ = ["EmpiricalEps", "GaussianEps", "GaussianMixtureEps"]


class _AlphaBars:
    """alpha_bar(t) for a batch of timesteps, float64, on the batch's device: as `NoiseSchedule.alpha_bar`."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self._table = torch.tensor(schedule.alpha_bars)

    def __call__(self, t: Tensor, ndim: int) -> Tensor:
        if self._table.device != t.device:
            self._table = self._table.to(t.device)
        return alpha_bars_at(self._table, t).reshape(-1, *([1] * (ndim - 1)))


@final
class GaussianEps:
    """Exact eps of N(mean, diag(variance)).

        eps(x, t) = sqrt(1 - ab) (x - sqrt(ab) mean) / (ab variance + 1 - ab)

    Args:
        schedule: the noise schedule.
        mean: shape of one sample (or broadcastable to it).
        variance: per element, > 0, broadcastable likewise.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor | float = 0.0, variance: Tensor | float = 1.0) -> None:
        self.schedule: Final = schedule
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.variance = torch.as_tensor(variance, dtype=torch.float64)
        if not bool((self.variance > 0).all()):
            raise ValueError("variance must be positive")
        self._alpha_bars = _AlphaBars(schedule)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.mean.device != x_t.device:  # once: a copy in every step makes the host wait, and can't be recorded
            self.mean, self.variance = self.mean.to(x_t.device), self.variance.to(x_t.device)
        ab, mean, variance = self._alpha_bars(t, x_t.ndim), self.mean, self.variance
        eps = (1.0 - ab).sqrt() * (x_t.double() - ab.sqrt() * mean) / (ab * variance + 1.0 - ab)
        return eps.to(x_t.dtype)

    def ode_map(self, x_t: Tensor, t: float) -> Tensor:
        """Where the probability-flow ODE carries x_t to at alpha_bar = 1: DDIM's limit for S -> infinity.

        x_0 = mean + sqrt(variance / (ab variance + 1 - ab)) (x_t - sqrt(ab) mean)
        """
        ab = self.schedule.alpha_bar(t)
        mean, variance = self.mean.to(x_t.device), self.variance.to(x_t.device)
        scale = (variance / (ab * variance + 1.0 - ab)).sqrt()
        return (mean + scale * (x_t.double() - math.sqrt(ab) * mean)).to(x_t.dtype)


@final
class GaussianMixtureEps:
    """Exact eps of sum_k weights[k] N(means[k], variances[k] I).

    Args:
        schedule: the noise schedule.
        means: [K, ...], one mean a component, in the shape of a sample.
        variances: [K], > 0.
        weights: [K], positive, normalised here; default equal.
    """

    def __init__(
        self, schedule: NoiseSchedule, means: Tensor, variances: Tensor, weights: Tensor | None = None
    ) -> None:
        if not bool((variances > 0).all()):
            raise ValueError("variances must be positive")
        self._means = means.double()
        self._variances = variances.double()
        weights = torch.ones_like(self._variances) if weights is None else weights.double()
        self._log_weights = (weights / weights.sum()).log()
        self._alpha_bars = _AlphaBars(schedule)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.at_level(x_t, self._alpha_bars(t, 2))

    def at_level(self, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """The same at any level: alpha_bar in (0, 1], float64 [B, 1] or [1, 1]; 0 at alpha_bar = 1."""
        means = self._means.to(x_t.device).flatten(1)  # [K, D]
        x = x_t.double().flatten(1)  # [B, D]
        ab = alpha_bar
        spread = ab * self._variances.to(x.device) + 1.0 - ab  # [B, K], variance of component k at t
        offset = x[:, None, :] - ab.sqrt()[:, :, None] * means  # [B, K, D]
        log_density = -0.5 * offset.square().sum(-1) / spread - 0.5 * x.shape[1] * spread.log()
        posterior = torch.softmax(self._log_weights.to(x.device) + log_density, dim=1)
        eps = (1.0 - ab).sqrt() * ((posterior / spread)[:, :, None] * offset).sum(1)
        return eps.reshape(x_t.shape).to(x_t.dtype)


@final
class EmpiricalEps:
    """Exact eps of a finite data set (each image a point mass): the posterior mean over its images.

        E[x_0 | x_t] = sum_i softmax_i(-|x_t - sqrt(ab) x_i|^2 / (2 (1 - ab))) x_i
        eps = (x_t - sqrt(ab) E[x_0 | x_t]) / sqrt(1 - ab)

    A model trained without error on these images and nothing else would predict this; its samples at small noise
    are the training images.

    Args:
        schedule: the noise schedule.
        images: [M, ...] in [-1, 1].
    """

    def __init__(self, schedule: NoiseSchedule, images: Tensor) -> None:
        self._images = images.double()
        self._alpha_bars = _AlphaBars(schedule)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self._images.device != x_t.device:
            self._images = self._images.to(x_t.device)
        images = self._images.flatten(1)  # [M, D]
        x = x_t.double().flatten(1)  # [B, D]
        ab = self._alpha_bars(t, 2)
        # |x - s y|^2 = |x|^2 - 2 s x.y + s^2 |y|^2; |x|^2 is the same for all images and drops out of the softmax.
        energy = 2.0 * ab.sqrt() * (x @ images.T) - ab * images.square().sum(1)
        posterior = torch.softmax(energy / (2.0 * (1.0 - ab)), dim=1)
        eps = (x - ab.sqrt() * (posterior @ images)) / (1.0 - ab).sqrt()
        return eps.reshape(x_t.shape).to(x_t.dtype)
