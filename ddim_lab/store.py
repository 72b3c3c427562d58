"""What is kept under outputs/: content-addressed folders, written once, whole or not at all.

    outputs/<kind>/<key>/            sealed: MANIFEST.json carries the SHA-256 of every other file
    outputs/<kind>/<key>.partial/    work in progress that can be resumed (checkpoints)
    outputs/locks/                   one lock file an object; a dead process holds none

An object is built in a folder beside its place, sealed, synced to disk and renamed. It is verified whenever it is
read; one that fails is set aside as <key>.damaged-<time> and built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, final

from filelock import FileLock, Timeout

__all__ = ["Kind", "Store", "content_key", "read_json", "write_bytes", "write_json", "write_text"]

log = logging.getLogger(__name__)

Kind = Literal["models", "references", "cells"]
MANIFEST: Final = "MANIFEST.json"


def content_key(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able mapping in canonical form (sorted keys, no spaces; NaN is refused)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_bytes` does, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old file or the whole new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@final
class Store:
    """The objects under one outputs folder.

    Args:
        root: the outputs folder; made when something is first written, or by `check_writable`.
    """

    def __init__(self, root: Path) -> None:
        self.root: Final = root.expanduser().absolute()

    def check_writable(self) -> None:
        """Raise OSError now rather than after an hour of work."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.root, prefix=".probe-"):
            pass

    def path(self, kind: Kind, key: str) -> Path:
        """Where the object is, or would be."""
        return self.root / kind / key

    def find(self, kind: Kind, key: str) -> Path | None:
        """The verified folder of an object, or None. A damaged one is set aside and counts as absent."""
        folder = self.path(kind, key)
        if not folder.is_dir():
            return None
        fault = _fault(folder)
        if fault is None:
            return folder
        aside = folder.with_name(f"{key}.damaged-{time.time_ns()}")
        with contextlib.suppress(FileNotFoundError):  # another process may have set it aside first
            folder.rename(aside)
            log.warning("%s %s is damaged (%s): set aside as %s, to be built again", kind, key[:12], fault, aside.name)
        return None

    def obtain(
        self, kind: Kind, key: str, build: Callable[[Path], None], *, replace: bool = False
    ) -> tuple[Path, bool]:
        """The object's folder, built if it is not there, and whether it was built by this call.

        Only one process builds; the others wait and take what it made.

        Args:
            kind, key: name of the object.
            build: writes the object's files into the folder it is given.
            replace: build even if it is there.
        """
        if not replace and (found := self.find(kind, key)) is not None:
            return found, False
        with self.lock(f"{kind}-{key}", waiting_for=f"{kind[:-1]} {key[:12]}"):
            if not replace and (found := self.find(kind, key)) is not None:
                return found, False
            target = self.path(kind, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{key[:12]}-"))
            try:
                build(fresh)
                _seal(fresh, kind, key)
                if target.exists():
                    retired = target.with_name(f".{key[:12]}-retired-{time.time_ns()}")
                    target.rename(retired)
                    fresh.rename(target)
                    shutil.rmtree(retired)
                else:
                    fresh.rename(target)
                _sync_folder(target.parent)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            return target, True

    def work_folder(self, kind: Kind, key: str) -> Path:
        """A durable folder for the unfinished object: what is there when its build is killed is there next time."""
        folder = self.path(kind, f"{key}.partial")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_work(self, kind: Kind, key: str) -> None:
        """Remove the work folder of a finished object."""
        shutil.rmtree(self.path(kind, f"{key}.partial"), ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, name: str, *, waiting_for: str) -> Iterator[None]:
        """Hold the named lock. It is the operating system's: it ends with the process, however that dies."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        file_lock = FileLock(folder / f"{name}.lock")
        try:
            file_lock.acquire(timeout=1.0)
        except Timeout:
            log.info("waiting for another process that is making %s", waiting_for)
            file_lock.acquire()
        try:
            yield
        finally:
            file_lock.release()

    @contextlib.contextmanager
    def presence(self, device: str) -> Iterator[Callable[[], bool]]:
        """Mark this process as busy on a device; yields a function that says whether another one is, too."""
        folder = self.root / "locks" / f"device-{device.replace(':', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f"{os.uname().nodename}-{os.getpid()}.lock"

        def others() -> bool:
            busy = False
            for marker in folder.glob(f"{os.uname().nodename}-*.lock"):
                if marker == mine:
                    continue
                probe = FileLock(marker)
                try:
                    probe.acquire(timeout=0)
                except Timeout:
                    busy = True
                else:  # its process is gone
                    marker.unlink(missing_ok=True)
                    probe.release()
            return busy

        own = FileLock(mine)
        with own:
            yield others
        mine.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _seal(folder: Path, kind: Kind, key: str) -> None:
    entries = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {"sha256": _digest(path), "bytes": path.stat().st_size}
    folder.chmod(0o755)
    write_json(folder / MANIFEST, {"schema": 1, "kind": kind, "key": key, "files": entries})


def _fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        entries: dict[str, dict[str, Any]] = read_json(manifest)["files"]
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
                return f"{name} does not have the content it was sealed with"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
