"""Fashion-MNIST from IDX files: the user's, Debian's or downloaded; padded from 28x28 to 32x32."""

from __future__ import annotations

import functools
import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import download, no_download, root_of, signature
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim_lab.data.images import ImageData

__all__ = ["DEBIAN_FOLDER", "FILES", "FashionMnist"]

DEBIAN_FOLDER: Final = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

CONTENT: Final = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""The files, and the SHA-256 of what they hold uncompressed: published are MD5s of files that were compressed once, but
Debian's, with the same content, are others. MNIST's files have these names, too.
"""

FILES: Final = tuple(CONTENT)


@final
class FashionMnist(DataSet):
    """conf/data/fashion_mnist: grey, ten classes."""

    known_classes: ClassVar[int | None] = 10

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
                for state, file in zip(signature(files), files, strict=True):
                    if (held := _content_sha256(*state)) != CONTENT[file.name]:
                        raise ConfigError(
                            f"data=fashion_mnist: {file} is whole, but not Fashion-MNIST's: other sets, as MNIST, have"
                            f" files of these names (SHA-256 of its content begins {held[:12]}, not"
                            f" {CONTENT[file.name][:12]}); set data.root to Fashion-MNIST's folder"
                        )
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
        for images, labels in ((train_images, train_labels), (test_images, test_labels)):
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
def _content_sha256(path: str, size: int, modified: int) -> str:
    """SHA-256 of what a .gz file holds, whose checksum is compared; read once as long as size and time are the same.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        with gzip.open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"data=fashion_mnist: {path} is damaged ({error}): download it again") from None


def _read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX .gz file: a magic number 0x08NN (NN dimensions), sizes (big-endian), then the data."""
    import numpy as np
    import torch

    content = gzip.decompress(path.read_bytes())
    start = 4 + 4 * content[3]
    sizes = np.frombuffer(content[4:start], dtype=">u4").tolist()
    return torch.from_numpy(np.frombuffer(content[start:], dtype=np.uint8).reshape(sizes).copy())
