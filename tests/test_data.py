"""Data: read as published, prepared as in the paper, identified by content; what is missing or damaged is one line."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CelebA, FashionMNIST
from torchvision.transforms import functional

from ddim_lab.config.data import DATA
from ddim_lab.config.folders import config_folder
from ddim_lab.config.job import Config
from ddim_lab.config.model import UNetConfig
from ddim_lab.data import base, disk, fashion_mnist
from ddim_lab.data.base import DataSet, check_data, load_data
from ddim_lab.data.decoding import decode
from ddim_lab.data.files import image_files
from ddim_lab.data.image_folder import ImageFolder
from ddim_lab.data.images import DiskImages, ImageData, JoinedImages, MemoryImages, from_uint8, to_uint8
from ddim_lab.data.loaders import TrainingBatches
from ddim_lab.data.samples import read_samples
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError
from ddim_lab.models.obtain import _moments, obtain_model
from ddim_lab.store import Store, read_json

RANDOM = np.random.default_rng(0)


def configure(*overrides: str) -> Config:
    return tiny.configure("metrics.features=pixels", *overrides)


def load(name: str, root: Path, *overrides: str) -> ImageData:
    return load_data(configure(f"data={name}", f"data.root={root}", *overrides).data)


def check(name: str, root: Path | None, *overrides: str) -> None:
    where = [] if root is None else [f"data.root={root}"]
    check_data(configure(f"data={name}", *where, *overrides).data)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


# -- every data set -------------------------------------------------------------------------------------

SETS = DATA.ours()


def test_every_data_set_has_its_file_of_options_and_every_file_its_data_set() -> None:
    files = {file.stem for file in (config_folder() / "data").glob("*.yaml")}
    assert set(SETS) == files
    assert {"digits", "lsun_church", "image_folder"} <= files
    assert all(issubclass(each, DataSet) for each in SETS.values())


@pytest.mark.parametrize("name", SETS)
def test_a_data_sets_options_are_those_of_its_file(name: str) -> None:
    written = OmegaConf.to_container(OmegaConf.load(config_folder() / "data" / f"{name}.yaml"))
    assert isinstance(written, dict)
    assert set(SETS[name].model_fields) == set(written)
    config = configure(f"data={name}", "data.root=somewhere")
    assert type(config.data) is SETS[name]
    features = written["features"]
    several = {"features": tuple(features)} if isinstance(features, list) else {}
    assert config.data.model_dump() == {**written, **several, "root": "somewhere"}
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert len(config.data.shape) == 3


def test_options_of_a_data_set_are_checked_as_its_own() -> None:
    for override, words in (
        ("data.root=''", r"data\.root is empty: .*"),
        ("data.num_samples=0", r"data\.num_samples=0: must be at least 1"),
        ("+data.size=3", r"data\.size: no such option"),
        ("~data.name", r"data=None: must be the name of a choice, as a file of conf/data has it"),
        ("data.name=digit", r"data=digit: there is no such data"),
        ("data.name=lsun", r"data=lsun: there is no such data"),
    ):
        with pytest.raises(ConfigError) as refused:
            configure(override)
        assert re.fullmatch(words, str(refused.value))


def test_digits_are_what_scikit_learn_reads_and_splits() -> None:
    """Read and split without importing it, as models in stores were trained on them."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from ddim_lab.data.digits import _read, _stratified_split

    pixels, labels = load_digits(return_X_y=True)
    ours, classes = _read()
    assert ours.dtype == pixels.dtype
    np.testing.assert_array_equal(ours, pixels)
    np.testing.assert_array_equal(classes, labels)
    for held_out in (360, 359, 100, 1000):
        theirs = train_test_split(range(len(labels)), test_size=held_out, stratify=labels, random_state=0)
        for numbers, expected in zip(_stratified_split(classes, held_out), theirs, strict=True):
            assert numbers.tolist() == expected


def test_data_sets_are_found_and_checked_without_torch() -> None:
    script = f"from ddim_lab.config.data import DATA; [DATA.find(name) for name in {list(SETS)}]"
    line = [sys.executable, "-c", f"{script}; import sys; print(*sys.modules)"]
    modules = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    assert set(SETS) <= {module.rpartition(".")[2] for module in modules}
    assert not {"torch", "torchvision", "sklearn", "PIL", "lmdb"} & set(modules)


# -- the conversion and the sets ------------------------------------------------------------------------


def test_every_level_survives_the_way_to_the_model_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels).aminmax() == (-1.0, 1.0)
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.0039, 1.0, 7.0])).tolist() == [0, 0, 128, 128, 255, 255]
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_images_on_disk_are_decoded_only_when_asked_for_and_joined_sets_are_one() -> None:
    images = torch.from_numpy(pixels(10, 1, 3, 3))
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return images[int(name)]

    disk = DiskImages([str(i) for i in range(6)], torch.arange(6), (1, 3, 3), read, "content")
    joined = JoinedImages(disk, MemoryImages(images[6:], torch.arange(6, 10)))
    assert (len(disk), len(joined), joined.shape) == (6, 10, (1, 3, 3))
    assert asked == []
    assert torch.equal(joined.batch(torch.tensor([7, 2, 9, 0])), images[[7, 2, 9, 0]])
    assert asked == ["2", "0"]
    assert torch.equal(torch.cat(list(joined.batches(4))), images)
    assert [len(part) for part in joined.batches(4)] == [4, 4, 2]
    assert torch.equal(torch.cat(list(joined.batches(4, 5))), images[:5])
    assert torch.equal(joined.first(3), images[:3])
    assert joined[8]["labels"] == 8


def test_flips_are_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise the network sees each image or its mirror image, about half and half; references see the images."""
    from ddim_lab.models.training import DiffusionModule

    images = torch.from_numpy(pixels(200, 1, 4, 4))
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            seen.append(x_t)
            return x_t

    monkeypatch.setattr(torch, "randn", torch.zeros)
    for flip in (True, False):
        config = configure(f"training.random_flip={str(flip).lower()}", "schedule=constant", "schedule.beta_end=1e-7")
        module = DiffusionModule(Spy(), config.build_schedule(), config.training)
        module.training_step({"images": images}, 0)
        shown = to_uint8(seen.pop())
        as_is = (shown == images).flatten(1).all(1)
        assert bool((as_is | (shown == images.flip(-1)).flatten(1).all(1)).all())
        assert (60 < int(as_is.sum()) < 140) if flip else bool(as_is.all())


# -- Fashion-MNIST --------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[np.ndarray]]:
    """A folder in the format of Fashion-MNIST, with few images, whose digests stand for the published ones."""
    root = tmp_path / "fashion"
    root.mkdir()
    arrays = [pixels(40, 28, 28), pixels(40) % 10, pixels(8, 28, 28), pixels(8) % 10]
    for name, array in zip(fashion_mnist.FILES, arrays, strict=True):
        (root / name).write_bytes(gzip.compress(idx(array)))
        monkeypatch.setitem(fashion_mnist.CONTENT, name, hashlib.sha256(idx(array)).hexdigest())
    return root, arrays


def test_fashion_mnist_is_padded_with_zeros_and_nothing_else(fashion: tuple[Path, list[np.ndarray]]) -> None:
    root, (train, train_labels, test, test_labels) = fashion
    data = load("fashion_mnist", root)
    for split, images, labels in ((data.train, train, train_labels), (data.held_out, test, test_labels)):
        stored = split.first(100)[:, 0].numpy()
        assert np.array_equal(stored, np.pad(images, ((0, 0), (2, 2), (2, 2))))
        assert split.labels.tolist() == labels.tolist()
    assert data.shape == configure("data=fashion_mnist").data.shape
    assert torch.equal(data.split("all").first(100), torch.cat([data.train.first(100), data.held_out.first(100)]))


def test_the_digest_is_of_content_not_of_place(
    fashion: tuple[Path, list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, arrays = fashion
    before = load("fashion_mnist", root).digest
    other = tmp_path / "elsewhere" / "FashionMNIST" / "raw"  # torchvision's layout
    shutil.copytree(root, other)
    assert load("fashion_mnist", tmp_path / "elsewhere").digest == before
    digests = {before}
    for position, name in enumerate(fashion_mnist.FILES):  # one pixel or one label more
        changed = arrays[position].copy()
        changed.flat[5] = (changed.flat[5] + 1) % 10
        (other / name).write_bytes(gzip.compress(idx(changed)))
        monkeypatch.setitem(fashion_mnist.CONTENT, name, hashlib.sha256(idx(changed)).hexdigest())
        digests.add(load("fashion_mnist", tmp_path / "elsewhere").digest)
    assert len(digests) == 5


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _corrupt(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", fashion_mnist.FILES)
@pytest.mark.parametrize("damage", [_cut, _corrupt])
def test_a_damaged_idx_file_is_named(
    damage: Callable[[Path], None], name: str, fashion: tuple[Path, list[np.ndarray]]
) -> None:
    root, _ = fashion
    damage(root / name)
    with pytest.raises(ConfigError, match=rf"{root / name} is damaged \(.*\): download it again"):
        check("fashion_mnist", root)


@pytest.mark.parametrize("name", fashion_mnist.FILES)
def test_another_sets_file_of_the_same_name_is_refused(name: str, fashion: tuple[Path, list[np.ndarray]]) -> None:
    """As MNIST's, which has as many images of the same size."""
    root, arrays = fashion
    other = arrays[fashion_mnist.FILES.index(name)][::-1]
    (root / name).write_bytes(gzip.compress(idx(other)))
    with pytest.raises(ConfigError, match=rf"{root / name} is whole, but not Fashion-MNIST's: .*; set data\.root to "):
        check("fashion_mnist", root)


def test_fashion_mnist_may_be_compressed_in_any_way(fashion: tuple[Path, list[np.ndarray]]) -> None:
    root, _ = fashion
    for name in fashion_mnist.FILES:
        content = gzip.decompress((root / name).read_bytes())
        (root / name).write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
    check("fashion_mnist", root)
    (root / fashion_mnist.FILES[0]).unlink()
    with pytest.raises(ConfigError, match=rf"{fashion_mnist.FILES[0]} is missing beside {fashion_mnist.FILES[1]}"):
        check("fashion_mnist", root)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, no Debian package, an empty download folder."""

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("DDIM_LAB_DATA", str(tmp_path / "downloads"))
    return tmp_path


def test_fashion_mnist_offline_says_what_where_and_how(offline: Path) -> None:
    place = offline / "downloads" / "fashion_mnist"
    with pytest.raises(
        ConfigError,
        match=rf"^data=fashion_mnist is not in {place}, and the download failed \(.*no route to host.*\): "
        rf"\(nor in .*{offline / 'debian'}\) apt-get install dataset-fashion-mnist, or set data.root to .*$",
    ):
        check("fashion_mnist", None)


def test_debians_package_is_found_by_default(fashion: tuple[Path, list[np.ndarray]], offline: Path) -> None:
    root, arrays = fashion
    shutil.copytree(root, offline / "debian")
    data = load_data(configure("data=fashion_mnist").data)
    assert data.train.labels.tolist() == arrays[1].tolist()


def test_half_a_download_is_not_taken_for_a_whole_one(
    fashion: tuple[Path, list[np.ndarray]], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the third file, then again with a network: the first attempt's rest is never read as data."""
    root, arrays = fashion
    resources = [(name, hashlib.md5((root / name).read_bytes()).hexdigest()) for name in fashion_mnist.FILES]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", resources)
    fetched: list[str] = []

    def fetch(url: str, target: Any, **_: Any) -> None:
        name = Path(target).name
        fetched.append(name)
        content = (root / name).read_bytes()
        Path(target).write_bytes(content[: len(content) // 2] if len(fetched) == 3 else content)
        if len(fetched) == 3:
            raise URLError("the line went dead")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    with pytest.raises(ConfigError, match="the line went dead"):
        check("fashion_mnist", None)
    assert not list((offline / "downloads" / "fashion_mnist").glob("*.gz"))
    data = load_data(configure("data=fashion_mnist").data)
    assert data.train.labels.tolist() == arrays[1].tolist()
    assert fetched == [
        *fashion_mnist.FILES[:3],
        *fashion_mnist.FILES[2:],
    ]  # those that were whole are not fetched twice


def test_files_that_another_process_is_moving_in_are_waited_for(
    fashion: tuple[Path, list[np.ndarray]], offline: Path
) -> None:
    root, _ = fashion
    place = offline / "downloads" / "fashion_mnist"
    place.mkdir(parents=True)
    for name in fashion_mnist.FILES[:2]:
        shutil.copy(root / name, place)
    locked = threading.Event()

    def other() -> None:
        with FileLock(place / ".download.lock"):
            locked.set()
            time.sleep(0.5)
            for name in fashion_mnist.FILES[2:]:
                shutil.copy(root / name, place)

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait()
    check("fashion_mnist", None)
    thread.join()


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    data = load("fashion_mnist", fashion_mnist.DEBIAN_FOLDER)
    assert (len(data.train), len(data.held_out), data.num_classes) == (60000, 10000, 10)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    mean = torch.stack([part[:, :, 2:30, 2:30].double().mean() for part in data.train.batches(6000)]).mean() / 255
    assert float(mean) == pytest.approx(0.2860, abs=1e-4)  # published with the data set


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_content_we_compare_with_is_that_of_the_files_whose_md5_is_published() -> None:
    """Debian's .gz files lack name and time in their headers; with them they are the published ones, byte for byte."""
    written = {"train": 1504176606, "t10k": 1504176627}
    for name, md5 in FashionMNIST.resources:
        content = (fashion_mnist.DEBIAN_FOLDER / name).read_bytes()
        header = struct.pack("<4BI2B", 0x1F, 0x8B, 8, 8, written[name[:5].rstrip("-")], 0, 3)
        whole = header + name.removesuffix(".gz").encode() + b"\0" + content[10:]
        assert hashlib.md5(whole).hexdigest() == md5
        assert hashlib.sha256(gzip.decompress(whole)).hexdigest() == fashion_mnist.CONTENT[name]


# -- CIFAR-10 -------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the format of CIFAR-10 with few images, and its checksums as the published ones."""
    root = tmp_path / "cifar"
    (root / CIFAR10.base_folder).mkdir(parents=True)

    def store(name: str, content: dict[str, Any]) -> list[str]:
        file = root / CIFAR10.base_folder / name
        file.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(file.read_bytes()).hexdigest()]

    def batch() -> dict[str, Any]:
        return {"data": pixels(6, 3072), "labels": (pixels(6) % 10).tolist()}

    monkeypatch.setattr(CIFAR10, "train_list", [store(name, batch()) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [store(name, batch()) for name, _ in CIFAR10.test_list])
    _, md5 = store(CIFAR10.meta["filename"], {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    return root


def test_cifar10_is_as_published(cifar: Path) -> None:
    """Rows of 3,072: 1,024 red, then green, then blue, row by row."""
    data = load("cifar10", cifar)
    with (cifar / CIFAR10.base_folder / "data_batch_2").open("rb") as file:
        second = pickle.load(file)
    assert (len(data.train), len(data.held_out)) == (30, 6)
    assert np.array_equal(data.train.first(12)[6:].numpy().reshape(6, 3072), second["data"])
    assert data.train.labels[6:12].tolist() == second["labels"]


def test_a_damaged_or_missing_cifar10_file_is_named(cifar: Path) -> None:
    file = cifar / CIFAR10.base_folder / "data_batch_3"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=rf"data=cifar10: {file} is damaged or cut short .*MD5"):
        check("cifar10", cifar)
    file.unlink()
    with pytest.raises(ConfigError, match=rf"data=cifar10: {file} is missing; unpack cifar-10-python.tar.gz"):
        check("cifar10", cifar)
    file.write_bytes(content)
    check("cifar10", cifar)


def test_cifar10_offline_says_what_where_and_how(offline: Path) -> None:
    place = offline / "downloads" / "cifar10"
    expected = (
        rf"^data=cifar10 is not in {place}, and the download failed \(.*no route to host.*\): unpack .* data.root$"
    )
    with pytest.raises(ConfigError, match=expected):
        check("cifar10", None)


# -- CelebA ---------------------------------------------------------------------------------------------


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


@pytest.fixture
def faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in CelebA's layout: 178x218 images whose red is x and green is y; 8, 2 and 2 of the three parts."""
    root = tmp_path / "faces"
    (root / "celeba" / "img_align_celeba").mkdir(parents=True)
    y, x = np.mgrid[0:218, 0:178]
    lines = []
    for number in range(1, 13):
        image = np.stack([x, y, np.full_like(x, 20 * number)], axis=-1).astype(np.uint8)
        name = f"{number:06d}.jpg"
        (root / "celeba" / "img_align_celeba" / name).write_bytes(jpeg(image))
        lines.append(f"{name} {0 if number <= 8 else 1 if number <= 10 else 2}")
    partition = root / "celeba" / "list_eval_partition.txt"
    partition.write_text("\n".join(lines) + "\n")
    md5 = hashlib.md5(partition.read_bytes()).hexdigest()
    monkeypatch.setattr(CelebA, "file_list", [("", md5, partition.name)])
    return root


def test_celeba_is_cropped_as_in_the_paper(faces: Path) -> None:
    """Pixel (row i, column j) averages x over 25 + 2j, 26 + 2j and y over 57 + 2i, 58 + 2i."""
    data = load("celeba", faces)
    assert (len(data.train), len(data.held_out), data.shape) == (8, 4, (3, 64, 64))
    assert isinstance(data.train, DiskImages)
    images = data.train.first(8).double()
    center = torch.arange(64) * 2 + 0.5
    inner = slice(1, 63)  # the filter reaches over the border of the crop
    assert float((images[:, 0] - (25 + center)[None, None, :])[:, inner, inner].abs().max()) < 2.0
    assert float((images[:, 1] - (57 + center)[None, :, None])[:, inner, inner].abs().max()) < 2.0
    assert torch.allclose(images[:, 2].mean((1, 2)), 20.0 * torch.arange(1, 9).double(), atol=1.5)
    with Image.open(faces / "celeba" / "img_align_celeba" / "000003.jpg") as image:
        official = functional.resize(functional.crop(image, 121 - 64, 89 - 64, 128, 128), 64)
        assert np.array_equal(data.train.first(3)[2].permute(1, 2, 0).numpy(), np.array(official))


def test_celeba_that_is_not_whole_is_refused(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data=celeba is not in {tmp_path}: put there list_eval_partition.txt and "):
        check("celeba", tmp_path)
    third = faces / "celeba" / "img_align_celeba" / "000003.jpg"
    content = third.read_bytes()
    third.unlink()
    with pytest.raises(ConfigError, match=rf"data=celeba: 1 of 12 images are missing, {third} first"):
        check("celeba", faces)
    third.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=rf"{third} is cut short"):
        load("celeba", faces)
    with (faces / "celeba" / "list_eval_partition.txt").open("a") as file:
        file.write("000013.jpg 0\n")
    with pytest.raises(ConfigError, match=r"list_eval_partition.txt is damaged or cut short"):
        check("celeba", faces)


# -- LSUN -----------------------------------------------------------------------------------------------


def lsun(root: Path, category: str) -> Path:
    """Databases in LSUN's format: JPEG (JPEG 2000's place is not ours) of 256 on the shorter side, by 40-digit key."""
    lmdb = pytest.importorskip("lmdb")
    for split, count in (("train", 5), ("val", 3)):
        folder = root / f"{category}_{split}_lmdb"
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
            for number in range(count):
                y, x = np.mgrid[0:256, 0:341]
                image = np.stack([x % 256, y, np.full_like(x, 50 * number)], axis=-1).astype(np.uint8)
                transaction.put(f"{number:040x}".encode(), jpeg(image))
    return root


@pytest.mark.parametrize(("name", "category"), [("lsun_bedroom", "bedroom"), ("lsun_church", "church_outdoor")])
def test_lsun_is_the_central_square(name: str, category: str, tmp_path: Path) -> None:
    data = load(name, lsun(tmp_path, category))
    assert (len(data.train), len(data.held_out), data.shape) == (5, 3, (3, 256, 256))
    images = data.train.first(5).double()
    columns = torch.arange(256) + 42  # (341 - 256) / 2, rounded to even
    smooth = columns < 250
    assert float((images[:, 0] - columns)[:, :, smooth].abs().max()) < 4.0
    assert float((images[:, 1] - torch.arange(256)[:, None])[:, 4:-4, smooth].abs().max()) < 4.0
    assert torch.allclose(images[:, 2].mean((1, 2)), 50.0 * torch.arange(5).double(), atol=1.5)


def test_lsun_that_is_missing_or_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bedroom_train_lmdb" / "data.mdb"
    with pytest.raises(ConfigError, match=rf"data=lsun_bedroom: {file} is missing: get bedroom_train_lmdb.zip and "):
        check("lsun_bedroom", tmp_path)
    lsun(tmp_path, "bedroom")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 4096 // 2 * 4096])
    with pytest.raises(ConfigError, match=rf"{file} is cut short \(\d+ of \d+ bytes\)"):
        check("lsun_bedroom", tmp_path)


# -- any folder -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of PNG files, 12x16 and 8x8."""
    root = tmp_path / "images"
    for number in range(24):
        kind = root / ("cats" if number % 3 else "ants")
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(*((12, 16, 3) if number % 2 else (8, 8, 3)))).save(kind / f"{number:02d}.png")
    return root


def image_folder(root: Path, *overrides: str) -> ImageData:
    return load("image_folder", root, "data.image_size=8", "model.block_out_channels=[32,32,32,32]", *overrides)


def test_a_folder_of_images(folder: Path) -> None:
    data = image_folder(folder, "data.held_out=0.25")
    assert (len(data.train), len(data.held_out), data.num_classes) == (18, 6, 2)
    files = sorted(folder.rglob("*.png"))
    everything = {}
    for file in files:
        with Image.open(file) as image:
            resized = functional.center_crop(functional.resize(image, 8), [8, 8])
            everything[np.array(resized).tobytes()] = int(file.parent.name == "cats")
    both = data.split("all")
    labelled = zip(both.first(24), both.labels, strict=True)
    found = {image.permute(1, 2, 0).numpy().tobytes(): int(label) for image, label in labelled}
    assert found == everything
    assert image_folder(folder, "data.channels=1").shape == (1, 8, 8)


def test_the_digest_of_a_folder_is_read_once_and_follows_the_content(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads: list[str] = []
    original = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        reads.append(file.name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    before = image_folder(folder).digest
    assert len(reads) == 24
    base._load.cache_clear()
    assert image_folder(folder).digest == before
    assert len(reads) == 24
    file = next(folder.rglob("*.png"))
    os.utime(file, ns=(0, 0))  # another time, the same content
    assert image_folder(folder).digest == before
    assert len(reads) == 48
    shutil.copytree(folder, tmp_path / "moved")
    assert image_folder(tmp_path / "moved").digest == before
    digests = {before, image_folder(folder, "data.held_out=0.3").digest, image_folder(folder, "data.channels=1").digest}
    Image.fromarray(pixels(8, 8, 3)).save(file)
    digests.add(image_folder(folder).digest)
    file.rename(file.with_name("renamed.png"))
    digests.add(image_folder(folder).digest)
    assert len(digests) == 5


def test_a_digest_that_cannot_be_kept_is_only_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(disk, "write_record", refuse)
    with caplog.at_level(logging.WARNING, "ddim_lab"):
        digest = image_folder(folder).digest
    assert "the data will be read whole for their digest every time" in caplog.text
    monkeypatch.undo()
    base._load.cache_clear()
    assert image_folder(folder).digest == digest


def test_jpeg_references_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ddim_lab"):
        image_folder(folder)
        assert "JPEG" not in caplog.text
        (folder / "one.jpg").write_bytes(jpeg(pixels(9, 9, 3)))
        image_folder(folder)
    assert f"1 of the 25 images in {folder} are JPEG" in caplog.text


@pytest.mark.parametrize("name", ["photo.jpg", "photo.jpeg", "photo.png"])
def test_an_image_cut_short_is_named_before_any_training(name: str, folder: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels(40, 40, 3)).save(buffer, "PNG" if name.endswith("png") else "JPEG")
    (folder / name).write_bytes(buffer.getvalue()[:-10])
    with pytest.raises(ConfigError, match=rf"{folder / name} is cut short"):
        image_folder(folder)


def test_what_is_no_image_is_named(folder: Path) -> None:
    file = folder / "cats" / "01.png"
    file.write_bytes(b"no image IEND\xaeB`\x82")
    with pytest.raises(ConfigError, match=rf"the image {file} can't be read"):
        check("image_folder", folder, "data.image_size=8", "model.block_out_channels=[32,32,32,32]")


def of_folder(root: Path) -> ImageData:
    """As `image_folder`, without Hydra, which takes a tenth of a second."""
    return load_data(
        ImageFolder(name="image_folder", root=str(root), image_size=8, channels=3, held_out=0.1, num_samples=4)
    )


def taken(root: Path) -> set[str]:
    """The images of a folder by both that take one: they must be the same."""
    files = image_files(root)
    scored = read_samples(root)
    assert len(of_folder(root).split("all")) == len(scored.images) == len(files.files)
    assert of_folder(root).files == scored.files == str(files)
    return {file.relative_to(root).as_posix() for file in files.files}


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Two classes of 20 PNG files of one size, each a folder elsewhere."""
    for kind in ("ants", "cats"):
        (tmp_path / "elsewhere" / kind).mkdir(parents=True)
        for number in range(20):
            Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "elsewhere" / kind / f"{number:03d}.png")
    (tmp_path / "squares").mkdir()
    return tmp_path / "squares"


@pytest.mark.parametrize("linked", ["one class", "all classes", "the folder", "every file"])
def test_links_are_followed(linked: str, squares: Path) -> None:
    elsewhere = squares.with_name("elsewhere")
    if linked == "the folder":
        squares.rmdir()
        squares.symlink_to(elsewhere, target_is_directory=True)
    for kind in ("ants", "cats"):
        if linked == "all classes" or (linked, kind) == ("one class", "cats"):
            (squares / kind).symlink_to(elsewhere / kind, target_is_directory=True)
        elif linked == "one class":
            shutil.copytree(elsewhere / kind, squares / kind)
        elif linked == "every file":
            (squares / kind).mkdir()
            for file in (elsewhere / kind).iterdir():
                (squares / kind / file.name).symlink_to(file)
    assert taken(squares) == {f"{kind}/{number:03d}.png" for kind in ("ants", "cats") for number in range(20)}
    assert of_folder(squares).num_classes == 2
    assert str(image_files(squares)) == "40 images"
    assert of_folder(squares).digest == of_folder(elsewhere).digest


def test_what_is_passed_over_is_counted_and_named(squares: Path) -> None:
    kept = {file.relative_to(squares.with_name("elsewhere")) for file in squares.with_name("elsewhere").rglob("*.png")}
    shutil.copytree(squares.with_name("elsewhere"), squares, dirs_exist_ok=True)
    shutil.copytree(squares / "cats", squares / ".ipynb_checkpoints")
    shutil.copytree(squares / "cats", squares / "cats" / ".ipynb_checkpoints")
    (squares / "ants" / "._000.png").write_bytes(b"\0\5\x16\7")  # AppleDouble
    (squares / "ants" / "gone.png").symlink_to(squares / "nowhere.png")
    (squares / "ants" / "circle.png").symlink_to(squares / "ants" / "circle.png")
    (squares / "ants" / "again").symlink_to(squares, target_is_directory=True)
    (squares / "ants" / "same.png").symlink_to(squares / "cats" / "000.png")
    for name in ("labels.csv", "Thumbs.db", "notes.txt", "photo.tiff"):
        (squares / "cats" / name).write_text("no image")
    os.mkfifo(squares / "cats" / "fifo.png")
    assert taken(squares) == {*map(str, kept), "ants/same.png"}
    assert str(image_files(squares)) == (
        "41 images, 1 of them other names of the same files; passed over:"
        " 3 hidden (.ipynb_checkpoints, ants/._000.png, cats/.ipynb_checkpoints),"
        " 1 leading back to a folder around it (ants/again), 2 leading nowhere (ants/circle.png, ants/gone.png),"
        " 5 no image (cats/Thumbs.db, cats/fifo.png, cats/labels.csv, ...)"
    )
    assert of_folder(squares).num_classes == 2


def test_every_kind_of_image_counts_for_both(squares: Path) -> None:
    names = {"0.bmp", "1.BMP", "2.webp", "3.jpg", "4.JPEG", "5.Png"}
    for name in names:
        Image.fromarray(pixels(8, 8, 3)).save(squares / name)
    assert taken(squares) == names


def test_a_folder_that_can_not_be_read_is_not_passed_over(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (squares / "locked").mkdir()
    shutil.copytree(squares.with_name("elsewhere"), squares, dirs_exist_ok=True)
    listed = Path.iterdir

    def refuse(folder: Path) -> Any:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for take in (of_folder, read_samples):
        with pytest.raises(ConfigError, match=rf"^{squares}/locked can't be read: Permission denied$"):
            take(squares)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/0.png", "café.png".encode(), b"two\nlines.png"])
def test_names_that_are_not_utf8_are_names(name: bytes, squares: Path) -> None:
    shutil.copytree(squares.with_name("elsewhere") / "cats", squares / "cats")
    file = Path(os.fsdecode(os.fsencode(squares) + b"/" + name))
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 7, dtype=np.uint8)).save(file)
    assert len(taken(squares)) == 21
    data = of_folder(squares)
    assert len(data.digest) == 64
    assert sum(int((image == 7).all()) for image in data.split("all").first(21)) == 1
    batches = TrainingBatches(data.train, 4, 0).train_dataloader()  # by worker processes
    assert next(iter(batches))["images"].shape == (4, 3, 8, 8)
    file.write_bytes(b"")
    for take in (of_folder, read_samples):
        with pytest.raises(ConfigError, match="is cut short: it is empty"):
            take(squares)


def test_names_that_are_not_utf8_are_shown(squares: Path) -> None:
    shutil.copytree(squares.with_name("elsewhere") / "cats", squares / "cats")
    Path(os.fsdecode(os.fsencode(squares) + b"/caf\xe9.txt")).touch()
    assert str(image_files(squares)) == r"20 images; passed over: 1 no image (caf\xe9.txt)"


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels(40, 40, 3))
    if kind == "MPO":
        image.save(buffer, "MPO", save_all=True, append_images=[image, image])
    elif kind == "a JPEG with a thumbnail":
        image.save(buffer, "JPEG", exif=b"Exif\0\0" + jpeg(pixels(8, 8, 3)))
    else:
        settings = {"progressive JPEG": {"progressive": True}, "JPEG with restarts": {"restart_marker_rows": 1}}
        image.save(
            buffer, kind.split()[-1] if kind == "progressive JPEG" else kind.split()[0], **settings.get(kind, {})
        )
    return buffer.getvalue()


KINDS = {
    **dict.fromkeys(["JPEG", "JPEG in scans", "JPEG with restarts", "a JPEG with a thumbnail", "MPO"], ".jpg"),
    **{"PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_after_the_end_are_fine_and_a_missing_end_is_not(kind: str, squares: Path) -> None:
    """A phone's motion photo is a JPEG with a video behind it. By all readers: a folder to train on, a score, LSUN."""
    shutil.copytree(squares.with_name("elsewhere") / "cats", squares / "cats")
    for old in (squares / "cats").iterdir():  # of one size with the others
        Image.fromarray(pixels(40, 40, 3)).save(old)
    file, content = squares / f"photo{KINDS[kind]}", encoded(kind)
    for more in (b"", b"\0", b"ftyp" + bytes(20_000), b"\xff\xd8\xff" + bytes(9)):
        file.write_bytes(content + more)
        assert f"photo{KINDS[kind]}" in taken(squares)
        assert decode(io.BytesIO(content + more), "1f").size == (40, 40)

    def scored(root: Path) -> Tensor:
        return read_samples(root).images.first(21)

    def from_a_database(root: Path) -> Image.Image:
        return decode(io.BytesIO(file.read_bytes()), file)

    first = content[: content.find(b"\xff\xd9\xff\xd8") + 2] if kind == "MPO" else content
    for cut in (1, 2, 5, 13):
        file.write_bytes(first[:-cut])
        for read in (of_folder, scored, from_a_database):
            with pytest.raises(ConfigError, match=rf"{file} (is cut short: it has no|can't be read)"):
                read(squares)


# -- the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data=celeba", r"data=celeba is not in \S+celeba: put there .*"),
        ("data=lsun_church", r"data=lsun_church: \S+data.mdb is missing: .*"),
        ("data=image_folder data.root=nowhere", r"data.root=nowhere: there is no such folder of images"),
        ("data=image_folder", r"data.root is not set: give data.root=..."),
        ("data=cifar10", r"data=cifar10 is not in \S+cifar10, and the download failed .*"),
        ("data=fashion_mnist", r"data=fashion_mnist is not in .*"),
        ("data=celeba metrics.features=classifier", r"metrics.features=classifier learns from labels, .* has none"),
        ("data=digits model=celeba", r"data=digits has images of 8x8, which can't be halved 4 times: .*"),
    ],
)
def test_data_that_are_not_there_are_one_line_and_status_2(
    line: str, message: str, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny.SMALL, *(["metrics.features=pixels"] if "metrics" not in line else [])]
    assert tiny.run(offline / "outputs", *line.split(), settings=settings) == 2
    assert re.fullmatch(rf"ddim_lab: {message}\n", capsys.readouterr().err.splitlines(keepends=True)[-1])
    assert not (offline / "outputs").exists()


@pytest.mark.slow
def test_a_job_on_images_from_disk(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, sample and measure without the images ever in memory at once; what of the folder was taken is told."""
    (folder / ".DS_Store").touch()
    line = ("data=image_folder", f"data.root={folder}", "data.image_size=8", "steps=2", "metrics.features=pixels")
    network = ("model.block_out_channels=[8,8]", "model.attention=[false,true]", "model.norm_num_groups=8")
    assert tiny.run(tmp_path / "outputs", *line, *network, "logger=csv") == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert row["data"] == "image_folder"
    assert float(row["fd"]) > 0
    told = "24 images; passed over: 1 hidden (.DS_Store)"
    assert f"ddim_lab: data.root={folder}: {told}\n" in capsys.readouterr().err
    (cell,) = (tmp_path / "outputs" / "cells").glob("*/result.json")
    assert read_json(cell)["recipe"]["data"]["files"] == told


@pytest.mark.parametrize("model", ["gaussian", "empirical"])
def test_an_exact_model_of_images_from_disk_is_that_of_the_same_in_memory(
    model: str, folder: Path, tmp_path: Path
) -> None:
    config = configure("data=image_folder", f"data.root={folder}", f"model={model}", "data.image_size=8")
    on_disk = load_data(config.data)
    held = dataclasses.replace(on_disk, train=MemoryImages(on_disk.train.first(22), on_disk.train.labels))
    x_t, t = torch.randn(3, *on_disk.shape), torch.tensor([1, 400, 999])
    none: Any = None
    runtime = Runtime.resolve(config.runtime)
    got, expected = (obtain_model(config, data, runtime, none, none).load()(x_t, t) for data in (on_disk, held))
    assert len(on_disk.train) == 22
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    line = ("data=image_folder", f"data.root={folder}", f"model={model}", "data.image_size=8", "logger=csv")
    assert tiny.run(tmp_path / "outputs", *line, "metrics.features=pixels", "steps=2", settings=tiny.SMALL) == 0


def test_moments_are_those_of_all_images_at_once_in_whatever_batches() -> None:
    images = MemoryImages(torch.from_numpy(pixels(600, 1, 4, 4)), torch.zeros(600, dtype=torch.int64))
    images.images[:, 0, 0, 0] = 7  # never changes
    whole = from_uint8(images.images).double()
    mean, variance = _moments(images)
    torch.testing.assert_close(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, whole.var(0).clamp(min=127.5**-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("model=empirical",), r"model=empirical holds every training image in memory: 24 images .* 1 GiB at most .*"),
        (
            ("model=gaussian", "data.image_size=512"),
            r"metrics.features=pixels takes 20 covariances of 786432 values .*",
        ),
    ],
)
def test_what_memory_has_no_room_for_is_refused_before_any_work(
    line: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ddim_lab.models.obtain.HELD_AT_MOST", 2**27)
    settings = ["data=image_folder", f"data.root={folder}", "data.image_size=2000", "metrics.features=pixels"]
    assert tiny.run(tmp_path / "outputs", *settings, *line, settings=tiny.SMALL) == 2
    assert re.fullmatch(rf"ddim_lab: {message}\n", capsys.readouterr().err)
    assert not (tmp_path / "outputs").exists()


# -- recipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cifar10", 35_746_307), ("celeba", 78_700_803), ("lsun_bedroom", 113_673_219), ("lsun_church", 113_673_219)],
)
def test_recipes_have_the_published_networks(name: str, parameters: int) -> None:
    """The sizes of Ho et al.'s and the DDIM paper's networks, as their public checkpoints have them."""
    from ddim_lab.models.unet import build_unet

    config = configure(f"data={name}")
    assert isinstance(config.model, UNetConfig)
    with torch.device("meta"):
        network = build_unet(config.model, config.data.shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    "name",
    ["fashion_mnist", "cifar10", "celeba", pytest.param("lsun_bedroom", marks=pytest.mark.slow), "image_folder"],
)
def test_every_recipe_starts_and_trains(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each recipe with its own levels and attention, narrow, for two steps on made data of its format."""
    if name == "lsun_bedroom":
        root = lsun(tmp_path / "lsun", "bedroom")
    else:
        fixture = {"fashion_mnist": "fashion", "cifar10": "cifar", "celeba": "faces", "image_folder": "folder"}[name]
        made = request.getfixturevalue(fixture)
        root = made[0] if isinstance(made, tuple) else made
    whole = configure(f"data={name}", f"data.root={root}")
    assert isinstance(whole.model, UNetConfig)
    narrow = ",".join("8" for _ in whole.model.block_out_channels)
    config = configure(
        f"data={name}",
        f"data.root={root}",
        f"model.block_out_channels=[{narrow}]",
        "model.norm_num_groups=8",
        "training.max_steps=2",
        "training.warmup_steps=1",
        "training.batch_size=2",
    )
    values: list[float] = []

    class Mirror:
        def __enter__(self) -> Callable[[dict[str, float], int], None]:
            return lambda numbers, step: values.append(numbers["loss"])

        def __exit__(self, *_: object) -> None:
            pass

    model = obtain_model(config, load_data(config.data), Runtime.resolve(config.runtime), Store(tmp_path / "o"), Mirror)
    assert model.trained
    assert 0 < values[-1] < 10
    x_t = torch.randn(1, *config.data.shape)
    assert model.load()(x_t, torch.tensor([5])).sample.shape == x_t.shape
