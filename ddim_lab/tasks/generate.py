"""Task `generate`: sample N images, and measure their quality, the sampler's speed and its determinism."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, final

from ddim_lab.config.job import Config
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.scored import compared_with, measuring_forwards

__all__ = ["Generate"]


@final
class Generate(Task):
    """conf/task/generate: sample, score, time, repeat."""

    scores_samples: ClassVar[bool] = True
    keeps_samples: ClassVar[bool] = True
    on_several_devices: ClassVar[bool] = True
    takes_labels: ClassVar[bool] = True

    name: Literal["generate"]

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.forwards

    def measuring_forwards(self, config: Config) -> int:
        return measuring_forwards(config)

    def identity(self, job: Job) -> dict[str, Any]:
        return compared_with(job)

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """As `measure_samples`, with the job's sampler."""
        from ddim_lab.tasks.measuring import measure_samples

        return measure_samples(job, folder, work)

    def finished(self, job: Job, cell: Path) -> Path:
        """Adds samples.npz to a cell that was made without, if it is asked for."""
        if not job.config.save_samples or (cell / "samples.npz").is_file():
            return cell
        from ddim_lab.tasks.samples_file import resample

        return resample(job, cell)
