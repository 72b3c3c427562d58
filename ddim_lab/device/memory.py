"""Fitting batches into available memory."""

from __future__ import annotations

import logging
from typing import Any, final

import torch
from torch import Tensor, nn

from ddim_lab.console import tick
from ddim_lab.errors import one_line

__all__ = ["Halving"]

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

    def forward(self, *inputs: Tensor) -> Any:
        """The network's output of x [B, ...], t [B] and, if it is class-conditional, labels [B]."""
        x = inputs[0]
        while True:
            size = len(x) if self.at_most is None else min(len(x), self.at_most)
            try:
                parts = zip(*(torch.split(each, size) for each in inputs), strict=True)
                outputs = [self.network(*part) for part in parts]
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
