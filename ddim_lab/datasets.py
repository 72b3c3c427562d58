"""Where images come from: each data set's files found and checked, read, prepared and split.

`check_data` finds the files, or downloads them where licence and torchvision allow, and refuses what is missing or
damaged in one line; `load_data` reads them. Training and references see the same prepared images.
"""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.config import ConfigError, DataConfig, DigitsConfig, FashionMnistConfig
from ddim_lab.data import ImageData, MemoryImages

__all__ = ["check_data", "load_data"]


def check_data(config: DataConfig) -> tuple[Path, ...]:
    """The files of the data set, found and whole as far as that shows without decoding them.

    Raises:
        ConfigError: one is missing and could not be downloaded, or is damaged; says what, where and what to do.
    """
    if isinstance(config, FashionMnistConfig):
        return _find_fashion_mnist(config)
    return ()


def load_data(config: DataConfig) -> ImageData:
    """The data set that conf/data names; the last one loaded is kept while its files are the same.

    Raises:
        ConfigError: as `check_data`.
    """
    return _load(config, _signature(check_data(config)))


Signature = tuple[tuple[str, int, int], ...]
"""Path, size and modification time (ns) of files."""


def _signature(files: Sequence[Path]) -> Signature:
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


@functools.lru_cache(maxsize=1)
def _load(config: DataConfig, signature: Signature) -> ImageData:
    files = [Path(name) for name, _, _ in signature]
    if isinstance(config, FashionMnistConfig):
        return _fashion_mnist(files)
    assert isinstance(config, DigitsConfig)
    return _digits()


def _default_root() -> Path:
    """Where data sets lie and are downloaded to unless data.root says otherwise."""
    named = os.environ.get("DDIM_LAB_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "ddim_lab"


# -- digits ---------------------------------------------------------------------------------------------


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    levels = torch.tensor(pixels).mul(255.0 / 16.0).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    train, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    targets = torch.tensor(labels, dtype=torch.int64)
    return ImageData(
        name="digits",
        train=MemoryImages(levels[train], targets[train]),
        held_out=MemoryImages(levels[held_out], targets[held_out]),
        preprocessing="digits v1: 0..16 scaled to 0..255 and rounded; stratified split 1437/360, random_state=0",
    )


# -- Fashion-MNIST --------------------------------------------------------------------------------------

DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

FASHION_FILES: Final = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _find_fashion_mnist(config: FashionMnistConfig) -> tuple[Path, ...]:
    root = _default_root() / "fashion_mnist" if config.root is None else Path(config.root).expanduser()
    places = [root, root / "FashionMNIST" / "raw"] + ([DEBIAN_FASHION_MNIST] if config.root is None else [])
    for place in places:
        files = tuple(place / name for name in FASHION_FILES)
        there = [file for file in files if file.is_file()]
        if len(there) == len(files):
            for (name, size, modified), file in zip(_signature(files), files, strict=True):
                if (fault := _gzip_fault(name, size, modified)) is not None:
                    raise ConfigError(f"data=fashion_mnist: {file} is damaged ({fault}): get it again")
            return files
        if there:
            lacking = next(file for file in files if file not in there)
            raise ConfigError(f"data=fashion_mnist: {lacking} is missing beside {there[0].name}")
    return _download_fashion_mnist(root, places)


def _download_fashion_mnist(folder: Path, searched: Sequence[Path]) -> tuple[Path, ...]:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    try:
        partial = folder / ".partial"
        for name, md5 in FashionMNIST.resources:
            download_url(FashionMNIST.mirrors[0] + name, str(partial), name, md5)
        for name in FASHION_FILES:
            (partial / name).rename(folder / name)
        partial.rmdir()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"data=fashion_mnist: no {FASHION_FILES[0]} in {' or '.join(map(str, searched))}, and the download failed"
            f" ({error}): apt-get install dataset-fashion-mnist, or set data.root to a folder with the four IDX .gz"
            " files"
        ) from None
    return tuple(folder / name for name in FASHION_FILES)


@functools.lru_cache(maxsize=64)
def _gzip_fault(path: str, size: int, modified: int) -> str | None:
    """What is wrong with a .gz file, or None; its checksum is compared once as long as size and time are the same."""
    try:
        with gzip.open(path) as file:
            while file.read(2**20):
                pass
    except (OSError, EOFError) as error:
        return str(error)
    return None


def _read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX .gz file: a magic number 0x08NN (NN dimensions), sizes (big-endian), then the data."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4").tolist()
    values = np.frombuffer(content[4 + 4 * dimensions :], dtype=np.uint8)
    if dimensions == 0 or len(values) != np.prod(sizes):
        raise ConfigError(f"{path} is not an IDX file of uint8: {len(content)} bytes that begin {content[:4].hex()}")
    return torch.from_numpy(values.reshape(sizes).copy())


def _fashion_mnist(files: Sequence[Path]) -> ImageData:
    train_images, train_labels, test_images, test_labels = map(_read_idx, files)
    splits = []
    for path, images, labels in ((files[0], train_images, train_labels), (files[2], test_images, test_labels)):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ConfigError(f"{path}: images of 28x28 with a label each are needed, got {tuple(images.shape)}")
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        splits.append(MemoryImages(padded[:, None], labels.to(torch.int64)))
    train, held_out = splits
    return ImageData("fashion_mnist", train, held_out, "fashion_mnist v1: 28x28 padded with zeros to 32x32")
