"""Networks that are told the noise in other ways, as eps-models on our schedule.

Each of them was trained on images with noise, x = s (x_0 + sigma n), at a scale s of its own, and told sigma by a
number of its own, its label. What an eps-model is given is x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps: the same image with
the same noise at

    sigma = sqrt((1 - ab) / ab),      x_0 + sigma eps = x_t / sqrt(ab).

A network F is used as (Karras et al. 2022, 2206.00364, Eq. 7)

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise),      x = x_0 + sigma n,

where D is the denoised image, and so stands for the noise

    eps = (x - D) / sigma = (1 - c_skip) / sigma x - c_out / sigma F(c_in x, c_noise).

A `Preconditioning` says the four numbers that this comes to in terms of ab,

    eps = skip x_t + out F(into x_t, label),

with the divisions done on paper: nothing cancels where sigma is small. They are computed in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ddim_lab.diffusion import alpha_bars_at, per_sample
from ddim_lab.schedule import NoiseSchedule

__all__ = [
    "DiscreteVp",
    "Edm",
    "EpsOfNetwork",
    "Preconditioning",
    "Scales",
    "SubVp",
    "VarianceExploding",
    "VariancePreserving",
]


class Scales(NamedTuple):
    """eps = skip x_t + out F(into x_t, label): float64 [B] each."""

    into: Tensor
    label: Tensor
    skip: Tensor
    out: Tensor


class Preconditioning(ABC):
    """How a network is told the noise, and what it gives; abstract."""

    @abstractmethod
    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        """The numbers for each image.

        Args:
            alpha_bar: of our schedule, in (0, 1), float64 [B].
            t: our timestep, [B].
        """

    @property
    @abstractmethod
    def largest_sigma(self) -> float:
        """The most noise that networks of this kind are made for."""

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """What it is, as JSON: it enters the digest of a model, whose weights it gives a meaning."""


@final
@dataclass(frozen=True)
class Edm(Preconditioning):
    """Karras et al. 2022, Table 1, last column ("EDMPrecond").

        c_skip = sd^2 / (sigma^2 + sd^2),      c_out = sigma sd / sqrt(sigma^2 + sd^2),
        c_in = 1 / sqrt(sigma^2 + sd^2),       c_noise = ln(sigma) / 4

    Args:
        sigma_data: sd, the standard deviation of the images it was trained on, as was assumed.
    """

    sigma_data: float = 0.5

    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        variance = self.sigma_data**2 * alpha_bar + 1.0 - alpha_bar  # of x_t
        return Scales(
            into=variance.rsqrt(),
            label=((1.0 - alpha_bar).log() - alpha_bar.log()) / 8.0,
            skip=(1.0 - alpha_bar).sqrt() / variance,
            out=-self.sigma_data * (alpha_bar / variance).sqrt(),
        )

    @property
    def largest_sigma(self) -> float:
        return 80.0  # where its sampler begins

    def recipe(self) -> dict[str, Any]:
        return {"preconditioning": "edm", "sigma_data": self.sigma_data}


@final
@dataclass(frozen=True)
class VariancePreserving(Preconditioning):
    """Song et al. 2021's VP process in continuous time s in [0, 1], whose beta is linear ("VPPrecond").

        alpha_bar = exp(-(beta_max - beta_min) s^2 / 2 - beta_min s),      label = top s

    (their appendix C; the mean's factor is sqrt(alpha_bar)). The network predicts eps; at the s of ab it is given x_t
    itself:

        s = (sqrt(beta_min^2 - 2 (beta_max - beta_min) ln ab) - beta_min) / (beta_max - beta_min)

    Ho et al.'s 1000 timesteps are nearly this process at s = (t + 1) / 1000, where its sigma is 1.05 times theirs at
    t = 0 and 0.97 times at t = 999. So the label is between t + 0.5 and t + 3.4, and from t = 996 on above 999, the
    largest that the network was trained with.

    Args:
        beta_min, beta_max: beta at s = 0 and 1.
        top: the label at s = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    top: float = 999.0

    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        one = torch.ones_like(alpha_bar)
        return Scales(into=one, label=self.label(alpha_bar), skip=torch.zeros_like(one), out=one)

    def label(self, alpha_bar: Tensor) -> Tensor:
        """999 s at the s of alpha_bar."""
        slope = self.beta_max - self.beta_min
        return self.top * ((self.beta_min**2 - 2.0 * slope * alpha_bar.log()).sqrt() - self.beta_min) / slope

    @property
    def largest_sigma(self) -> float:
        return math.sqrt(math.expm1((self.beta_max + self.beta_min) / 2.0))  # at s = 1

    def recipe(self) -> dict[str, Any]:
        told = {"beta_min": self.beta_min, "beta_max": self.beta_max, "top": self.top}
        return {"preconditioning": "vp", **told}


@final
@dataclass(frozen=True)
class DiscreteVp(Preconditioning):
    """Ho et al. 2020's process, our schedule itself: the network is told t and predicts eps."""

    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        one = torch.ones_like(alpha_bar)
        return Scales(into=one, label=t.double(), skip=torch.zeros_like(one), out=one)

    @property
    def largest_sigma(self) -> float:
        return math.inf  # the schedule is its own

    def recipe(self) -> dict[str, Any]:
        return {"preconditioning": "none"}


@final
@dataclass(frozen=True)
class SubVp(Preconditioning):
    """Song et al. 2021's sub-VP process, whose noise is smaller than VP's at the same mean (their appendix B).

        x = sqrt(a) x_0 + (1 - a) eps,      label = 999 s(a), as `VariancePreserving` has it

    Its sigma, (1 - a) / sqrt(a), is ours at sqrt(a) = (sqrt(sigma^2 + 4) - sigma) / 2. There the network is given x_t
    at its own scale, sqrt(a / ab) x_t, and predicts eps.

    Args:
        vp: the VP process that it has the mean of.
    """

    vp: VariancePreserving = field(default_factory=VariancePreserving)

    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        into = 2.0 / ((1.0 + 3.0 * alpha_bar).sqrt() + (1.0 - alpha_bar).sqrt())  # sqrt(a / ab)
        label = self.vp.label(into.square() * alpha_bar)
        return Scales(into=into, label=label, skip=torch.zeros_like(into), out=torch.ones_like(into))

    @property
    def largest_sigma(self) -> float:
        variance = math.expm1((self.vp.beta_max + self.vp.beta_min) / 2.0)  # (1 - a) / a at s = 1
        return variance / math.sqrt(variance + 1.0)

    def recipe(self) -> dict[str, Any]:
        return {**self.vp.recipe(), "preconditioning": "subvp"}


@final
@dataclass(frozen=True)
class VarianceExploding(Preconditioning):
    """Karras et al. 2022, Table 1, the column of Song et al.'s VE process ("VEPrecond").

    c_skip = 1,      c_out = sigma,      c_in = 1,      c_noise = ln(sigma / 2)
    """

    def scales(self, alpha_bar: Tensor, t: Tensor) -> Scales:
        label = ((1.0 - alpha_bar).log() - alpha_bar.log()) / 2.0 - math.log(2.0)
        return Scales(into=alpha_bar.rsqrt(), label=label, skip=torch.zeros_like(label), out=-torch.ones_like(label))

    @property
    def largest_sigma(self) -> float:
        return 100.0  # as its authors chose for CIFAR-10, of images in [0, 1], where it is 50

    def recipe(self) -> dict[str, Any]:
        return {"preconditioning": "ve"}


@final
class EpsOfNetwork(nn.Module):
    """The eps-model that a network is on our schedule, by the equations above.

    Args:
        network: F(x, label, class_labels).
        schedule: ours.
        preconditioning: the network's.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.network = network
        self._preconditioning = preconditioning
        # Not of the state dict: it is the schedule's, whatever the weights are.
        self.register_buffer("alpha_bars", torch.tensor(schedule.alpha_bars), persistent=False)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """eps [B, C, H, W].

        Args:
            x: x_t [B, C, H, W].
            t: whole timesteps, or any in [0, T-1], [B].
            class_labels: int64 [B]; None for no class.
        """
        scales = self._preconditioning.scales(alpha_bars_at(self.get_buffer("alpha_bars"), t), t)
        output: Tensor = self.network(per_sample(scales.into, x) * x, scales.label, class_labels)
        return per_sample(scales.skip, x) * x + per_sample(scales.out, x) * output
