"""Images to be scored, ours or another system's: a samples.npz as the field writes it, or a folder.

Nothing is unpickled, and one batch is in memory at a time, unless the file is compressed.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from ddim_lab.data.decoding import decode, opened, pixels_of
from ddim_lab.data.files import FORMATS, image_files, name_bytes, readable
from ddim_lab.data.images import DiskImages, ImageSet, MemoryImages
from ddim_lab.errors import ConfigError

__all__ = ["Samples", "read_samples", "shape_in_words"]


@final
@dataclass(frozen=True)
class Samples:
    """Images to be scored.

    Attributes:
        name: of the file or folder.
        images: all of one shape.
        digest: SHA-256 of the content.
        files: what of a folder was taken for images and what was passed over, in words; None for a file.
    """

    name: str
    images: ImageSet
    digest: str
    files: str | None = None


def read_samples(path: Path) -> Samples:
    """The images of a samples.npz or a folder.

    Raises:
        ConfigError: they are missing, damaged, fewer than two, or not 8-bit images of one size; one line.
    """
    if path.is_dir():
        found = _folder(path)
    elif path.is_file() and path.suffix == ".npz":
        found = _npz(path)
    else:
        if path.is_file():
            raise ConfigError(f"{path} is neither a folder of images nor an .npz file with the array arr_0")
        raise ConfigError(f"{path}: there is no such folder of images or .npz file")
    if len(found.images) < 2:
        raise ConfigError(f"{path} holds {len(found.images)} images: at least 2 are needed")
    return found


# -- samples.npz ----------------------------------------------------------------------------------------


def _npz(path: Path) -> Samples:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise ConfigError(f"{path}: images are looked for in the array arr_0, it has {', '.join(names)}")
            entry = archive.getinfo("arr_0.npy")
            with archive.open(entry) as file:
                shape = _image_shape(path, file)
                header = file.tell()
                digest = hashlib.sha256(repr(shape).encode())
                parts = []
                while part := file.read(2**24):  # to its end, where zipfile compares the checksum
                    digest.update(part)
                    parts += [part] if entry.compress_type != zipfile.ZIP_STORED else []
                if file.tell() - header != np.prod(shape):
                    raise ConfigError(f"{path}: arr_0 is cut short")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged or no .npz file ({' '.join(str(error).split())[:100]})") from None
    count, height, width, channels = shape
    labels = torch.zeros(count, dtype=torch.int64)
    if parts:
        pixels = torch.from_numpy(np.frombuffer(bytearray(b"".join(parts)), dtype=np.uint8).reshape(shape))
        return Samples(readable(path.name), MemoryImages(pixels.permute(0, 3, 1, 2), labels), digest.hexdigest())
    with path.open("rb") as raw:
        raw.seek(entry.header_offset + 26)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4))) + header
    read = functools.partial(_read_stored, path, start, (height, width, channels))
    names = [str(number) for number in range(count)]
    images = DiskImages(names, labels, (channels, height, width), read, digest.hexdigest())
    return Samples(readable(path.name), images, digest.hexdigest())


def _image_shape(path: Path, file: IO[bytes]) -> tuple[int, int, int, int]:
    """Shape (N, H, W, C) from the header of an .npy file, which is left behind it."""
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in formats:
        written = ".".join(map(str, version))
        raise ConfigError(
            f"{path}: arr_0 is in format {written} of numpy, 1.0 and 2.0 are read: numpy.savez writes it so"
        )
    shape, fortran, dtype = formats[version](file)
    if dtype != np.uint8:
        raise ConfigError(f"{path}: arr_0 must be uint8 images from 0 to 255, it is {dtype}")
    if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:] or fortran:
        order = ", in C order" if fortran else ""
        raise ConfigError(f"{path}: arr_0 must be [N, height, width, 1 or 3 channels]{order}, its shape is {shape}")
    count, height, width, channels = shape
    return count, height, width, channels


def _read_stored(path: Path, start: int, shape: tuple[int, int, int], name: str) -> Tensor:
    size = shape[0] * shape[1] * shape[2]
    with path.open("rb") as file:
        file.seek(start + int(name) * size)
        pixels = np.frombuffer(bytearray(file.read(size)), dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(shape)).permute(2, 0, 1)


# -- a folder of images ---------------------------------------------------------------------------------


def _folder(path: Path) -> Samples:
    found = image_files(path)
    if not found.files:
        raise ConfigError(f"{path} holds {found}; some are needed ({', '.join(FORMATS)})")
    names = [file.relative_to(path).as_posix() for file in found.files]
    digest, shape = hashlib.sha256(), None
    bar = tqdm(found.files, desc=f"reading {path.name}", unit="file", disable=None, leave=False)
    for name, file in zip(names, bar, strict=True):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} can't be read: {error.strerror}") from None
        digest.update(name_bytes(f"{name} {hashlib.sha256(content).hexdigest()}\n"))
        image = opened(content, file)
        shape = _same_shape(path, name, (1 if _is_grey(image) else 3, image.height, image.width), shape)
    assert shape is not None
    read = functools.partial(_read_image, path, shape)
    labels = torch.zeros(len(names), dtype=torch.int64)
    images = DiskImages(names, labels, shape, read, digest.hexdigest())
    return Samples(readable(path.name), images, digest.hexdigest(), str(found))


Shape = tuple[int, int, int]


def _same_shape(root: Path, name: str, shape: Shape, first: Shape | None) -> Shape:
    if first not in (None, shape):
        raise ConfigError(
            f"{root} holds images of several kinds: {name} is {shape_in_words(shape)}, the first is"
            f" {shape_in_words(first)}"
        )
    return shape


def _read_image(root: Path, shape: Shape, name: str) -> Tensor:
    image = decode(root / name, root / name)
    pixels = pixels_of(image.convert("L" if _is_grey(image) else "RGB"))
    _same_shape(root, name, (pixels.shape[0], pixels.shape[1], pixels.shape[2]), shape)
    return pixels


def _is_grey(image: Image) -> bool:
    return image.mode in ("1", "L")


def shape_in_words(shape: Sequence[int]) -> str:
    """A shape (C, H, W) for messages, as "8x8 with 1 channel"."""
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
