"""A network of another code base as diffusers' `UNet2DModel`: what all such translations share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from ddim_lab.config.model import Weights

__all__ = ["UNCHANGED", "Converted", "Renaming", "build", "family_of", "state_of", "unprefixed"]


@final
@dataclass(frozen=True)
class Converted:
    """A network and its weights, as diffusers has them.

    Attributes:
        config: arguments of `UNet2DModel`.
        state: its state dict, float32; tensors may share memory with the source's.
        source: the code base, and what of its published files it is, where that is known.
        weights: which they are, where the file shows it.
        heads: of every attention, where levels of different width have as many, which `config` can't say; else None.
        note: what was assumed, for the user; None where nothing was.
        process: what it was trained on, as a scheduler_config.json of diffusers, where that is known.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    source: str
    weights: Weights | None = None
    heads: int | None = None
    note: str | None = None
    process: dict[str, Any] | None = None


def build(converted: Converted) -> UNet2DModel:
    """The network, with copies of the weights, on the CPU, in evaluation mode, without gradients.

    Raises:
        ValueError: a tensor has not the shape that the others ask for, or is not finite; one line that names it.
    """
    try:
        with torch.device("meta"):  # nothing is initialised that is overwritten in a moment
            network = UNet2DModel(**converted.config)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"diffusers' UNet2DModel can't be built so: {str(error).splitlines()[0]}") from None
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(needed.keys() | converted.state.keys()):
        has = tuple(converted.state[name].shape) if name in converted.state else None
        if has != needed.get(name):
            raise ValueError(
                f"{name} (as diffusers names it) is {has}, and the other tensors ask for {needed.get(name)}"
            )
    state = {name: _copy(name, tensor) for name, tensor in converted.state.items()}
    network.load_state_dict(state, assign=True)
    if converted.heads is not None:
        for module in network.modules():
            if isinstance(module, Attention):
                module.heads, module.scale = converted.heads, (module.inner_dim // converted.heads) ** -0.5
    return network.eval().requires_grad_(False)


def _copy(name: str, tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    if tensor.numel() and not all(math.isfinite(end) for end in torch.aminmax(copy)):  # one pass; NaN spreads to both
        raise ValueError(f"it holds NaN or infinite weights: {name} (as diffusers names it)")
    return copy


def _kernel(channels: int, spatial: list[list[float]]) -> Tensor:
    """A convolution's weight [channels, channels, k, k] that does the same to each channel by itself."""
    return torch.einsum("oi,hw->oihw", torch.eye(channels), torch.tensor(spatial))


UNCHANGED: Final = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
"""The kernel that leaves an image as it is."""


# -- the source ------------------------------------------------------------------------------------------


@final
class Renaming:
    """Takes tensors of a state dict one by one, each once, and gives them their names in diffusers.

    Attributes:
        state: what was given a name so far.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)
        self.state: dict[str, Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._left

    def count(self, pattern: str) -> int:
        """One more than the largest number where `pattern` has its group, among the names that are left; 0 if none."""
        found = (re.match(pattern, name) for name in self._left)
        return max((int(each[1]) + 1 for each in found if each), default=0)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Of a tensor that is left; ValueError if it is missing, or has another number of dimensions."""
        shape = tuple(self._get(name).shape)
        if len(shape) != dimensions:
            raise ValueError(f"{name} has {len(shape)} dimensions: {dimensions} are needed")
        return shape

    def take(self, name: str) -> Tensor:
        """A tensor, which is then used up; ValueError if it is missing."""
        tensor = self._get(name)
        del self._left[name]
        return tensor

    def move(self, source: str, target: str, linear: bool = False) -> None:
        """Weight and bias of a module; of a convolution of one pixel as those of a `linear` layer."""
        weight = self.take(f"{source}.weight")
        if linear and weight.ndim < 3:
            raise ValueError(f"{source}.weight has {weight.ndim} dimensions: a convolution's is needed")
        self.state[f"{target}.weight"] = weight.flatten(1) if linear else weight
        self.state[f"{target}.bias"] = self.take(f"{source}.bias")

    def resample(self, source: str, target: str, channels: int, spatial: list[list[float]]) -> None:
        """The convolution of a resampling layer; where it has none, that of kernel `spatial`, which does the same."""
        if f"{source}.weight" in self:
            self.move(source, target)
        else:
            self.state[f"{target}.weight"] = _kernel(channels, spatial)
            self.state[f"{target}.bias"] = torch.zeros(channels)

    def finish(self) -> dict[str, Tensor]:
        """All that was given a name; ValueError if anything was left."""
        if self._left:
            further = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            raise ValueError(f"it holds, beside what its network needs, {sorted(self._left)[0]}{further}")
        return self.state

    def _get(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(f"it lacks {name}")
        return self._left[name]


FLOATS: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def state_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, without the prefix that DataParallel puts before every name.

    Raises:
        ValueError: something in it is no tensor of floating point; what it looks like, and what to do.
    """
    if "pytorch-lightning_version" in content:
        raise ValueError(
            "it is a checkpoint of Lightning's training: write its state dict alone, without the prefix of its module,"
            " with torch.save, and give that"
        )
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name: tensors by name (a state dict) are needed")
        if isinstance(value, Mapping):
            held = ", ".join(sorted(map(str, content))[:6])
            raise ValueError(
                f"it holds {held}: a training's checkpoint, whose parts only its author knows; write the state dict of"
                " its network alone with torch.save, and give that"
            )
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: tensors by name (a state dict) are needed")
        if value.dtype not in FLOATS or value.is_sparse:
            raise ValueError(f"{name} is not of floating point ({value.dtype}): quantised weights are not supported")
    return unprefixed(content)


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without `module.` before every name, where DataParallel put it."""
    prefix = "module."
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


_FAMILIES: Final = (
    ("ddim", r"temb\.dense\.0\.weight$", "ermongroup/ddim (model=official)"),
    ("classifier", r"out\.(1\.positional_embedding|3\.weight)$", "a classifier of openai/guided-diffusion"),
    ("adm", r"time_embed\.0\.weight$", "openai/improved-diffusion or guided-diffusion (model=adm)"),
    ("diffusers", r"time_embedding\.linear_1\.weight$", "diffusers (give its folder to model=pretrained)"),
    ("latent", r"(model\.diffusion_model|first_stage_model)\.", "latent diffusion, whose images are codes"),
    ("transformer", r"x_embedder\.", "a diffusion transformer"),
    ("edm", r"(model\.)?map_layer0\.weight$", "NVlabs/edm"),
    ("score_sde", r"all_modules\.0\.", "yang-song/score_sde_pytorch"),
    ("lucidrains", r"(model\.)?init_conv\.weight$", "lucidrains/denoising-diffusion-pytorch"),
    ("pytorch_ddpm", r"time_embedding\.timembedding\.", "w86763777/pytorch-ddpm"),
    ("autoencoder", r"encoder\.down\.0\.", "an autoencoder"),
)
"""Code bases by a name that only their networks have, for whoever gives a file to the wrong one."""


def family_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Which code base a state dict is of, by the names in it: a short name, and words for the user; None: not known."""
    known = list(names)
    for short, pattern, words in _FAMILIES:
        if any(re.match(pattern, name) for name in known):
            return short, words
    return None
