"""What is known of N samples before they are made, without torch: the key of their scores, what measuring costs."""

from __future__ import annotations

from typing import Any, Final

from ddim_lab.config.job import Config
from ddim_lab.tasks.base import Job

__all__ = ["COMPARED", "FORWARDS_ALONE", "compared_with", "measuring_forwards"]

COMPARED: Final = 32
"""First samples, at most, on which determinism is measured, in a batch of their own."""

FORWARDS_ALONE: Final = 20
"""One in so many of a walk's forwards is timed alone, right after each batch's walk."""


def compared_with(job: Job) -> dict[str, Any]:
    """The part of a cell's key that says how samples are scored: metrics, and digests of what they compare with."""
    from ddim_lab.metrics.references import reference_of

    metrics = job.config.metrics
    # A file of statistics says nothing of the images whose nearest neighbours and equal-N distance are measured, too.
    images = {} if metrics.reference_statistics is None else {"data": job.data.digest, "split": metrics.reference}
    return {
        **metrics.identity(),
        "features": job.features.digest,
        "reference": reference_of(metrics, job.features, job.data),
        **images,
    }


def measuring_forwards(config: Config) -> int:
    """Image-forwards of the speed and determinism of `config.num_samples` samples."""
    count, nfe, batch, metrics = config.num_samples, config.nfe, config.first_batch, config.metrics
    alone = len(range(0, nfe, min(FORWARDS_ALONE, nfe)))
    repeats = max(0, metrics.speed_repeats - max(0, count // batch - 1))
    compared = min(COMPARED, batch)
    halves = compared // 2 if compared == batch else 0
    determinism = ((1 + metrics.noise_seeds) * compared + halves) * nfe
    return count * alone + batch + repeats * batch * (nfe + alone) + determinism
