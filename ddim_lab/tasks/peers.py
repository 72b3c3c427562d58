"""Other people's loops around a network, each in a process of its own, which nothing of ours has touched.

    diffusers             its DDIMPipeline as a user calls it: fp32, torch's own switches
    diffusers, optimised  the same with what its documentation of inference names: fp16 weights, channels-last,
                          torch.compile; on a CPU channels-last, and torch.compile where the job's runtime compiles
    paper's code          the loop of the paper's published code, written again from its formulas: alpha_bar is
                          computed anew in every step, noise drawn whatever eta is, and each state and prediction sent
                          to the host

All start from nothing and end with images in the host's memory. The allocator is the C library's as it comes: what
`ddim_lab.device.allocator` sets holds for a whole process.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.multiprocessing import get_context

from ddim_lab.data.images import to_uint8
from ddim_lab.errors import one_line
from ddim_lab.metrics.speed import Contention, timed
from ddim_lab.sampler import Sampler

__all__ = ["DIFFUSERS", "OPTIMISED", "PAPER", "Given", "Peer", "papers_loop", "peers", "pipeline"]

DIFFUSERS: Final = "diffusers"
OPTIMISED: Final = "diffusers, optimised"
PAPER: Final = "paper's code"

PATIENCE: Final = 30.0
"""Seconds that a process which is dismissed has to end by itself."""

Run = Callable[[int], object]


@final
@dataclass(frozen=True)
class Given:
    """What every peer works with; goes to another process.

    Attributes:
        network: (x_t, t) -> an object with eps as `.sample`; on a CPU the processes share the memory
            of its weights as they come (in /dev/shm), and a peer that converts them has its own.
        sampler: the walk: posterior variance, no clipping, spacing uniform.
        shape: (C, H, W) of an image.
        device: where it computes.
        compiled: the optimised pipeline may compile on a CPU, too.
    """

    network: nn.Module
    sampler: Sampler
    shape: tuple[int, int, int]
    device: torch.device
    compiled: bool


@final
class Peer:
    """One of them in its process: makes images when it is told to, and says how long it took.

    Attributes:
        name: whose loop it is.
        contended: something else took a core from it while it worked.
    """

    def __init__(self, name: str, connection: Connection) -> None:
        self.name: Final = name
        self.contended = False
        self._connection: Final = connection

    def wait(self) -> None:
        """Until it is ready: what starts up takes the cores of who is timed.

        Raises:
            RuntimeError: it failed; says how.
        """
        self._answer()

    def seconds(self, count: int) -> float:
        """Seconds that it takes for `count` images.

        Raises:
            RuntimeError: it failed; says how.
        """
        with contextlib.suppress(OSError):  # it has ended: so says what is read
            self._connection.send(count)
        seconds, contended = self._answer()
        self.contended = self.contended or contended
        return seconds

    def _answer(self) -> tuple[float, bool]:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            answer = "its process has ended"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        found: tuple[float, bool] = answer
        return found

    def forget(self) -> None:
        """What took its cores so far does not count."""
        self.contended = False

    def dismiss(self) -> None:
        """Nothing more is asked of it: its process ends."""
        self._connection.close()


@contextlib.contextmanager
def peers(given: Given, names: Iterable[str] = (DIFFUSERS, OPTIMISED, PAPER)) -> Iterator[list[Peer]]:
    """The named peers, each in a new process as long as the context lasts.

    Args:
        given: with its network on the CPU.
        names: who.
    """
    context = get_context("spawn")
    with contextlib.ExitStack() as started:
        found, processes = [], []
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(name, given, torch.get_num_threads(), theirs), daemon=True, name=name
            )
            process.start()
            theirs.close()  # where its process ends, ours finds the end of the connection
            started.callback(process.join)
            started.callback(process.kill)
            started.callback(ours.close)
            found.append(Peer(name, ours))
            processes.append(process)
        for peer in found:
            peer.wait()
        yield found
        for peer in found:
            peer.dismiss()
        for process in processes:
            process.join(PATIENCE)  # killed, it would leave what its libraries have shared


def _serve(name: str, given: Given, threads: int, connection: Connection) -> None:
    """Make images whenever a number of them is asked for, until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who has started this one
    torch.set_num_threads(threads)
    meanwhile = Contention(lambda: False, threads if given.device.type == "cpu" else 0)
    try:
        given.network.to(given.device)
        run = _run(name, given)
        connection.send((0.0, False))
        while True:
            count = connection.recv()
            meanwhile.begin()
            seconds = timed(partial(run, count), given.device)[1]
            connection.send((seconds, meanwhile.look()))
    except EOFError:
        return
    except Exception as error:  # it ends the task, in the process that asked
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {one_line(error)}")


def _run(name: str, given: Given) -> Run:
    if name == PAPER:
        betas = torch.tensor(given.sampler.schedule.betas, dtype=torch.float32, device=given.device)

        def paper(count: int) -> Tensor:
            x = torch.randn(count, *given.shape, device=given.device)
            return to_uint8(papers_loop(x, given.sampler, given.network, betas))

        return paper
    return pipeline(given, optimised=name == OPTIMISED)


def pipeline(given: Given, *, optimised: bool) -> Run:
    """diffusers' DDIMPipeline on a U-Net, with our schedule: call it with a number of images."""
    from diffusers import DDIMPipeline, DDIMScheduler

    from ddim_lab.models.unet import scheduler_config

    network: Any = given.network
    config = scheduler_config(given.sampler.schedule, {"name": "betas"})
    network.to(dtype=torch.float32)
    if optimised:
        network.to(memory_format=torch.channels_last)
        on_gpu = given.device.type == "cuda"
        if on_gpu:
            network.to(dtype=torch.float16)  # its DDIMPipeline hands images to numpy, which has no bfloat16
        if on_gpu or given.compiled:
            network.compile(fullgraph=True, dynamic=False)
    pipe = DDIMPipeline(unet=network, scheduler=DDIMScheduler.from_config(config))
    pipe.set_progress_bar_config(disable=True)
    return lambda count: pipe(batch_size=count, eta=given.sampler.eta, num_inference_steps=given.sampler.steps)


@torch.no_grad()
def papers_loop(x_T: Tensor, sampler: Sampler, network: Callable[[Tensor, Tensor], Any], betas: Tensor) -> Tensor:
    """x_0 on the host, from x_T, as the paper's code walks: every quantity a tensor that is computed in every step.

    Args:
        x_T: [B, C, H, W] on the device.
        sampler: names the timesteps and eta; posterior variance, no clipping.
        network: (x_t, t) -> an object with eps as `.sample`.
        betas: float32 [T] on the device.
    """
    states, predictions = [x_T.cpu()], []
    for transition in sampler.transitions:
        t, t_prev = (torch.full((len(x_T),), step, device=x_T.device) for step in (transition.t, transition.t_prev))
        ab, ab_prev = _alpha_bar(betas, t), _alpha_bar(betas, t_prev)
        x_t = states[-1].to(x_T.device)
        eps = network(x_t, t.float()).sample
        x_0 = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
        predictions.append(x_0.cpu())
        std = sampler.eta * ((1 - ab / ab_prev) * (1 - ab_prev) / (1 - ab)).sqrt()
        along = (1 - ab_prev - std**2).sqrt()
        states.append((ab_prev.sqrt() * x_0 + std * torch.randn_like(x_t) + along * eps).cpu())
    return states[-1]


def _alpha_bar(betas: Tensor, t: Tensor) -> Tensor:
    with_clean = torch.cat([torch.zeros(1, device=betas.device), betas])
    return (1 - with_clean).cumprod(0).index_select(0, t + 1)[:, None, None, None]
