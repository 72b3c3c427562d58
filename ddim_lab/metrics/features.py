"""Images -> feature vectors: the networks whose statistics a Fréchet distance compares.

Only the 2015 Inception network gives "FID"; what these give is named "FD (...)".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddim_lab.data import ImageData, from_uint8
from ddim_lab.metrics.classifier import Classifier
from ddim_lab.store import Store, content_key, read_json, write_json

__all__ = ["Features", "obtain_features", "reference_key"]

CLASSIFIER: Final[dict[str, Any]] = {
    "version": 1,
    "num_features": 64,
    "learning_rate": 2e-3,
    "batch_size": 128,
    "steps": 400,
    "seed": 0,
}
"""The classifier's recipe; part of its identity, together with the data. Adam, cross-entropy on the labels."""


@final
@dataclass(frozen=True)
class Features:
    """A feature extractor with its name and identity.

    Attributes:
        name: what its Fréchet distance is called in tables, as "FD (digits classifier)".
        digest: identifies the extractor, weights included.
        num_features: D.
        load: gives the network, uint8 [B, C, H, W] -> float [B, D].
    """

    name: str
    digest: str
    num_features: int
    load: Callable[[], nn.Module]


@final
class Pixels(nn.Module):
    """The image itself, in [-1, 1], flattened."""

    def forward(self, images: Tensor) -> Tensor:
        return from_uint8(images).flatten(1)


def obtain_features(kind: str, data: ImageData, store: Store) -> Features:
    """The extractor that `metrics.features` names; the classifier is trained if the store has none for these data.

    Args:
        kind: "classifier" or "pixels".
        data: the data set; the classifier is trained on its training split and labels.
        store: where the classifier is kept.
    """
    channels, height, width = data.shape
    if kind == "pixels":
        return Features(
            name=f"FD ({data.name} pixels)",
            digest=f"pixels-{channels}x{height}x{width}",
            num_features=channels * height * width,
            load=Pixels,
        )
    num_classes = data.num_classes
    recipe = {"kind": "classifier", "data": data.digest, "num_classes": num_classes, **CLASSIFIER}

    def build(folder: Path) -> None:
        from ddim_lab.metrics.training import train_classifier  # Lightning, only where something is trained

        network = Classifier(channels, num_classes, CLASSIFIER["num_features"])
        accuracy = train_classifier(network, data, CLASSIFIER)
        weights = folder / "classifier.safetensors"
        save_file(network.state_dict(), weights)
        write_json(folder / "model.json", {**recipe, "held_out_accuracy": accuracy})

    key = content_key(recipe)
    folder, _ = store.obtain("models", key, build)
    digest = str(read_json(folder / "MANIFEST.json")["files"]["classifier.safetensors"]["sha256"])

    def load() -> nn.Module:
        network = Classifier(channels, num_classes, CLASSIFIER["num_features"])
        network.load_state_dict(load_file(folder / "classifier.safetensors"))
        return network.eval().requires_grad_(False)

    return Features(f"FD ({data.name} classifier)", digest, CLASSIFIER["num_features"], load)


def reference_key(features: Features, data: ImageData, split: str, count: int) -> str:
    """Name of the statistics of real images: network, data, split and count."""
    return content_key({"features": features.digest, "data": data.digest, "split": split, "count": count})
