"""torchvision's Inception v3, which some take in the place of the network of 2015: a distance by it is no FID.

Its weights are others, and its average pooling counts the padding. It was trained on pixels from -1 to 1. torchvision's
`inception_v3` with pretrained weights expects them normalised by ImageNet's mean and deviation, and brings them back to
-1 to 1 itself (`transform_input`); whoever gives it pixels from 0 to 1 has it look at paler images.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ddim_lab.errors import ConfigError
from ddim_lab.metrics.extractor import Extractor, exact_float32, tf32_products
from ddim_lab.metrics.inception import AT_ONCE, SIDE, find_in_torchs_cache, read_weights, weights_digest
from ddim_lab.metrics.resizing import torch_bilinear
from ddim_lab.metrics.transformer import IMAGENET_PIXELS

__all__ = [
    "NUM_FEATURES",
    "PUBLISHED_PREFIX",
    "Preparation",
    "TorchvisionInception",
    "check_torchvisions",
    "find_torchvisions",
]

NUM_FEATURES: Final = 2048

PUBLISHED_PREFIX: Final = "0cc3c7bd"
"""Of the SHA-256 of IMAGENET1K_V1, as the file's name says it."""

WEIGHTS_NAME: Final = f"inception_v3_google-{PUBLISHED_PREFIX}.pth"
WEIGHTS_URL: Final = f"https://download.pytorch.org/models/{WEIGHTS_NAME}"


@final
@dataclass(frozen=True)
class Preparation:
    """How images become what the network is given.

    Attributes:
        label: the network with it, in names.
        normalised: by ImageNet's mean and deviation, as the network expects; else pixels are from 0 to 1.
        corners: whether the bilinear resize aligns the centres of corner pixels, or has half-pixel centres.
    """

    label: str
    normalised: bool = True
    corners: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """What identifies it."""
        return {
            "resize": f"{SIDE}x{SIDE} torch bilinear{', corners aligned' if self.corners else ''}",
            "pixels": IMAGENET_PIXELS if self.normalised else "0 to 1",
        }


@final
class TorchvisionInception(Extractor):
    """Pooled features of images of any size; a grey image is seen as three equal channels.

    Args:
        weights: the file.
        preparation: of the images.
        tf32: let a GPU round what it multiplies to TF32; else exact float32.

    Raises:
        ConfigError: the file does not hold the network's weights.
    """

    head: nn.Module
    takes_levels = True
    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path, preparation: Preparation, tf32: bool = False) -> None:
        super().__init__()
        self._preparation: Final = preparation
        self._precision: Final = tf32_products if tf32 else exact_float32
        for name, values in zip(("mean", "std"), IMAGENET_PIXELS, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.body = _loaded(weights)
        self.head, self.body.fc = self.body.get_submodule("fc"), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        with self._precision():
            return torch.cat([self._features(part) for part in torch.split(images.expand(-1, 3, -1, -1), AT_ONCE)])

    def _features(self, images: Tensor) -> Tensor:
        pixels = torch_bilinear(images.float() / 255, SIDE, corners=self._preparation.corners)
        if self._preparation.normalised:
            pixels = (pixels - self.mean) / self.std
        found: Tensor = self.body(pixels)
        return found


def find_torchvisions(asked: str | None) -> Path:
    """The file of weights: the one asked for, else torch's cache, where torchvision keeps it, else the download.

    Raises:
        ConfigError: as `ddim_lab.metrics.inception.find_in_torchs_cache`.
    """
    option = "inception_torchvision_weights"
    return find_in_torchs_cache("torchvision's Inception", option, asked, WEIGHTS_NAME, WEIGHTS_URL, PUBLISHED_PREFIX)


def check_torchvisions(path: Path) -> None:
    """Load the network once, unless the file is the published one.

    Raises:
        ConfigError: the file does not hold its weights.
    """
    digest = weights_digest(path)
    if not digest.startswith(PUBLISHED_PREFIX):
        _check(digest, path)


@functools.lru_cache(maxsize=4)
def _check(digest: str, path: Path) -> None:
    _loaded(path)


def _loaded(path: Path) -> nn.Module:
    """torchvision's network with all of its layers but the auxiliary classifier, which pooled features don't need."""
    from torchvision.models.inception import Inception3

    state = {name: value for name, value in read_weights(path).items() if not name.startswith("AuxLogits.")}
    refusal = f"{path} does not hold the weights of torchvision's Inception v3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Inception3(aux_logits=False, transform_input=True, init_weights=False)
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError:
        raise ConfigError(refusal) from None
    # Counts of batches are for training alone, and old files lack them.
    if unexpected or [name for name in missing if not name.endswith(".num_batches_tracked")]:
        raise ConfigError(refusal)
    module: nn.Module = network
    return module.eval().requires_grad_(False)
