"""One configuration composed by Hydra, as its own command line would; its errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddim_lab.config.data import DATA
from ddim_lab.config.folders import config_folder, plugin_folders
from ddim_lab.config.kinds import TASKS
from ddim_lab.config.metrics import METRICS
from ddim_lab.config.options import user_path
from ddim_lab.config.sampler import SAMPLERS
from ddim_lab.config.trust import check_hydra, no_secrets
from ddim_lab.errors import ConfigError, one_line

if TYPE_CHECKING:
    pass

__all__ = ["compose", "composed_already", "composer", "explain", "literal", "quoted", "split_cells"]

_read: dict[tuple[str | None, ...], DictConfig] = {}
"""What Hydra composed of files alone, by the folders that were searched and the choices."""


@contextlib.contextmanager
def composer(asked: argparse.Namespace) -> Iterator[None]:
    """Hydra ready to compose, with --config-dir as Hydra itself would have it; what Hydra may do is checked."""
    if nameless := [text for text in asked.overrides if text.lstrip("+~").startswith("=")]:
        raise ConfigError(f"{nameless[0]}: there is no option before the =; write option=value")
    plain = [text for text in asked.overrides if not _is_sweep(text)]
    for_hydra = [
        text
        for text in plain
        # what is swept may be set by a file, too, and there is nothing to change before that file is read
        if (name := text.lstrip("+~")).startswith(("hydra.", "hydra/")) and not name.startswith("hydra.sweeper.params.")
    ]
    add_plugins()
    no_secrets()
    with hydra.initialize_config_dir(config_dir=str(config_folder()), job_name="ddim_lab", version_base="1.3"):
        ours = compose(for_hydra, hydra_too=True)
        if asked.config_dir is not None:
            folder = user_path(asked.config_dir).absolute()
            if not folder.is_dir():
                raise ConfigError(f"--config-dir: there is no folder {folder}")
            _check_presets(folder)
            # The search path is read once, as the loader is made: a folder added later would not be looked into.
            search = create_config_search_path(str(config_folder()))
            search.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("ddim_lab", search)
            _read.clear()  # a folder of the user's may have changed
        check_hydra(compose(plain, hydra_too=True), ours)
        yield


@final
class _Plugins(SearchPathPlugin):
    """Lets Hydra find the YAML files of installed packages, after ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package, folder in plugin_folders().items():
            search_path.append(package, f"file://{folder}")


@functools.cache
def add_plugins() -> None:
    """Have Hydra look for choices in installed packages, too.

    Raises:
        ConfigError: a package brings what it may not, or what another brings.
    """
    for kind in (TASKS, DATA, METRICS, SAMPLERS):
        kind.brought()
    if plugin_folders():
        Plugins.instance().register(_Plugins)


def quoted(argument: str) -> str:
    """An override as Hydra's grammar needs it: values that begin with `~`, or are not ASCII, in quotes."""
    if argument.startswith("-") or "'" in argument or '"' in argument:
        return argument
    return re.sub(r"(?<=[=,\[])(?:~|[^,\]]*[^\x00-\x7f])[^,\]]*", lambda value: f"'{value[0]}'", argument)


def _check_presets(folder: Path) -> None:
    """Raise ConfigError where a preset that a search wrote is not what it wrote."""
    from ddim_lab.store import text_fault

    for file in sorted(folder.glob("sampler/*.yaml")):
        if (fault := text_fault(file)) is not None:
            raise ConfigError(
                f"{file} can't be used: {fault}; the search's command writes it again (to keep a change of your own,"
                " delete its first line)"
            )


def compose(overrides: Sequence[str], *, hydra_too: bool = False) -> DictConfig:
    """Compose one configuration; Hydra's and OmegaConf's errors in one line.

    Reading the files takes a tenth of a second and more: configurations whose choices are the same share it, and what
    sets a plain value is set in a copy, as Hydra sets it.

    Args:
        overrides: as Hydra takes them.
        hydra_too: whether Hydra's own part is wanted.

    Raises:
        ConfigError: with one line for the user.
    """
    loader = GlobalHydra.instance().config_loader()
    try:
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
        chosen = [each for each in parsed if not isinstance(each.value(), dict) and _is_group(each.key_or_group)]
        read = _of_files(tuple(str(each.input_line) for each in chosen))
        config = OmegaConf.masked_copy(read, [str(key) for key in read if hydra_too or key != "hydra"])
        OmegaConf.set_struct(config, True)  # or an unknown option would be added
        ConfigLoaderImpl._apply_overrides_to_config([each for each in parsed if each not in chosen], config)
    except AssertionError as error:  # OmegaConf's, where an override goes below an option that is null
        parents = ((text, text.lstrip("+~").split("=")[0].rpartition(".")[0]) for text in overrides)
        below = next((text for text, parent in parents if parent and OmegaConf.select(read, parent) is None), None)
        if below is None:
            raise
        raise ConfigError(f"{below} sets a part of an option that is null: give it whole") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    except (YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"a configuration file can't be read: {one_line(error)}") from error
    return config


def _of_files(choices: tuple[str, ...]) -> DictConfig:
    """What the files of these choices give, Hydra's own part included."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    key = *(place.path for place in places), *choices
    if key not in _read:
        _read[key] = hydra.compose("config", overrides=list(choices), return_hydra_config=True)
    return _read[key]


def literal(text: str) -> str:
    """The value of an override that is this text to Hydra and OmegaConf, whatever characters are in it."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    # Of backslashes Hydra counts those alone that stand before a quote.
    text = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{text}'"


def _is_group(name: str) -> bool:
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    return loader.repository.group_exists(name)


@contextlib.contextmanager
def composed_already() -> Iterator[None]:
    """Wraps the run of a sweep that `plan_sweep` has checked: Hydra's sweeper would compose every cell once more."""
    checks = Sweeper.validate_batch_is_legal  # of the base class: Hydra imports its sweepers a second time
    Sweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = checks  # type: ignore[method-assign]


def split_cells(base: DictConfig, overrides: Sequence[Override], parser: OverridesParser) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's basic sweeper makes them."""
    rivals = {"steps": "nfe", "nfe": "steps"}  # two ways to say one thing: the command line's word counts
    given = {override.key_or_group for override in overrides if override.value() is not None}
    from_file = [
        f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items() if rivals.get(key) not in given
    ]
    swept = [*parser.parse_overrides(from_file), *overrides]
    for override in swept:
        if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
            raise ConfigError(
                f"{override.input_line} stands for nothing: no choice matches, so there is no cell to run"
            )
    batches = BasicSweeper.split_arguments(swept, max_batch_size=None)
    return [cell for batch in batches for cell in batch]


# -- errors in one line ---------------------------------------------------------------------------------


def explain(error: Exception) -> str:
    """What Hydra says in many lines, in one that names the option and what to do."""
    text = str(error)
    if match := re.match(r"Error merging override (.+)", text):
        reason = str(error.__cause__ or "it does not fit").strip().splitlines()[0]
        return f"{match.group(1)}: {reason[0].lower()}{reason[1:]}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_option(match.group(1))
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, choice = match.group(1).rpartition("/")
        options = re.search(r"Available options in '[^']*':\n((?:\t\S+\n?)+)", text)
        known = ", ".join(options.group(1).split()) if options else ""
        return (
            f"{group}={choice}: there is no such choice; use one of: {known}"
            if known
            else f"no config {match.group(1)}"
        )
    if match := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"+{match.group(1)}: the option exists; drop the +"
    if "Error parsing override" in text or re.search(
        r"mismatched input|LexerNoViableAlt|no viable alternative|extraneous input|token recognition", text
    ):
        return f"an override can't be read: {one_line(text)}; write option=value, and quote special characters"
    lines = text.strip().splitlines()
    return one_line(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))


def _unknown_option(name: str) -> str:
    if name in GlobalHydra.instance().config_loader().list_groups(""):
        return f"{name}: nothing is chosen of it yet; did you mean +{name}=...?"
    composed = OmegaConf.to_container(compose([]), resolve=False)
    known = sorted(_flat(composed))
    if name in known:
        return f"{name}: there is no such option with the other choices made here (such as model=...); drop it"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name}: there is no such option" + (
        f"; did you mean {near[0]}?" if near else f"; {_lists(name)} lists them"
    )


def _lists(name: str) -> str:
    return "--cfg hydra" if name.startswith("hydra.") else "--help"


def _flat(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")


def _is_sweep(text: str) -> bool:
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
        return bool(override.is_sweep_override())
    except HydraException as error:
        raise ConfigError(explain(error)) from error
