"""Torch's global switches, which everyone who sets them puts back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["only_deterministic", "switches_kept"]


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Put TF32, cuDNN's switches and determinism back as they were, whatever the block sets.

    With cuDNN's search for the fastest algorithms left on by a training, features of the same images would differ
    between a process that has trained and one that found its model stored.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    only, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
        only_deterministic(only, warn_only=warn)


def only_deterministic(only: bool, *, warn_only: bool = False) -> None:
    """`torch.use_deterministic_algorithms`, where that changes anything: it imports the compiler, for a second."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if before != (only, warn_only):
        torch.use_deterministic_algorithms(only, warn_only=warn_only)
