"""The network and its folder: diffusers' `UNet2DModel`, built, stored as a pipeline, loaded whole, identified."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import __version__ as diffusers_version
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn

from ddim_lab.config.model import UNetConfig
from ddim_lab.diffusion import Prediction
from ddim_lab.schedule import NoiseSchedule

__all__ = [
    "WEIGHT_FILES",
    "build_unet",
    "load_unet",
    "pipeline_prediction",
    "scheduler_config",
    "weights_digest",
    "write_pipeline",
]

# It warns of attention with one head, which is what Ho et al. have; what is missing from a file is an error here.
diffusers_logging.set_verbosity_error()

WEIGHT_FILES: Final = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
"""Names under which a folder may keep its weights; the first one there is read."""

PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names of what a network predicts, and ours."""


def build_unet(config: UNetConfig, shape: tuple[int, int, int]) -> UNet2DModel:
    """A diffusers U-Net for images of `shape` (C, H, W), freshly initialised from torch's global generator.

    Attention has one head, as in Ho et al. 2020.
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
    )


def load_unet(folder: Path) -> nn.Module:
    """The U-Net in a folder, on the CPU, in evaluation mode, without gradients.

    Weights come from safetensors, or from a .bin file that may hold tensors and nothing else: nothing is unpickled.

    Raises:
        ValueError: there are no weights, or they can't be read, or they are not those of config.json, or not finite;
            one line that names the file.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no weights: {WEIGHT_FILES[0]} (or .bin) is missing")
    _check_tensors(file)
    try:
        network, found = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=file.suffix != ".bin",
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except OSError:
        raise ValueError(f"{file} can't be read: it is damaged, cut short, or holds more than tensors") from None
    except Exception as error:  # a configuration of the user's may lead diffusers to any
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fault = lines[1] if len(lines) > 1 else str(error)
        raise ValueError(f"{file} does not fit {folder / 'config.json'}: {fault}") from None
    for keys, words in ((found["missing_keys"], "lacks"), (found["unexpected_keys"], "holds, beside what is needed,")):
        if keys:
            raise ValueError(f"{file} {words} {len(keys)} of the tensors, {sorted(keys)[0]} first")
    for name, tensor in network.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{file} holds NaN or infinite weights: {name}")
    module: nn.Module = network
    return module.eval().requires_grad_(False)


def _check_tensors(file: Path) -> None:
    """Raise ValueError unless a file of weights holds tensors of floating point by name, and nothing else."""
    damaged = f"{file} can't be read: it is damaged, cut short, or holds more than tensors"
    try:
        if file.suffix == ".bin":
            with warnings.catch_warnings():  # torch's, of a pickle that it then refuses
                warnings.simplefilter("ignore")
                state = torch.load(file, map_location="cpu", weights_only=True)
            kinds = {name: value.dtype for name, value in state.items()} if isinstance(state, Mapping) else None
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                kinds = {name: _SAFE_KINDS.get(tensors.get_slice(name).get_dtype()) for name in names}
        else:  # an index: diffusers reads what it names
            return
    except Exception:  # torch's reader raises whatever a damaged file leads it to
        raise ValueError(damaged) from None
    if kinds is None:
        raise ValueError(f"{file} holds a {type(state).__name__}: tensors by name are needed")
    if bad := sorted(name for name, kind in kinds.items() if kind is None or not kind.is_floating_point):
        raise ValueError(f"{file}: {bad[0]} is not of floating point: quantised weights are not supported")


_SAFE_KINDS: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of what a weight may be."""


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over a network's tensors in order of name: (name, dtype, shape, bytes)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def pipeline_prediction(scheduler: dict[str, Any]) -> Prediction:
    """What the network of a diffusers scheduler configuration predicts.

    Raises:
        ValueError: a prediction_type that is not known.
    """
    given = scheduler.get("prediction_type", "epsilon")
    if given not in PREDICTIONS:
        raise ValueError(f"prediction_type={given} is not known; epsilon, sample and v_prediction are")
    return PREDICTIONS[given]
