"""Song et al.'s U-Net once more, in plain functions of a state dict, as the two code bases define it; random weights.

Written from the definitions in NVlabs/edm (training/networks.py: SongUNet and the preconditionings) and in
yang-song/score_sde_pytorch (models/ncsnpp.py, ddpm.py): their names, their order, nothing of ours.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, linear, pad, silu

ROOT_HALF = math.sqrt(0.5)


def halved(x: Tensor, taps: Sequence[float]) -> Tensor:
    """x with a separable filter, which adds up to 1, and every second pixel of it: by explicit sums."""
    edge = (len(taps) - 2) // 2
    x = pad(x, (edge,) * 4)
    height, width = (x.shape[2] - len(taps)) // 2 + 1, (x.shape[3] - len(taps)) // 2 + 1
    total = sum(taps) ** 2
    return sum(  # type: ignore[return-value]
        a * b / total * x[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2]
        for i, a in enumerate(taps)
        for j, b in enumerate(taps)
    )


def doubled(x: Tensor, taps: Sequence[float]) -> Tensor:
    """Zeros between the pixels, then the filter four times as large: by explicit sums."""
    count, side = x.shape[:2], x.shape[2]
    wide = x.new_zeros(*count, 2 * side, 2 * side)
    wide[:, :, ::2, ::2] = x
    before = len(taps) // 2
    wide = pad(wide, (before, len(taps) - 1 - before) * 2)
    total = sum(taps) ** 2 / 4
    return sum(  # type: ignore[return-value]
        a * b / total * wide[:, :, i : i + 2 * side, j : j + 2 * side]
        for i, a in enumerate(taps)
        for j, b in enumerate(taps)
    )


def filtered(x: Tensor, taps: Sequence[float], stride: int) -> Tensor:
    """x, which is padded already, with the filter, at every pixel or every second."""
    row = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    return conv2d(x, (row[:, None] * row).expand(x.shape[1], 1, -1, -1), stride=stride, groups=x.shape[1])


def norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int | None = None) -> Tensor:
    return group_norm(x, groups or min(32, x.shape[1] // 4), weight, bias, eps=1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, C, H, W]."""
    found = []
    for query, key, value in zip(q.flatten(2), k.flatten(2), v.flatten(2), strict=True):  # [C, HW]
        found.append(value @ (query.T @ key / math.sqrt(len(query))).softmax(1).T)
    return torch.stack(found).reshape(q.shape)


class Weights(OrderedDict[str, Tensor]):
    """Random tensors, in the order in which they are added."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int, scale: float | None = None, shift: float = 0.0) -> None:
        size = scale if scale is not None else 1.0 / math.sqrt(max(math.prod(shape[1:]), 1))
        self[name] = shift + size * torch.randn(shape, generator=self.generator)

    def layer(self, name: str, *shape: int) -> None:
        self.add(f"{name}.weight", *shape)
        self.add(f"{name}.bias", shape[0], scale=0.1)

    def norm(self, name: str, channels: int) -> None:
        self.add(f"{name}.weight", channels, scale=0.2, shift=1.0)
        self.add(f"{name}.bias", channels, scale=0.1)


@dataclass(frozen=True)
class Net:
    """A network at a small size; both code bases' options of these names."""

    size: int = 8
    channels: int = 3
    nf: int = 16
    mult: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (4,)
    fourier: bool = False
    residual: bool = False
    fir: bool = False
    classes: int = 0
    augment: int = 0
    ddpm: bool = False

    @property
    def taps(self) -> tuple[float, ...]:
        return (1.0, 3.0, 3.0, 1.0) if self.fir else (1.0, 1.0)

    @property
    def groups(self) -> int | None:
        return 32 if self.ddpm else None


# -- EDM ------------------------------------------------------------------------------------------------


def edm_state(net: Net, seed: int = 0) -> Weights:
    """`SongUNet`'s state dict, below "model." as a preconditioning has it."""
    w = Weights(seed)
    noise, emb = net.nf * (2 if net.fourier else 1), 4 * net.nf
    row = torch.tensor(net.taps)
    filter = (row[:, None] * row)[None, None] / row.sum() ** 2

    def block(name: str, given: int, width: int, resample: bool = False, attention: bool = False) -> None:
        w.norm(f"{name}.norm0", given)
        w.layer(f"{name}.conv0", width, given, 3, 3)
        if resample:
            w[f"{name}.conv0.resample_filter"] = filter
        w.layer(f"{name}.affine", width, emb)
        w.norm(f"{name}.norm1", width)
        w.layer(f"{name}.conv1", width, width, 3, 3)
        if resample or given != width:
            w.layer(f"{name}.skip", width, given, 1, 1)
        if resample:
            w[f"{name}.skip.resample_filter"] = filter
        if attention:
            w.norm(f"{name}.norm2", width)
            w.layer(f"{name}.qkv", 3 * width, width, 1, 1)
            w.layer(f"{name}.proj", width, width, 1, 1)

    if net.fourier:
        w.add("model.map_noise.freqs", noise // 2, scale=2.0)
    if net.classes:
        w.layer("model.map_label", noise, net.classes)
    if net.augment:
        w.add("model.map_augment.weight", noise, net.augment)
    w.layer("model.map_layer0", emb, noise)
    w.layer("model.map_layer1", emb, emb)
    sides = [net.size >> level for level in range(len(net.mult))]
    given, entering, kept = net.nf, net.channels, [net.nf]
    for level, (side, mult) in enumerate(zip(sides, net.mult, strict=True)):
        at = f"model.enc.{side}x{side}"
        if level == 0:
            w.layer(f"{at}_conv", net.nf, net.channels, 3, 3)
        else:
            block(f"{at}_down", given, given, resample=True)
            if net.residual:
                w.layer(f"{at}_aux_residual", given, entering, 3, 3)
                w[f"{at}_aux_residual.resample_filter"] = filter
                entering = given
            kept.append(given)
        for index in range(net.blocks):
            block(f"{at}_block{index}", given, net.nf * mult, attention=side in net.attention)
            given = net.nf * mult
            kept.append(given)
    for level in reversed(range(len(sides))):
        side, at = sides[level], f"model.dec.{sides[level]}x{sides[level]}"
        if level == len(sides) - 1:
            block(f"{at}_in0", given, given, attention=True)
            block(f"{at}_in1", given, given)
        else:
            block(f"{at}_up", given, given, resample=True)
        for index in range(net.blocks + 1):
            attention = index == net.blocks and side in net.attention
            block(f"{at}_block{index}", given + kept.pop(), net.nf * net.mult[level], attention=attention)
            given = net.nf * net.mult[level]
    w.norm(f"model.dec.{net.size}x{net.size}_aux_norm", given)
    w.layer(f"model.dec.{net.size}x{net.size}_aux_conv", net.channels, given, 3, 3)
    return w


def edm_forward(net: Net, state: dict[str, Tensor], x: Tensor, noise: Tensor, classes: Tensor | None = None) -> Tensor:
    """`SongUNet.forward` of one-hot `classes` (zeros for None), in x's precision; labels of augmentation are zero."""
    w = {name.removeprefix("model."): tensor.to(x.dtype) for name, tensor in state.items()}
    taps = net.taps

    def conv(name: str, h: Tensor) -> Tensor:
        return conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def dense(name: str, h: Tensor) -> Tensor:
        return linear(h, w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name: str, h: Tensor, resample: Callable[[Tensor, Sequence[float]], Tensor] | None = None) -> Tensor:
        before, h = h, silu(norm(h, w[f"{name}.norm0.weight"], w[f"{name}.norm0.bias"]))
        if resample is not None:
            before, h = resample(before, taps), resample(h, taps)
        h = conv(f"{name}.conv0", h) + dense(f"{name}.affine", emb)[:, :, None, None]
        h = conv(f"{name}.conv1", silu(norm(h, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"])))
        h = (h + (conv(f"{name}.skip", before) if f"{name}.skip.weight" in w else before)) * ROOT_HALF
        if f"{name}.qkv.weight" in w:
            qkv = conv(f"{name}.qkv", norm(h, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"]))
            q, k, v = qkv.reshape(len(h), -1, 3, *h.shape[2:]).unbind(2)
            h = (conv(f"{name}.proj", attend(q, k, v)) + h) * ROOT_HALF
        return h

    if net.fourier:
        phase = noise[:, None] * w["map_noise.freqs"] * 2 * math.pi
    else:
        half = net.nf // 2
        phase = noise[:, None] * (1 / 10000) ** (torch.arange(half, dtype=x.dtype) / (half - 1))
    emb = torch.cat([phase.sin(), phase.cos()], 1)
    if net.classes:
        hot = torch.zeros(len(x), net.classes, dtype=x.dtype)
        if classes is not None:
            hot[torch.arange(len(x)), classes] = 1
        emb = emb + dense("map_label", hot * math.sqrt(net.classes))
    emb = silu(dense("map_layer1", silu(dense("map_layer0", emb))))
    sides = [net.size >> level for level in range(len(net.mult))]
    kept: list[Tensor] = []
    image = x
    for level, side in enumerate(sides):
        at = f"enc.{side}x{side}"
        x = conv(f"{at}_conv", x) if level == 0 else block(f"{at}_down", x, halved)
        if level > 0 and net.residual:  # the convolution first, padded for the filter, too; then that, then bias
            wide = conv2d(image, w[f"{at}_aux_residual.weight"], padding=len(taps) // 2)
            inside = filtered(wide, taps, stride=2)
            image = x = (x + inside + w[f"{at}_aux_residual.bias"][:, None, None]) * ROOT_HALF
        kept.append(x)
        for index in range(net.blocks):
            x = block(f"{at}_block{index}", x)
            kept.append(x)
    for level in reversed(range(len(sides))):
        at = f"dec.{sides[level]}x{sides[level]}"
        x = block(f"{at}_in1", block(f"{at}_in0", x)) if level == len(sides) - 1 else block(f"{at}_up", x, doubled)
        for index in range(net.blocks + 1):
            x = block(f"{at}_block{index}", torch.cat([x, kept.pop()], 1))
    at = f"dec.{net.size}x{net.size}"
    return conv(f"{at}_aux_conv", silu(norm(x, w[f"{at}_aux_norm.weight"], w[f"{at}_aux_norm.bias"])))


def edm_denoise(
    class_name: str, net: Net, state: dict[str, Tensor], x: Tensor, sigma: Tensor, classes: Tensor | None = None
) -> Tensor:
    """D(x; sigma) of `EDMPrecond`, `VPPrecond` and `VEPrecond` with their published settings."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    if class_name == "EDMPrecond":
        total = sigma**2 + 0.25
        skip, out, into, label = 0.25 / total, 0.5 * sigma / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4
    elif class_name == "VPPrecond":
        time = ((0.01 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
        skip, out, into, label = torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), 999 * time
    else:
        skip, out, into, label = torch.ones_like(sigma), sigma, torch.ones_like(sigma), (sigma / 2).log()
    return skip * x + out * edm_forward(net, state, into * x, label.flatten(), classes)


def edm_content(class_name: str, net: Net, seed: int = 0) -> dict[str, Any]:
    """What the recipe of `ddim_lab.models.foreign.edm` saves."""
    own = {"EDMPrecond": {"sigma_data": 0.5}, "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}}
    settings = {"img_resolution": net.size, "img_channels": net.channels, "label_dim": net.classes, "sigma_min": 0}
    return {
        "class": class_name,
        "model": "SongUNet",
        "state": dict(edm_state(net, seed)),
        "settings": {**settings, **own.get(class_name, {})},
    }


# -- ScoreSDE -------------------------------------------------------------------------------------------


def score_sde_state(net: Net, seed: int = 0) -> Weights:
    """The state dict of `NCSNpp` (or `DDPM`), in the order of its parameters, behind "module."."""
    w = Weights(seed)
    w["module.sigmas"] = torch.linspace(math.log(50.0), math.log(0.01), 1000).exp()
    count = 0
    emb = 4 * net.nf

    def at() -> str:
        nonlocal count
        count += 1
        return f"module.all_modules.{count - 1}"

    def nin(name: str, given: int, width: int) -> None:
        w.add(f"{name}.W", given, width, scale=1 / math.sqrt(given))
        w.add(f"{name}.b", width, scale=0.1)

    def block(given: int, width: int, resample: bool = False) -> None:
        name = at()
        w.norm(f"{name}.GroupNorm_0", given)
        w.layer(f"{name}.Conv_0", width, given, 3, 3)
        w.layer(f"{name}.Dense_0", width, emb)
        w.norm(f"{name}.GroupNorm_1", width)
        w.layer(f"{name}.Conv_1", width, width, 3, 3)
        if net.ddpm and given != width:
            nin(f"{name}.NIN_0", given, width)
        elif given != width or resample:
            w.layer(f"{name}.Conv_2", width, given, 1, 1)

    def attention(width: int) -> None:
        name = at()
        w.norm(f"{name}.GroupNorm_0", width)
        for index in range(4):
            nin(f"{name}.NIN_{index}", width, width)

    def resample(width: int) -> None:
        if net.ddpm:
            w.layer(f"{at()}.Conv_0", width, width, 3, 3)
        else:
            block(width, width, resample=True)

    if net.fourier:
        w.add(f"{at()}.W", net.nf, scale=16.0)
    w.layer(at(), emb, 2 * net.nf if net.fourier else net.nf)
    w.layer(at(), emb, emb)
    w.layer(at(), net.nf, net.channels, 3, 3)
    given, entering, kept = net.nf, net.channels, [net.nf]
    sides = [net.size >> level for level in range(len(net.mult))]
    for level, mult in enumerate(net.mult):
        for _ in range(net.blocks):
            block(given, net.nf * mult)
            given = net.nf * mult
            if sides[level] in net.attention:
                attention(given)
            kept.append(given)
        if level < len(sides) - 1:
            resample(given)
            if net.residual:
                w.layer(f"{at()}.Conv2d_0", given, entering, 3, 3)
                entering = given
            kept.append(given)
    block(given, given)
    attention(given)
    block(given, given)
    for level in reversed(range(len(sides))):
        for _ in range(net.blocks + 1):
            block(given + kept.pop(), net.nf * net.mult[level])
            given = net.nf * net.mult[level]
        if sides[level] in net.attention:
            attention(given)
        if level > 0:
            resample(given)
    w.norm(at(), given)
    w.layer(at(), net.channels, given, 3, 3)
    return w


def score_sde_forward(net: Net, state: dict[str, Tensor], x: Tensor, time_cond: Tensor) -> Tensor:
    """`NCSNpp.forward` (or `DDPM.forward`) with a positional embedding, of centred data, not divided by sigma."""
    w = {name.removeprefix("module.all_modules."): tensor.to(x.dtype) for name, tensor in state.items()}
    scale = 1.0 if net.ddpm else ROOT_HALF
    number = -1

    def layer() -> int:
        nonlocal number
        number += 1
        return number

    def conv(name: str, h: Tensor) -> Tensor:
        return conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def normed(name: str, h: Tensor) -> Tensor:
        return norm(h, w[f"{name}.weight"], w[f"{name}.bias"], net.groups)

    def nin(name: str, h: Tensor) -> Tensor:
        return (h.permute(0, 2, 3, 1) @ w[f"{name}.W"] + w[f"{name}.b"]).permute(0, 3, 1, 2)

    def block(h: Tensor, resample: Callable[[Tensor, Sequence[float]], Tensor] | None = None) -> Tensor:
        name = str(layer())
        before, h = h, silu(normed(f"{name}.GroupNorm_0", h))
        if resample is not None:
            before, h = resample(before, net.taps), resample(h, net.taps)
        dense = linear(silu(temb), w[f"{name}.Dense_0.weight"], w[f"{name}.Dense_0.bias"])
        h = conv(f"{name}.Conv_0", h) + dense[:, :, None, None]
        h = conv(f"{name}.Conv_1", silu(normed(f"{name}.GroupNorm_1", h)))
        if f"{name}.Conv_2.weight" in w:
            before = conv(f"{name}.Conv_2", before)
        elif f"{name}.NIN_0.W" in w:
            before = nin(f"{name}.NIN_0", before)
        return (before + h) * scale

    def attention(h: Tensor) -> Tensor:
        name = str(layer())
        q, k, v = (nin(f"{name}.NIN_{index}", normed(f"{name}.GroupNorm_0", h)) for index in range(3))
        return (h + nin(f"{name}.NIN_3", attend(q, k, v))) * scale

    half = net.nf // 2
    phase = time_cond[:, None] * torch.exp(torch.arange(half, dtype=x.dtype) * -(math.log(10000) / (half - 1)))
    temb = torch.cat([phase.sin(), phase.cos()], 1)
    for _ in range(2):
        temb = temb if number < 0 else silu(temb)
        name = str(layer())
        temb = linear(temb, w[f"{name}.weight"], w[f"{name}.bias"])
    pyramid = x
    kept = [conv(str(layer()), x)]
    for level in range(len(net.mult)):
        for _ in range(net.blocks):
            h = block(kept[-1])
            kept.append(attention(h) if h.shape[-1] in net.attention else h)
        if level == len(net.mult) - 1:
            continue
        if net.ddpm:
            name = f"{layer()}.Conv_0"
            h = conv2d(pad(kept[-1], (0, 1, 0, 1)), w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        else:
            h = block(kept[-1], halved)
        if net.residual:  # the filter first, on an image padded for both, then the convolution
            name = f"{layer()}.Conv2d_0"
            wide = filtered(pad(pyramid, (2,) * 4), net.taps, stride=1)
            pyramid = conv2d(wide, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
            pyramid = h = (pyramid + h) * ROOT_HALF
        kept.append(h)
    h = block(attention(block(kept[-1])))
    for level in reversed(range(len(net.mult))):
        for _ in range(net.blocks + 1):
            h = block(torch.cat([h, kept.pop()], 1))
        if h.shape[-1] in net.attention:
            h = attention(h)
        if level > 0 and net.ddpm:
            h = conv(f"{layer()}.Conv_0", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        elif level > 0:
            h = block(h, doubled)
    h = silu(normed(str(layer()), h))
    h = conv(str(layer()), h)
    assert not kept
    assert f"{number + 1}.weight" not in w
    return h


def score_sde_content(net: Net, seed: int = 0) -> dict[str, Any]:
    """What score_sde_pytorch's `save_checkpoint` writes: the average is of other weights than `model`."""
    state = score_sde_state(net, seed)
    shadow = [tensor for name, tensor in score_sde_state(net, seed + 1).items() if name != "module.sigmas"]
    if net.fourier:  # it needs no gradient, so no average is kept
        shadow = shadow[1:]
    return {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4, "params": [0]}]},
        "model": OrderedDict(state),
        "ema": {"decay": 0.9999, "num_updates": 12, "shadow_params": shadow},
        "step": 12,
    }
