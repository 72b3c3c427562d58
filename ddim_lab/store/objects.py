"""Sealed folders under their content's name, and the locks around their making."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, final

from filelock import FileLock, Timeout

from ddim_lab.store.files import read_record, set_aside, sync_folder, sync_tree, write_record

__all__ = ["KINDS", "MANIFEST", "SAMPLES", "Kind", "Store", "fault", "seal"]

log = logging.getLogger(__name__)

Kind = Literal["models", "references", "cells", "samples"]
KINDS: Final[tuple[Kind, ...]] = ("models", "references", "cells", "samples")
SAMPLES: Final = "samples"
"""The kind whose folders grow and are never sealed: see `ddim_lab.store.samples`."""

MANIFEST: Final = "MANIFEST.json"


@final
class Store:
    """The objects under one outputs folder.

    Args:
        root: the outputs folder; made when something is first written, or by `check_writable`.

    Attributes:
        used: (kind, key) of every object that this store gave out: what a sweep's job refers to.
    """

    def __init__(self, root: Path) -> None:
        self.root: Final = root.absolute()
        self.used: Final[set[tuple[Kind, str]]] = set()

    def check_writable(self) -> None:
        """Raise OSError, with the folder's name, now rather than after an hour of work."""
        inside = [self.root / name for name in ("locks", "sweeps", *KINDS)]
        for folder in [self.root, *(path for path in inside if path.exists())]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
                    pass
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(folder)) from None

    def path(self, kind: Kind, key: str) -> Path:
        """Where the object is, or would be."""
        return self.root / kind / key

    def find(self, kind: Kind, key: str) -> Path | None:
        """The verified folder of an object, or None. A damaged one is set aside and counts as absent."""
        if not self.path(kind, key).is_dir():
            return None
        if (found := self._whole(kind, key)) is None:
            with self._making(kind, key):  # nobody sets aside what another process has just mended
                found = self._whole(kind, key, mend=True)
        return found

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
        work = self.path(kind, f"{key}.partial")
        if not replace and not work.exists() and (found := self._whole(kind, key)) is not None:
            return found, False
        with self._making(kind, key):
            if not replace and (found := self._whole(kind, key, mend=True)) is not None:
                shutil.rmtree(
                    work, ignore_errors=True
                )  # of a process that was killed just before it would have done it
                return found, False
            target = self.path(kind, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            for stale in target.parent.glob(f".{key[:12]}-*"):  # of builds that were killed: the lock is ours
                shutil.rmtree(stale, ignore_errors=True)
            fresh = target.with_name(f".{key[:12]}-{secrets.token_hex(4)}")
            fresh.mkdir()
            try:
                build(fresh)
                seal(fresh, kind, key)
                if target.exists():
                    retired = target.with_name(f".{key[:12]}-retired-{time.time_ns()}")
                    target.rename(retired)
                    fresh.rename(target)
                    retired.unlink() if retired.is_symlink() else shutil.rmtree(retired)
                else:
                    fresh.rename(target)
                sync_folder(target.parent)
                shutil.rmtree(work, ignore_errors=True)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            self.used.add((kind, key))
            return target, True

    def _whole(self, kind: Kind, key: str, *, mend: bool = False) -> Path | None:
        """The object's folder if it is there and whole; with `mend` (under its lock) a damaged one is set aside."""
        folder = self.path(kind, key)
        if not folder.is_dir():
            return None
        if (found := fault(folder)) is None:
            self.used.add((kind, key))
            return folder
        if mend:
            set_aside(folder, found)
        return None

    def _making(self, kind: Kind, key: str) -> contextlib.AbstractContextManager[None]:
        return self.lock(f"{kind}-{key}", waiting_for=f"{kind[:-1]} {key[:12]}")

    def work_folder(self, kind: Kind, key: str) -> Path:
        """A durable folder for the unfinished object: there again if its build is killed, gone when it is built."""
        folder = self.path(kind, f"{key}.partial")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_work(self, kind: Kind, key: str) -> None:
        """Remove the work folder, for a build that is to start from nothing."""
        shutil.rmtree(self.path(kind, f"{key}.partial"), ignore_errors=True)

    @contextlib.contextmanager
    def growing(self, key: str, *, waiting_for: str) -> Iterator[Path]:
        """Context: the folder of samples of this key, held by this process alone; it may not be there yet.

        Args:
            key: its name.
            waiting_for: what it says it waits for.
        """
        owner = (self.root / SAMPLES).resolve().parent  # another outputs folder, where samples/ is a link to its own
        store = Store(owner) if (owner / "locks").is_dir() else self
        with store.lock(f"{SAMPLES}-{key}", waiting_for=waiting_for):
            self.used.add((SAMPLES, key))
            yield self.path(SAMPLES, key)

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
    def one_of(self, names: Sequence[str], *, waiting_for: str) -> Iterator[str]:
        """Hold the lock of the first of these names that is free, and yield it; waits as long as none is."""
        reported = False
        while True:
            with self.some_of(names, 1) as held:
                if held:
                    yield held[0]
                    return
            if not reported:
                log.info("waiting for %s: other processes hold all %s", waiting_for, len(names))
                reported = True
            time.sleep(0.2)

    @contextlib.contextmanager
    def some_of(self, names: Sequence[str], most: int) -> Iterator[list[str]]:
        """Hold the locks of those of these names that are free, `most` of them, and yield them; waits for none."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        held: list[str] = []
        with contextlib.ExitStack() as stack:
            for name in names if most > 0 else ():
                file_lock = FileLock(folder / f"{name}.lock")
                try:
                    file_lock.acquire(timeout=0)
                except Timeout:
                    continue
                stack.callback(file_lock.release)
                held.append(name)
                if len(held) == most:
                    break
            yield held

    @contextlib.contextmanager
    def presence(self, what: str, *, anywhere: bool = False) -> Iterator[Callable[[], bool]]:
        """Mark this process as busy with something; yields a function: is another process busy with it, too?

        Args:
            what: as a device of this machine, or the work on this store.
            anywhere: of this store, on any machine; else of this machine, whatever store its processes use.
        """
        mine = self._mark(what, os.getpid(), anywhere)
        mine.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(mine):
                yield lambda: self.busy(what, but=mine, anywhere=anywhere)
        finally:
            mine.unlink(missing_ok=True)

    def busy(self, what: str, *, but: Path | None = None, anywhere: bool = False) -> bool:
        """Whether a living process marks itself as busy with something; arguments as `presence`."""
        found = False
        for mark in self._marks(what, anywhere).glob("*.lock"):
            if mark == but:
                continue
            if is_locked(mark):
                found = True
            else:  # its process is gone
                mark.unlink(missing_ok=True)
        return found

    def marked(self, what: str, process: int, *, anywhere: bool = False) -> bool:
        """Whether this process, of this machine, marks itself as busy with something; arguments as `presence`."""
        mark = self._mark(what, process, anywhere)
        return mark.is_file() and is_locked(mark)

    def _mark(self, what: str, process: int, anywhere: bool) -> Path:
        return self._marks(what, anywhere) / f"{os.uname().nodename}-{process}.lock"

    def _marks(self, what: str, anywhere: bool) -> Path:
        if anywhere:
            return self.root / "locks" / f"busy-{what}"
        ours = Path(tempfile.gettempdir()) / f"ddim_lab-{os.getuid()}"
        return ours / f"busy-{what.replace(':', '-')}"


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    probe = FileLock(path)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    probe.release()
    return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, kind: str, key: str) -> None:
    """Bring a folder's files to disk and list them, with their hashes, in its MANIFEST.json."""
    sync_tree(folder)
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            entries[path.relative_to(folder).as_posix()] = {"sha256": _digest(path), "bytes": path.stat().st_size}
    write_record(folder / MANIFEST, {"schema": 1, "kind": kind, "key": key, "files": entries})


def fault(folder: Path, only: Sequence[str] | None = None) -> str | None:
    """What is wrong with a sealed folder, or None.

    Args:
        folder: an object's folder, as <kind>/<key>.
        only: look at these of its files alone; None for all.
    """
    try:
        manifest = read_record(folder / MANIFEST)
        entries: dict[str, dict[str, Any]] = manifest["files"]
        if (manifest["kind"], manifest["key"]) != (folder.parent.name, folder.name):
            return f"{MANIFEST} is of another object, {manifest['kind']} {manifest['key'][:12]}"
        for name, entry in entries.items():
            if only is not None and name not in only:
                continue
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
                return f"{name} does not have the content it was sealed with"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None
