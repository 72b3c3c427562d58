"""Wall-clock time and memory, and what they depend on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar, final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Contention",
    "device_seconds",
    "forward_flops",
    "peak_memory_bytes",
    "product_ceiling",
    "synchronize",
    "timed",
    "timed_libraries",
]

T = TypeVar("T")


@final
class Contention:
    """Whether another process was on the device, as far as it was looked for: at the start and at every `look`.

    Args:
        others_busy: whether one is there now.

    Attributes:
        seen: one was.
    """

    def __init__(self, others_busy: Callable[[], bool]) -> None:
        self._others_busy: Final = others_busy
        self.seen = others_busy()

    def look(self) -> None:
        """Look again; between two timings, never in one."""
        self.seen = self._others_busy() or self.seen


def timed_libraries() -> dict[str, str | int | None]:
    """Versions of what brings the kernels that are timed: a time taken with others is another measurement."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}


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


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that the device took for `run`, by its own clock where it has one (CUDA events)."""
    if device.type != "cuda":
        return timed(run, device)[1]
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)  # an event's default is the current device's, which may be another
    synchronize(device)
    start.record(stream)
    run()
    stop.record(stream)
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000.0


def forward_flops(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward, by torch's counter: 2 a multiply-add, nothing for the rest."""
    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        network(x, t)
    return int(counter.get_total_flops())


def product_ceiling(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Operations a second of a large square matrix product: what the device gives at best. Median of `rounds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    seconds = sorted(device_seconds(lambda: a @ b, device) for _ in range(rounds))
    return 2.0 * size**3 / seconds[rounds // 2]


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest memory in use so far: the device allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None
