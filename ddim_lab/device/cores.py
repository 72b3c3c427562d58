"""The CPU: cores that this process may run on, and what they are fast at."""

from __future__ import annotations

import os

import torch

__all__ = ["allowed_cores", "multiplies_bf16"]


def allowed_cores() -> int:
    """Cores by the process's affinity: a batch system, or taskset, may leave it a few of the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def multiplies_bf16() -> bool:
    """Whether the cores have units for matrix products in bf16 (AMX: Intel's Xeons from 2023 on).

    With them compiled U-Nets in bf16, with what `runtime.keep_fp32=auto` keeps, were 1.4 to 1.5 times as fast as in
    fp32 ("Batches, memory and compiling" in ddim_lab/README.md); with AVX-512's bf16 alone U-Nets took as long as in
    fp32 or longer.
    """
    return bool(torch.cpu._is_amx_tile_supported())
