"""Wall-clock time and memory, and what they depend on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddim_lab.device.allocator import malloc_settings
from ddim_lab.device.cores import allowed_cores
from ddim_lab.store.records import Value

__all__ = [
    "OF_STEPS",
    "Contention",
    "ForwardTime",
    "PeakMemory",
    "StepClock",
    "device_seconds",
    "forward_flops",
    "larger",
    "product_ceiling",
    "synchronize",
    "time_forwards",
    "timed",
    "timed_libraries",
]

T = TypeVar("T")


WAITED_AT_MOST: Final = 0.05
"""Share of its threads' time that a process may wait for a core: idle machines show 0.01, one rival thread 0.2."""


LONG_ENOUGH: Final = 1.0
"""Seconds that a batch which is timed must take, unless it is a whole one: few images at once take longer each."""


@final
@dataclass(frozen=True)
class ForwardTime:
    """Seconds that one image takes in a forward of `images` images."""

    seconds: float
    images: int


@final
class Contention:
    """Whether something else was on the device: another job of this project, or on a CPU anything that took a core.

    What else runs on a GPU is not seen. Nor, where there are more threads than cores, is what they wait for beside each
    other.

    Args:
        others_busy: whether a job of another process is on the device now.
        threads: CPU threads that compute; 0 where the device is no CPU.

    Attributes:
        seen: a `look` found it so.
    """

    def __init__(self, others_busy: Callable[[], bool], threads: int) -> None:
        self._others_busy: Final = others_busy
        self._threads: Final = threads if threads <= _usable_cores() else 0
        self.seen = False
        self.begin()

    def begin(self) -> None:
        """What is timed begins now: what was before it does not count."""
        self._since = time.perf_counter(), _waited_for_a_core()

    def forget(self) -> None:
        """What was seen so far does not count."""
        self.seen = False

    def look(self) -> bool:
        """Whether it was so since `begin` or the last look; call it between two timings, never in one."""
        clock, waited = self._since
        self._since = time.perf_counter(), _waited_for_a_core()
        passed = (self._since[0] - clock) * self._threads
        found = self._others_busy() or self._since[1] - waited > WAITED_AT_MOST * passed > 0.0
        self.seen = self.seen or found
        return found


def _usable_cores() -> float:
    """Cores' worth of time that this process may use: by its affinity, and by its control group's quota (cgroup v2)."""
    cores = float(allowed_cores())
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))  # "max" is no number, and no limit
    return cores


def _waited_for_a_core() -> float:
    """Seconds that this process's threads were ready to run and did not; 0 where the system does not tell (Linux does).

    Source: Linux, Documentation/scheduler/sched-stats: the second number is "time spent waiting on a runqueue", in ns.
    """
    waited = 0
    for record in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            waited += int(record.read_text().split()[1])
    return waited / 1e9


def timed_libraries() -> dict[str, str | int | None]:
    """Versions of what brings the kernels that are timed, and how memory is handed out: a time taken with others is
    another measurement.
    """
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn, "malloc": malloc_settings()}


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


def time_forwards(
    network: Callable[..., object], shape: tuple[int, int, int], at_most: int, takes_labels: bool, device: torch.device
) -> ForwardTime:
    """Time one forward of a network, in batches that double from one image until one takes LONG_ENOUGH or is `at_most`.

    Args:
        network: (x_t, t) or (x_t, t, labels) -> output, on the device.
        shape: (C, H, W) of an image.
        at_most: images of a forward.
        takes_labels: whether it is class-conditional.
        device: of its forwards.
    """
    images = 1
    while True:
        x = torch.zeros(images, *shape, device=device)
        told = [torch.zeros(images, dtype=torch.int64, device=device)] * (2 if takes_labels else 1)  # t, labels
        network(x, *told)  # chooses the kernels of this size
        _, seconds = timed(lambda x=x, told=told: network(x, *told), device)  # type: ignore[misc]
        if seconds >= LONG_ENOUGH or 2 * images > at_most:
            return ForwardTime(seconds / images, images)
        images *= 2


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


@final
class StepClock:
    """A network that marks where each forward of a walk begins and ends, by the device's own clock where it has one.

    On a GPU the marks are events in the stream that computes: nothing waits for them before they are read.

    Args:
        network: (x_t, t) -> output; or with labels.
        device: of its forwards.
    """

    def __init__(self, network: Callable[..., Any], device: torch.device) -> None:
        self._network, self._device = network, device
        self._marks: list[Any] = []

    def __call__(self, *inputs: Tensor) -> Any:
        self.mark()
        output = self._network(*inputs)
        self.mark()
        return output

    def mark(self) -> None:
        """Mark this moment; once more where the walk ends."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def steps(self) -> Tensor:
        """Seconds from each forward's begin to the next one's (or the walk's end), and those of the forward itself.

        Returns:
            float64 [forwards, 2]; to be read once the device has done its work.
        """
        begins, ends, after = self._marks[:-1:2], self._marks[1::2], self._marks[2::2]
        steps = [self._between(begin, end) for begin, end in zip(begins, after, strict=True)]
        forwards = [self._between(begin, end) for begin, end in zip(begins, ends, strict=True)]
        return torch.tensor([steps, forwards], dtype=torch.float64).T

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000.0 if self._device.type == "cuda" else end - begin


def forward_flops(network: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward, by torch's counter: 2 a multiply-add, nothing for the rest."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    x, t = torch.zeros(1, *shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    # Attention is counted as the products that it is: a CPU's fused kernel is one that the counter does not know.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, t)
    return int(counter.get_total_flops())


def product_ceiling(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Operations a second of a large square matrix product: what the device gives at best. Median of `rounds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    seconds = sorted(device_seconds(lambda: a @ b, device) for _ in range(rounds))
    return 2.0 * size**3 / seconds[rounds // 2]


def larger(one: int | None, other: int | None) -> int | None:
    """The larger of two numbers of bytes, of those that are known."""
    return max((nbytes for nbytes in (one, other) if nbytes is not None), default=None)


@final
class PeakMemory:
    """Context: the most memory that a GPU's allocator gives out while it runs, weights and kept batches included.

    On a CPU it is not known: what a process holds is not what it uses, since freed memory stays with it.

    Attributes:
        nbytes: bytes, once it has been left; None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device: Final = device
        self.nbytes: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.nbytes = int(torch.cuda.max_memory_allocated(self._device))


# -- what is told of a speed -----------------------------------------------------------------------------

WHOLE: Final = "Median of the repeats over one batch; quartiles in brackets."

OF_BATCHES: Final = "Of several batches in a row: the median of the repeats over all of them, with its quartiles."

OF_STEPS: Final = (
    "A cell with too few full batches has S times the median of its steps there, warm ones, with their quartiles."
)

TIMING: Final = (
    ("images_per_second", "images_per_second", "images/s", "images a second", ""),
    (
        "forward_share",
        "forward_share",
        "share",
        "forward's share",
        "Forward's share: the time inside the network's forwards over that of the whole walk, median over batches.",
    ),
    (
        "peak_memory_bytes",
        "peak_memory",
        "B",
        "peak memory",
        "Peak memory: what a GPU had allocated at most during the walk; on a CPU it is not known.",
    ),
)
"""Entry of what was timed, name of its value, unit, column of the table, note under it."""


def speed_values(found: Mapping[str, Any]) -> list[Value]:
    """The speed of a batch as a report shows it, in a table with a row a cell.

    Args:
        found: `images` of the batch, or of several, with those that were `at_once`; `seconds_median`, `seconds_q1` and
            `seconds_q3` of it over `repeats`; `images_per_second`, `seconds_per_image`; whether it was `contended`; and
            what else was taken of it: `forward_share`, `peak_memory_bytes`, `forward_images`, `warmup_seconds`; whether
            it is put together `of_steps`.
    """
    images, fair = found["images"], not found["contended"]
    at_once = found.get("at_once", images)
    timing: dict[str, Any] = {"section": "Speed", "table": "Timing", "fair": fair}
    each = Value(
        name="seconds_per_image",
        value=found["seconds_per_image"],
        unit="s/image",
        column="an image",
        quartiles=(found["seconds_q1"] / images, found["seconds_q3"] / images),
        count=at_once,
        notes=(WHOLE if at_once == images else OF_BATCHES, *([OF_STEPS] if found.get("of_steps") else [])),
        **timing,
    )
    beside = [
        Value(name=name, value=found.get(entry), unit=unit, column=column, notes=(note,) if note else (), **timing)
        for entry, name, unit, column, note in TIMING
    ]
    alone = {"images": "speed_images", "repeats": "speed_repeats"}
    alone |= {name: name for name in ("forward_images", "seconds_median", "seconds_q1", "seconds_q3", "warmup_seconds")}
    plain = [Value(name=name, value=found[entry]) for entry, name in alone.items() if entry in found]
    return [each, *beside, *plain, Value(name="contended", value=found["contended"])]
