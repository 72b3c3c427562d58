"""Doing with the memory there is."""

from __future__ import annotations

import logging
from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["Halving"]

log = logging.getLogger("ddim_lab")


@final
class Halving(nn.Module):
    """A network whose batches follow each other in parts where the device's memory is too small for the whole.

    Images of a batch don't see each other in it, so parts give what the whole gives, but for rounding; noise, states
    and the cell's batch size stay as they are.

    Attributes:
        at_most: images of one forward; None as long as every batch went through whole.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.at_most: int | None = None

    def forward(self, x: Tensor, t: Tensor) -> Any:
        while True:
            size = len(x) if self.at_most is None else min(len(x), self.at_most)
            try:
                outputs = [self.network(*part) for part in zip(torch.split(x, size), torch.split(t, size), strict=True)]
            except torch.OutOfMemoryError as error:
                if size == 1:
                    words = " ".join(str(error).split())
                    raise RuntimeError(f"out of memory with a single image a forward: {words}") from None
            else:
                if len(outputs) == 1:
                    return outputs[0]
                return torch.cat([output if isinstance(output, Tensor) else output.sample for output in outputs])
            # Not in the except block: the error there holds on to what the failed forward had allocated.
            self.at_most = (size + 1) // 2
            if x.is_cuda:
                torch.cuda.empty_cache()
            log.warning("out of memory with %s images a forward: %s from here on, same noise", size, self.at_most)
