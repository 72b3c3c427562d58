"""An inner layer of the Inception network, which keeps places: its Fréchet distance alone is called sFID."""

from __future__ import annotations

from typing import Any, ClassVar, final

from ddim_lab.metrics.networks.inception import LayerOfInception
from ddim_lab.store import content_key

__all__ = ["InceptionSpatialFeatures"]


@final
class InceptionSpatialFeatures(LayerOfInception):
    """metrics.features=inception_spatial: 7 channels at 17 x 17 places.

    Beside `inception` it costs no forward of samples: both layers are taken in one. Nothing but the Fréchet distance is
    measured in it, as guided-diffusion's evaluator does.
    """

    name: ClassVar[str] = "inception_spatial"
    layer: ClassVar[str] = "spatial"
    measured: ClassVar[tuple[str, ...] | None] = ("frechet", "nearest")
    statistics: ClassVar[tuple[str, str]] = ("mu_s", "sigma_s")

    def features(self, unlike_published: str, recipe: dict[str, Any]) -> dict[str, Any]:
        name = f"FD (Inception, spatial, {unlike_published})" if unlike_published else "sFID"
        digest = content_key({**recipe, "layer": "mixed_6/conv:0", "channels": 7})
        return {"name": name, "digest": digest, "akin": ("sFID",), "statistics": self.statistics}
