"""Hydra composes the same files once a process: 0.02 s for choices that it has had before, where it took 0.16 s.

What is shared is what files alone give: each file's content, the defaults list of the same choices, and the
configuration merged of it. All that an override sets is set by Hydra in a copy. A search path that a test made is read
every time, and so is everything in the processes that tests start.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig

from ddim_lab.config.folders import config_folder

Plugins.instance()  # imports the modules of its sources once more: what their files define now is what is used
FileConfigSource = SourcesRegistry.instance().resolve("file")
_load = FileConfigSource.load_config
_list = config_loader_impl.create_defaults_list
_merge = ConfigLoaderImpl._compose_config_from_defaults_list

_loaded: dict[tuple[str, str], bytes] = {}
"""By folder and name, to be unpickled, which is faster than a deep copy."""

_lists: dict[tuple[Any, ...], DefaultsList] = {}
_merged: dict[int, bytes] = {}
"""By the identity of a list in `_lists`; to be unpickled, too."""


def share(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    patch.setattr(FileConfigSource, "load_config", _shared_load)
    patch.setattr(config_loader_impl, "create_defaults_list", _shared_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _shared_merge)


def share_nothing(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, for a test of composing itself."""
    patch.setattr(FileConfigSource, "load_config", _load)
    patch.setattr(config_loader_impl, "create_defaults_list", _list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge)


def _is_ours(source: Any) -> bool:
    return bool(source.full_path() == f"file://{config_folder()}")


def _never_changes(repo: Any) -> bool:
    return all(source.scheme() != "file" or _is_ours(source) for source in repo.get_sources())


def _shared_load(source: ConfigSource, config_path: str) -> ConfigResult:
    if not _is_ours(source):
        return _load(source, config_path)
    key = source.full_path(), config_path
    if key not in _loaded:
        _loaded[key] = pickle.dumps(_load(source, config_path))
    found: ConfigResult = pickle.loads(_loaded[key])
    return found


def _shared_list(
    repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    def read() -> DefaultsList:
        return _list(repo, config_name, overrides_list, prepend_hydra=prepend_hydra, skip_missing=skip_missing)

    if not _never_changes(repo):
        return read()
    settings = Overrides(repo, overrides_list).config_overrides
    choices = [o.input_line for o in overrides_list if not o.is_sweep_override() and o not in settings]
    sources = [source.full_path() for source in repo.get_sources()]
    key = (*sources, config_name, prepend_hydra, skip_missing, *choices)
    if key not in _lists:
        _lists[key] = read()
    found = copy.copy(_lists[key])
    found.config_overrides = settings
    return found


def _shared_merge(loader: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    if not any(defaults is each.defaults for each in _lists.values()):
        return _merge(loader, defaults=defaults, repo=repo)
    if id(defaults) not in _merged:
        _merged[id(defaults)] = pickle.dumps(_merge(loader, defaults=defaults, repo=repo))
    found: DictConfig = pickle.loads(_merged[id(defaults)])
    return found
