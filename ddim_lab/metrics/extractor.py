"""What turns images into features: the interface, and the simplest case of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor, nn

from ddim_lab.data import from_uint8

__all__ = ["Extractor", "Pixels"]


class Extractor(nn.Module, ABC):
    """A network whose features are compared; abstract.

    Attributes:
        head: features [B, D] -> logits of classes [B, K], whose probabilities the Inception Score needs; None where
            the network knows no classes. Logits need no second pass over the images.
    """

    head: nn.Module | None

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 [B, D], of images, uint8 [B, C, H, W]."""


@final
class Pixels(Extractor):
    """The image itself, in [-1, 1], flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.head = None

    def forward(self, images: Tensor) -> Tensor:
        return from_uint8(images).flatten(1)
