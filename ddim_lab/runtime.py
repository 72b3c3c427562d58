"""The device and its settings, resolved: what "auto" means here, and torch's switches for it."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ddim_lab.config import ConfigError, RuntimeConfig

__all__ = ["Precision", "Runtime"]

Precision = Literal["fp32", "tf32", "bf16"]


@final
@dataclass(frozen=True)
class Runtime:
    """Where and how a job computes; nothing in it says "auto".

    Attributes:
        device: as torch names it, as "cpu" or "cuda:0".
        device_name: the hardware's name.
        precision: fp32; tf32 (matrix products and convolutions on tensor cores); bf16 (autocast, fp32 state).
        deterministic: only deterministic kernels.
        threads: CPU threads of one operation.
    """

    device: str
    device_name: str
    precision: Precision
    deterministic: bool
    threads: int

    @classmethod
    def resolve(cls, config: RuntimeConfig) -> Runtime:
        """Settle "auto" on this machine.

        Raises:
            ConfigError: the device is unknown or not there, or does not do the precision.
        """
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
        precision = config.precision
        if precision == "auto":
            precision = "tf32" if device.type == "cuda" else "fp32"
        if precision == "tf32" and device.type != "cuda":
            raise ConfigError("runtime.precision=tf32 needs a CUDA device; use fp32 here")
        return cls(str(device), hardware, precision, config.deterministic, torch.get_num_threads())

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

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
    def accelerator(self) -> str:
        """Lightning's name for the kind of device."""
        return "gpu" if self.torch_device.type == "cuda" else "cpu"

    def training_precision(self, asked: str) -> str:
        """fp32 or bf16 for `training.precision`: auto is bf16 on a GPU that computes it natively."""
        if asked != "auto":
            return asked
        return "bf16" if self.torch_device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"

    def check_training_devices(self, count: int) -> None:
        """Raise ConfigError where a training would need more GPUs than there are; a CPU takes any number of ranks."""
        if self.torch_device.type == "cuda" and count > torch.cuda.device_count():
            raise ConfigError(f"training.devices={count}: this machine has {torch.cuda.device_count()} CUDA device(s)")

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

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set torch's switches, and put them back."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
        deterministic = torch.are_deterministic_algorithms_enabled()
        tf32 = self.precision != "fp32"
        matmul.allow_tf32, cudnn.allow_tf32 = tf32, tf32
        cudnn.benchmark, cudnn.deterministic = not self.deterministic, self.deterministic
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
            torch.use_deterministic_algorithms(deterministic)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network under this precision; its output keeps the autocast dtype, the state does not."""
        return _Autocast(network, self.torch_device.type) if self.precision == "bf16" else network


@final
class _Autocast(nn.Module):
    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network = network
        self._device_type = device_type

    def forward(self, x: Tensor, t: Tensor) -> Any:
        with torch.autocast(self._device_type, torch.bfloat16):
            return self.network(x, t)


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
