"""A file of a code base that is known here: read, converted, and named where it is a published one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from torch import nn

from ddim_lab.config.model import AdmConfig, OfficialConfig
from ddim_lab.models.foreign.adm import convert_adm
from ddim_lab.models.foreign.converted import Converted
from ddim_lab.models.foreign.ddim import PUBLISHED, convert_ddim
from ddim_lab.models.foreign.files import read_content
from ddim_lab.models.unet import weights_digest
from ddim_lab.store import content_key

__all__ = ["ForeignConfig", "convert_file", "network_digest"]

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


def network_digest(converted: Converted, network: nn.Module) -> str:
    """`weights_digest`, and, where there are several, how many heads share the weights of an attention."""
    weights = weights_digest(network)
    heads = {"channels": converted.config["attention_head_dim"], "number": converted.heads}
    return weights if set(heads.values()) == {None} else content_key({"weights": weights, "heads": heads})
