"""The Inception network of 2015, whose Fréchet distance alone is called FID."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from pydantic import StrictBool

from ddim_lab.config.data import DataOptions
from ddim_lab.config.options import PathOption
from ddim_lab.data.base import DataSet
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.features import FeatureNetwork, Features
from ddim_lab.store import Store, content_key

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData
    from ddim_lab.device.runtime import Runtime

__all__ = ["InceptionFeatures"]


@final
class InceptionFeatures(FeatureNetwork):
    """metrics.features=inception: `ddim_lab.metrics.inception`.

    Attributes:
        inception_weights: file of its weights; None for torch's cache or the download.
        inception_tf32: whether it may compute in TF32 on a GPU; its features then are those of another network.
    """

    name: ClassVar[str] = "inception"
    takes_any_images: ClassVar[bool] = True

    inception_weights: PathOption | None
    inception_tf32: StrictBool

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        if self.name in features:
            return
        for option, given in (("weights", self.inception_weights is not None), ("tf32", self.inception_tf32)):
            if given:
                raise ConfigError(
                    f"metrics.inception_{option} is for metrics.features=inception, not {', '.join(features)}"
                )

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Find, or download, the weights and refuse others."""
        from ddim_lab.metrics.inception import check_weights, find_weights

        check_weights(find_weights(self.inception_weights))

    def check_runtime(self, runtime: Runtime) -> None:
        if self.inception_tf32 and not runtime.has_tf32:
            raise ConfigError(
                "metrics.inception_tf32=true needs a CUDA device with TF32 (compute capability 8.0 or above)"
            )

    def num_features(self, shape: tuple[int, int, int]) -> int:
        from ddim_lab.metrics.inception import INCEPTION_FEATURES

        return INCEPTION_FEATURES

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics.inception import (
            INCEPTION_FEATURES,
            PUBLISHED_SHA256,
            Inception,
            find_weights,
            weights_digest,
        )

        path, tf32 = find_weights(self.inception_weights), self.inception_tf32
        weights = weights_digest(path)
        recipe = {
            "kind": "inception",
            "weights": weights,
            "layer": INCEPTION_FEATURES,
            "resize": "299x299 TF1 bilinear",
        }
        said = [] if weights == PUBLISHED_SHA256 else [f"weights {weights[:8]}"]
        if tf32:
            recipe["tf32"], said = True, [*said, "TF32"]
        return Features(
            name=f"FD (Inception, {', '.join(said)})" if said else "FID",
            digest=content_key(recipe),
            num_features=INCEPTION_FEATURES,
            load=lambda: Inception(path, tf32).eval(),
        )
