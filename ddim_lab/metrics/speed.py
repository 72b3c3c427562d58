"""Wall-clock speed of sampling: warmed up, synchronised, repeated; sampling alone, nothing else in the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Timing", "peak_memory_bytes", "synchronize", "time_repeats"]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory in use so far: the device allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None


@final
@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, and what each returned (on the CPU)."""

    seconds: tuple[float, ...]
    outputs: tuple[Tensor, ...]

    def quantile(self, q: float) -> float:
        """Quantile of the seconds, 0.5 for the median."""
        return float(np.quantile(self.seconds, q))


def time_repeats(run: Callable[[], Tensor], repeats: int, device: torch.device) -> Timing:
    """Time `run` several times, the device synchronised before each start and each stop.

    The caller warms up: the first call of a kernel chooses algorithms and compiles.
    """
    seconds, outputs = [], []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        output = run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        outputs.append(output.cpu())
    return Timing(tuple(seconds), tuple(outputs))
