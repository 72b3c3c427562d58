"""The conventions of scoring images: what else the field does, who does it, and where that can be read.

Those of the feature network are its own (`ddim_lab.metrics.features.Variant`), those of sampling the sampler's
(`ddim_lab.conventions.source.Source.factors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

from ddim_lab.conventions.protocol import Factor
from ddim_lab.metrics.features import Variant
from ddim_lab.metrics.frechet import EXTRAPOLATED_FROM

__all__ = ["SCORING", "Subject", "of_network", "scoring"]

REFERENCE: Final = "reference"
NUMBER: Final = "number of samples"
PIXELS: Final = "pixels"
NETWORK: Final = "feature network"
ESTIMATE: Final = "estimate"

PILLOW_JPEG: Final = "Pillow's Image.save of a .jpg, whose default quality is 75"
OPENCV_JPEG: Final = "OpenCV's imwrite of a .jpg, whose default quality is 95"
CLEAN_FID: Final = "Parmar et al. 2022, On Aliased Resizing (arXiv 2104.11222), table 4"

SCORING: Final[tuple[Factor, ...]] = (
    Factor(
        "reference_held_out",
        REFERENCE,
        "held-out images as the reference",
        "Samples are compared with the test split instead of the training split.",
        ("evaluations against the test split", "Ho et al. 2020, who give both for CIFAR-10: 3.17 and 5.24"),
        "Ho et al. 2020 (DDPM), section 4.1; atong01/conditional-flow-matching#176",
        2,
        65.0,
        {"split": "held_out"},
    ),
    Factor(
        "reference_all",
        REFERENCE,
        "training and held-out images as the reference",
        "Samples are compared with both splits together.",
        ("evaluations of sets that are not split, or that are pooled",),
        "mit-han-lab/data-efficient-gans#6: the whole set is the reference, nothing is held out",
        1,
        None,
        {"split": "all"},
    ),
    Factor(
        "reference_10k",
        REFERENCE,
        "10,000 images as the reference",
        "The reference's statistics are of its first 10,000 images instead of all.",
        ("readers of a reference batch that take its images (10,000 for ImageNet) and not its mu and sigma",),
        "openai/guided-diffusion, evaluations/README.md",
        2,
        None,
        {"reference_count": 10_000},
    ),
    Factor(
        "reference_half",
        REFERENCE,
        "half of the reference",
        "The reference's statistics are of the first half of its images.",
        ("LTH14/mar, which takes 50,000 of ImageNet's images",),
        "LTH14/mar#8",
        1,
        None,
        {"reference_count": "half"},
    ),
    Factor(
        "reference_flipped",
        REFERENCE,
        "reference with its mirror images",
        "Each image of the reference counts mirrored, too, as where a training loader that flips is read for it.",
        ("lucidrains/denoising-diffusion-pytorch, whose evaluation reads the loader of the training",),
        "lucidrains/denoising-diffusion-pytorch, denoising_diffusion_pytorch.py",
        2,
        None,
        {"flips": True},
    ),
    Factor(
        "reference_jpeg_75",
        REFERENCE,
        "reference as JPEG of quality 75",
        "The reference's images went through JPEG of quality 75.",
        (PILLOW_JPEG, "forever208/DDPM-IP#31: 5.80 instead of 2.50"),
        f"forever208/DDPM-IP#31; {CLEAN_FID}",
        3,
        132.0,
        {"reference_jpeg": 75},
    ),
    Factor(
        "reference_jpeg_95",
        REFERENCE,
        "reference as JPEG of quality 95",
        "The reference's images went through JPEG of quality 95.",
        (OPENCV_JPEG,),
        CLEAN_FID,
        2,
        None,
        {"reference_jpeg": 95},
    ),
    Factor(
        "reference_round_trip",
        REFERENCE,
        "reference through Normalize(0.5, 0.5) and truncation",
        "The reference's images are normalised to [-1, 1], brought back and truncated, by which 63 of 256 levels lose"
        " one.",
        ("torchmetrics 1.9 with normalize=True, fed by a loader that normalises",),
        "torchmetrics, image/fid.py: (imgs * 255).byte()",
        2,
        None,
        {"reference_levels": "round_trip"},
    ),
    Factor(
        "samples_whole_batches",
        NUMBER,
        "whole batches of 64 alone",
        "The last batch, if it is not whole, is dropped: 49,984 of 50,000 samples.",
        ("ermongroup/ddim, which divides N by the batch size and rounds down",),
        "ermongroup/ddim#32; runners/diffusion.py",
        2,
        None,
        {"count": "whole_batches"},
    ),
    Factor(
        "samples_10k",
        NUMBER,
        "10,000 samples",
        "The first 10,000 samples are scored: FD of fewer samples is larger.",
        ("openai/guided-diffusion in its ablations", "most evaluations during a training"),
        "openai/guided-diffusion#56; bioinf-jku/TTUR, README, which asks for 10,000 at least",
        3,
        None,
        {"count": 10_000},
    ),
    Factor(
        "samples_half",
        NUMBER,
        "half of the samples",
        "The first half of the samples is scored: FD of fewer samples is larger.",
        ("sihyun-yu/REPA#34, with 5.2 of 30,000 and 4.9 of 40,000",),
        "sihyun-yu/REPA#34; Binkowski et al. 2018 (arXiv 1801.01401)",
        2,
        6.0,
        {"count": "half"},
    ),
    Factor(
        "samples_infinite",
        NUMBER,
        "extrapolated to infinitely many samples",
        "The distance is taken of parts of the samples, and a line in 1/N is followed to 0.",
        ("layer6ai-labs/dgm-eval's FD-infinity",),
        "Chong and Forsyth 2020 (arXiv 1911.07023)",
        1,
        None,
        {"infinite": True},
    ),
    Factor(
        "levels_truncated",
        PIXELS,
        "samples truncated to 8 bits",
        "Values are cut to the level below instead of rounded to the nearest: the mean falls by half a level.",
        (
            "openai/improved-diffusion and guided-diffusion: ((x + 1) * 127.5).to(uint8)",
            "torchmetrics 1.9 with normalize=True",
        ),
        "openai/guided-diffusion, scripts/image_sample.py",
        3,
        None,
        {"levels": "truncated"},
    ),
    Factor(
        "levels_raised",
        PIXELS,
        "samples rounded, if these were truncated",
        "If the images at hand were cut to the level below, half of their values would be a level higher when rounded.",
        ("comparisons of openai/guided-diffusion's images with those of other code",),
        "openai/guided-diffusion, scripts/image_sample.py",
        2,
        None,
        {"levels": "raised"},
    ),
    Factor(
        "levels_round_trip",
        PIXELS,
        "samples through Normalize(0.5, 0.5) and truncation",
        "Samples of 8 bits are normalised to [-1, 1], brought back and truncated, by which 63 of 256 levels lose one.",
        ("torchmetrics 1.9 with normalize=True, fed by a loader that normalises",),
        "torchmetrics, image/fid.py: (imgs * 255).byte()",
        1,
        None,
        {"levels": "round_trip"},
    ),
    Factor(
        "levels_float",
        PIXELS,
        "samples not brought to 8 bits",
        "The network sees the samples before they are rounded.",
        ("w86763777/pytorch-ddpm", "lucidrains/denoising-diffusion-pytorch"),
        "mseitzer/pytorch-fid#63",
        2,
        None,
        {"levels": "float"},
    ),
    Factor(
        "samples_jpeg_75",
        PIXELS,
        "samples as JPEG of quality 75",
        "The samples went through JPEG of quality 75.",
        (PILLOW_JPEG, "CompVis/latent-diffusion#253: PNG and JPEG differ"),
        CLEAN_FID,
        3,
        None,
        {"jpeg": 75},
    ),
    Factor(
        "samples_jpeg_95",
        PIXELS,
        "samples as JPEG of quality 95",
        "The samples went through JPEG of quality 95.",
        (OPENCV_JPEG,),
        CLEAN_FID,
        2,
        None,
        {"jpeg": 95},
    ),
    Factor(
        "covariance_n",
        ESTIMATE,
        "covariance over n",
        "Sums of squares are divided by n instead of n - 1, on both sides.",
        ("none of torch-fidelity, pytorch-fid, clean-fid, torchmetrics, EDM or guided-diffusion; code written anew",),
        "numpy.cov, whose default is n - 1; NVlabs/edm, fid.py",
        1,
        None,
        {"divisor": "n"},
    ),
    Factor(
        "class_proportions",
        ESTIMATE,
        "class proportions of the reference",
        "Samples are weighted so that each class has its share of the reference, as where it is sampled so.",
        (
            "evaluations that sample each class equally often, 50 of ImageNet's 1,000: Shenyi-Z/TaylorSeer",
            "openai/guided-diffusion and DiT draw classes at random",
        ),
        "Shenyi-Z/TaylorSeer#31; openai/guided-diffusion#56; facebookresearch/DiT#16",
        2,
        None,
        {"classes": True},
    ),
)


@final
@dataclass(frozen=True)
class Subject:
    """What an audit is of, as far as that says what can be tried.

    Attributes:
        count: N.
        channels: of the images.
        keeps_levels: whether they can be had before they became 256 levels.
        reference: "split" of a data set, "images" of the user's, or "statistics" of images that are not known.
        reference_count: how many images the reference has; None where that is not known.
        held_out: how many the data set holds out.
        tells_classes: whether a network at hand tells the classes of the data set.
        num_features: D of the feature network.
    """

    count: int
    channels: int
    keeps_levels: bool
    reference: str
    reference_count: int | None
    held_out: int
    tells_classes: bool
    num_features: int


def scoring(subject: Subject) -> list[Factor]:
    """`SCORING` for a subject: those that can't be tried on it say why."""
    return [replace(factor, why_not=_why_not(factor, subject)) for factor in SCORING]


def _why_not(factor: Factor, subject: Subject) -> str | None:
    change = factor.change
    if factor.part == REFERENCE or change.get("classes"):
        if subject.reference == "statistics":
            return "the reference is a mean and a covariance: its images are not known"
        if "split" in change and subject.reference == "images":
            return "the reference is of images that were given: it has no other split"
        if "split" in change and subject.held_out < 2:
            return "the data set holds no images out"
    many = "reference_count" if "reference_count" in change else "count" if "count" in change else None
    if many is not None:
        there = subject.reference_count if many == "reference_count" else subject.count
        if there is not None and isinstance(change[many], int) and there <= change[many]:
            return f"there are {there:,} images"
        if change[many] == "whole_batches" and subject.count % 64 == 0:
            return f"N = {subject.count:,} is a multiple of 64"
        if change[many] == "whole_batches" and subject.count < 128:
            return f"N = {subject.count:,} is less than two batches"
    if change.get("infinite") and subject.count < (needed := EXTRAPOLATED_FROM * subject.num_features):
        return f"an extrapolation in {subject.num_features:,} features needs {needed:,} samples"
    if "divisor" in change and subject.reference == "statistics":
        return "of how many images the reference is, is not known"
    if change.get("levels") == "float" and not subject.keeps_levels:
        return "the images have 8 bits: what they were before they were rounded is not known"
    if "jpeg" in factor.name and subject.channels not in (1, 3):
        return f"JPEG is of 1 or 3 channels, and the images have {subject.channels}"
    if change.get("classes") and not subject.tells_classes:
        return "no network at hand tells the data set's classes: add metrics.features=classifier"
    return None


def of_network(variants: Sequence[Variant], reference: str) -> list[Factor]:
    """The factors of a feature network: each of its variants on both sides, and resizings on the samples' alone."""
    found = []
    for variant in variants:
        on_samples = replace(
            _of_variant(variant),
            name=f"{variant.name}_of_samples",
            label=f"{variant.label} of the samples alone",
            says=f"{variant.says.rstrip('.')}; the reference's statistics were taken without that.",
            who=("published statistics, and another library for the samples",),
            common=1 if reference == "split" else variant.common,
            effect=None,
            change={"network": variant.name, "reference_network": ""},
        )
        both = _of_variant(variant)
        if reference == "statistics":
            both = replace(both, why_not="the reference is a mean and a covariance: its images are not known")
        found.append(both)
        if variant.same_network:
            found.append(on_samples)
    return found


def _of_variant(variant: Variant) -> Factor:
    return Factor(
        variant.name,
        NETWORK,
        variant.label,
        variant.says,
        variant.who,
        variant.source,
        variant.common,
        variant.effect,
        {"network": variant.name},
    )
