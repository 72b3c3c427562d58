"""Checkpoints made elsewhere, of any format: found, read, and checked against the data and the schedule.

Each format has its reader; what follows of a `Pretrained` does not depend on which it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

import numpy as np

from ddim_lab.config.model import (
    AdmConfig,
    CheckpointOptions,
    EdmConfig,
    OfficialConfig,
    PretrainedConfig,
    ScoreSdeConfig,
    Weights,
)
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.diffusion import Prediction
from ddim_lab.errors import ConfigError
from ddim_lab.models.scheduler import read_process
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.schedulers.classes import NEEDED
from ddim_lab.schedulers.folder import locate, read_object, scheduler_file
from ddim_lab.store import content_key

if TYPE_CHECKING:
    from torch import nn

    from ddim_lab.models.foreign.song_checkpoint import SongCheckpoint

__all__ = ["Pretrained", "check_schedule", "inspect_pretrained"]

UNET_CHANNELS: Final = (224,)
"""Of the first level, where a config.json leaves them out: diffusers' default for `UNet2DModel`."""


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


def inspect_pretrained(
    options: CheckpointOptions, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    """Find a checkpoint, read it whole once, and check that it is for these images and this schedule.

    Args:
        options: which, and of what format.
        schedule: the configured schedule, which must be the checkpoint's; taken where the checkpoint names none.
        data: name of the data set, for messages.
        shape: (C, H, W) of its images.

    Raises:
        ConfigError: it is not there, is damaged or does not fit; one line with both values.
    """
    if isinstance(options, PretrainedConfig):
        return _of_diffusers(options, schedule, data, shape)
    if isinstance(options, EdmConfig | ScoreSdeConfig):
        return _of_song(options, schedule, data, shape)
    assert isinstance(options, OfficialConfig | AdmConfig)
    return _of_file(options, schedule, data, shape)


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


def _null_class(options: CheckpointOptions, entries: int | None) -> int | None:
    """The label by which a network of so many is told no class; ConfigError if it has no such label."""
    null = options.null_class
    if entries is not None and null is not None and null >= entries:
        raise ConfigError(
            f"model.null_class={null}: model.path={options.path} has {entries} labels, 0 to {entries - 1}"
        )
    return null


# -- diffusers' format: a folder (a U-Net, or a pipeline with one), or a hub id like google/ddpm-cifar10-32 -----


def _of_diffusers(
    options: PretrainedConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    path = options.path
    root = locate(path)
    network = root / "unet" if (root / "unet" / "config.json").is_file() else root
    config = read_object(network / "config.json")
    _check_shape(path, config, data, shape)
    file = scheduler_file(path, root, network)
    if file is None:
        prediction: Prediction = "eps"
        taken = f"schedule={schedule.name} with T = {schedule.build().num_timesteps}, eps-prediction, are taken"
        note = f"model.path={path} has no scheduler_config.json: {taken}"
    else:
        prediction = check_schedule(path, read_object(file), schedule)
        note = None
    _check_time(path, config, schedule.build().num_timesteps)
    states = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(network.iterdir()) if f.is_file())
    digest, parameters = _read_weights(network, states)
    channels = int(config.get("block_out_channels", UNET_CHANNELS)[0])
    whole = config.get("time_embedding_type") == "learned"
    weights, weights_by = said_weights(options, _trained_here(network, digest))
    load = functools.partial(_load_unet, network)
    entries = config.get("num_class_embeds")
    return Pretrained(
        load=load,
        digest=digest,
        parameters=parameters,
        channels=channels,
        prediction=prediction,
        whole=whole,
        note=note,
        weights=weights,
        weights_by=weights_by,
        classes=entries,
        null_class=_null_class(options, entries),
        learned_variance=config.get("out_channels") == 2 * shape[0],
    )


def _load_unet(folder: Path) -> nn.Module:
    from ddim_lab.models.unet import load_unet

    return load_unet(folder)


def _trained_here(folder: Path, digest: str) -> Weights | None:
    """Which weights a folder holds that a training of this package wrote; None for another's."""
    for record in (folder / "model.json", folder.parent / "model.json"):  # the raw ones lie in a folder of theirs
        if record.is_file():
            digests = read_object(record).get("digests")
            names = [name for name, each in digests.items() if each == digest] if isinstance(digests, dict) else []
            if names in (["ema"], ["raw"]):
                return "ema" if names == ["ema"] else "raw"
    return None


@functools.lru_cache(maxsize=8)
def _read_weights(folder: Path, states: tuple[tuple[str, int, int], ...]) -> tuple[str, int]:
    """Digest and number of the weights; read once as long as the files' sizes and times are the same."""
    from ddim_lab.models.unet import load_unet, weights_digest

    try:
        network = load_unet(folder)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None
    return weights_digest(network), sum(parameter.numel() for parameter in network.parameters())


# -- a file of another code base ------------------------------------------------------------------------


def _of_file(
    options: OfficialConfig | AdmConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    path, file, steps = options.path, Path(options.path), schedule.build().num_timesteps
    state = (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (0, 0)
    found = _read_file(options, shape[1:], steps, state)
    _check_shape(path, found.config, data, shape)
    if found.process is not None:
        check_schedule(path, found.process, schedule)
        note = None
    else:
        taken = f"schedule={schedule.name} with T = {steps}, eps-prediction, are taken"
        note = f"model.path={path} is of {found.source}; no such file says its schedule: {taken}"
        note += "" if found.note is None else f"; {found.note}"
    weights, weights_by = said_weights(options, found.weights)
    return Pretrained(
        load=functools.partial(_load_file, options, shape[1:], steps),
        digest=found.digest,
        parameters=found.parameters,
        channels=found.config["block_out_channels"][0],
        prediction="eps",
        whole=found.config.get("time_embedding_type") == "learned",
        note=note,
        weights=weights,
        weights_by=weights_by,
        classes=(entries := found.config.get("num_class_embeds")),
        null_class=_null_class(options, entries),
        learned_variance=found.config["out_channels"] == 2 * shape[0],
        source=found.source,
    )


@final
@dataclass(frozen=True)
class _File:
    """A converted file without its tensors."""

    config: dict[str, Any]
    source: str
    weights: Weights | None
    note: str | None
    process: dict[str, Any] | None
    digest: str
    parameters: int


@functools.lru_cache(maxsize=8)
def _read_file(options: OfficialConfig | AdmConfig, size: tuple[int, int], steps: int, state: tuple[int, int]) -> _File:
    """Read whole once, as long as the file's size and time (`state`) are the same."""
    from ddim_lab.models.foreign.checkpoints import convert_file, network_digest
    from ddim_lab.models.foreign.converted import build

    try:
        found = convert_file(options, size, steps)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None
    try:
        network = build(found)
    except ValueError as error:
        raise ConfigError(f"model.path: {options.path}: {error}") from None
    parameters = sum(parameter.numel() for parameter in network.parameters())
    digest = network_digest(found, network)
    return _File(found.config, found.source, found.weights, found.note, found.process, digest, parameters)


def _load_file(options: OfficialConfig | AdmConfig, size: tuple[int, int], steps: int) -> nn.Module:
    from ddim_lab.models.foreign.checkpoints import convert_file
    from ddim_lab.models.foreign.converted import build

    network: nn.Module = build(convert_file(options, size, steps))
    return network


# -- Song et al.'s U-Net, of NVlabs/edm or score_sde_pytorch ------------------------------------------------


def _of_song(
    options: EdmConfig | ScoreSdeConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    path, process = options.path, options.process if isinstance(options, ScoreSdeConfig) else None
    if process == "vp_discrete" and schedule.build().digest != NoiseSchedule.linear().digest:
        raise ConfigError(
            "model.process=vp_discrete was trained at schedule=linear's own 1000 timesteps, and others are set"
            f" (schedule={schedule.name}): drop what changes them"
        )
    asked = options.weights if process is not None else None
    if asked == "unknown":
        raise ConfigError(f"model.path={path} holds both weights, by name: give model.weights=ema or raw")
    state = Path(path).stat() if Path(path).is_file() else None
    known = _described_song(path, process, asked, None if state is None else (state.st_size, state.st_mtime_ns))
    takes = (known.channels, *(known.size or shape[1:]))
    if takes != shape:
        raise ConfigError(f"model.path={path} is for images of {_times(takes)}, data={data} has {_times(shape)}")
    _check_halved(path, known.levels, data, shape)
    built = schedule.build()
    ab = built.alpha_bar(built.num_timesteps - 1)
    sigma = math.sqrt((1.0 - ab) / ab)
    note = None
    if sigma > 1.05 * known.largest_sigma:
        note = (
            f"model.path={path} is made for sigma up to {known.largest_sigma:.3g}, and schedule={schedule.name} reaches"
            f" {sigma:.3g} at its last timestep"
        )
    classes, null = known.classes or None, options.null_class
    if classes is not None and null is not None:
        if null != classes:
            raise ConfigError(
                f"model.null_class={null}: model.path={path} has {classes} classes, and is told none by {classes}"
            )
        classes += 1
    weights, weights_by = (known.weights, "file") if process is not None else said_weights(options, known.weights)
    return Pretrained(
        load=lambda: _read_song(path, process, asked).build(built),
        digest=known.digest,
        parameters=known.parameters,
        channels=known.stem,
        prediction="eps",
        whole=False,
        note=note,
        weights=weights,
        weights_by=weights_by,
        classes=classes,
        null_class=null,
    )


def _read_song(path: str, process: str | None, weights: Weights | None) -> SongCheckpoint:
    """A file of score_sde_pytorch, whose process is named, or else one converted from NVlabs/edm's."""
    from ddim_lab.models.foreign.edm import read_edm
    from ddim_lab.models.foreign.score_sde import read_score_sde

    try:
        if process is None:
            return read_edm(path)
        return read_score_sde(path, process, "raw" if weights == "raw" else "ema")
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None


@final
@dataclass(frozen=True)
class _Song:
    """What is kept of a `SongCheckpoint`, without its weights."""

    digest: str
    parameters: int
    channels: int
    stem: int
    levels: int
    classes: int
    size: tuple[int, int] | None
    largest_sigma: float
    weights: Literal["ema", "raw"]


@functools.lru_cache(maxsize=8)
def _described_song(path: str, process: str | None, weights: Weights | None, state: tuple[int, int] | None) -> _Song:
    """As `_read_weights`. The digest is of the weights and of how the network is told the noise."""
    from ddim_lab.models.unet import weights_digest

    read = _read_song(path, process, weights)
    network = read.build(NoiseSchedule.linear())
    return _Song(
        digest=content_key({"weights": weights_digest(network), **read.preconditioning.recipe()}),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        channels=read.shape.channels,
        stem=read.shape.stem,
        levels=len(read.shape.widths),
        classes=read.shape.classes,
        size=read.size,
        largest_sigma=read.preconditioning.largest_sigma,
        weights=read.weights,
    )


# -- whether it fits ------------------------------------------------------------------------------------


def _check_shape(path: str, network: dict[str, Any], data: str, shape: tuple[int, int, int]) -> None:
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
        raise ConfigError(f"model.path={path} is for images of {_times(takes)}, data={data} has {_times(shape)}")
    if network.get("out_channels") not in (shape[0], 2 * shape[0]):
        raise ConfigError(
            f"model.path={path} gives {network.get('out_channels')} channels for {shape[0]}: as many are needed, or"
            " twice as many, of which the second half is a learned variance"
        )
    levels = network.get("block_out_channels")
    if isinstance(levels, list):
        _check_halved(path, len(levels), data, shape)


def _check_halved(path: str, levels: int, data: str, shape: tuple[int, int, int]) -> None:
    if any(side % 2 ** (levels - 1) for side in shape[1:]):
        raise ConfigError(
            f"model.path={path} halves images {levels - 1} times, which {shape[1]}x{shape[2]} of data={data} can't"
            " be: give images of another size"
        )


def _times(shape: tuple[Any, ...]) -> str:
    return "x".join(map(str, shape))


def _check_time(path: str, network: dict[str, Any], steps: int) -> None:
    """The network must take every timestep of the schedule."""
    kind = network.get("time_embedding_type", "positional")
    if kind == "fourier":
        raise ConfigError(
            f"model.path={path}, config.json: time_embedding_type=fourier is of a variance-exploding process, whose"
            f" network is told a sigma; {NEEDED}"
        )
    if kind == "learned":
        taken = network.get("num_train_timesteps")
        if type(taken) is not int or taken < 1:
            raise ConfigError(
                f"model.path={path}, config.json: num_train_timesteps={taken}: a learned time embedding needs the"
                " number of its timesteps"
            )
        if taken < steps:
            raise ConfigError(
                f"model.path={path} has a learned time embedding of {taken} timesteps, and"
                f" schedule.num_timesteps={steps}: give the schedule that it was trained with, of {taken} timesteps"
            )
    elif kind != "positional":
        raise ConfigError(
            f"model.path={path}, config.json: time_embedding_type={kind} is not known; positional and learned are"
        )


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
