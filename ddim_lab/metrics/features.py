"""Images -> feature vectors: the networks whose statistics a Fréchet distance compares.

Only the 2015 Inception network gives "FID"; what these give is named "FD (...)".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save_file

from ddim_lab.config.job import Config
from ddim_lab.data.base import data_set
from ddim_lab.data.images import ImageData
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.classifier import make_classifier, recipe_for
from ddim_lab.metrics.estimates import GROUPS
from ddim_lab.metrics.extractor import Extractor, Pixels
from ddim_lab.metrics.inception import (
    INCEPTION_FEATURES,
    PUBLISHED_SHA256,
    Inception,
    check_weights,
    find_weights,
    weights_digest,
)
from ddim_lab.store import Store, content_key, read_json, write_json

__all__ = ["Features", "check_features", "num_features", "obtain_features"]


@final
@dataclass(frozen=True)
class Features:
    """A feature extractor with its name and identity.

    Attributes:
        name: what its Fréchet distance is called in tables, as "FD (digits classifier)"; "FID" for one network only.
        digest: identifies the extractor: weights, layer, resizing.
        num_features: D.
        load: gives the network, on the CPU, in evaluation mode.
    """

    name: str
    digest: str
    num_features: int
    load: Callable[[], Extractor]


def check_features(config: Config, files: Sequence[Path]) -> None:
    """Checks on `metrics.features` that need no computation; Inception's weights are downloaded.

    Args:
        config: the job.
        files: of its data set, from `check_data`.

    Raises:
        ConfigError: the weights are missing or damaged, or a folder of images has no labels to learn from.
    """
    if config.metrics.features == "inception":
        check_weights(find_weights(config.metrics.inception_weights))
    if config.metrics.features == "pixels":
        _check_room(config)
    if config.metrics.features == "classifier" and (fault := data_set(config.data).labels_fault(files)) is not None:
        raise ConfigError(
            f"metrics.features=classifier learns from labels, and {fault}: set metrics.features=inception or pixels"
        )


def _check_room(config: Config) -> None:
    """Raise ConfigError where the sums that a Fréchet distance of pixels needs are larger than this machine."""
    needed = 8 * GROUPS * math.prod(config.data.shape) ** 2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        channels, height, width = config.data.shape
        raise ConfigError(
            f"metrics.features=pixels takes {GROUPS} covariances of {math.prod(config.data.shape)} values"
            f" ({channels}x{height}x{width}): {needed / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}; set"
            " metrics.features=inception, or take smaller images"
        )


def num_features(config: Config) -> int:
    """D of the extractor that conf/metrics names, before it is there."""
    if config.metrics.features == "inception":
        return INCEPTION_FEATURES
    if config.metrics.features == "pixels":
        return math.prod(config.data.shape)
    return int(recipe_for(config.data.shape)["num_features"])


def obtain_features(
    kind: str, data: ImageData, store: Store, inception_weights: str | None = None, inception_tf32: bool = False
) -> Features:
    """The extractor that `metrics.features` names; the classifier is trained if the store has none for these data.

    Args:
        kind: "classifier", "inception" or "pixels".
        data: the data set; the classifier is trained on its training split and labels.
        store: where the classifier is kept.
        inception_weights: file of Inception's weights; None for torch's cache or the download.
        inception_tf32: whether Inception may compute in TF32 on a GPU; its features then are those of another network.

    Raises:
        ConfigError: Inception's weights are missing or damaged.
    """
    if kind == "inception":
        return _inception(inception_weights, inception_tf32)
    if kind == "pixels":
        channels, height, width = data.shape
        return Features(
            name=f"FD ({data.name} pixels)",
            digest=f"pixels-{channels}x{height}x{width}",
            num_features=math.prod(data.shape),
            load=Pixels,
        )
    return _classifier(data, store)


def _inception(asked: str | None, tf32: bool) -> Features:
    path = find_weights(asked)
    weights = weights_digest(path)
    recipe = {"kind": "inception", "weights": weights, "layer": INCEPTION_FEATURES, "resize": "299x299 TF1 bilinear"}
    said = [] if weights == PUBLISHED_SHA256 else [f"weights {weights[:8]}"]
    if tf32:
        recipe["tf32"], said = True, [*said, "TF32"]
    return Features(
        name=f"FD (Inception, {', '.join(said)})" if said else "FID",
        digest=content_key(recipe),
        num_features=INCEPTION_FEATURES,
        load=lambda: Inception(path, tf32).eval(),
    )


def _classifier(data: ImageData, store: Store) -> Features:
    channels, num_classes, training = data.shape[0], data.num_classes, recipe_for(data.shape)
    recipe = {"kind": "classifier", "data": data.digest, "num_classes": num_classes, **training}

    def build(folder: Path) -> None:
        from ddim_lab.metrics.training import train_classifier  # Lightning, only where something is trained

        network = make_classifier(channels, num_classes, training)
        accuracy = train_classifier(network, data, training)
        weights = folder / "classifier.safetensors"
        save_file(network.state_dict(), weights)
        write_json(folder / "model.json", {**recipe, "held_out_accuracy": accuracy})

    key = content_key(recipe)
    folder, _ = store.obtain("models", key, build)
    digest = str(read_json(folder / "MANIFEST.json")["files"]["classifier.safetensors"]["sha256"])

    def load() -> Extractor:
        network = make_classifier(channels, num_classes, training)
        network.load_state_dict(load_file(folder / "classifier.safetensors"))
        return network.eval().requires_grad_(False)

    return Features(f"FD ({data.name} classifier)", digest, training["num_features"], load)
