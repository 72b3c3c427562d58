"""Rubbish in every place that a user can fill: one line, an exit status that is not 0, nothing lost, no traceback.

Command lines are in test_cli and test_trust, files of data sets in test_data; here are whole files and folders.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from ddim_lab import score
from ddim_lab.data.base import load_data
from ddim_lab.data.image_folder import ImageFolder
from ddim_lab.data.samples import read_samples

EXACT = ("metrics.features=pixels", "logger=csv", "steps=2")


def refused(
    outputs: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    *,
    status: int | None = None,
) -> None:
    """The command fails (with `status`, if given) with a line that matches, and no more than its log around it."""
    wanted = (1, 2) if status is None else (status,)
    status = tiny.run(outputs, *EXACT, *arguments, settings=tiny.SMALL)
    printed = capsys.readouterr()
    assert status in wanted, printed
    assert re.search(message, printed.err), printed.err
    assert "Traceback" not in printed.err + printed.out
    if status == 2:
        assert len(printed.err.splitlines()) == 1, printed.err
        assert not outputs.exists()
    else:
        assert all(row["status"] == "failed" for row in tiny.results(tiny.sweeps(outputs)[-1]))


# -- folders of images ----------------------------------------------------------------------------------


def png(*shape: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(30_001) * 10)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]


IMAGES = {
    "corrupt": (flipped(png(8, 8)), r"the image \S+/images/05\.png can't be read"),
    "empty": (b"", r"05\.png is cut short"),
    "cut short": (png(8, 8)[:-9], r"05\.png is cut short"),
    "text": (b"this is no image", r"the image \S+/images/05\.png can't be read: it does not begin as an image does"),
    "text with an end": (
        b"this is no image IEND\xaeB`\x82",
        r"the image \S+/images/05\.png can't be read: it does not begin as an image does",
    ),
    "a bomb": (bomb(), r"the image \S+/images/05\.png can't be read: .*decompression bomb"),
    "headers alone": (png(8, 8)[:33] + png(8, 8)[-12:], r"the image \S+/images/05\.png can't be read"),
    "an HTML page": (b"<html>404</html>IEND\xaeB`\x82", r"the image \S+/images/05\.png can't be read"),
    "a pickle": (b"\x80\x04\x95IEND\xaeB`\x82", r"the image \S+/images/05\.png can't be read"),
    "a JPEG": (saved("JPEG"), r"05\.png is a JPEG named \.png: rename it to 05\.jpg"),
    "a GIF": (saved("GIF"), r"05\.png is a GIF named \.png: convert it to PNG"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_folder_with_a_bad_image(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:02d}.png").write_bytes(png(8, 8))
    content, message = IMAGES[kind]
    (folder / "05.png").write_bytes(content)
    data = ("data=image_folder", f"data.root={folder}", "data.image_size=8", "data.channels=1", "model=gaussian")
    refused(tmp_path / "outputs", data, message, capsys, status=2)
    assert len(list(folder.glob("*.png"))) == 8


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: None, r"holds 0 images"),
    "too few": (lambda folder: (folder / "1.png").write_bytes(png(8, 8)), r"holds 1 images; 4 at least are needed"),
    "folders that are called images": (
        lambda folder: [(folder / f"{n}.png").mkdir() for n in range(9)],
        r"holds 0 images",
    ),
    "links to nowhere": (
        lambda folder: [(folder / f"{n}.png").symlink_to(folder / "gone") for n in range(9)],
        r"holds 0 images",
    ),
    "other files": (lambda folder: [(folder / f"{n}.csv").write_text("1,2") for n in range(9)], r"holds 0 images"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_none_of_images(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill, message = FOLDERS[kind]
    (tmp_path / "images").mkdir()
    fill(tmp_path / "images")
    line = ("data=image_folder", f"data.root={tmp_path / 'images'}", "model=gaussian")
    refused(tmp_path / "outputs", line, message, capsys)


def picture(mode: str, number: int = 0) -> Image.Image:
    """Noise of a mode; "P+" has a transparent colour."""
    random = np.random.default_rng(number)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (9, 8), dtype=np.uint16))
    return Image.fromarray(random.integers(0, 256, (9, 8, 3), dtype=np.uint8)).convert(mode.rstrip("+"))


def pictures(folder: Path, mode: str) -> Path:
    folder.mkdir()
    for number in range(8):
        kind = "jpg" if mode == "CMYK" else "png"
        transparent = {"transparency": 0} if mode == "P+" else {}
        picture(mode, number).save(folder / f"{number}.{kind}", **transparent)
    return folder


def scored(path: Path, outputs: Path, *overrides: str) -> int:
    line = ["score", str(path), "metrics.features=pixels", f"outputs_dir={outputs}", *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            score.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_any_kind_of_8_bit_pixels_is_taken(mode: str, tmp_path: Path) -> None:
    """Not rubbish: converted to the channels that were asked for, by both that read images."""
    folder = pictures(tmp_path / "images", mode)
    config = ImageFolder(name="image_folder", root=str(folder), image_size=8, channels=3, held_out=0.5, num_samples=4)
    assert load_data(config).split("all").first(8).shape == (8, 3, 8, 8)
    assert len(read_samples(folder).images.first(8)) == 8


@pytest.mark.parametrize(
    ("mode", "remedy"),
    [("LA", "put it on"), ("RGBA", "put it on"), ("P+", "put it on"), ("I;16", "scale it")],
)
def test_pixels_that_would_be_cut_off_are_refused(
    mode: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By both that read images, in the same words: PIL takes 16 bits for white, and drops what is transparent."""
    folder = pictures(tmp_path / "images", mode)
    line = ("data=image_folder", f"data.root={folder}", "data.image_size=8", "model=gaussian")
    assert tiny.run(tmp_path / "outputs", *EXACT, *line, settings=()) == 2
    shown = {"P+": "P with transparency"}.get(mode, mode)
    said = rf"ddim_lab: {folder}/0.png is of mode {shown}: 8-bit grey or RGB images are needed; {remedy} .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert not (tmp_path / "outputs").exists()
    assert scored(folder, tmp_path / "outputs") == 2
    assert re.fullmatch(said, capsys.readouterr().err)


# -- betas ----------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


BETAS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty": ("betas.txt", lambda path: path.write_text(""), r"betas\.txt is not a list of betas.* it is empty"),
    "words": ("betas.txt", lambda path: path.write_text("one\ntwo\n"), r"betas\.txt"),
    "binary": ("betas.txt", lambda path: path.write_bytes(bytes(range(256))), r"betas\.txt|betas"),
    "NaN": ("betas.txt", lambda path: path.write_text("0.1\nnan\n"), r"betas? .*between 0 and 1|finite|nan"),
    "too large": ("betas.txt", lambda path: path.write_text("0.2\n1.1\n"), r"between 0 and 1"),
    "a matrix": ("betas.npy", lambda path: np.save(path, np.full((3, 3), 0.1)), r"betas\.npy: .* shape \(3, 3\)"),
    "words in an array": ("betas.npy", lambda path: np.save(path, np.array(["a"])), r"betas\.npy is not .* holds <U1"),
    "complex": ("betas.npy", lambda path: np.save(path, np.full(3, 0.1j)), r"betas\.npy is not .* holds complex128"),
    "objects": ("betas.npy", lambda path: np.save(path, np.array([Evil(path.with_name("ran"))])), r"betas\.npy"),
    "no array": ("betas.npy", lambda path: path.write_bytes(b"rubbish"), r"betas\.npy"),
    "a folder": ("betas.txt", lambda path: path.mkdir(), r"betas\.txt"),
}


@pytest.mark.parametrize("kind", BETAS)
def test_a_file_of_betas_that_is_none(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, fill, message = BETAS[kind]
    fill(tmp_path / name)
    line = ("model=gaussian", "schedule=file", f"schedule.path={tmp_path / name}")
    refused(tmp_path / "outputs", line, message, capsys)
    assert not (tmp_path / "ran").exists()


# -- checkpoints ----------------------------------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


def configured(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def weighted(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Evil(folder / "ran")}, folder / "diffusion_pytorch_model.bin")


def old_pickle(folder: Path) -> None:
    """Not torch's format: it warns of the protocol before it refuses."""
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"conv_in.weight": Evil(folder / "ran")}))


def binary(content: Any) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "diffusion_pytorch_model.bin")

    return replace


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"no config\.json of a U-Net there"),
    "a configuration that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json is not JSON",
    ),
    "an empty configuration": (lambda folder: (folder / "config.json").write_bytes(b""), r"config\.json is not JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]"), r"does not hold a configuration"),
    "another architecture": (configured(_class_name="UNet2DConditionModel"), r"is a UNet2DConditionModel"),
    "classes": (configured(num_class_embeds=10), r"lacks 1 of the tensors, class_embedding.weight first"),
    "no classes": (configured(num_class_embeds="ten"), r"num_class_embeds='ten' is no number of classes"),
    "other images": (configured(sample_size=32), r"is for images of 1x32x32, data=digits has 1x8x8"),
    "other channels": (configured(in_channels=3), r"is for images of 3x8x8"),
    "a variance": (configured(out_channels=2), r"does not fit"),
    "channels of nothing": (configured(out_channels=5), r"gives 5 channels for 1: as many are needed, or twice"),
    "an unknown block": (configured(down_block_types=["Down", "Up"]), r"."),
    "other widths": (configured(block_out_channels=[16, 16]), r"does not fit"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"holds no weights"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"can't be read|does not fit"),
    "weights cut short": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
        r"can't be read|does not fit",
    ),
    "weights that are none": (lambda folder: (folder / WEIGHTS).write_text("weights"), r"can't be read|does not fit"),
    "a missing tensor": (weighted(lambda tensors: tensors.pop("conv_in.weight")), r"lacks 1 of the tensors"),
    "a tensor too many": (
        weighted(lambda tensors: tensors.update(more=torch.zeros(1))),
        r"holds, beside what is",
    ),
    "NaN": (weighted(lambda tensors: tensors["conv_in.weight"].fill_(float("nan"))), r"NaN or infinite weights"),
    "another shape": (
        weighted(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(9)})),
        r"does not fit",
    ),
    "a pickle": (pickled, r"can't be read: it is damaged, cut short, or holds more than tensors"),
    "an old pickle": (old_pickle, r"can't be read: it is damaged, cut short, or holds more than tensors"),
    "a list of numbers": (binary([1, 2]), r"\.bin holds a list: tensors by name are needed"),
    "a word for a tensor": (binary({"conv_in.weight": "x"}), r"can't be read: it is .* holds more than tensors"),
    "quantised weights": (
        weighted(lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()})),
        r"safetensors: conv_in\.bias is not of floating point: quantised weights are not supported",
    ),
    "quantised weights in .bin": (binary({"b": torch.ones(3, dtype=torch.int8)}), r"\.bin: b is not of floating point"),
    "a word for a size": (configured(sample_size="x"), r"config\.json: sample_size='x' is neither a size nor"),
    "half a size": (configured(sample_size=[8]), r"config\.json: sample_size=\[8\] is neither a size nor"),
    "a word for widths": (configured(block_out_channels="x"), r"does not fit"),
    "no layers": (configured(layers_per_block=None), r"does not fit"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(
    kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    harm, message = CHECKPOINTS[kind]
    harm(folder)
    refused(tmp_path / "outputs", ("model=pretrained", f"model.path={folder}"), message, capsys)
    assert not (folder / "ran").exists()


# -- files of configuration -----------------------------------------------------------------------------

STUDIES = {
    "no YAML": "steps: [1, 2\n",
    "tabs": "steps:\n\t- 1\n",
    "binary": "\x00\x01\x02",
    "a list": "- 1\n- 2\n",
    "a word": "rubbish\n",
    "an unknown option": "stepps: 10\n",
    "an unknown choice": "defaults:\n  - override /sampler: nothing\n",
    "a choice of nothing": "defaults:\n  - override /nothing: ddim\n",
    "the same key twice": "steps: 1\nsteps: 2\n",
    "a value of another kind": "steps: {a: 1}\n",
    "a number that is too large": "steps: 99999999999999999999999\n",
    "itself": "steps: ${steps}\n",
    "a reference to nothing": "steps: ${nothing}\n",
    "a resolver that is not there": "steps: ${nothing:1}\n",
    "an environment that is not there": "steps: ${oc.env:NOT_SET_ANYWHERE}\n",
    "a date": "steps: 2026-01-01\n",
    "nothing for something": "steps: null\n",
}


@pytest.mark.parametrize("kind", STUDIES)
def test_a_study_that_is_none(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "conf" / "experiments" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\n" + STUDIES[kind], encoding="utf-8")
    line = ("--config-dir", str(tmp_path / "conf"), "+experiments=mine", "model=gaussian")
    refused_without_steps(tmp_path / "outputs", line, capsys)


def refused_without_steps(outputs: Path, line: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = tiny.run(outputs, "metrics.features=pixels", "logger=csv", *line)
    printed = capsys.readouterr()
    assert status == 2, printed
    assert re.fullmatch(r"ddim_lab: .+\n", printed.err), printed.err
    assert not outputs.exists()
