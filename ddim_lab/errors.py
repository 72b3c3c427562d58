"""How a command ends for its user: an exit status, and an error in one line."""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "TERMINATED", "one_line"]

FAILED: Final = 1
"""Some of what was asked for is not there; the rest is."""

BAD_INPUT: Final = 2
"""The command or its configuration is wrong; nothing was done."""

INTERRUPTED: Final = 128 + int(signal.SIGINT)
TERMINATED: Final = 128 + int(signal.SIGTERM)


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
