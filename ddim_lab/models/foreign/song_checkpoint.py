"""A checkpoint of Song et al.'s U-Net, by our names: checked, and built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ddim_lab.models.foreign.preconditioning import EpsOfNetwork, Preconditioning
from ddim_lab.models.foreign.song_unet import Resampling, SongUNet, SongUNetShape
from ddim_lab.schedule import NoiseSchedule

__all__ = ["SongCheckpoint"]


@final
@dataclass(frozen=True)
class SongCheckpoint:
    """Weights that are whole and finite, and fit a network.

    Attributes:
        state: by the names of `SongUNet`, fp32.
        shape: of the network.
        preconditioning: how it is told the noise.
        weights: whether they are an average over training.
        size: (H, W) of the images it was made for; None if the file does not say it.
    """

    state: Mapping[str, Tensor]
    shape: SongUNetShape
    preconditioning: Preconditioning
    weights: Literal["ema", "raw"]
    size: tuple[int, int] | None

    @classmethod
    def of(
        cls,
        path: str,
        state: Mapping[str, Tensor],
        resampling: Resampling,
        preconditioning: Preconditioning,
        weights: Literal["ema", "raw"],
        size: tuple[int, int] | None,
    ) -> SongCheckpoint:
        """The checkpoint, its shape told by its tensors; `path` is for messages.

        Raises:
            ValueError: one line: tensors lack, are too many, not of the shapes that the others say, or not finite.
        """
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise ValueError(f"{path}: what becomes {name} is not a tensor of floating point")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{path} holds NaN or infinite weights, in what becomes {name}")
        state = {name: tensor.float() for name, tensor in state.items()}
        try:
            shape = SongUNetShape.of(state, resampling)
            with torch.device("meta"):
                wanted = SongUNet(shape).state_dict()
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is not whole: no network has its tensors ({error})") from None
        for names, words in (
            (set(wanted) - set(state), "lacks"),
            (set(state) - set(wanted), "holds, beside what is needed,"),
        ):
            if names:
                raise ValueError(f"{path} {words} {len(names)} of the tensors, what becomes {min(names)} first")
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape:
                raise ValueError(
                    f"{path}: what becomes {name} is {_times(tensor)}, {_times(wanted[name])} would fit the others"
                )
        return cls(state, shape, preconditioning, weights, size)

    def build(self, schedule: NoiseSchedule) -> EpsOfNetwork:
        """The eps-model on our schedule, on the CPU, in evaluation mode, without gradients."""
        network = SongUNet(self.shape)
        network.load_state_dict(dict(self.state))
        model = EpsOfNetwork(network, schedule, self.preconditioning)
        return model.eval().requires_grad_(False)


def _times(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"
