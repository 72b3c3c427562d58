"""Samples belong to what makes them: a cell of another N, network or metric takes those that are there.

Forwards are counted by the images that walks begin with.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import tiny
from torch import Tensor

from ddim_lab.store import Store, read_record
from ddim_lab.store.__main__ import main as housekeeping
from ddim_lab.tasks import sampling

EXACT = ("model=gaussian", "metrics.features=pixels", "metrics.kid=false", "logger=csv", "steps=2", "sampler.eta=0.5")
BATCH = "batch_size=16"


def measured(outputs: Path, count: int, *line: str) -> dict[str, str]:
    """The row of a new sweep of one cell of so many samples, but for what no two runs share."""
    assert tiny.run(outputs, *line, f"num_samples={count}", BATCH, settings=()) == 0
    (row,) = tiny.numbers(tiny.sweeps(outputs)[-1])
    return row


def samples_of(outputs: Path) -> Path:
    (folder,) = (outputs / "samples").iterdir()
    return folder


def chunks_in(outputs: Path) -> list[str]:
    """The samples that lie there, by chunk."""
    return sorted(path.name[:19] for path in samples_of(outputs).glob("*.safetensors"))


@pytest.mark.slow
def test_a_grown_cell_equals_one_made_at_once(
    tmp_path: Path, digits: Callable[[Path], Path], walked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A U-Net's images, and features of two networks; the batches that were there are not sampled again."""
    line = (
        "steps=2",
        "sampler.eta=0.5",
        "logger=csv",
        "metrics.kid_subset_size=20",
        *tiny.TINY[:5],
        "save_samples=true",
    )
    both = (*line, "metrics.features=[pixels,classifier]")
    at_once, grown = tmp_path / "at_once", digits(tmp_path / "grown")
    rows, costs = {}, {}
    for count in (28, 44, 32):
        walked.clear()
        capsys.readouterr()
        rows[count] = measured(grown, count, *both)
        costs[count] = walked[:]
        there = re.findall(r" \((\d+) of (\d+) images were there\)$", capsys.readouterr().err, flags=re.MULTILINE)
        assert there == {28: [], 44: [("16", "44")], 32: [("32", "32")]}[count]
    # whole batches, the partial one of this N, and once the walks of determinism; of a prefix nothing
    assert costs == {28: [16, 12, 8, 8, 8], 44: [16, 12], 32: []}
    shutil.copytree(grown / "models", at_once / "models")
    walked.clear()
    expected = measured(at_once, 44, *both)
    assert walked == [16, 16, 12, 8, 8, 8]
    assert rows[44] == expected
    kept = [np.load(outputs / "cells" / expected["cell"] / "samples.npz")["arr_0"] for outputs in (grown, at_once)]
    assert np.array_equal(*kept)
    assert np.array_equal(np.load(grown / "cells" / rows[32]["cell"] / "samples.npz")["arr_0"], kept[0][:32])

    # another network, and later one that these images have never been seen by: extracted from what is there
    walked.clear()
    alone = measured(grown, 44, *line, "metrics.features=classifier")
    assert (alone["fd"], alone["kid"]) == (expected["fd_classifier"], expected["kid_classifier"])
    shutil.rmtree(samples_of(grown) / "features")
    again = measured(grown, 44, *line, "metrics.features=classifier", "metrics.precision_recall=false")
    assert (again["fd"], again["fd_se"], again["kid"]) == (alone["fd"], alone["fd_se"], alone["kid"])
    assert list(samples_of(grown).glob("features/*/network.json"))
    assert walked == []
    assert {row["sha256"] for row in (rows[44], expected, alone, again)} == {expected["sha256"]}


def test_growing_that_was_killed_goes_on(tmp_path: Path, walked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    line = (*EXACT, "checkpoint_seconds=1e-9")
    measured(tmp_path / "grown", 20, *line)
    original = sampling.Maker.add

    def cut(self: Any, indices: Tensor) -> None:
        if int(indices[0]) == 32:
            raise KeyboardInterrupt
        original(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(sampling.Maker, "add", cut)
        assert tiny.run(tmp_path / "grown", *line, "num_samples=50", BATCH, settings=()) == 130
    walked.clear()
    grown = measured(tmp_path / "grown", 50, *line)
    assert walked == [16, 2]
    assert grown == measured(tmp_path / "at_once", 50, *line)
    assert chunks_in(tmp_path / "grown")[-2:] == ["000000032-000000048", "000000048-000000050"]


def test_force_and_damage_make_samples_again(
    tmp_path: Path, walked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    line = (*EXACT, "checkpoint_seconds=1e-9")
    first = measured(tmp_path, 40, *line)
    (chunk,) = samples_of(tmp_path).glob("000000016-*")
    chunk.write_bytes(chunk.read_bytes()[:-1])
    walked.clear()
    assert measured(tmp_path, 32, *line)["num_samples"] == "32"
    assert walked == [16]
    assert f"{chunk.name} is damaged: its samples are made again" in capsys.readouterr().err
    walked.clear()
    assert measured(tmp_path, 40, *line, "force=true") == first
    assert walked == [16, 16, 8, 8, 8, 8]
    assert len(chunks_in(tmp_path)) == 3
    (walk,) = samples_of(tmp_path).glob("walk_of_8_seed_1_times_1-*")
    walk.write_bytes(b"")
    walked.clear()
    measured(tmp_path, 32, *line, "metrics.speed_repeats=1")
    assert walked == [8]


def test_images_of_a_finished_cell_are_written_from_what_is_there(tmp_path: Path, walked: list[int]) -> None:
    row = measured(tmp_path, 40, *EXACT)
    walked.clear()
    measured(tmp_path, 40, *EXACT, "save_samples=true")
    assert walked == []
    file = tmp_path / "cells" / row["cell"] / "samples.npz"
    kept = np.load(file)["arr_0"]
    shutil.rmtree(tmp_path / "samples")
    shutil.rmtree(file.parent)
    measured(tmp_path, 40, *EXACT)
    shutil.rmtree(tmp_path / "samples")
    measured(tmp_path, 40, *EXACT, "save_samples=true")  # as where they were pruned
    assert np.array_equal(np.load(file)["arr_0"], kept)


@pytest.mark.slow
def test_what_makes_other_images_has_other_samples(tmp_path: Path, walked: list[int]) -> None:
    measured(tmp_path, 20, *EXACT)
    for count, others in enumerate(
        ("seed=1", "sampler.eta=0", "steps=3", "runtime.deterministic=true", "batch_size=32")
    ):
        assert tiny.run(tmp_path, *EXACT, BATCH, others, "num_samples=20", settings=()) == 0
        assert len(list((tmp_path / "samples").iterdir())) == 2 + count
    walked.clear()
    measured(tmp_path, 20, *EXACT, "metrics.reference=held_out", "metrics.precision_recall=false")
    measured(tmp_path, 20, *EXACT, "sampler=ddim_eta0.5")  # another name for the same numbers
    assert walked == []


def test_two_commands_make_no_image_twice(tmp_path: Path) -> None:
    """Side by side: the same samples under other metrics and numbers."""
    outputs = tmp_path / "outputs"
    line = (*EXACT, BATCH, "checkpoint_seconds=1e-9")
    assert tiny.run(outputs, *line, "num_samples=16", "seed=1", settings=()) == 0  # what they import and share
    original = sampling.Maker.add

    def note(self: Any, indices: Tensor) -> None:
        with (tmp_path / "made").open("a") as file:
            file.write(f"{indices.tolist()}\n")
        original(self, indices)

    def command(*more: str) -> int:
        sampling.Maker.add = note  # type: ignore[method-assign]
        return tiny.run(outputs, *line, *more, settings=())

    given = (("num_samples=60",), ("num_samples=64",), ("num_samples=60", "metrics.reference=held_out"))
    logs = [tmp_path / f"{number}.log" for number in range(len(given))]
    children = [forked.start(partial(command, *more), log) for more, log in zip(given, logs, strict=True)]
    for child, log in zip(children, logs, strict=True):
        assert forked.wait(child) == 0, log.read_text()
    made = (tmp_path / "made").read_text().splitlines()
    assert len(made) == len(set(made)) == 5  # four whole batches, and the partial one of 60
    hashes = {(row["num_samples"], row["sha256"]) for sweep in tiny.sweeps(outputs)[1:] for row in tiny.results(sweep)}
    assert len(hashes) == 2


# -- python -m ddim_lab.store ----------------------------------------------------------------------------


def test_samples_are_listed_verified_and_freed(
    tmp_path: Path, walked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert housekeeping([*arguments, "--outputs-dir", str(tmp_path)]) == status
        return capsys.readouterr().out

    rows = [measured(tmp_path, count, *EXACT) for count in (24, 40)]
    key = samples_of(tmp_path).name
    cells = ", ".join(sorted(row["cell"][:12] for row in rows))
    told = "32 images and 16 in partial batches; digits gaussian, ddim eta=0.5 S=2, seed 0, batches of 16"
    line = next(line for line in call("list").splitlines() if line.startswith("samples "))
    assert line.endswith(f" {key[:12]}  2 sweep(s)  {told}; of cells {cells}")
    assert read_record(samples_of(tmp_path) / "identity.json")["identity"]["seed"] == 0
    assert call("verify").endswith(" verified, 0 damaged\n")

    (chunk,) = samples_of(tmp_path).glob("000000016-000000032-*")
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + b"x")
    assert call("verify", status=1).endswith(" verified, 1 damaged\n")
    assert not chunk.exists()
    assert "1 in all" in call("prune", "--yes")  # what was set aside, and nothing that is used
    assert not list(samples_of(tmp_path).glob("*.damaged-*"))
    assert call("prune", "--yes").startswith("0 in all")

    walked.clear()
    assert measured(tmp_path, 40, *EXACT, "metrics.inception_score=false")["sha256"] == rows[1]["sha256"]
    assert walked == [16]
    assert "making these samples again takes 96 image-forwards" in call("prune", "--samples", "--dry-run")
    assert samples_of(tmp_path).is_dir()
    with Store(tmp_path).growing(key, waiting_for="nothing"):  # as while it is being made
        assert call("prune", "--samples", "--yes").startswith("0 in all")
    call("prune", "--samples", "--yes")
    assert list((tmp_path / "samples").iterdir()) == []
    walked.clear()
    assert measured(tmp_path, 40, *EXACT)["sha256"] == rows[1]["sha256"]
    assert walked == []  # the cell stays
    measured(tmp_path, 41, *EXACT)
    assert walked == [16, 16, 9, 8, 8, 8]

    for sweep in tiny.sweeps(tmp_path):
        shutil.rmtree(sweep)
    assert "making these samples again takes 82 image-forwards" in call("prune", "--yes")
    assert list((tmp_path / "samples").iterdir()) == []
