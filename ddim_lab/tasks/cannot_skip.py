"""Task `cannot_skip`: THE WRONG WAY on purpose. What DDPM's formula does when timesteps are skipped.

DDPM's update (Ho et al. 2020, Eq. 11), from x_t to x_{t-1}:

    x_prev = (x_t - beta / sqrt(1 - ab_t) eps) / sqrt(alpha) + sqrt((1 - ab_t / alpha) / (1 - ab_t) beta) z

with alpha = 1 - beta. Its alpha belongs to the step that is taken:

    cumulative    alpha = ab_t / ab_prev, the product over all timesteps jumped over: right, the sampler at eta = 1
    per_step      alpha = 1 - beta(t), that of one timestep, while t jumps by many: WRONG; it removes one timestep's
                  noise and calls the result x_prev

They agree where no timestep is skipped (S = T). Nothing but this lesson uses the wrong one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.diffusion import eps_from
from ddim_lab.errors import ConfigError
from ddim_lab.noise import NamedNoise, NoiseSource
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.generate import compared_with, measuring_forwards
from ddim_lab.tasks.sampling import measure_samples
from ddim_lab.tasks.walks import mean_and_se, network_in_place, squared_error, start

__all__ = ["CannotSkip", "DDPMFormula"]

COMPARED: Final = 64
"""Samples, at most, that are compared with the sampler's."""


@final
class DDPMFormula:
    """DDPM's update as textbooks write it, on the timesteps of a sampler at eta = 1.

    Args:
        sampler: names the timesteps and the schedule.
        alphas: "cumulative" (right) or "per_step" (WRONG where timesteps are skipped).
    """

    def __init__(self, sampler: Sampler, alphas: Literal["per_step", "cumulative"]) -> None:
        self.sampler: Final = sampler
        self.alphas: Final = alphas
        self.transitions: Final = sampler.transitions
        self.nfe: Final = sampler.nfe

    @torch.no_grad()
    def sample(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        """As `Sampler.sample`, by this formula; the same noise at the same timesteps."""
        x = x_T.float()
        indices = torch.arange(len(x), device=x.device) if indices is None else indices
        noise = NamedNoise(seed) if noise is None else noise
        for walk in self.transitions:
            ab = walk.alpha_bar
            alpha = 1.0 - float(self.sampler.schedule.betas[walk.t])
            if self.alphas == "cumulative":
                alpha = ab / walk.alpha_bar_prev
            output = model(x, torch.full((len(x),), walk.t, dtype=torch.int64, device=x.device))
            output = output if isinstance(output, Tensor) else output.sample
            eps = eps_from(self.sampler.prediction, output.float(), x, ab)
            beta = 1.0 - alpha
            x = (x - beta / math.sqrt(1.0 - ab) * eps) / math.sqrt(alpha)
            variance = max((1.0 - ab / alpha) / (1.0 - ab) * beta, 0.0)  # 0 at the last step, up to rounding
            if variance > 0.0 and walk.t_prev >= 0:
                x = x + math.sqrt(variance) * noise(indices, walk.t, x)
        return x

    def __repr__(self) -> str:
        return f"DDPMFormula(alphas={self.alphas!r}, nfe={self.nfe})"


@final
class CannotSkip(Task):
    """conf/task/cannot_skip: DDPM's formula on skipped timesteps, with per-step or cumulative alphas."""

    scores_samples: ClassVar[bool] = True
    on_several_devices: ClassVar[bool] = True

    name: Literal["cannot_skip"]
    alphas: Literal["per_step", "cumulative"]

    def check(self, config: Config) -> None:
        sampler = config.sampler
        if (sampler.eta, sampler.variance, sampler.clip) != (1.0, "posterior", "none"):
            raise ConfigError(
                "task=cannot_skip writes DDPM's own formula: set sampler=ddpm (eta 1, posterior, no clip)"
            )

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.nfe

    def measuring_forwards(self, config: Config) -> int:
        return measuring_forwards(config)

    def identity(self, job: Job) -> dict[str, Any]:
        return compared_with(job)

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """All that task `generate` measures, by the formula, and its distance from the sampler on the same noise."""
        formula = DDPMFormula(job.sampler, self.alphas)
        measured = measure_samples(job, folder, work, formula)
        with network_in_place(job) as network:
            mse, se = mean_and_se(_difference(job, formula, network))
        measured.measurements.update(mse_to_sampler=mse, mse_to_sampler_se=se)
        measured.measurements["headline"] += f", {self.alphas} alphas: MSE {mse:.2g} to the sampler"
        return measured


def _difference(job: Job, formula: DDPMFormula, network: nn.Module) -> Tensor:
    count = min(job.config.num_samples, job.config.batch_size, COMPARED)
    indices = torch.arange(count, device=job.runtime.torch_device)
    x_T, noise = start(job, indices), job.runtime.noise(job.config.seed)
    by_formula = formula.sample(network, x_T, indices=indices, noise=noise)
    return squared_error(by_formula, job.sampler.sample(network, x_T, indices=indices, noise=noise))
