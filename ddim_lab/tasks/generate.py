"""Task `generate`: sample N images, and measure their quality, the sampler's speed and its determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

from ddim_lab.config.job import Config
from ddim_lab.tasks.base import Job, Outcome, Task

__all__ = ["COMPARED", "FORWARDS_ALONE", "Generate", "compared_with", "measuring_forwards"]

COMPARED: Final = 32
"""First samples, at most, on which determinism is measured, in a batch of their own."""

FORWARDS_ALONE: Final = 20
"""One in so many of a walk's forwards is timed alone, right after each batch's walk."""


@final
class Generate(Task):
    """conf/task/generate: sample, score, time, repeat."""

    scores_samples: ClassVar[bool] = True
    keeps_samples: ClassVar[bool] = True
    on_several_devices: ClassVar[bool] = True

    name: Literal["generate"]

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.nfe

    def measuring_forwards(self, config: Config) -> int:
        return measuring_forwards(config)

    def identity(self, job: Job) -> dict[str, Any]:
        return compared_with(job)

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """As `measure_samples`, with the job's sampler."""
        from ddim_lab.tasks.sampling import measure_samples

        return measure_samples(job, folder, work)

    def finished(self, job: Job, cell: Path) -> Path:
        """Adds samples.npz to a cell that was made without, if it is asked for."""
        if not job.config.save_samples or (cell / "samples.npz").is_file():
            return cell
        from ddim_lab.tasks.sampling import resample

        return resample(job, cell)


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
