"""The store: written once, whole or not at all, and never read damaged."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ddim_lab.errors import ConfigError
from ddim_lab.store import Store, content_key, read_json, write_json, write_record
from ddim_lab.store.housekeeping import inventory, prunable, register, register_job, remove, verify
from ddim_lab.store.records import Pointer


def _write(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "value.txt").write_text(text)
        (folder / "other.bin").write_bytes(bytes(range(256)) * 100)

    return build


def _refuse(folder: Path) -> None:
    raise AssertionError("built although it was there")


def test_an_object_is_built_once_and_then_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "outputs")
    assert store.find("cells", "k") is None
    folder, built = store.obtain("cells", "k", _write("one"))
    assert built
    assert (folder / "deep" / "value.txt").read_text() == "one"
    assert store.obtain("cells", "k", _refuse) == (folder, False)
    assert store.find("cells", "k") == folder


def test_replace_builds_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.obtain("cells", "k", _write("one"))
    folder, built = store.obtain("cells", "k", _write("two"), replace=True)
    assert built
    assert (folder / "deep" / "value.txt").read_text() == "two"
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["k"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.obtain("models", "k", build)
    assert list((tmp_path / "models").iterdir()) == []
    assert store.obtain("models", "k", _write("whole"))[1]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [_flip, _truncate, _empty, _remove])
@pytest.mark.parametrize("name", ["deep/value.txt", "other.bin", "MANIFEST.json"])
def test_damage_is_noticed_set_aside_and_mended(tmp_path: Path, harm: Callable[[Path], None], name: str) -> None:
    store = Store(tmp_path)
    folder, _ = store.obtain("references", "k", _write("one"))
    harm(folder / name)
    assert store.find("references", "k") is None
    aside = [path for path in folder.parent.iterdir() if ".damaged-" in path.name]
    assert len(aside) == 1
    folder, built = store.obtain("references", "k", _write("one"))
    assert built
    assert (folder / "deep" / "value.txt").read_text() == "one"


def _obtain_slowly(root: Path, log: Path, gate: Path) -> None:
    while not gate.exists():
        time.sleep(0.001)

    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        (folder / "value.txt").write_text("x")

    Store(root).obtain("models", "k", build)


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_obtain_slowly, args=(tmp_path / "o", log, gate)) for _ in range(6)]
    for process in processes:
        process.start()
    gate.touch()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(log.read_text().split()) == 1


def _hold(root: Path, ready: Path) -> None:
    with Store(root).lock("models-k", waiting_for="nothing"):
        ready.touch()
        time.sleep(600)


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "o", ready))
    holder.start()
    while not ready.exists():
        time.sleep(0.01)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    start = time.monotonic()
    assert Store(tmp_path / "o").obtain("models", "k", _write("x"))[1]
    assert time.monotonic() - start < 60


def _busy(root: Path, ready: Path, stop: Path) -> None:
    with Store(root).presence(f"cpu of {root.parent}".replace("/", "-")):
        ready.touch()
        while not stop.exists():
            time.sleep(0.01)


def test_presence_tells_of_another_process_on_the_device(tmp_path: Path) -> None:
    """Whatever outputs folder that one has."""
    ready, stop = tmp_path / "ready", tmp_path / "stop"
    with Store(tmp_path / "o").presence(f"cpu of {tmp_path}".replace("/", "-")) as others_busy:
        assert not others_busy()
        other = multiprocessing.get_context("fork").Process(target=_busy, args=(tmp_path / "another", ready, stop))
        other.start()
        while not ready.exists():
            time.sleep(0.01)
        assert others_busy()
        stop.touch()
        other.join()
        assert not others_busy()


def test_content_key_names_content_not_order() -> None:
    assert content_key({"a": 1, "b": [1.5, None]}) == content_key({"b": [1.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        content_key({"a": float("nan")})


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"file\.json is damaged"):
        read_json(path)


def test_links_are_followed_and_stay_links(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("old")
    for name in ("old.json", "new.json"):  # the second leads to what is not there yet
        link = tmp_path / name
        link.symlink_to(tmp_path / "there" / name)
        write_json(link, {"a": 1})
        assert link.is_symlink()
        assert read_json(tmp_path / "there" / name) == {"a": 1}
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == ["new.json", "old.json"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="symbolic links"):
        write_json(tmp_path / "circle", 1)


def test_what_is_no_regular_file_is_written_to_not_replaced(tmp_path: Path) -> None:
    fifo, null = tmp_path / "fifo", tmp_path / "null"
    os.mkfifo(fifo)
    null.symlink_to("/dev/null")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(fifo, [1])
        assert os.read(reader, 100) == b"[\n 1\n]\n"
    finally:
        os.close(reader)
    write_json(null, [1])
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fifo", "null"]


def test_a_descriptor_is_written_to_where_it_stands(tmp_path: Path) -> None:
    """As `--json /dev/stdout > FILE`: what was printed before stays, what is printed after follows."""
    with (tmp_path / "printed").open("wb", buffering=0) as file:
        file.write(b"before\n")
        for place in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            write_json(Path(place), 1)
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        write_json(tmp_path / "link", 2)
        file.write(b"after\n")
    assert (tmp_path / "printed").read_bytes() == b"before\n1\n1\n2\nafter\n"


def test_an_outputs_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file" / "outputs").check_writable()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_users_umask_decides_who_may_read(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder, _ = Store(tmp_path).obtain("cells", "k", _write("one"))
        write_json(tmp_path / "value.json", 1)
    finally:
        os.umask(before)
    files = [folder / "MANIFEST.json", folder / "other.bin", tmp_path / "value.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_what_a_running_job_takes_away_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    folder, _ = store.obtain("cells", "k", _write("one"))
    whole = inventory(store)
    (folder / ".pointer.json.1a2b").write_text("being written")
    (tmp_path / "cells" / ".k-1a2b").mkdir()
    lstat = Path.lstat

    def raced(path: Path) -> os.stat_result:
        if path.name.endswith("1a2b"):
            raise FileNotFoundError(path)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", raced)
    assert inventory(store) == whole


# -- what refers to what ---------------------------------------------------------------------------------


def _sweep(store: Store, folder: Path, key: str) -> Path:
    """A sweep of one job that is done, with its cell, as the command and its job leave them."""
    folder = folder.resolve()
    register(store, folder)
    write_record(folder / "plan.json", {"schema": 1})
    store.obtain("cells", key, _write(key))
    pointer = Pointer(number=0, status="done", cell=key, objects=(("cells", key),))
    register_job(store, folder, pointer)
    write_record(folder / "jobs" / "0" / "pointer.json", pointer.content())
    return folder


def _unused(store: Store) -> list[str]:
    return [item.name for item in prunable(store)]


def _not_mounted(sweep: Path) -> None:
    sweep.rename(sweep.with_name("kept"))
    sweep.mkdir()


def _gone(sweep: Path) -> None:
    shutil.rmtree(sweep)


@pytest.mark.parametrize("harm", [_gone, _not_mounted])
def test_a_sweep_outside_keeps_its_cells_until_it_is_forgotten(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    store = Store(tmp_path / "outputs")
    sweep = _sweep(store, tmp_path / "elsewhere", "a")
    store.obtain("cells", "b", _write("b"))
    assert _unused(store) == ["b"]
    assert ("elsewhere", str(sweep)) in {(item.state, item.name) for item in inventory(store)}
    harm(sweep)
    assert _unused(store) == ["b"]
    assert ("gone", str(sweep)) in {(item.state, item.name) for item in inventory(store)}
    assert [item.name for item in prunable(store, forgotten=[sweep])] == ["a", "b"]


def test_another_sweep_in_the_same_folder_takes_the_place_of_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "outputs")
    sweep = _sweep(store, tmp_path / "elsewhere", "a")
    _sweep(store, sweep, "b")
    shutil.rmtree(sweep)
    assert _unused(store) == ["a"]


def test_a_folder_of_sweeps_that_is_a_link_may_lose_what_it_leads_to(tmp_path: Path) -> None:
    store, disk = Store(tmp_path / "outputs"), tmp_path / "disk"
    disk.mkdir()
    store.root.mkdir()
    (store.root / "sweeps").symlink_to(disk)
    _sweep(store, store.root / "sweeps" / "one", "a")
    assert _unused(store) == []
    assert {len(item.users) for item in inventory(store) if item.kind == "cells"} == {1}
    disk.rename(tmp_path / "not mounted")
    with pytest.raises(ConfigError, match=r"sweeps can't be read \(No such file or directory\)"):
        prunable(store)
    disk.mkdir()
    assert _unused(store) == []


def _dangles(sweep: Path) -> None:
    shutil.rmtree(sweep)
    sweep.symlink_to("nowhere")


def _dangling_jobs(sweep: Path) -> None:
    _dangles(sweep / "jobs")


def _no_file(sweep: Path) -> None:
    pointer = sweep / "jobs" / "0" / "pointer.json"
    pointer.unlink()
    pointer.mkdir()


def _of_a_later_version(sweep: Path) -> None:
    write_record(sweep / "jobs" / "0" / "pointer.json", {"schema": 99, "status": "done"})


@pytest.mark.parametrize("harm", [_dangles, _dangling_jobs, _no_file, _of_a_later_version])
def test_what_can_not_be_read_is_not_taken_for_unused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    store = Store(tmp_path)
    harm(_sweep(store, tmp_path / "sweeps" / "one", "a"))
    with pytest.raises(ConfigError, match="so what its sweep refers to is not known"):
        prunable(store)


@pytest.mark.parametrize("name", ["sweep.json", "0.json"])
def test_a_registration_that_is_damaged_is_not_taken_for_none(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "outputs")
    sweep = _sweep(store, tmp_path / "elsewhere", "a")
    (record,) = store.root.glob(f"elsewhere/*/{name}")
    _flip(record)
    shutil.rmtree(sweep)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"so what .* not known: .*, or delete {record.parent}"):
            prunable(store)
        verify(store)  # which sets it aside
    assert not record.exists()


def test_a_store_keeps_what_it_lends_to_another(tmp_path: Path) -> None:
    """models/ of the second is a link to that of the first, as where a disk is short."""
    first, second = Store(tmp_path / "first"), Store(tmp_path / "second")
    first.obtain("cells", "a", _write("a"))
    second.root.mkdir()
    (second.root / "cells").symlink_to(first.root / "cells")
    sweep = _sweep(second, second.root / "sweeps" / "one", "a")
    first.obtain("cells", "b", _write("b"))
    assert _unused(first) == ["b"]
    assert _unused(second) == []
    shutil.rmtree(sweep)
    assert _unused(first) == ["b"]
    assert [item.name for item in prunable(first, forgotten=[sweep])] == ["a", "b"]


def test_an_object_that_is_a_link_is_replaced_and_pruned_as_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "outputs")
    folder, _ = store.obtain("cells", "a", _write("a"))
    folder.rename(tmp_path / "a")
    folder.symlink_to(tmp_path / "a")
    assert store.find("cells", "a") == folder
    (item,) = prunable(store)
    remove(item)
    assert not folder.is_symlink()
    folder.symlink_to(tmp_path / "a")
    store.obtain("cells", "a", _write("b"), replace=True)
    assert not folder.is_symlink()
    assert (tmp_path / "a").is_dir()
