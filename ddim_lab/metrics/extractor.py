"""What turns images into features: the interface, and the simplest case of it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from ddim_lab.data.images import from_uint8
from ddim_lab.device.switches import switches_kept

__all__ = ["Extractor", "Layered", "Pixels", "exact_float32", "features_by", "tf32_products"]


class Extractor(nn.Module, ABC):
    """A network whose features are compared; abstract.

    Attributes:
        head: features [B, D] -> logits of classes [B, K], whose probabilities the Inception Score needs; None where
            the network knows no classes. Logits need no second pass over the images.
        takes_levels: whether it takes images that were never rounded, too: float32 from 0 to 255.
    """

    head: nn.Module | None
    takes_levels: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8 [B, C, H, W]; where `takes_levels`, also float32 with values from 0 to 255, whole or not: the
                whole have the features of the same uint8 images.

        Returns:
            float32 [B, D].
        """


class Layered(Extractor):
    """One layer of a network of which several layers are compared; abstract.

    Attributes:
        network: identifies the network with all that it computes by: two with the same give the same layers.
        layer: this one's name.
    """

    network: str
    layer: str

    @abstractmethod
    def layers(self, images: Tensor, names: Collection[str]) -> Mapping[str, Tensor]:
        """Features [B, D] of images, as `forward` takes them, at each of the layers named, in one forward."""

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images, [self.layer])[self.layer]


def features_by(networks: Sequence[Extractor], images: Tensor) -> list[Tensor]:
    """Features [B, D] of images by each of the networks; layers of one take one forward of it.

    Args:
        networks: they.
        images: uint8 [B, C, H, W], or float32 where all of them take levels.
    """
    wanted: dict[str, dict[str, None]] = {}
    for each in networks:
        if isinstance(each, Layered):
            wanted.setdefault(each.network, {})[each.layer] = None
    found: dict[str, Mapping[str, Tensor]] = {}
    features = []
    for each in networks:
        if not isinstance(each, Layered):
            features.append(each(images))
            continue
        if each.network not in found:
            found[each.network] = each.layers(images, wanted[each.network])
        features.append(found[each.network][each.layer])
    return features


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, whatever the sampler's runtime: a distance must not depend on what a device takes for float32."""
    with _own_switches(tf32=False):
        yield


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """With TF32 in matrix products and convolutions on a GPU, whatever the sampler's runtime."""
    with _own_switches(tf32=True):
        yield


@contextlib.contextmanager
def _own_switches(*, tf32: bool) -> Iterator[None]:
    """Torch's switches as every extraction has them, of samples and references alike, and then as they were.

    cuDNN does not search for the fastest algorithm: what it finds depends on the moment, and rounds otherwise. Nor does
    it take one that is not deterministic.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with switches_kept():
        matmul.allow_tf32, cudnn.allow_tf32 = tf32, tf32
        cudnn.benchmark, cudnn.deterministic = False, True
        yield


@final
class Pixels(Extractor):
    """The image itself, in [-1, 1], flattened."""

    takes_levels = True

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, images: Tensor) -> Tensor:
        return from_uint8(images).flatten(1)
