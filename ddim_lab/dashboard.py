"""`python -m ddim_lab.dashboard ENTITY/PROJECT`: a saved workspace and a W&B Report over a project's runs.

Both show the same panels: quality over steps, quality against time, time against forwards, determinism, samples and
training. Needs an account and `pip install 'ddim-lab[dashboard]'`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from ddim_lab.errors import ConfigError, exit_status, one_line
from ddim_lab.jobs.tracking import check_mode, logged_in

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

__all__ = ["Part", "main", "parts", "report", "workspace"]

NAME = "ddim_lab: samplers compared"
ROW = "row"
"""The config entry that names a run's row of the paper's table: η 0, η 0.5, σ̂."""


@final
@dataclass(frozen=True)
class Part:
    """A section of the workspace and of the report.

    Attributes:
        name: its heading.
        text: what it shows, in a sentence.
        job_type: of the runs that it shows.
        panels: of wandb_workspaces.
    """

    name: str
    text: str
    job_type: str
    panels: tuple[Any, ...]


def parts() -> list[Part]:
    """The panels, section by section."""
    import wandb_workspaces.reports.v2 as wr

    row = wr.Config(ROW)

    def over_steps(title: str, metric: str, unit: str, *, log_y: bool = True) -> Any:
        """One line a row of the table: the mean over its runs at each S, and their range."""
        return wr.LinePlot(
            title=title,
            x=wr.Metric("steps"),
            y=[wr.Metric(metric)],
            log_x=True,
            log_y=log_y,
            title_x="steps S",
            title_y=unit,
            groupby=row,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            legend_template="${config:row}",
        )

    def scatter(title: str, x: str, y: str, *, log: bool) -> Any:
        return wr.ScatterPlot(
            title=title,
            x=wr.SummaryMetric(x),
            y=wr.SummaryMetric(y),
            log_x=log,
            log_y=log,
            legend_template="${config:row}, S = ${config:steps}",
        )

    return [
        Part(
            "Quality",
            "The Fréchet distance over the number of steps, one line a row of the paper's table, and against the time.",
            "cell",
            (
                over_steps("FD over steps, by eta", "fd", "FD"),
                scatter("FD against seconds an image", "seconds_per_image", "fd", log=True),
                over_steps("Standard error of FD", "fd_se", "FD"),
            ),
        ),
        Part(
            "Speed",
            "Sampling time alone, synchronised; linear in the number of network forwards.",
            "cell",
            (
                scatter("Seconds an image against forwards", "nfe", "seconds_per_image", log=False),
                over_steps("Images a second over steps", "images_per_second", "images/s"),
            ),
        ),
        Part(
            "Determinism",
            "Variance between runs from the same x_T with other noise, exactly 0 at eta 0, and repeats of one run.",
            "cell",
            (
                over_steps("Variance across noise seeds", "noise_variance", "variance", log_y=False),
                over_steps("Largest difference of a repeat", "repeat_max_abs_diff", "|difference|", log_y=False),
            ),
        ),
        Part(
            "Samples",
            "The first images of each cell; image i starts from the same x_T in every cell.",
            "cell",
            (wr.MediaBrowser(title="Samples", media_keys=["samples"], num_columns=1),),
        ),
        Part(
            "Training",
            "The loss of the eps-model that the cells share.",
            "train",
            (wr.LinePlot(title="Loss", x=wr.Metric("trainer/global_step"), y=[wr.Metric("loss")], log_y=True),),
        ),
        Part(
            "Sweeps",
            "Each sweep's summary run: the paper-shaped table, every number, and the whole report.",
            "report",
            (
                wr.WeavePanelSummaryTable(table_name="results"),
                wr.MediaBrowser(title="Report", media_keys=["report"], num_columns=1),
            ),
        ),
    ]


def workspace(entity: str, project: str) -> Workspace:
    """The saved workspace, not saved yet."""
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=part.name, panels=list(part.panels), is_open=True) for part in parts()]
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def report(entity: str, project: str) -> Report:
    """The W&B Report, not saved yet: each part with the runs of its job type."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents()]
    for part in parts():
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=f"{part.job_type} runs",
            filters=[expr.Metric("JobType") == part.job_type],
        )
        blocks += [wr.H1(part.name), wr.P(part.text), wr.PanelGrid(runsets=[runs], panels=list(part.panels))]
    return wr.Report(entity=entity, project=project, title=NAME, description="", blocks=blocks, width="fluid")


def main(arguments: Sequence[str] | None = None) -> int:
    """Save both, print their addresses; return the exit status: 2 where they can't be built here, 1 where W&B fails."""
    parser = argparse.ArgumentParser(
        prog="python -m ddim_lab.dashboard",
        description="Save a workspace and a report over the runs of a W&B project, with their panels in place.",
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="as in logger.entity and logger.project")
    asked = parser.parse_args(arguments)
    return exit_status(lambda: _main(asked.project))


def _main(asked: str) -> int:
    found = re.fullmatch(r"([\w.-]+)/([\w.-]+)", asked)
    if found is None:
        raise ConfigError(f"{asked} is no ENTITY/PROJECT, as in somebody/ddim_lab")
    try:
        import wandb_workspaces  # noqa: F401  # an extra
    except ImportError:
        raise ConfigError("wandb-workspaces is not installed: pip install 'ddim-lab[dashboard]'") from None
    check_mode("auto")
    if not logged_in():
        raise ConfigError("nobody is logged in to W&B: run `wandb login` first; a sweep's report.html needs no account")
    try:
        for made in (workspace(*found.groups()), report(*found.groups())):
            print(made.save().url)
    except Exception as error:
        raise RuntimeError(f"W&B did not take it: {one_line(error)[:300]}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
