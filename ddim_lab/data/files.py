"""Which files of a folder are taken for images, by whoever takes a folder of them; and what file names are."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from ddim_lab.errors import ConfigError, one_line

__all__ = ["DIGEST_FILE", "FORMATS", "ImageFiles", "image_files", "name_bytes", "readable"]

DIGEST_FILE: Final = ".ddim_lab_digest.json"
"""Beside large data: their content digest, good as long as names, sizes and times of all files are the same."""

FORMATS: Final = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffixes of the files that are taken for images, and what they are, as PIL names it."""


@final
@dataclass(frozen=True)
class ImageFiles:
    """The image files in a folder and in the folders in it, those that links lead to included.

    Attributes:
        files: sorted by their paths.
        copies: how many of them are another name of a file that is among them already.
        passed_over: names relative to the folder, by why they were left out.
    """

    files: tuple[Path, ...]
    copies: int
    passed_over: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        """How many were taken, and how many passed over and why, as "40 images; passed over: 1 hidden (.old)"."""
        copies = f", {self.copies:,} of them other names of the same files" if self.copies else ""
        left_out = [f"{len(names):,} {why} ({_first(names)})" for why, names in self.passed_over.items()]
        return f"{len(self.files):,} images{copies}" + (f"; passed over: {', '.join(left_out)}" if left_out else "")


def image_files(root: Path) -> ImageFiles:
    """The images in a folder, for whoever takes a folder of them.

    Links are followed, but not back into a folder around them. Names with a leading dot are passed over: editors and
    systems leave copies and data of their own under such names.

    Raises:
        ConfigError: a folder or the state of a file can't be read.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    passed_over: dict[str, list[str]] = {}

    def enter(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        for path in sorted(folder.iterdir()):
            why = ""
            if path.name.startswith("."):
                why = "" if path.name == DIGEST_FILE else "hidden"
            elif (state := _state(path)) is None:
                why = "leading nowhere"
            elif stat.S_ISDIR(state.st_mode):
                itself = (state.st_dev, state.st_ino)
                if itself in above:
                    why = "leading back to a folder around it"
                else:
                    enter(path, above | {itself})
            elif stat.S_ISREG(state.st_mode) and path.suffix.lower() in FORMATS:
                files.append(path)
                seen.add((state.st_dev, state.st_ino))
            else:
                why = "no image"
            if why:
                passed_over.setdefault(why, []).append(str(path.relative_to(root)))

    try:
        around = root.stat()
        enter(root, frozenset({(around.st_dev, around.st_ino)}))
    except OSError as error:
        raise ConfigError(f"{error.filename} can't be read: {error.strerror}") from None
    return ImageFiles(tuple(sorted(files)), len(files) - len(seen), passed_over)


def _state(path: Path) -> os.stat_result | None:
    """The state of what a path leads to; None where it leads nowhere, or in a circle."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise


def _first(names: Sequence[str]) -> str:
    return ", ".join([*map(readable, names[:3]), *(["..."] if len(names) > 3 else [])])


def name_bytes(name: str) -> bytes:
    """A file's name as it is on disk, be it UTF-8 or not, for digests."""
    return name.encode("utf-8", "surrogateescape")


def readable(name: object) -> str:
    """A file's name for people: what is not UTF-8 in it is spelt out, as \\xe9."""
    return one_line(name_bytes(str(name)).decode("utf-8", "backslashreplace"))
