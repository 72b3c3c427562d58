"""What is known of a checkpoint that was made elsewhere, whatever its format, and whether it fits.

Each format has a reader of its own; `ddim_lab.models.inspection` chooses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from ddim_lab.config.model import CheckpointOptions, Weights
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.diffusion import Prediction
from ddim_lab.errors import ConfigError
from ddim_lab.models.scheduler import read_process

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Pretrained", "check_halved", "check_schedule", "check_shape", "null_class", "said_weights", "times"]


@final
@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that fits the data and the schedule.

    Attributes:
        load: gives the network, on the CPU, in evaluation mode: (x_t, t) -> output or an object with it as `.sample`.
        digest: `weights_digest` of it.
        parameters: number of them.
        channels: of its first layer.
        prediction: what it predicts.
        whole: whether it knows whole timesteps alone: a learned embedding is a table of them.
        note: what was assumed of it, for the user; None if the checkpoint is self-describing.
        weights: whether they are averaged, if that is known.
        weights_by: who says so: the user, the card of its publisher, or the file, which holds both or has a known
            digest; None where nobody does.
        classes: of a class-conditional one, the labels that it takes, from 0 up, the null class among them; what is
            loaded is (x_t, t, labels) -> output then.
        null_class: the label by which that one is told no class; None where it has none.
        learned_variance: whether it gives twice the channels, of which the second half says the variance.
        source: the code base that it is of, and its name among the published files; None for diffusers' format.
    """

    load: Callable[[], nn.Module]
    digest: str
    parameters: int
    channels: int
    prediction: Prediction
    whole: bool
    note: str | None
    weights: Weights
    weights_by: Literal["user", "card", "file"] | None
    classes: int | None = None
    null_class: int | None = None
    learned_variance: bool = False
    source: str | None = None


def said_weights(
    options: CheckpointOptions, by_file: Weights | None
) -> tuple[Weights, Literal["user", "card", "file"] | None]:
    """Whether the weights are averaged, and who says so: the user before the file, the file before the card.

    Args:
        options: of the checkpoint.
        by_file: what the file itself shows; None where it shows nothing.
    """
    if options.weights is not None:
        return options.weights, "user"
    if by_file is not None:
        return by_file, "file"
    return ("unknown", None) if options.card is None else (options.card, "card")


def null_class(options: CheckpointOptions, entries: int | None) -> int | None:
    """The label by which a network of so many is told no class; ConfigError if it has no such label."""
    null = options.null_class
    if entries == 1 and null is not None:
        raise ConfigError(f"model.null_class={null}: model.path={options.path} has that label alone, and so no classes")
    if entries is not None and null is not None and null >= entries:
        raise ConfigError(
            f"model.null_class={null}: model.path={options.path} has {entries} labels, 0 to {entries - 1}"
        )
    return null


def check_shape(path: str, network: dict[str, Any], data: str, shape: tuple[int, int, int]) -> None:
    """Raise ConfigError unless a `UNet2DModel` of this config.json is for images of `shape` (C, H, W)."""
    kind = network.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ConfigError(f"model.path={path} is a {kind}; a UNet2DModel is needed")
    if (told := network.get("class_embed_type")) is not None:
        raise ConfigError(
            f"model.path={path} is told more than a class (class_embed_type={told}): that is not supported"
        )
    if (entries := network.get("num_class_embeds")) is not None and (type(entries) is not int or entries < 1):
        raise ConfigError(f"model.path={path}, config.json: num_class_embeds={entries!r} is no number of classes")
    size = network.get("sample_size")
    sides = list(size) if isinstance(size, list) else [size, size]
    if len(sides) != 2 or any(side is not None and type(side) is not int for side in sides):
        raise ConfigError(f"model.path={path}, config.json: sample_size={size!r} is neither a size nor [height, width]")
    height, width = sides
    takes = (network.get("in_channels"), height or shape[1], width or shape[2])
    if takes != shape:
        raise ConfigError(f"model.path={path} is for images of {times(takes)}, data={data} has {times(shape)}")
    if network.get("out_channels") not in (shape[0], 2 * shape[0]):
        raise ConfigError(
            f"model.path={path} gives {network.get('out_channels')} channels for {shape[0]}: as many are needed, or"
            " twice as many, of which the second half is a learned variance"
        )
    levels = network.get("block_out_channels")
    if isinstance(levels, list):
        check_halved(path, len(levels), data, shape)


def check_halved(path: str, levels: int, data: str, shape: tuple[int, int, int]) -> None:
    """Raise ConfigError where images of `shape` can't be halved between so many levels."""
    if any(side % 2 ** (levels - 1) for side in shape[1:]):
        raise ConfigError(
            f"model.path={path} halves images {levels - 1} times, which {shape[1]}x{shape[2]} of data={data} can't"
            " be: give images of another size"
        )


def times(shape: tuple[Any, ...]) -> str:
    """A shape as "3x32x32"."""
    return "x".join(map(str, shape))


def check_schedule(path: str, scheduler: dict[str, Any], schedule: ScheduleConfig) -> Prediction:
    """What a checkpoint predicts; its process must be ours, with the betas of `schedule`, or ConfigError has both."""
    try:
        process = read_process(scheduler)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.path={path}, scheduler_config.json: {error}") from None
    given, betas = process.schedule.betas, schedule.build().betas
    if len(given) == len(betas) and np.allclose(given, betas, rtol=1e-5, atol=0.0):
        return process.prediction
    ours = {"schedule": schedule.name} | {
        f"schedule.{name}": value for name, value in schedule.model_dump().items() if name != "name"
    }
    different = {name: value for name, value in process.described.items() if ours.get(name) != value}
    if different and not process.listed:
        said = ", ".join(f"{name}={value} ({ours.get(name, 'none')} is set)" for name, value in different.items())
        options = " ".join(f"{name}={value}" for name, value in different.items())
        raise ConfigError(f"model.path={path} was trained with {said}: give {options}")
    if len(given) != len(betas):
        beside = f"{len(given)}, and {len(betas)} in schedule={schedule.name}"
    else:
        at = int(np.argmax(~np.isclose(given, betas, rtol=1e-5, atol=0.0)))
        beside = f"beta[{at}] is {given[at]:g} there and {betas[at]:g} in schedule={schedule.name}"
    raise ConfigError(
        f"model.path={path} was trained with its own list of betas: {beside}; write trained_betas of its"
        " scheduler_config.json to a file, one a line, and give schedule=file schedule.path=FILE"
    )
