"""The command line: compose and check every cell, run them, report, and own the exit status.

Hydra runs the jobs; this wraps it. Its callbacks can't do this work: their exceptions become warnings, and none is
called when a job failed.

Exit status: 0 all cells are there; 1 some failed; 2 the command or configuration is wrong; 130 interrupted;
143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra._internal.utils import get_args_parser

from ddim_lab.config.folders import config_folder
from ddim_lab.config.job import Config
from ddim_lab.config.options import user_path
from ddim_lab.config.trust import no_schema_warnings
from ddim_lab.errors import (
    FAILED,
    FULL_ERROR,
    INTERRUPTED,
    TERMINATED,
    TRACEBACKS,
    ConfigError,
    Terminated,
    exit_status,
    one_line,
    told_of_termination,
)
from ddim_lab.jobs.compose import composed_already, composer, literal, quoted
from ddim_lab.jobs.entry import job
from ddim_lab.jobs.plan import check_outputs, plan_sweep
from ddim_lab.store.records import Plan

if TYPE_CHECKING:
    from ddim_lab.report import Sweep

__all__ = ["main"]


def main() -> None:
    """Entry point of `python -m ddim_lab` and of the console script `ddim-lab`."""
    with warnings.catch_warnings():
        no_schema_warnings()
        sys.exit(exit_status(lambda: _main(sys.argv[1:]), resumes=True))


def _main(arguments: list[str]) -> int:
    parser = get_args_parser()
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    arguments = [quoted(text) for text in arguments]
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
        with composer(argparse.Namespace(config_dir=asked.config_dir, overrides=overrides)):
            pass
        return _hand_to_hydra(asked, arguments)
    with composer(asked):
        if asked.cfg is None:
            sweep, plan, cells = plan_sweep(asked, arguments)
    if asked.cfg is not None:
        return _hand_to_hydra(asked, arguments)
    return _run(sweep, plan, cells, asked, arguments)


def _refuse_arguments(message: str) -> NoReturn:
    raise ConfigError(f"{message}; see python -m ddim_lab --help")


def _hand_to_hydra(asked: argparse.Namespace, arguments: Sequence[str], more: Sequence[str] = ()) -> int:
    """Let Hydra do what the arguments say, with `more` overrides; its exit status."""
    # Hydra's parser takes overrides in one piece only.
    flags = [text for text in arguments if text not in asked.overrides]
    given, traced = sys.argv, os.environ.get(FULL_ERROR)
    if asked.config_dir is not None:  # the last one counts
        flags += ["--config-dir", str(user_path(asked.config_dir).absolute())]
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


# -- run and report --------------------------------------------------------------------------------------


def _run(sweep: Path, plan: Plan, cells: Sequence[Config], asked: argparse.Namespace, arguments: Sequence[str]) -> int:
    from ddim_lab.data.base import data_set
    from ddim_lab.jobs.cost import describe_cost
    from ddim_lab.jobs.run import environment
    from ddim_lab.jobs.workers import commanding, may_begin, stop
    from ddim_lab.store import Store, write_record
    from ddim_lab.store.housekeeping import register

    outputs = (sweep / plan.outputs_dir).resolve()
    store = Store(outputs)
    check_outputs(store)
    try:
        for name in ("pointer.json", "error.txt"):  # of an earlier sweep in the folder that the user named
            for record in sweep.glob(f"jobs/*/{name}"):
                record.unlink()
        may_begin(sweep)
        plan = plan.model_copy(update={"environment": environment()})
        register(store, sweep)
        write_record(sweep / "plan.json", plan.content())
        for cell in plan.cells:  # Hydra makes them, too, but ends the sweep where it can't
            (sweep / "jobs" / str(cell.number)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        option = "outputs_dir" if sweep.is_relative_to(outputs) else "hydra.sweep.dir"
        where = outputs if option == "outputs_dir" else sweep
        raise ConfigError(f"{option}={where} can't be written: {error.strerror or error}; set {option}") from None
    for data in dict.fromkeys(cell.data for cell in cells if cell.needs_images):
        if (line := data_set(data).told()) is not None:
            print(f"ddim_lab: {line}", file=sys.stderr)
    print(f"ddim_lab: {describe_cost(cells)}", file=sys.stderr)
    # Hydra reads a launcher's options twice, so that there no escape keeps a ${ what it is.
    folder = os.path.relpath(sweep) if "${" in str(sweep) else str(sweep)
    places = [f"hydra.sweep.dir={literal(folder)}", f"hydra.run.dir={literal(f'{folder}/jobs/0')}"]
    places += ["hydra.output_subdir=null"]
    places += ["hydra.sweep.subdir='jobs/${hydra.job.num}'", "hydra.job.chdir=false"]
    try:
        with composed_already(), commanding(), told_of_termination(partial(stop, sweep, store)):
            for after in _rounds(sweep, plan, partial(_hand_to_hydra, asked, arguments), places):
                status, plan = after
    except KeyboardInterrupt:
        stop(sweep, store, wait_first=5.0)
        status = INTERRUPTED
        print("\nddim_lab: interrupted; the same command goes on from what is done", file=sys.stderr)
    except Terminated:
        status = TERMINATED
        print("\nddim_lab: terminated; the same command goes on from what is done", file=sys.stderr)
    finally:
        failed = _report(sweep, plan, cells)
    return status or int(failed)


def _rounds(
    sweep: Path, plan: Plan, hand_over: Callable[[Sequence[str]], int], places: Sequence[str]
) -> Iterator[tuple[int, Plan]]:
    """Hand the sweep over, once; of num_samples=auto at the N of a look, then of the next, while comparisons need more.

    Gives Hydra's exit status and the plan, which says where the sweep has come to, after each time.
    """
    from ddim_lab.store import write_record

    if plan.stop is None:
        yield hand_over(places), plan
        return
    began, rule, looks = time.monotonic(), plan.stop, len(plan.stop.counts)
    for look, count in enumerate(rule.counts, start=1):
        # Made again at the first look, if at all: the others would throw away what it has made.
        again = [] if look == 1 else ["force=false"]
        if status := hand_over([*places, f"num_samples={count}", *again]):
            yield status, plan
            return
        plan = plan.model_copy(update={"stop": rule.model_copy(update={"reached": count})})
        write_record(sweep / "plan.json", plan.content())
        found = _read(sweep, plan).findings
        left = found.need_more(rule.se, count)
        ended = "nothing" if not found else "enough" if not left else "samples" if look == looks else None
        if ended is None and rule.hours is not None and time.monotonic() - began >= 3600 * rule.hours:
            ended = "hours"
        told = f"{len(found.settled)} of {len(found.tested)} comparisons settled" if found else "nothing to compare"
        if enough := len(found.tested) - len(found.settled) - len(left):
            told += f", {enough} more need no more samples"
        print(f"ddim_lab: look {look} of {looks}, N = {count:,}: {told}", file=sys.stderr)
        plan = plan.model_copy(update={"stop": rule.model_copy(update={"reached": count, "ended": ended})})
        write_record(sweep / "plan.json", plan.content())
        yield 0, plan
        if ended is not None:
            return


def _read(folder: Path, plan: Plan) -> Sweep:
    """The sweep as it is on disk; a plan that can't be read is mended, for it was whole when the sweep began."""
    from ddim_lab.report import read_sweep
    from ddim_lab.store import read_record, set_aside, write_record

    try:
        read_record(folder / "plan.json")
    except (OSError, ValueError) as error:
        set_aside(folder / "plan.json", str(error))
        write_record(folder / "plan.json", plan.content())
    return read_sweep(folder)


def _report(folder: Path, plan: Plan, cells: Sequence[Config]) -> bool:
    """Build the report, mirror it, say where it is; whether any cell failed."""
    from ddim_lab.jobs.run import mirror_cells, mirror_report
    from ddim_lab.report import console_text, write

    started, first = time.perf_counter(), cells[0]
    try:
        sweep = _read(folder, plan)
        page, text = write(sweep), console_text(sweep)
    except Exception as error:  # whatever it is, the cells are on disk
        again = shlex.join(["python", "-m", "ddim_lab.report", str(folder)])
        print(f"ddim_lab: no report: {one_line(error)}; the cells are kept, {again} builds it", file=sys.stderr)
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exc()
        return True
    built = time.perf_counter()
    hint = None
    try:
        left = [] if plan.stop is None else mirror_cells(sweep, cells)
        hint = mirror_report(sweep, first, left)
    except Exception as error:  # of drawing its charts, for one: what is W&B's own raises nothing
        print(f"ddim_lab: the report is not mirrored in W&B: {one_line(error)}", file=sys.stderr)
    mirrored = time.perf_counter()
    print(text)
    mirror = f", W&B {mirrored - built:.1f} s" if first.logger.name == "wandb" else ""
    print(f"report: {page} (built in {built - started:.1f} s{mirror})")
    if hint is not None:
        print(f"W&B runs are offline; to upload them: {hint}")
    return any(cell.status != "done" for cell in sweep.cells)


if __name__ == "__main__":
    main()
