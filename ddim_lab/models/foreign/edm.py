"""Networks of NVlabs/edm (Karras et al. 2022): `SongUNet` in any of its preconditionings, from a converted file.

What is published is a pickle that holds its own source code, and loading it runs that. It is refused with the line that
converts it in a clone of its repository, to a file of tensors, numbers and the names of two classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddim_lab.models.foreign.files import read_state
from ddim_lab.models.foreign.preconditioning import Edm, Preconditioning, VarianceExploding, VariancePreserving
from ddim_lab.models.foreign.song_checkpoint import SongCheckpoint
from ddim_lab.models.foreign.song_unet import Resampling

__all__ = ["RECIPE", "read_edm"]

RECIPE: Final = (
    "python -c \"import pickle, sys, torch; n = pickle.load(open(sys.argv[1], 'rb'))['ema']; torch.save("
    "{'class': type(n).__name__, 'model': type(n.model).__name__, 'state': dict(n.state_dict()),"
    " 'settings': {k: v for k, v in vars(n).items() if type(v) in (int, float)}}, sys.argv[2])\" FILE.pkl FILE.pt"
)
"""What converts FILE.pkl to FILE.pt; to be run in a clone of github.com/NVlabs/edm."""

_PICKLED: Final = b"\x80"
"""How a pickle begins, and no file of torch.save or safetensors does that is converted by `RECIPE`."""


def read_edm(path: str) -> SongCheckpoint:
    """The network in a converted file.

    Args:
        path: of a file that `RECIPE` wrote.

    Raises:
        ValueError: one line: the file is a pickle, is not what the recipe writes, or holds a network of another kind.
    """
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            if file.read(1) == _PICKLED:
                raise ValueError(
                    f"{path} is a pickle, which only running code would load; where you trust it, convert it in a clone"
                    f" of github.com/NVlabs/edm: {RECIPE}"
                )
    content = read_state(path)
    state, settings = content.get("state"), content.get("settings")
    if set(content) != {"class", "model", "state", "settings"} or not (
        isinstance(state, Mapping) and isinstance(settings, Mapping)
    ):
        held = ", ".join(sorted(content)[:3])
        raise ValueError(
            f"{path} holds {held}, not the class, model, state and settings of a converted network: convert"
            f" the published pickle in a clone of github.com/NVlabs/edm: {RECIPE}"
        )
    if content["model"] != "SongUNet":
        raise ValueError(f"{path} is a {content['model']}: of EDM's networks SongUNet (DDPM++, NCSN++) is supported")
    preconditioning = _preconditioning(path, content["class"], settings)
    renamed, size = _renamed(path, state)
    return SongCheckpoint.of(path, renamed, _resampling(path, state), preconditioning, "ema", (size, size))


def _preconditioning(path: str, name: Any, settings: Mapping[str, Any]) -> Preconditioning:
    try:
        if name == "EDMPrecond":
            return Edm(sigma_data=float(settings["sigma_data"]))
        if name == "VPPrecond":
            low = float(settings["beta_min"])
            high = round(low + float(settings["beta_d"]), 9)  # 0.1 + 19.9 is 20
            return VariancePreserving(beta_min=low, beta_max=high, top=float(settings["M"]) - 1.0)
        if name == "VEPrecond":
            return VarianceExploding()
    except KeyError as lacking:
        raise ValueError(f"{path} lacks the setting {lacking} of {name}: convert it again by {RECIPE}") from None
    raise ValueError(f"{path} has the preconditioning {name}: EDMPrecond, VPPrecond and VEPrecond are supported")


# -- names ----------------------------------------------------------------------------------------------

_IN_BLOCK: Final = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
    "norm2": "attention.group_norm",
    "qkv": "attention.to_qkv",
    "proj": "attention.to_out.0",
}

_MAPPING: Final = {
    "model.map_noise.freqs": "time_features.frequencies",
    "model.map_label.weight": "class_embedding.linear.weight",
    "model.map_label.bias": "class_embedding.linear.bias",
    "model.map_layer0.weight": "time_embedding.linear_1.weight",
    "model.map_layer0.bias": "time_embedding.linear_1.bias",
    "model.map_layer1.weight": "time_embedding.linear_2.weight",
    "model.map_layer1.bias": "time_embedding.linear_2.bias",
}

_AUGMENT: Final = "model.map_augment.weight"
"""What it is multiplied by says how a training image was distorted: 0 of an image that was not, as those are that one
wants. It has no bias, so that leaving it out changes nothing."""

_FILTERS: Final = ".resample_filter"

_LAYER: Final = re.compile(r"model\.(enc|dec)\.(\d+)x\2_(conv|down|up|in0|in1|block\d+|aux_\w+?)\.(.+)")


def _renamed(path: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors by our names, and the side of images."""
    layers = [found for name in state if (found := _LAYER.fullmatch(str(name)))]
    size = max((int(found[2]) for found in layers), default=0)
    deepest = min((int(found[2]) for found in layers), default=0)
    if not deepest:
        raise ValueError(f"{path} holds no layers of a SongUNet (model.enc, model.dec)")
    renamed = {}
    for name, tensor in state.items():
        if name == _AUGMENT or name.endswith(_FILTERS):
            continue
        ours = _MAPPING.get(name) or _layer(name, size, deepest)
        if ours is None:
            raise ValueError(f"{path} holds {name}, which is no part of DDPM++ or NCSN++ as EDM has them")
        if ours.endswith(("to_qkv.weight", "to_qkv.bias", "to_out.0.weight")):
            tensor = _in_order(ours, tensor)
        renamed[ours] = tensor
    return renamed, size


def _layer(name: str, size: int, deepest: int) -> str | None:
    """Our name of a tensor of the encoder or decoder; None where there is none."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    side, side_name, kind, inside = found[1], int(found[2]), found[3], found[4]
    level = (size // side_name).bit_length() - 1
    at = f"down.{level}" if side == "enc" else f"up.{(size // deepest).bit_length() - 1 - level}"
    if kind in ("conv", "aux_norm", "aux_conv"):
        ours = {"conv": "conv_in", "aux_norm": "conv_norm_out", "aux_conv": "conv_out"}[kind]
        return f"{ours}.{inside}" if side_name == size else None  # a decoder with outputs at each level is another
    if kind == "aux_residual":
        return f"{at}.pyramid.conv.{inside}"
    place = {"down": f"{at}.into", "up": f"{at}.into", "in0": "middle.0", "in1": "middle.1"}.get(kind)
    if place is None and kind.startswith("block"):
        place = f"{at}.blocks.{kind.removeprefix('block')}"
    layer, _, last = inside.rpartition(".")
    return f"{place}.{_IN_BLOCK[layer]}.{last}" if place and layer in _IN_BLOCK else None


def _in_order(name: str, tensor: Tensor) -> Tensor:
    """A 1x1 convolution as a linear layer; q, k and v one after another, which are stored channel by channel."""
    tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
    if "to_qkv" not in name or len(tensor) % 3:
        return tensor
    return torch.cat([tensor[first::3] for first in range(3)])


def _resampling(path: str, state: Mapping[str, Any]) -> Resampling:
    """By the stored filters, each of them a row of numbers by itself."""
    filters = [tensor for name, tensor in state.items() if name.endswith(_FILTERS)]
    known: dict[Resampling, tuple[float, ...]] = {"box": (1.0, 1.0), "fir": (1.0, 3.0, 3.0, 1.0)}
    for kind, taps in known.items():
        row = torch.tensor(taps) / sum(taps)
        square = (row[:, None] * row)[None, None]
        if all(tensor.shape == square.shape and torch.allclose(tensor.float(), square) for tensor in filters):
            return kind
    raise ValueError(f"{path} resamples with a filter that is neither 1, 1 nor 1, 3, 3, 1")
