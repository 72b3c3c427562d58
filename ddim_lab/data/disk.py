"""What data sets on disk share: places, downloads, checksums, and the digest of what is too large for memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock

from ddim_lab.config.data import DataOptions
from ddim_lab.config.options import user_path
from ddim_lab.console import Progress
from ddim_lab.data.files import DIGEST_FILE, FORMATS, name_bytes
from ddim_lab.errors import ConfigError, one_line
from ddim_lab.store import read_record, write_record

__all__ = [
    "Signature",
    "beside",
    "check_md5",
    "content_digest",
    "download",
    "no_download",
    "root_of",
    "signature",
]

log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int], ...]
"""Path, size and modification time (ns) of files."""


def signature(files: Sequence[Path]) -> Signature:
    """What is compared to tell whether files are still the same."""
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def root_of(data: DataOptions) -> Path:
    """Where a data set lies, and is downloaded to: data.root, else a folder of its name in $DDIM_LAB_DATA."""
    if data.root is not None:
        return Path(data.root).absolute()
    named = os.environ.get("DDIM_LAB_DATA") or "~/.cache/ddim_lab"
    try:
        return user_path(named).absolute() / data.name
    except ConfigError as error:
        raise ConfigError(f"{error}; set data.root, or $DDIM_LAB_DATA, to where the data go") from None


DOWNLOAD_LOCK: Final = ".download.lock"


@contextlib.contextmanager
def no_download(folder: Path) -> Iterator[None]:
    """Wait until nobody downloads into `folder`; a folder that has seen no download is not written to."""
    with FileLock(folder / DOWNLOAD_LOCK) if (folder / DOWNLOAD_LOCK).exists() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def download(name: str, folder: Path, how_else: str) -> Iterator[None]:
    """Guards a download into `folder`: one process at a time, and failures in one line that ends in `how_else`.

    A folder that was not there before a download that failed is not there after it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / DOWNLOAD_LOCK):
            log.info("data=%s is not there: downloading it to %s", name, folder)
            yield
    except (OSError, RuntimeError) as error:
        if made and not any(file.name != DOWNLOAD_LOCK for file in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"data={name} is not in {folder}, and the download failed ({one_line(error)}): {how_else}"
        ) from None


@functools.lru_cache(maxsize=256)
def _md5(path: str, size: int, modified: int) -> str:
    """MD5 of a file, read once as long as size and time are the same."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check_md5(name: str, files: Sequence[Path], published: Iterable[str]) -> None:
    """Raise ConfigError where the MD5 of a file of the data set `name` is not the published one."""
    for (path, size, modified), file, md5 in zip(signature(files), files, published, strict=True):
        if _md5(path, size, modified) != md5:
            raise ConfigError(
                f"data={name}: {file} is damaged or cut short (MD5 is not {md5}): delete it and download it again"
            )


# -- sets too large for memory: files on disk, decoded when asked for ------------------------------------


def content_digest(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and contents; read once, then taken from `DIGEST_FILE`. Images are decoded on the way.

    Raises:
        ConfigError: an image file is damaged, or none that `decode` takes; names it.
    """
    return _read_content(root, signature(files))


@functools.lru_cache(maxsize=4)
def _read_content(root: Path, found: Signature) -> str:
    from ddim_lab.data.decoding import decode

    files = [Path(name) for name, _, _ in found]
    states = ["decoded", *(f"{Path(name).relative_to(root)} {size} {modified}" for name, size, modified in found)]
    signature = hashlib.sha256(name_bytes("\n".join(states))).hexdigest()
    place = root / DIGEST_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = read_record(place)
        if kept["signature"] == signature:
            return str(kept["digest"])
    digest = hashlib.sha256()
    with Progress(f"reading {root.name} once", len(files), "file") as progress:
        for file in files:
            with file.open("rb") as content:
                read = hashlib.file_digest(content, "sha256").hexdigest()
                if file.suffix.lower() in FORMATS:  # a decoder stumbles here, before the training
                    content.seek(0)
                    decode(content, file)
            digest.update(name_bytes(f"{file.relative_to(root)} {read}\n"))
            progress.update()
    try:
        write_record(place, {"signature": signature, "digest": digest.hexdigest()})
    except OSError as error:
        log.warning("%s can't be written (%s): the data will be read whole for their digest every time", place, error)
    return digest.hexdigest()


def beside(root: Path, name: str) -> Path:
    """The file of that name in a folder: where `read_image` gets its images from."""
    return root / name
