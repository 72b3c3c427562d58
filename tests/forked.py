"""Code in a child of this process, which may be killed: nothing is imported again, so that many are cheap."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def start(code: Callable[[], int], output: Path) -> int:
    """Run `code` in a fork whose stdout and stderr go to a file; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        status = code()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(code: Callable[[], int], output: Path) -> tuple[int, str]:
    """`start` and `wait`: exit status and what it printed."""
    status = wait(start(code, output))
    return status, output.read_text(encoding="utf-8", errors="replace")


def ranks(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, `on_ranks` forks its processes; what they are given is pickled, as for new ones."""
    from torch.multiprocessing.spawn import start_processes

    def fork(function: Callable[..., None], args: tuple[Any, ...], nprocs: int, join: bool) -> Any:
        given = pickle.loads(pickle.dumps(args))
        return start_processes(function, given, nprocs, join, start_method="fork")  # type: ignore[no-untyped-call]

    patch.setattr("ddim_lab.device.ranks.spawn", fork)


def linger(rank: int, folder: Path) -> None:
    """A rank's work that does not end; a file says by its name which process it is. It imports next to nothing."""
    (folder / f"{os.getpid()}").touch()
    time.sleep(300)
