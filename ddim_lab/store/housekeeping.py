"""What an outputs folder holds, what refers to what, and what may go.

A sweep in OUTPUTS/sweeps is found there. One that lies elsewhere (hydra.sweep.dir, or sweeps/ is a link) is registered:

    outputs/elsewhere/<digest of its path>/sweep.json       where it lies
    outputs/elsewhere/<digest of its path>/<number>.json    what its job used: known also where the sweep can't be read

An audit in OUTPUTS/audits keeps what it stands on, too; one that was written elsewhere keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, final

from ddim_lab.errors import ConfigError
from ddim_lab.store.files import read_record, set_aside, write_record
from ddim_lab.store.objects import KINDS, SAMPLES, Store, is_locked
from ddim_lab.store.records import Pointer, Using
from ddim_lab.store.samples import Contents, damaged, set_damaged_aside

__all__ = [
    "AUDIT",
    "AUDITS",
    "RUNNING",
    "Item",
    "forget",
    "inventory",
    "no_new_jobs",
    "prunable",
    "register",
    "register_job",
    "registered",
    "remove",
    "verify",
    "working",
    "works_here",
]

RUNNING: Final = "sweep"
"""What a job marks its process as busy with, so that nothing is pruned under it."""

Users = dict[tuple[str, str], set[str]]
"""(kind, key) -> what refers to it."""

AUDITS: Final = "audits"
AUDIT: Final = "audit.json"
"""What an audit leaves in its folder, there."""

State = Literal["whole", "unfinished", "damaged", "left over", "sweep", "audit", "elsewhere", "gone"]


WRITTEN_UP: Final[dict[str, State]] = {"sweeps": "sweep", AUDITS: "audit"}
"""Kinds of folders that refer to objects, and what one of them is called."""


@final
@dataclass(frozen=True)
class Item:
    """A thing under an outputs folder.

    Attributes:
        kind: folder it is in.
        name: its name there.
        state: "whole", "unfinished" (can be resumed), "damaged" (set aside), "left over" (of a process that was
            killed), "sweep", "audit", "elsewhere" (a sweep in another folder, which is its name) or "gone" (where that
            is not there now).
        path: where it is.
        bytes: what it takes.
        changed: when it was last written, in local time.
        users: the sweeps and audits that refer to it, by path.
        cells: of samples: the cells that were measured of them, by key.
        holds: of samples: what is there.
    """

    kind: str
    name: str
    state: State
    path: Path
    bytes: int
    changed: datetime
    users: tuple[str, ...]
    cells: tuple[str, ...] = ()
    holds: Contents | None = None

    @property
    def audits(self) -> tuple[str, ...]:
        """Those of its users that are audits."""
        return tuple(user for user in self.users if Path(user).parent.name == AUDITS)


def inventory(store: Store) -> list[Item]:
    """Everything that takes room, by kind and age; sealed objects are not verified here."""
    return _inventory(store, _users(store))


def _inventory(store: Store, found: _Found) -> list[Item]:
    users = found.users
    items: list[Item | None] = []
    for kind in KINDS:
        for path in _children(store.root / kind):
            item = _item(kind, path, _state(path), tuple(sorted(users.get((kind, path.name), ()))))
            if item is not None and kind == SAMPLES and item.state == "whole":
                cells = tuple(sorted(found.cells.get(path.name, ())))
                item = replace(item, cells=cells, holds=Contents.of(path))
                items += [_item(kind, inside, "damaged", ()) for inside in sorted(path.rglob("*.damaged-*"))]
            items.append(item)
    for folder, state in WRITTEN_UP.items():
        for path in _children(store.root / folder):
            items.append(_item(folder, path, state, ()))
            items += [_item(folder, inside, "damaged", ()) for inside in sorted(path.rglob("*.damaged-*"))]
    linked = {path.resolve() for path in _children(store.root / "sweeps")}
    for sweep, entry in registered(store).items():
        if sweep in linked:
            continue
        item = _item("sweeps", entry, "elsewhere" if _is_there(sweep) else "gone", ())
        items.append(item and replace(item, name=str(sweep)))
    for path in sorted((store.root / "presets").rglob("*.yaml*")):
        items.append(_item("presets", path, _state(path), ()))
    there = [item for item in items if item is not None]
    return sorted(there, key=lambda item: (item.kind, item.changed, item.name))


def verify(store: Store) -> tuple[int, list[Path]]:
    """Read every object, every chunk of samples and every record; set aside what is damaged, with a warning.

    Returns:
        How many were read, and where those lay that were damaged.
    """
    objects = [(kind, path) for kind in KINDS for path in _children(store.root / kind) if _state(path) == "whole"]
    faulty = [path for kind, path in objects if kind != SAMPLES and store.find(kind, path.name) is None]
    for samples in (path for kind, path in objects if kind == SAMPLES):
        if damaged(samples):
            with store.growing(samples.name, waiting_for="samples that are damaged"):
                faulty += set_damaged_aside(samples)
    sweeps = {path.resolve() for path in [*_children(store.root / "sweeps"), *registered(store)]}
    records = sorted([*store.root.glob(f"{ELSEWHERE}/*/*.json"), *store.root.glob(f"{AUDITS}/*/{AUDIT}")])
    for sweep in sorted(sweeps):
        records += [*sweep.glob("plan.json"), *sorted(sweep.glob("jobs/*/pointer.json"))]
    for record in records:
        try:
            read_record(record)
        except ValueError as error:
            set_aside(record, str(error))
            faulty.append(record)
    return len(objects) + len(records), faulty


def prunable(
    store: Store, *, unfinished: bool = False, samples: bool = False, forgotten: Collection[Path] = ()
) -> list[Item]:
    """What no sweep and no audit refers to, and what processes that were killed left behind.

    Args:
        store: the outputs folder.
        unfinished: also work that could be resumed, if no process holds it.
        samples: also samples that sweeps refer to: their results stay.
        forgotten: registered sweeps that count no longer.

    Raises:
        ConfigError: a job is running; or what may refer to anything can't be read.
    """
    if store.busy(RUNNING, anywhere=True):
        raise ConfigError("a job is running in this outputs folder: prune when it has ended")
    found = _users(store, forgotten)
    if found.unknown:
        path, why = next(iter(found.unknown.items()))
        raise ConfigError(f"{path} {why}, so what its sweep refers to is not known: {_way_out(store, path)}")

    def may_go(item: Item) -> bool:
        if item.state in ("damaged", "left over"):
            return True
        unused = not item.users or (samples and item.kind == SAMPLES)
        unwanted = (item.state == "whole" and unused) or (item.state == "unfinished" and unfinished)
        return unwanted and item.kind in KINDS and not _held(store, item)

    lent = {kind for kind in KINDS if _lent_by(store, kind) is not None}  # to be pruned where they lie
    return [item for item in _inventory(store, found) if item.kind not in lent and may_go(item)]


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


def works_here(store: Store, process: int) -> bool:
    """Whether this process, of this machine, is running a job now."""
    return store.marked(RUNNING, process, anywhere=True)


def remove(item: Item) -> None:
    """Delete it, so that a kill in between leaves something left over, not something damaged."""
    if item.path.is_symlink() or not item.path.is_dir():
        item.path.unlink(missing_ok=True)
        return
    doomed = item.path if item.path.name.startswith(".") else item.path.with_name(f".{item.path.name[:12]}-pruned")
    if doomed != item.path:
        shutil.rmtree(doomed, ignore_errors=True)
        item.path.rename(doomed)
    shutil.rmtree(doomed)


# -- sweeps that lie elsewhere --------------------------------------------------------------------------

ELSEWHERE: Final = "elsewhere"
SWEEP: Final = "sweep.json"


def register(store: Store, sweep: Path) -> None:
    """Let the store know of a sweep that is to begin, if it would not find it among its own.

    Args:
        store: the outputs folder.
        sweep: the sweep's folder, resolved.
    """
    for each in _stores(store):
        if not sweep.is_relative_to(each.root.resolve() / "sweeps"):
            entry = _entry(each, sweep)
            for record in entry.glob("*.json"):  # of an earlier sweep in the same folder, whose pointers are gone, too
                record.unlink()
            write_record(entry / SWEEP, {"sweep": str(sweep)})


def register_job(store: Store, sweep: Path, pointer: Pointer) -> None:
    """Keep what a job used, as its pointer has it, where its sweep is registered."""
    for each in _stores(store):
        if (entry := _entry(each, sweep)).is_dir():
            write_record(entry / f"{pointer.number}.json", pointer.content())


def registered(store: Store) -> dict[Path, Path]:
    """The sweeps that lie elsewhere, and where each is registered; entries that can't be read are left out."""
    found = {}
    for entry in _children(store.root / ELSEWHERE):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found[Path(read_record(entry / SWEEP)["sweep"])] = entry
    return found


def forget(store: Store, sweeps: Collection[Path]) -> None:
    """Strike sweeps off the register: what they alone referred to may go."""
    for sweep in sweeps:
        shutil.rmtree(_entry(store, sweep))


def _entry(store: Store, sweep: Path) -> Path:
    return store.root / ELSEWHERE / hashlib.sha256(os.fsencode(sweep)).hexdigest()[:16]


def _is_there(sweep: Path) -> bool:
    """Whether a sweep's folder is there: of an empty one, the disk that is mounted there may be missing."""
    try:
        return (sweep / "plan.json").is_file()
    except OSError:
        return False


def _stores(store: Store) -> list[Store]:
    """The store, and those that it shares objects with: its models/ may be a link to another one's."""
    return [store, *(Store(root) for root in {_lent_by(store, kind) for kind in KINDS} if root is not None)]


def _lent_by(store: Store, kind: str) -> Path | None:
    """The other outputs folder that a kind of objects lies in, if it does."""
    root = (store.root / kind).resolve().parent
    return root if root != store.root.resolve() and (root / "locks").is_dir() else None


# -- what refers to what --------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Found:
    """What sweeps and audits refer to.

    Attributes:
        users: paths of the sweeps and audits that use an object.
        cells: key of samples -> keys of the cells that were measured of them.
        unknown: what can't be read, each with the reason.
    """

    users: Users
    cells: dict[str, set[str]]
    unknown: dict[Path, str]


def _users(store: Store, forgotten: Collection[Path] = ()) -> _Found:
    """What all sweeps and audits refer to, but those that count no longer."""
    users: Users = {}
    cells: dict[str, set[str]] = {}
    unknown: dict[Path, str] = {}

    def read(user: str, record: Path, form: type[Using] = Pointer) -> None:
        try:
            found = form.read(read_record(record))
        except OSError as error:
            unknown[record] = f"can't be read ({error.strerror})"
        except ValueError:
            unknown[record] = "is damaged"
        else:
            cell = found.cell if isinstance(found, Pointer) else None
            for kind, key in (*found.objects, *([("cells", cell)] if cell else ())):
                users.setdefault((kind, key), set()).add(user)
                if kind == SAMPLES and cell is not None:
                    cells.setdefault(key, set()).add(cell)

    def look(folder: Path) -> Sequence[Path]:
        """What is in a folder, where there is one; a link that leads nowhere can't be read."""
        try:
            return sorted(folder.iterdir()) if folder.is_symlink() or folder.exists() else ()
        except NotADirectoryError:
            return ()
        except OSError as error:
            unknown[folder] = f"can't be read ({error.strerror})"
            return ()

    def read_jobs(sweep: Path) -> None:
        for job in look(sweep) and look(sweep / "jobs"):
            for path in look(job):
                lost = ".damaged-" in path.name and not path.with_name("pointer.json").is_file()
                if path.name == "pointer.json":
                    read(str(sweep.resolve()), path)
                elif path.name.startswith("pointer.json") and lost:
                    unknown[path] = "is damaged"

    for sweep in look(store.root / "sweeps"):
        read_jobs(sweep)
    for audit in look(store.root / AUDITS):
        for path in look(audit):
            if path.name == AUDIT:
                read(str(audit), path, Using)
            elif path.name.startswith(f"{AUDIT}.damaged-"):
                unknown[path] = "is damaged"
    known = {entry: sweep for sweep, entry in registered(store).items()}
    for entry in look(store.root / ELSEWHERE):
        if (place := known.get(entry)) is None:
            unknown[entry] = "is damaged"
        elif place not in forgotten and _is_there(place):
            read_jobs(place)
        elif place not in forgotten:
            for record in look(entry):
                if record.name != SWEEP and not record.name.startswith("."):  # as a write that was killed leaves one
                    read(str(place), record)
    return _Found(users, cells, unknown)


def _way_out(store: Store, path: Path) -> str:
    """What to do about something that can't be read, so that the rest can be pruned."""
    if path.is_relative_to(store.root / ELSEWHERE) and path.name != ELSEWHERE:
        entry = store.root / ELSEWHERE / path.relative_to(store.root / ELSEWHERE).parts[0]
        return f"run the sweep's command again, or delete {entry}"
    if path.name.startswith(AUDIT):
        return f"delete {path.parent}"
    if not path.name.startswith("pointer.json"):
        return "make it readable, or delete it"
    return f"run the sweep's command again and delete {path.parents[2]}"


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
