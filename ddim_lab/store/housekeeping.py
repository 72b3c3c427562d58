"""What an outputs folder holds, what refers to what, and what may go."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, final

from ddim_lab.errors import ConfigError
from ddim_lab.store.files import read_record, set_aside
from ddim_lab.store.objects import KINDS, Store, is_locked

__all__ = ["RUNNING", "Item", "inventory", "no_new_jobs", "prunable", "remove", "verify", "working"]

RUNNING: Final = "sweep"
"""What a job marks its process as busy with, so that nothing is pruned under it."""

State = Literal["whole", "unfinished", "damaged", "left over", "sweep"]


@final
@dataclass(frozen=True)
class Item:
    """A thing under an outputs folder.

    Attributes:
        kind: folder it is in.
        name: its name there.
        state: "whole", "unfinished" (can be resumed), "damaged" (set aside), "left over" (of a process that was
            killed), or "sweep".
        path: where it is.
        bytes: what it takes.
        changed: when it was last written, in local time.
        users: the sweeps that refer to it, by name.
    """

    kind: str
    name: str
    state: State
    path: Path
    bytes: int
    changed: datetime
    users: tuple[str, ...]


def inventory(store: Store) -> list[Item]:
    """Everything that takes room, by kind and age; sealed objects are not verified here."""
    users = _users(store)[0]
    items = []
    for kind in KINDS:
        for path in _children(store.root / kind):
            items.append(_item(kind, path, _state(path), tuple(sorted(users.get((kind, path.name), ())))))
    for path in _children(store.root / "sweeps"):
        items.append(_item("sweeps", path, "sweep", ()))
        for inside in sorted(path.rglob("*.damaged-*")):
            items.append(_item("sweeps", inside, "damaged", ()))
    for path in sorted((store.root / "presets").rglob("*.yaml*")):
        items.append(_item("presets", path, _state(path), ()))
    there = [item for item in items if item is not None]
    return sorted(there, key=lambda item: (item.kind, item.changed, item.name))


def verify(store: Store) -> tuple[int, list[Path]]:
    """Read every sealed object and every record; set aside what is damaged, with a warning.

    Returns:
        How many were read, and where those lay that were damaged.
    """
    objects = [(kind, path) for kind in KINDS for path in _children(store.root / kind) if _state(path) == "whole"]
    damaged = [path for kind, path in objects if store.find(kind, path.name) is None]
    records = sorted([*store.root.glob("sweeps/*/plan.json"), *store.root.glob("sweeps/*/jobs/*/pointer.json")])
    for record in records:
        try:
            read_record(record)
        except ValueError as error:
            set_aside(record, str(error))
            damaged.append(record)
    return len(objects) + len(records), damaged


def prunable(store: Store, *, unfinished: bool = False) -> list[Item]:
    """What no sweep refers to, and what processes that were killed left behind.

    Args:
        store: the outputs folder.
        unfinished: also work that could be resumed, if no process holds it.

    Raises:
        ConfigError: a job is running, or a pointer is damaged, so that what it refers to is not known.
    """
    if store.busy(RUNNING, anywhere=True):
        raise ConfigError("a job is running in this outputs folder: prune when it has ended")
    if damaged := _users(store)[1]:
        raise ConfigError(
            f"{damaged[0]} is damaged, so what its sweep refers to is not known: run the sweep's command again and"
            f" delete {damaged[0].parents[2]}"
        )

    def may_go(item: Item) -> bool:
        if item.state in ("damaged", "left over"):
            return True
        unwanted = (item.state == "whole" and not item.users) or (item.state == "unfinished" and unfinished)
        return unwanted and item.kind in KINDS and not _held(store, item)

    return [item for item in inventory(store) if may_go(item)]


def no_new_jobs(store: Store) -> contextlib.AbstractContextManager[None]:
    """Keep jobs from starting while the block chooses and removes; `working` waits for it."""
    return store.lock("prune", waiting_for="room")


@contextlib.contextmanager
def working(store: Store) -> Iterator[None]:
    """Mark a job as running, from before its first object until it has left its pointer: nothing is pruned then."""
    with contextlib.ExitStack() as stack:
        with no_new_jobs(store):
            stack.enter_context(store.presence(RUNNING, anywhere=True))
        yield


def remove(item: Item) -> None:
    """Delete it, so that a kill in between leaves something left over, not something damaged."""
    if not item.path.is_dir():
        item.path.unlink(missing_ok=True)
        return
    doomed = item.path if item.path.name.startswith(".") else item.path.with_name(f".{item.path.name[:12]}-pruned")
    if doomed != item.path:
        shutil.rmtree(doomed, ignore_errors=True)
        item.path.rename(doomed)
    shutil.rmtree(doomed)


# -- what refers to what --------------------------------------------------------------------------------


def _users(store: Store) -> tuple[dict[tuple[str, str], set[str]], list[Path]]:
    """(kind, key) -> names of the sweeps whose pointers name it; and the pointers that can't be read."""
    users: dict[tuple[str, str], set[str]] = {}
    unreadable = []
    for path in sorted((store.root / "sweeps").glob("*/jobs/*/pointer.json*")):
        if path.name != "pointer.json":
            if ".damaged-" in path.name and not path.with_name("pointer.json").is_file():
                unreadable.append(path)
            continue
        try:
            objects = read_record(path).get("objects", [])
            for kind, key in objects:
                users.setdefault((kind, key), set()).add(path.parents[2].name)
        except (ValueError, TypeError):
            unreadable.append(path)
    return users, unreadable


def _state(path: Path) -> State:
    if ".damaged-" in path.name:
        return "damaged"
    if path.name.startswith("."):
        return "left over"
    return "unfinished" if path.name.endswith(".partial") else "whole"


def _held(store: Store, item: Item) -> bool:
    """Whether a process is making the item now."""
    lock = store.root / "locks" / f"{item.kind}-{item.name.removesuffix('.partial')}.lock"
    return lock.is_file() and is_locked(lock)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _item(kind: str, path: Path, state: State, users: tuple[str, ...]) -> Item | None:
    """The item at a path; None where it is gone: a running job renames and removes what it works on."""
    inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    files = []
    for file in inside:
        with contextlib.suppress(FileNotFoundError):
            files.append(file.lstat())
    with contextlib.suppress(FileNotFoundError):
        changed = datetime.fromtimestamp(max(file.st_mtime for file in files or [path.lstat()]))
        return Item(kind, path.name, state, path, sum(file.st_size for file in files), changed, users)
    return None
