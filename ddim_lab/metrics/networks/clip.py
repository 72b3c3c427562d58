"""CLIP (Radford et al. 2021) as CMMD takes it (Jayasumana et al. 2024, Rethinking FID): ViT-L/14@336, unit vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, final

from pydantic import StrictBool

from ddim_lab.config.data import DataOptions
from ddim_lab.config.options import PathOption
from ddim_lab.data.base import DataSet
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.features import FeatureNetwork, Features, PublishedKernel
from ddim_lab.store import Store, content_key

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData
    from ddim_lab.device.runtime import Runtime

__all__ = ["CLIPFeatures"]

REPOSITORY: Final = "timm/vit_large_patch14_clip_336.openai"
"""OpenAI's ViT-L/14@336px as safetensors, by OpenAI's names; openai/clip-vit-large-patch14-336 has it pickled alone."""

REVISION: Final = "81e38efc4637de5023b10e75a7f9bd1c6fa6b010"
SHA256: Final = "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0"

CMMD: Final = PublishedKernel("CMMD", 10.0, "Jayasumana et al. 2024")


@final
class CLIPFeatures(FeatureNetwork):
    """metrics.features=clip: the projected class token of the half that looks at images, as a unit vector.

    Attributes:
        clip_weights: safetensors file, or a folder with one; None for the hub's cache or the download.
        clip_tf32: whether it may compute in TF32 on a GPU; its features then are those of another network.
    """

    name: ClassVar[str] = "clip"
    takes_any_images: ClassVar[bool] = True

    clip_weights: PathOption | None
    clip_tf32: StrictBool

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        if self.name in features:
            return
        for option, given in (("weights", self.clip_weights is not None), ("tf32", self.clip_tf32)):
            if given:
                raise ConfigError(f"metrics.clip_{option} is for metrics.features=clip, not {', '.join(features)}")

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Find, or download, the weights and refuse others."""
        from ddim_lab.metrics.weights import check_once, weights_digest

        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("metrics.features=clip needs transformers: pip install 'ddim-lab[clip]'")
        path = self._path()
        if weights_digest(path) != SHA256:
            from ddim_lab.metrics.transformer import load_clip

            check_once(path, load_clip)

    def check_runtime(self, runtime: Runtime) -> None:
        if self.clip_tf32 and not runtime.has_tf32:
            raise ConfigError("metrics.clip_tf32=true needs a CUDA device with TF32 (compute capability 8.0 or above)")

    def num_features(self, shape: tuple[int, int, int]) -> int:
        from ddim_lab.metrics.transformer import clip_architecture

        return clip_architecture(self._path()).num_features

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics.resizing import centre_square, pillow_bicubic
        from ddim_lab.metrics.transformer import CLIP_PIXELS, Transformer, clip_architecture, load_clip
        from ddim_lab.metrics.weights import weights_digest

        path, tf32 = self._path(), self.clip_tf32
        of, weights = clip_architecture(path), weights_digest(path)
        size, published = of.grid * of.patch, weights == SHA256
        recipe = {
            "kind": "clip",
            "weights": weights,
            "layer": "projected class token, unit vector",
            "size": size,
            "resize": "Pillow's bicubic",
            "crop": "centre square",
            "pixels": CLIP_PIXELS,
            **({"tf32": True} if tf32 else {}),
        }
        said = [
            f"CLIP {of.label}@{size}",
            *([] if published else [f"weights {weights[:8]}"]),
            "unit vectors",
            "centre square by Pillow's bicubic",
            *(["TF32"] if tf32 else []),
        ]
        return Features(
            name=f"FD ({', '.join(said)})",
            digest=content_key(recipe),
            num_features=of.num_features,
            load=lambda: Transformer(
                load_clip(path)[0], lambda images: pillow_bicubic(centre_square(images), size), CLIP_PIXELS, tf32
            ).eval(),
            kernel=CMMD if published and not tf32 else None,
        )

    def _path(self) -> Path:
        from ddim_lab.metrics.weights import Published, find_weights

        published = Published(REPOSITORY, REVISION, "open_clip_model.safetensors", SHA256)
        return find_weights(self.name, self.clip_weights, published)
