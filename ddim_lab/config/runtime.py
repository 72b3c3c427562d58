"""conf/runtime: where a job computes, and how exactly."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BeforeValidator, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from ddim_lab.config.options import (
    Options,
    Switch,
)

__all__ = ["Part", "RuntimeConfig"]

Part = Literal["edges", "outer", "norms", "narrow", "stream", "weights"]
"""Of a U-Net, what may stay fp32, or near it, in 16 bits; `ddim_lab.device.precision` says what each is."""

PARTS: Final = get_args(Part)


def _parts(given: Any) -> Any:
    listed = isinstance(given, list | tuple) and all(part in PARTS for part in given)
    if given == "auto" or listed:
        return given
    raise PydanticCustomError("parts", "must be auto or a list of {parts}", {"parts": ", ".join(PARTS)})


class RuntimeConfig(Options):
    """conf/runtime: where and in what precision."""

    device: StrictStr
    aim: Literal["faithful", "speed"]
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    keep_fp32: Annotated[Literal["auto"] | tuple[Part, ...], BeforeValidator(_parts)]
    channels_last: Switch
    compile: Switch
    cuda_graphs: Switch
    cudnn_benchmark: Switch
    deterministic: StrictBool
