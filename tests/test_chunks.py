"""Samples on disk: what is there is taken, what is damaged is made again, and no number depends on the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ddim_lab.store import write_record
from ddim_lab.store.chunks import Batch, SampleChunks, kept
from ddim_lab.store.records import Samples
from ddim_lab.store.samples import RECORD, Contents, tidy

NETWORK = "a network"


def chunks_of(folder: Path, num_samples: int, batch_size: int = 4, every_seconds: float = 1e9) -> SampleChunks:
    return SampleChunks(folder, num_samples, batch_size, every_seconds, {NETWORK: "FD (a network)"})


def images_of(chunks: SampleChunks) -> list[int]:
    return [index for one in chunks for index in one.images[:, 0, 0, 0].tolist()]


def batch(indices: range, **changes: Any) -> Batch:
    """A batch whose images and features say which samples they are."""
    names = torch.arange(indices.start, indices.stop)
    given = {
        "start": indices.start,
        "images": names.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        "tensors": {"steps": names.double().view(-1, 1)},
        "features": {NETWORK: names.float().view(-1, 1)},
        "seconds": {"sampling": 0.5, "features": 0.25},
        "warm": indices.start > 0,
        "contended": False,
    }
    return Batch(**{**given, **changes})


def test_what_was_added_comes_back_in_order(tmp_path: Path) -> None:
    chunks = chunks_of(tmp_path / "work", 10)
    assert chunks.missing() == [range(0, 4), range(4, 8), range(8, 10)]
    for indices in chunks.missing():
        assert not (tmp_path / "work").exists()  # nothing is due yet
        chunks.add(batch(indices))
    chunks.flush()
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2  # the partial batch has its own
    again = chunks_of(tmp_path / "work", 10)
    assert again.missing() == []
    found = list(again)
    assert [(one.start, len(one), one.warm, one.contended) for one in found] == [
        *((0, 4, False, False), (4, 4, True, False), (8, 2, True, False)),
    ]
    assert torch.cat([one.images for one in found])[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.cat([one.tensors["steps"] for one in found]).flatten().tolist() == list(range(10))
    assert torch.cat([one.features[NETWORK] for one in found]).flatten().tolist() == list(range(10))
    assert found[1].seconds == {"sampling": 0.5, "features": 0.25}


def test_a_kept_tensor_is_made_once_and_again_where_it_is_damaged(tmp_path: Path) -> None:
    made: list[float] = []

    def make() -> torch.Tensor:
        made.append(1.5)
        return torch.tensor(made)

    assert [kept(tmp_path, "walk", make).tolist() for _ in range(2)] == [[1.5], [1.5]]
    assert kept(tmp_path, "walk_again", make).tolist() == [1.5, 1.5]
    (file,) = tmp_path.glob("walk-*")
    file.write_bytes(file.read_bytes()[:-1])
    assert kept(tmp_path, "walk", make).tolist() == [1.5] * 3


def test_two_makers_share_a_cell(tmp_path: Path) -> None:
    """As ranks of one evaluation do: each writes every second batch, and the reader sees them in order."""
    for rank in range(2):
        maker = SampleChunks(tmp_path, 100, 8, every_seconds=0.0)
        for indices in [range(start, min(start + 8, 100)) for start in range(0, 100, 8)][rank::2]:
            maker.add(batch(indices))
        maker.flush()
    reader = SampleChunks(tmp_path, 100, 8, every_seconds=0.0)
    assert reader.missing() == []
    assert [index for one in reader for index in one.tensors["steps"].flatten().tolist()] == list(range(100))


def test_samples_that_were_made_twice_are_taken_once(tmp_path: Path) -> None:
    """As where a process of a killed evaluation wrote a last chunk while the next evaluation had begun."""
    for stops in ((8, 16, 20), (4, 12, 20)):
        maker, start = SampleChunks(tmp_path / str(stops[0]), 20, 4, every_seconds=1e9), 0
        for stop in stops:
            for first in range(start, stop, 4):
                maker.add(batch(range(first, first + 4)))
            maker.flush()
            start = stop
    for path in (tmp_path / "4").iterdir():
        path.rename(tmp_path / "8" / path.name)
    reader = SampleChunks(tmp_path / "8", 20, 4, every_seconds=1e9)
    assert reader.missing() == []
    assert [index for one in reader for index in one.tensors["steps"].flatten().tolist()] == list(range(20))


def filled(folder: Path, num_samples: int) -> list[range]:
    """The samples made so that there are so many; the batches that were made for it."""
    chunks = chunks_of(folder, num_samples)
    made = chunks.missing()
    for indices in made:
        chunks.add(batch(indices))
    chunks.flush()
    assert images_of(chunks_of(folder, num_samples)) == list(range(num_samples))
    return made


def test_whole_batches_are_of_any_number_of_samples_and_partial_ones_of_their_own(tmp_path: Path) -> None:
    assert filled(tmp_path, 10) == [range(0, 4), range(4, 8), range(8, 10)]
    assert filled(tmp_path, 15) == [range(8, 12), range(12, 15)]
    for there in (4, 8, 10, 12, 15):  # prefixes, and what was made as it is
        assert filled(tmp_path, there) == []
    assert filled(tmp_path, 9) == [range(8, 9)]
    assert filled(tmp_path, 3) == [range(0, 3)]
    assert filled(tmp_path, 16) == [range(12, 16)]
    assert Contents.of(tmp_path).whole == 16  # without a record no batch is known to be partial
    write_record(tmp_path / RECORD, Samples(key="k", words="these", nfe=5, batch_size=4).content())
    told = Contents.of(tmp_path)
    assert (told.whole, told.partial, told.forwards) == (16, 2 + 3 + 1 + 3, 5 * 25)
    assert str(told) == "16 images and 9 in partial batches; these; FD (a network)"


def test_features_are_extracted_where_they_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 14)
    seen: list[int] = []

    def extract(images: torch.Tensor, networks: Sequence[str]) -> dict[str, torch.Tensor]:
        seen.append(int(images[0, 0, 0, 0]))
        return {network: images[:, 0, 0].float() for network in networks}

    def see(num_samples: int) -> list[int]:
        seen.clear()
        chunks = SampleChunks(tmp_path, num_samples, 4, 1e9, {"other": "FD (other)"})
        left = chunks.unseen(["other"])
        chunks.see(["other"], extract)
        assert left == sum(min(start + 4, num_samples) - start for start in seen)
        for one in SampleChunks(tmp_path, num_samples, 4, 1e9, {"other": "FD (other)"}):
            assert torch.equal(one.features["other"], one.images[:, 0, 0].float())
        return list(seen)

    assert see(8) == [0, 4]  # not the third batch of the same chunk
    assert see(14) == [8, 12]
    assert see(14) == see(12) == []
    assert Contents.of(tmp_path).networks == ("FD (a network)", "FD (other)")
    for file in tmp_path.glob("features/*/000000008-*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert see(14) == [8]
    assert "damaged: its features are made again" in caplog.text

    asked: dict[int, list[str]] = {}

    def together(images: torch.Tensor, networks: Sequence[str]) -> dict[str, torch.Tensor]:
        asked[int(images[0, 0, 0, 0])] = list(networks)
        return extract(images, networks)

    for file in tmp_path.glob("features/*/000000008-*"):
        file.unlink()
    both = {"other": "FD (other)", "third": "FD (third)"}
    chunks = SampleChunks(tmp_path, 14, 4, 1e9, both)
    assert chunks.unseen(list(both)) == 14
    chunks.see(list(both), together)
    # each batch is looked at once, by those networks that have not seen it
    assert asked == {0: ["third"], 4: ["third"], 8: ["other", "third"], 12: ["third"]}
    assert all(set(one.features) == set(both) for one in SampleChunks(tmp_path, 14, 4, 1e9, both))


def test_what_writes_that_were_killed_left_goes(tmp_path: Path) -> None:
    filled(tmp_path, 8)
    (chunk,) = tmp_path.glob("*.safetensors")
    (features,) = tmp_path.glob("features/*/*.safetensors")
    for stale in (chunk, features):
        stale.with_name(f".{stale.name}.1a2b").write_bytes(b"half")
    tidy(tmp_path)
    assert features.exists()
    chunk.unlink()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["network.json"]


def test_a_chunk_has_no_gap(tmp_path: Path) -> None:
    chunks = SampleChunks(tmp_path, 12, 4, every_seconds=1e9)
    chunks.add(batch(range(0, 4)))
    chunks.add(batch(range(8, 12)))
    chunks.flush()
    assert SampleChunks(tmp_path, 12, 4, every_seconds=1e9).missing() == [range(4, 8)]
    with pytest.raises(RuntimeError, match="12 samples were asked for, 4 are there"):
        list(chunks)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_chunk_is_named_and_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chunks = SampleChunks(tmp_path, 8, 4, every_seconds=0.0)
    for indices in chunks.missing():
        chunks.add(batch(indices))
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-5]), "empty": b""}[damage])
    with pytest.raises(RuntimeError, match="changed while it was in use"):
        list(chunks)
    found = SampleChunks(tmp_path, 8, 4, every_seconds=0.0)
    assert found.missing() == [range(4, 8)]
    assert f"{second.name} is damaged" in caplog.text


@pytest.mark.slow
def test_a_cell_that_was_cut_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ddim_lab.tasks import sampling

    line = (
        *("steps=3", "sampler.eta=0.5", "batch_size=10", "checkpoint_seconds=1e-9"),
        *("logger=csv", "metrics.features=pixels"),
    )
    assert tiny.run(tmp_path / "whole", *line) == 0
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "models").symlink_to(tmp_path / "whole" / "models")
    made: list[int] = []
    original = sampling.Maker.add

    def cut(self: Any, indices: torch.Tensor) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(int(indices[0]))
        original(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(sampling.Maker, "add", cut)
        assert tiny.run(tmp_path / "cut", *line) == 130
    kept = sorted((tmp_path / "cut" / "samples").glob("*/*.safetensors"))
    assert [sorted(load_file(path))[0].split(".")[0] for path in kept] == ["0", "10"]

    def note(self: Any, indices: torch.Tensor) -> None:
        made.append(int(indices[0]))
        original(self, indices)

    monkeypatch.setattr(sampling.Maker, "add", note)
    assert tiny.run(tmp_path / "cut", *line) == 0
    assert made == [0, 10, 20, 30, 40]  # nothing twice
    assert not list((tmp_path / "cut" / "cells").glob("*.partial"))
    assert tiny.numbers(tiny.sweeps(tmp_path / "cut")[-1]) == tiny.numbers(tiny.sweeps(tmp_path / "whole")[0])
