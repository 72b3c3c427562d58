"""conf/schedule: the betas of the forward process. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ddim_lab.config.options import (
    NonNegative,
    Number,
    Options,
    PathOption,
    PositiveInt,
)
from ddim_lab.schedule import NoiseSchedule

__all__ = ["ScheduleConfig"]


class _BetaRange(Options):
    num_timesteps: PositiveInt
    beta_start: Number
    beta_end: Number


class LinearConfig(_BetaRange):
    """conf/schedule/linear."""

    name: Literal["linear"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.linear(self.num_timesteps, self.beta_start, self.beta_end)


class ScaledLinearConfig(_BetaRange):
    """conf/schedule/scaled_linear."""

    name: Literal["scaled_linear"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.scaled_linear(self.num_timesteps, self.beta_start, self.beta_end)


class SigmoidConfig(_BetaRange):
    """conf/schedule/sigmoid."""

    name: Literal["sigmoid"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.sigmoid(self.num_timesteps, self.beta_start, self.beta_end)


class ConstantConfig(Options):
    """conf/schedule/constant."""

    name: Literal["constant"]
    num_timesteps: PositiveInt
    beta_end: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.constant(self.num_timesteps, self.beta_end)


class CosineConfig(Options):
    """conf/schedule/cosine."""

    name: Literal["cosine"]
    num_timesteps: PositiveInt
    offset: NonNegative
    max_beta: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.cosine(self.num_timesteps, self.offset, self.max_beta)


class BetasFileConfig(Options):
    """conf/schedule/file: betas from a text file or .npy array."""

    name: Literal["file"]
    path: PathOption

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.from_file(self.path)


ScheduleConfig = Annotated[
    LinearConfig | ScaledLinearConfig | SigmoidConfig | ConstantConfig | CosineConfig | BetasFileConfig,
    Field(discriminator="name"),
]
