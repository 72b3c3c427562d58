"""Wall-clock time and memory, measured so that they mean what they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["peak_memory_bytes", "synchronize", "timed"]

T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `run` returns and the seconds it took, the device synchronised before the start and before the stop.

    The caller warms up: the first call of a kernel chooses algorithms and compiles.
    """
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory in use so far: the device allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None
