"""Jobs in processes of their own, which a launcher has started: what ends their command ends them, in order.

<sweep>/jobs/<number>/process    machine and number of the process that a job runs in, as long as it does
<sweep>/jobs/stopped             the command was ended: jobs that were still waiting do not begin
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ddim_lab.errors import TERMINATED, Terminated, terminable
from ddim_lab.store import Store, write_text
from ddim_lab.store.housekeeping import works_here

__all__ = ["commanding", "ended_with_its_command", "known_to_its_command", "may_begin", "stop"]

COMMAND: Final = "DDIM_LAB_COMMAND"
"""The command's own process, for jobs wherever they run."""

PATIENCE: Final = 10.0
"""Seconds that jobs have to leave things in order."""


def _process() -> str:
    return f"{platform.node()} {os.getpid()}"


def _in_worker() -> bool:
    return os.environ.get(COMMAND) != _process()


@contextlib.contextmanager
def commanding() -> Iterator[None]:
    """Wraps what starts jobs: this process is their command."""
    os.environ[COMMAND] = _process()
    try:
        yield
    finally:
        os.environ.pop(COMMAND)


def may_begin(sweep: Path) -> None:
    """Forget how an earlier command in this folder ended."""
    for left in (*sweep.glob("jobs/*/process"), sweep / "jobs" / "stopped"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def ended_with_its_command() -> Iterator[None]:
    """Wraps a job: in a process of a launcher's SIGTERM ends it as it ends a command, and the process with it.

    Where Slurm has started the process, SIGTERM is submitit's own: it comes before the job is queued again.
    """
    if not _in_worker():
        yield
        return
    launchers = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and os.environ.get("SUBMITIT_EXECUTOR") != "local"
    try:
        with contextlib.nullcontext() if launchers else terminable():
            yield
    except (KeyboardInterrupt, Terminated):
        logging.shutdown()
        os._exit(TERMINATED)  # the launcher would have it begin the next job


@contextlib.contextmanager
def known_to_its_command(job: Path) -> Iterator[None]:
    """Wraps what runs in a job's folder while the store is marked as worked on.

    Raises:
        Terminated: its command was ended before the job began.
    """
    if not _in_worker():
        yield
        return
    try:
        write_text(job / "process", _process())  # first, so that either sees the other
        if (job.parent / "stopped").exists():
            raise Terminated
        yield
    finally:
        (job / "process").unlink(missing_ok=True)


def stop(sweep: Path, store: Store, *, wait_first: float = 0.0) -> None:
    """Tell the sweep's jobs in other processes of this machine to end, and wait until they have; none begins any more.

    Args:
        sweep: the sweep's folder.
        store: its outputs.
        wait_first: seconds in which they may end by themselves: of Ctrl-C a terminal has told them already.
    """
    with contextlib.suppress(OSError):
        (sweep / "jobs" / "stopped").touch()
    told: set[int] = set()
    began = time.monotonic()
    while running := _running(sweep, store):
        waited = time.monotonic() - began - wait_first
        for process in running - told if 0 <= waited < PATIENCE else running if waited >= PATIENCE else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGTERM if waited < PATIENCE else signal.SIGKILL)
            told.add(process)
        if waited >= 2 * PATIENCE:
            return
        time.sleep(0.05)


def _running(sweep: Path, store: Store) -> set[int]:
    """Processes of this machine that the sweep's jobs run in."""
    found = set()
    for file in sweep.glob("jobs/*/process"):
        with contextlib.suppress(OSError, ValueError):
            machine, _, process = file.read_text(encoding="utf-8").rpartition(" ")
            if machine == platform.node() and int(process) != os.getpid() and works_here(store, int(process)):
                found.add(int(process))
    return found
