"""conf/model: where the eps-model comes from. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from ddim_lab.config.options import (
    Fraction,
    NonNegativeInt,
    Options,
    PathOption,
    PositiveInt,
)

__all__ = [
    "AdmConfig",
    "CheckpointOptions",
    "EdmConfig",
    "EmpiricalConfig",
    "GaussianConfig",
    "Labels",
    "ModelConfig",
    "ModelOptions",
    "OfficialConfig",
    "PretrainedConfig",
    "ScoreSdeConfig",
    "UNetConfig",
    "Weights",
]

Weights = Literal["ema", "raw", "unknown"]
"""Of a checkpoint: averaged over the training, those of its last step, or not known which."""


Labels = Literal["uniform", "data"] | NonNegativeInt
"""Of samples of a class-conditional network: drawn uniformly, or as often as in the training images; or one class."""


class ModelOptions(Options):
    """conf/model: where the eps-model comes from.

    Attributes:
        is_unet: whether it is a U-Net, which other people's code can run, too.
    """

    is_unet: ClassVar[bool] = False


class UNetConfig(ModelOptions):
    """conf/model: a diffusers `UNet2DModel`, sized by the data.

    Attributes:
        conditional: whether it is told the class, or in `training.label_dropout` of the cases a null class.
        labels: of its samples, if it is.
    """

    is_unet: ClassVar[bool] = True

    kind: Literal["unet"]
    weights: Literal["ema", "raw", "random"]
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    attention: tuple[StrictBool, ...]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    dropout: Fraction
    conditional: StrictBool = False
    labels: Labels = "uniform"

    def architecture(self) -> dict[str, Any]:
        """What the network is before its training; for keys. Of one without classes as before there were any."""
        without = {"weights", "labels"} if self.conditional else {"weights", "labels", "conditional"}
        return self.model_dump(exclude=without)


class CheckpointOptions(ModelOptions):
    """A network that was trained elsewhere; abstract, a class for each format.

    Attributes:
        path: where it is.
        weights: what the user says that they are; None where the file or its card is to say.
        card: what its publisher says, for presets that name one checkpoint; None where nobody does.
        labels: of the samples, where it is class-conditional.
        null_class: the label by which a class-conditional one is told no class; None where it has none that is known.
    """

    path: PathOption
    weights: Weights | None
    card: Weights | None
    labels: Labels = "uniform"
    null_class: NonNegativeInt | None = None


class PretrainedConfig(CheckpointOptions):
    """conf/model/pretrained: a checkpoint in diffusers' format, a folder or a hub id."""

    is_unet: ClassVar[bool] = True

    kind: Literal["pretrained"]


class OfficialConfig(CheckpointOptions):
    """conf/model/official: a file of the DDIM authors' code, ermongroup/ddim."""

    is_unet: ClassVar[bool] = True

    kind: Literal["official"]


class AdmConfig(CheckpointOptions):
    """conf/model/adm: a file of OpenAI's improved-diffusion or guided-diffusion.

    Attributes:
        num_heads, num_head_channels, use_new_attention_order, rescale_timesteps: as the flags of these names when it
            was trained; all None where it is a published one.
    """

    is_unet: ClassVar[bool] = True

    kind: Literal["adm"]
    num_heads: PositiveInt | None
    num_head_channels: PositiveInt | None
    use_new_attention_order: StrictBool | None
    rescale_timesteps: StrictBool | None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.num_heads is not None and self.num_head_channels is not None:
            raise PydanticCustomError("heads", "give num_heads or num_head_channels, not both")
        return self


class EdmConfig(CheckpointOptions):
    """conf/model/edm: a network of NVlabs/edm, in a file that its recipe converted it to."""

    kind: Literal["edm"]


class ScoreSdeConfig(CheckpointOptions):
    """conf/model/score_sde: a training's checkpoint of score_sde_pytorch, which holds raw weights and their average.

    Attributes:
        process: that it was trained with; the file does not say it. vp: in continuous time; vp_discrete: at Ho et al.'s
            1000 timesteps; subvp: in continuous time.
    """

    kind: Literal["score_sde"]
    process: Literal["vp", "vp_discrete", "subvp"]


class GaussianConfig(ModelOptions):
    """conf/model/gaussian: exact eps of one Gaussian with the training images' mean and variance; no training."""

    kind: Literal["gaussian"]


class EmpiricalConfig(ModelOptions):
    """conf/model/empirical: exact eps of the training images as point masses; no training."""

    kind: Literal["empirical"]


ModelConfig = Annotated[
    UNetConfig
    | PretrainedConfig
    | OfficialConfig
    | AdmConfig
    | EdmConfig
    | ScoreSdeConfig
    | GaussianConfig
    | EmpiricalConfig,
    Field(discriminator="kind"),
]
