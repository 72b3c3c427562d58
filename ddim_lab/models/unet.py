"""The network and its folder: diffusers' `UNet2DModel`, built, stored as a pipeline, loaded whole, identified."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import __version__ as diffusers_version
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import Tensor, nn

from ddim_lab.config.model import UNetConfig
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.schedulers.folder import WEIGHT_FILES
from ddim_lab.store import content_key

__all__ = [
    "build_unet",
    "load_unet",
    "scheduler_config",
    "unet_digest",
    "weights_digest",
    "write_pipeline",
]

# It warns of attention with one head, which is what Ho et al. have; what is missing from a file is an error here.
diffusers_logging.set_verbosity_error()

WEIGHT_KINDS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What a weight may be, by safetensors' names."""

_OLD_NAMES: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention's parts were called when Google's checkpoints were stored."""


def build_unet(config: UNetConfig, shape: tuple[int, int, int], classes: int | None = None) -> UNet2DModel:
    """A diffusers U-Net, freshly initialised from torch's global generator.

    Attention has one head, as in Ho et al. 2020.

    Args:
        config: its sizes.
        shape: (C, H, W) of the images.
        classes: K of a class-conditional one, whose label K means no class; None for one without classes.
    """
    channels, height, width = shape
    down = tuple("AttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention)
    up = tuple("AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention))
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        attention_head_dim=None,
        add_attention=any(config.attention),
        num_class_embeds=None if classes is None else classes + 1,
    )


def load_unet(folder: Path) -> nn.Module:
    """The U-Net in a folder, on the CPU, in evaluation mode, without gradients.

    Weights come from safetensors, or from .bin files that may hold tensors and nothing else: nothing is unpickled.

    Raises:
        ValueError: there are no weights, or they can't be read, or they are not those of config.json, or not finite;
            one line that names the file.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no weights: diffusion_pytorch_model.safetensors (or .bin) is missing")
    state, kept_in = _read_weights(file)
    try:
        network = UNet2DModel.from_config(UNet2DModel.load_config(folder, local_files_only=True))
        found = network.load_state_dict(state, strict=False)
    except Exception as error:  # a configuration of the user's may lead diffusers to any
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fault = lines[1] if len(lines) > 1 else str(error)
        raise ValueError(f"{file} does not fit {folder / 'config.json'}: {fault}") from None
    for keys, words in ((found.missing_keys, "lacks"), (found.unexpected_keys, "holds, beside what is needed,")):
        if keys:
            raise ValueError(f"{file} {words} {len(keys)} of the tensors, {sorted(keys)[0]} first")
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{kept_in[name]} holds NaN or infinite weights: {name}")
    module: nn.Module = network
    return module.eval().requires_grad_(False)


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors by today's names, of one file or of all that an index names; and the file that each is in."""
    listed = _read_index(file) if file.suffix == ".json" else {file: None}
    state: dict[str, Tensor] = {}
    kept_in: dict[str, Path] = {}
    for part, names in listed.items():
        tensors = _read_tensors(part)
        if names is not None and (lost := sorted(names - set(tensors))):
            raise ValueError(
                f"{part} lacks {len(lost)} of the tensors that {file.name} says are in it: {lost[0]} first"
            )
        for old, tensor in tensors.items():
            name = re.sub(
                r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                lambda found: f"{found[1]}{_OLD_NAMES[found[2]]}.",
                old,
            )
            if name in state:
                raise ValueError(f"{part} holds {name}, which {kept_in[name].name} holds, too")
            state[name], kept_in[name] = tensor, part
    return state, kept_in


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    """The files that an index names, each with the tensors that are in it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {Path(name).name == name and Path(name).suffix in (".safetensors", ".bin") for name in places.values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = set()
    if files != {True}:
        raise ValueError(f"{index} is no index of weights: it names no file of this folder for each tensor")
    listed: dict[Path, set[str] | None] = {}
    for name in sorted(set(places.values())):
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing: {index.name} says that weights are in it")
        listed[index.parent / name] = {tensor for tensor, place in places.items() if place == name}
    return listed


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; ValueError unless it holds those of floating point by name, and nothing else."""
    state: Any
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                names = stored.keys()
                kinds = {name: WEIGHT_KINDS.get(stored.get_slice(name).get_dtype()) for name in names}
                # what is quantised may be of a kind that torch does not have
                state = {name: stored.get_tensor(name) for name in kinds} if None not in kinds.values() else {}
        else:
            with warnings.catch_warnings():  # torch's, of a pickle that it then refuses
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
            kinds = {name: tensor.dtype for name, tensor in state.items()} if isinstance(state, Mapping) else {}
    except Exception:  # the readers raise whatever a damaged file leads them to
        raise ValueError(f"{file} can't be read: it is damaged, cut short, or holds more than tensors") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}: tensors by name are needed")
    if bad := sorted(name for name, kind in kinds.items() if kind not in WEIGHT_KINDS.values()):
        raise ValueError(f"{file}: {bad[0]} is not of floating point: quantised weights are not supported")
    return dict(state)


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over a network's tensors in order of name: (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


UNTOLD: Final[dict[str, Any]] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
}
"""What a U-Net of diffusers computes by, and no weight of it shows; as `build_unet` has it."""


def unet_digest(network: nn.Module, heads: int | None = None) -> str:
    """`weights_digest`; together with what no weight shows, where a U-Net of diffusers has that otherwise than ours.

    Args:
        network: the U-Net.
        heads: of each attention, where that is no setting of diffusers.
    """
    given = dict(network.config)  # type: ignore[arg-type]
    told = {name: given[name] for name, ours in UNTOLD.items() if name in given and given[name] != ours}
    groups = [given.get("norm_num_groups"), given.get("attn_norm_num_groups")]
    told |= {} if groups == [32, None] else {"norm_groups": groups}
    told |= {} if heads is None else {"heads": heads}
    weights = weights_digest(network)
    return content_key({"weights": weights, **told}) if told else weights


# -- a folder that diffusers' pipelines load -----------------------------------------------------------


def write_pipeline(folder: Path, schedule: NoiseSchedule, named: dict[str, Any]) -> None:
    """Make a stored U-Net's folder one that `DDIMPipeline.from_pretrained` loads, with our eps-prediction.

    Args:
        folder: holds the U-Net.
        schedule: its noise schedule.
        named: the schedule's configuration; linear and scaled_linear go by name, others as a list of betas.
    """
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    scheduler = scheduler_config(schedule, named)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n", "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def scheduler_config(schedule: NoiseSchedule, named: dict[str, Any]) -> dict[str, Any]:
    """Our schedule, spacing and step as diffusers' `DDIMScheduler` takes them; arguments as `write_pipeline`."""
    by_name = named["name"] in ("linear", "scaled_linear")
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": diffusers_version,
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": named["name"] if by_name else "linear",
        "beta_start": named["beta_start"] if by_name else float(schedule.betas[0]),
        "beta_end": named["beta_end"] if by_name else float(schedule.betas[-1]),
        "trained_betas": None if by_name else schedule.betas.tolist(),
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
