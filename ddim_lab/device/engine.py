"""Wraps a network for fast inference behind the sampler's calling convention.

    x_t [B, C, H, W] fp32, t [B] int64 or fp32, for some networks labels [B] int64  ->  output [B, C, H, W] fp32,
    in x_t's memory layout; of a network that learned its variance with twice the channels

Layout, compilation and CUDA graphs change neither what the network is nor what the sampler sees. Nothing here waits
for the device once a batch size has been seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

__all__ = ["Engine", "compile_whole", "too_many_compilations"]

COMPILATIONS: Final = 64
"""Networks and batch sizes that one process may compile."""

# diffusers asks for torch's version through a cached function; torch warns of whatever cached function it compiles.
warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")

WARM_UP: Final = 3
"""Forwards before a recording: libraries choose algorithms and reserve memory in the first ones."""


def compile_whole(network: nn.Module) -> None:
    """torch.compile in place, for batches of a fixed size: the state dict keeps its keys.

    All networks and batch sizes of a process count against one limit. Past it, as at a graph break, torch would go on
    uncompiled with a warning: a whole graph is asked for, so that it is an error.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    network.compile(dynamic=False, fullgraph=True)


def too_many_compilations(option: str) -> RuntimeError:
    """What to raise for torch's FailOnRecompileLimitHit; `option` is the one that had networks compiled."""
    return RuntimeError(
        f"more than {COMPILATIONS} networks and batch sizes were compiled in this process: run the same command again,"
        f" it goes on from what is done; or set {option}=false"
    )


@final
class Engine(nn.Module):
    """A network in channels-last layout, compiled, recorded as CUDA graphs: each if asked for.

    A compiled or recorded network has a fixed batch size: larger batches go through it in parts, smaller ones are
    filled up with copies of their first image, and cut afterwards. So there is one compilation, and an image comes out
    of the same kernels in the last, partial batch as in a full one. An int64 and an fp32 t have one each.

    Args:
        network: (x_t, t) or (x_t, t, labels) -> tensor, or an object with one as `.sample`; for inference alone.
        batch_size: images of a forward, where it is fixed.
        channels_last: convert weights and inputs to [B, H, W, C] in memory.
        compiled: torch.compile, in place: the state dict keeps its keys.
        graphs: record the kernels of a forward as a CUDA graph; needs a CUDA device.
    """

    def __init__(
        self, network: nn.Module, batch_size: int, *, channels_last: bool, compiled: bool, graphs: bool
    ) -> None:
        super().__init__()
        self.forwarded: Final = _Forward(network, channels_last)
        self._fixed: Final = compiled or graphs
        self._graphs: Final = graphs
        self._size = batch_size
        self._recorded: dict[torch.dtype, _Recorded] = {}
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if compiled:
            compile_whole(self.forwarded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._recorded.clear()  # they point at weights that are about to move
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    @property
    def at_most(self) -> int | None:
        """Images of one forward, where that is fixed."""
        return self._size if self._fixed else None

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        try:
            return self._in_batches(*inputs)
        except torch.OutOfMemoryError:  # `ddim_lab.device.memory.Halving` comes again with half of it
            self._recorded.clear()
            self._size = (self._size + 1) // 2
            raise
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise too_many_compilations("runtime.compile") from None

    def _in_batches(self, *inputs: Tensor) -> Tensor:
        count, size = len(inputs[0]), self._size
        if not self._fixed or count == size:
            return self._call(*inputs)
        if count > size:
            parts = zip(*(torch.split(each, size) for each in inputs), strict=True)
            return torch.cat([self._in_batches(*part) for part in parts])
        filled = (torch.cat([each, each[:1].expand(size - count, *each.shape[1:])]) for each in inputs)
        return self._call(*filled)[:count]

    def _call(self, *inputs: Tensor) -> Tensor:
        if self._graphs:
            kind = inputs[1].dtype  # a walk has one; copied into memory of another, t would be cut off
            if kind not in self._recorded:
                self._recorded[kind] = _Recorded(self.forwarded, inputs)
            return self._recorded[kind](*inputs)
        output = self.forwarded(*inputs)
        assert isinstance(output, Tensor)
        return output


@final
class _Forward(nn.Module):
    """The network with what stands around it in every step, so that one compilation covers both."""

    def __init__(self, network: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.network = network
        self._channels_last = channels_last

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        laid_out = x.contiguous(memory_format=torch.channels_last) if self._channels_last else x
        output: Any = self.network(laid_out, *told)
        output = output if isinstance(output, Tensor) else output.sample
        assert isinstance(output, Tensor)
        return output.to(x.dtype).contiguous()


@final
class _Recorded:
    """One forward's kernels on fixed memory: inputs are copied in, the output is copied out."""

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        device = inputs[0].device
        # Not inference tensors: these may be written to in inference mode and out of it.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [torch.empty_like(each).copy_(each) for each in inputs]
            aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    network(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Without its stream it is one of the device that was current when the process first recorded anything.
            with torch.cuda.graph(self._graph, stream=aside):
                self._output = network(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        self._graph.replay()
        # Cloned, since the next replay writes there: a caller may still want it then.
        output = self._output.clone()
        assert isinstance(output, Tensor)
        return output
