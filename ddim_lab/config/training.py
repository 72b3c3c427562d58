"""conf/training: how the eps-model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import StrictBool

from ddim_lab.config.options import (
    Fraction,
    NonNegativeInt,
    Options,
    Positive,
    PositiveInt,
    Seed,
    Switch,
)

__all__ = ["TrainingConfig"]


class TrainingConfig(Options):
    """conf/training: how the eps-model is trained (Ho et al. 2020, Algorithm 1).

    Attributes:
        timesteps: how a batch's t are drawn: each uniformly, or by `ddim_lab.diffusion.timestep_shares`, with weights
            that keep the expected loss what it is.
        label_dropout: share of the images of a class-conditional network whose class it is not told.
    """

    seed: Seed
    max_steps: PositiveInt
    batch_size: PositiveInt
    timesteps: Literal["uniform", "by_signal"]
    learning_rate: Positive
    learning_rate_decay: Literal["constant", "cosine"]
    warmup_steps: NonNegativeInt
    ema_decay: Fraction
    gradient_clip: Positive
    random_flip: StrictBool
    label_dropout: Fraction
    precision: Literal["auto", "fp32", "bf16"]
    compile: Switch
    devices: PositiveInt
    checkpoint_every: PositiveInt
