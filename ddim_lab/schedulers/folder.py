"""A diffusers folder, or a repository of the hub: where its parts lie, and the scheduler that it ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from ddim_lab.errors import ConfigError, one_line
from ddim_lab.schedulers.classes import check_class

__all__ = ["WEIGHT_FILES", "locate", "read_object", "scheduler_file", "shipped_scheduler"]

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

WEIGHT_FILES: Final = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
"""Names under which a folder may keep its weights, an index where they are in several files; the first one there is
read, as by diffusers."""


def shipped_scheduler(path: str) -> tuple[str, dict[str, Any]]:
    """The class of the scheduler in a checkpoint's folder, and what its scheduler_config.json says.

    Args:
        path: as model.path.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    root = locate(path)
    network = root / "unet" if (root / "unet" / "config.json").is_file() else root
    if (file := scheduler_file(path, root, network)) is None:
        raise ConfigError(
            f"model.path={path} has no scheduler_config.json, and so no scheduler: choose another sampler"
        )
    config = read_object(file)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ConfigError(f"model.path={path}, {file.name}: it names no class; choose another sampler")
    return name, config


def locate(path: str) -> Path:
    """The folder of a checkpoint; a hub id's files are downloaded where they are not in the hub's cache."""
    folder = Path(path)
    if folder.is_dir():
        if any((place / "config.json").is_file() for place in (folder, folder / "unet")):
            return folder
        raise ConfigError(f"model.path={path}: no config.json of a U-Net there, nor in its folder unet")
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"model.path={path}: there is no such folder; give a diffusers folder or a hub id")
    return _fetch(path)


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.safetensors"]
    reason: Exception | None = None
    # What the cache has, then what the hub has; files that may be pickles only where there are no others.
    for patterns, local in ((small, True), (small, False), ([*small, "*.bin"], False)):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=local))
        except (OSError, ValueError, RuntimeError) as error:
            reason = error
            continue
        if _has_weights(folder) or _has_weights(folder / "unet"):
            return folder
    words = "it holds no U-Net" if reason is None else one_line(reason)[:200]
    raise ConfigError(
        f"model.path={repository}: no such folder here, not in the hub's cache, and the hub did not give it ({words});"
        " run once with a network, or give the folder of a copy"
    )


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES)


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {file} does not hold a configuration")
    return content


def scheduler_file(path: str, root: Path, network: Path) -> Path | None:
    """The scheduler_config.json of a checkpoint: in its folder, or in the pipeline's that it is a part of."""
    around = (network.absolute().parent, network.resolve().parent)
    places = (root / "scheduler", root, network, *(folder / "scheduler" for folder in around))
    if (found := next((place for place in places if (place / "scheduler_config.json").is_file()), None)) is not None:
        return found / "scheduler_config.json"
    for index in (folder / "model_index.json" for folder in (root, *around)):
        scheduler = read_object(index).get("scheduler") if index.is_file() else None
        if isinstance(scheduler, list) and len(scheduler) == 2 and scheduler[1] is not None:
            try:
                check_class(scheduler[1])
            except ValueError as error:
                raise ConfigError(f"model.path={path}, model_index.json: {error}") from None
            raise ConfigError(
                f"model.path={path}: {index} names a {scheduler[1]}, and {index.parent / 'scheduler'} has no"
                " scheduler_config.json: fetch it, too"
            )
    return None
