"""One image file: decoded whole and prepared, or refused in one line that says what to do."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from ddim_lab.data.files import FORMATS
from ddim_lab.errors import ConfigError, one_line

__all__ = ["decode", "opened", "pixels_of", "read_image", "resize_and_crop"]

READABLE: Final = frozenset({"1", "L", "P", "RGB", "CMYK"})
"""PIL's modes that become 8-bit grey or RGB without values cut off or layers dropped."""

SEVERAL: Final = {"MPO": "JPEG"}
"""A JPEG that further pictures follow, as cameras write it: the first one is taken."""


def decode(source: Path | IO[bytes], name: object) -> Image.Image:
    """The image in a file, decoded whole, in one of the modes that `convert` takes to L or RGB faithfully.

    Args:
        source: the file.
        name: what it is called in messages.

    Raises:
        ConfigError: as `opened`, or it is damaged; one line.
    """
    try:
        content = source.read_bytes() if isinstance(source, Path) else source.read()
    except OSError as error:
        raise _unreadable(name, error) from None
    image = opened(content, name)
    try:
        image.load()
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise _unreadable(name, error) from None
    return image


def opened(content: bytes, name: object) -> ImageFile:
    """The image in the bytes of a file as far as its header tells, not decoded; that its end is there is seen to.

    What follows the end is left alone: a phone's motion photo has a video there.

    Raises:
        ConfigError: it is none, of another kind than its name says, cut short, a decompression bomb, transparent or of
            more than 8 bits; one line.
    """
    if not content:
        raise ConfigError(f"{name} is cut short: it is empty; download it again")
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise _unreadable(name, "it does not begin as an image does") from None
    except Exception as error:  # as in `decode`; bombs, too
        raise _unreadable(name, error) from None
    kind, suffix = SEVERAL.get(str(image.format), str(image.format)), Path(str(name)).suffix
    if (named := FORMATS.get(suffix.lower())) not in (None, kind):
        right = next((each for each in FORMATS if FORMATS[each] == kind), None)
        remedy = f"convert it to {named}" if right is None else f"rename it to {Path(str(name)).stem}{right}"
        raise ConfigError(f"{name} is a {kind} named {suffix}: {remedy}")
    if not ENDED.get(kind, bool)(content):
        raise ConfigError(f"{name} is cut short: it has no end-of-image mark; download it again")
    if image.has_transparency_data:
        shown = image.mode if image.mode not in READABLE else f"{image.mode} with transparency"
        raise ConfigError(
            f"{name} is of mode {shown}: 8-bit grey or RGB images are needed; put it on a background"
            " (ImageMagick: -background white -alpha remove -alpha off)"
        )
    # PIL reads the upper byte of 16-bit colour, and calls the image RGB; of 16-bit grey it would cut values above 255
    # off, rather than scale them.
    deep = any("16" in str(tile.args) for tile in image.tile) and image.mode == "RGB"
    if deep or image.mode not in READABLE:
        shown = f"{image.mode} of 16 bits" if deep else image.mode
        raise ConfigError(
            f"{name} is of mode {shown}: 8-bit grey or RGB images are needed; scale it to 8 bits"
            " (ImageMagick: -depth 8)"
        )
    return image


def _unreadable(name: object, reason: Exception | str) -> ConfigError:
    return ConfigError(f"the image {name} can't be read: {one_line(reason)[:200]}")


MARKER: Final = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
"""A JPEG marker that begins a segment or ends the image: not a stuffed zero, a restart or a start."""


def _jpeg_ended(content: bytes) -> bool:
    """Whether the end of the image comes, outside of segments: one in the EXIF data is its thumbnail's."""
    at = 2
    while found := MARKER.search(content, at):
        if found[1] == b"\xd9":
            return True
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return False


def _png_ended(content: bytes) -> bool:
    """Whether the chunk IEND is there, whole."""
    at = 8
    while at + 12 <= len(content):
        if content[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(content[at : at + 4], "big")
    return False


ENDED: Final[dict[str, Callable[[bytes], bool]]] = {"JPEG": _jpeg_ended, "PNG": _png_ended}
"""Whether a file has its image's end, for the kinds that PIL decodes without it."""


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
