"""Vision transformers whose features are compared: read from weights, run by the library transformers in float32.

What a network is follows from the shapes of its weights: width, layers, patches, positions. What shapes don't tell is
as in all networks that Meta (DINOv2) and OpenAI (CLIP) published: heads of 64 channels, activation, norms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddim_lab.errors import ConfigError, one_line
from ddim_lab.metrics.extractor import Extractor, exact_float32, tf32_products
from ddim_lab.metrics.weights import check_config, read_tensors

__all__ = [
    "CLIP_PIXELS",
    "DINOV2_SIZE",
    "IMAGENET_PIXELS",
    "Architecture",
    "Transformer",
    "clip_architecture",
    "dinov2_architecture",
    "load_clip",
    "load_dinov2",
]

AT_ONCE: Final = 64
"""Images in one forward, whatever the sampler's batch: each takes tens of megabytes of activations."""

HEAD: Final = 64
"""Channels of a head, in every published DINOv2 and in OpenAI's CLIP."""

LETTERS: Final = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1536, 40): "G"}
"""What sizes are called, by width and layers."""

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]

IMAGENET_PIXELS: Final[Pixels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the channels from 0 to 1 that DINOv2's inputs are normalised by."""

CLIP_PIXELS: Final[Pixels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""The same of CLIP's."""


@final
@dataclass(frozen=True)
class Architecture:
    """What a network's weights are the weights of.

    Attributes:
        width, layers: of the transformer.
        patch: side of a patch, in pixels.
        grid: patches along a side of the images that its positions are for.
        num_features: D.
    """

    width: int
    layers: int
    patch: int
    grid: int
    num_features: int

    @property
    def label(self) -> str:
        """As "ViT-L/14"."""
        letter = LETTERS.get((self.width, self.layers))
        return f"ViT-{letter}/{self.patch}" if letter else f"ViT {self.layers}x{self.width}/{self.patch}"


@final
class Transformer(Extractor):
    """Features of images of any size; a grey image is seen as three equal channels.

    Args:
        body: normalised images, float32 [B, 3, S, S] -> features [B, D].
        prepare: uint8 [B, 3, H, W] -> [B, 3, S, S] of values from 0 to 255.
        pixels: what they are normalised by, once divided by 255.
        tf32: let a GPU round what it multiplies to TF32; else exact float32.
        takes_levels: whether `prepare` takes float32 from 0 to 255, too.
    """

    head: None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        pixels: Pixels,
        tf32: bool,
        takes_levels: bool = False,
    ) -> None:
        super().__init__()
        self.head = None
        self.takes_levels = takes_levels
        self.body = body
        self._prepare, self._precision = prepare, tf32_products if tf32 else exact_float32
        for name, values in zip(("mean", "std"), pixels, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        with self._precision():
            return torch.cat([self._features(part) for part in torch.split(images.expand(-1, 3, -1, -1), AT_ONCE)])

    def _features(self, images: Tensor) -> Tensor:
        pixels = self._prepare(images).float() / 255
        found: Tensor = self.body((pixels - self.mean) / self.std)
        return found


# -- DINOv2 -------------------------------------------------------------------------------------------

DINOV2_SIZE: Final = 224
"""Side of the images that DINOv2's features are taken of, in pixels: less than the 518 of its positions."""

OFFSET: Final = 0.1
"""What Meta's code adds to the number of patches along a side before it divides by that of the positions."""

DINOV2_NEEDED: Final = "model.safetensors of facebook/dinov2-large, or of its other sizes, is needed"


@final
class _ClassToken(nn.Module):
    """The class token after the last norm, which is what Meta's networks return."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.network(pixels).last_hidden_state[:, 0]
        return found


def dinov2_architecture(path: Path) -> Architecture:
    """What a file of DINOv2's weights holds, by its head alone.

    Raises:
        ConfigError: as `read_tensors`, or it holds another network; one line.
    """
    return _dinov2(path, read_tensors(path, _any, values=False))


def load_dinov2(path: Path) -> tuple[nn.Module, Architecture]:
    """DINOv2 for images of 224x224, on the CPU, in evaluation mode.

    Raises:
        ConfigError: as `dinov2_architecture`.
    """
    from transformers import Dinov2Config, Dinov2Model

    state = read_tensors(path, _any, values=True)
    of = _dinov2(path, state)
    state[DINOV2_POSITIONS] = positions_at(state[DINOV2_POSITIONS], DINOV2_SIZE // of.patch)
    first = state.get("encoder.layer.0.mlp.fc1.weight")
    config = Dinov2Config(
        hidden_size=of.width,
        num_hidden_layers=of.layers,
        num_attention_heads=of.width // HEAD,
        mlp_ratio=4 if first is None else len(first) // of.width,
        image_size=DINOV2_SIZE,
        patch_size=of.patch,
        use_swiglu_ffn=first is None,
        **DINOV2_SETTINGS,
    )
    return _ClassToken(_loaded(Dinov2Model, config, state, path, DINOV2_NEEDED)), of


DINOV2_POSITIONS: Final = "embeddings.position_embeddings"
DINOV2_SETTINGS: Final = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}


def _dinov2(path: Path, state: Mapping[str, Tensor]) -> Architecture:
    if "embeddings.register_tokens" in state:
        raise ConfigError(f"{path} is of DINOv2 with registers, another network than distances are published of")
    patches = "embeddings.patch_embeddings.projection.weight"
    of = _architecture(path, state, patches, DINOV2_POSITIONS, r"encoder\.layer\.(\d+)\.", DINOV2_NEEDED)
    if DINOV2_SIZE % of.patch:
        raise ConfigError(f"{path}: images of {DINOV2_SIZE}x{DINOV2_SIZE} are not whole patches of {of.patch}")
    check_config(path.parent, ("dinov2",), {"num_attention_heads": of.width // HEAD, **DINOV2_SETTINGS})
    return of


def positions_at(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings for another number of patches, by Meta's code and not by transformers', which differs.

    Bicubic (a = -3/4, not antialiased), the centre of patch i taken at (i + 1/2) m / (grid + 0.1) - 1/2 of m.

    Source: `interpolate_pos_encoding` of facebookresearch/dinov2, with the offset of its published networks.

    Args:
        positions: [1, 1 + m^2, D], that of the class token first.
        grid: patches along a side.

    Returns:
        [1, 1 + grid^2, D]; the same where grid is m.
    """
    before = math.isqrt(positions.shape[1] - 1)
    if before == grid:
        return positions
    square = positions[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    scale = (grid + OFFSET) / before
    found = functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", recompute_scale_factor=False)
    return torch.cat([positions[:, :1], found[..., :grid, :grid].flatten(2).transpose(1, 2)], dim=1)


# -- CLIP ---------------------------------------------------------------------------------------------

CLIP_NEEDED: Final = "weights of OpenAI's CLIP by the names of OpenAI or of transformers are needed"

CLIP_SETTINGS: Final = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}

OPENAIS_NAMES: Final = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.ln_", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"vision_model.encoder.layers.\1.mlp.fc1."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"vision_model.encoder.layers.\1.mlp.fc2."),
)
"""OpenAI's names of the parts that look at images, by which open_clip's files go, too; and transformers'."""


@final
class _UnitVectors(nn.Module):
    """The projected class token, divided by its length."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = functional.normalize(self.network(pixels).image_embeds, dim=-1)
        return found


def clip_architecture(path: Path) -> Architecture:
    """What a file of CLIP's weights holds of the network that looks at images, by its head alone.

    Raises:
        ConfigError: as `read_tensors`, or it holds another network; one line.
    """
    return _clip(path, _transformers_names(read_tensors(path, _of_images, values=False)))


def load_clip(path: Path) -> tuple[nn.Module, Architecture]:
    """The half of CLIP that looks at images, on the CPU, in evaluation mode; the text's half is not read.

    Raises:
        ConfigError: as `clip_architecture`.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    state = _transformers_names(read_tensors(path, _of_images, values=True))
    of = _clip(path, state)
    config = CLIPVisionConfig(
        hidden_size=of.width,
        intermediate_size=len(state.get("vision_model.encoder.layers.0.mlp.fc1.weight", range(4 * of.width))),
        projection_dim=of.num_features,
        num_hidden_layers=of.layers,
        num_attention_heads=of.width // HEAD,
        image_size=of.grid * of.patch,
        patch_size=of.patch,
        **CLIP_SETTINGS,
    )
    return _UnitVectors(_loaded(CLIPVisionModelWithProjection, config, state, path, CLIP_NEEDED)), of


def _clip(path: Path, state: Mapping[str, Tensor]) -> Architecture:
    patches, positions = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))
    layers, last = r"vision_model\.encoder\.layers\.(\d+)\.", "visual_projection.weight"
    of = _architecture(path, state, patches, positions, layers, CLIP_NEEDED, last)
    kinds = ("clip", "clip_vision_model")
    check_config(path.parent, kinds, {"num_attention_heads": of.width // HEAD, **CLIP_SETTINGS})
    return of


def _of_images(name: str) -> bool:
    """Whether a tensor of CLIP is of the network that looks at images; old files hold the positions' numbers, too."""
    return name.startswith(("visual", "vision_model.")) and not name.endswith(".position_ids")


def _transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors by transformers' names, whichever they had: OpenAI's keep query, key and value in one."""
    found: dict[str, Tensor] = {}
    for old, tensor in state.items():
        name = old
        for pattern, new in OPENAIS_NAMES:
            name = re.sub(pattern, new, name)
        if name.endswith((".in_proj_weight", ".in_proj_bias")) and len(tensor) % 3 == 0:
            place, _, kind = name.rpartition(".in_proj_")
            found |= {f"{place}.{part}_proj.{kind}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[name] = tensor.T if old == "visual.proj" else tensor
    return found


# -- both ---------------------------------------------------------------------------------------------


def _any(name: str) -> bool:
    return True


def _architecture(
    path: Path,
    state: Mapping[str, Tensor],
    patches: str,
    positions: str,
    layers: str,
    needed: str,
    projection: str | None = None,
) -> Architecture:
    """By the shapes of the tensors of these names; `layers` is a pattern that takes a layer's number."""
    positional = 3 if positions == DINOV2_POSITIONS else 2
    for name, dimensions in ((patches, 4), (positions, positional), *([] if projection is None else [(projection, 2)])):
        if name not in state:
            raise ConfigError(f"{path} has no {name}: {needed}")
        if state[name].ndim != dimensions:
            raise ConfigError(f"{path}: {name} has the shape {list(state[name].shape)}: {needed}")
    width, channels, patch, other = state[patches].shape
    count = state[positions].numel() // width - 1
    grid = math.isqrt(max(0, count))
    numbers = {int(found[1]) for name in state if (found := re.match(layers, name))}
    if (
        channels != 3
        or patch != other
        or grid < 1
        or grid * grid != count
        or state[positions].numel() % width
        or numbers != set(range(max(1, len(numbers))))
    ):
        raise ConfigError(
            f"{path}: patches of {list(state[patches].shape)}, positions of {list(state[positions].shape)} and"
            f" {len(numbers)} layers are of no such network: {needed}"
        )
    if width % HEAD:
        raise ConfigError(f"{path}: its width, {width}, is no multiple of {HEAD}, the size of a head: {needed}")
    return Architecture(width, len(numbers), patch, grid, width if projection is None else len(state[projection]))


def _loaded(kind: Any, config: Any, state: dict[str, Tensor], path: Path, needed: str) -> nn.Module:
    """A transformers network with these weights, all of them and no others."""
    from transformers.utils import logging

    # What it says of weights that don't fit is said below, in one line.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        network, found = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} can't be read by transformers ({one_line(error)[:100]}): {needed}") from None
    for what, words in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has, beside what is needed,"),
        ("mismatched_keys", "has in another shape"),
    ):
        if names := sorted(entry if isinstance(entry, str) else entry[0] for entry in found[what]):
            raise ConfigError(f"{path} {words} {len(names)} of the tensors, {names[0]} first: {needed}")
    module: nn.Module = network
    return module.float().eval().requires_grad_(False)
