"""CelebA's aligned faces, cropped to 64x64 as in the paper's code. Its terms must be accepted: it is not downloaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import beside, check_md5, content_digest, root_of
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ddim_lab.data.images import ImageData

__all__ = ["CelebA"]

PARTITION: Final = "list_eval_partition.txt"


@final
class CelebA(DataSet):
    """conf/data/celeba: colour, without the attributes."""

    has_labels: ClassVar[bool] = False

    name: Literal["celeba"]

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 64, 64

    def find(self) -> tuple[Path, ...]:
        from torchvision.datasets import CelebA as Published

        root = root_of(self)
        places = [root, root / Published.base_folder]
        place = next((p for p in places if (p / PARTITION).is_file() and (p / "img_align_celeba").is_dir()), None)
        if place is None:
            raise ConfigError(
                f"data=celeba is not in {root}: put there {PARTITION} and the unpacked img_align_celeba.zip (202,599"
                " .jpg files) from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, whose terms you must accept; or set"
                " data.root"
            )
        partition = place / PARTITION
        check_md5("celeba", [partition], [next(md5 for _, md5, name in Published.file_list if name == PARTITION)])
        names = [line.split()[0] for line in partition.read_text().splitlines() if line.strip()]
        there = {file.name for file in os.scandir(place / "img_align_celeba")}
        if lacking := [name for name in names if name not in there]:
            raise ConfigError(
                f"data=celeba: {len(lacking)} of {len(names)} images are missing,"
                f" {place / 'img_align_celeba' / lacking[0]} first: unpack img_align_celeba.zip again"
            )
        return (partition, *(place / "img_align_celeba" / name for name in names))

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch

        from ddim_lab.data.decoding import read_image
        from ddim_lab.data.images import DiskImages, ImageData

        root = files[0].parent
        digest = content_digest(root, files)
        lines = [line.split() for line in files[0].read_text().splitlines() if line.strip()]
        read = functools.partial(read_image, _crop_face, functools.partial(beside, root / "img_align_celeba"))
        splits = []
        for parts in (("0",), ("1", "2")):
            names = [name for name, part in lines if part in parts]
            splits.append(DiskImages(names, torch.zeros(len(names), dtype=torch.int64), self.shape, read, digest))
        train, held_out = splits
        words = "crop 128x128 round (89, 121), PIL bilinear to 64x64; held out: 1 and 2"
        return ImageData("celeba", train, held_out, f"celeba v1: {words}")

    def held_out_count(self) -> int:
        return 19_867 + 19_962

    def count(self, files: Sequence[Path]) -> int:
        return len(files) - 1  # the partition


def _crop_face(image: Image) -> Image:
    """As in the paper's code: the square of 128 pixels around (89, 121), resized to 64x64 on the 8-bit image."""
    from PIL.Image import Resampling

    return image.convert("RGB").crop((25, 57, 153, 185)).resize((64, 64), Resampling.BILINEAR)
