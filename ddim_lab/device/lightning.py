"""Lightning's Trainer as this project wants it: it says little, and Ctrl-C stays Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator

import pytorch_lightning  # noqa: F401

__all__ = ["interruptible"]

# Lightning announces devices, tips and its own reasons for stopping, and sets its level when it is imported: after
# that import it is turned down to warnings.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Wrap every call of a Trainer: Ctrl-C in it leaves as KeyboardInterrupt, and works again afterwards.

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
