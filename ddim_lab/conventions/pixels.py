"""What becomes of images on the way to a feature network: levels, JPEG, a part of them, mirror images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from ddim_lab.conventions.protocol import Levels
from ddim_lab.data.images import ImageSet
from ddim_lab.noise import NamedNoise

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

__all__ = ["CODEC", "COINS", "Changed", "First", "Mirrored", "as_levels", "jpeg", "round_trip"]

CODEC: Final = f"Pillow {PIL.__version__}"
"""What writes JPEG, whose pixels depend on it."""

COINS: Final = 1906
"""Seed of the coins that stand for what rounding threw away."""


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Images written as JPEG and read again, by Pillow with its own settings (4:2:0 for colour).

    Args:
        images: uint8 [B, C, H, W] with 1 or 3 channels, on the CPU.
        quality: 1 to 95.

    Returns:
        uint8 [B, C, H, W].
    """
    mode = "L" if images.shape[1] == 1 else "RGB"

    def through(pixels: Pixels) -> Pixels:
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels, mode).save(file, "JPEG", quality=quality)
        found = np.asarray(Image.open(file).convert(mode))
        return found.reshape(pixels.shape)

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock
        found = np.stack(list(pool.map(through, images.permute(0, 2, 3, 1).contiguous().numpy())))
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def round_trip() -> Tensor:
    """What each of the 256 levels becomes by Normalize(0.5, 0.5), back to [0, 1] and (x * 255).byte(); uint8 [256].

    In float32, as torchmetrics' normalize=True takes images that a loader has normalised: 63 of them lose one.
    """
    levels = torch.arange(256, dtype=torch.float32)
    normalised = (levels / 255.0 - 0.5) / 0.5
    return ((normalised * 0.5 + 0.5) * 255.0).to(torch.uint8)


def as_levels(images: Tensor, levels: Levels, indices: Tensor) -> Tensor:
    """Images with their levels taken otherwise.

        rounded     to the nearest of 256 levels
        truncated   to the level below: ((x + 1) * 127.5).to(uint8)
        raised      as if these had been truncated, and are to be as if they had been rounded
        round_trip  see `round_trip`
        float       not brought to whole levels at all

    Of images that were rounded already, what truncation gives is known in distribution: a value that was rounded to u
    lay below it or not with equal probability, so that a coin decides between u - 1 and u. The two ends are what they
    were: most of their values were clamped. "raised" is the like of it in the other direction.

    Args:
        images: uint8, or float32 from 0 to 255 before rounding, [B, C, H, W] on the CPU.
        levels: how.
        indices: int64 [B], the images' places in their set, by which the coins are named.

    Returns:
        uint8; float32 for "float".

    Raises:
        ValueError: "float" of images that are uint8.
    """
    if images.dtype != torch.uint8:
        exact = {"rounded": images.round(), "truncated": images.floor(), "float": images}
        if levels in exact:
            found = exact[levels]
            return found if levels == "float" else found.to(torch.uint8)
        images = images.round().to(torch.uint8)
    if levels == "rounded":
        return images
    if levels == "round_trip":
        return round_trip()[images.long()]
    if levels == "float":
        raise ValueError("what these images were before they were rounded is not known")
    noise = NamedNoise(COINS).initial(indices, torch.empty(images.shape))
    moved = images.to(torch.int16) + (1 if levels == "raised" else -1) * (noise > 0).to(torch.int16)
    inside = (images > 0) & (images < 255)
    return torch.where(inside, moved, images.to(torch.int16)).to(torch.uint8)


@final
class Changed(ImageSet):
    """Images of a set, each changed.

    Args:
        images: the set.
        change: of a batch [B, C, H, W] and its indices (int64 [B]).
        what: identifies the change.
    """

    def __init__(self, images: ImageSet, change: Callable[[Tensor, Tensor], Tensor], what: str) -> None:
        self.labels = images.labels
        self._images, self._change, self._what = images, change, what

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._images.shape

    def batch(self, indices: Tensor) -> Tensor:
        return self._change(self._images.batch(indices).cpu(), indices)

    def content(self) -> Iterator[bytes]:
        yield self._what.encode()
        yield from self._images.content()


@final
class First(ImageSet):
    """The first `count` images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.labels = images.labels[:count]
        self._images = images

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._images.shape

    def batch(self, indices: Tensor) -> Tensor:
        return self._images.batch(indices)

    def content(self) -> Iterator[bytes]:
        yield repr(len(self)).encode()
        yield from self._images.content()


@final
class Mirrored(ImageSet):
    """The images of a set, and then each of them with left and right exchanged."""

    def __init__(self, images: ImageSet) -> None:
        self.labels = torch.cat([images.labels, images.labels])
        self._images = images

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._images.shape

    def batch(self, indices: Tensor) -> Tensor:
        count = len(self._images)
        found = self._images.batch(indices % count)
        mirrored = (indices >= count).to(found.device)
        return torch.where(mirrored[:, None, None, None], found.flip(-1), found)

    def content(self) -> Iterator[bytes]:
        yield b"mirrored"
        yield from self._images.content()
