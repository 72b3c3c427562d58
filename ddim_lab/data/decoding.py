"""One image file: decoded whole and prepared, or refused in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim_lab.errors import ConfigError, one_line

__all__ = ["FORMATS", "decode", "format_of", "pixels_of", "read_image", "resize_and_crop"]

READABLE: Final = frozenset({"1", "L", "P", "RGB", "CMYK"})
"""PIL's modes that become 8-bit grey or RGB without values cut off or layers dropped."""

FORMATS: Final = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""What a file is by its suffix, as PIL names it."""


def decode(source: Path | IO[bytes], name: object) -> Image.Image:
    """The image in a file, decoded whole, in one of the modes that `convert` takes to L or RGB faithfully.

    Args:
        source: the file.
        name: what it is called in messages.

    Raises:
        ConfigError: it is damaged, a decompression bomb, transparent or of more than 8 bits; one line.
    """
    try:
        with Image.open(source) as image:
            # PIL reads the upper byte of 16-bit colour, and calls the image RGB.
            deep = any("16" in str(tile.args) for tile in image.tile) and image.mode == "RGB"
            image.load()
    except Exception as error:  # decoders raise whatever a damaged file leads them to, bombs included
        raise ConfigError(f"the image {name} can't be read: {one_line(error)[:200]}") from None
    if image.has_transparency_data:
        shown = image.mode if image.mode not in READABLE else f"{image.mode} with transparency"
        raise ConfigError(
            f"{name} is of mode {shown}: 8-bit grey or RGB images are needed; put it on a background"
            " (ImageMagick: -background white -alpha remove -alpha off)"
        )
    if deep or image.mode not in READABLE:  # of 16-bit grey PIL would cut values above 255 off, rather than scale them
        shown = f"{image.mode} of 16 bits" if deep else image.mode
        raise ConfigError(
            f"{name} is of mode {shown}: 8-bit grey or RGB images are needed; scale it to 8 bits"
            " (ImageMagick: -depth 8)"
        )
    return image


def format_of(file: Path) -> str | None:
    """What a file begins like, as PIL names it; None where that is no image."""
    try:
        with Image.open(file) as image:
            return image.format
    except Exception:  # as in `decode`
        return None


def read_image(prepare: Callable[[Image.Image], Image.Image], get: Callable[[str], Any], name: str) -> Tensor:
    """Decode and prepare the image of a name: uint8 [C, H, W]."""
    source = get(name)
    return pixels_of(prepare(decode(source, source if isinstance(source, Path) else name)))


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an image of mode L or RGB: uint8 [C, H, W]."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def resize_and_crop(size: int, mode: str, image: Image.Image) -> Image.Image:
    """Shorter side to `size` (bilinear, antialiased, on the 8-bit image), then the central square."""
    from torchvision.transforms import functional

    cropped: Image.Image = functional.center_crop(functional.resize(image.convert(mode), size), [size, size])
    return cropped
