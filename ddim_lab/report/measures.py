"""What is measured beside a Fréchet distance, one number a cell: each gets a paper-shaped table over the steps.

A new task's numbers are shown by naming them here, and as fields of `sweep.Measurements`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddim_lab.report.sweep import Cell


@dataclass(frozen=True)
class Measure:
    """A number that cells have.

    `field` is its name in results.csv, `se` that of its standard error, `count` that of the number of images (or of
    what `counted` says) behind it. `level` names a number of the same unit to compare it with, `level_says` what that
    is. `error` says how the standard error is taken, `facts` what one value means; `ranked` whether lower is better.
    """

    field: str
    heading: str
    facts: str
    se: str | None = None
    count: str | None = None
    counted: str = "images"
    level: str | None = None
    error: str = "over images"
    level_says: str = ""
    ranked: bool = True


NOISE_VARIANCE = Measure(
    "noise_variance",
    "Variance across noise seeds",
    "mean over pixels that span [−1, 1], between runs from the same x_T with different noise; half of it is the MSE "
    "between two runs on the [0, 1] scale",
    se="noise_variance_se",
    count="noise_images",
    ranked=False,
)

MEASURES = (
    Measure(
        "reconstruction_mse",
        "Reconstruction MSE",
        "held-out images encoded and decoded, a dimension, on the [0, 1] scale",
        se="reconstruction_mse_se",
        count="reconstruction_images",
        level="reconstruction_mse_median",
        level_says="Median over images instead of mean",
    ),
    Measure(
        "consistency_mse",
        "MSE to the reference steps",
        "the same x_T at S steps and at the reference's, a dimension, on the [0, 1] scale",
        se="consistency_mse_se",
        count="compared_images",
        level="unrelated_mse",
        level_says="Two references from different x_T",
    ),
    Measure(
        "feature_distance",
        "Feature distance to the reference steps",
        "the same x_T at S steps and at the reference's, mean Euclidean distance in the feature network",
        se="feature_distance_se",
        count="compared_images",
        level="unrelated_feature_distance",
        level_says="Two references from different x_T",
    ),
    Measure(
        "interpolation_path_length",
        "Path between images",
        "length in pixels of the path that slerp of x_T takes, as a multiple of the straight line; median over lines",
        count="interpolation_lines",
        counted="lines",
        level="lerp_path_length",
        level_says="By lerp of x_T",
        ranked=False,
    ),
    Measure(
        "interpolation_largest_step",
        "Largest step between neighbours",
        "of the path that slerp of x_T takes, as a share of the straight line between its ends; median over lines",
        count="interpolation_lines",
        counted="lines",
        level="lerp_largest_step",
        level_says="By lerp of x_T",
        ranked=False,
    ),
    Measure(
        "midpoint_to_train",
        "Distance of midpoints to the training images",
        "median Euclidean distance of a slerp's midpoint to its nearest training image, pixels in [−1, 1]",
        count="interpolation_lines",
        counted="lines",
        level="crossfade_midpoint_to_train",
        level_says="Of the cross-fade of the two end images",
        ranked=False,
    ),
    Measure(
        "first_prediction_mse",
        "MSE of the first predicted x_0",
        "to the image that the sample becomes, both clamped, a dimension, on the [0, 1] scale",
    ),
    Measure(
        "mse_to_sampler",
        "MSE of DDPM's formula to the sampler",
        "from the same x_T and noise, a dimension, on the [0, 1] scale",
        se="mse_to_sampler_se",
    ),
    Measure(
        "found_fd",
        "Fréchet distance of the timesteps that were found",
        "at noise that the search has not seen; the cell's table has every spacing and the paired differences",
        se="found_fd_se",
        count="found_images",
        level="best_builtin_fd",
        level_says="Of the best built-in spacing at the same NFE",
        error="by the delete-a-group jackknife over groups of samples",
    ),
    Measure(
        "times_diffusers",
        "Times diffusers' pipeline",
        "how many times as long diffusers' DDIMPipeline took for the same weights, steps and batch, in one process; "
        "median over rounds in turns, the cell's table has the intervals and the other peers",
        ranked=False,
    ),
    Measure(
        "one_image_times_diffusers",
        "Times diffusers' pipeline, one image",
        "the same for one image alone: how much sooner it is there",
        ranked=False,
    ),
    Measure(
        "ceiling_share",
        "Share of a matrix product's speed",
        "operations a second of the network at the largest batch, over those of a large square product of the same "
        "precision in the same run",
        ranked=False,
    ),
    Measure(
        "loop_overhead",
        "Loop over forwards alone",
        "time of the walk, its noise included, over that of as many forwards in a row, less 1; median over rounds",
    ),
    Measure(
        "noisy_loop_overhead",
        "Loop with noise over forwards alone",
        "the same of the walk with noise in every step but the last: at η 1 where the cell draws none",
    ),
    Measure(
        "precision_fd_percent",
        "Change of the Fréchet distance against fp32, in percent",
        "the same x_T under this runtime and in fp32 on deterministic kernels; paired",
        se="precision_fd_percent_se",
        count="compared_images",
        error="by the delete-a-group jackknife over groups of samples, paired",
        ranked=False,
    ),
    Measure(
        "precision_mse",
        "MSE to fp32",
        "the same x_T under this runtime and in fp32 on deterministic kernels, a dimension, on the [0, 1] scale",
        se="precision_mse_se",
        count="compared_images",
    ),
    Measure(
        "precision_speedup",
        "Times the speed of fp32",
        "images a second under this runtime over those in fp32 on deterministic kernels",
        ranked=False,
    ),
)


def measures_of(cells: Sequence[Cell]) -> list[Measure]:
    """The measures that any of the cells has a value of."""
    return [measure for measure in MEASURES if any(cell.value(measure.field) is not None for cell in cells)]


def has_noise_variance(cells: Iterable[Cell]) -> bool:
    """Whether there is a comparison to show: several cells have it, and not all are 0."""
    values = [value for cell in cells if (value := cell.value(NOISE_VARIANCE.field)) is not None]
    return len(values) > 1 and max(values) > 0
