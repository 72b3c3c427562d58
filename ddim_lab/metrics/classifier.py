"""The classifiers whose features stand in for Inception's on small images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddim_lab.data.images import from_uint8
from ddim_lab.metrics.extractor import Extractor, exact_float32

__all__ = ["Classifier", "load_classifier", "make_classifier", "recipe_for", "save_classifier"]

SMALL: Final[dict[str, Any]] = {
    "version": 1,
    "num_features": 64,
    "learning_rate": 2e-3,
    "batch_size": 128,
    "steps": 400,
    "seed": 0,
}
"""For images of up to 16x16 (digits): seconds. Adam, cross-entropy on the labels."""

LARGE: Final[dict[str, Any]] = {
    "version": 2,
    "widths": [32, 64, 128],
    "num_features": 128,
    "learning_rate": 3e-3,
    "learning_rate_schedule": "one cycle",
    "batch_size": 128,
    "steps": 1000,
    "seed": 0,
}
"""For larger images: a minute or two on two cores at 32x32. Adam, one cycle of the learning rate."""


def recipe_for(shape: Sequence[int]) -> Mapping[str, Any]:
    """The classifier's recipe for images of shape (C, H, W): by their longer side alone.

    It is part of the classifier's identity, together with the data.
    """
    return SMALL if max(shape[1:]) <= 16 else LARGE


def make_classifier(channels: int, num_classes: int, recipe: Mapping[str, Any]) -> Classifier:
    """The recipe's network, not trained."""
    body = _large_body(channels, recipe) if "widths" in recipe else _small_body(channels, recipe)
    return Classifier(body, num_classes, recipe["num_features"])


def save_classifier(network: Classifier, path: Path) -> None:
    """Write the weights as safetensors."""
    save_file(network.state_dict(), path)


def load_classifier(path: Path, channels: int, num_classes: int, recipe: Mapping[str, Any]) -> Classifier:
    """What `save_classifier` wrote, in evaluation mode."""
    network = make_classifier(channels, num_classes, recipe)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@final
class Classifier(Extractor):
    """A convolutional classifier; `forward` gives the features before its last non-linearity, `head` the logits.

    Args:
        body: images in [-1, 1] -> features [B, num_features].
        num_classes: K.
        num_features: D.
    """

    head: nn.Module
    takes_levels = True

    def __init__(self, body: nn.Module, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(num_features, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        with exact_float32():
            features: Tensor = self.body(from_uint8(images))
        return features


def _small_body(channels: int, recipe: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, recipe["num_features"]),
    )


def _large_body(channels: int, recipe: Mapping[str, Any]) -> nn.Module:
    """Two normalised convolutions a width, the first of which halves the image; what is left is pooled to 4x4."""
    layers: list[nn.Module] = []
    for width in recipe["widths"]:
        for inputs, stride in ((channels, 2), (width, 1)):
            convolution = nn.Conv2d(inputs, width, 3, padding=1, stride=stride, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    pooled = [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, *pooled, nn.Linear(16 * channels, recipe["num_features"]))
