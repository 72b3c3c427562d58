"""Checkpoints of yang-song/score_sde_pytorch (Song et al. 2021) whose process is VP or sub-VP.

A file holds the training's state: `model` (the raw weights), `ema` (their average: a list in the order of the
parameters, without names), optimizer and step. Layers are numbered in the order in which they are used, with nothing
said of what they are: it is told by what each consists of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ddim_lab.models.foreign.files import read_state
from ddim_lab.models.foreign.preconditioning import DiscreteVp, Preconditioning, SubVp, VariancePreserving
from ddim_lab.models.foreign.song_checkpoint import SongCheckpoint
from ddim_lab.models.foreign.song_unet import Resampling

__all__ = ["PROCESSES", "read_score_sde"]

PROCESSES: Final[dict[str, Preconditioning]] = {
    "vp": VariancePreserving(),
    "vp_discrete": DiscreteVp(),
    "subvp": SubVp(),
}
"""By name: trained in continuous time, at Ho et al.'s 1000 timesteps, or with the sub-VP process."""


def read_score_sde(path: str, process: str, weights: Literal["ema", "raw"]) -> SongCheckpoint:
    """The network in a training's checkpoint.

    Args:
        path: of the .pth file.
        process: one of `PROCESSES`; no checkpoint says it.
        weights: which of the two it holds.

    Raises:
        ValueError: one line: the file can't be read without running code, is no such checkpoint, or of a network or a
            process that is not known here.
    """
    content = read_state(path)
    state, ema = content.get("model"), content.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(shadow, Sequence):
        raise ValueError(
            f"{path} holds {', '.join(sorted(map(str, content))[:3])}, not model and ema of a checkpoint of"
            " score_sde_pytorch"
        )
    named = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    layers = _layers(path, named)
    if weights == "ema":
        named.update(_averaged(path, named, shadow))
    try:
        renamed, resampling = _renamed(path, layers, named)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is not whole: layers of it lack tensors ({error})") from None
    size = _size(renamed)
    return SongCheckpoint.of(path, renamed, resampling, PROCESSES[process], weights, size)


def _averaged(path: str, named: Mapping[str, Any], shadow: Sequence[Any]) -> dict[str, Tensor]:
    """The average by the parameters' names: it is kept of each, in their order. `sigmas` is no parameter."""
    names = [name for name in named if name != _SIGMAS]
    shapes = [getattr(named[name], "shape", None) for name in names]
    if [getattr(tensor, "shape", None) for tensor in shadow] != shapes:
        raise ValueError(
            f"{path}: ema holds {len(shadow)} averages, which are not those of its {len(names)} parameters in their"
            " order; model.weights=raw takes the parameters"
        )
    return dict(zip(names, shadow, strict=True))


# -- layers -----------------------------------------------------------------------------------------------

_SIGMAS: Final = "sigmas"
"""Levels of a VE process, which every network has as a buffer and a VP one does not use."""

Kind = Literal["linear", "convolution", "block", "attention", "norm", "pyramid", "resample"]

_KINDS: Final[dict[frozenset[str], Kind]] = {
    frozenset({"GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3"}): "attention",
    frozenset({"GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1"}): "block",
    frozenset({"GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2"}): "block",
    frozenset({"GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "NIN_0"}): "block",
    frozenset({"Conv2d_0"}): "pyramid",
    frozenset({"Conv_0"}): "resample",
}

_IN_BLOCK: Final = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}


def _layers(path: str, named: Mapping[str, Any]) -> list[tuple[Kind, dict[str, Any]]]:
    """Each numbered layer: its kind, and its tensors by their names within it."""
    found: dict[int, dict[str, Any]] = {}
    for name, tensor in named.items():
        if name == _SIGMAS:
            continue
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", name)
        if match is None or not isinstance(tensor, Tensor):
            raise ValueError(f"{path} holds {name}, which is no part of ncsnpp or ddpm of score_sde_pytorch")
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    if "W" in found.get(0, {}):
        raise ValueError(
            f"{path} has a Fourier embedding of ln(sigma): its process is variance exploding (VE); VP and sub-VP are"
            " supported"
        )
    return [(_kind(path, number, found[number]), found[number]) for number in sorted(found)]


def _kind(path: str, number: int, tensors: Mapping[str, Tensor]) -> Kind:
    weight = tensors.get("weight")
    if weight is not None and set(tensors) == {"weight", "bias"}:
        kinds: dict[int, Kind] = {1: "norm", 2: "linear", 4: "convolution"}
        kind = kinds.get(weight.ndim)
    else:
        kind = _KINDS.get(frozenset(name.rpartition(".")[0] for name in tensors))
    if kind is None or (kind == "resample" and tensors["Conv_0.weight"].shape[-1] != 3):
        raise ValueError(
            f"{path}: layer {number} ({', '.join(sorted(tensors)[:3])}) is of none of the kinds that VP checkpoints"
            " have"
        )
    return kind


def _resamples(kind: Kind, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the layer leads to another level: a block with a shortcut that it would otherwise not need does."""
    if kind == "resample":
        return True
    return kind == "block" and "Conv_2.weight" in tensors and len(set(tensors["Conv_2.weight"].shape[:2])) == 1


def _renamed(
    path: str, layers: list[tuple[Kind, dict[str, Any]]], named: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Resampling]:
    """The tensors of `named` by our names, and how images are resampled."""
    kinds = [kind for kind, _ in layers]
    between = [number for number, layer in enumerate(layers) if _resamples(*layer)]
    levels = len(between) // 2 + 1
    blocks = kinds.count("block") - sum(kinds[number] == "block" for number in between)
    a_level = (blocks - 2 - levels) // (2 * levels)  # of 2 in the middle, and one more a level on the way up
    if kinds[:3] != ["linear", "linear", "convolution"] or a_level < 1:
        raise ValueError(
            f"{path} begins with {', '.join(kinds[:3])}: a VP network has two linear layers, which are told the time,"
            " and a convolution"
        )
    places = ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    level, block, going = 0, -1, "down"
    for number in range(3, len(layers)):
        kind = kinds[number]
        if going == "out" or kind == "norm":
            places.append("conv_norm_out" if kind == "norm" else "conv_out")
            going = "out"
        elif number in between:
            level, block = level + 1, -1
            places.append(f"{going}.{level}.into")
        elif kind == "pyramid":
            places.append(f"{going}.{level}.pyramid")
        elif kind == "attention":
            places.append(places[-1])
        else:
            block += 1
            if going == "down" and level == levels - 1 and block == a_level:
                going, level, block = "middle", 0, 0
            if going == "middle" and block == 2:
                going, level, block = "up", 0, 0
            places.append(f"middle.{block}" if going == "middle" else f"{going}.{level}.blocks.{block}")
    renamed: dict[str, Tensor] = {}
    for number, ((kind, tensors), place) in enumerate(zip(layers, places, strict=True)):
        of_layer = {inside: named[f"all_modules.{number}.{inside}"] for inside in tensors}
        for ours, tensor in _tensors(kind, of_layer).items():
            renamed[f"{place}.{ours}"] = tensor
    if "resample" in kinds:
        return renamed, "convolution"
    return renamed, "fir" if "pyramid" in kinds else "box"


def _tensors(kind: Kind, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors by our names; "NIN" is a linear layer over channels, [in, out]."""
    if kind == "attention":
        return {
            "attention.group_norm.weight": tensors["GroupNorm_0.weight"],
            "attention.group_norm.bias": tensors["GroupNorm_0.bias"],
            "attention.to_qkv.weight": torch.cat([tensors[f"NIN_{i}.W"].T for i in range(3)]),
            "attention.to_qkv.bias": torch.cat([tensors[f"NIN_{i}.b"] for i in range(3)]),
            "attention.to_out.0.weight": tensors["NIN_3.W"].T,
            "attention.to_out.0.bias": tensors["NIN_3.b"],
        }
    if kind in ("pyramid", "resample"):
        return {f"conv.{name.rpartition('.')[2]}": tensor for name, tensor in tensors.items()}
    if kind != "block":
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if layer == "NIN_0":
            last, tensor = {"W": "weight", "b": "bias"}[last], tensor.T[:, :, None, None] if last == "W" else tensor
        found[f"{_IN_BLOCK[layer]}.{last}"] = tensor
    return found


def _size(renamed: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Every configuration of score_sde_pytorch attends at 16x16; None where no level does."""
    for name in renamed:
        if found := re.fullmatch(r"down\.(\d+)\.blocks\.0\.attention\.to_qkv\.weight", name):
            side = 16 * 2 ** int(found[1])
            return side, side
    return None
