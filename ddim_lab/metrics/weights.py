"""Weights of a feature network in a safetensors file: found, downloaded at a pinned commit, read, checked.

Nothing is unpickled and no code comes with them.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ddim_lab.errors import ConfigError, one_line
from ddim_lab.metrics.inception import weights_digest

__all__ = ["Published", "check_config", "check_once", "find_weights", "read_tensors", "weights_digest"]

NAMES: Final = ("model.safetensors", "open_clip_model.safetensors")
"""What a folder's weights may be called; the first one there is read."""

PICKLED: Final = (b"PK", b"\x80")
"""How torch's files begin: a zip archive with a pickle, or a pickle alone."""

KINDS: Final = ("F64", "F32", "F16", "BF16")
"""What weights may be, by safetensors' names."""


@final
@dataclass(frozen=True)
class Published:
    """A file of weights on the hub.

    Attributes:
        repository: its hub id.
        revision: the commit that it is taken at.
        file: its name there.
        sha256: of its content.
    """

    repository: str
    revision: str
    file: str
    sha256: str

    @property
    def where(self) -> str:
        """In words, for who has to fetch it."""
        return f"{self.file} of {self.repository} at {self.revision}"


def find_weights(network: str, asked: str | None, published: Published) -> Path:
    """The file of weights: the one asked for, else the hub cache's, else the download.

    Args:
        network: as metrics.features names it; metrics.NETWORK_weights is the option.
        asked: a file, or a folder that has one; None for the published one.
        published: that one.

    Raises:
        ConfigError: it is missing, pickled, can't be downloaded, or is damaged; says what, where and what to do.
    """
    option = f"metrics.{network}_weights"
    if asked is None:
        return _fetched(network, option, published)
    path = Path(asked).absolute()
    if path.is_dir():
        if (found := next((path / name for name in NAMES if (path / name).is_file()), None)) is not None:
            return found
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        has = f"has pickled weights alone ({pickled[0]}), which are never read" if pickled else "has no weights"
        raise ConfigError(f"{option}={asked} {has}: {' or '.join(NAMES)} is needed, as in {published.repository}")
    if not path.is_file():
        raise ConfigError(f"{option}={asked}: there is no such file or folder")
    return path


def _fetched(network: str, option: str, published: Published) -> Path:
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of every try it warns on its own, beside our line
    reason = ""
    for local in (True, False):
        try:
            name = hf_hub_download(
                published.repository, published.file, revision=published.revision, local_files_only=local
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = one_line(error)[:200]
            continue
        path = Path(name)
        if weights_digest(path) != published.sha256:
            raise ConfigError(
                f"{path} is damaged (its SHA-256 does not begin {published.sha256[:8]}): delete the file that it links"
                " to, to have it downloaded"
            )
        return path
    raise ConfigError(
        f"metrics.features={network}: {published.where} is not in the hub's cache, and the download failed ({reason}):"
        f" run once with a network, or get it elsewhere and set {option}"
    )


def read_tensors(path: Path, wanted: Callable[[str], bool], *, values: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names are wanted, in float32.

    Args:
        path: the file.
        wanted: of a tensor's name.
        values: False for their shapes alone, without reading the rest: tensors on torch's device "meta".

    Raises:
        ConfigError: the file is pickled, damaged or another kind, or holds what no weights are; one line.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(2)
    if any(start.startswith(mark) for mark in PICKLED):
        raise ConfigError(f"{path} is pickled, and never read: give the same weights as .safetensors")
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            for name in filter(wanted, tensors.keys()):
                part = tensors.get_slice(name)
                if (kind := part.get_dtype()) not in KINDS:
                    raise ConfigError(f"{path}: {name} is of {kind}, and weights are of {', '.join(KINDS)}")
                if values:
                    found[name] = tensors.get_tensor(name).float()
                else:
                    found[name] = torch.empty(part.get_shape(), device="meta")
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged or another kind of file ({one_line(error)[:100]})") from None
    if values and (bad := [name for name, tensor in found.items() if not bool(tensor.isfinite().all())]):
        raise ConfigError(f"{path} is damaged: {bad[0]} holds NaN or infinite values")
    return found


def check_once(path: Path, load: Callable[[Path], Any]) -> None:
    """Load a network once, as long as the content of its file is the same.

    Raises:
        ConfigError: `load`'s.
    """
    _checked(weights_digest(path), path, load)


@functools.lru_cache(maxsize=8)
def _checked(digest: str, path: Path, load: Callable[[Path], Any]) -> None:
    load(path)


def check_config(folder: Path, kinds: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse weights beside which a config.json says what is not so of the network that they would be loaded into.

    Args:
        folder: where they are; it need have no config.json.
        kinds: its model_type may be one of these.
        known: what else must be equal where it is said.

    Raises:
        ConfigError: something is not; one line.
    """
    if not (file := folder / "config.json").is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} does not hold a configuration")
    if (kind := config.get("model_type", kinds[0])) not in kinds:
        raise ConfigError(f"{file} says model_type={kind}, and {' or '.join(kinds)} is needed")
    inner = config.get("vision_config")
    said = inner if isinstance(inner, dict) else config
    for name, value in known.items():
        if said.get(name, value) != value:
            raise ConfigError(f"{file} says {name}={said[name]}, and {value} is what this network has: not supported")
