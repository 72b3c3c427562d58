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
from ddim_lab.metrics.features import FeatureNetwork, Features, Variant
from ddim_lab.store import Store, content_key

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.metrics.inception import Resize
    from ddim_lab.metrics.torchvision_inception import Preparation

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
        return self._taken(None)

    def _taken(self, resize: Resize | None) -> Features:
        """The layer of images that are resized in another way than the published one, or in that."""
        from ddim_lab.metrics.inception import PUBLISHED_SHA256, SIZES, TF1, Inception, find_weights, weights_digest

        path, layer, tf32 = find_weights(self.inception_weights), self.layer, self.inception_tf32
        weights, by = weights_digest(path), resize or TF1
        recipe: dict[str, Any] = {"kind": "inception", "weights": weights, "resize": by.recipe}
        said = [] if weights == PUBLISHED_SHA256 else [f"weights {weights[:8]}"]
        if resize is not None:
            said = [*said, resize.label]
        if by.centre != TF1.centre:
            recipe["centre"] = by.centre
        if tf32:
            recipe["tf32"], said = True, [*said, "TF32"]
        return Features(
            num_features=SIZES[layer],
            load=lambda: Inception(path, layer, tf32, resize).eval(),
            **self.features(", ".join(said), recipe),
        )


@final
class InceptionFeatures(LayerOfInception):
    """metrics.features=inception: pooled features.

    Attributes:
        inception_torchvision_weights: file of torchvision's weights, for variants that take its network; None for
            torch's cache or the download.
    """

    name: ClassVar[str] = "inception"
    layer: ClassVar[str] = "pooled"

    inception_torchvision_weights: PathOption | None

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        super().check(features, data)
        if self.inception_torchvision_weights is not None and self.name not in features:
            raise ConfigError(
                f"metrics.inception_torchvision_weights is for metrics.features=inception, not {', '.join(features)}"
            )

    def features(self, unlike_published: str, recipe: dict[str, Any]) -> dict[str, Any]:
        name = f"FD (Inception, {unlike_published})" if unlike_published else "FID"
        return {"name": name, "digest": content_key({**recipe, "layer": 2048})}

    def variants(self, data: ImageData, store: Store) -> Sequence[Variant]:
        """How others bring images to the network, and torchvision's network in its place."""
        from ddim_lab.metrics.inception_variants import of_torchvision, resized

        return [*resized(self._taken), *of_torchvision(self._torchvisions)]

    def _torchvisions(self, preparation: Preparation) -> Features:
        from ddim_lab.metrics.inception import weights_digest
        from ddim_lab.metrics.torchvision_inception import (
            NUM_FEATURES,
            PUBLISHED_PREFIX,
            TorchvisionInception,
            check_torchvisions,
            find_torchvisions,
        )

        path, tf32 = find_torchvisions(self.inception_torchvision_weights), self.inception_tf32
        check_torchvisions(path)
        weights = weights_digest(path)
        recipe = {
            "kind": "torchvision inception",
            "weights": weights,
            "layer": NUM_FEATURES,
            **preparation.recipe,
            **({"tf32": True} if tf32 else {}),
        }
        said = [
            preparation.label,
            *([] if weights.startswith(PUBLISHED_PREFIX) else [f"weights {weights[:8]}"]),
            *(["TF32"] if tf32 else []),
        ]
        return Features(
            name=f"FD ({', '.join(said)})",
            digest=content_key(recipe),
            num_features=NUM_FEATURES,
            load=lambda: TorchvisionInception(path, preparation, tf32).eval(),
        )
