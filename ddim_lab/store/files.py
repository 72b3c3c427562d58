"""Atomic file writes, and records that carry their own hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

__all__ = [
    "content_key",
    "read_json",
    "read_record",
    "sealed_line",
    "sealed_text",
    "set_aside",
    "sync_folder",
    "sync_tree",
    "text_fault",
    "unsealed_line",
    "write_bytes",
    "write_json",
    "write_record",
    "write_text",
]

log = logging.getLogger(__name__)

SEAL: Final = "sha256"
"""A record's entry for the digest of its others."""


def content_key(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping in canonical form (sorted keys, no spaces; NaN is refused)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# -- written whole --------------------------------------------------------------------------------------


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old one or the whole new one, also after a power cut.

    Links are followed. What is no regular file is written to, not replaced: a device, a FIFO, a descriptor as
    /dev/stdout.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    through = _written_through(path)
    if through is not None:
        with open(through, "wb", closefd=not isinstance(through, int)) as file:
            for part in parts:
                file.write(part)
        return
    path = Path(os.path.realpath(path))
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("xb") as file:  # not by tempfile, whose files are their owner's alone whatever the umask
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _written_through(path: Path) -> Path | int | None:
    """What is to be opened and written to: a descriptor of this process, or `path`; None for a regular file."""
    descriptors, place = Path("/proc", str(os.getpid()), "fd"), path
    for _ in range(40):  # as many links as Linux follows
        if Path(os.path.realpath(place.parent)) == descriptors and place.name.isdecimal():
            return int(place.name)  # opened anew, a regular file behind it would be cut to nothing
        if not place.is_symlink():
            break
        place = place.parent / place.readlink()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_bytes` does."""
    write_text(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring all that a folder holds to disk, and its lists of names."""
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


# -- records that carry their hash ----------------------------------------------------------------------


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the digest of its entries as its last one, as `write_bytes` does."""
    write_json(path, _sealed(content))


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, without the digest.

    Raises:
        ValueError: it is not what was written; names the file.
        FileNotFoundError: it is not there.
    """
    try:
        return _unsealed(read_json(path))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path} is damaged: {text}") from None


def sealed_line(content: Mapping[str, Any]) -> str:
    """A record in one line, for a file that grows."""
    return json.dumps(_sealed(content)) + "\n"


def unsealed_line(line: str) -> dict[str, Any]:
    """What `sealed_line` was given; ValueError where the line is not what it wrote."""
    return _unsealed(json.loads(line))


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(content))  # as it will be read: lists for tuples, text for keys
    return {**plain, SEAL: _seal_of(plain)}


def _unsealed(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or SEAL not in record:
        raise ValueError("it carries no hash of its content")
    content = {name: value for name, value in record.items() if name != SEAL}
    if record[SEAL] != _seal_of(content):
        raise ValueError("it does not have the content it was written with")
    return content


def _seal_of(content: Mapping[str, Any]) -> str:
    # Not `content_key`: what a user put into a study may hold NaN.
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- text that people read, with its hash in front ------------------------------------------------------

HASH_LINE: Final = "# sha256 of what follows: "


def sealed_text(text: str) -> str:
    """YAML text with its hash in a comment before it."""
    return f"{HASH_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def text_fault(path: Path) -> str | None:
    """What is wrong with a file that holds what `sealed_text` gave, or None; one that is not sealed is the user's."""
    first, _, rest = path.read_bytes().partition(b"\n")
    if not first and not rest:
        return "it is empty"
    if first.startswith(HASH_LINE.encode()) and first != HASH_LINE.encode() + hashlib.sha256(rest).hexdigest().encode():
        return "it was changed since it was written"
    return None


# -- damaged --------------------------------------------------------------------------------------------


def set_aside(path: Path, fault: str) -> Path:
    """Take a damaged file or folder out of the way as <name>.damaged-<time>, and say so."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):  # another process may have set it aside first
        path.rename(aside)
        log.warning("%s is damaged (%s): set aside as %s, to be made again", path, fault, aside.name)
    return aside
