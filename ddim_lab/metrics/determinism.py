"""Does the same start give the same image? Repeats, batch splits, and the spread over noise seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.store.records import Value

__all__ = ["ImagesHash", "max_abs_diff", "nhwc", "noise_variance"]


def max_abs_diff(runs: Sequence[Tensor]) -> float:
    """Largest |difference| of any element between the first run and the others; exactly 0 if bitwise equal."""
    first = runs[0]
    return max((float((run - first).abs().max()) for run in runs[1:]), default=0.0)


def noise_variance(runs: Sequence[Tensor]) -> Tensor:
    """Unbiased variance across runs [B, ...] that share x_T but not the noise: mean over elements, float64 [B].

    Computed from differences to the first run, so that runs that agree bitwise give exactly 0.
    """
    differences = torch.stack([(run - runs[0]).double() for run in runs])
    return differences.var(dim=0).flatten(1).mean(1)


def nhwc(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 images [B, C, H, W] as samples.npz holds them: [B, H, W, C]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images, got {images.dtype}")
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@final
class ImagesHash:
    """SHA-256 of uint8 images as bytes in NHWC order (`nhwc`), batch by batch."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, images: Tensor) -> None:
        """Add the next images, [B, C, H, W]."""
        self._sha256.update(nhwc(images).tobytes())

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._sha256.hexdigest()


# -- what is told of it ----------------------------------------------------------------------------------

REPEATS: Final = (
    "The same x_T sampled twice, and in batches of two sizes: differences of the final state, in which images "
    "span [−1, 1]. Variance: over noise seeds at fixed x_T, ± its standard error over images where that was taken; "
    "at η 0 nothing is drawn, but by the analytic variance, so it must be exactly 0."
)


def determinism_values(found: Mapping[str, Any]) -> list[Value]:
    """What repeats differ by, and the variance that noise brings, as a report shows them.

    Args:
        found: `images` that it was tested on; `repeat_max_abs_diff`, `repeat_identical`; `batch_max_abs_diff` of two
            `batch_sizes`, None where there are no two; `noise_variance` with `noise_variance_se`, over `noise_seeds`
            and `noise_images`; `sha256` of all samples.
    """
    sizes = found["batch_sizes"]
    notes = (REPEATS, f"The two batch sizes: {' and '.join(map(str, sizes))}.") if sizes else (REPEATS,)
    repeats: dict[str, Any] = {"section": "Determinism", "table": "Repeats and batch sizes", "notes": notes}
    variance = found["noise_variance"]
    return [
        Value(
            name="repeat_max_abs_diff",
            value=found["repeat_max_abs_diff"],
            column="same x_T twice: max |difference|",
            **repeats,
        ),
        Value(name="repeat_identical", value=found["repeat_identical"], column="bitwise equal", **repeats),
        Value(
            name="batch_max_abs_diff",
            value=found["batch_max_abs_diff"],
            column="two batch sizes: max |difference|",
            **repeats,
        ),
        Value(
            name="noise_variance",
            value=variance,
            heading="Variance across noise seeds",
            facts="mean over pixels that span [−1, 1], between runs from the same x_T with different noise; half of it "
            "is the MSE between two runs on the [0, 1] scale",
            column="variance across noise seeds",
            against="eta",
            se=found["noise_variance_se"],
            error="over images",
            count=found["noise_images"],
            **repeats,
        ),
        Value(name="sha256", value=found["sha256"], column="SHA-256 of all samples", **repeats),
        Value(name="determinism_images", value=found["images"], column="tested on images", **repeats),
        Value(name="noise_seeds", value=found["noise_seeds"]),
        Value(name="noise_images", value=found["noise_images"]),
        # two runs differ by twice the variance; images on [0, 1] have a quarter of it
        Value(name="noise_mse", value=variance / 2),
    ]
