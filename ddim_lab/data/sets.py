"""Where images come from: each data set's files found and checked, read, prepared and split.

`check_data` finds the files, or downloads them where licence and torchvision allow, and refuses what is missing or
damaged in one line; `load_data` reads them. Training and references see the same prepared images.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim_lab.config.job import (
    CelebAConfig,
    Cifar10Config,
    DataConfig,
    DigitsConfig,
    FashionMnistConfig,
    ImageFolderConfig,
    LsunConfig,
)
from ddim_lab.data.decoding import FORMATS, decode, format_of
from ddim_lab.data.images import DiskImages, ImageData, MemoryImages, NoImages
from ddim_lab.errors import ConfigError, one_line
from ddim_lab.store import read_record, write_record

__all__ = ["check_data", "count_images", "load_data", "without_images"]

log = logging.getLogger(__name__)


def check_data(config: DataConfig) -> tuple[Path, ...]:
    """The files of the data set, found and whole as far as that shows before work starts.

    A folder of one's own images is read whole for it, once; CelebA and LSUN are when they are loaded.

    Raises:
        ConfigError: one is missing and could not be downloaded, or is damaged; says what, where and what to do.
    """
    if isinstance(config, FashionMnistConfig):
        return _find_fashion_mnist(config)
    if isinstance(config, Cifar10Config):
        return _find_cifar10(config)
    if isinstance(config, CelebAConfig):
        return _find_celeba(config)
    if isinstance(config, LsunConfig):
        return _find_lsun(config)
    if isinstance(config, ImageFolderConfig):
        return _find_images(config)
    return ()


def load_data(config: DataConfig) -> ImageData:
    """The data set that conf/data names; the last one loaded is kept while its files are the same.

    Raises:
        ConfigError: as `check_data`.
    """
    return _load(config, _signature(check_data(config)))


def count_images(config: DataConfig, files: Sequence[Path]) -> int | None:
    """How many images there are in `files`, of `check_data`, if they stay on disk; None for a set that is in memory."""
    if isinstance(config, LsunConfig):
        return sum(int(_lsun_environment(str(file.parent)).stat()["entries"]) for file in files)
    if isinstance(config, CelebAConfig):
        return len(files) - 1  # the partition
    return len(files) if isinstance(config, ImageFolderConfig) else None


def without_images(config: DataConfig) -> ImageData:
    """The shape of the data set alone, for a job that reads none of its images."""
    none = NoImages(config.shape)
    return ImageData(config.name, none, none, "no images are read")


Signature = tuple[tuple[str, int, int], ...]
"""Path, size and modification time (ns) of files."""


def _signature(files: Sequence[Path]) -> Signature:
    states = [(str(file), file.stat()) for file in files]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


@functools.lru_cache(maxsize=1)
def _load(config: DataConfig, signature: Signature) -> ImageData:
    files = [Path(name) for name, _, _ in signature]
    if isinstance(config, FashionMnistConfig):
        return _fashion_mnist(files)
    if isinstance(config, Cifar10Config):
        return _cifar10(files)
    if isinstance(config, CelebAConfig):
        return _celeba(files, config.shape)
    if isinstance(config, LsunConfig):
        return _lsun(config, files)
    if isinstance(config, ImageFolderConfig):
        return _image_folder(config, files)
    assert isinstance(config, DigitsConfig)
    return _digits()


def _root(config: DataConfig) -> Path:
    """Where a data set lies, and is downloaded to: data.root, else a folder of its name in $DDIM_LAB_DATA."""
    if config.root is not None:
        return Path(config.root).expanduser().absolute()
    named = os.environ.get("DDIM_LAB_DATA")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "ddim_lab").absolute() / config.name


DOWNLOAD_LOCK: Final = ".download.lock"


@contextlib.contextmanager
def _no_download(folder: Path) -> Iterator[None]:
    """Wait until nobody downloads into `folder`; a folder that has seen no download is not written to."""
    with FileLock(folder / DOWNLOAD_LOCK) if (folder / DOWNLOAD_LOCK).exists() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _download(name: str, folder: Path, how_else: str) -> Iterator[None]:
    """Guards a download into `folder`: one process at a time, and failures in one line that ends in `how_else`.

    A folder that was not there before a download that failed is not there after it.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / DOWNLOAD_LOCK):
            log.info("data=%s is not there: downloading it to %s", name, folder)
            yield
    except (OSError, RuntimeError) as error:
        if made and not any(file.name != DOWNLOAD_LOCK for file in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(
            f"data={name} is not in {folder}, and the download failed ({one_line(error)}): {how_else}"
        ) from None


@functools.lru_cache(maxsize=256)
def _md5(path: str, size: int, modified: int) -> str:
    """MD5 of a file, read once as long as size and time are the same."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _check_md5(name: str, files: Sequence[Path], published: Iterable[str]) -> None:
    for (path, size, modified), file, md5 in zip(_signature(files), files, published, strict=True):
        if _md5(path, size, modified) != md5:
            raise ConfigError(
                f"data={name}: {file} is damaged or cut short (MD5 is not {md5}): delete it and download it again"
            )


# -- digits ---------------------------------------------------------------------------------------------


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    levels = torch.tensor(pixels).mul(255.0 / 16.0).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    train, held_out = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    targets = torch.tensor(labels, dtype=torch.int64)
    return ImageData(
        name="digits",
        train=MemoryImages(levels[train], targets[train]),
        held_out=MemoryImages(levels[held_out], targets[held_out]),
        preprocessing="digits v1: 0..16 scaled to 0..255 and rounded; stratified split 1437/360, random_state=0",
    )


# -- Fashion-MNIST --------------------------------------------------------------------------------------

DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

FASHION_FILES: Final = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _find_fashion_mnist(config: FashionMnistConfig) -> tuple[Path, ...]:
    root = _root(config)
    places = [root, root / "FashionMNIST" / "raw"] + ([DEBIAN_FASHION_MNIST] if config.root is None else [])
    for place in places:
        files = tuple(place / name for name in FASHION_FILES)
        there = [file for file in files if file.is_file()]
        if 0 < len(there) < len(files):  # another process may be moving in what it has downloaded, one by one
            with _no_download(place):
                there = [file for file in files if file.is_file()]
        if len(there) == len(files):
            for (name, size, modified), file in zip(_signature(files), files, strict=True):
                if (fault := _gzip_fault(name, size, modified)) is not None:
                    raise ConfigError(f"data=fashion_mnist: {file} is damaged ({fault}): download it again")
            return files
        if there:
            lacking = next(file for file in files if file not in there)
            raise ConfigError(f"data=fashion_mnist: {lacking} is missing beside {there[0].name}: download it again")
    searched = " nor ".join(map(str, places[1:]))
    how_else = f"(nor in {searched}) apt-get install dataset-fashion-mnist, or set data.root to the four IDX .gz files"
    with _download("fashion_mnist", root, how_else):
        if not (root / FASHION_FILES[-1]).is_file():  # else another process was first
            _download_fashion_mnist(root)
    return tuple(root / name for name in FASHION_FILES)


def _download_fashion_mnist(root: Path) -> None:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    partial = root / ".partial"  # a file is not in its place before its checksum has been compared
    for name, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + name, str(partial), name, md5)
    for name in FASHION_FILES:
        (partial / name).replace(root / name)
    partial.rmdir()


@functools.lru_cache(maxsize=64)
def _gzip_fault(path: str, size: int, modified: int) -> str | None:
    """What is wrong with a .gz file, or None; its checksum is compared once as long as size and time are the same."""
    try:
        with gzip.open(path) as file:
            while file.read(2**20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        return str(error)
    return None


def _read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX .gz file: a magic number 0x08NN (NN dimensions), sizes (big-endian), then the data."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4").tolist()
    values = np.frombuffer(content[4 + 4 * dimensions :], dtype=np.uint8)
    if dimensions == 0 or len(values) != np.prod(sizes):
        raise ConfigError(f"{path} is not an IDX file of uint8: {len(content)} bytes that begin {content[:4].hex()}")
    return torch.from_numpy(values.reshape(sizes).copy())


def _fashion_mnist(files: Sequence[Path]) -> ImageData:
    train_images, train_labels, test_images, test_labels = map(_read_idx, files)
    splits = []
    for path, images, labels in ((files[0], train_images, train_labels), (files[2], test_images, test_labels)):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ConfigError(f"{path}: images of 28x28 with a label each are needed, got {tuple(images.shape)}")
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        splits.append(MemoryImages(padded[:, None], labels.to(torch.int64)))
    train, held_out = splits
    return ImageData("fashion_mnist", train, held_out, "fashion_mnist v1: 28x28 padded with zeros to 32x32")


# -- CIFAR-10 -------------------------------------------------------------------------------------------


def _find_cifar10(config: Cifar10Config) -> tuple[Path, ...]:
    from torchvision.datasets import CIFAR10

    root = _root(config)
    entries = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    files = [root / CIFAR10.base_folder / name for name, _ in entries]
    if not any(file.exists() for file in files):
        how_else = f"unpack {CIFAR10.filename} there, so that {files[0]} is a file, or set data.root"
        with _download("cifar10", root, how_else):
            CIFAR10(str(root), download=True)  # compares the archive's MD5 before it unpacks
    for file in files:
        if not file.is_file():
            raise ConfigError(f"data=cifar10: {file} is missing; unpack {CIFAR10.filename} in {root} again")
    _check_md5("cifar10", files, (md5 for _, md5 in entries))
    return tuple(files)


def _cifar10(files: Sequence[Path]) -> ImageData:
    from torchvision.datasets import CIFAR10

    splits = []
    for train in (True, False):
        # It unpickles: files whose MD5 is the published one.
        there = CIFAR10(str(files[0].parents[1]), train=train)
        images = torch.from_numpy(there.data).permute(0, 3, 1, 2).contiguous()
        splits.append(MemoryImages(images, torch.tensor(there.targets, dtype=torch.int64)))
    train_split, held_out = splits
    return ImageData("cifar10", train_split, held_out, "cifar10 v1: 32x32 as published")


# -- sets too large for memory: files on disk, decoded when asked for ------------------------------------

DIGEST_FILE: Final = ".ddim_lab_digest.json"
"""Beside large data: their content digest, good as long as names, sizes and times of all files are the same."""

ENDS: Final = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82", ".webp": b""}
"""Kinds of image files, and what a whole one has near its end."""


def _content_digest(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names and contents; read once, then taken from `DIGEST_FILE`. Images are decoded on the way.

    Raises:
        ConfigError: an image file is damaged, or none that `decode` takes; names it.
    """
    return _read_content(root, _signature(files))


@functools.lru_cache(maxsize=4)
def _read_content(root: Path, found: Signature) -> str:
    files = [Path(name) for name, _, _ in found]
    states = ["decoded", *(f"{Path(name).relative_to(root)} {size} {modified}" for name, size, modified in found)]
    signature = hashlib.sha256("\n".join(states).encode()).hexdigest()
    place = root / DIGEST_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = read_record(place)
        if kept["signature"] == signature:
            return str(kept["digest"])
    digest = hashlib.sha256()
    for file in tqdm(files, desc=f"reading {root.name} once", unit="file", disable=None, leave=False):
        if file.suffix.lower() in ENDS:
            _check_end(file)
        with file.open("rb") as content:
            read = hashlib.file_digest(content, "sha256").hexdigest()
            if file.suffix.lower() in ENDS:  # what a decoder stumbles over is told before the training, not after it
                content.seek(0)
                decode(content, file)
        digest.update(f"{file.relative_to(root)} {read}\n".encode())
    try:
        write_record(place, {"signature": signature, "digest": digest.hexdigest()})
    except OSError as error:
        log.warning("%s can't be written (%s): the data will be read whole for their digest every time", place, error)
    return digest.hexdigest()


def _check_end(file: Path) -> None:
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - 4096))
        if ENDS[file.suffix.lower()] in content.read():
            return
    kind, named = format_of(file), FORMATS[file.suffix.lower()]
    if kind in (None, named):
        raise ConfigError(f"{file} is cut short: it has no end-of-image mark; download it again")
    suffix = next((suffix for suffix in ENDS if FORMATS[suffix] == kind), None)
    remedy = f"convert it to {named}" if suffix is None else f"rename it to {file.stem}{suffix}"
    raise ConfigError(f"{file} is a {kind} named {file.suffix}: {remedy}")


def _read_image(prepare: Callable[[Image.Image], Image.Image], get: Callable[[str], Any], name: str) -> Tensor:
    """Decode and prepare the image of a name: uint8 [C, H, W]."""
    source = get(name)
    pixels = np.array(prepare(decode(source, source if isinstance(source, Path) else name)))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _beside(root: Path, name: str) -> Path:
    return root / name


def crop_face(image: Image.Image) -> Image.Image:
    """CelebA as in the paper's code: the square of 128 pixels around (89, 121), resized to 64x64 on the 8-bit image."""
    return image.convert("RGB").crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)


def resize_and_crop(size: int, mode: str, image: Image.Image) -> Image.Image:
    """Shorter side to `size` (bilinear, antialiased, on the 8-bit image), then the central square."""
    from torchvision.transforms import functional

    cropped: Image.Image = functional.center_crop(functional.resize(image.convert(mode), size), [size, size])
    return cropped


# -- CelebA ---------------------------------------------------------------------------------------------

CELEBA_PARTITION: Final = "list_eval_partition.txt"


def _find_celeba(config: CelebAConfig) -> tuple[Path, ...]:
    from torchvision.datasets import CelebA

    root = _root(config)
    places = [root, root / CelebA.base_folder]
    place = next((p for p in places if (p / CELEBA_PARTITION).is_file() and (p / "img_align_celeba").is_dir()), None)
    if place is None:
        raise ConfigError(
            f"data=celeba is not in {root}: put there {CELEBA_PARTITION} and the unpacked img_align_celeba.zip (202,599"
            " .jpg files) from mmlab.ie.cuhk.edu.hk/projects/CelebA.html, whose terms you must accept; or set data.root"
        )
    partition = place / CELEBA_PARTITION
    _check_md5("celeba", [partition], [next(md5 for _, md5, name in CelebA.file_list if name == CELEBA_PARTITION)])
    names = [line.split()[0] for line in partition.read_text().splitlines() if line.strip()]
    there = {file.name for file in os.scandir(place / "img_align_celeba")}
    if lacking := [name for name in names if name not in there]:
        raise ConfigError(
            f"data=celeba: {len(lacking)} of {len(names)} images are missing, {place / 'img_align_celeba' / lacking[0]}"
            " first: unpack img_align_celeba.zip again"
        )
    return (partition, *(place / "img_align_celeba" / name for name in names))


def _celeba(files: Sequence[Path], shape: tuple[int, int, int]) -> ImageData:
    root = files[0].parent
    digest = _content_digest(root, files)
    lines = [line.split() for line in files[0].read_text().splitlines() if line.strip()]
    read = functools.partial(_read_image, crop_face, functools.partial(_beside, root / "img_align_celeba"))
    splits = []
    for parts in (("0",), ("1", "2")):
        names = [name for name, part in lines if part in parts]
        splits.append(DiskImages(names, torch.zeros(len(names), dtype=torch.int64), shape, read, digest))
    train, held_out = splits
    return ImageData(
        "celeba", train, held_out, "celeba v1: crop 128x128 round (89, 121), PIL bilinear to 64x64; held out: 1 and 2"
    )


# -- LSUN -----------------------------------------------------------------------------------------------

LSUN_FOLDERS: Final = {"lsun_bedroom": "bedroom", "lsun_church": "church_outdoor"}


def _find_lsun(config: LsunConfig) -> tuple[Path, ...]:
    root, category = _root(config), LSUN_FOLDERS[config.name]
    files = tuple(root / f"{category}_{split}_lmdb" / "data.mdb" for split in ("train", "val"))
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"data={config.name}: {file} is missing: get {category}_train_lmdb.zip and {category}_val_lmdb.zip with"
                f" the script of github.com/fyu/lsun, unpack them in {root}, or set data.root"
            )
    try:
        import lmdb  # noqa: F401
    except ImportError:
        raise ConfigError(f"data={config.name} needs the package lmdb: pip install 'ddim-lab[lsun]'") from None
    for file in files:
        environment = _lsun_environment(str(file.parent))
        whole = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if file.stat().st_size < whole:
            raise ConfigError(
                f"data={config.name}: {file} is cut short ({file.stat().st_size} of {whole} bytes): download it again"
            )
    return files


@functools.cache
def _lsun_environment(folder: str) -> Any:
    """An open database. A process must not use what another has opened: all are closed before this one forks."""
    import lmdb

    try:
        environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ConfigError(f"{folder}/data.mdb is damaged ({error}): download it again") from None
    _open_environments.append(environment)
    return environment


_open_environments: Final[list[Any]] = []


def _close_environments() -> None:
    _lsun_environment.cache_clear()
    while _open_environments:
        _open_environments.pop().close()


os.register_at_fork(before=_close_environments)


def _lsun_bytes(folder: str, name: str) -> io.BytesIO:
    with _lsun_environment(folder).begin() as transaction:
        return io.BytesIO(transaction.get(name.encode("latin-1")))


def _lsun(config: LsunConfig, files: Sequence[Path]) -> ImageData:
    # Not torchvision.datasets.LSUN: it unpickles a list of keys that it keeps in the current folder.
    digest = _content_digest(files[0].parents[1], files)
    splits = []
    for file in files:
        with _lsun_environment(str(file.parent)).begin() as transaction:
            names = [key.decode("latin-1") for key in transaction.cursor().iternext(keys=True, values=False)]
        prepare = functools.partial(resize_and_crop, config.shape[1], "RGB")
        read = functools.partial(_read_image, prepare, functools.partial(_lsun_bytes, str(file.parent)))
        splits.append(DiskImages(names, torch.zeros(len(names), dtype=torch.int64), config.shape, read, digest))
    train, held_out = splits
    return ImageData(config.name, train, held_out, f"{config.name} v1: short side to 256, PIL bilinear, centre crop")


# -- any folder -----------------------------------------------------------------------------------------


def _find_images(config: ImageFolderConfig) -> tuple[Path, ...]:
    root = _root(config)
    if not root.is_dir():
        raise ConfigError(f"data.root={config.root}: there is no such folder of images")
    files = tuple(sorted(file for file in root.rglob("*") if file.suffix.lower() in ENDS and file.is_file()))
    if len(files) < 4:
        raise ConfigError(
            f"data.root={config.root} holds {len(files)} images ({', '.join(ENDS)}); 4 at least are needed"
        )
    _content_digest(root, files)  # which decodes them
    return files


def _image_folder(config: ImageFolderConfig, files: Sequence[Path]) -> ImageData:
    root = _root(config)
    if jpegs := sum(file.suffix.lower() in (".jpg", ".jpeg") for file in files):
        log.warning(
            "%s of the %s images in %s are JPEG: a reference that was compressed moves a Fréchet distance, and"
            " preprocessing that compresses again moves it further; use PNG where you can",
            *(jpegs, len(files), root),
        )
    digest = _content_digest(root, files)
    names = [file.relative_to(root).as_posix() for file in files]
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    labels = {name: classes.index(name.partition("/")[0]) if "/" in name else 0 for name in names}
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    unseen = set(ranked[: min(max(2, round(config.held_out * len(names))), len(names) - 2)])
    prepare = functools.partial(resize_and_crop, config.image_size, "L" if config.channels == 1 else "RGB")
    read = functools.partial(_read_image, prepare, functools.partial(_beside, root))
    splits = []
    for held_out in (False, True):
        chosen = [name for name in names if (name in unseen) == held_out]
        splits.append(DiskImages(chosen, torch.tensor([labels[n] for n in chosen]), config.shape, read, digest))
    train, rest = splits
    size, share = config.image_size, config.held_out
    words = f"short side to {size}, PIL bilinear, centre crop, {config.channels} channel(s); held out {share:g} by name"
    return ImageData("image_folder", train, rest, f"image_folder v1: {words}")
