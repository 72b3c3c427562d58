"""How a command ends for its user: an exit status, an error in one line, and signals that leave things in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, final

from ddim_lab.console import forgiving_output

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "FULL_ERROR",
    "INTERRUPTED",
    "TERMINATED",
    "TRACEBACKS",
    "ConfigError",
    "Terminated",
    "exit_status",
    "one_line",
    "terminable",
    "terminating",
    "told_of_termination",
]

FAILED: Final = 1
"""Some of what was asked for is not there; the rest is."""

BAD_INPUT: Final = 2
"""The command or its configuration is wrong; nothing was done."""

INTERRUPTED: Final = 128 + int(signal.SIGINT)
TERMINATED: Final = 128 + int(signal.SIGTERM)

FULL_ERROR: Final = "HYDRA_FULL_ERROR"
"""Set to 1, every command shows its errors with their tracebacks."""

TRACEBACKS: Final = "DDIM_LAB_TRACEBACKS"
"""Set to 1 by the command line, for jobs wherever they run, where HYDRA_FULL_ERROR=1 asks for tracebacks."""


class ConfigError(ValueError):
    """What the user gave is wrong; the message is one line that says what and what to do."""


@final
class Terminated(BaseException):
    """This process was sent SIGTERM."""


def one_line(error: BaseException | str) -> str:
    """Text without line breaks; of an error, its type in front where the message alone would not tell what is wrong."""
    text = " ".join(str(error).split())
    if isinstance(error, str):
        return text
    if isinstance(error, MemoryError) or "can't allocate memory" in text:  # numpy's, torch's on a CPU
        return f"out of memory ({text}): lower batch_size, or num_samples" if text else "out of memory"
    if isinstance(error, ValueError | ArithmeticError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exit_status(body: Callable[[], int], *, resumes: bool = False) -> int:
    """Run a command's body; its exit status, or that of the error that ended it, told in one line on stderr.

    Every command line goes through here: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM.

    Args:
        body: does what was asked for; gives the exit status.
        resumes: whether the same command, typed again, goes on from what is done.
    """
    with forgiving_output():
        return _status(body, "; the same command goes on from what is done" if resumes else "")


def _status(body: Callable[[], int], further: str) -> int:
    try:
        with terminable():
            return body()
    except ConfigError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        return _ended(one_line(error), BAD_INPUT)
    except (OSError, RuntimeError, ValueError, ArithmeticError, MemoryError, ImportError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        return _ended(one_line(error), FAILED)
    except KeyboardInterrupt:
        return _ended(f"interrupted{further}", INTERRUPTED)
    except Terminated:
        return _ended(f"terminated{further}", TERMINATED)


def _ended(message: str, status: int) -> int:
    print(f"ddim_lab: {message}", file=sys.stderr)
    return status


# -- SIGTERM ---------------------------------------------------------------------------------------------

_terminating = threading.Event()
_told: list[Callable[[], None]] = []


def terminating() -> bool:
    """Whether SIGTERM came: an error after that is one of the way out, which it must not stop."""
    return _terminating.is_set()


@contextlib.contextmanager
def told_of_termination(tell: Callable[[], None]) -> Iterator[None]:
    """Wraps work that other processes do: `tell` is called at SIGTERM, before what waits for them here is ended."""
    _told.append(tell)
    try:
        yield
    finally:
        _told.remove(tell)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Wraps a command: the first SIGTERM in it raises `Terminated`; further ones do not cut short what follows from it.

    What a scheduler or `kill` ends is so left in order, as Ctrl-C leaves it. A Trainer's own handler calls the one that
    it finds here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != ours:  # a fork, as of a data loader: nobody there would catch it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not _terminating.is_set():
            _terminating.set()
            for tell in _told:
                tell()
            raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _terminating.clear()
