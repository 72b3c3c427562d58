"""One job's story: load or train, sample, measure, leave a result."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ddim_lab.config import Config, ConfigError
from ddim_lab.data import ImageData, load_data
from ddim_lab.metrics.features import Features, obtain_features, reference_key
from ddim_lab.models import Mirror, Model, obtain_model
from ddim_lab.report import static_charts
from ddim_lab.runtime import Runtime
from ddim_lab.sampler import Sampler
from ddim_lab.store import Store, content_key, read_json, write_json
from ddim_lab.tracking import Run, TrackingConfig, offline_sync_hint, track

__all__ = ["Place", "environment", "job", "mirror_report"]

log = logging.getLogger("ddim_lab")

CELL_VERSION: Final = 1
"""Raised whenever the same identity would be measured otherwise."""


@final
@dataclass(frozen=True)
class Place:
    """Where a job stands: its sweep's folder and its number there."""

    sweep: Path
    number: int

    @classmethod
    def of_hydra(cls) -> Place:
        """Of the running Hydra job, whose output folder is <sweep>/jobs/<number>."""
        folder = Path(HydraConfig.get().runtime.output_dir)
        return cls(folder.parents[1], int(folder.name))

    @property
    def pointer(self) -> Path:
        return self.sweep / "jobs" / str(self.number) / "pointer.json"


def job(composed: DictConfig) -> None:
    """Hydra's task function. Leaves a pointer to its cell, or the reason why there is none; raises nothing else."""
    place = Place.of_hydra()
    started = time.perf_counter()
    pointer: dict[str, Any] = {"schema": 1, "number": place.number, "cell": None, "cached": False, "error": None}
    name = f"job {place.number}"
    try:
        config = Config.from_hydra(composed)
        name = describe(config)
        result, found = _run(config, place, name)
        pointer |= {"status": "done", **found}
    except Exception as error:
        pointer |= {"status": "failed", "error": _one_line(error)}
        place.pointer.parent.mkdir(parents=True, exist_ok=True)
        (place.pointer.parent / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        log.error("%s %s failed: %s", _progress(place), name, pointer["error"])
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            log.exception("in full")
    pointer["seconds"] = round(time.perf_counter() - started, 3)
    write_json(place.pointer, pointer)
    if pointer["status"] == "done":
        there = " (was there)" if pointer["cached"] else ""
        log.info("%s %s: %s%s%s", _progress(place), name, _headline(result), there, _time_left(place))


def describe(config: Config) -> str:
    """A job in a few words: sampler, eta where it differs from the name's, spacing where not uniform, steps."""
    labels = config.labels()
    words = [labels["sampler"], f"eta={labels['eta']:g}"]
    if labels["spacing"] != "uniform":
        words.append(labels["spacing"])
    return " ".join([*words, f"S={labels['steps']}"])


def _run(config: Config, place: Place, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do the job; return its result and what the pointer says of it."""
    store = Store(Path(config.outputs_dir))
    runtime = Runtime.resolve(config.runtime)
    group = place.sweep.name
    tracking = _tracking(config, place.sweep)
    phases: dict[str, float] = {}
    runs: list[Run] = []
    values = config.model_dump(mode="json")
    tags = [config.data.name, config.sampler.name, f"S={config.steps}"]

    @contextlib.contextmanager
    def training_mirror() -> Iterator[Mirror]:
        log.info("training the eps-model on %s: %s steps", config.data.name, config.training.max_steps)
        with track(
            tracking, job_type="train", name=f"train {config.data.name}", group=group, run_config=values, tags=tags[:1]
        ) as run:
            yield run.log
        runs.append(run)

    with track(tracking, job_type="cell", name=name, group=group, run_config=values, tags=tags) as run:
        data = load_data(config.data)
        with _phase(phases, "train"):
            model = obtain_model(config, data, runtime, store, training_mirror)
        with _phase(phases, "feature_network"):
            features = obtain_features(config.metrics.features, data, store)
        cell, cached, measured = _cell(config, data, model, features, runtime, store, f"{_progress(place)} {name}")
        result = read_json(cell / "result.json")
        with _phase(phases, "tracking"):
            _mirror(run, config, result, cell)
    runs.append(run)
    wandb = [{"mode": run.mode, "directory": str(run.directory)} for run in runs if run.directory is not None]
    return result, {"cell": result["key"], "cached": cached, "phases": {**phases, **measured}, "wandb": wandb}


def _cell(
    config: Config, data: ImageData, model: Model, features: Features, runtime: Runtime, store: Store, progress: str
) -> tuple[Path, bool, dict[str, float]]:
    """The cell's folder, whether it was there already, and the seconds of the phases done now."""
    sampler = config.build_sampler(model.prediction)
    identity = _identity(config, data, model, features, runtime, sampler)
    key = content_key(identity)
    phases: dict[str, float] = {}

    def build(folder: Path) -> None:
        from ddim_lab.tasks.generate import generate  # torchmetrics, only where something is measured

        measured = generate(config, data, model, features, runtime, store, folder, progress)
        phases.update(measured.phases)
        result = {
            "schema": 1,
            "task": config.task.name,
            "key": key,
            "identity": identity,
            "recipe": _recipe(config, data, model, features, runtime, sampler),
            "measurements": measured.measurements,
            "phases": {name: round(seconds, 4) for name, seconds in measured.phases.items()},
            "environment": environment(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(folder / "result.json", result)

    folder, built = store.obtain("cells", key, build, replace=config.force)
    if config.save_samples and not (folder / "samples.npz").is_file():
        from ddim_lab.tasks.generate import resample

        there = folder
        folder, _ = store.obtain(
            "cells", key, lambda fresh: resample(config, data, model, runtime, fresh, there, progress), replace=True
        )
    return folder, not built, phases


def _identity(
    config: Config, data: ImageData, model: Model, features: Features, runtime: Runtime, sampler: Sampler
) -> dict[str, Any]:
    """What a cell is: content digests and resolved values, never paths, names or "auto"."""
    split = config.metrics.reference
    return {
        "version": CELL_VERSION,
        "task": config.task.name,
        "model": model.recipe(),
        "schedule": hashlib.sha256(sampler.schedule.betas.tobytes()).hexdigest(),
        "sampler": {
            "transitions": [[step.t, step.t_prev, step.sigma, step.noise_std] for step in sampler.transitions],
            "clip": sampler.clip,
        },
        "seed": config.seed,
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "runtime": runtime.recipe(),
        "metrics": {
            **config.metrics.model_dump(exclude={"features", "reference"}),
            "features": features.digest,
            "reference": reference_key(features, data, split, len(data.split(split))),
        },
    }


def _recipe(
    config: Config, data: ImageData, model: Model, features: Features, runtime: Runtime, sampler: Sampler
) -> dict[str, Any]:
    """The cell in words that a reader understands."""
    return {
        "data": {"name": data.name, "digest": data.digest, "preprocessing": data.preprocessing},
        "model": {
            "name": model.kind,
            "weights": model.weights,
            "digest": model.digest,
            "parameters": model.parameters,
            "fingerprint": model.fingerprint,
            "training_seed": config.training.seed if model.fingerprint else None,
        },
        "schedule": config.schedule.model_dump(),
        "sampler": {
            "steps": sampler.steps,
            "eta": sampler.eta,
            "variance": sampler.variance,
            "spacing": sampler.spacing,
            "clip": sampler.clip,
            "prediction": sampler.prediction,
            "timesteps": [step.t for step in sampler.transitions],
        },
        "seed": config.seed,
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "runtime": runtime.recipe(),
        "metrics": {**config.metrics.model_dump(), "network": features.digest},
    }


def _mirror(run: Run, config: Config, result: dict[str, Any], cell: Path) -> None:
    """Repeat a cell's result in its W&B run, over the number of steps."""
    measurements = result["measurements"]
    quality, speed, determinism = (measurements[part] for part in ("quality", "speed", "determinism"))
    values: dict[str, Any] = {
        "nfe": measurements["nfe"],
        "fd": quality["fd"],
        "fd_se": quality["fd_se"],
        "images_per_second": speed["images_per_second"],
        "seconds_per_image": speed["seconds_per_image"],
        "forward_share": speed["forward_share"],
        "repeat_max_abs_diff": determinism["repeat_max_abs_diff"],
        "noise_variance": determinism["noise_variance"],
    }
    run.log({name: value for name, value in values.items() if value is not None}, step=config.steps)
    run.summary(
        {
            **values,
            **{name: value for name, value in config.labels().items() if name != "num_samples"},
            "num_samples": quality["num_samples"],
            "fd_name": quality["name"],
            "fd_reference": quality["reference"],
            "repeat_identical": determinism["repeat_identical"],
            "sha256": determinism["sha256"],
            "cell": result["key"],
        }
    )
    run.image("samples", cell / "preview.png", caption=describe(config))


def mirror_report(sweep: Path, rows: Sequence[Mapping[str, Any]], config: Config) -> str | None:
    """The sweep's own W&B run: all rows as a table, the charts and the report. Returns the upload command, if any."""
    tracking = _tracking(config, sweep)
    plan = read_json(sweep / "plan.json")
    directories = [
        Path(found["directory"])
        for pointer in sorted(sweep.glob("jobs/*/pointer.json"))
        for found in read_json(pointer).get("wandb", [])
        if found["mode"] == "offline"
    ]
    with track(tracking, job_type="report", name="report", group=sweep.name, run_config=plan) as run:
        columns = [name for name in rows[0] if name != "recipe"]
        run.table("results", columns, [[row[name] for name in columns] for row in rows])
        run.summary({"cells": len(rows), "cells_failed": sum(row["status"] != "done" for row in rows)})
        if run.mode != "off":
            for name, picture in static_charts(sweep).items():
                run.image(name, picture)
            run.html("report", sweep / "report.html")
    if run.directory is not None and run.mode == "offline":
        directories.append(run.directory)
    return offline_sync_hint(directories)


def _tracking(config: Config, sweep: Path) -> TrackingConfig:
    return TrackingConfig(
        logger=config.logger.name,
        directory=sweep,
        project=config.logger.project,
        entity=config.logger.entity,
        mode=config.logger.mode,
    )


# -- what the user sees --------------------------------------------------------------------------------


def _headline(result: dict[str, Any]) -> str:
    """A cell's result in one line."""
    quality, speed = result["measurements"]["quality"], result["measurements"]["speed"]
    error = "" if quality["fd_se"] is None else f" ± {quality['fd_se']:.2g}"
    return f"{quality['name']} {quality['fd']:.4g}{error}, {speed['images_per_second']:,.0f} images/s"


def _time_left(place: Place) -> str:
    """An estimate from the cells of this sweep that were computed: their time a forward, times the forwards to go."""
    cells = _plan(place)["cells"]
    spent, done, to_do = 0.0, 0, 0
    for number, cell in enumerate(cells):
        forwards = cell["labels"]["num_samples"] * cell["labels"]["steps"]
        path = Place(place.sweep, number).pointer
        if not path.is_file():
            to_do += forwards
            continue
        pointer = read_json(path)
        if pointer["status"] == "done" and not pointer["cached"]:
            spent += sum(
                seconds for name, seconds in pointer["phases"].items() if name not in ("train", "feature_network")
            )
            done += forwards
    if not done or not to_do:
        return ""
    seconds = round(spent / done * to_do)
    return f"; about {seconds // 60} min {seconds % 60:02d} s left" if seconds >= 60 else f"; about {seconds} s left"


def _progress(place: Place) -> str:
    return f"[{place.number + 1}/{len(_plan(place)['cells'])}]"


def _plan(place: Place) -> dict[str, Any]:
    path = place.sweep / "plan.json"
    plan: dict[str, Any] = read_json(path) if path.is_file() else {"cells": [None] * (place.number + 1)}
    return plan


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    told = isinstance(error, ConfigError | ValueError | ArithmeticError | RuntimeError | OSError)
    return text if told else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _phase(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        phases[name] = round(time.perf_counter() - start, 4)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions and commit: what a reader needs to do it again."""
    packages = ["ddim-lab", "torch", "pytorch-lightning", "torchmetrics", "diffusers", "numpy", "scipy"]
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit, dirty = _git()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package runs from and whether it has changes; None where it is none."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None, None
    try:
        commit = _git_output(folder, "rev-parse", "HEAD")
        return commit, bool(_git_output(folder, "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git_output(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
