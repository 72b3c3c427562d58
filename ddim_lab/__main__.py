"""The command line: compose and check every cell, run them, report, and own the exit status.

Hydra runs the jobs; this wraps it. Its callbacks can't do this work: their exceptions become warnings, and none is
called when a job failed.

Exit status: 0 all cells are there; 1 some failed; 2 the command or configuration is wrong; 130 interrupted;
143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddim_lab.config import Config, ConfigError, config_folder
from ddim_lab.errors import one_line
from ddim_lab.signals import TERMINATED, Terminated, terminable
from ddim_lab.trust import check_hydra, check_secrets, no_schema_warnings

if TYPE_CHECKING:
    from ddim_lab.store import Store

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "check_outputs", "checked_config", "main"]

FAILED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130
FULL_ERROR: Final = "HYDRA_FULL_ERROR"


def main() -> None:
    """Entry point of `python -m ddim_lab` and of the console script `ddim-lab`."""
    try:
        with warnings.catch_warnings(), terminable():
            no_schema_warnings()
            status = _main(sys.argv[1:])
        sys.exit(status)
    except ConfigError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        print(f"ddim_lab: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print("ddim_lab: interrupted; the same command goes on from what is done", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Terminated:
        print("ddim_lab: terminated; the same command goes on from what is done", file=sys.stderr)
        sys.exit(TERMINATED)


def _main(arguments: list[str]) -> int:
    parser = get_args_parser()
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    asked = parser.parse_intermixed_args(arguments)
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(asked, flag) is not None:
            raise ConfigError(f"--{flag.replace('_', '-')} can't be used here; --config-dir adds a folder of choices")
    modes = [asked.run, asked.multirun, asked.cfg is not None, asked.info is not None, asked.shell_completion]
    if sum(map(bool, modes)) > 1:
        raise ConfigError(
            "--run, --multirun, --cfg, --info and --shell-completion exclude each other: give one of them"
        )
    if asked.resolve and asked.cfg is None and not asked.help:
        raise ConfigError("--resolve is for --cfg: add --cfg job")
    if asked.help or asked.hydra_help or asked.info is not None or asked.shell_completion:
        # What follows --shell-completion are its own words.
        overrides = [] if asked.shell_completion else asked.overrides
        with _composer(argparse.Namespace(config_dir=asked.config_dir, overrides=overrides)):
            pass
        return _hand_to_hydra(asked, arguments)
    started = time.perf_counter()
    from ddim_lab import cost, datasets, models  # noqa: F401  # seconds of imports, told apart from composing

    imported = time.perf_counter()
    with _composer(asked):
        if asked.cfg is None:
            sweep, plan, cells = _plan(asked, arguments)
            phases = {"imports": imported - started, "compose": time.perf_counter() - imported}
            plan["phases"] = {name: round(seconds, 4) for name, seconds in phases.items()}
    if asked.cfg is not None:
        return _hand_to_hydra(asked, arguments)
    return _run(sweep, plan, cells, asked, arguments)


def _refuse_arguments(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see python -m ddim_lab --help")


def _hand_to_hydra(asked: argparse.Namespace, arguments: Sequence[str], more: Sequence[str] = ()) -> int:
    """Let Hydra do what the arguments say, with `more` overrides; its exit status."""
    from ddim_lab.run import TRACEBACKS, job

    # Hydra's parser takes overrides in one piece only.
    flags = [text for text in arguments if text not in asked.overrides]
    given, traced = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = [given[0], *flags, *asked.overrides, *more]
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what it would print at length, jobs' errors aside
    os.environ[TRACEBACKS] = traced or "0"
    try:
        hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(job)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if traced == "1":
            raise
        print(f"ddim_lab: the sweep ended early: {one_line(error)}", file=sys.stderr)
        return FAILED
    finally:
        sys.argv = given
        os.environ.pop(FULL_ERROR)
        if traced is not None:
            os.environ[FULL_ERROR] = traced
    return 0


# -- before the first job: every cell composed and checked ----------------------------------------------


@contextlib.contextmanager
def _composer(asked: argparse.Namespace) -> Iterator[None]:
    """Hydra ready to compose, with --config-dir as Hydra itself would have it; what Hydra may do is checked."""
    if nameless := [text for text in asked.overrides if text.lstrip("+~").startswith("=")]:
        raise ConfigError(f"{nameless[0]}: there is no option before the =; write option=value")
    plain = [text for text in asked.overrides if not _is_sweep(text)]
    for_hydra = [text for text in plain if text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    with hydra.initialize_config_dir(config_dir=str(config_folder()), job_name="ddim_lab", version_base="1.3"):
        ours = _compose(for_hydra, hydra_too=True)
        if asked.config_dir is not None:
            folder = Path(asked.config_dir).absolute()
            if not folder.is_dir():
                raise ConfigError(f"--config-dir: there is no folder {folder}")
            _check_presets(folder)
            # The search path is read once, as the loader is made: a folder added later would not be looked into.
            search = create_config_search_path(str(config_folder()))
            search.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("ddim_lab", search)
        check_hydra(_compose(plain, hydra_too=True), ours)
        yield


def _check_presets(folder: Path) -> None:
    """Raise ConfigError where a preset that a search wrote is not what it wrote."""
    from ddim_lab.store import text_fault

    for file in sorted(folder.glob("sampler/*.yaml")):
        if (fault := text_fault(file)) is not None:
            raise ConfigError(
                f"{file} can't be used: {fault}; the search's command writes it again (to keep a change of your own,"
                " delete its first line)"
            )


def _compose(overrides: Sequence[str], *, hydra_too: bool = False) -> DictConfig:
    """Compose one configuration; Hydra's and OmegaConf's errors in one line."""
    try:
        return hydra.compose("config", overrides=list(overrides), return_hydra_config=hydra_too)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error
    except (YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"a configuration file can't be read: {one_line(error)}") from error


def _plan(asked: argparse.Namespace, arguments: Sequence[str]) -> tuple[Path, dict[str, Any], list[Config]]:
    """The sweep's folder, its plan and its cells' configurations: every cell composed and checked."""
    parse = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(*) stands for
    try:
        overrides = parse.parse_overrides(asked.overrides)
        plain = [override.input_line for override in overrides if not override.is_sweep_override()]
        base = _compose([text for text in plain if text is not None], hydra_too=True)
        many = asked.multirun or str(base.hydra.mode) == "RunMode.MULTIRUN"
        if not many and any(override.is_sweep_override() for override in overrides):
            swept = next(override for override in overrides if override.is_sweep_override())
            raise ConfigError(f"{swept.input_line} lists several values: add -m to run them all")
        cells = _cells(base, overrides, parse) if many else [list(asked.overrides)]
    except HydraException as error:
        raise ConfigError(_explain(error)) from error
    from ddim_lab.cost import forwards_by_cell

    checked = [_check(cell) for cell in cells]
    first = checked[0]
    for option in ("outputs_dir", "logger", "study"):
        if any(getattr(config, option) != getattr(first, option) for config in checked):
            raise ConfigError(
                f"{option} must be the same in all cells of a sweep, which share one report: run the command for each"
            )
    outputs = Path(first.outputs_dir).absolute()
    sweep = _sweep_folder(base, overrides, outputs, many)
    plan = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "ddim_lab", *arguments]),
        "name": sweep.name,
        "title": first.study.title,
        "notes": first.study.notes,
        "reference": first.study.reference and first.study.reference.model_dump(),
        "outputs_dir": os.path.relpath(outputs, sweep),
        "cells": [
            {
                "number": number,
                "task": config.task.name,
                "overrides": overrides_of,
                "labels": config.labels(),
                "image_forwards": forwards,
            }
            for number, (overrides_of, config, forwards) in enumerate(
                zip(cells, checked, forwards_by_cell(checked), strict=True)
            )
        ],
    }
    return sweep, plan, checked


def _cells(base: DictConfig, overrides: Sequence[Override], parser: OverridesParser) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's basic sweeper makes them."""
    from_file = [f"{key}={value}" for key, value in (base.hydra.sweeper.params or {}).items()]
    swept = [*parser.parse_overrides(from_file), *overrides]
    for override in swept:
        if override.is_discrete_sweep() and not list(override.sweep_string_iterator()):
            raise ConfigError(
                f"{override.input_line} stands for nothing: no choice matches, so there is no cell to run"
            )
    batches = BasicSweeper.split_arguments(swept, max_batch_size=None)
    return [cell for batch in batches for cell in batch]


def _check(cell: Sequence[str]) -> Config:
    """One cell's configuration, with all that can be known before work starts."""
    from ddim_lab.datasets import check_data, count_images
    from ddim_lab.metrics.features import check_features, num_features
    from ddim_lab.metrics.references import check_reference
    from ddim_lab.models import check_model
    from ddim_lab.runtime import Runtime

    config = Config.from_hydra(_compose([text for text in cell if not text.lstrip("+~").startswith("hydra.")]))
    check_secrets(config.model_dump())
    runtime = Runtime.resolve(config.runtime)
    runtime.training_compiled(config.training.compile)
    runtime.check_devices({"training.devices": config.training.devices, "sampling_devices": config.sampling_devices})
    if config.metrics.inception_tf32 and not runtime.has_tf32:
        raise ConfigError("metrics.inception_tf32=true needs a CUDA device with TF32 (compute capability 8.0 or above)")
    if config.task.name == "search_timesteps" and importlib.util.find_spec("optuna") is None:
        raise ConfigError("task=search_timesteps needs Optuna: pip install 'ddim-lab[search]'")
    if not config.needs_images:
        check_model(config)
        return config
    files = check_data(config.data)
    check_model(config, count_images(config.data, files))
    check_features(config, files)
    check_reference(config.metrics, num_features(config))
    return config


def checked_config(overrides: Sequence[str]) -> Config:
    """One job's configuration, composed and checked as the command line does.

    Raises:
        ConfigError: with one line for the user.
    """
    with _composer(argparse.Namespace(config_dir=None, overrides=list(overrides))):
        return _check(overrides)


def _sweep_folder(base: DictConfig, overrides: Sequence[Override], outputs: Path, many: bool) -> Path:
    """One new folder a command, named by the time to the microsecond; or the one that the user named."""
    named = {override.key_or_group for override in overrides}
    if many and "hydra.sweep.dir" in named:
        return Path(base.hydra.sweep.dir).absolute()
    if "hydra.run.dir" in named:
        raise ConfigError("hydra.run.dir is fixed: a job's folder is part of its sweep's; set outputs_dir instead")
    return outputs / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


# -- run and report --------------------------------------------------------------------------------------


def _run(
    sweep: Path, plan: dict[str, Any], cells: Sequence[Config], asked: argparse.Namespace, arguments: Sequence[str]
) -> int:
    from ddim_lab.cost import describe_cost
    from ddim_lab.run import environment
    from ddim_lab.runtime import Runtime
    from ddim_lab.store import Store, write_record

    outputs = (sweep / plan["outputs_dir"]).resolve()
    check_outputs(Store(outputs))
    try:
        for record in sweep.glob("jobs/*/pointer.json"):  # of an earlier sweep in the folder that the user named
            record.unlink()
        plan = {**plan, "environment": environment()}
        write_record(sweep / "plan.json", plan)
        for cell in plan["cells"]:  # Hydra makes them, too, but ends the sweep where it can't
            (sweep / "jobs" / str(cell["number"])).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        option = "outputs_dir" if sweep.is_relative_to(outputs) else "hydra.sweep.dir"
        where = outputs if option == "outputs_dir" else sweep
        raise ConfigError(f"{option}={where} can't be written: {error.strerror or error}; set {option}") from None
    print(f"ddim_lab: {describe_cost(cells, Runtime.resolve(cells[0].runtime))}", file=sys.stderr)
    folder = str(sweep).replace("\\", "\\\\").replace("'", "\\'")
    places = [f"hydra.sweep.dir='{folder}'", f"hydra.run.dir='{folder}/jobs/0'", "hydra.output_subdir=null"]
    places += ["hydra.sweep.subdir='jobs/${hydra.job.num}'", "hydra.job.chdir=false"]
    try:
        status = _hand_to_hydra(asked, arguments, places)
    except KeyboardInterrupt:
        status = INTERRUPTED
        print("\nddim_lab: interrupted; the same command goes on from what is done", file=sys.stderr)
    except Terminated:
        status = TERMINATED
        print("\nddim_lab: terminated; the same command goes on from what is done", file=sys.stderr)
    finally:
        failed = _report(sweep, plan, cells[0])
    return status or int(failed)


def check_outputs(store: Store) -> None:
    """Raise ConfigError where the outputs folder, or a folder in it, can't be written."""
    try:
        store.check_writable()
    except OSError as error:
        what = "" if error.filename == str(store.root) else f"{Path(error.filename).name} in it: "
        raise ConfigError(
            f"outputs_dir={store.root} can't be written: {what}{error.strerror}; set outputs_dir, or make it writable"
        ) from None


def _report(sweep: Path, plan: dict[str, Any], first: Config) -> bool:
    """Build the report, mirror it, say where it is; whether any cell failed."""
    from ddim_lab.report import ReportError, build, rows
    from ddim_lab.run import mirror_report
    from ddim_lab.store import read_record, set_aside, write_record

    started = time.perf_counter()
    try:
        try:
            read_record(sweep / "plan.json")
        except (OSError, ValueError) as error:  # it was whole when the sweep began
            set_aside(sweep / "plan.json", str(error))
            write_record(sweep / "plan.json", plan)
        page = build(sweep)
    except (ReportError, ImportError, OSError) as error:  # the cells are on disk: it can be built again elsewhere
        print(f"ddim_lab: no report: {error}", file=sys.stderr)
        return True
    built = time.perf_counter()
    table = rows(sweep)
    hint = mirror_report(sweep, table, first)
    mirrored = time.perf_counter()
    print((sweep / "table.md").read_text(encoding="utf-8"))
    mirror = f", W&B {mirrored - built:.1f} s" if first.logger.name == "wandb" else ""
    print(f"report: {page} (built in {built - started:.1f} s{mirror})")
    if hint is not None:
        print(f"W&B runs are offline; to upload them: {hint}")
    return any(row["status"] != "done" for row in table)


# -- errors in one line ---------------------------------------------------------------------------------


def _explain(error: Exception) -> str:
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
    composed = OmegaConf.to_container(hydra.compose("config"), resolve=False)
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
        raise ConfigError(_explain(error)) from error


if __name__ == "__main__":
    main()
