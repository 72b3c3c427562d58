"""Fitting batches into available memory, and how much of it a forward takes."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddim_lab.console import tick
from ddim_lab.errors import one_line

__all__ = ["Halving", "forward_bytes"]

log = logging.getLogger("ddim_lab")


@final
class Halving(nn.Module):
    """Splits a batch into smaller forwards when it does not fit in device memory.

    Images in a batch do not interact, so the parts give what the whole gives, up to rounding; noise, states and the
    cell's batch size stay as they are.

    Attributes:
        at_most: images of one forward; None until a batch has been split.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.at_most: int | None = None

    def at_once(self, count: int) -> int:
        """Images of the largest forward that a batch of `count` takes, by this network and the one in it."""
        limits = (self.at_most, getattr(self.network, "at_most", None))
        return min([count, *(limit for limit in limits if limit is not None)])

    def forward(self, x: Tensor, t: Tensor) -> Any:
        while True:
            size = len(x) if self.at_most is None else min(len(x), self.at_most)
            try:
                outputs = [self.network(*part) for part in zip(torch.split(x, size), torch.split(t, size), strict=True)]
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise RuntimeError(f"out of memory with a single image a forward: {one_line(error)}") from None
            else:
                tick()
                if len(outputs) == 1:
                    return outputs[0]
                return torch.cat([output if isinstance(output, Tensor) else output.sample for output in outputs])
            # Not in the except block: the error there holds on to what the failed forward had allocated.
            self.at_most = (size + 1) // 2
            if x.is_cuda:
                torch.cuda.empty_cache()
            log.warning("out of memory with %s images a forward: %s from here on, same noise", size, self.at_most)


@torch.no_grad()
def forward_bytes(network: nn.Module, shape: tuple[int, int, int], batch_size: int = 1) -> int:
    """Largest number of bytes that a forward's activations take at once; without weights and a library's workspaces.

    Found without taking it, on tensors that have shapes and no data.

    Args:
        network: (x_t, t) -> anything; not run and not moved.
        shape: (C, H, W) of an image.
        batch_size: images at once.
    """
    shadow = copy.deepcopy(network).to("meta")
    x = torch.empty(batch_size, *shape, device="meta")
    t = torch.empty(batch_size, dtype=torch.int64, device="meta")
    with _Live([x, t, *shadow.parameters(), *shadow.buffers()]) as live:
        shadow(x, t)
    return int(live.peak)


@final
class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, as long as something holds them.

    Args:
        there: tensors that existed before; views of them are not counted.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _release(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size
