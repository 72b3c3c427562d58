"""Networks of other code bases written down again from their definitions, to compare what is read from their files.

Each is a function of a mapping name -> tensor that makes up a random tensor when a name is asked for the first time: so
one call gives both a state dict with that code's names and shapes and what its network answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class Weights(dict[str, Tensor]):
    """A state dict that grows; what was asked for is in `asked`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def get_or_make(self, name: str, *shape: int, around: float = 0.0) -> Tensor:
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
            self[name] = around + torch.randn(*shape, generator=self._generator) * fan_in**-0.5
        assert self[name].shape == shape, name
        return self[name]

    def linear(self, name: str, x: Tensor, out: int) -> Tensor:
        return F.linear(x, self.get_or_make(f"{name}.weight", out, x.shape[1]), self.get_or_make(f"{name}.bias", out))

    def conv(
        self, name: str, x: Tensor, out: int, size: int = 3, stride: int = 1, padding: int | None = None
    ) -> Tensor:
        shape = (out, x.shape[1], *([size] * (x.ndim - 2)))
        weight, bias = self.get_or_make(f"{name}.weight", *shape), self.get_or_make(f"{name}.bias", out)
        convolve = F.conv2d if x.ndim == 4 else F.conv1d
        return convolve(x, weight, bias, stride=stride, padding=size // 2 if padding is None else padding)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        scale = self.get_or_make(f"{name}.weight", x.shape[1], around=1.0)
        return F.group_norm(x, 32, scale, self.get_or_make(f"{name}.bias", x.shape[1]), eps)


def sinusoids(t: Tensor, width: int, last: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of t times 10000^(-i / last), i = 0 ... width / 2 - 1."""
    frequencies = torch.exp(-math.log(10000.0) / last * torch.arange(width // 2, device=t.device))
    return torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)


# -- ermongroup/ddim -------------------------------------------------------------------------------------


def ddim_network(
    p: Weights,
    x: Tensor,
    t: Tensor,
    *,
    ch: int = 32,
    mult: Sequence[int] = (1, 2, 2),
    blocks: int = 2,
    attention: Sequence[int] = (1,),
    with_conv: bool = True,
) -> Tensor:
    """The `Model` of models/diffusion.py; `attention` names levels."""
    emb = torch.cat(sinusoids(t.float(), ch, ch // 2 - 1), dim=1)
    emb = p.linear("temb.dense.1", F.silu(p.linear("temb.dense.0", emb, 4 * ch)), 4 * ch)

    def residual(name: str, h: Tensor, out: int) -> Tensor:
        inner = p.conv(f"{name}.conv1", F.silu(p.norm(f"{name}.norm1", h, 1e-6)), out)
        inner = inner + p.linear(f"{name}.temb_proj", F.silu(emb), out)[:, :, None, None]
        inner = p.conv(f"{name}.conv2", F.silu(p.norm(f"{name}.norm2", inner, 1e-6)), out)
        return inner + (h if h.shape[1] == out else p.conv(f"{name}.nin_shortcut", h, out, 1))

    def attend(name: str, h: Tensor) -> Tensor:
        width = h.shape[1]
        normed = p.norm(f"{name}.norm", h, 1e-6)
        q, k, v = (p.conv(f"{name}.{part}", normed, width, 1).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) * width**-0.5, dim=2)
        return h + p.conv(f"{name}.proj_out", torch.einsum("nij,ncj->nci", weights, v).view_as(h), width, 1)

    h = p.conv("conv_in", x, ch)
    skips = [h]
    for level, times in enumerate(mult):
        for block in range(blocks):
            h = residual(f"down.{level}.block.{block}", h, ch * times)
            if level in attention:
                h = attend(f"down.{level}.attn.{block}", h)
            skips.append(h)
        if level < len(mult) - 1:
            if with_conv:
                h = p.conv(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), ch * times, 3, 2, 0)
            else:
                h = F.avg_pool2d(h, 2)
            skips.append(h)
    h = residual("mid.block_1", h, ch * mult[-1])
    h = residual("mid.block_2", attend("mid.attn_1", h), ch * mult[-1])
    for level in reversed(range(len(mult))):
        for block in range(blocks + 1):
            h = residual(f"up.{level}.block.{block}", torch.cat([h, skips.pop()], 1), ch * mult[level])
            if level in attention:
                h = attend(f"up.{level}.attn.{block}", h)
        if level > 0:
            h = F.interpolate(h, scale_factor=2)
            h = p.conv(f"up.{level}.upsample.conv", h, ch * mult[level]) if with_conv else h
    return p.conv("conv_out", F.silu(p.norm("norm_out", h, 1e-6)), x.shape[1])


# -- openai/improved-diffusion and guided-diffusion ------------------------------------------------------


def adm_network(
    p: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    *,
    channels: int = 32,
    mult: Sequence[int] = (1, 2, 2),
    blocks: int = 1,
    attention: Sequence[int] = (1, 2),
    heads: int | None = None,
    head_channels: int | None = None,
    new_order: bool = False,
    scale_shift: bool = True,
    updown: bool = False,
    conv_resample: bool = True,
    learn_sigma: bool = False,
    classes: int = 5,
) -> Tensor:
    """The `UNetModel` of unet.py; `attention` names levels, `t` is what the network is given."""
    sine, cosine = sinusoids(t.float(), channels, channels // 2)
    emb = p.linear("time_embed.0", torch.cat([cosine, sine], dim=1), 4 * channels)
    emb = p.linear("time_embed.2", F.silu(emb), 4 * channels)
    if y is not None:
        emb = emb + p.get_or_make("label_emb.weight", classes, 4 * channels)[y]

    def residual(name: str, h: Tensor, out: int, resize: str = "") -> Tensor:
        inner = F.silu(p.norm(f"{name}.in_layers.0", h, 1e-5))
        if resize:
            inner, h = (
                F.interpolate(each, scale_factor=2) if resize == "up" else F.avg_pool2d(each, 2) for each in (inner, h)
            )
        inner = p.conv(f"{name}.in_layers.2", inner, out)
        shift = p.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * out if scale_shift else out)[:, :, None, None]
        if scale_shift:
            inner = p.norm(f"{name}.out_layers.0", inner, 1e-5) * (1 + shift[:, :out]) + shift[:, out:]
        else:
            inner = p.norm(f"{name}.out_layers.0", inner + shift, 1e-5)
        inner = p.conv(f"{name}.out_layers.3", F.silu(inner), out)
        return inner + (h if h.shape[1] == out else p.conv(f"{name}.skip_connection", h, out, 1))

    def attend(name: str, h: Tensor) -> Tensor:
        width, flat = h.shape[1], h.flatten(2)
        count = heads or width // (head_channels or width)
        qkv = p.conv(f"{name}.qkv", p.norm(f"{name}.norm", flat, 1e-5), 3 * width, 1)
        outs = []
        for head in range(count):
            d = width // count
            starts = [part * width + head * d if new_order else (3 * head + part) * d for part in range(3)]
            q, k, v = (qkv[:, start : start + d] for start in starts)
            weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(d), dim=2)
            outs.append(torch.einsum("nij,ncj->nci", weights, v))
        return (flat + p.conv(f"{name}.proj_out", torch.cat(outs, 1), width, 1)).view_as(h)

    h = p.conv("input_blocks.0.0", x, channels)
    skips, place = [h], 1
    for level, times in enumerate(mult):
        for _ in range(blocks):
            h = residual(f"input_blocks.{place}.0", h, channels * times)
            h = attend(f"input_blocks.{place}.1", h) if level in attention else h
            skips.append(h)
            place += 1
        if level < len(mult) - 1:
            if updown:
                h = residual(f"input_blocks.{place}.0", h, channels * times, "down")
            elif conv_resample:
                h = p.conv(f"input_blocks.{place}.0.op", h, channels * times, 3, 2, 1)
            else:
                h = F.avg_pool2d(h, 2)
            skips.append(h)
            place += 1
    h = residual("middle_block.0", h, channels * mult[-1])
    h = residual("middle_block.2", attend("middle_block.1", h), channels * mult[-1])
    place = 0
    for level in reversed(range(len(mult))):
        width = channels * mult[level]
        for block in range(blocks + 1):
            h = residual(f"output_blocks.{place}.0", torch.cat([h, skips.pop()], 1), width)
            if level in attention:
                h = attend(f"output_blocks.{place}.1", h)
            if level and block == blocks:
                name = f"output_blocks.{place}.{2 if level in attention else 1}"
                if updown:
                    h = residual(name, h, width, "up")
                else:
                    h = F.interpolate(h, scale_factor=2)
                    h = p.conv(f"{name}.conv", h, width) if conv_resample else h
            place += 1
    out = x.shape[1] * (2 if learn_sigma else 1)
    return p.conv("out.2", F.silu(p.norm("out.0", h, 1e-5)), out)
