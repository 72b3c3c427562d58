"""Damage to any kind of file under outputs/: named, set aside, made again, never used; and housekeeping."""

from __future__ import annotations

import builtins
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from PIL import Image

from ddim_lab.__main__ import main as ddim_lab
from ddim_lab.report.__main__ import main as report
from ddim_lab.store import Store, read_record, sealed_text, text_fault, write_record
from ddim_lab.store.__main__ import main as housekeeping
from ddim_lab.store.housekeeping import working

LINE = ("steps=3", "logger=csv", "save_samples=true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Callable[[Path], Path]) -> Path:
    """Outputs of one cell; never changed."""
    folder = digits(tmp_path_factory.mktemp("whole") / "outputs")
    assert tiny.run(folder, *LINE) == 0
    return folder


@pytest.fixture
def outputs(whole: Path, tmp_path: Path) -> Path:
    """A copy to be harmed."""
    return Path(shutil.copytree(whole, tmp_path / "outputs"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


HARMS = [flip, truncate, empty]
SEALED = {
    "the network": "models/*/diffusion_pytorch_model.safetensors",
    "the raw network": "models/*/raw/diffusion_pytorch_model.safetensors",
    "the network's description": "models/*/config.json",
    "what was trained": "models/*/model.json",
    "the training curve": "models/*/training_curve.csv",
    "the classifier": "models/*/classifier.safetensors",
    "statistics": "references/*/statistics.npz",
    "a result": "cells/*/result.json",
    "pictures": "cells/*/preview.png",
    "samples": "cells/*/samples.npz",
    "a cell's manifest": "cells/*/MANIFEST.json",
    "a model's manifest": "models/*/MANIFEST.json",
}
"""One file of each kind in sealed folders."""


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", SEALED)
def test_damage_in_each_kind_of_file_is_named_and_set_aside(
    kind: str, harm: Callable[[Path], None], outputs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = sorted(outputs.glob(SEALED[kind]))[0]
    folder = outputs / Path(*file.relative_to(outputs).parts[:2])
    harm(file)
    assert Store(outputs).find(folder.parent.name, folder.name) is None  # type: ignore[arg-type]
    assert f"{folder} is damaged ({file.relative_to(folder)}" in caplog.text
    assert not folder.exists()
    assert len(list(folder.parent.glob(f"{folder.name}.damaged-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_the_same_command_mends_everything(harm: Callable[[Path], None], whole: Path, outputs: Path) -> None:
    """Much harmed at once: the report marks the hole, the command makes it again."""
    for kind in ("the network", "statistics", "a result"):
        for file in outputs.glob(SEALED[kind]):
            harm(file)
    (sweep,) = tiny.sweeps(outputs)
    harm(sweep / "jobs" / "0" / "pointer.json")
    assert report([str(sweep)]) == 0
    assert tiny.results(sweep)[0]["status"] == "failed"
    assert "pointer.json is damaged" in tiny.results(sweep)[0]["error"]
    assert tiny.run(outputs, *LINE) == 0
    assert tiny.numbers(tiny.sweeps(outputs)[-1]) == tiny.numbers(tiny.sweeps(whole)[0])
    for kind in ("models", "references", "cells"):
        assert any((outputs / kind).glob("*.damaged-*"))


@pytest.mark.parametrize("harm", HARMS)
def test_the_report_uses_no_damaged_result(harm: Callable[[Path], None], outputs: Path) -> None:
    (result,) = outputs.glob("cells/*/result.json")
    harm(result)
    (sweep,) = tiny.sweeps(outputs)
    assert report([str(sweep)]) == 0
    assert tiny.results(sweep)[0]["status"] == "failed"
    assert "result.json" in tiny.results(sweep)[0]["error"]


@pytest.mark.parametrize("harm", HARMS)
def test_a_plan_that_is_damaged_while_the_sweep_runs_is_written_again(
    harm: Callable[[Path], None], outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ddim_lab.jobs.run

    original = ddim_lab.jobs.run._run

    def harmed(config: object, place: ddim_lab.jobs.run.Place, *others: object) -> object:
        harm(place.sweep / "plan.json")
        return original(config, place, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(ddim_lab.jobs.run, "_run", harmed)
    assert tiny.run(outputs, *LINE) == 0
    sweep = tiny.sweeps(outputs)[-1]
    assert len(list(sweep.glob("plan.json.damaged-*"))) == 1
    assert read_record(sweep / "plan.json")["cells"][0]["labels"]["steps"] == 3


@pytest.mark.parametrize("harm", HARMS)
def test_a_preset_is_used_as_it_was_written_or_not_at_all(
    harm: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "presets" / "sampler" / "found.yaml"
    preset.parent.mkdir(parents=True)
    preset.write_text(sealed_text("name: found\ntimesteps: [900, 500, 100]\n"), encoding="utf-8")
    assert text_fault(preset) is None
    harm(preset)
    monkeypatch.setattr("sys.argv", ["ddim_lab", "--config-dir", str(preset.parents[1]), "sampler=found"])
    with pytest.raises(SystemExit) as stop:
        ddim_lab()
    assert stop.value.code == 2
    assert f"{preset} can't be used: it " in capsys.readouterr().err


@pytest.mark.parametrize("harm", HARMS)
def test_scores_of_a_search_that_are_damaged_are_not_remembered(
    harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ddim_lab.tasks.search.trials import RememberedScores

    scores = RememberedScores(tmp_path / "scores.jsonl")
    scores.add((9, 5), 1.25)
    first = (tmp_path / "scores.jsonl").read_bytes()
    scores.add((9, 4), 1.5)
    second = tmp_path / "second"
    second.write_bytes((tmp_path / "scores.jsonl").read_bytes()[len(first) :])
    harm(second)
    (tmp_path / "scores.jsonl").write_bytes(first + second.read_bytes())
    again = RememberedScores(tmp_path / "scores.jsonl")
    assert again.get((9, 5)) == 1.25
    assert again.get((9, 4)) is None
    assert ("damaged line" in caplog.text) == bool(second.read_bytes())


@pytest.mark.parametrize("harm", HARMS)
def test_a_data_digest_that_is_damaged_is_taken_again(harm: Callable[[Path], None], tmp_path: Path) -> None:
    from ddim_lab.data.disk import DIGEST_FILE, content_digest

    files = [tmp_path / "a.webp", tmp_path / "b.webp"]
    for level, file in enumerate(files):
        Image.new("L", (4, 4), level).save(file)
    digest = content_digest(tmp_path, files)
    harm(tmp_path / DIGEST_FILE)
    assert content_digest(tmp_path, files) == digest


def test_a_record_that_was_edited_is_not_the_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"fd": 1.5, "pair": (1, 2), "by": {3: "three"}})
    assert read_record(path) == {"fd": 1.5, "pair": [1, 2], "by": {"3": "three"}}
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "fd": 1.4}))
    with pytest.raises(ValueError, match="does not have the content it was written with"):
        read_record(path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="carries no hash"):
        read_record(path)


def test_an_object_under_another_name_is_not_that_object(outputs: Path) -> None:
    (cell,) = (outputs / "cells").iterdir()
    other = cell.with_name("0" * 64)
    shutil.copytree(cell, other)
    assert Store(outputs).find("cells", other.name) is None
    assert Store(outputs).find("cells", cell.name) == cell


# -- python -m ddim_lab.store ----------------------------------------------------------------------------


def call(*arguments: str, outputs: Path) -> int:
    return housekeeping([*arguments, "--outputs-dir", str(outputs)])


def test_list_names_everything_with_its_users(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", outputs=outputs) == 0
    lines = capsys.readouterr().out.splitlines()
    (cell,) = (outputs / "cells").iterdir()
    assert next(line for line in lines if line.startswith("cells")).endswith(f"{cell.name[:12]}  1 sweep(s)")
    assert sum(line.startswith("models") and line.endswith("1 sweep(s)") for line in lines) == 2
    assert sum(line.startswith("references") and line.endswith("1 sweep(s)") for line in lines) >= 2
    assert lines[-1].startswith(f"{len(lines) - 1} in all, ")


def test_verify_reads_all_and_sets_aside_what_is_damaged(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", outputs=outputs) == 0
    assert re.fullmatch(r"\d+ verified, 0 damaged\n", capsys.readouterr().out)
    flip(next(outputs.glob("cells/*/preview.png")))
    flip(next(outputs.glob("sweeps/*/jobs/0/pointer.json")))
    assert call("verify", outputs=outputs) == 1
    assert re.fullmatch(r"\d+ verified, 2 damaged\n", capsys.readouterr().out)
    assert len(list(outputs.glob("cells/*.damaged-*"))) == 1
    assert len(list(outputs.glob("sweeps/*/jobs/0/pointer.json.damaged-*"))) == 1
    assert call("prune", "--yes", outputs=outputs) == 2  # what that sweep refers to is not known now
    assert "prune" not in capsys.readouterr().out


def tree(outputs: Path) -> set[str]:
    kinds = ("models", "references", "cells")
    return {f"{kind}/{path.name}" for kind in kinds for path in (outputs / kind).glob("*")}


def test_prune_removes_what_no_sweep_refers_to_and_nothing_else(
    outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tree(outputs)
    assert call("prune", "--yes", outputs=outputs) == 0
    assert tree(outputs) == kept
    other = tiny.run(outputs, "steps=2", "logger=csv")
    assert other == 0
    added = tree(outputs) - kept
    assert len(added) == 1  # the cell; the rest is shared
    shutil.rmtree(tiny.sweeps(outputs)[-1])
    (outputs / "cells" / ".0123456789ab-xyz").mkdir()
    (outputs / "models" / f"{'a' * 64}.damaged-1").mkdir()
    unfinished = outputs / "models" / f"{'b' * 64}.partial"
    unfinished.mkdir()
    before = tree(outputs)
    assert call("prune", "--dry-run", outputs=outputs) == 0
    assert tree(outputs) == before
    for answer in ("", "n"):
        monkeypatch.setattr(builtins, "input", lambda _, answer=answer: answer)
        assert call("prune", outputs=outputs) == 0
        assert tree(outputs) == before
    monkeypatch.setattr(builtins, "input", lambda _: "y")
    assert call("prune", outputs=outputs) == 0
    assert tree(outputs) == kept | {f"models/{unfinished.name}"}
    with Store(outputs).lock(f"models-{'b' * 64}", waiting_for="it"):
        assert call("prune", "--unfinished", "--yes", outputs=outputs) == 0
        assert unfinished.exists()
    assert call("prune", "--unfinished", "--yes", outputs=outputs) == 0
    assert tree(outputs) == kept
    assert tiny.run(outputs, *LINE) == 0
    assert tiny.results(tiny.sweeps(outputs)[-1])[0]["cached"] == "True"


def test_prune_keeps_the_cells_of_a_sweep_that_lies_elsewhere_until_it_forgets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"
    line = (
        "model=gaussian",
        "metrics.features=pixels",
        "steps=2,3",
        "logger=csv",
        "-m",
        f"hydra.sweep.dir={elsewhere}",
    )
    assert tiny.run(outputs, *line, settings=tiny.SMALL) == 0
    kept = tree(outputs)
    assert call("verify", outputs=outputs) == 0
    assert " verified, 0 damaged" in capsys.readouterr().out
    for _ in range(2):
        assert call("prune", "--yes", outputs=outputs) == 0
        assert tree(outputs) == kept
        if elsewhere.exists():
            shutil.rmtree(elsewhere)
    assert call("list", outputs=outputs) == 0
    assert re.search(rf"sweeps +gone .* {elsewhere}", capsys.readouterr().out)
    assert call("prune", "--forget", str(tmp_path / "other"), outputs=outputs) == 2
    assert f"no such sweep is registered; those outside {outputs}: {elsewhere}" in capsys.readouterr().err
    assert call("prune", "--forget", str(elsewhere), "--dry-run", outputs=outputs) == 0
    assert tree(outputs) == kept
    assert call("prune", "--forget", str(elsewhere), "--yes", outputs=outputs) == 0
    assert tree(outputs) == set()
    assert not list((outputs / "elsewhere").iterdir())


def test_nothing_is_pruned_under_a_job(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with working(Store(outputs)):
        assert call("prune", "--yes", outputs=outputs) == 2
    assert capsys.readouterr().err == ("ddim_lab: a job is running in this outputs folder: prune when it has ended\n")
    assert call("prune", "--yes", outputs=outputs) == 0


def test_a_build_that_was_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stale = tmp_path / "cells" / ".kkkkkkkkkkkk-abc"
    stale.mkdir(parents=True)
    store.obtain("cells", "k" * 64, lambda folder: (folder / "value").write_text("1") and None)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["k" * 64]


def test_processes_that_find_the_same_damage_set_it_aside_once(tmp_path: Path) -> None:
    """The slower one must not take the mended object for the damaged one that it has read."""
    import multiprocessing

    store = Store(tmp_path)
    folder, _ = store.obtain("cells", "k", lambda folder: (folder / "value").write_text("1" * 10_000_000) and None)
    flip(folder / "value")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_mend, args=(tmp_path, time.time() + 0.2)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("cells/k.damaged-*"))) == 1


def _mend(root: Path, at: float) -> None:
    time.sleep(max(0.0, at - time.time()))
    Store(root).obtain("cells", "k", lambda folder: (folder / "value").write_text("2" * 10_000_000) and None)


def test_no_outputs_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", outputs=tmp_path / "nowhere") == 2
    assert capsys.readouterr().err == (
        f"ddim_lab: there is no outputs folder {tmp_path / 'nowhere'}; give --outputs-dir\n"
    )
