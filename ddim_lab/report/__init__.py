"""The report of a sweep: results.csv, table.md, table.tex and report.html from the files that its jobs left.

A pure function of those files: the same files give the same bytes. `python -m ddim_lab.report DIR` rebuilds it.
The files are read once, into a `Sweep`, which everything else is a function of. No task and no metric is known here:
what there is to show says of itself how (`ddim_lab.store.records.Value`). Nothing imports torch. The parts, each on top
of the ones before:

    cells      one planned job and what became of it
    series     which cells share a line, a name and a table
    numbers    numbers as texts
    timing     time against network forwards; which points nothing beats
    published  published numbers beside ours
    tables     the values in the paper's shape
    together   which of them are compared, and their differences
    findings   which differences are settled, in words
    seeds      their mean and spread over seeds
    read       the files, read and checked
    compare    several sweeps as one, or why not
    rows       one flat row a cell
    vega       pieces of Vega-Lite specifications
    charts     charts of values, times and trainings
    drawing    charts as PNG and SVG
    blocks     what a page is made of
    grids      values as grids of the page
    sections   the page's sections
    page       report.html
    files      all files of a report
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ddim_lab.report.read import ReportError, Sweep, read_sweep
from ddim_lab.report.rows import sweep_rows as rows
from ddim_lab.store import write_text

__all__ = [
    "ReportError",
    "Sweep",
    "build",
    "build_comparison",
    "console_text",
    "curves",
    "read_sweep",
    "rows",
    "static_charts",
    "text_tables",
    "write",
    "write_figures",
]


def write(sweep: Sweep) -> Path:
    """Write results.csv, table.md, table.tex and report.html into the sweep's folder; return report.html's path.

    Each file is replaced whole or not at all. Numbers come first: a page that can't be built leaves the tables.

    Raises:
        ReportError: the folder can't be made or written to.
    """
    from ddim_lab.report.files import write_files

    return write_files(sweep)


def build(sweep_dir: Path) -> Path:
    """`write` the report of the sweep in a folder.

    Raises:
        ReportError: if `sweep_dir` holds no usable plan.json, or can't be written to.
    """
    return write(read_sweep(sweep_dir))


def build_comparison(sweep_dirs: Mapping[str, Path], output: Path) -> Path:
    """Lay sweeps beside each other: the files of `write` in `output`, made if need be; return report.html's path.

    Args:
        sweep_dirs: folders by the name that the report gives each, at least two.
        output: the comparison's folder; its files are replaced.

    Raises:
        ReportError: as `build`, or the sweeps can't be compared; says why.
    """
    from ddim_lab.report.compare import join_sweeps

    return write(join_sweeps({name: read_sweep(folder) for name, folder in sweep_dirs.items()}, output))


def text_tables(sweep: Sweep) -> list[tuple[str, list[str], list[list[str]]]]:
    """The paper-shaped tables of table.md: heading, columns, rows of text with published numbers and differences."""
    from ddim_lab.report.files import plain_table, texts_of

    return [plain_table(text) for text in texts_of(sweep)]


def console_text(sweep: Sweep) -> str:
    """What a sweep ends in on the console: the tables of table.md, and the findings last, where the eye is."""
    from ddim_lab.report.files import for_console

    return for_console(sweep)


def curves(sweep: Sweep) -> dict[int, dict[str, float]]:
    """By number of steps, ascending: the values of each series as "<value>/η 0"; of a second table "<value>_2/…"."""
    found: dict[int, dict[str, float]] = {}
    seen: list[str] = []
    for values in (values for _, shown in sweep.shown for values in shown if not values.value.section):
        name = values.value.name
        seen.append(name)
        name += "" if seen.count(name) == 1 else f"_{seen.count(name)}"
        for row in values.table.rows:
            for steps, cell in row.cells.items():
                if steps is not None and (value := values.number_of(cell)) is not None:
                    found.setdefault(steps, {})[f"{name}/{row.series.label}"] = value
    return dict(sorted(found.items()))


def static_charts(sweep: Sweep) -> dict[str, bytes]:
    """The report's charts as PNG files, by name: <value>_against_steps, time_against_steps, training_curve, …"""
    from ddim_lab.report.charts import sweep_charts
    from ddim_lab.report.drawing import static_png

    return {chart.name: static_png(chart) for chart in sweep_charts(sweep)}


def write_figures(sweep: Sweep, folder: Path) -> list[Path]:
    """The report's charts as SVG files in `folder`, made if need be: NAME.svg for each of `static_charts`.

    Raises:
        ReportError: `folder` can't be written to.
    """
    from ddim_lab.report.charts import sweep_charts
    from ddim_lab.report.drawing import static_svg

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in sweep_charts(sweep):
            written.append(folder / f"{chart.name}.svg")
            write_text(written[-1], static_svg(chart))
    except OSError as error:
        raise ReportError(f"the figures can't be written into {folder}: {error}") from error
    return written
