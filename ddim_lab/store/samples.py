"""Samples that grow, by what makes them and not by how many they are. Needs no torch.

    outputs/samples/<key>/
        identity.json                                   Samples: what makes them
        000000000-000001024-<digest>.safetensors        samples 0 ... 1023: a chunk of whole batches
        000001024-000001437-<digest>.safetensors        a partial last batch, which is of N = 1,437 alone
        features/<network>/network.json                 which feature network it is
        features/<network>/000000000-000001024-<digest of the chunk>-<digest>.safetensors
        <name>-<digest>.tensor                          walks that determinism is measured on

Such a folder is never finished, so it has no manifest: every file carries the first digits of its own SHA-256 in its
name, and is compared with them when it is read. Sample i is the same whatever N is, and batches begin at multiples of
the batch's size, so that the samples of a smaller N are the first of a larger one. A partial batch is one for its N
only: other sizes of a batch round otherwise.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from ddim_lab.store.files import read_record, set_aside
from ddim_lab.store.records import Samples

__all__ = [
    "FEATURES",
    "NETWORK",
    "RECORD",
    "Contents",
    "File",
    "damaged",
    "digest_of",
    "discard",
    "files_in",
    "set_damaged_aside",
    "tidy",
]

RECORD: Final = "identity.json"
FEATURES: Final = "features"
NETWORK: Final = "network.json"

_DIGITS: Final = 16
_NAME: Final = re.compile(r"(\d{9,})-(\d{9,})-(?:([0-9a-f]{16})-)?([0-9a-f]{16})\.safetensors")
_KEPT: Final = re.compile(r".+-([0-9a-f]{16})\.tensor")


def digest_of(content: bytes) -> str:
    """What a file's name says of its content: the first 16 digits of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:_DIGITS]


@final
@dataclass(frozen=True)
class File:
    """A chunk of images, or of features of a chunk's images, by its name.

    Attributes:
        path: where it is.
        start, stop: the samples start ... stop - 1.
        chunk: digest of the chunk of images that these features are of; None for images.
        digest: of its content.
    """

    path: Path
    start: int
    stop: int
    chunk: str | None
    digest: str

    @property
    def is_intact(self) -> bool:
        """Whether it has the content that its name says; reads it."""
        return digest_of(self.path.read_bytes()) == self.digest

    def is_whole(self, batch_size: int) -> bool:
        """Whether it holds whole batches alone."""
        return self.start % batch_size == 0 and self.stop % batch_size == 0


def files_in(folder: Path) -> list[File]:
    """The chunks in a folder of images, or of features of one network, in the order of their samples."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.safetensors"))
    files = [File(path, int(name[1]), int(name[2]), name[3], name[4]) for path, name in found if name is not None]
    return sorted(files, key=lambda file: (file.start, file.stop, file.path.name))


def tidy(folder: Path) -> None:
    """Remove what writes that were killed left in a folder of samples, and features of chunks that are gone.

    Its lock is held: nothing is being written there.
    """
    chunks = {file.digest for file in files_in(folder)}
    for stale in folder.rglob(".*"):
        stale.unlink(missing_ok=True)
    for network in folder.glob(f"{FEATURES}/*"):
        for file in files_in(network):
            if file.chunk not in chunks:
                file.path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove all samples of a folder, whatever their number, and what was taken of them; its lock is held."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damaged(folder: Path) -> list[tuple[Path, str]]:
    """The files of a folder of samples that are not what they were written as, each with what is wrong."""
    records = {folder / RECORD, *folder.glob(f"{FEATURES}/*/{NETWORK}")}
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if (fault := _fault(path, path in records)) is not None:
                found.append((path, fault))
        except FileNotFoundError:  # a running job takes away what is damaged, too
            continue
    return found


def _fault(path: Path, is_record: bool) -> str | None:
    """What is wrong with a file, or None; one whose name says nothing of its content is not looked at."""
    if is_record:
        try:
            read_record(path)
        except ValueError as error:
            return str(error)
    name = _NAME.fullmatch(path.name) or _KEPT.fullmatch(path.name)
    if name is None or digest_of(path.read_bytes()) == name[name.re.groups]:
        return None
    return "it does not have the content that its name says"


def set_damaged_aside(folder: Path) -> list[Path]:
    """Take the damaged files of a folder of samples, whose lock is held, out of the way; where they were."""
    found = damaged(folder)
    for path, fault in found:
        set_aside(path, fault)
    return [path for path, _ in found]


@final
@dataclass(frozen=True)
class Contents:
    """What a folder of samples holds, by its records and the names of its files.

    Attributes:
        whole: images in whole batches.
        partial: images in partial last batches, each of one N.
        networks: names of the feature networks whose features are kept.
        words: what makes the samples; "" where the record can't be read.
        forwards: image-forwards that making the images again would cost; None where the record can't be read.
    """

    whole: int
    partial: int
    networks: tuple[str, ...]
    words: str
    forwards: int | None

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """Of one folder; nothing is verified but the records."""
        try:
            record = Samples.read(read_record(folder / RECORD))
        except (OSError, ValueError):
            record = None
        ranges = [range(file.start, file.stop) for file in files_in(folder)]
        # without the record the size of a batch is not known, and all that is there counts as whole
        size = 1 if record is None else record.batch_size
        whole = len(set().union(*(each for each in ranges if each.stop % size == 0)))
        partial = sum({(each.start, each.stop): len(each) for each in ranges if each.stop % size}.values())
        forwards = None if record is None else (whole + partial) * record.nfe
        return cls(whole, partial, tuple(_networks(folder)), "" if record is None else record.words, forwards)

    def __str__(self) -> str:
        told = f"{self.whole:,} images" + (f" and {self.partial:,} in partial batches" if self.partial else "")
        return "; ".join(filter(None, (told, self.words, ", ".join(self.networks))))


def _networks(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob(f"{FEATURES}/*/{NETWORK}")):
        try:
            yield str(read_record(path)["name"])
        except (OSError, ValueError, KeyError):
            continue
