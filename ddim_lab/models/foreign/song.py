"""Checkpoints of Song et al.'s U-Net, of NVlabs/edm or score_sde_pytorch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from ddim_lab.config.model import EdmConfig, ScoreSdeConfig, Weights
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.errors import ConfigError
from ddim_lab.models.foreign.edm import read_edm
from ddim_lab.models.foreign.score_sde import read_score_sde
from ddim_lab.models.foreign.song_checkpoint import SongCheckpoint
from ddim_lab.models.pretrained import Pretrained, check_halved, said_weights, times
from ddim_lab.models.unet import weights_digest
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.store import content_key

__all__ = ["read_song"]


def read_song(
    options: EdmConfig | ScoreSdeConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    """As `ddim_lab.models.inspection.inspect_pretrained`."""
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
        raise ConfigError(f"model.path={path} is for images of {times(takes)}, data={data} has {times(shape)}")
    check_halved(path, known.levels, data, shape)
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
    """Read once, as long as size and time (`state`) stay; the digest holds how the network is told the noise, too."""
    read = _read_song(path, process, weights)
    network = read.build(NoiseSchedule.linear())
    return _Song(
        digest=content_key(
            {
                "weights": weights_digest(network),
                "resampling": read.shape.resampling,  # its filters are no weights
                **read.preconditioning.recipe(),
            }
        ),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        channels=read.shape.channels,
        stem=read.shape.stem,
        levels=len(read.shape.widths),
        classes=read.shape.classes,
        size=read.size,
        largest_sigma=read.preconditioning.largest_sigma,
        weights=read.weights,
    )
