"""The sections of a page, in order: what is settled, measured and seen, what it cost, and how to do it again.

Measured values choose their section by its title (`ddim_lab.store.records.Value`), "" for the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddim_lab.errors import one_line
from ddim_lab.report.blocks import Block, Box, Figure, Folds, Grid, Points, Prose, Section, Strip
from ddim_lab.report.charts import Chart
from ddim_lab.report.grids import column_grids, difference_grids, findings_grid, fit_grid, text_grid
from ddim_lab.report.numbers import DASH, exact
from ddim_lab.report.pictures import Embedded, embed
from ddim_lab.report.read import Sweep, kept_samples
from ddim_lab.report.rows import columns_of, sweep_rows
from ddim_lab.report.seeds import over_seeds
from ddim_lab.report.tables import ValueTable, elsewhere_text, time_text, value_text
from ddim_lab.store.records import Tabled

PREVIEW_BUDGET = 1_500_000
TASK_PICTURE_BUDGET = 1_500_000
KEPT = (
    "All samples of a cell: arr_0, uint8, NHWC; paths from this report's folder. Scored again, in any features: "
    "python -m ddim_lab.score PATH data=..."
)


def sections(sweep: Sweep, charts: Sequence[Chart]) -> list[Section]:
    """Every section that the sweep has something for."""
    titles = dict.fromkeys(
        value.section for cell in sweep.cells for value in cell.values.values() if value.column or value.heading
    )
    found = [
        _sweeps(sweep),
        _findings(sweep),
        _results(sweep, charts),
        _samples(sweep),
        *(_measured(sweep, charts, title) for title in titles if title),
        _tasks(sweep, charts),
        _cost(charts),
        _recipes(sweep),
        _environment(sweep),
    ]
    return [section for section in found if section.blocks]


def _section(title: str, blocks: Sequence[Block]) -> Section:
    return Section(re.sub(r"\W+", "-", title.casefold()), title, tuple(blocks))


def _sweeps(sweep: Sweep) -> Section:
    """Of a comparison: which sweeps stand beside each other, and what they were."""

    def told(of: Sweep, *path: str) -> str:
        found = (cell.recipe(*path) for cell in of.cells)
        return ", ".join(dict.fromkeys(str(value)[:60] for value in found if value is not None)) or DASH

    rows = tuple(
        (
            Box(name, head=True),
            Box(of.title),
            Box(", ".join(dict.fromkeys(str(cell.labels.get("model")) for cell in of.cells))),
            Box(", ".join(dict.fromkeys(text[:12] for text in told(of, "model", "digest").split(", "))), code=True),
            Box(f"{told(of, 'runtime', 'device_name')}, {told(of, 'runtime', 'precision')}"),
            Box(_commit(of.plan.environment)[:12], code=True),
            Box(of.plan.created),
            Box(one_line(of.plan.command), code=True),
        )
        for name, of in sweep.members.items()
    )
    columns = ("", "title", "model", "weights", "device", "commit", "started", "command")
    return _section("Sweeps", [Grid("", columns, rows, wide=True)] if rows else [])


# -- what is settled ------------------------------------------------------------------------------------


def _findings(sweep: Sweep) -> Section:
    """What the comparisons settle in words, and each with its numbers behind that."""
    if not sweep.findings:
        return _section("Findings", [])
    parts = [Points(part.title, part.lines) for part in sweep.findings.parts]
    return _section("Findings", [Prose(sweep.findings.summary), *parts, findings_grid(sweep.findings)])


# -- what was measured ----------------------------------------------------------------------------------


def _results(sweep: Sweep, charts: Sequence[Chart]) -> Section:
    """The paper-shaped tables, and for each its charts, its paired differences and what stands beside it."""
    blocks: list[Block] = []
    for table, found in sweep.shown:
        if not found:
            blocks.append(text_grid(time_text(table)))
        shown = [values for values in found if not values.value.section]
        named = [values.value.name for values in shown]
        for at, values in enumerate(shown):
            blocks += _value_blocks(sweep, charts, values)
            if named[at] not in named[:at]:
                blocks += column_grids(sweep, table.cells, "", values.facts, under=named[at], first=at == 0)
        if not shown:
            blocks += column_grids(sweep, table.cells, "")
    blocks += [text_grid(elsewhere_text(each)) for each in sweep.plan.elsewhere]
    return _section("Results", blocks)


def _value_blocks(sweep: Sweep, charts: Sequence[Chart], values: ValueTable) -> Iterator[Block]:
    yield text_grid(value_text(sweep.plan.published, values))
    if (seeds := over_seeds(values)) is not None:
        yield text_grid(seeds)
    yield from (Figure(chart) for chart in charts if chart.of is values)
    yield from difference_grids(values, sweep.findings)


def _measured(sweep: Sweep, charts: Sequence[Chart], title: str) -> Section:
    """A section that values chose: those with a heading first, then the tables with a row a cell."""
    blocks: list[Block] = []
    own = [value for cell in sweep.cells for value in cell.values.values() if value.section == title]
    if any(cell.time in own for cell in sweep.cells if cell.time):
        blocks += [Figure(chart) for chart in charts if chart.name == "time_against_steps"]
        if (fits := fit_grid(sweep)) is not None:
            blocks.append(fits)
    for _, found in sweep.shown:
        for values in found:
            if values.value.section == title:
                blocks += _value_blocks(sweep, charts, values)
    return _section(title, [*blocks, *column_grids(sweep, sweep.cells, title)])


def _samples(sweep: Sweep) -> Section:
    """One row of samples a cell, the same x_T down the columns; then the files of cells that kept all of them."""
    blocks: list[Block] = []
    files = [(cell, cell.folder / "preview.png") for cell in sweep.by_series if cell.folder is not None]
    files = [(cell, file) for cell, file in files if file.exists()]
    if files:
        pictures = embed([file for _, file in files], PREVIEW_BUDGET)
        groups: dict[tuple[str, str], list[tuple[str, Embedded | None, str]]] = {}
        for (cell, _), picture in zip(files, pictures, strict=True):
            group = str(cell.labels.get("data")), str(cell.labels.get("seed"))
            groups.setdefault(group, []).append((sweep.names[cell.number], picture, ""))
        text = "The first images of each cell. A column is one sample: it starts from the same noise x_T in every row."
        if any(picture and picture.reduced for picture in pictures):
            text += " Compressed to keep this page small; preview.png in each cell's folder is exact."
        blocks.append(Prose(text))
        for (data, seed), found in groups.items():
            blocks.append(Strip(f"{data}, seed {seed}" if len(groups) > 1 else "", tuple(found)))
    if kept := kept_samples(sweep):
        links = {number: f"./{quote(path)}" for number, path in kept.items()}  # "./": no path may name a scheme
        rows = tuple(
            (Box(sweep.names[number], head=True), Box(path, code=True, link=links[number]))
            for number, path in kept.items()
        )
        blocks.append(Grid("Images that were kept", ("", "samples.npz"), rows, notes=(KEPT,), wide=True))
    return _section("Samples", blocks)


def _tasks(sweep: Sweep, charts: Sequence[Chart]) -> Section:
    """Tables and pictures that tasks added to their cells, those of one title together."""
    tables: dict[tuple[str, tuple[str, ...]], list[tuple[str, Tabled]]] = {}
    pictures: dict[str, list[tuple[str, Path, str]]] = {}
    for cell in sweep.by_series:
        name = sweep.names[cell.number]
        for table in cell.result.tables if cell.result else ():
            tables.setdefault((table.title, table.columns), []).append((name, table))
        for picture in cell.result.pictures if cell.result else ():
            if cell.folder is not None and Path(picture.file).name == picture.file:  # beside result.json, nowhere else
                pictures.setdefault(picture.title, []).append((name, cell.folder / picture.file, picture.caption))
    blocks: list[Block] = []
    drawn = dict.fromkeys(chart.table for chart in charts if chart.table is not None)
    for (title, columns), tabled in tables.items():
        if title in drawn:  # once, where tables of one title have other columns
            del drawn[title]
            blocks += [Figure(chart) for chart in charts if chart.table == title]
        blocks.append(_task_grid(title, columns, tabled))
    files = [path for found in pictures.values() for _, path, _ in found]
    embedded = dict(zip(files, embed(files, TASK_PICTURE_BUDGET), strict=True))
    blocks += [
        Strip(title, tuple((name, embedded[path], caption) for name, path, caption in found))
        for title, found in pictures.items()
    ]
    return _section("Task results", blocks)


def _task_grid(title: str, columns: tuple[str, ...], found: Sequence[tuple[str, Tabled]]) -> Grid:
    """The tables of one title under one heading; the cell's name leads its first row where there are several cells."""
    several = len(found) > 1
    rows = []
    for name, table in found:
        for index, values in enumerate(table.rows):
            boxes = tuple(Box(_shown(value), exact=exact(value)) for value in values)
            rows.append((Box(name if index == 0 else "", head=True), *boxes) if several else boxes)
    facts = "" if several else found[0][0]
    return Grid(title, ("", *columns) if several else columns, tuple(rows), facts=facts)


def _shown(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.5g}".replace("-", "−") if isinstance(value, float) else str(value)


# -- what it cost, how to do it again -------------------------------------------------------------------


def _cost(charts: Sequence[Chart]) -> Section:
    """The training curve, and where the time went."""
    names = "training_curve", "time_per_phase"
    return _section("Training and cost", [Figure(chart) for chart in charts if chart.name in names])


def _recipes(sweep: Sweep) -> Section:
    """Each cell's full recipe, one click away, and every number of results.csv."""
    items = []
    for cell in sweep.cells:
        lines = [f"overrides: {' '.join(cell.plan.overrides) or 'none'}", f"status: {cell.status}"]
        if cell.error:
            lines.append(f"error: {cell.error}")
        if cell.key:
            lines.append(f"cell: {cell.key}")
        text = "\n".join(lines)
        if cell.result:
            text += "\nrecipe: " + pretty(cell.result.recipe)
        items.append((f"{sweep.names[cell.number]}{'' if cell.status == 'done' else f' ({cell.status})'}", text))
    columns = columns_of(sweep)
    rows = []
    for cell, row in zip(sweep.cells, sweep_rows(sweep), strict=True):
        boxes = (Box(exact(row[n]), exact=exact(row[n]), field=n, cell=cell.number) for n in columns)
        rows.append((Box(sweep.names[cell.number], head=True), *boxes))
    numbers = Grid("Every number, as in results.csv", ("", *columns), tuple(rows), wide=True, folded=True)
    return _section("Recipes", [Folds(tuple(items)), numbers])


def pretty(value: Any, indent: int = 0) -> str:
    """JSON for reading: objects one entry a line, lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = "  " * (indent + 1)
    entries = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {pretty(v, indent + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(entries) + "\n" + "  " * indent + "}"


def _environment(sweep: Sweep) -> Section:
    """Versions, commit, and what the standard errors cover."""
    here = sweep.plan.environment
    facts = [(name, value) for name, value in here.items() if name not in ("git_commit", "git_dirty", "packages")]
    facts.append(("git commit", _commit(here)))
    commits = {_commit(c.result.environment) for c in sweep.cells if c.result and c.result.environment}
    if commits - {_commit(here)}:
        facts.append(("cells computed at commit", ", ".join(sorted(commits))))
    packages: dict[str, set[str]] = {}
    for cell in sweep.cells:
        found = cell.result.environment.get("packages") if cell.result else None
        for name, version in found.items() if isinstance(found, dict) else ():
            packages.setdefault(str(name), set()).add(str(version))
    facts += [(name, ", ".join(sorted(versions))) for name, versions in sorted(packages.items()) if name not in here]
    rows = tuple((Box(str(name), head=True), Box(DASH if v is None else str(v), code=True)) for name, v in facts)
    errors = dict.fromkeys(
        value.error for cell in sweep.cells for value in cell.values.values() if value.replicates and value.error
    )
    told = [Prose(f"± is one standard error {error}.", wide=False) for error in errors]
    return _section("Environment", [Grid("", ("", ""), rows), *told])


def _commit(environment: Mapping[str, Any]) -> str:
    commit, dirty = environment.get("git_commit"), environment.get("git_dirty")
    if not commit:
        return "not in a git checkout"
    return f"{commit}{' with uncommitted changes' if dirty else ', clean' if dirty is False else ''}"
