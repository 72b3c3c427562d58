"""The U-Net of the DDIM authors' code (ermongroup/ddim, models/diffusion.py) as diffusers has it.

It is Ho et al. 2020's: its published files are those of CIFAR-10 and LSUN translated from TensorFlow, and CelebA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ddim_lab.config.model import Weights
from ddim_lab.models.foreign.converted import UNCHANGED, Converted, Renaming, family_of, state_of

__all__ = ["PUBLISHED", "PublishedFile", "convert_ddim"]


class PublishedFile(NamedTuple):
    """What is known of a file by its MD5."""

    name: str
    weights: Weights
    size: int


PUBLISHED: Final = {
    "82ed3067fd1002f5cf4c339fb80c4669": PublishedFile("cifar10", "raw", 32),
    "1fa350b952534ae442b1d5235cce5cd3": PublishedFile("ema_cifar10", "ema", 32),
    "f70280ac0e08b8e696f42cb8e948ff1c": PublishedFile("lsun_bedroom", "raw", 256),
    "1921fa46b66a3665e450e42f36c2720f": PublishedFile("ema_lsun_bedroom", "ema", 256),
    "bbee0e7c3d7abfb6e2539eaf2fb9987b": PublishedFile("lsun_cat", "raw", 256),
    "646f23f4821f2459b8bafc57fd824558": PublishedFile("ema_lsun_cat", "ema", 256),
    "eb619b8a5ab95ef80f94ce8a5488dae3": PublishedFile("lsun_church", "raw", 256),
    "fdc68a23938c2397caba4a260bc2445f": PublishedFile("ema_lsun_church", "ema", 256),
}
"""The published files by MD5 (ermongroup/ddim, functions/ckpt_util.py)."""

GROUPS: Final = 32
"""Of every group normalisation in that code."""


def convert_ddim(
    content: Mapping[str, Any] | list[Any], size: tuple[int, int] | None, weights: Weights | None = None
) -> Converted:
    """Its network as a `UNet2DModel`, which follows from the tensors' shapes.

    There: group normalisation with eps 1e-6; downsampling pads right and below alone; attention has one head and 1x1
    convolutions, here linear; the time's embedding is [sin, cos] of t / 10000^(i / (half - 1)). Pooling that has no
    weights (resamp_with_conv: False) becomes the convolution that does the same.

    Args:
        content: a state dict, or the list that its training script saves: [network, optimiser, epoch, step, averaged];
            of that, the averaged weights are taken where they are there and `weights` is not "raw".
        size: height and width of the images, which the tensors don't say; None: whatever fits.
        weights: which of the list's are wanted; None: the averaged ones where they are there.

    Raises:
        ValueError: it is no such network; one line.
    """
    found, held = _part(content, weights)
    tensors = state_of(found)
    if "temb.dense.0.weight" not in tensors or "conv_in.weight" not in tensors:
        family = family_of(tensors)
        looks = f"looks like {family[1]}" if family else f"has tensors as {min(tensors, default='none')}"
        raise ValueError(f"it {looks}, not like the network of ermongroup/ddim")
    tensors.pop("logvar", None)  # of type: bayesian, which never uses it
    names = Renaming(tensors)
    levels, blocks = names.count(r"down\.(\d+)\."), names.count(r"down\.0\.block\.(\d+)\.")
    channels = [names.shape(f"down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)]
    attention = [f"down.{level}.attn.0.norm.weight" in names for level in range(levels)]
    first, inner = names.shape("conv_in.weight", 4)[:2]
    if not channels or not blocks:
        raise ValueError("it lacks down.0.block.0: it has no levels")
    if first != channels[0]:
        raise ValueError(
            f"its first level has {channels[0]} channels and its first layer {first}: diffusers has equal ones"
        )
    if any(width % GROUPS for width in channels):
        raise ValueError(f"its levels have {channels} channels: multiples of {GROUPS} are needed")
    config = {
        "sample_size": None if size is None else list(size),
        "in_channels": inner,
        "out_channels": names.shape("conv_out.weight", 4)[0],
        "block_out_channels": channels,
        "down_block_types": ["AttnDownBlock2D" if each else "DownBlock2D" for each in attention],
        "up_block_types": ["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)],
        "layers_per_block": blocks,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "attention_head_dim": None,
    }
    _rename(names, channels, attention, blocks)
    return Converted(config, names.finish(), "ermongroup/ddim", held)


def _part(content: Mapping[str, Any] | list[Any], weights: Weights | None) -> tuple[Mapping[str, Any], Weights | None]:
    """The state dict that is meant; and which weights it has, where the list shows it."""
    if isinstance(content, Mapping):
        return content, None
    if len(content) not in (4, 5) or not all(isinstance(content[at], Mapping) for at in (0, 1, -1)[: len(content) - 2]):
        raise ValueError(
            f"it holds a list of {len(content)}, not that of the training script: [network, optimiser, epoch, step] and"
            " the averaged weights"
        )
    averaged = len(content) == 5 and weights != "raw"
    if weights == "ema" and not averaged:
        raise ValueError("it holds no averaged weights (a list of 4: without ema): model.weights=raw is what it has")
    return content[-1 if averaged else 0], "ema" if averaged else "raw"


def _rename(names: Renaming, channels: list[int], attention: list[bool], blocks: int) -> None:
    levels = len(channels)
    names.move("temb.dense.0", "time_embedding.linear_1")
    names.move("temb.dense.1", "time_embedding.linear_2")
    names.move("conv_in", "conv_in")
    for level, width in enumerate(channels):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        for theirs, ours, layers in ((f"down.{level}", down, blocks), (f"up.{level}", up, blocks + 1)):
            for layer in range(layers):
                _residual(names, f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}")
                if attention[level]:
                    _attention(names, f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}")
        if level < levels - 1:
            halving = [[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]
            names.resample(f"down.{level}.downsample.conv", f"{down}.downsamplers.0.conv", width, halving)
        if level > 0:
            names.resample(f"up.{level}.upsample.conv", f"{up}.upsamplers.0.conv", width, UNCHANGED)
    _residual(names, "mid.block_1", "mid_block.resnets.0")
    _attention(names, "mid.attn_1", "mid_block.attentions.0")
    _residual(names, "mid.block_2", "mid_block.resnets.1")
    names.move("norm_out", "conv_norm_out")
    names.move("conv_out", "conv_out")


def _residual(names: Renaming, source: str, target: str) -> None:
    for theirs, ours in (("norm1", "norm1"), ("conv1", "conv1"), ("temb_proj", "time_emb_proj")):
        names.move(f"{source}.{theirs}", f"{target}.{ours}")
    names.move(f"{source}.norm2", f"{target}.norm2")
    names.move(f"{source}.conv2", f"{target}.conv2")
    if f"{source}.nin_shortcut.weight" in names:
        names.move(f"{source}.nin_shortcut", f"{target}.conv_shortcut")


def _attention(names: Renaming, source: str, target: str) -> None:
    names.move(f"{source}.norm", f"{target}.group_norm")
    for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        names.move(f"{source}.{theirs}", f"{target}.{ours}", linear=True)
