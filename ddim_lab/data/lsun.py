"""What the LSUN categories share: databases of JPEG files, at 256x256. Not downloaded; needs the package lmdb."""

from __future__ import annotations

import functools
import io
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ddim_lab.data.base import DataSet
from ddim_lab.data.disk import content_digest, root_of
from ddim_lab.errors import ConfigError

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["Lsun"]


class Lsun(DataSet):
    """One category of LSUN; abstract."""

    has_labels: ClassVar[bool] = False

    @property
    @abstractmethod
    def category(self) -> str:
        """What its databases are called, as "church_outdoor"."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, 256, 256

    def find(self) -> tuple[Path, ...]:
        root, category = root_of(self), self.category
        files = tuple(root / f"{category}_{split}_lmdb" / "data.mdb" for split in ("train", "val"))
        for file in files:
            if not file.is_file():
                raise ConfigError(
                    f"data={self.name}: {file} is missing: get {category}_train_lmdb.zip and {category}_val_lmdb.zip"
                    f" with the script of github.com/fyu/lsun, unpack them in {root}, or set data.root"
                )
        try:
            import lmdb  # noqa: F401
        except ImportError:
            raise ConfigError(f"data={self.name} needs the package lmdb: pip install 'ddim-lab[lsun]'") from None
        for file in files:
            environment = _environment(str(file.parent))
            whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < whole:
                raise ConfigError(
                    f"data={self.name}: {file} is cut short ({file.stat().st_size} of {whole} bytes): download it again"
                )
        return files

    def load(self, files: Sequence[Path]) -> ImageData:
        # Not torchvision.datasets.LSUN: it unpickles a list of keys that it keeps in the current folder.
        import torch

        from ddim_lab.data.decoding import read_image, resize_and_crop
        from ddim_lab.data.images import DiskImages, ImageData

        digest = content_digest(files[0].parents[1], files)
        splits = []
        for file in files:
            with _environment(str(file.parent)).begin() as transaction:
                names = [key.decode("latin-1") for key in transaction.cursor().iternext(keys=True, values=False)]
            prepare = functools.partial(resize_and_crop, self.shape[1], "RGB")
            read = functools.partial(read_image, prepare, functools.partial(_bytes, str(file.parent)))
            splits.append(DiskImages(names, torch.zeros(len(names), dtype=torch.int64), self.shape, read, digest))
        train, held_out = splits
        return ImageData(self.name, train, held_out, f"{self.name} v1: short side to 256, PIL bilinear, centre crop")

    def held_out_count(self) -> int:
        return 300

    def count(self, files: Sequence[Path]) -> int:
        return sum(int(_environment(str(file.parent)).stat()["entries"]) for file in files)


@functools.cache
def _environment(folder: str) -> Any:
    """An open database. A process must not use what another has opened: all are closed before this one forks."""
    import lmdb

    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ConfigError(f"{folder}/data.mdb is damaged ({error}): download it again") from None
    _open_environments.append(environment)
    return environment


_open_environments: Final[list[Any]] = []


def _close_environments() -> None:
    _environment.cache_clear()
    while _open_environments:
        _open_environments.pop().close()


os.register_at_fork(before=_close_environments)


def _bytes(folder: str, name: str) -> io.BytesIO:
    with _environment(folder).begin() as transaction:
        return io.BytesIO(transaction.get(name.encode("latin-1")))
