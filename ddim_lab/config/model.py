"""conf/model: where the eps-model comes from. Needs no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool

from ddim_lab.config.options import (
    Fraction,
    Options,
    PathOption,
    PositiveInt,
)

__all__ = ["EmpiricalConfig", "GaussianConfig", "ModelConfig", "ModelOptions", "PretrainedConfig", "UNetConfig"]


class ModelOptions(Options):
    """conf/model: where the eps-model comes from.

    Attributes:
        is_unet: whether it is a U-Net, which other people's code can run, too.
    """

    is_unet: ClassVar[bool] = False


class UNetConfig(ModelOptions):
    """conf/model: a diffusers `UNet2DModel`, sized by the data."""

    is_unet: ClassVar[bool] = True

    kind: Literal["unet"]
    weights: Literal["ema", "raw", "random"]
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    attention: tuple[StrictBool, ...]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    dropout: Fraction


class PretrainedConfig(ModelOptions):
    """conf/model/pretrained: a checkpoint made elsewhere, in diffusers' format; no training."""

    is_unet: ClassVar[bool] = True

    kind: Literal["pretrained"]
    path: PathOption


class GaussianConfig(ModelOptions):
    """conf/model/gaussian: exact eps of one Gaussian with the training images' mean and variance; no training."""

    kind: Literal["gaussian"]


class EmpiricalConfig(ModelOptions):
    """conf/model/empirical: exact eps of the training images as point masses; no training."""

    kind: Literal["empirical"]


ModelConfig = Annotated[UNetConfig | PretrainedConfig | GaussianConfig | EmpiricalConfig, Field(discriminator="kind")]
