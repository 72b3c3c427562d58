"""A U-Net in bf16 or fp16, but for the parts where rounding would show in the images.

A number in bf16 has 8 significant bits, so every tensor that is rounded to it gains relative noise of 2^-9. Matrix
products and convolutions are what 16 bits make fast, and they add up in fp32 whatever they are given. What they are
given is rounded here, layer by layer; what else is rounded is a choice:

    edges   the first and the last convolution (with the norm before it), others that are given the image, and the time
            embedding: they are small
    outer   the blocks of the image's own resolution, the first on the way down and the last on the way up, with their
            norms and sums; where blocks are named otherwise than diffusers' (down_blocks, up_blocks), none
    norms   the other group norms: their scale and shift, and what they are given if `stream` is kept
    narrow  a whole network whose convolutions all give fewer than 64 channels: on a CPU 16 bits gain little there (the
            digits' U-Net with what else a CPU keeps, compiled: 1.04 times as fast as in fp32 with 256 images at once,
            0.43 times with one)
    stream  the sums that run through the network: residual branches and skip connections are added in fp32
    weights the weights and biases of layers that are not kept: each is the sum of two 16-bit numbers (the second is
            what rounding to the first leaves out) and every product is computed with both; what comes out is rounded
            as before. In bf16 that is 16 significant bits; in fp16, whose smallest numbers are 6e-8, not always twice
            as many

On a Fashion-MNIST U-Net the edges are what matters: with them the error of eps falls to 0.4 of its size, at small t to
0.2, and its mean, which moves a whole image one way, to 0.1. The first convolution is given x_t, most of whose bits are
in use at small t, and the last one gives eps. The stream is worth a fifth of what is left, the time embedding nothing
that can be seen.

Of what is left the outer blocks make 0.92 to 1.0: rounding weights and inputs there alone, against doing so in all
layers (32 noisy images, t = 1 to 900). What shows in samples is the part that is the same all over an image: a walk of
ten steps enlarges it by 1 / sqrt(alpha_bar of its first t), 61. Rounded inputs err one way here, the other way there;
rounded weights err alike in all places and images. The mean errors of the outer blocks and of the others have opposite
signs here, so that a choice that keeps fewer parts can seem better by chance. Difference to fp32 of 64 samples on the
[0, 1] scale, S = 10, eta 0, on a CPU with AMX (torch 2.14, 2026-11-28): its square, and its mean over all pixels,
+- 0.2e-4 to 0.5e-4:

                                           squared      mean
    edges                                  3.0e-6   -2.5e-4
    edges, weights                         4.4e-6   +5.4e-4
    edges, norms, weights                  4.2e-6   -2.9e-4
    edges, outer                           3.5e-6   +8.6e-4
    edges, norms, outer                    5.8e-7   +0.6e-4
    edges, norms, outer, stream            7.0e-7   +0.6e-4
    edges, norms, outer, weights           3.0e-7   +0.7e-4
    edges, norms, outer; compiled          1.5e-6   +3.1e-4
    edges, norms, outer, weights; compiled 4.7e-7   +0.7e-4
    fp32, with the inner blocks' weights rounded
                                           9.6e-7   +2.4e-4

Autocast chooses otherwise: its first convolution, the stream, the time embedding and eps are rounded, and it rounds all
weights again in every forward.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from types import MethodType
from typing import Final, final

import torch
from torch import Tensor, nn

from ddim_lab.config.runtime import Part

__all__ = ["ends_without_autocast", "is_narrow", "lower_precision"]

NARROW: Final = 64
"""Channels of its widest convolution from which on a network is not narrow."""

_ENDS: Final = re.compile(r"(.*\.)?(conv_norm_out|conv_out|(time|class)_embedding\..*)")
_EDGES: Final = re.compile(rf"{_ENDS.pattern}|(.*\.)?(conv_in|pyramid\.conv|time_emb_proj)")
_INTO_STREAM: Final = re.compile(
    r"(.*\.)?(conv_in|conv2|conv_shortcut|to_out\.0|(down|up)samplers\.\d+\.conv|into\.conv|pyramid\.conv)"
)


def lower_precision(network: nn.Module, dtype: torch.dtype, keep: Collection[Part]) -> None:
    """Make a U-Net compute in `dtype` but for what `keep` names, in place.

    It is diffusers' `UNet2DModel`, or one whose layers are named as there, be it inside another module. Convolutions,
    linear layers and group norms are given the dtype; any other layer with weights stays as it is. Keys of the state
    dict change (a layer's weights are then those of its `layer`, and of `rest` where there are two numbers each).

    Args:
        network: the U-Net, fp32, for inference only: gradients are not supported.
        dtype: torch.bfloat16 or torch.float16.
        keep: parts that stay fp32, or near it; none is a network that is `dtype` throughout.
    """
    if "narrow" in keep and is_narrow(network):
        return
    outer = _outer(network) if "outer" in keep else None
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            continue
        edge = _EDGES.fullmatch(name) is not None
        kept = ("edges" in keep and edge) or ("norms" in keep and isinstance(layer, nn.GroupNorm) and not edge)
        full = "stream" in keep and _INTO_STREAM.fullmatch(name) is not None
        if kept and _ENDS.fullmatch(name) is not None:
            full = True  # what comes next is fp32, too
        if outer is not None:
            inside_it = outer.fullmatch(name) is not None
            kept = kept or inside_it
            # The image's first features are part of the outer stream; what leads on to half the resolution is not.
            full = full or (inside_it and ".downsamplers." not in name) or name.endswith("conv_in")
        rest = None
        if "weights" in keep and not kept and not isinstance(layer, nn.GroupNorm):
            rest = _remainder(layer, dtype)
        parent, _, child = name.rpartition(".")
        cast = _Cast(layer, rest, torch.float32 if kept else dtype, torch.float32 if full else dtype)
        setattr(network.get_submodule(parent), child, cast)


def is_narrow(network: nn.Module) -> bool:
    """Whether it is a network that `narrow` keeps."""
    widths = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return bool(widths) and max(widths) < NARROW


def _remainder(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same layer with what rounding to `dtype` leaves of its weights, w - round(w), rounded in turn."""
    rest = copy.deepcopy(layer)
    for each in rest.parameters():
        each.data -= each.data.to(dtype)
    return rest.to(dtype)


def _outer(network: nn.Module) -> re.Pattern[str]:
    """What the layers of the outermost blocks are called."""
    ups = [int(found[1]) for name, _ in network.named_modules() if (found := re.search(r"up_blocks\.(\d+)\.", name))]
    return re.compile(rf"(.*\.)?(down_blocks\.0|up_blocks\.{max(ups, default=0)})\..*")


def ends_without_autocast(network: nn.Module) -> None:
    """Let the first and the last convolution of a diffusers `UNet2DModel` compute in fp32 under autocast, in place.

    For training. At t = 0 of Ho et al.'s schedule the noise in x_t has a standard deviation of 0.01; rounded to bf16,
    an x_t near 1 moves by up to 0.004: much of what is to be predicted there is lost before the network sees it. The
    state dict stays as it is.

    Args:
        network: the U-Net, fp32.
    """
    for name in ("conv_in", "conv_out"):
        layer = network.get_submodule(name)
        layer.forward = MethodType(_without_autocast, layer)  # a method, so that a copy of the layer has its own


def _without_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        output = type(layer).forward(layer, x.float())
    assert isinstance(output, Tensor)
    return output


@final
class _Cast(nn.Module):
    """A layer that is given its input in its own dtype, and whose output is cast to another.

    Args:
        layer: linear in its weights where there is a `rest`; converted in place.
        rest: the layer with what was rounded off its weights, in the dtype inside.
        inside: dtype of the layer.
        outside: dtype of the output.
    """

    def __init__(self, layer: nn.Module, rest: nn.Module | None, inside: torch.dtype, outside: torch.dtype) -> None:
        super().__init__()
        self.layer = layer.to(inside)
        self.rest = rest
        self._inside, self._outside = inside, outside

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self._inside)
        output = self.layer(x)
        assert isinstance(output, Tensor)
        output = output.to(self._outside)
        return output if self.rest is None else output.add_(self.rest(x))
