"""Folders of YAML files: ours, and those beside what installed packages bring. No package is imported to find them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from ddim_lab.errors import ConfigError

__all__ = ["POINTS", "config_folder", "distribution", "package_folder", "plugin_folders", "points", "source_sha256"]

POINTS: Final = ("ddim_lab.samplers", "ddim_lab.tasks", "ddim_lab.metrics", "ddim_lab.data")
"""Groups of entry points through which an installed package brings something."""

GROUPS: Final = frozenset({"sampler", "task", "metrics", "data", "model", "training", "schedule", "experiments"})
"""Groups of conf/ to which it may add choices."""


def config_folder() -> Path:
    """Where our YAML files are: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@functools.cache
def points(group: str) -> Sequence[EntryPoint]:
    """The entry points of a group."""
    return tuple(entry_points(group=group))


def distribution(point: EntryPoint) -> str:
    """The name of the package that brings an entry point, as pip calls it."""
    return point.dist.name if point.dist else point.module


def package_folder(module: str) -> Path | None:
    """The folder of the top-level package that a module is in; None where that is no package of files."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


@functools.cache
def plugin_folders() -> Mapping[str, Path]:
    """The conf/ folder inside each package that brings something, by the package's name.

    Raises:
        ConfigError: a file there has the place of one of ours or of another package's, or a group that is not open.
    """
    folders: dict[str, Path] = {}
    for point in sorted((point for group in POINTS for point in points(group)), key=distribution):
        folder = package_folder(point.module)
        if folder is not None and (folder / "conf").is_dir():
            folders[distribution(point)] = folder / "conf"
    taken: dict[str, str] = {}
    for package, folder in folders.items():
        for file in _yaml_files(folder):
            if file.partition("/")[0] not in GROUPS:
                raise ConfigError(
                    f"the package {package} brings conf/{file}: it may add choices to {', '.join(sorted(GROUPS))} alone"
                )
            if (config_folder() / file).exists():
                raise ConfigError(f"the package {package} brings conf/{file}, which is a name of ours")
            if file in taken:
                raise ConfigError(
                    f"the packages {taken[file]} and {package} both bring conf/{file}: uninstall one of them"
                )
            taken[file] = package
    return folders


def _yaml_files(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.yaml")):
        yield file.relative_to(folder).as_posix()


def source_sha256(folder: Path) -> str:
    """SHA-256 over the names and contents of a package's files, compiled ones aside."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
