"""DINOv2 (Oquab et al. 2023), in whose features the Fréchet distance is called FD-DINOv2.

Three recipes are in use, which bring images to 224x224 in three ways and give three distances.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

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
    from ddim_lab.metrics.weights import Published

__all__ = ["DINOv2Features"]

Recipe = Literal["dgm_eval", "edm2", "torch_fidelity"]
Size = Literal["small", "base", "large", "giant"]

RESIZED: Final[dict[Recipe, str]] = {
    "dgm_eval": "Pillow's bicubic",
    "edm2": "torch's bicubic",
    "torch_fidelity": "TF1's bilinear",
}
"""How images are brought to their size, by who does it so: Stein et al. 2023 and whoever follows their evaluation;
Karras et al. 2024; torch-fidelity 0.4."""

WHO: Final[dict[Recipe, tuple[str, str, Literal[1, 2, 3]]]] = {
    "dgm_eval": (
        "dgm-eval (Stein et al. 2023)",
        "https://github.com/layer6ai-labs/dgm-eval/blob/master/dgm_eval/models/dinov2.py",
        3,
    ),
    "edm2": ("EDM2 (Karras et al. 2024)", "https://github.com/NVlabs/edm2/blob/main/calculate_metrics.py", 2),
    "torch_fidelity": (
        "torch-fidelity 0.4.0",
        "https://github.com/toshas/torch-fidelity/blob/v0.4.0/torch_fidelity/feature_extractor_dinov2.py",
        1,
    ),
}
"""Who does it so, where that can be read, and how often it is done: rarely 1, often 3."""

FILES: Final[dict[Size, tuple[str, str]]] = {
    "small": (
        "ed25f3a31f01632728cabb09d1542f84ab7b0056",
        "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
    ),
    "base": (
        "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        "d73036b56966966d07975d696bde331762f37297e2f095de8cea0040c3aa0841",
    ),
    "large": (
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "giant": (
        "611a9d42f2335e0f921f1e313ad3c1b7178d206d",
        "917d3c470db999d32a312f8542149be91c7cbac61ee8fb4b67ae3d82b79ce21f",
    ),
}
"""Of facebook/dinov2-SIZE: the commit, and the SHA-256 of its model.safetensors."""


@final
class DINOv2Features(FeatureNetwork):
    """metrics.features=dinov2: the class token after the last norm.

    Attributes:
        dinov2_weights: safetensors file, or a folder with one; None for the hub's cache or the download.
        dinov2_size: which of the published; None for large, or for what dinov2_weights holds.
        dinov2_recipe: whose resizing.
        dinov2_tf32: whether it may compute in TF32 on a GPU; its features then are those of another network.
    """

    name: ClassVar[str] = "dinov2"
    takes_any_images: ClassVar[bool] = True

    dinov2_weights: PathOption | None
    dinov2_size: Size | None
    dinov2_recipe: Recipe
    dinov2_tf32: StrictBool

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        given = {
            "weights": self.dinov2_weights is not None,
            "size": self.dinov2_size is not None,
            "recipe": self.dinov2_recipe != "dgm_eval",
            "tf32": self.dinov2_tf32,
        }
        for option in (option for option, is_given in given.items() if is_given and self.name not in features):
            raise ConfigError(f"metrics.dinov2_{option} is for metrics.features=dinov2, not {', '.join(features)}")
        if self.dinov2_weights is not None and self.dinov2_size is not None:
            raise ConfigError(
                f"metrics.dinov2_size={self.dinov2_size} says what to download, and metrics.dinov2_weights is given:"
                " drop one"
            )

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Find, or download, the weights and refuse others."""
        from ddim_lab.metrics.weights import check_once, weights_digest

        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("metrics.features=dinov2 needs transformers: pip install 'ddim-lab[dinov2]'")
        path = self._path()
        if weights_digest(path) not in PUBLISHED:
            from ddim_lab.metrics.transformer import load_dinov2

            check_once(path, load_dinov2)

    def check_runtime(self, runtime: Runtime) -> None:
        if self.dinov2_tf32 and not runtime.has_tf32:
            raise ConfigError(
                "metrics.dinov2_tf32=true needs a CUDA device with TF32 (compute capability 8.0 or above)"
            )

    def num_features(self, shape: tuple[int, int, int]) -> int:
        from ddim_lab.metrics.transformer import dinov2_architecture

        return dinov2_architecture(self._path()).num_features

    def obtain(self, data: ImageData, store: Store) -> Features:
        from ddim_lab.metrics import resizing
        from ddim_lab.metrics.transformer import (
            DINOV2_SIZE,
            IMAGENET_PIXELS,
            Transformer,
            dinov2_architecture,
            load_dinov2,
        )
        from ddim_lab.metrics.weights import weights_digest

        path, tf32, by = self._path(), self.dinov2_tf32, self.dinov2_recipe
        of, weights = dinov2_architecture(path), weights_digest(path)
        published = weights in PUBLISHED
        resize = {
            "dgm_eval": resizing.pillow_bicubic,
            "edm2": resizing.torch_bicubic,
            "torch_fidelity": resizing.tf1_bilinear,
        }[by]
        recipe = {
            "kind": "dinov2",
            "weights": weights,
            "layer": "class token after the last norm",
            "size": DINOV2_SIZE,
            "resize": RESIZED[by],
            "crop": "none",
            "pixels": IMAGENET_PIXELS,
            "positions": "bicubic, offset 0.1",
            **({"tf32": True} if tf32 else {}),
        }
        said = [
            f"DINOv2 {of.label}",
            *([] if published else [f"weights {weights[:8]}"]),
            "CLS",
            f"squashed to {DINOV2_SIZE} by {RESIZED[by]}",
            *(["TF32"] if tf32 else []),
        ]
        return Features(
            name=f"FD ({', '.join(said)})",
            digest=content_key(recipe),
            num_features=of.num_features,
            load=lambda: Transformer(
                load_dinov2(path)[0],
                lambda images: resize(images, DINOV2_SIZE),
                IMAGENET_PIXELS,
                tf32,
                takes_levels=by != "dgm_eval",
            ).eval(),
            known_as=KNOWN_AS[by] if weights == FILES["large"][1] and not tf32 else None,
        )

    def variants(self, data: ImageData, store: Store) -> Sequence[Variant]:
        """The recipes of the others."""
        return [
            Variant(
                name=by,
                label=f"{RESIZED[by]} resize",
                says=f"Images are brought to 224x224 by {RESIZED[by]}.",
                who=(who,),
                source=source,
                common=common,
                effect=None,
                features=functools.partial(self.model_copy(update={"dinov2_recipe": by}).obtain, data, store),
            )
            for by, (who, source, common) in WHO.items()
            if by != self.dinov2_recipe
        ]

    def _path(self) -> Path:
        from ddim_lab.metrics.weights import find_weights

        return find_weights(self.name, self.dinov2_weights, _published(self.dinov2_size or "large"))


PUBLISHED: Final = {sha256 for _, sha256 in FILES.values()}

KNOWN_AS: Final[dict[Recipe, str]] = {
    "dgm_eval": "FD-DINOv2, as dgm-eval takes it",
    "edm2": "FD-DINOv2, as EDM2 takes it",
    "torch_fidelity": "what torch-fidelity calls FID by dinov2-vit-l-14",
}


def _published(size: Size) -> Published:
    from ddim_lab.metrics.weights import Published

    revision, sha256 = FILES[size]
    return Published(f"facebook/dinov2-{size}", revision, "model.safetensors", sha256)
