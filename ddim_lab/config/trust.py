"""What a configuration may make Hydra do.

Hydra instantiates what its own node names (launcher, sweeper, callbacks, log handlers) and writes where that node
says, before any code of ours runs. So the node is checked as soon as it is composed:

- a file (a study, anything in --config-dir) may set whether and what to sweep, `hydra.mode` and
  `hydra.sweeper.params`; the rest comes from our conf/ and from the command line;
- whatever is named to be called is on a list, wherever it was named.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from ddim_lab.errors import ConfigError

__all__ = ["check_hydra", "check_secrets", "no_schema_warnings", "no_secrets"]

PLUGINS: Final = "hydra_plugins.hydra_{0}_launcher.{0}_launcher."
LAUNCHERS: Final = {
    PLUGINS.format("joblib") + "JoblibLauncher": "joblib",
    PLUGINS.format("submitit") + "LocalLauncher": "submitit",
    PLUGINS.format("submitit") + "SlurmLauncher": "submitit",
    PLUGINS.format("ray") + "RayLauncher": "ray",
}
"""Launchers that may be called, and the extra that brings each."""

CALLABLE: Final = {
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    *LAUNCHERS,
}
HANDLERS: Final = {"logging.StreamHandler"}
STREAMS: Final = {"ext://sys.stdout", "ext://sys.stderr"}

OURS: Final = (
    *("callbacks", "hydra_logging", "job_logging", "launcher", "output_subdir", "run", "searchpath", "sweep"),
    *("job.chdir", "job.env_set", "job.env_copy", "sweeper._target_", "sweeper.max_batch_size"),
)
"""Of Hydra's node: what no file may set."""

SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL")

_WORD: Final = r"[A-Za-z]{2,12}\d{0,3}"
NAME: Final = re.compile(rf"{_WORD}([-_ ./]({_WORD}|\d{{1,4}}))*")
"""What people give to a thing, as fashion_mnist: not random enough to be a key, whatever its variable is called."""

STORED: Final = "a configuration is stored and shown"


def no_schema_warnings() -> None:
    """Our conf/hydra/launcher has other defaults than the plugins' configurations, and is checked against them."""
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def check_hydra(composed: DictConfig, ours: DictConfig) -> None:
    """Refuse what a configuration must not make Hydra do.

    Args:
        composed: the whole configuration, Hydra's node included.
        ours: the same from our conf/ and the command line's options for Hydra alone.

    Raises:
        ConfigError: with one line for the user.
    """
    for name in OURS:
        if _plain(composed.hydra, name) != _plain(ours.hydra, name):
            raise ConfigError(f"hydra.{name} is set by a file: it may be set on the command line alone")
    for place, key, value in _entries(OmegaConf.to_container(composed, resolve=False), ""):
        in_hydra = place.startswith("hydra.")
        if key == "_target_" and not (in_hydra and value in CALLABLE):
            raise ConfigError(f"{place}={value}: this target is not on the allow-list")
        if in_hydra and (key == "()" or (key == "class" and value not in HANDLERS)):
            raise ConfigError(f"{place}={value}: log handlers may be {', '.join(sorted(HANDLERS))} alone")
        if in_hydra and isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in STREAMS:
            raise ConfigError(f"{place}={value}: log streams may be {' or '.join(sorted(STREAMS))} alone")
    target = str(composed.hydra.launcher.get("_target_"))
    if (extra := LAUNCHERS.get(target)) is not None and not _installed(target):
        choice = composed.hydra.runtime.choices.get("hydra/launcher", extra)
        raise ConfigError(f"hydra/launcher={choice} needs a plugin: pip install 'ddim-lab[{extra}]'")


def no_secrets() -> None:
    """From here on no configuration can ask for an environment variable that is a key by its name."""
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(name: str, *default: str | None) -> str | None:
    if SECRET.search(name.upper()):
        raise ConfigError(f"holds the value of ${name}: {STORED}")
    return oc.env(name, *default)


def check_secrets(values: Mapping[str, Any]) -> None:
    """Refuse a configuration that holds the value of an environment variable that is a key, however it came there.

    Raises:
        ConfigError: names the option and the variable, not the value.
    """
    secrets = {name: value for name, value in os.environ.items() if SECRET.search(name.upper()) and _random(value)}
    for place, _, value in _entries(values, ""):
        for name, secret in secrets.items():
            if isinstance(value, str) and secret in value:
                raise ConfigError(f"{place} holds the value of ${name}: {STORED}")


def _random(value: str) -> bool:
    """Whether a text may be a key: no name, and no path of something that is there."""
    return len(value) >= 8 and not NAME.fullmatch(value) and not os.path.exists(value)  # noqa: PTH110 - of any text


def _plain(node: DictConfig, name: str) -> Any:
    found = OmegaConf.select(node, name, throw_on_missing=False)
    return OmegaConf.to_container(found, resolve=False) if OmegaConf.is_config(found) else found


def _entries(node: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(path, last key, value) of every leaf."""
    if isinstance(node, Mapping | list | tuple):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _entries(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, prefix.rpartition(".")[2], node


def _installed(target: str) -> bool:
    try:
        return importlib.util.find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False
