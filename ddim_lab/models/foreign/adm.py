"""The U-Net of OpenAI's improved-diffusion and guided-diffusion (ADM; unet.py in both) as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from ddim_lab.models.foreign.converted import UNCHANGED, Converted, Renaming, family_of, state_of

__all__ = ["PUBLISHED", "Published", "Shape", "convert_adm"]

GROUPS: Final = 32
"""Of every group normalisation in that code."""


@final
@dataclass(frozen=True)
class Shape:
    """What the tensors say of a network.

    Attributes:
        channels: of every level.
        blocks: residual blocks a level (num_res_blocks).
        attention: levels that have it.
        resamples: whether residual blocks do the resampling (resblock_updown).
        shifts: whether the time's embedding scales and shifts (use_scale_shift_norm).
    """

    channels: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    resamples: bool
    shifts: bool


@final
@dataclass(frozen=True)
class Published:
    """A network of which OpenAI published files, and what of it the tensors don't say.

    Attributes:
        name: of the file, or what the files have in common.
        shape: what the tensors say.
        size: height and width of its images.
        heads: of every attention (num_heads); None where each head has `head_channels` (num_head_channels).
        head_channels: of every head; None where `heads` is given.
        new_order: use_new_attention_order.
        schedule, num_timesteps: that it was trained with.
        rescaled: whether it is given 1000 t / T (rescale_timesteps).
    """

    name: str
    shape: Shape
    size: int
    heads: int | None = None
    head_channels: int | None = None
    new_order: bool = False
    schedule: str = "linear"
    num_timesteps: int = 1000
    rescaled: bool = False


def _widths(channels: int, *multipliers: int) -> tuple[int, ...]:
    return tuple(channels * each for each in multipliers)


_of_4000 = partial(Published, heads=4, schedule="cosine", num_timesteps=4000)

PUBLISHED: Final = (
    _of_4000("cifar10_uncond", Shape(_widths(128, 1, 2, 2, 2), 3, (1, 2), False, True), 32, rescaled=True),
    _of_4000("imagenet64_uncond", Shape(_widths(128, 1, 2, 3, 4), 3, (2, 3), False, True), 64, rescaled=True),
    _of_4000("imagenet64_cond", Shape(_widths(192, 1, 2, 3, 4), 3, (2, 3), False, True), 64),
    Published("lsun_uncond", Shape(_widths(128, 1, 1, 2, 2, 4, 4), 2, (4,), False, False), 256, heads=1),
    Published(
        "64x64_diffusion",
        Shape(_widths(192, 1, 2, 3, 4), 3, (1, 2, 3), True, True),
        64,
        head_channels=64,
        new_order=True,
        schedule="cosine",
    ),
    Published("128x128_diffusion", Shape(_widths(256, 1, 1, 2, 3, 4), 2, (2, 3, 4), True, True), 128, heads=4),
    Published("256x256", Shape(_widths(256, 1, 1, 2, 2, 4, 4), 2, (3, 4, 5), True, True), 256, head_channels=64),
)
"""The flags in the READMEs of both repositories; a network of another shape has to be told its own."""


def convert_adm(
    content: Mapping[str, Any] | list[Any],
    size: tuple[int, int] | None,
    num_timesteps: int,
    *,
    heads: int | None = None,
    head_channels: int | None = None,
    new_order: bool | None = None,
    rescaled: bool | None = None,
) -> Converted:
    """Its network as a `UNet2DModel`: of 2C channels if it learned variances, with its classes if it has them.

    There: the embedding is [cos, sin] of t / 10000^(i / half); q, k and v are one convolution, head by head (the old
    order) or all of q first. Where t is scaled to 1000 t / T, the embedding becomes the table of its T values, and the
    network knows whole timesteps alone.

    Args:
        content: a state dict.
        size: height and width of the images; None: the published one's, or whatever fits.
        num_timesteps: T of the schedule that it was trained with.
        heads: num_heads; None, with `head_channels` None, too: it is taken for the published network of its shape.
        head_channels: num_head_channels, in place of `heads`.
        new_order: use_new_attention_order; None: the published network's, else no.
        rescaled: rescale_timesteps; None: the published network's, else no, and to be said where T is not 1000.

    Raises:
        ValueError: it is no such network, or one that diffusers' can't be, or more must be said; one line.
    """
    if isinstance(content, list):
        raise ValueError(f"it holds a list of {len(content)}: tensors by name (a state dict) are needed")
    tensors = state_of(content)
    family = family_of(tensors)
    if family is None or family[0] != "adm":
        looks = f"looks like {family[1]}" if family else f"has tensors as {min(tensors, default='none')}"
        raise ValueError(f"it {looks}, not like a U-Net of improved-diffusion or guided-diffusion")
    names = Renaming(tensors)
    shape = _shape_of(names)
    known = None
    if heads is None and head_channels is None:
        known = next((each for each in PUBLISHED if each.shape == shape), None)
        if known is None:
            raise ValueError(
                "its attention's heads don't follow from its tensors, and it has the shape of no published network: say"
                " num_heads or num_head_channels, as it was trained"
            )
        heads, head_channels = known.heads, known.head_channels
    widths = {shape.channels[level] for level in shape.attention} | {shape.channels[-1]}
    counted = {width: heads or _whole(width, head_channels, "num_head_channels") for width in widths}
    for width, count in counted.items():
        _whole(width, count, "num_heads")
    if new_order is None:
        new_order = known is not None and known.new_order
    if rescaled is None:
        if known is None and num_timesteps != 1000:
            raise ValueError(
                f"with T = {num_timesteps} it was given t or 1000 t / T, which its tensors don't say: say"
                " rescale_timesteps, as it was trained"
            )
        rescaled = known is not None and known.rescaled
    if size is None and known is not None:
        size = (known.size, known.size)
    config, per_level = _config(names, shape, counted, size)
    if rescaled and num_timesteps != 1000:
        config |= {"time_embedding_type": "learned", "num_train_timesteps": num_timesteps}
        times = torch.arange(num_timesteps).float() * (1000.0 / num_timesteps)
        names.state["time_proj.weight"] = get_timestep_embedding(times, shape.channels[0], True, 0)
    _rename(names, shape, counted, new_order)
    note = None if known is None else _note(known, num_timesteps, rescaled)
    source = f"openai/{'guided' if shape.resamples else 'improved'}-diffusion" + (f", {known.name}" if known else "")
    return Converted(config, names.finish(), source, None, heads if per_level else None, note)


def _whole(width: int, parts: int | None, name: str) -> int:
    assert parts is not None
    if width % parts:
        raise ValueError(f"{name}={parts} does not divide the {width} channels of one of its attentions")
    return width // parts


def _note(known: Published, num_timesteps: int, rescaled: bool) -> str:
    heads = f"{known.heads} heads" if known.heads else f"heads of {known.head_channels} channels"
    return (
        f"it has the shape of OpenAI's {known.name}, which has {heads}, was trained with schedule={known.schedule},"
        f" schedule.num_timesteps={known.num_timesteps} and is given {'1000 t / T' if known.rescaled else 't'};"
        f" taken: T = {num_timesteps}, {'1000 t / T' if rescaled else 't'}"
    )


def _shape_of(names: Renaming) -> Shape:
    outputs = names.count(r"output_blocks\.(\d+)\.")
    inputs = names.count(r"input_blocks\.(\d+)\.")
    first = names.shape("input_blocks.0.0.weight", 4)[0]
    base = names.shape("time_embed.0.weight", 2)[1]
    # Ups, one fewer than levels, stand last in a level's last block: residual blocks, convolutions, or without weights.
    resamples = any(_upsampler(names, at) for at in range(outputs))
    pooled = sum(f"input_blocks.{at}.0.op.weight" in names or not _filled(names, at) for at in range(inputs))
    levels = 1 + (sum(_upsampler(names, at) for at in range(outputs)) if resamples else pooled)
    if inputs != outputs or outputs % levels or outputs // levels < 2:
        raise ValueError(
            f"it has {inputs} input_blocks and {outputs} output_blocks for {levels} levels: as many of both are needed,"
            " and as many of each level"
        )
    blocks = outputs // levels - 1
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    channels = tuple(names.shape(f"input_blocks.{at}.0.in_layers.2.weight", 4)[0] for at in starts)
    if names.shape("input_blocks.0.0.weight", 4)[1] == 6:
        raise ValueError("it takes 6 channels, as an upsampler, which is given a small image beside x_t: not supported")
    if not first == base == channels[0]:
        raise ValueError(
            f"its first level has {channels[0]} channels and its time's embedding {base} (as the 512x512 model's):"
            " diffusers' UNet2DModel has equal ones"
        )
    if any(width % GROUPS for width in channels):
        raise ValueError(f"its levels have {channels} channels: multiples of {GROUPS} are needed")
    attention = tuple(level for level, at in enumerate(starts) if f"input_blocks.{at}.1.norm.weight" in names)
    shifts = names.shape("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * channels[0]
    return Shape(channels, blocks, attention, resamples, shifts)


def _upsampler(names: Renaming, at: int) -> bool:
    """Whether an output block ends with a residual block that upsamples."""
    return any(f"output_blocks.{at}.{place}.in_layers.0.weight" in names for place in (1, 2))


def _filled(names: Renaming, at: int) -> bool:
    """Whether an input block has weights; one that only pools has none."""
    return any(f"input_blocks.{at}.0.{part}weight" in names for part in ("", "op.", "in_layers.0."))


def _config(
    names: Renaming, shape: Shape, counted: Mapping[int, int], size: tuple[int, int] | None
) -> tuple[dict[str, Any], bool]:
    """Of `UNet2DModel`; and whether it can't say how many heads there are, since their widths differ by level."""
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if shape.resamples else ("DownBlock2D", "UpBlock2D")
    levels = range(len(shape.channels))
    resampling = "resnet" if shape.resamples else "conv"
    in_head = {width // heads for width, heads in counted.items()}
    single = set(counted.values()) == {1}
    config = {
        "sample_size": None if size is None else list(size),
        "in_channels": names.shape("input_blocks.0.0.weight", 4)[1],
        "out_channels": names.shape("out.2.weight", 4)[0],
        "block_out_channels": list(shape.channels),
        "down_block_types": ["AttnDownBlock2D" if level in shape.attention else plain[0] for level in levels],
        "up_block_types": ["AttnUpBlock2D" if level in shape.attention else plain[1] for level in reversed(levels)],
        "layers_per_block": shape.blocks,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "downsample_type": resampling,
        "upsample_type": resampling,
        "resnet_time_scale_shift": "scale_shift" if shape.shifts else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_head_dim": in_head.pop() if len(in_head) == 1 and not single else None,
    }
    if "label_emb.weight" in names:
        config["num_class_embeds"] = names.shape("label_emb.weight", 2)[0]
    return config, len(in_head) > 1 and not single


def _rename(names: Renaming, shape: Shape, counted: Mapping[int, int], new_order: bool) -> None:
    levels = len(shape.channels)
    names.move("time_embed.0", "time_embedding.linear_1")
    names.move("time_embed.2", "time_embedding.linear_2")
    if "label_emb.weight" in names:
        names.state["class_embedding.weight"] = names.take("label_emb.weight")
    names.move("input_blocks.0.0", "conv_in")
    for level, width in enumerate(shape.channels):
        attends = level in shape.attention
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        entry, out = 1 + level * (shape.blocks + 1), (levels - 1 - level) * (shape.blocks + 1)
        for start, theirs, ours, layers in (
            (entry, "input_blocks", down, shape.blocks),
            (out, "output_blocks", up, shape.blocks + 1),
        ):
            for layer in range(layers):
                _residual(names, f"{theirs}.{start + layer}.0", f"{ours}.resnets.{layer}")
                if attends:
                    source, target = f"{theirs}.{start + layer}.1", f"{ours}.attentions.{layer}"
                    _attention(names, source, target, width, counted[width], new_order)
        if level < levels - 1:
            source, target = f"input_blocks.{entry + shape.blocks}.0", f"{down}.downsamplers.0"
            if shape.resamples:
                _residual(names, source, target)
            else:
                halving = [[0.0, 0.0, 0.0], [0.0, 0.25, 0.25], [0.0, 0.25, 0.25]]
                names.resample(f"{source}.op", f"{target}.conv", width, halving)
        if level > 0:
            source, target = f"output_blocks.{out + shape.blocks}.{1 + attends}", f"{up}.upsamplers.0"
            if shape.resamples:
                _residual(names, source, target)
            else:
                names.resample(f"{source}.conv", f"{target}.conv", width, UNCHANGED)
    last = shape.channels[-1]
    _residual(names, "middle_block.0", "mid_block.resnets.0")
    _attention(names, "middle_block.1", "mid_block.attentions.0", last, counted[last], new_order)
    _residual(names, "middle_block.2", "mid_block.resnets.1")
    names.move("out.0", "conv_norm_out")
    names.move("out.2", "conv_out")


def _residual(names: Renaming, source: str, target: str) -> None:
    for theirs, ours in (
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
    ):
        names.move(f"{source}.{theirs}", f"{target}.{ours}")
    if f"{source}.skip_connection.weight" in names:
        names.move(f"{source}.skip_connection", f"{target}.conv_shortcut")


def _heads_apart(tensor: Tensor, heads: int, new_order: bool) -> Tensor:
    """Rows of q, k and v [3, C, ...], head by head within each, from [3 C, ...] in either order."""
    if new_order:
        return tensor.reshape(3, -1, *tensor.shape[1:])
    apart = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
    return apart.transpose(0, 1).flatten(1, 2)


def _attention(names: Renaming, source: str, target: str, width: int, heads: int, new_order: bool) -> None:
    names.move(f"{source}.norm", f"{target}.group_norm")
    if (names.shape(f"{source}.qkv.weight", 3)[0], names.shape(f"{source}.qkv.bias", 1)[0]) != (3 * width, 3 * width):
        raise ValueError(f"{source}.qkv has not three times the {width} channels of its level")
    weights = _heads_apart(names.take(f"{source}.qkv.weight").flatten(1), heads, new_order)
    biases = _heads_apart(names.take(f"{source}.qkv.bias"), heads, new_order)
    for part, weight, bias in zip(("to_q", "to_k", "to_v"), weights, biases, strict=True):
        names.state |= {f"{target}.{part}.weight": weight, f"{target}.{part}.bias": bias}
    names.move(f"{source}.proj_out", f"{target}.to_out.0", linear=True)
