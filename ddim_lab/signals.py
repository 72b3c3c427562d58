"""SIGTERM as an exception, so that what a scheduler or `kill` ends is left in order, as Ctrl-C leaves it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import final

__all__ = ["Terminated", "terminable", "terminating"]

_terminating = threading.Event()


@final
class Terminated(BaseException):
    """This process was sent SIGTERM."""


def terminating() -> bool:
    """Whether SIGTERM came: an error after that is one of the way out, which it must not stop."""
    return _terminating.is_set()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Wraps a command: the first SIGTERM in it raises `Terminated`; further ones do not cut short what follows from it.

    A Trainer's own handler calls the one that it finds here.
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
            raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _terminating.clear()
