"""One function on several processes of this machine, which find each other as those of a launcher do."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.multiprocessing import active_children
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from ddim_lab.device.allocator import keep_freed_memory
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import Terminated
from ddim_lab.store import Store

__all__ = ["devices_of_ranks", "on_ranks"]

log = logging.getLogger("ddim_lab")


def on_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call function(rank, *arguments) for rank 0 ... count - 1, each in a process of its own, and wait for all.

    The processes have RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment. One that fails
    stops the others.

    Args:
        count: number of processes.
        function: of a module, so that a new process can import it.
        arguments: can be pickled.

    Raises:
        RuntimeError: one of them failed; names its rank and its error.
    """
    given = (count, _free_port(), torch.get_num_threads(), function, arguments)
    try:
        started = spawn(_call, args=given, nprocs=count, join=False)  # type: ignore[no-untyped-call]
        while not started.join():
            pass
    except ProcessRaisedException as error:
        raise RuntimeError(f"rank {error.error_index}: {str(error).strip().splitlines()[-1]}") from error
    except ProcessExitedException as error:
        raise RuntimeError(f"rank {error.error_index} ended before its work was done: {error}") from error
    except (KeyboardInterrupt, Terminated):  # which a Ctrl-C alone would have told them, too
        for process in active_children():
            process.kill()
        raise


@contextlib.contextmanager
def devices_of_ranks(store: Store, runtime: Runtime, count: int, *, all_of_them: bool = False) -> Iterator[list[str]]:
    """Devices for the processes of a job, one each: its own, then GPUs that no other job has; a CPU is shared by all.

    None is waited for: two jobs that each hold a GPU would wait for the other's.

    Args:
        store: where jobs hold their GPUs.
        runtime: of the job.
        count: number of processes.
        all_of_them: as many devices as processes, also where other jobs have some (they wait for the model, mostly);
            else fewer, where not as many are free.
    """
    if runtime.torch_device.type != "cuda":
        yield [runtime.device] * count
        return
    others = {f"cuda:{index}": replace(runtime, device=f"cuda:{index}") for index in range(torch.cuda.device_count())}
    others.pop(runtime.device)
    locks = {other.job_lock: device for device, other in others.items()}
    with store.some_of(list(locks), count - 1) as held:
        free = [locks[name] for name in held]
        taken = [device for device in others if device not in free][: count - 1 - len(free)]
        if taken and not all_of_them:
            log.info("%s of %s GPUs: other jobs have the rest", 1 + len(free), count)
        yield [runtime.device, *free, *(taken if all_of_them else [])]


def _call(
    rank: int, count: int, port: int, threads: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of a torchrun around all of this, whose ranks these are not
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads)
    keep_freed_memory()
    function(rank, *arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
