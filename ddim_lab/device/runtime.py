"""The device and its settings, resolved: what "auto" means here, torch's switches for it, and the network under them.

A switch is off, on, or "auto", which is settled by device and aim alone, not by how much there is to do: the cells of a
sweep run under the same settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import nn

from ddim_lab.config.runtime import Part, RuntimeConfig
from ddim_lab.device.allocator import keep_freed_memory
from ddim_lab.device.cores import multiplies_bf16
from ddim_lab.device.engine import Engine
from ddim_lab.device.precision import is_narrow, lower_precision
from ddim_lab.device.reuse import reuse_memory
from ddim_lab.device.switches import only_deterministic, switches_kept
from ddim_lab.errors import ConfigError
from ddim_lab.noise import NamedNoise

__all__ = ["Precision", "Runtime"]

Precision = Literal["fp32", "tf32", "bf16", "fp16"]

LAYER_BYTES: Final = 16 * 2**20
"""Of a whole batch's output of the first layer on a CPU: from there on more images at once are no faster, and what a
kill loses grows with them. `ddim_lab/README.md` has what was measured."""

OF_A_LAYER: Final = 16
"""A U-Net's activations, of the output of its first layer: 9 to 14 of them were counted in five U-Nets."""

MEMORY_SHARE: Final = 0.5
"""Of a GPU's memory, for a batch's activations: libraries' workspaces and the allocator's gaps need the rest."""

MOST_AT_ONCE: Final = {"cpu": 512, "cuda": 2048}
"""Measured: the digits' small U-Net gains 5 % on a CPU from 512 to 1,437, CIFAR-10's 4 % on an H100 from 1,024 on."""

EXACT_AT_ONCE: Final = 256
"""Images at once of a model that is no network."""

LOW: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@final
@dataclass(frozen=True)
class Runtime:
    """Where and how a job computes; nothing in it says "auto".

    Attributes:
        device: as torch names it, as "cpu" or "cuda:0".
        device_name: the hardware's name.
        precision: fp32; tf32 (matrix products and convolutions on tensor cores); bf16 or fp16 (a U-Net's layers but for
            `keep_fp32`, whose products are tf32 on a GPU). The state is fp32 in all of them.
        keep_fp32: parts that stay fp32, or near it, in 16 bits, see `ddim_lab.device.precision`; empty in fp32 and
            tf32.
        channels_last: the network's memory layout is [B, H, W, C]. Uncompiled on a CPU, torch takes a group's variance
            there as E[x^2] - E[x]^2, which rounds more (`ddim_lab/README.md` has what was measured), and from 32 x 32
            places on an image's last bits depend on how its batch is divided among the threads.
        compile: the network goes through torch.compile, and on a GPU the noise.
        cuda_graphs: the network's kernels are recorded once for each batch size, and launched together.
        cudnn_benchmark: cuDNN tries its algorithms at the first batch of a shape and keeps the fastest.
        deterministic: only deterministic kernels.
        threads: CPU threads of one operation.
    """

    device: str
    device_name: str
    precision: Precision
    keep_fp32: tuple[Part, ...]
    channels_last: bool
    compile: bool
    cuda_graphs: bool
    cudnn_benchmark: bool
    deterministic: bool
    threads: int

    @classmethod
    def resolve(cls, config: RuntimeConfig) -> Runtime:
        """Settle "auto" on this machine; from here on the process keeps the memory that it frees.

        Raises:
            ConfigError: the device is unknown or not there, or does not do the precision.
        """
        keep_freed_memory()
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"runtime.device={name}: no such kind of device; use auto, cpu or cuda") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ConfigError(f"runtime.device={name}: this machine has no usable CUDA device; use auto or cpu")
            index = device.index or 0
            if index >= torch.cuda.device_count():
                raise ConfigError(f"runtime.device={name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
            device, hardware = torch.device("cuda", index), torch.cuda.get_device_name(index)
        elif device.type == "cpu":
            hardware = _cpu_name()
        else:
            raise ConfigError(f"runtime.device={name}: use auto, cpu or cuda")
        on_gpu = device.type == "cuda"
        precision = config.precision
        if precision == "auto":
            low = config.aim == "speed" and (on_gpu or multiplies_bf16())
            precision = "bf16" if low else "tf32" if on_gpu else "fp32"
        # On a CPU with edges alone FD moved by up to 1.1 % (experiments/README.md); a GPU's was not measured so far.
        automatic: tuple[Part, ...] = ("edges",) if on_gpu else ("edges", "norms", "outer", "weights")
        if config.precision == "auto" and not on_gpu:
            automatic += ("narrow",)  # who asks for 16 bits by name gets them
        keep = automatic if config.keep_fp32 == "auto" else config.keep_fp32
        if precision == "tf32" and not on_gpu:
            raise ConfigError("runtime.precision=tf32 needs a CUDA device; use fp32 here")
        if config.cuda_graphs is True and not on_gpu:
            raise ConfigError("runtime.cuda_graphs=true needs a CUDA device; use false or auto here")
        if config.cudnn_benchmark is True and config.deterministic:
            raise ConfigError(
                "runtime.cudnn_benchmark=true picks kernels by their time, which differs from run to run:"
                " set runtime.deterministic=false"
            )
        free = on_gpu and not config.deterministic
        # On a CPU compiling takes longer than it saves in a sweep of minutes.
        worth_compiling = not config.deterministic and (on_gpu or config.aim == "speed")
        compiled = _compiled("runtime.compile", config.compile, worth_compiling, on_gpu)
        return cls(
            device=str(device),
            device_name=hardware,
            precision=precision,
            keep_fp32=tuple(sorted(set(keep))) if precision in LOW else (),
            # Uncompiled, a CPU's group norm rounds more in it, and a GPU's takes [B, C, H, W] alone: each would be
            # turned over and back.
            channels_last=_settle(config.channels_last, compiled),
            compile=compiled,
            cuda_graphs=_settle(config.cuda_graphs, free),
            cudnn_benchmark=_settle(config.cudnn_benchmark, free),
            deterministic=config.deterministic,
            threads=torch.get_num_threads(),
        )

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def _on_gpu(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def cpu_threads(self) -> int:
        """Threads that compute; 0 where the device is no CPU."""
        return 0 if self._on_gpu else self.threads

    @property
    def has_tf32(self) -> bool:
        """Whether the device can round what it multiplies to TF32."""
        return self._on_gpu and torch.cuda.get_device_capability(self.torch_device) >= (8, 0)

    @property
    def hardware(self) -> str:
        """The one piece of hardware that this is, as locks name it: "cuda:0" is another one on every machine.

        Where a batch system gives each job a GPU of its own, all of them call theirs cuda:0.
        """
        device, host = self.torch_device, platform.node()
        if device.type == "cuda":
            return f"{host}-{torch.cuda.get_device_properties(device).uuid}"
        return f"{host}-{device}"

    @property
    def job_lock(self) -> str:
        """Name of the lock that a job holds as long as this hardware is its own."""
        return f"gpu-{self.hardware}"

    @property
    def accelerator(self) -> str:
        """Lightning's name for the kind of device."""
        return "gpu" if self._on_gpu else "cpu"

    def training_precision(self, asked: str) -> str:
        """fp32 or bf16 for `training.precision`: auto is bf16 on a GPU that computes it natively."""
        if asked != "auto":
            return asked
        return "bf16" if self._on_gpu and torch.cuda.is_bf16_supported() else "fp32"

    def training_compiled(self, asked: bool | Literal["auto"]) -> bool:
        """Whether the network is compiled for `training.compile`: auto is on a GPU.

        By the device alone: cells that differ in other settings of their runtime share one training.

        Raises:
            ConfigError: it is asked for, and this machine can't compile.
        """
        return _compiled("training.compile", asked, self._on_gpu, self._on_gpu)

    def check_devices(self, counts: Mapping[str, int]) -> None:
        """Raise ConfigError where an option asks for more GPUs than there are; a CPU takes any number of ranks."""
        for option, count in counts.items():
            if self._on_gpu and count > torch.cuda.device_count():
                raise ConfigError(f"{option}={count}: this machine has {torch.cuda.device_count()} CUDA device(s)")

    def recipe(self) -> dict[str, Any]:
        """All of it, for a cell's identity; a GPU goes by its kind: which of several it was makes no other cell."""
        return {**asdict(self), "device": self.torch_device.type}

    @classmethod
    def choices(cls, config: RuntimeConfig) -> list[Runtime]:
        """What "auto" may settle on here: each of the GPUs, or the one thing that there is.

        Raises:
            ConfigError: as `resolve`.
        """
        if config.device != "auto" or torch.cuda.device_count() < 2:
            return [cls.resolve(config)]
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [cls.resolve(config.model_copy(update={"device": name})) for name in names]

    def yardstick(self) -> Runtime:
        """What others are measured against on this device: fp32, deterministic, nothing switched on."""
        return replace(
            self,
            precision="fp32",
            keep_fp32=(),
            channels_last=False,
            compile=False,
            cuda_graphs=False,
            cudnn_benchmark=False,
            deterministic=True,
        )

    def product_dtype(self, network: nn.Module) -> torch.dtype:
        """What the matrix products of this network, as it was before `wrap`, are given."""
        if self.precision not in LOW or ("narrow" in self.keep_fp32 and is_narrow(network)):
            return torch.float32
        return LOW[self.precision]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set torch's switches, and put them back."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        tf32 = self.precision != "fp32"
        with switches_kept():
            matmul.allow_tf32, cudnn.allow_tf32 = tf32, tf32
            cudnn.benchmark, cudnn.deterministic = self.cudnn_benchmark, self.deterministic
            only_deterministic(self.deterministic)
            yield

    def wrap(self, network: nn.Module, batch_size: int) -> nn.Module:
        """The network under these settings, changed in place.

        Args:
            network: on its device.
            batch_size: images of a forward; others are possible, too.
        """
        if self.precision in LOW:
            lower_precision(network, LOW[self.precision], self.keep_fp32)
        if not (self.compile or self._on_gpu):
            reuse_memory(network, channels_last=self.channels_last)
        if not (self.precision in LOW or self.channels_last or self.compile or self.cuda_graphs):
            return network
        parts = -(-batch_size // MOST_AT_ONCE["cpu"]) if self.compile and not self._on_gpu else 1
        at_once = -(-batch_size // parts)  # equal parts: none is filled up but in the last, partial batch
        return Engine(
            network, at_once, channels_last=self.channels_last, compiled=self.compile, graphs=self.cuda_graphs
        )

    def batch_size(self, channels: int | None, shape: tuple[int, int, int]) -> int:
        """What `batch_size=auto` is, a power of two: a function of network, images, and the device's kind and memory.

        With l = 4 C_1 H W bytes, one image's output of the first layer in fp32: on a CPU LAYER_BYTES / l, on a GPU half
        of its memory / (16 l), rounded down, and MOST_AT_ONCE at most. A GPU's whole memory counts, not what is free:
        the same device gives the same number every time.

        Args:
            channels: C_1, of the U-Net's first layer; None for a model that is no network.
            shape: (C, H, W) of an image.
        """
        if channels is None:
            return EXACT_AT_ONCE
        layer, device = 4 * channels * math.prod(shape[1:]), self.torch_device
        if self._on_gpu:
            memory = int(torch.cuda.get_device_properties(device).total_memory)
            fitting = int(MEMORY_SHARE * memory) // (OF_A_LAYER * layer)
        else:
            fitting = LAYER_BYTES // layer
        return 1 << (max(1, min(fitting, MOST_AT_ONCE[device.type])).bit_length() - 1)

    def noise(self, seed: int) -> NamedNoise:
        """The noise of this seed, made the way that is fastest here."""
        return NamedNoise(seed, compiled=self.compile and self._on_gpu)  # on a CPU: a fortieth of a compiled step


def _settle(asked: bool | Literal["auto"], here: bool) -> bool:
    return here if asked == "auto" else asked


def _compiled(option: str, asked: bool | Literal["auto"], worth_it: bool, on_gpu: bool) -> bool:
    """Settle a switch of torch.compile; ConfigError where it is asked for and can't be had."""
    missing = _missing_for_compiling(on_gpu) if asked else None
    if asked is True and missing is not None:
        raise ConfigError(f"{option}=true needs {missing}; install it, or set {option}=false")
    return _settle(asked, worth_it and missing is None)


def _missing_for_compiling(on_gpu: bool) -> str | None:
    """What torch.compile lacks on this machine, or None."""
    names = [name for name in (os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "gcc", "clang") if name]
    if not any(map(shutil.which, names)):
        return "a C++ compiler"
    headers = {sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")}
    if not any((Path(folder) / "Python.h").is_file() for folder in headers):
        return "Python's headers (Debian: python3-dev)"
    return "Triton" if on_gpu and importlib.util.find_spec("triton") is None else None


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
