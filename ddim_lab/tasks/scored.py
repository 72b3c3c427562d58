"""What is known of N samples before they are made, without torch: the key of their scores, what measuring costs."""

from __future__ import annotations

from typing import Any, Final

from ddim_lab.config.job import Config
from ddim_lab.tasks.base import Job

__all__ = ["AT_MOST", "compared_samples", "compared_with", "measuring_forwards", "timed_again"]

AT_LEAST: Final = 8
AT_MOST: Final = 32
"""First samples, at least and at most, on which determinism is measured, in a batch of their own."""

COMPARED_OF: Final = 15
"""One sample in so many is compared: walked three times at two seeds of the noise, a fifth of the sampling."""


def compared_with(job: Job) -> dict[str, Any]:
    """The part of a cell's key that says how samples are scored: metrics, and digests of what they compare with."""
    from ddim_lab.metrics.references import reference_of

    metrics = job.config.metrics
    # A file of statistics says nothing of the images whose nearest neighbours and equal-N distance are measured, too.
    images = {} if metrics.reference_statistics is None else {"data": job.data.digest, "split": metrics.reference}
    return {
        **metrics.identity(),
        "features": _one_or_all([features.digest for features in job.features]),
        "reference": _one_or_all([reference_of(metrics, features, job.data) for features in job.features]),
        **images,
    }


def _one_or_all(parts: list[str]) -> str | list[str]:
    """What stands in a key for one network, as before there could be several; for several, all in their order."""
    return parts[0] if len(parts) == 1 else parts


def measuring_forwards(config: Config) -> int:
    """Image-forwards of the speed and determinism of `config.num_samples` samples."""
    nfe, batch, compared = config.forwards, config.first_batch, compared_samples(config)
    halves = compared // 2 if compared == batch else 0
    determinism = ((1 + config.metrics.noise_seeds) * compared + halves) * nfe
    return determinism + (batch if timed_again(config) else 0)


def compared_samples(config: Config) -> int:
    """How many of the first samples determinism is measured on."""
    return min(AT_MOST, max(AT_LEAST, config.num_samples // COMPARED_OF), config.first_batch)


def timed_again(config: Config) -> bool:
    """Whether a batch's walk is timed once more: where its own are too few, of one step each, to have a warm one."""
    return config.forwards == 1 and config.num_samples < 2 * config.first_batch
