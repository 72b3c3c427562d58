"""A small classifier, trained once on the data set's own labels: what stands in for Inception on small images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

from ddim_lab.config.data import DataOptions
from ddim_lab.data.base import DataSet
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.features import FeatureNetwork, Features
from ddim_lab.store import Store, content_key, read_json, write_json

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData

__all__ = ["ClassifierFeatures"]

WEIGHTS: Final = "classifier.safetensors"


@final
class ClassifierFeatures(FeatureNetwork):
    """metrics.features=classifier: `ddim_lab.metrics.classifier`, of the recipe for the images' size."""

    name: ClassVar[str] = "classifier"

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        if self.name in features and not data.has_labels:
            raise ConfigError(f"metrics.features=classifier learns from labels, and data={data.name} has none")

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Refuse images that have no labels to learn from."""
        if (fault := data.labels_fault(files)) is not None:
            raise ConfigError(
                f"metrics.features=classifier learns from labels, and {fault}: set metrics.features=inception or pixels"
            )

    def num_features(self, shape: tuple[int, int, int]) -> int:
        from ddim_lab.metrics.classifier import recipe_for

        return int(recipe_for(shape)["num_features"])

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics.classifier import load_classifier, make_classifier, recipe_for, save_classifier

        channels, num_classes, training = data.shape[0], data.num_classes, recipe_for(data.shape)
        recipe = {"kind": "classifier", "data": data.digest, "num_classes": num_classes, **training}

        def build(folder: Path) -> None:
            from ddim_lab.metrics.training import train_classifier  # Lightning, only where something is trained

            network = make_classifier(channels, num_classes, training)
            accuracy = train_classifier(network, data, training)
            save_classifier(network, folder / WEIGHTS)
            write_json(folder / "model.json", {**recipe, "held_out_accuracy": accuracy})

        key = content_key(recipe)
        folder, _ = store.obtain("models", key, build)
        digest = str(read_json(folder / "MANIFEST.json")["files"][WEIGHTS]["sha256"])

        return Features(
            name=f"FD ({data.name} classifier)",
            digest=digest,
            num_features=training["num_features"],
            load=lambda: load_classifier(folder / WEIGHTS, channels, num_classes, training),
            tells_classes=True,
        )
