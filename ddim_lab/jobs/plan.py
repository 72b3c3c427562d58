"""What a command asks for: every cell of its sweep composed by Hydra and checked, before the first one runs.

All that is wrong with a command is a `ConfigError` from here: one line that names the option.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from ddim_lab.config.job import Config
from ddim_lab.config.options import user_path
from ddim_lab.config.trust import check_secrets
from ddim_lab.console import show_progress
from ddim_lab.device.imports import large_imports
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.compose import compose, composer, explain, split_cells
from ddim_lab.jobs.tracking import check_mode
from ddim_lab.metrics.sequential import SPENDING
from ddim_lab.store.records import Elsewhere, Plan, PlanCell, Published, StopRule

if TYPE_CHECKING:
    from ddim_lab.store import Store

__all__ = ["check_outputs", "checked_config", "composed_config", "plan_sweep"]


def plan_sweep(asked: argparse.Namespace, arguments: Sequence[str]) -> tuple[Path, Plan, list[Config]]:
    """The sweep's folder, its plan and its cells' configurations: every cell composed and checked."""
    started = time.perf_counter()
    parse = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(*) stands for
    try:
        overrides = parse.parse_overrides(asked.overrides)
        plain = [override.input_line for override in overrides if not override.is_sweep_override()]
        base = compose([text for text in plain if text is not None], hydra_too=True)
        many = asked.multirun or str(base.hydra.mode) == "RunMode.MULTIRUN"
        if not many and any(override.is_sweep_override() for override in overrides):
            swept = next(override for override in overrides if override.is_sweep_override())
            raise ConfigError(f"{swept.input_line} lists several values: add -m to run them all")
        cells = split_cells(base, overrides, parse) if many else [list(asked.overrides)]
    except HydraException as error:
        raise ConfigError(explain(error)) from error
    checked = [_checked(cell) for cell in cells]
    first = checked[0]
    _check_growing(checked)
    for option in ("outputs_dir", "logger", "study"):
        if any(getattr(config, option) != getattr(first, option) for config in checked):
            raise ConfigError(
                f"{option} must be the same in all cells of a sweep, which share one report: run the command for each"
            )
    show_progress(first.progress)
    imports = _import_what_checks()
    from ddim_lab.jobs.cost import forwards_by_cell

    for config in checked:
        for each in config.looks[-1:]:
            _check_further(each)
    # Resolved, or the way from the sweep to its outputs and back would lead elsewhere past a symbolic link.
    outputs = Path(first.outputs_dir).resolve()
    sweep = _sweep_folder(base, overrides, outputs, many).resolve()
    published = first.study.published
    plan = Plan(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "ddim_lab", *arguments]),
        name=sweep.name,
        title=first.study.title,
        notes=first.study.notes,
        published=None if published is None else Published.model_validate(published.model_dump()),
        elsewhere=tuple(Elsewhere.model_validate(one.model_dump()) for one in first.study.elsewhere or ()),
        outputs_dir=os.path.relpath(outputs, sweep),
        **_rule(first),
        cells=tuple(
            PlanCell(
                number=number,
                task=config.task.name,
                overrides=tuple(overrides_of),
                labels=config.labels(),
                image_forwards=forwards,
            )
            for number, (overrides_of, config, forwards) in enumerate(
                zip(cells, checked, forwards_by_cell([config.looks[-1] for config in checked]), strict=True)
            )
        ),
        phases={
            "imports": round(imports, 4),
            "compose": round(time.perf_counter() - started - imports, 4),
        },
    )
    return sweep, plan, checked


def _checked(cell: Sequence[str]) -> Config:
    """One cell's configuration, with all that can be known without torch."""
    config = Config.from_hydra(compose([text for text in cell if not text.lstrip("+~").startswith("hydra.")]))
    if config.nfe is not None and (steps := [text for text in cell if text.lstrip("+").startswith("steps=")]):
        raise ConfigError(
            f"{steps[-1]} and nfe={config.nfe} are both given, and nfe chooses how many steps are taken: drop one"
        )
    if not config.grows and (rule := [text for text in cell if text.lstrip("+").startswith("stop.")]):
        raise ConfigError(
            f"{rule[-1]} is for num_samples=auto, and num_samples={config.num_samples} is given: drop one"
        )
    check_secrets(config.model_dump())
    if config.logger.name == "wandb":
        check_mode(config.logger.mode)
    if config.task.extra is not None and importlib.util.find_spec(config.task.extra[1]) is None:
        extra, package = config.task.extra
        raise ConfigError(f"task={config.task.name} needs {package}: pip install 'ddim-lab[{extra}]'")
    return config


def _check_growing(cells: Sequence[Config]) -> None:
    """Raise ConfigError where num_samples=auto has nothing to go by: one N and one rule are of all cells together."""
    if not any(config.grows for config in cells):
        return
    if not all(config.grows and config.stop == cells[0].stop for config in cells):
        raise ConfigError(
            "num_samples=auto and stop must be the same in all cells of a sweep: cells are compared at equal N"
        )
    if len(cells) == 1:
        raise ConfigError(
            "num_samples=auto goes by the comparisons of a sweep, and one cell has none: sweep an option with -m, or"
            " give a number"
        )


def _rule(config: Config) -> dict[str, Any]:
    """What the plan says of num_samples=auto, and nothing of a number."""
    stop = config.stop
    rule = StopRule(counts=stop.counts, se=stop.se, hours=stop.hours, spending=SPENDING)
    return {"stop": rule} if config.grows else {}


def _import_what_checks() -> float:
    """The imports of `_check_further`, torch above all; their seconds, told apart from composing."""
    started = time.perf_counter()
    with large_imports():
        from ddim_lab.data import images  # noqa: F401
        from ddim_lab.jobs import cost  # noqa: F401
        from ddim_lab.models import obtain  # noqa: F401

    return time.perf_counter() - started


def _check_further(config: Config) -> None:
    """Raise ConfigError at all that can be known before work starts: the device, the network, the data's files."""
    from ddim_lab.data.base import data_set
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.metrics.features import feature_network
    from ddim_lab.metrics.references import check_reference
    from ddim_lab.models.obtain import check_model

    runtime = Runtime.resolve(config.runtime)
    runtime.training_compiled(config.training.compile)  # for its ConfigError
    runtime.check_devices({"training.devices": config.training.devices, "sampling_devices": config.sampling_devices})
    networks = [feature_network(options) for options in config.metrics.networks]
    for network in networks:
        network.check_runtime(runtime)
    if not config.needs_images:
        check_model(config)
        return
    data = data_set(config.data)
    files = data.find()
    if config.learns_labels and (fault := data.labels_fault(files)) is not None:
        raise ConfigError(f"model.conditional=true and model.labels=data need labels, and {fault}")
    check_model(config, data.count(files))
    for network in networks:
        network.check_data(data, files)
    check_reference(config.metrics, config.data.shape)


def checked_config(overrides: Sequence[str]) -> Config:
    """One job's configuration, composed and checked as the command line does.

    Raises:
        ConfigError: with one line for the user.
    """
    config = composed_config(overrides)
    _check_further(config)
    return config


def composed_config(overrides: Sequence[str]) -> Config:
    """The same as far as the options alone tell: files, networks and devices are not looked at."""
    with composer(argparse.Namespace(config_dir=None, overrides=list(overrides))):
        return _checked(overrides)


def _sweep_folder(base: DictConfig, overrides: Sequence[Override], outputs: Path, many: bool) -> Path:
    """One new folder a command, named by the time to the microsecond; or the one that the user named."""
    named = {override.key_or_group for override in overrides}
    if many and "hydra.sweep.dir" in named:
        return user_path(base.hydra.sweep.dir).absolute()
    if "hydra.run.dir" in named:
        raise ConfigError("hydra.run.dir is fixed: a job's folder is part of its sweep's; set outputs_dir instead")
    return outputs / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def check_outputs(store: Store) -> None:
    """Raise ConfigError where the outputs folder, or a folder in it, can't be written."""
    try:
        store.check_writable()
    except OSError as error:
        what = "" if error.filename == str(store.root) else f"{Path(error.filename).name} in it: "
        raise ConfigError(
            f"outputs_dir={store.root} can't be written: {what}{error.strerror}; set outputs_dir, or make it writable"
        ) from None
