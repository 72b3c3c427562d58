"""Fashion-MNIST from IDX files: the user's, Debian's or downloaded; padded from 28x28 to 32x32."""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, final

from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import download, no_download, root_of, signature
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.data.images import ImageData

__all__ = ["DEBIAN_FOLDER", "FILES", "FashionMnist"]

DEBIAN_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

FILES: Final = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@final
class FashionMnist(DataSet):
    """conf/data/fashion_mnist: grey, ten classes."""

    name: Literal["fashion_mnist"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, 32, 32

    def held_out_count(self) -> int:
        return 10_000

    def find(self) -> tuple[Path, ...]:
        root = root_of(self)
        places = [root, root / "FashionMNIST" / "raw"] + ([DEBIAN_FOLDER] if self.root is None else [])
        for place in places:
            files = tuple(place / name for name in FILES)
            there = [file for file in files if file.is_file()]
            if 0 < len(there) < len(files):  # another process may be moving in what it has downloaded, one by one
                with no_download(place):
                    there = [file for file in files if file.is_file()]
            if len(there) == len(files):
                for (name, size, modified), file in zip(signature(files), files, strict=True):
                    if (fault := _gzip_fault(name, size, modified)) is not None:
                        raise ConfigError(f"data=fashion_mnist: {file} is damaged ({fault}): download it again")
                return files
            if there:
                lacking = next(file for file in files if file not in there)
                raise ConfigError(f"data=fashion_mnist: {lacking} is missing beside {there[0].name}: download it again")
        searched = " nor ".join(map(str, places[1:]))
        how_else = (
            f"(nor in {searched}) apt-get install dataset-fashion-mnist, or set data.root to the four IDX .gz files"
        )
        with download("fashion_mnist", root, how_else):
            if not (root / FILES[-1]).is_file():  # else another process was first
                _download(root)
        return tuple(root / name for name in FILES)

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch

        from ddim_lab.data.images import ImageData, MemoryImages

        train_images, train_labels, test_images, test_labels = map(_read_idx, files)
        splits = []
        for path, images, labels in ((files[0], train_images, train_labels), (files[2], test_images, test_labels)):
            if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
                raise ConfigError(f"{path}: images of 28x28 with a label each are needed, got {tuple(images.shape)}")
            padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
            splits.append(MemoryImages(padded[:, None], labels.to(torch.int64)))
        train, held_out = splits
        return ImageData("fashion_mnist", train, held_out, "fashion_mnist v1: 28x28 padded with zeros to 32x32")


def _download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    partial = root / ".partial"  # a file is not in its place before its checksum has been compared
    for name, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + name, str(partial), name, md5)
    for name in FILES:
        (partial / name).replace(root / name)
    partial.rmdir()


@functools.lru_cache(maxsize=64)
def _gzip_fault(path: str, size: int, modified: int) -> str | None:
    """What is wrong with a .gz file, or None; its checksum is compared once as long as size and time are the same."""
    try:
        with gzip.open(path) as file:
            while file.read(2**20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None


def _read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX .gz file: a magic number 0x08NN (NN dimensions), sizes (big-endian), then the data."""
    import numpy as np
    import torch

    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4").tolist()
    values = np.frombuffer(content[4 + 4 * dimensions :], dtype=np.uint8)
    if dimensions == 0 or len(values) != np.prod(sizes):
        raise ConfigError(f"{path} is not an IDX file of uint8: {len(content)} bytes that begin {content[:4].hex()}")
    return torch.from_numpy(values.reshape(sizes).copy())
