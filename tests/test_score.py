"""`python -m ddim_lab.score`: the same numbers as a cell has, from any file or folder; faulty ones in one line."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from ddim_lab.errors import ConfigError
from ddim_lab.score import main, score
from ddim_lab.store import Store, read_json
from ddim_lab.store.housekeeping import prunable
from ddim_lab.store.records import Value

PIXELS = ("metrics.features=pixels", "metrics.kid_subset_size=20")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the values that were written, by the columns of results.csv."""
    out = tmp_path / "score.json"
    out.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        features = PIXELS[any(text.startswith("metrics.features=") for text in arguments) :]
        line = [*arguments, "--json", str(out), *features, f"outputs_dir={tmp_path}/outputs"]
        patch.setattr(sys, "argv", ["score", *line])
        with pytest.raises(SystemExit) as stop:
            main()
    assert isinstance(stop.value.code, int)
    values = json.loads(out.read_text())["values"] if out.exists() else []
    return stop.value.code, tiny.columns([Value(**value) for value in values])


def images(count: int = 30, seed: int = 0, shape: tuple[int, int, int] = (8, 8, 1)) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def folder_of(path: Path, pixels: Pixels) -> Path:
    path.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(path / f"{number:04d}.png")
    return path


def test_a_cells_samples_score_what_the_cell_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ("model=gaussian", "steps=3", "logger=csv", "save_samples=true", *PIXELS)
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    (cell,) = (tmp_path / "outputs" / "cells").glob("*/result.json")
    expected = tiny.measured(read_json(cell))
    samples = cell.parent / "samples.npz"
    capsys.readouterr()
    status, quality = run(tmp_path, str(samples))
    printed = capsys.readouterr().out
    assert status == 0
    for name in ("fd", "fd_se", "kid", "kid_spread", "improved_precision", "improved_recall", "fd_at_equal_n"):
        assert quality[name] == pytest.approx(expected[name], rel=1e-9), name
    for name in ("fd_features", "fd_reference", "fd_reference_key", "fd_num_samples", "fd_name", "equal_n"):
        assert quality[name] == expected[name]
    for words in ("N = 44", "8x8 with 1 channel", "reference: digits train, n=1437", "FD (digits pixels) ", "recall "):
        assert words in printed, printed

    pixels = np.load(samples)["arr_0"]
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=pixels)
    for path in (tmp_path / "compressed.npz", folder_of(tmp_path / "folder", pixels)):
        again = run(tmp_path, str(path))[1]
        assert again["fd"] == pytest.approx(quality["fd"], rel=1e-9)
        assert again["improved_recall"] == quality["improved_recall"]


def test_several_networks_have_a_table_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Callable[[Path], Path]
) -> None:
    digits(tmp_path / "outputs")
    np.savez(tmp_path / "one.npz", arr_0=images())
    alone = {name: run(tmp_path, str(tmp_path / "one.npz"), f"metrics.features={name}")[1] for name in NETWORKS}
    capsys.readouterr()
    status, both = run(tmp_path, str(tmp_path / "one.npz"), f"metrics.features=[{','.join(NETWORKS)}]")
    assert status == 0
    for name in ("fd", "fd_se", "kid", "improved_recall"):
        assert both[name] == alone["pixels"][name]
        renamed = "fd_classifier_se" if name == "fd_se" else f"{name}_classifier"
        assert both[renamed] == alone["classifier"][name]
    _, pixels, classifier = re.split("(?:features: .*\n)+", capsys.readouterr().out)
    for table, network in ((pixels, "pixels"), (classifier, "classifier")):
        assert f"FD (digits {network}) " in table
        assert "recall " in table
    np.savez(tmp_path / "s.npz", **statistics(images()))
    refused = ("--reference", str(tmp_path / "s.npz"), f"metrics.features=[{','.join(NETWORKS)}]")
    assert run(tmp_path, str(tmp_path / "one.npz"), *refused)[0] == 2
    assert re.search(r"s\.npz: its mu and sigma are of one network's features, .*: name one\n", capsys.readouterr().err)


NETWORKS = ("pixels", "classifier")


def test_a_place_that_can_not_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = [str(folder_of(tmp_path / "images", images())), "--json", str(tmp_path / "file" / "score.json")]
    monkeypatch.setattr(sys, "argv", ["score", *line, *PIXELS, f"outputs_dir={tmp_path}/outputs"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told, error = capsys.readouterr().err.splitlines()
    assert told == f"ddim_lab: {tmp_path}/images: 30 images"
    assert re.fullmatch(r"ddim_lab: --json=.*score\.json can't be written: .*", error)


def test_nothing_is_pruned_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def prune_meanwhile(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(ConfigError) as error:
            prunable(Store(tmp_path / "outputs"))
        refused.append(str(error.value))
        return score(*arguments)

    monkeypatch.setattr("ddim_lab.score.score", prune_meanwhile)
    assert run(tmp_path, str(folder_of(tmp_path / "images", images())))[0] == 0
    assert refused == ["a job is running in this outputs folder: prune when it has ended"]


def test_two_sets_of_samples_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.npz", folder_of(tmp_path / "other", images(25, seed=1))
    np.savez(one, arr_0=images())
    status, same = run(tmp_path, str(one), "--reference", str(one))
    assert status == 0
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert same["improved_precision"] == same["improved_recall"] == 1
    assert same["fd_reference"] == "one.npz, n=30"
    different = run(tmp_path, str(one), "--reference", str(other))[1]
    assert different["fd"] > 1
    assert different["fd_reference"] == "other, n=25"
    flat = images().reshape(30, 64) / 127.5 - 1
    np.savez(tmp_path / "statistics.npz", mu=flat.mean(0), sigma=np.cov(flat.T))
    of_file = run(tmp_path, str(one), "--reference", str(tmp_path / "statistics.npz"))[1]
    assert of_file["fd"] == pytest.approx(0, abs=1e-5)
    assert of_file.get("kid") is None
    assert "no kernel distance: the reference is a mean and a covariance" in capsys.readouterr().out


def statistics(pixels: Pixels) -> dict[str, Any]:
    """As an evaluator writes them: of pixels, and of another number of features beside."""
    flat = pixels.reshape(len(pixels), -1) / 127.5 - 1
    return {"mu": flat.mean(0), "sigma": np.cov(flat.T), "mu_s": np.zeros(9), "sigma_s": np.eye(9)}


def test_a_reference_batch_of_the_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """arr_0 beside mu and sigma, of more images than are in it: statistics where they fit, images for all else."""
    one, batch, alone = tmp_path / "one.npz", tmp_path / "batch.npz", tmp_path / "alone.npz"
    np.savez(one, arr_0=images())
    np.savez(batch, arr_0=images(50, seed=1), **statistics(images(500, seed=1)))
    np.savez(alone, **statistics(images(500, seed=1)))
    status, both = run(tmp_path, str(one), "--reference", str(batch))
    assert status == 0
    printed = capsys.readouterr().out
    assert ", n unknown, for the Fréchet distance; 50 images beside them for the rest" in printed
    assert both["fd"] == run(tmp_path, str(one), "--reference", str(alone))[1]["fd"]
    np.savez(tmp_path / "images.npz", arr_0=images(50, seed=1))
    of_images = run(tmp_path, str(one), "--reference", str(tmp_path / "images.npz"))[1]
    for name in ("kid", "improved_precision", "improved_recall"):
        assert both[name] == of_images[name] is not None
    assert both["fd"] != of_images["fd"]
    assert both["fd_reference_key"] not in (of_images["fd_reference_key"], None)

    capsys.readouterr()
    np.savez(batch, arr_0=images(50, seed=1), mu=np.zeros(2048), sigma=np.eye(2048))
    unfit = run(tmp_path, str(one), "--reference", str(batch))[1]
    assert unfit["fd"] == of_images["fd"]
    assert "batch.npz, n=50 (its mu and sigma are of other features)" in capsys.readouterr().out

    np.savez(batch, arr_0=images(50, seed=1), **{**statistics(images(500, seed=1)), "sigma": -np.eye(64)})
    assert run(tmp_path, str(one), "--reference", str(batch))[0] == 2
    assert re.fullmatch(r"ddim_lab: --reference=\S+batch\.npz: sigma is no covariance: .*\n", capsys.readouterr().err)
    np.savez(batch, arr_0=images(50, seed=1), mu=np.zeros(64))  # half of the statistics is none
    assert run(tmp_path, str(one), "--reference", str(batch))[1]["fd"] == of_images["fd"]


def test_where_no_features_are_needed_the_images_of_a_batch_are_not_looked_at(tmp_path: Path) -> None:
    one, batch = tmp_path / "one.npz", tmp_path / "batch.npz"
    np.savez(one, arr_0=images())
    np.savez(batch, arr_0=images(50, shape=(9, 9, 3)), **statistics(images(500, seed=1)))
    compared = ("mmd", "kid", "precision_recall", "density_coverage", "memorisation")
    sums = [f"metrics.{name}=false" for name in compared]
    status, found = run(tmp_path, str(one), "--reference", str(batch), *sums)
    assert status == 0
    assert found["fd_reference"].endswith(", n unknown")


def test_what_was_taken_of_a_folder_is_told_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a name that is no UTF-8: it is spelt out."""
    folder = folder_of(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")), images())
    (folder / ".0000.png").touch()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    assert run(tmp_path, str(folder), "--reference", str(folder))[0] == 0
    told = "30 images; passed over: 1 hidden (.0000.png), 1 leading nowhere (gone.png)"
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [rf"ddim_lab: {tmp_path}/caf\xe9: {told}"] * 2
    assert r"caf\xe9, n=30" in printed.out
    assert json.loads((tmp_path / "score.json").read_text())["samples"]["files"] == told


@pytest.mark.slow
def test_values_may_be_written_to_where_the_table_goes(tmp_path: Path) -> None:
    """`--json /dev/stdout > FILE`: JSON after the table, in a process of its own."""
    np.savez(tmp_path / "one.npz", arr_0=images())
    line = [str(tmp_path / "one.npz"), "--json", "/dev/stdout", *PIXELS, f"outputs_dir={tmp_path}/outputs"]
    with (tmp_path / "printed").open("wb") as file:
        subprocess.run([sys.executable, "-m", "ddim_lab.score", *line], stdout=file, check=True)
    table, brace, rest = (tmp_path / "printed").read_text().partition("\n{")
    assert table.startswith("samples    one.npz: N = 30")
    assert json.loads(brace + rest)["samples"]["num_samples"] == 30


def save(name: str, **arrays: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / name, **arrays)
        return folder / name

    return write


def cut(folder: Path) -> Path:
    path = save("cut.npz", arr_0=images())(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def flipped(folder: Path) -> Path:
    """One byte of the pixels is another: the checksum in the file does not fit."""
    path = save("flipped.npz", arr_0=images())(folder)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    return path


def empty_folder(folder: Path) -> Path:
    (folder / "none").mkdir()
    return folder / "none"


def mixed(folder: Path) -> Path:
    path = folder_of(folder / "mixed", images(3))
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(path / "9999.png")
    return path


def corrupt(folder: Path) -> Path:
    path = folder_of(folder / "corrupt", images(3))
    (path / "0002.png").write_bytes((path / "0002.png").read_bytes()[:60])
    return path


def transparent(folder: Path) -> Path:
    path = folder_of(folder / "transparent", images(3))
    Image.new("RGBA", (8, 8)).save(path / "0000.png")
    return path


def deep_colour(folder: Path) -> Path:
    """A PNG of 16-bit RGB, which PIL would open as RGB, and cut."""
    path = folder_of(folder / "deep", images(3))
    (path / "0000.png").write_bytes(png(8, 8, 16, b"".join(bytes(1 + 8 * 6) for _ in range(8))))
    return path


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A PNG file of RGB pixels from its rows, each behind a byte of 0."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def version_3(folder: Path) -> Path:
    content = io.BytesIO()
    np.lib.format.write_array(content, images(), version=(3, 0))
    with zipfile.ZipFile(folder / "v3.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue())
    return folder / "v3.npz"


def plain_array(folder: Path) -> Path:
    np.save(folder / "array.npy", images())
    return folder / "array.npy"


def bomb(folder: Path) -> Path:
    """A file of 100 bytes that says it holds 20,000 x 20,000 pixels."""
    path = folder_of(folder / "bomb", images(3))
    (path / "0001.png").write_bytes(png(20_000, 20_000, 8, b""))
    return path


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere.npz", r"there is no such folder of images or \.npz file"),
    "no .npz": (plain_array, r"array\.npy is neither a folder of images nor an \.npz file"),
    "another version": (version_3, r"v3\.npz: arr_0 is in format 3\.0 of numpy, 1\.0 and 2\.0 are read"),
    "bomb": (bomb, r"the image \S+0001\.png can't be read: .*decompression bomb"),
    "16-bit colour": (deep_colour, r"0000\.png is of mode RGB of 16 bits: 8-bit grey or RGB images are needed"),
    "float": (save("f.npz", arr_0=images() / 255.0), "arr_0 must be uint8 images from 0 to 255, it is float64"),
    "channels first": (save("c.npz", arr_0=images().transpose(0, 3, 1, 2)), r"arr_0 must be \[N, height, width"),
    "flat": (save("d.npz", arr_0=images().reshape(30, 64)), r"its shape is \(30, 64\)"),
    "another array": (save("a.npz", images=images()), "looked for in the array arr_0, it has images"),
    "pickle": (save("p.npz", arr_0=np.array([{}, None], dtype=object)), "arr_0 must be uint8 .*, it is object"),
    "no images": (save("n.npz", arr_0=images(0)), "holds 0 images: at least 2 are needed"),
    "one image": (save("o.npz", arr_0=images(1)), "holds 1 images: at least 2 are needed"),
    "other size": (save("s.npz", arr_0=images(9, 0, (9, 9, 1))), "of 9x9 with 1 channel, data=digits of 8x8"),
    "colour": (save("r.npz", arr_0=images(9, 0, (8, 8, 3))), "of 8x8 with 3 channels, data=digits of 8x8 with 1"),
    "cut": (cut, r"is damaged or no \.npz file"),
    "flipped": (flipped, r"is damaged or no \.npz file .*CRC"),
    "empty folder": (empty_folder, r"none holds 0 images; some are needed \(\.jpg, "),
    "mixed sizes": (mixed, r"of several kinds: 9999\.png is 9x8 with 1 channel, the first is 8x8"),
    "corrupt image": (corrupt, r"\S+0002\.png is cut short: it has no end-of-image mark"),
    "transparent": (transparent, "is of mode RGBA: 8-bit grey or RGB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_samples_are_one_clear_line(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = FAULTS[fault]
    assert run(tmp_path, str(make(tmp_path)))[0] == 2
    assert re.fullmatch(rf"ddim_lab: .*{words}.*\n", capsys.readouterr().err)


def test_a_folder_may_be_named_as_an_override_is(tmp_path: Path) -> None:
    (tmp_path / "eta=0").mkdir()
    np.savez(tmp_path / "eta=0" / "samples.npz", arr_0=images())
    assert run(tmp_path, str(tmp_path / "eta=0" / "samples.npz"))[0] == 0


def test_faulty_arguments_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--refrence", "x"), "unrecognized arguments"),
        (("x.npz", "steps=0"), "steps=0: must be at least 1"),
        ((), "what is to be scored"),
        (("steps=3",), "what is to be scored"),
        (("a.npz", "b.npz"), r"b\.npz is no OPTION=VALUE: to compare with it, give --reference b\.npz"),
    ):
        assert run(tmp_path, *arguments)[0] == 2
        assert re.fullmatch(rf"ddim_lab: .*{words}.*\n", capsys.readouterr().err)


def test_faulty_statistics_are_named_by_the_option_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "one.npz", arr_0=images())
    np.savez(tmp_path / "s.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    assert run(tmp_path, str(tmp_path / "one.npz"), "--reference", str(tmp_path / "s.npz"))[0] == 2
    assert re.fullmatch(r"ddim_lab: --reference=\S+s\.npz holds NaN .*\n", capsys.readouterr().err)


def test_no_value_that_is_none_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Value(name="kid", value=float("nan"), column="kernel distance")
    monkeypatch.setattr("ddim_lab.metrics.quality.Quality.values", lambda self: {"pixels": [bad]})
    np.savez(tmp_path / "one.npz", arr_0=images())
    assert run(tmp_path, str(tmp_path / "one.npz")) == (1, {})
    assert re.fullmatch(r"ddim_lab: kernel distance is nan: .*\n", capsys.readouterr().err)
