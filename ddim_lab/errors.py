"""Errors as the user reads them."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(error: BaseException | str) -> str:
    """An error without line breaks, its type in front where the message alone would not tell what is wrong."""
    text = " ".join(str(error).split())
    if isinstance(error, str | ValueError | ArithmeticError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
