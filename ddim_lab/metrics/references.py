"""What samples are compared with: statistics of real images, computed once and kept, or read from the field's files."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.console import Progress
from ddim_lab.data.images import ImageData, ImageSet, Split
from ddim_lab.errors import ConfigError, one_line
from ddim_lab.metrics.features import KEPT_AT_MOST, Features, feature_network
from ddim_lab.metrics.statistics import VECTORS, FeatureSums, Moments, VectorFile, read_vectors
from ddim_lab.store import Store, content_key

__all__ = [
    "Reference",
    "check_reference",
    "fits",
    "obtain_held_out",
    "obtain_reference",
    "obtain_statistics",
    "read_moments",
    "reference_of",
    "stored_as",
]

Float64 = np.ndarray[Any, np.dtype[np.float64]]


@final
@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them.

    Attributes:
        name: for tables, as "digits train, n=1437".
        key: identifies network, images and preprocessing, or the content of a file of statistics.
        moments: mean and covariance of all images.
        features: float32 [min(n, 50,000), D], memory-mapped; None where they were not kept or are not known.
        folder: where the object is kept; None for a file of the user's.
    """

    name: str
    key: str
    moments: Moments
    features: np.ndarray[Any, np.dtype[np.float32]] | None
    folder: Path | None

    @property
    def count(self) -> int | None:
        """Of how many images the moments are; None where that is not known."""
        return self.moments.count

    def with_features_of(self, images: Reference, count: int) -> Reference:
        """These statistics for the Fréchet distance, and `count` images of the same set for what compares images."""
        name = f"{self.name}, for the Fréchet distance; {count:,} images beside them for the rest"
        key = content_key({"statistics": self.key, "images": images.key})
        return Reference(name, key, self.moments, images.features, images.folder)


def reference_of(metrics: MetricsConfig, features: Features, data: ImageData) -> str:
    """`Reference.key` of the reference that conf/metrics names, before it is computed.

    Raises:
        ConfigError: as `read_moments`.
    """
    if metrics.reference_statistics is not None:
        return read_moments(Path(metrics.reference_statistics), features).key
    return _key(features, data.digest, metrics.reference, len(data.split(metrics.reference)))


def stored_as(features: Features, data: ImageData, split: Split, count: int, *, keep_features: bool) -> str:
    """The store's name of what `obtain_reference` gives, before it is computed."""
    return _stored(_key(features, data.digest, split, count), min(count, KEPT_AT_MOST) if keep_features else 0)


def _stored(key: str, kept: int) -> str:
    return content_key({"reference": key, "kept": kept}) if kept else key


def obtain_reference(
    features: Features,
    data: ImageData,
    split: Split,
    store: Store,
    *,
    count: int | None = None,
    keep_features: bool = False,
    device: torch.device | None = None,
) -> Reference:
    """Statistics of real images, from the store or computed.

    Args:
        features: extractor.
        data, split: which images.
        store: where they are kept.
        count: how many, from the first; None for all.
        keep_features: keep the vectors, too (`KEPT_AT_MOST`): an object of its own.
        device: where features are extracted; None for the CPU.
    """
    images = data.split(split)
    total = len(images) if count is None else min(count, len(images))
    key, name = _key(features, data.digest, split, total), f"{data.name} {split}, n={total}"
    return obtain_statistics(
        features, images, name, key, store, count=total, keep_features=keep_features, device=device
    )


def obtain_statistics(
    features: Features,
    images: ImageSet,
    name: str,
    key: str,
    store: Store,
    *,
    count: int,
    keep_features: bool,
    device: torch.device | None,
) -> Reference:
    """As `obtain_reference`, of any images: `key` must identify them and the extractor."""
    kept = min(count, KEPT_AT_MOST) if keep_features else 0

    def build(folder: Path) -> None:
        network = features.load().to(device)
        vectors = VectorFile(folder / VECTORS, (kept, features.num_features)) if kept else None

        def extracted() -> Iterator[Tensor]:
            with Progress(f"features of {name}", count, "image") as progress:
                for part in images.batches(512, count):
                    found = network(part.to(device))
                    if vectors is not None:
                        vectors.add(found)
                    progress.update(len(part))
                    yield found

        with torch.inference_mode():
            FeatureSums.of(extracted()).save(folder / "statistics.npz")

    folder, _ = store.obtain("references", _stored(key, kept), build)
    vectors = read_vectors(folder / VECTORS) if kept else None
    return Reference(name, key, FeatureSums.load(folder / "statistics.npz").moments(), vectors, folder)


def obtain_held_out(
    features: Features, data: ImageData, store: Store, *, count: int, device: torch.device | None = None
) -> Reference | None:
    """The first `count` held-out images, or all of them if they are fewer, to be scored as samples are; or None.

    None where they are fewer than two. Other arguments as in `obtain_reference`.
    """
    count = min(count, len(data.held_out), KEPT_AT_MOST)
    if count < 2:
        return None
    return obtain_reference(features, data, "held_out", store, count=count, keep_features=True, device=device)


def check_reference(metrics: MetricsConfig, shape: tuple[int, int, int]) -> None:
    """Checks on the reference that need no computation: a file of statistics must fit each network.

    Args:
        metrics: as configured.
        shape: of the images (C, H, W).

    Raises:
        ConfigError: as `read_moments`.
    """
    if metrics.reference_statistics is not None:
        for network in map(feature_network, metrics.networks):
            _read(Path(metrics.reference_statistics), network.num_features(shape), network.statistics)


OPTION: Final = "metrics.reference_statistics"


def read_moments(path: Path, features: Features, option: str = OPTION) -> Reference:
    """The statistics in a .npz file with arrays mu [D] and sigma [D, D], as the field's evaluators write them.

    A network may have other names for the two (`Features.statistics`): those of sFID are mu_s and sigma_s.

    Of how many images they are is not known, and neither are the images: no kernel distance, precision or recall.

    Args:
        path: the file.
        features: the extractor that they are compared with.
        option: what named the file, for messages.

    Raises:
        ConfigError: it is missing, damaged, or does not fit the extractor; one line.
    """
    mu, sigma = _read(path, features.num_features, features.statistics, option)
    digest = hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()
    key = content_key({"features": features.digest, "statistics": digest})
    moments = Moments(torch.from_numpy(mu), torch.from_numpy(sigma), None)
    return Reference(f"{path.name}, SHA-256 {digest[:12]}, n unknown", key, moments, None, None)


def fits(path: Path, features: Features) -> bool:
    """Whether the statistics in a file are of as many features as the extractor has; one that is damaged may be."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            mean = features.statistics[0]
            return mean in file.files and bool(file[mean].shape == (features.num_features,))
    except UNREADABLE:
        return True


UNREADABLE: Final = (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile)
"""What numpy raises of a file that is no whole .npz."""

LARGEST: Final = float(np.finfo(np.float32).max)
"""Of what statistics may hold: features are float32, and a distance of values up to here is finite in float64."""


def _read(path: Path, size: int, names: tuple[str, str], option: str = OPTION) -> tuple[Float64, Float64]:
    if not path.is_file():
        raise ConfigError(f"{option}={path}: there is no such file")
    state = path.stat()
    return _read_whole(str(path), size, names, f"{option}={path}", state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_whole(
    path: str, size: int, names: tuple[str, str], say: str, length: int, modified: int
) -> tuple[Float64, Float64]:
    """Read and check the file once, as long as its size and time are the same: eigenvalues take seconds at D = 2048."""
    told = " and ".join(names)
    try:
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # it may hold images, too
            given = {name: file[name] for name in names}
            if bad := [f"{name} of {array.dtype}" for name, array in given.items() if array.dtype.kind not in "fiu"]:
                raise ConfigError(f"{say}: {told} must be real numbers, it has {bad[0]}")
            mu, sigma = (np.asarray(array, dtype=np.float64) for array in given.values())
    except ConfigError:
        raise
    except KeyError:
        raise ConfigError(f"{say}: the arrays {told} are needed, it has {', '.join(file.files)}") from None
    except UNREADABLE as error:
        raise ConfigError(f"{say} is not a whole .npz file of numbers ({one_line(error)[:100]})") from None
    if mu.shape != (size,) or sigma.shape != (size, size):
        raise ConfigError(
            f"{say}: these features need {names[0]} of shape ({size},) and {names[1]} of ({size}, {size}), it has"
            f" {mu.shape} and {sigma.shape}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ConfigError(f"{say} holds NaN or infinite values")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise ConfigError(f"{say}: {names[1]} is no covariance: it must be symmetric, with no negative variance")
    if (most := max(np.abs(mu).max(), np.abs(sigma).max())) > LARGEST:
        raise ConfigError(f"{say}: it holds values up to {most:.2g}, which no features (float32) have")
    values = np.linalg.eigvalsh(sigma)
    if values[0] < -1e-6 * values[-1]:
        raise ConfigError(
            f"{say}: {names[1]} is no covariance: its least eigenvalue is {values[0]:.2g} beside a largest of"
            f" {values[-1]:.2g}, and none may be negative"
        )
    return mu, sigma


def _key(features: Features, images: str, split: str, count: int) -> str:
    return content_key({"features": features.digest, "data": images, "split": split, "count": count})
