"""Lightning's Trainer as this project wants it: it says little, Ctrl-C stays Ctrl-C, and no variable of the environment
changes what it does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final, final

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.rank_zero import rank_zero_only

__all__ = ["interruptible", "trainer"]

# Lightning announces devices, tips and its own reasons for stopping, and sets its level when it is imported: after
# that import it is turned down to warnings.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"pytorch_lightning\.")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Wrap every call of a Trainer: Ctrl-C in it leaves as KeyboardInterrupt, and works again afterwards.

    A Trainer that is interrupted exits with status 1 and leaves the signal ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def trainer(*, rank: int = 0, plugins: Sequence[Any] = (), **settings: Any) -> pl.Trainer:
    """A Trainer that logs and shows nothing, in this process alone or as one of the ranks of `on_ranks`.

    Lightning would take what it finds in the environment for its own: the tasks that Slurm, torchrun, LSF or Kubeflow
    have started, and PL_TRAINER_<ARGUMENT> for any argument that is not given.

    Args:
        rank: of this process.
        plugins, settings: further ones of the Trainer.
    """
    with _without_variables("PL_TRAINER_"):
        return pl.Trainer(
            plugins=[*plugins, _OurProcesses(rank)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        )


@final
class _OurProcesses(LightningEnvironment):
    """The processes of this program, on one machine; those that a cluster has started are not of one training."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._local_rank: Final = rank
        # Lightning took it from the environment when it was imported.
        rank_zero_only.rank = rank  # type: ignore[attr-defined]

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return 0


@contextlib.contextmanager
def _without_variables(prefix: str) -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefix)}
    try:
        yield
    finally:
        os.environ.update(hidden)
