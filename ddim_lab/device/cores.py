"""CPU cores that this process may run on."""

from __future__ import annotations

import os

__all__ = ["allowed_cores"]


def allowed_cores() -> int:
    """Cores by the process's affinity: a batch system, or taskset, may leave it a few of the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
