"""One job's story: load or train, sample, measure, leave a result."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ddim_lab.config.job import Config
from ddim_lab.console import forgiving_output, show_progress
from ddim_lab.data.base import load_data, without_images
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import TRACEBACKS, Terminated, one_line, terminating
from ddim_lab.jobs.tracking import Role, Run, TrackingConfig, offline_sync_hint, track
from ddim_lab.jobs.workers import known_to_its_command
from ddim_lab.models.obtain import Mirror, obtain_model, with_batch_size
from ddim_lab.report import Sweep, curves, rows, static_charts, text_tables
from ddim_lab.report.findings import COLUMNS
from ddim_lab.report.rows import measured
from ddim_lab.report.series import noise_label
from ddim_lab.store import Store, content_key, read_json, read_record, write_json, write_record, write_text
from ddim_lab.store.housekeeping import register_job, working
from ddim_lab.store.records import EarlierLook, Plan, PlanCell, Pointer, Result, Tabled
from ddim_lab.tasks.base import Job

__all__ = ["Place", "environment", "job", "mirror_cells", "mirror_report"]

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
        # Not resolved: Hydra has put the path there as it is, where a ${ in it would be read as an interpolation.
        runtime: Any = OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)
        folder = Path(runtime["output_dir"])
        return cls(folder.parents[1], int(folder.name))

    @property
    def pointer(self) -> Path:
        return self.sweep / "jobs" / str(self.number) / "pointer.json"


def job(composed: DictConfig) -> None:
    """Hydra's task function. Leaves a pointer to its cell, or the reason why there is none; raises nothing else."""
    place = Place.of_hydra()
    started = time.perf_counter()
    left: dict[str, Any] = {"number": place.number, "cell": None, "cached": False, "error": None}
    left |= {"wandb": (), "objects": ()}
    plan = _plan(place)
    grows = plan is not None and plan.stop is not None
    before = _before(place) if grows else None
    name = f"job {place.number}"
    with forgiving_output(), contextlib.ExitStack() as until_the_pointer_is_left:
        try:
            config = Config.from_hydra(composed)
            show_progress(config.progress)
            name = describe(config)
            if grows:
                left |= _of_looks(before, config)
            store = Store(Path(config.outputs_dir))
            until_the_pointer_is_left.enter_context(working(store))
            until_the_pointer_is_left.enter_context(known_to_its_command(place.pointer.parent))
            result, found = _run(config, place, name, store)
            found["objects"] = tuple(sorted({*left["objects"], *found["objects"]}))
            found["wandb"] = (*left["wandb"], *found["wandb"])
            left |= {"status": "done", **found}
        except Exception as error:
            if terminating():  # an error that SIGTERM led to, in the middle of the way out
                raise Terminated from None
            left |= {"status": "failed", "error": one_line(error)}
            log.error("%s %s failed: %s", _progress(place), name, left["error"])
            if os.environ.get(TRACEBACKS) == "1":
                log.exception("in full")
            with contextlib.suppress(OSError):  # of the same cause, perhaps: the log has the line
                write_text(place.pointer.parent / "error.txt", traceback.format_exc())
        spent = 0.0 if before is None else before.seconds or 0.0
        pointer = Pointer(**left, seconds=round(spent + time.perf_counter() - started, 3))
        try:
            if pointer.status == "done":
                register_job(store, place.sweep, pointer)
            write_record(place.pointer, pointer.content())
        except OSError as error:  # the report then marks a job that left no record
            log.error("%s %s: its record can't be written: %s", _progress(place), name, one_line(error))
            return
    if pointer.status == "done":
        there = " (was there)" if pointer.cached else _images_there(pointer, config)
        log.info("%s %s: %s%s%s", _progress(place), name, result.headline, there, _time_left(place, pointer))


def _before(place: Place) -> Pointer | None:
    """What the job left at an earlier look, in a sweep whose N is not fixed."""
    with contextlib.suppress(OSError, ValueError):
        return Pointer.read(read_record(place.pointer))
    return None


def _of_looks(before: Pointer | None, config: Config) -> dict[str, Any]:
    """What a pointer says of N and of the looks before, and what of them is not pruned as long as the sweep exists.

    A job that was begun again at a look keeps what it had.
    """
    if before is None:
        return {"num_samples": config.num_samples}
    known = {look.num_samples: look for look in before.earlier}
    if before.cell is not None and before.num_samples is not None:
        known[before.num_samples] = EarlierLook(num_samples=before.num_samples, cell=before.cell)
    earlier = tuple(known[count] for count in sorted(known) if count < config.num_samples)
    objects = {*before.objects, *(("cells", look.cell) for look in earlier)}
    return {
        "num_samples": config.num_samples,
        "earlier": earlier,
        "objects": tuple(sorted(objects)),
        "wandb": before.wandb or (),
    }


def _images_there(pointer: Pointer, config: Config) -> str:
    """How many of a new cell's images had been made before, in words."""
    if not pointer.images_there:
        return ""
    return f" ({pointer.images_there:,} of {config.num_samples:,} images were there)"


def describe(config: Config) -> str:
    """A job in a few words: task where not generate, sampler, eta, spacing where not uniform, steps."""
    labels = config.labels()
    words = [labels["sampler"], f"eta={labels['eta']:g}"]
    if config.task.name != "generate":
        words.insert(0, config.task.name)
    if labels["spacing"] != "uniform":
        words.append(labels["spacing"])
    if (asked := labels.get("nfe_asked")) is not None:
        words.append(f"NFE={asked}")
    return " ".join([*words, f"S={labels['steps']}"])


def _run(config: Config, place: Place, name: str, store: Store) -> tuple[Result, dict[str, Any]]:
    """Do the job; return its result and what the pointer says of it."""
    runtimes = {runtime.job_lock: runtime for runtime in Runtime.choices(config.runtime)}
    with contextlib.ExitStack() as stack:
        taken = next(iter(runtimes))
        if len(runtimes) > 1:  # jobs side by side take one each, whatever started them
            taken = stack.enter_context(store.one_of(list(runtimes), waiting_for="a GPU"))
        elif runtimes[taken].accelerator == "gpu":  # named, or the only one: it is not waited for
            stack.enter_context(store.some_of([taken], 1))
        return _run_on(runtimes[taken], config, place, name, store)


def _run_on(runtime: Runtime, config: Config, place: Place, name: str, store: Store) -> tuple[Result, dict[str, Any]]:
    group = place.sweep.name
    tracking = _tracking(config, place.sweep)
    phases: dict[str, float] = {}
    runs: list[Run] = []
    told = _run_of(config, group)

    plan = _plan(place)
    alone = plan is not None and len(plan.cells) == 1  # else an agent's run is the sweep's own: `mirror_report`
    grows = plan is not None and plan.stop is not None  # then `mirror_cells` makes the run, of the last look alone
    with contextlib.nullcontext(Run()) if grows else track(tracking, **told, agents=alone) as run:
        data = load_data(config.data) if config.needs_images else without_images(config.data)
        with _phase(phases, "train"), contextlib.ExitStack() as training:

            @contextlib.contextmanager
            def training_mirror() -> Iterator[Mirror]:
                compiled = runtime.training_compiled(config.training.compile)
                first = "; the first one compiles it, which may take minutes" if compiled else ""
                steps = config.training.max_steps
                log.info("training the eps-model on %s: %s steps%s", config.data.name, steps, first)
                kept = track(
                    tracking,
                    job_type="train",
                    name=f"train {config.data.name}",
                    group=group,
                    run_config=told["run_config"],
                    tags=told["tags"][:1],
                )
                runs.append(training.enter_context(kept))  # open until the model is sealed and can be logged
                yield runs[-1].log

            model = obtain_model(config, data, runtime, store, training_mirror)
            if runs and model.fingerprint is not None:
                _log_object(runs[-1], store, config.data.name, "models", model.fingerprint, "output")
        job = Job(with_batch_size(config, runtime), data, model, runtime, store, f"{_progress(place)} {name}")
        if config.sampler.variance == "analytic":
            with _phase(phases, "second_moments"):
                _ = job.sampler
        with _phase(phases, "feature_network"):
            identity = _identity(job)
        cell, cached, images_there, measured = _cell(job, identity)
        result = Result.read(read_json(cell / "result.json"))
        objects = _objects(store, result.objects)
        with _phase(phases, "tracking"):
            _mirror(run, job.config, result, cell)
            _log_inputs(run, store, config, objects)
    runs.append(run)
    wandb = [{"mode": run.mode, "directory": str(run.directory)} for run in runs if run.directory is not None]
    found = {"cell": result.key, "cached": cached, "phases": {**phases, **measured}, "wandb": wandb}
    if images_there:
        found["images_there"] = images_there
    return result, {**found, "objects": objects}


def _cell(job: Job, identity: dict[str, Any]) -> tuple[Path, bool, int, dict[str, float]]:
    """The cell's folder, whether it was there already, how many images were, the seconds of the phases done now."""
    key = content_key(identity)
    phases: dict[str, float] = {}
    images_there = 0

    def build(folder: Path) -> None:
        nonlocal images_there
        if job.config.force:
            job.store.discard_work("cells", key)
        measured = job.task.measure(job, folder, job.store.work_folder("cells", key))
        phases.update(measured.phases)
        images_there = measured.images_there
        result = Result(
            key=key,
            task=job.config.task.name,
            identity=identity,
            recipe=_recipe(job),
            nfe=measured.nfe,
            headline=measured.headline,
            common_start=job.task.common_start,
            values=tuple(measured.values),
            tables=(*measured.tables, *_noise_table(job)),
            pictures=tuple(measured.pictures),
            phases={name: round(seconds, 4) for name, seconds in measured.phases.items()},
            objects=_objects(job.store),
            environment=environment(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_json(folder / "result.json", result.content())

    folder, built = job.store.obtain("cells", key, build, replace=job.config.force)
    folder = job.task.finished(job, folder)
    return folder, not built, images_there, phases


def _noise_table(job: Job) -> Iterator[Tabled]:
    """The noise of each step, where it is estimated: sampler.variance=analytic."""
    if (moments := job.second_moments()) is not None:
        from ddim_lab.models.second_moment import variance_table

        yield variance_table(job.sampler.transitions, job.sampler.eta, moments)


def _objects(store: Store, others: Sequence[tuple[str, str]] = ()) -> tuple[tuple[str, str], ...]:
    """The store's objects that were used, as (kind, key): not pruned as long as the sweep exists."""
    return tuple(sorted({*store.used, *others}))


def _identity(job: Job) -> dict[str, Any]:
    """What a cell is: content digests and resolved values, never paths, names or "auto"."""
    config = job.config
    return {
        "version": CELL_VERSION,
        "task": config.task.model_dump(),
        "model": job.model.recipe(),
        **({"weights": job.model.weights} if job.model.elsewhere and job.model.weights != "unknown" else {}),
        "sampler": job.sampler.recipe(),
        "seed": config.seed,
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "runtime": job.runtime.recipe(),
        "measured": job.task.identity(job),
        **({} if (moments := job.second_moments()) is None else {"second_moments": moments.key}),
        **({"plugins": config.plugins()} if config.plugins() else {}),
    }


def _recipe(job: Job) -> dict[str, Any]:
    """The cell in words that a reader understands."""
    config, data, model, sampler = job.config, job.data, job.model, job.sampler
    return {
        "data": {
            "name": data.name,
            "digest": data.digest,
            "preprocessing": data.preprocessing,
            **({} if data.files is None else {"files": data.files}),
        },
        "model": {
            "name": model.kind,
            "weights": model.weights,
            **({"weights_by": model.weights_by} if model.elsewhere else {}),
            **({} if model.source is None else {"source": model.source}),
            "digest": model.digest,
            "parameters": model.parameters,
            "fingerprint": model.fingerprint,
            "training_seed": config.training.seed if model.fingerprint else None,
            **({} if job.labels is None else {"classes": model.classes, "label_shares": list(job.labels.shares)}),
        },
        "schedule": config.schedule.model_dump(),
        "sampler": {
            "steps": sampler.steps,
            "eta": sampler.eta,
            "variance": config.sampler.variance,
            "spacing": sampler.spacing,
            "clip": config.sampler.clip,
            "prediction": sampler.prediction,
            "timesteps": [step.t for step in sampler.transitions],
            **({} if config.sampler.formula is None else {"formula": sampler.formula.recipe()}),
            **({} if sampler.formula.noise_from is None else {"noise_from": sampler.formula.noise_from}),
            **({} if sampler.guidance is None else {"guidance": sampler.guidance}),
            **({"variance_images": config.variance_images} if sampler.variance == "analytic" else {}),
        },
        "task": config.task.model_dump(),
        "seed": config.seed,
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "runtime": job.runtime.recipe(),
        "metrics": config.metrics.model_dump(),
        **({"plugins": config.plugins()} if config.plugins() else {}),
    }


def _log_object(run: Run, store: Store, data: str, kind: str, key: str, role: Role) -> None:
    """An object of the store as a W&B artifact: a model's versions share a name, a reference has one of its own."""
    folder = store.root / kind / key
    if run.mode == "off" or not folder.is_dir():
        return
    if kind == "references":
        name, sort = f"{data}-reference-{key[:8]}", "reference"
    else:
        sort = "model" if (folder / "config.json").is_file() else "feature-network"
        name = f"{data}-{sort}"
    run.artifact(folder, name, sort, role, {"key": key, "data": data})


def _mirror(run: Run, config: Config, result: Result, cell: Path) -> None:
    """Repeat a cell's result in its W&B run: numbers over the number of steps, tables and pictures."""
    told = {"nfe": result.nfe, "headline": result.headline, **measured(result.values)}
    values = {name: value for name, value in told.items() if isinstance(value, int | float | str)}
    numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str)}
    run.log(numbers, step=config.steps)
    run.summary({**config.labels(), **values, "cell": result.key})
    if (cell / "preview.png").is_file():
        run.image("samples", cell / "preview.png", caption=describe(config))
    for table in result.tables:
        run.table(table.title, list(table.columns), [list(row) for row in table.rows])
    for picture in result.pictures:
        run.image(picture.title, cell / picture.file, caption=picture.caption)


def mirror_cells(sweep: Sweep, configs: Sequence[Config]) -> list[Path]:
    """The W&B runs of the cells of a sweep whose N is not fixed, once it has ended: one a cell, of the last look.

    A run at every look would say the same of other N under the same name.

    Returns:
        Where the runs lie that wait for an upload.
    """
    left = []
    for cell, config in zip(sweep.cells, configs, strict=True):
        if cell.result is None or cell.folder is None or cell.pointer is None:
            continue
        settled = {"num_samples": cell.labels["num_samples"], "batch_size": cell.recipe("batch_size")}
        config = config.model_copy(update=settled)
        with track(_tracking(config, sweep.folder), **_run_of(config, sweep.folder.name)) as run:
            _mirror(run, config, cell.result, cell.folder)
            _log_inputs(run, Store(cell.folder.parents[1]), config, cell.pointer.objects)
        if run.directory is not None and run.mode == "offline":
            left.append(run.directory)
    return left


def _run_of(config: Config, group: str) -> dict[str, Any]:
    """What W&B is told of a cell's run before it begins."""
    return {
        "job_type": "cell",
        "name": describe(config),
        "group": group,
        "run_config": {**config.model_dump(mode="json"), "row": noise_label(config.labels())},  # dashboards group by it
        "tags": [config.data.name, config.sampler.name, f"S={config.steps}"],
    }


def _log_inputs(run: Run, store: Store, config: Config, objects: Sequence[tuple[str, str]]) -> None:
    for kind, key in objects:
        if kind not in ("cells", "samples"):
            _log_object(run, store, config.data.name, kind, key, "input")


def mirror_report(sweep: Sweep, config: Config, others: Sequence[Path] = ()) -> str | None:
    """The sweep's own W&B run: all rows as a table, the charts and the report. Returns the upload command, if any.

    Args:
        sweep: the sweep.
        config: of a cell, for how it is tracked.
        others: runs that wait for an upload, beside those that the jobs left.
    """
    tracking = _tracking(config, sweep.folder)
    directories = [
        *others,
        *(
            Path(found.directory)
            for cell in sweep.cells
            for found in (cell.pointer.wandb if cell.pointer else None) or ()
            if found.mode == "offline"
        ),
    ]
    run_config, many = sweep.plan.content(), len(sweep.plan.cells) > 1
    with track(
        tracking, job_type="report", name="report", group=sweep.folder.name, run_config=run_config, agents=many
    ) as run:
        table = rows(sweep)
        run.table("results", list(table[0]), [list(row.values()) for row in table])
        for heading, names, lines in text_tables(sweep):
            run.table(heading, names, lines)
        for steps, values in curves(sweep).items():
            run.log(values, step=steps)
        failed = sum(cell.status != "done" for cell in sweep.cells)
        run.summary({"cells": len(sweep.cells), "cells_failed": failed})
        if found := sweep.findings:
            told = [found.summary, *(f"{part.title}: {line}" for part in found.parts for line in part.lines)]
            settled, tested = len(found.settled), len(found.tested)
            run.summary({"findings": "\n".join(told), "settled": settled, "not_settled": tested - settled})
            run.table("findings", list(COLUMNS), [list(finding.row().values()) for finding in found.all])
        if run.mode != "off":
            for name, picture in static_charts(sweep).items():
                run.image(name, picture)
            run.html("report", sweep.folder / "report.html")
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


def _time_left(place: Place, last: Pointer) -> str:
    """Estimated from this sweep's computed cells: their time per forward, times the forwards that remain.

    Where N grows it is the time left of this look, to which all cells come with as large a part of their images.
    """
    pointers = {pointer.number: pointer for pointer in _pointers(place.sweep)}
    spent, done, to_do = 0.0, 0.0, 0.0
    for cell in _planned(place):
        pointer = pointers.get(cell.number)
        if pointer is None or pointer.num_samples != last.num_samples:
            to_do += cell.image_forwards
        elif pointer.status == "done" and not pointer.cached and (pointer.num_samples or not pointer.images_there):
            spent += sum(
                seconds
                for name, seconds in pointer.phases.items()
                if name not in ("train", "feature_network", "second_moments")
            )
            done += cell.image_forwards
    if not done or not to_do:
        return ""
    seconds = round(spent / done * to_do)
    of = "" if last.num_samples is None else " of this look"
    told = f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
    return f"; about {told} left{of}"


def _progress(place: Place) -> str:
    return f"[{place.number + 1}/{len(_planned(place)) or '?'}]"


def _planned(place: Place) -> tuple[PlanCell, ...]:
    """The sweep's cells as planned."""
    plan = _plan(place)
    return () if plan is None else plan.cells


def _plan(place: Place) -> Plan | None:
    """The sweep's plan; None where plan.json can't be read, which the report mends."""
    try:
        return Plan.read(read_record(place.sweep / "plan.json"))
    except (OSError, ValueError):
        return None


def _pointers(sweep: Path) -> Iterator[Pointer]:
    """What the sweep's jobs left, by job number; records that can't be read are left for the report to mention."""
    found = [path for path in sweep.glob("jobs/*/pointer.json") if path.parent.name.isdecimal()]
    for path in sorted(found, key=lambda path: int(path.parent.name)):
        with contextlib.suppress(OSError, ValueError):
            yield Pointer.read(read_record(path))


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
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None, None
    try:
        commit = _git_output(folder, "rev-parse", "HEAD")
        return commit, bool(_git_output(folder, "status", "--porcelain"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None, None


def _git_output(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
