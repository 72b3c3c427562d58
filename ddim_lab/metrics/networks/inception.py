"""The Inception network of 2015, whose Fréchet distance alone is called FID."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

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

__all__ = ["InceptionFeatures", "LayerOfInception"]

LAYERS: Final = ("inception", "inception_spatial")
"""The networks that are layers of it, and share its options."""


class LayerOfInception(FeatureNetwork):
    """One layer of `ddim_lab.metrics.inception`; abstract.

    Attributes:
        inception_weights: file of its weights; None for torch's cache or the download.
        inception_tf32: whether it may compute in TF32 on a GPU; its features then are those of another network.
    """

    takes_any_images: ClassVar[bool] = True
    layer: ClassVar[str]

    inception_weights: PathOption | None
    inception_tf32: StrictBool

    @abstractmethod
    def features(self, unlike_published: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """What `Features` of this layer have of their own: all but `num_features` and `load`.

        Args:
            unlike_published: in what it is not the published network, in words; "" where it is.
            recipe: what the network is; the digest is of it and the layer.
        """

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        if any(name in features for name in LAYERS):
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
        from ddim_lab.metrics.inception import SIZES

        return SIZES[self.layer]

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics.inception import PUBLISHED_SHA256, SIZES, Inception, find_weights, weights_digest

        path, layer, tf32 = find_weights(self.inception_weights), self.layer, self.inception_tf32
        weights = weights_digest(path)
        recipe: dict[str, Any] = {"kind": "inception", "weights": weights, "resize": "299x299 TF1 bilinear"}
        said = [] if weights == PUBLISHED_SHA256 else [f"weights {weights[:8]}"]
        if tf32:
            recipe["tf32"], said = True, [*said, "TF32"]
        return Features(
            num_features=SIZES[layer],
            load=lambda: Inception(path, layer, tf32).eval(),
            **self.features(", ".join(said), recipe),
        )


@final
class InceptionFeatures(LayerOfInception):
    """metrics.features=inception: pooled features."""

    name: ClassVar[str] = "inception"
    layer: ClassVar[str] = "pooled"

    def features(self, unlike_published: str, recipe: dict[str, Any]) -> dict[str, Any]:
        name = f"FD (Inception, {unlike_published})" if unlike_published else "FID"
        return {"name": name, "digest": content_key({**recipe, "layer": 2048})}
