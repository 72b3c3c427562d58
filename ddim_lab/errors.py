"""Errors as the user reads them."""

from __future__ import annotations

__all__ = ["one_line"]


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
