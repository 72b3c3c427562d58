"""The report of a sweep: results.csv, table.md, table.tex and report.html from the files that its jobs left.

A pure function of those files: the same files give the same bytes. `python -m ddim_lab.report DIR` rebuilds it.
Nothing here imports torch. The parts, each on top of the ones before:

    sweep      the files, read and checked
    estimates  a straight line, a Pareto front
    rows       one flat row a cell
    measures   what tasks measure beside a Fréchet distance
    series     which cells share a line, a name and a table; paired differences
    compare    several sweeps as one, or why not
    timing     time against network forwards
    text       the paper-shaped tables as Markdown and LaTeX
    charts     Vega-Lite specifications, and the same as PNG
    page       report.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddim_lab.report.rows import csv_text, sweep_rows
from ddim_lab.report.sweep import ReportError, Sweep, read_sweep
from ddim_lab.store import write_text

__all__ = [
    "ReportError",
    "build",
    "build_comparison",
    "curves",
    "rows",
    "static_charts",
    "text_tables",
    "write_figures",
]


def build(sweep_dir: Path) -> Path:
    """Write results.csv, table.md, table.tex and report.html into `sweep_dir`; return the path of report.html.

    Each file is replaced whole or not at all. Numbers come first: a page that can't be built leaves the tables.

    Raises:
        ReportError: if `sweep_dir` holds no usable plan.json, or can't be written to.
    """
    return _build(read_sweep(sweep_dir))


def build_comparison(sweep_dirs: Mapping[str, Path], output: Path) -> Path:
    """Lay sweeps beside each other: the files of `build` in `output`, made if need be; return report.html's path.

    Args:
        sweep_dirs: folders by the name that the report gives each, at least two.
        output: the comparison's folder; its files are replaced.

    Raises:
        ReportError: as `build`, or the sweeps can't be compared; says why.
    """
    from ddim_lab.report.compare import join_sweeps

    joined = join_sweeps({name: read_sweep(folder) for name, folder in sweep_dirs.items()}, output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"the report can't be written into {output}: {error}") from error
    return _build(joined)


def _build(sweep: Sweep) -> Path:
    from ddim_lab.report.page import page
    from ddim_lab.report.series import paper_tables
    from ddim_lab.report.text import latex, markdown

    folder, tables = sweep.folder, paper_tables(sweep)
    try:
        write_text(folder / "results.csv", csv_text(sweep_rows(sweep)))
        write_text(folder / "table.md", markdown(sweep, tables))
        write_text(folder / "table.tex", latex(sweep, tables))
        report = folder / "report.html"
        write_text(report, page(sweep))
    except OSError as error:
        raise ReportError(f"the report can't be written into {folder}: {error}") from error
    return report


def rows(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row a cell in the plan's order, with the columns of results.csv; None where there is no value.

    Raises:
        ReportError: as `build`.
    """
    return sweep_rows(read_sweep(sweep_dir))


def text_tables(sweep_dir: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """The paper-shaped tables of table.md: heading, columns, rows of text with published numbers and differences.

    Raises:
        ReportError: as `build`.
    """
    from ddim_lab.report.series import paper_tables
    from ddim_lab.report.text import plain_table, table_texts

    sweep = read_sweep(sweep_dir)
    return [plain_table(text) for table in paper_tables(sweep) for _, text in table_texts(sweep, table)]


def curves(sweep_dir: Path) -> dict[int, dict[str, float]]:
    """By number of steps, ascending: the Fréchet distance of each series, named "fd/η 0"; with several tables "fd_2/…".

    Raises:
        ReportError: as `build`.
    """
    from ddim_lab.report.series import paper_tables

    found: dict[int, dict[str, float]] = {}
    tables = [table for table in paper_tables(read_sweep(sweep_dir)) if table.metric is not None]
    for index, table in enumerate(tables, start=1):
        for row in table.rows:
            for steps, cell in row.cells.items():
                if steps is not None and cell.fd is not None:
                    name = f"fd{'' if index == 1 else f'_{index}'}/{row.series.label}"
                    found.setdefault(steps, {})[name] = cell.fd
    return dict(sorted(found.items()))


def static_charts(sweep_dir: Path) -> dict[str, bytes]:
    """The report's charts as PNG files, by name: fd_against_steps, fd_against_seconds, time_against_steps, …

    Raises:
        ReportError: as `build`.
    """
    from ddim_lab.report.charts import static_png, sweep_charts

    return {chart.name: static_png(chart) for chart in sweep_charts(read_sweep(sweep_dir))}


def write_figures(sweep_dir: Path, folder: Path) -> list[Path]:
    """The report's charts as SVG files in `folder`, made if need be: NAME.svg for each of `static_charts`.

    Raises:
        ReportError: as `build`, or `folder` can't be written to.
    """
    from ddim_lab.report.charts import static_svg, sweep_charts

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in sweep_charts(read_sweep(sweep_dir)):
            written.append(folder / f"{chart.name}.svg")
            write_text(written[-1], static_svg(chart))
    except OSError as error:
        raise ReportError(f"the figures can't be written into {folder}: {error}") from error
    return written
