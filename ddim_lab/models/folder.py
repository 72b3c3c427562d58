"""Checkpoints in diffusers' format: a folder (a U-Net, or a pipeline with one), or a hub id."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

from ddim_lab.config.model import PretrainedConfig, Weights
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.diffusion import Prediction
from ddim_lab.errors import ConfigError
from ddim_lab.models.pretrained import Pretrained, check_schedule, check_shape, null_class, said_weights
from ddim_lab.models.unet import load_unet, unet_digest, weights_digest
from ddim_lab.schedulers.classes import NEEDED
from ddim_lab.schedulers.folder import locate, read_object, scheduler_file

__all__ = ["read_folder"]

UNET_CHANNELS: Final = (224,)
"""Of the first level, where a config.json leaves them out: diffusers' default for `UNet2DModel`."""


def read_folder(
    options: PretrainedConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]
) -> Pretrained:
    """As `ddim_lab.models.inspection.inspect_pretrained`."""
    path = options.path
    root = locate(path)
    network = root / "unet" if (root / "unet" / "config.json").is_file() else root
    config = read_object(network / "config.json")
    check_shape(path, config, data, shape)
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
    weights_of, digest, parameters = _read_weights(network, states)
    channels = int(config.get("block_out_channels", UNET_CHANNELS)[0])
    whole = config.get("time_embedding_type") == "learned"
    weights, weights_by = said_weights(options, _trained_here(network, weights_of))
    load = functools.partial(load_unet, network)
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
        null_class=null_class(options, entries),
        learned_variance=config.get("out_channels") == 2 * shape[0],
    )


def _trained_here(folder: Path, weights: str) -> Weights | None:
    """Which weights a folder holds that a training of this package wrote; None for another's."""
    for record in (folder / "model.json", folder.parent / "model.json"):  # the raw ones lie in a folder of theirs
        if record.is_file():
            digests = read_object(record).get("digests")
            names = [name for name, each in digests.items() if each == weights] if isinstance(digests, dict) else []
            if names in (["ema"], ["raw"]):
                return "ema" if names == ["ema"] else "raw"
    return None


@functools.lru_cache(maxsize=8)
def _read_weights(folder: Path, states: tuple[tuple[str, int, int], ...]) -> tuple[str, str, int]:
    """`weights_digest`, `unet_digest` and number of weights; read once as long as the files stay as they are."""
    try:
        network = load_unet(folder)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None
    return weights_digest(network), unet_digest(network), sum(parameter.numel() for parameter in network.parameters())


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
