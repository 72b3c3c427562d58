"""CIFAR-10 through torchvision, which downloads it where it is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import check_md5, download, root_of
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["Cifar10"]


@final
class Cifar10(DataSet):
    """conf/data/cifar10: colour, 32x32, ten classes."""

    known_classes: ClassVar[int | None] = 10

    name: Literal["cifar10"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 32, 32

    def held_out_count(self) -> int:
        return 10_000

    def find(self) -> tuple[Path, ...]:
        from torchvision.datasets import CIFAR10

        root = root_of(self)
        entries = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        files = [root / CIFAR10.base_folder / name for name, _ in entries]
        if not any(file.exists() for file in files):
            how_else = f"unpack {CIFAR10.filename} there, so that {files[0]} is a file, or set data.root"
            with download("cifar10", root, how_else):
                CIFAR10(str(root), download=True)  # compares the archive's MD5 before it unpacks
        for file in files:
            if not file.is_file():
                raise ConfigError(f"data=cifar10: {file} is missing; unpack {CIFAR10.filename} in {root} again")
        check_md5("cifar10", files, (md5 for _, md5 in entries))
        return tuple(files)

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch
        from torchvision.datasets import CIFAR10

        from ddim_lab.data.images import ImageData, MemoryImages

        splits = []
        for train in (True, False):
            # It unpickles: files whose MD5 is the published one.
            there = CIFAR10(str(files[0].parents[1]), train=train)
            images = torch.from_numpy(there.data).permute(0, 3, 1, 2).contiguous()
            splits.append(MemoryImages(images, torch.tensor(there.targets, dtype=torch.int64)))
        train_split, held_out = splits
        return ImageData("cifar10", train_split, held_out, "cifar10 v1: 32x32 as published")
