"""One function on several processes of this machine, which find each other as those of a launcher do."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import active_children
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from ddim_lab.errors import Terminated

__all__ = ["on_ranks"]


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


def _call(
    rank: int, count: int, port: int, threads: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads)
    function(rank, *arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
