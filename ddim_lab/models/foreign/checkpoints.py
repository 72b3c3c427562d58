"""A file of a code base that is known here: read, converted, and named where it is a published one."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from ddim_lab.config.model import AdmConfig, OfficialConfig, Weights
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.errors import ConfigError
from ddim_lab.models.foreign.adm import convert_adm
from ddim_lab.models.foreign.converted import Converted, build
from ddim_lab.models.foreign.ddim import PUBLISHED, convert_ddim
from ddim_lab.models.foreign.files import read_content
from ddim_lab.models.pretrained import Pretrained, check_schedule, check_shape, null_class, said_weights
from ddim_lab.models.unet import unet_digest

__all__ = ["ForeignConfig", "convert_file", "read_file"]

ForeignConfig = OfficialConfig | AdmConfig

_PROCESS: Final = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
"""What all published files of the DDIM authors were trained on, as diffusers writes it."""


def convert_file(options: ForeignConfig, size: tuple[int, int] | None, num_timesteps: int) -> Converted:
    """The network of a checkpoint's file.

    Args:
        options: the file, its code base, and what the user says of it.
        size: height and width of the images; None: a published file's, or whatever fits.
        num_timesteps: T of the schedule that it was trained with.

    Raises:
        ValueError: it can't be read, or is no such network, or is another than the user says; one line that begins with
            the path.
    """
    content = read_content(options.path)
    try:
        if isinstance(options, AdmConfig):
            return convert_adm(
                content,
                size,
                num_timesteps,
                heads=options.num_heads,
                head_channels=options.num_head_channels,
                new_order=options.use_new_attention_order,
                rescaled=options.rescale_timesteps,
            )
        converted = convert_ddim(content, size, options.weights)
        return _named(converted, options)
    except ValueError as error:
        raise ValueError(f"{options.path}: {error}") from None


def _named(converted: Converted, options: OfficialConfig) -> Converted:
    """With what is known of the file by its MD5, if it is one that the DDIM authors published."""
    with Path(options.path).open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if (known := PUBLISHED.get(md5)) is None:
        return converted
    if options.weights not in (None, "unknown", known.weights):
        raise ValueError(f"it is the authors' {known.name} by its MD5: weights={options.weights} contradicts it")
    return Converted(
        config=converted.config | {"sample_size": [known.size, known.size]},
        state=converted.state,
        source=f"{converted.source}, {known.name} (MD5 {md5})",
        weights=known.weights,
        process=_PROCESS,
    )


def read_file(options: ForeignConfig, schedule: ScheduleConfig, data: str, shape: tuple[int, int, int]) -> Pretrained:
    """As `ddim_lab.models.inspection.inspect_pretrained`."""
    path, file, steps = options.path, Path(options.path), schedule.build().num_timesteps
    state = (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else (0, 0)
    found = _read_file(options, shape[1:], steps, state)
    check_shape(path, found.config, data, shape)
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
        null_class=null_class(options, entries),
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
def _read_file(options: ForeignConfig, size: tuple[int, int], steps: int, state: tuple[int, int]) -> _File:
    """Read whole once, as long as the file's size and time (`state`) are the same."""
    try:
        found = convert_file(options, size, steps)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None
    try:
        network = build(found)
    except ValueError as error:
        raise ConfigError(f"model.path: {options.path}: {error}") from None
    parameters = sum(parameter.numel() for parameter in network.parameters())
    digest = unet_digest(network, found.heads)
    return _File(found.config, found.source, found.weights, found.note, found.process, digest, parameters)


def _load_file(options: ForeignConfig, size: tuple[int, int], steps: int) -> nn.Module:
    network: nn.Module = build(convert_file(options, size, steps))
    return network
