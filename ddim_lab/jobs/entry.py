"""Where Hydra enters: its task function, which a launcher's worker imports before it composes.

Hydra wants the function even where no job runs, as for --help: so what a job needs is imported as one starts.
"""

from __future__ import annotations

from omegaconf import DictConfig

from ddim_lab.config.trust import no_schema_warnings

__all__ = ["job"]

no_schema_warnings()


def job(composed: DictConfig) -> None:
    """Hydra's task function: see `ddim_lab.jobs.run.job`."""
    from ddim_lab.jobs import run
    from ddim_lab.jobs.workers import ended_with_its_command

    with ended_with_its_command():
        run.job(composed)
