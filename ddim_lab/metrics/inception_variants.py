"""Who takes the Inception network's features otherwise than published FIDs do, and how: by name, version and source.

Where images are enlarged, as 32x32 ones are, antialiasing changes nothing: torch's two bilinear resizes then differ by
how pixels are normalised, and from TF1's by a shift of the grid by half a pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from ddim_lab.metrics.features import Features, Variant
from ddim_lab.metrics.inception import Resize
from ddim_lab.metrics.resizing import pillow_bicubic_float, pillow_bilinear, torch_bilinear
from ddim_lab.metrics.torchvision_inception import Preparation

__all__ = ["of_torchvision", "resized"]

ANTIALIASED: Final = Resize(
    "299x299 torch bilinear, antialiased", "antialiased resize", functools.partial(torch_bilinear, antialias=True)
)
BILINEAR: Final = Resize("299x299 torch bilinear", "torch's bilinear resize", torch_bilinear, centre=127.5)
PILLOW_BICUBIC: Final = Resize("299x299 Pillow bicubic, float32", "Pillow's bicubic resize", pillow_bicubic_float)
PILLOW_BILINEAR: Final = Resize(
    "299x299 Pillow bilinear, 8 bits", "Pillow's bilinear resize", pillow_bilinear, takes_levels=False
)


def resized(features: Callable[[Resize], Features]) -> list[Variant]:
    """The network of 2015 on images that are brought to its 299x299 pixels in another way.

    Args:
        features: gives the extractor of a way; raises ConfigError where weights are missing or damaged.
    """
    return [
        Variant(
            name="antialiased",
            label=ANTIALIASED.label,
            says="Images are resized by torch's bilinear filter with half-pixel centres, antialiased where it shrinks.",
            who=("torchmetrics 1.8.0 and later, by default",),
            source="https://github.com/Lightning-AI/torchmetrics/pull/3177",
            common=3,
            effect=None,
            features=functools.partial(features, ANTIALIASED),
        ),
        Variant(
            name="bilinear",
            label=BILINEAR.label,
            says="Images are resized by torch's bilinear filter with half-pixel centres, not antialiased, and"
            " normalised by (x - 127.5) / 127.5, not (x - 128) / 128.",
            who=("pytorch-fid 0.3.0", "clean-fid 0.1.35, mode legacy_pytorch"),
            source="https://github.com/mseitzer/pytorch-fid/blob/master/src/pytorch_fid/inception.py; effect: its"
            " README, a relative 0.0009 on LSUN",
            common=3,
            effect=0.09,
            features=functools.partial(features, BILINEAR),
        ),
        Variant(
            name="pillow_bicubic",
            label=PILLOW_BICUBIC.label,
            says="Images are resized by Pillow's bicubic filter, antialiased where it shrinks, in float32: not"
            " rounded.",
            who=("clean-fid 0.1.35, mode clean, its default",),
            source="Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation;"
            " https://github.com/GaParmar/clean-fid/blob/main/cleanfid/resize.py; effect: its README, the median of six"
            " StyleGAN2s on CIFAR-10, 10 to 28 %",
            common=3,
            effect=17.0,
            features=functools.partial(features, PILLOW_BICUBIC),
        ),
        Variant(
            name="pillow_bilinear",
            label=PILLOW_BILINEAR.label,
            says="Images are resized by Pillow's bilinear filter, antialiased where it shrinks, and rounded to 256"
            " levels again.",
            who=("scripts with torchvision's Resize((299, 299)), as of 0.29.1, on Pillow's images before any library",),
            source="https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.Resize.html",
            common=2,
            effect=None,
            features=functools.partial(features, PILLOW_BILINEAR),
        ),
    ]


def of_torchvision(features: Callable[[Preparation], Features]) -> list[Variant]:
    """torchvision's Inception v3 instead.

    Args:
        features: gives the extractor of a preparation; raises ConfigError where weights are missing or damaged.
    """
    plain, pale, corners = (
        Preparation("torchvision's Inception"),
        Preparation("torchvision's Inception, pixels from 0 to 1", normalised=False),
        Preparation("torchvision's Inception, corners aligned", corners=True),
    )
    return [
        Variant(
            name="torchvision",
            label=plain.label,
            says="The network is torchvision's Inception v3 (IMAGENET1K_V1), on images resized by torch's bilinear"
            " filter and normalised as it expects.",
            who=("pytorch-fid before 27 May 2019, and 0.3.0 with use_fid_inception=False",),
            source="https://github.com/mseitzer/pytorch-fid/pull/16",
            common=1,
            effect=None,
            features=functools.partial(features, plain),
            same_network=False,
        ),
        Variant(
            name="torcheval",
            label=pale.label,
            says="The network is torchvision's Inception v3 (IMAGENET1K_V1), on images resized by torch's bilinear"
            " filter and given as pixels from 0 to 1, which it takes for normalised ones.",
            who=("torcheval 0.0.7",),
            source="https://github.com/pytorch/torcheval/blob/main/torcheval/metrics/image/fid.py; effect: its issue"
            " 220, 13.67 where torchmetrics gives 53.69, on ten images of noise",
            common=1,
            effect=75.0,
            features=functools.partial(features, pale),
            same_network=False,
        ),
        Variant(
            name="torchvision_corners",
            label=corners.label,
            says="The network is torchvision's Inception v3 (IMAGENET1K_V1), normalised as it expects, on images"
            " resized by torch's bilinear filter with the centres of corner pixels aligned.",
            who=("BigGAN-PyTorch (Brock), and code bases that took its inception_utils.py over",),
            source="https://github.com/ajbrock/BigGAN-PyTorch/blob/master/inception_utils.py",
            common=1,
            effect=None,
            features=functools.partial(features, corners),
            same_network=False,
        ),
    ]
