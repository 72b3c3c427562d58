"""Large imports without the search for garbage that Python would make among what they leave."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

__all__ = ["large_imports"]


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Context: Python's collector rests; if a module was loaded, it never looks at what is there at the end of it.

    torch, Lightning and what they bring leave 750,000 objects, none of them garbage, which it would search again and
    again: 1.5 of the 5.5 s of processor time that a cell of an exact model takes from start to end (a Xeon, Python
    3.11, torch 2.14). Reference counts free as ever; only what is in a cycle and there by then stays.
    """
    enabled, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded:
            gc.freeze()
        if enabled:
            gc.enable()
