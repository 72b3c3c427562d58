"""The U-Net of Song et al. 2021 (score-based SDEs): DDPM++ and NCSN++, and their port of Ho et al.'s.

Written after the paper's appendix H, and after the definitions that its checkpoints were made with: `ncsnpp` and `ddpm`
in yang-song/score_sde_pytorch, `SongUNet` in NVlabs/edm (Karras et al. 2022). How it differs from diffusers'
`UNet2DModel`: attention follows the last block alone on the way up, images are resampled inside a residual block, sums
are scaled by sqrt(1/2), and NCSN++ adds the image itself, halved and convolved, at each level of the way down.

Layers have the names that diffusers gives theirs, so that `ddim_lab.device.precision` knows the edges by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Resampling", "SongUNet", "SongUNetShape"]

Resampling = Literal["box", "fir", "convolution"]
"""How images are halved and doubled.

box: the mean of 2x2 pixels, and each pixel twice (DDPM++); fir: with the binomial filter 1, 3, 3, 1 (NCSN++); each in a
residual block. convolution: a 3x3 convolution by itself, as in Ho et al. 2020, whose sums are not scaled, either.
"""


@final
@dataclass(frozen=True)
class SongUNetShape:
    """What a network is, but for its weights.

    Attributes:
        channels: of images.
        stem: channels of the first convolution.
        widths: channels of each level, from the full size downwards.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: whether the blocks of each level attend.
        features, embedding: of the label's sines and cosines, and of what each block is given of it.
        fourier: whether their frequencies are stored random ones (NCSN++), or a geometric series.
        pyramid: whether the image enters at each level.
        resampling: as said.
        classes: how many the network was conditioned on; 0 for none.
    """

    channels: int
    stem: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    features: int
    embedding: int
    fourier: bool
    pyramid: bool
    resampling: Resampling
    classes: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], resampling: Resampling) -> SongUNetShape:
        """The shape of a network whose state dict is given, by the names that are used here.

        Raises:
            KeyError: a tensor lacks by which something is told.
        """
        levels = range(_count(state, r"down\.(\d+)\..*"))
        classes = state.get("class_embedding.linear.weight")
        return cls(
            channels=state["conv_in.weight"].shape[1],
            stem=state["conv_in.weight"].shape[0],
            widths=tuple(state[f"down.{level}.blocks.0.conv1.weight"].shape[0] for level in levels),
            blocks=_count(state, r"down\.0\.blocks\.(\d+)\..*"),
            attention=tuple(f"down.{level}.blocks.0.attention.to_qkv.weight" in state for level in levels),
            features=state["time_embedding.linear_1.weight"].shape[1],
            embedding=state["time_embedding.linear_1.weight"].shape[0],
            fourier="time_features.frequencies" in state,
            pyramid="down.1.pyramid.conv.weight" in state,
            resampling=resampling,
            classes=0 if classes is None else classes.shape[1],
        )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(found[1]) + 1 for name in state if (found := re.fullmatch(pattern, name))), default=0)


@final
class SongUNet(nn.Module):
    """F(x, label): x [B, C, H, W], label [B] of any real numbers -> [B, C, H, W].

    Args:
        shape: of the network; H and W must be multiples of 2^(levels - 1).
    """

    def __init__(self, shape: SongUNetShape) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(shape.channels, shape.stem, 3, padding=1)
        self.time_features = _Fourier(shape.features) if shape.fourier else _Positional(shape.features)
        self.class_embedding = _ClassEmbedding(shape.classes, shape.features) if shape.classes else None
        self.time_embedding = _Embedding(shape.features, shape.embedding)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        given, entering = shape.stem, shape.channels
        kept = [given]  # channels of what the way up is given
        for level, (width, attention) in enumerate(zip(shape.widths, shape.attention, strict=True)):
            into = pyramid = None
            if level > 0:
                into = _resample(given, shape, up=False)
                if shape.pyramid:
                    pyramid, entering = _Pyramid(entering, given, shape.resampling), given
                kept.append(given)
            blocks = []
            for _ in range(shape.blocks):
                blocks.append(_Block(given, width, shape, attention=attention))
                given = width
                kept.append(width)
            self.down.append(_Level(into, blocks, pyramid))
        self.middle = nn.ModuleList(_Block(given, given, shape, attention=attention) for attention in (True, False))
        for level in reversed(range(len(shape.widths))):
            into = _resample(given, shape, up=True) if level < len(shape.widths) - 1 else None
            width, blocks = shape.widths[level], []
            for last in [False] * shape.blocks + [True]:
                blocks.append(_Block(given + kept.pop(), width, shape, attention=last and shape.attention[level]))
                given = width
            self.up.append(_Level(into, blocks))
        self.conv_norm_out = _norm(given, shape)
        self.conv_out = nn.Conv2d(given, shape.channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output for inputs and labels.

        Args:
            x: [B, C, H, W].
            label: of the noise level [B].
            class_labels: int64 [B], for a network with classes; None, or any that is not in 0 ... classes - 1, stands
                for no class, which such a network is told by zeros.
        """
        features = self.time_features(label).to(x.dtype)
        if self.class_embedding is not None:
            features = features + self.class_embedding(class_labels, features)
        embedding = self.time_embedding(features)
        image, h = x, self.conv_in(x)
        kept = [h]
        for level in self.down:
            assert isinstance(level, _Level)
            if level.into is not None:
                h = level.into(h, embedding)
                if level.pyramid is not None:
                    h = image = (h + level.pyramid(image)) * math.sqrt(0.5)
                kept.append(h)
            for block in level.blocks:
                h = block(h, embedding)
                kept.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for level in self.up:
            assert isinstance(level, _Level)
            if level.into is not None:
                h = level.into(h, embedding)
            for block in level.blocks:
                h = block(torch.cat([h, kept.pop()], dim=1), embedding)
        output = self.conv_out(functional.silu(self.conv_norm_out(h)))
        assert isinstance(output, Tensor)
        return output


def _scale(shape: SongUNetShape) -> float:
    """What each sum of two is multiplied by."""
    return 1.0 if shape.resampling == "convolution" else math.sqrt(0.5)


def _norm(channels: int, shape: SongUNetShape) -> nn.GroupNorm:
    groups = 32 if shape.resampling == "convolution" else max(min(channels // 4, 32), 1)
    return nn.GroupNorm(groups, channels, eps=1e-6)


# -- the label --------------------------------------------------------------------------------------------


@final
class _Positional(nn.Module):
    """sin(w_i label), cos(w_i label) with w_i = 10000^(-i / (n - 1)), i = 0 ... n - 1: float64 [B, 2 n]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        count = features // 2
        frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / max(count - 1, 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        return _waves(label.double()[:, None] * self.get_buffer("frequencies"))


@final
class _Fourier(nn.Module):
    """sin(2 pi w_i label), cos(2 pi w_i label) with stored w_i: float64 [B, 2 n]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(features // 2))

    def forward(self, label: Tensor) -> Tensor:
        return _waves(2.0 * math.pi * label.double()[:, None] * self.get_buffer("frequencies"))


def _waves(phase: Tensor) -> Tensor:
    return torch.cat([phase.sin(), phase.cos()], dim=1)


@final
class _ClassEmbedding(nn.Module):
    """sqrt(classes) W e_c + b, where e_c is 1 at the class c and 0 elsewhere; 0 everywhere for no class."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(classes, features)
        self.register_buffer("known", torch.arange(classes), persistent=False)

    def forward(self, class_labels: Tensor | None, like: Tensor) -> Tensor:
        known = self.get_buffer("known")
        if class_labels is None:
            given = torch.zeros(len(like), len(known), dtype=like.dtype, device=like.device)
        else:
            given = (class_labels[:, None] == known).to(like.dtype)
        output = self.linear(given * math.sqrt(len(known)))
        assert isinstance(output, Tensor)
        return output


@final
class _Embedding(nn.Module):
    """silu(linear_2(silu(linear_1(features))))."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        return functional.silu(self.linear_2(functional.silu(self.linear_1(features))))


# -- a level ----------------------------------------------------------------------------------------------


@final
class _Level(nn.Module):
    """What is done at one size: what leads into it, and its blocks."""

    def __init__(self, into: nn.Module | None, blocks: list[_Block], pyramid: _Pyramid | None = None) -> None:
        super().__init__()
        self.into = into
        self.pyramid = pyramid
        self.blocks = nn.ModuleList(blocks)


def _resample(channels: int, shape: SongUNetShape, *, up: bool) -> nn.Module:
    """What halves or doubles a level's images on the way to the next."""
    if shape.resampling == "convolution":
        return _UpConvolution(channels) if up else _DownConvolution(channels)
    return _Block(channels, channels, shape, resample=_Up(shape.resampling) if up else _Down(shape.resampling))


@final
class _Block(nn.Module):
    """A residual block, which may resample and may attend; in Ho et al.'s without the sqrt(2).

    h = conv2(silu(norm2(conv1(resample(silu(norm1(x)))) + time_emb_proj(embedding))))
    x = (h + conv_shortcut(resample(x))) / sqrt(2)
    """

    def __init__(
        self,
        given: int,
        width: int,
        shape: SongUNetShape,
        *,
        attention: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self._scale: Final = _scale(shape)
        self.resample = resample
        self.norm1 = _norm(given, shape)
        self.conv1 = nn.Conv2d(given, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(shape.embedding, width)
        self.norm2 = _norm(width, shape)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        shortcut = given != width or resample is not None
        self.conv_shortcut = nn.Conv2d(given, width, 1) if shortcut else None
        self.attention = _Attention(width, shape) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = functional.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.time_emb_proj(embedding)[:, :, None, None]
        h = self.conv2(functional.silu(self.norm2(h)))
        x = (h + (x if self.conv_shortcut is None else self.conv_shortcut(x))) * self._scale
        return x if self.attention is None else self.attention(x)


@final
class _Attention(nn.Module):
    """(x + to_out(softmax(q k^T / sqrt(C)) v)) / sqrt(2) over the pixels, one head; q, k, v from one layer."""

    def __init__(self, channels: int, shape: SongUNetShape) -> None:
        super().__init__()
        self._scale: Final = _scale(shape)
        self.group_norm = _norm(channels, shape)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.to_qkv(pixels)[:, None].chunk(3, dim=-1)
        found = self.to_out[0](functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return (found.transpose(1, 2).reshape(x.shape) + x) * self._scale  # type: ignore[no-any-return]


# -- resampling -------------------------------------------------------------------------------------------


@final
class _Filter(nn.Module):
    """1, 3, 3, 1 in both directions, adding up to 1, over each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([0.125, 0.375, 0.375, 0.125])
        self.register_buffer("taps", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor, padding: int, stride: int) -> Tensor:
        return functional.conv2d(x, self._of_each_channel(x), stride=stride, padding=padding, groups=x.shape[1])

    def transposed(self, x: Tensor) -> Tensor:
        """Doubled: zeros between the pixels, which the filter, four times as large, then fills."""
        return functional.conv_transpose2d(x, 4.0 * self._of_each_channel(x), stride=2, padding=1, groups=x.shape[1])

    def _of_each_channel(self, x: Tensor) -> Tensor:
        return self.get_buffer("taps").to(x.dtype).expand(x.shape[1], 1, 4, 4)


@final
class _Down(nn.Module):
    def __init__(self, resampling: Resampling) -> None:
        super().__init__()
        self.filter = _Filter() if resampling == "fir" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return functional.avg_pool2d(x, 2)
        return self.filter(x, padding=1, stride=2)  # type: ignore[no-any-return]


@final
class _Up(nn.Module):
    def __init__(self, resampling: Resampling) -> None:
        super().__init__()
        self.filter = _Filter() if resampling == "fir" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.filter.transposed(x)


@final
class _Pyramid(nn.Module):
    """The image, or what became of it above, convolved and halved.

    The filter goes first, on an image that is padded once for both: the same as the other way round.
    """

    def __init__(self, given: int, channels: int, resampling: Resampling) -> None:
        super().__init__()
        self.filter = _Filter() if resampling == "fir" else None
        self.conv = (
            nn.Conv2d(given, channels, 3, padding=1) if self.filter is None else nn.Conv2d(given, channels, 3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return functional.avg_pool2d(self.conv(x), 2)
        return self.conv(self.filter(x, padding=2, stride=1))  # type: ignore[no-any-return]


@final
class _DownConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


@final
class _UpConvolution(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
