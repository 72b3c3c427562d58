"""Every image in a folder and its folders, whose first level gives the labels if there are any."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import Field, StrictInt

from ddim_lab.config.options import Number, PathOption
from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import beside, content_digest, root_of
from ddim_lab.data.files import FORMATS, image_files, name_bytes
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["ImageFolder"]

log = logging.getLogger(__name__)


@final
class ImageFolder(DataSet):
    """conf/data/image_folder: the user's own images.

    Attributes:
        image_size: the shorter side is resized to it, then the central square is cut out.
        channels: 3, or 1 for grey.
        held_out: share held out, chosen by the files' names.
    """

    name: Literal["image_folder"]
    root: PathOption
    image_size: Annotated[StrictInt, Field(ge=4)]
    channels: Literal[1, 3]
    held_out: Annotated[Number, Field(gt=0, lt=1)]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def find(self) -> tuple[Path, ...]:
        root = root_of(self)
        if not root.is_dir():
            raise ConfigError(f"data.root={self.root}: there is no such folder of images")
        found = image_files(root)
        if len(found.files) < 4:
            raise ConfigError(f"data.root={self.root} holds {found}; 4 at least are needed ({', '.join(FORMATS)})")
        content_digest(root, found.files)  # which decodes them
        return found.files

    def told(self) -> str:
        return f"data.root={self.root}: {image_files(root_of(self))}"

    def load(self, files: Sequence[Path]) -> ImageData:
        import torch

        from ddim_lab.data.decoding import read_image, resize_and_crop
        from ddim_lab.data.images import DiskImages, ImageData

        root = root_of(self)
        if jpegs := sum(file.suffix.lower() in (".jpg", ".jpeg") for file in files):
            log.warning(
                "%s of the %s images in %s are JPEG: a reference that was compressed moves a Fréchet distance, and"
                " preprocessing that compresses again moves it further; use PNG where you can",
                *(jpegs, len(files), root),
            )
        digest = content_digest(root, files)
        names = [file.relative_to(root).as_posix() for file in files]
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        labels = {name: classes.index(name.partition("/")[0]) if "/" in name else 0 for name in names}
        ranked = sorted(names, key=lambda name: hashlib.sha256(name_bytes(name)).digest())
        unseen = set(ranked[: self._held_out_of(len(names))])
        prepare = functools.partial(resize_and_crop, self.image_size, "L" if self.channels == 1 else "RGB")
        read = functools.partial(read_image, prepare, functools.partial(beside, root))
        splits = []
        for held_out in (False, True):
            chosen = [name for name in names if (name in unseen) == held_out]
            splits.append(DiskImages(chosen, torch.tensor([labels[n] for n in chosen]), self.shape, read, digest))
        train, rest = splits
        how = f"short side to {self.image_size}, PIL bilinear, centre crop, {self.channels} channel(s)"
        words = f"image_folder v1: {how}; held out {self.held_out:g} by name"
        return ImageData("image_folder", train, rest, words, str(image_files(root)))

    def _held_out_of(self, count: int) -> int:
        return min(max(2, round(self.held_out * count)), count - 2)

    def held_out_count(self) -> int | None:
        return _held_out_count(self)

    def count(self, files: Sequence[Path]) -> int:
        return len(files)

    def labels_fault(self, files: Sequence[Path]) -> str | None:
        parents = {file.relative_to(root_of(self)).parts[:-1][:1] for file in files}
        if () not in parents and len(parents) > 1:
            return None
        return f"the images in data.root={self.root} are not sorted into two folders or more, one a class"


@functools.lru_cache(maxsize=1)
def _held_out_count(data: ImageFolder) -> int | None:
    """For all cells of a sweep: the folder is not looked through for each."""
    try:
        return data._held_out_of(len(data.find()))
    except ConfigError:
        return None
