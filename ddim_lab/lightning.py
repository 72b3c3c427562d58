"""Lightning's Trainer as this project wants it: it says little, Ctrl-C stays Ctrl-C, and torch's switches stay put."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator

import pytorch_lightning  # noqa: F401
import torch

__all__ = ["interruptible", "switches_kept"]

# Lightning announces devices, tips and its own reasons for stopping, and sets its level when it is imported: after
# that import it is turned down to warnings.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Round every call of a Trainer: Ctrl-C in it leaves as KeyboardInterrupt, and works again afterwards.

    A Trainer that is interrupted exits with status 1 and leaves the signal ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Round a Trainer from its making to its end: what it sets for a training is not left on for what comes after it.

    With cuDNN's search for the fastest algorithms still on, features of the same images would differ between a process
    that has trained and one that found its model stored.
    """
    cudnn = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    only, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        torch.use_deterministic_algorithms(only, warn_only=warn)
