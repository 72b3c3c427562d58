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
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import torch
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.errors import ConfigError
from ddim_lab.sampler import Formula, Sampler, Transition
from ddim_lab.schedule import CLEAN, NoiseSchedule
from ddim_lab.store.records import Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.measuring import measure_samples
from ddim_lab.tasks.scored import compared_with, measuring_forwards
from ddim_lab.tasks.walks import mean_and_se, network_in_place, squared_error, start
from ddim_lab.transitions import are_whole

__all__ = ["CannotSkip", "DDPMFormula"]

COMPARED: Final = 64
"""Samples, at most, that are compared with the sampler's."""


@final
class DDPMFormula(Formula):
    """DDPM's update as textbooks write it, for the timesteps of a sampler at eta = 1.

    Args:
        schedule: gives beta(t).
        alphas: "cumulative" (right) or "per_step" (WRONG where timesteps are skipped).
    """

    def __init__(self, schedule: NoiseSchedule, alphas: Literal["per_step", "cumulative"]) -> None:
        self.schedule: Final = schedule
        self.alphas: Final = alphas

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        alpha = self._alpha(transition)
        mean = (x_t - (1.0 - alpha) / math.sqrt(1.0 - transition.alpha_bar) * eps) / math.sqrt(alpha)
        return mean if z is None else mean + self.noise_std(transition) * z

    def noise_std(self, transition: Transition) -> float:
        ab, alpha = transition.alpha_bar, self._alpha(transition)
        variance = (1.0 - ab / alpha) / (1.0 - ab) * (1.0 - alpha)
        # per_step knows no last step; and a variance of 0 may be rounded to below it
        return 0.0 if transition.t_prev == CLEAN else math.sqrt(max(variance, 0.0))

    def recipe(self) -> dict[str, Any]:
        return {"name": "ddpm_textbook", "alphas": self.alphas}

    def _alpha(self, transition: Transition) -> float:
        if self.alphas == "cumulative":
            return transition.alpha_bar / transition.alpha_bar_prev
        return 1.0 - float(self.schedule.betas[int(transition.t)])


@final
class CannotSkip(Task):
    """conf/task/cannot_skip: DDPM's formula on skipped timesteps, with per-step or cumulative alphas."""

    any_formula: ClassVar[bool] = False
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
        if not are_whole(config.build_transitions()):
            raise ConfigError(
                "task=cannot_skip needs beta(t), which whole timesteps alone have: set sampler.timesteps_as=integer, or"
                " another sampler.spacing"
            )

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.forwards

    def measuring_forwards(self, config: Config) -> int:
        return measuring_forwards(config)

    def identity(self, job: Job) -> dict[str, Any]:
        return compared_with(job)

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """All that task `generate` measures, by the formula, and its distance from the sampler on the same noise."""
        formula = DDPMFormula(job.sampler.schedule, self.alphas)
        sampler = job.config.build_sampler(job.model.prediction, formula=formula)
        measured = measure_samples(job, folder, work, sampler)
        with network_in_place(job) as network:
            mse, se = mean_and_se(_difference(job, sampler, network))
        value = Value(
            name="mse_to_sampler",
            value=mse,
            heading="MSE of DDPM's formula to the sampler",
            facts="from the same x_T and noise, a dimension, on the [0, 1] scale",
            se=se,
            error="over images",
            better="lower",
        )
        headline = f"{measured.headline}, {self.alphas} alphas: MSE {mse:.2g} to the sampler"
        return replace(measured, headline=headline, values=[*measured.values, value])


def _difference(job: Job, sampler: Sampler, network: nn.Module) -> Tensor:
    count = min(job.config.num_samples, job.config.batch_size, COMPARED)
    indices = torch.arange(count, device=job.runtime.torch_device)
    x_T, noise = start(job, indices), job.runtime.noise(job.config.seed)
    by_formula = sampler.sample(network, x_T, indices=indices, noise=noise)
    return squared_error(by_formula, job.sampler.sample(network, x_T, indices=indices, noise=noise))
