"""conf/runtime: where a job computes, and how exactly."""

from __future__ import annotations

from typing import Literal

from pydantic import StrictBool, StrictStr

from ddim_lab.config.options import (
    Options,
    Switch,
)

__all__ = ["RuntimeConfig"]


class RuntimeConfig(Options):
    """conf/runtime: where and in what precision."""

    device: StrictStr
    aim: Literal["faithful", "speed"]
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    keep_fp32: tuple[Literal["edges", "norms", "stream"], ...]
    channels_last: Switch
    compile: Switch
    cuda_graphs: Switch
    cudnn_benchmark: Switch
    deterministic: StrictBool
