"""The small classifier whose features stand in for Inception's on small images."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from ddim_lab.data import from_uint8
from ddim_lab.metrics.extractor import Extractor

__all__ = ["Classifier"]


@final
class Classifier(Extractor):
    """A small convolutional classifier; `forward` gives the features before its last non-linearity."""

    head: nn.Module

    def __init__(self, channels: int, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_features),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(num_features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(from_uint8(images))
        return features
