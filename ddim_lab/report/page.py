"""report.html: one self-contained file, made of sections, each a list of blocks.

A new task adds what it has to show by adding a function to SECTIONS; it returns a Section, or None where the sweep
has nothing for it. Text goes through the template's escaping, charts through `script_json`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from ddim_lab.errors import one_line
from ddim_lab.report.charts import Chart, page_spec, sweep_charts
from ddim_lab.report.measures import NOISE_VARIANCE, has_noise_variance, measures_of
from ddim_lab.report.pictures import Embedded, embed
from ddim_lab.report.rows import COLUMNS, cell_row, exact
from ddim_lab.report.series import PaperTable, Series, kept_samples, name_cells, name_series, neighbours, paper_tables
from ddim_lab.report.sweep import Cell, Sweep, TaskTable
from ddim_lab.report.text import (
    DASH,
    KEPT,
    STANDARD_ERROR,
    Entry,
    TextTable,
    decimals,
    equal_n_text,
    measure_text,
    metric_facts,
    number,
    over_training_seeds,
    paper_text,
    steps_text,
)
from ddim_lab.report.timing import conditions, contended, timing_fits

HERE = Path(__file__).parent
PREVIEW_BUDGET = 1_500_000
TASK_PICTURE_BUDGET = 1_500_000


@dataclass(frozen=True)
class Box:
    """One place of a grid. `exact` is the value as results.csv has it, under the name `field` of cell `cell`.

    `link` is a file's path, relative to the report's folder.
    """

    text: str
    error: str = ""
    exact: str | None = None
    field: str | None = None
    cell: int | None = None
    under: tuple[str, ...] = ()
    tint: str | None = None
    strength: float = 0.0
    mark: int | None = None
    head: bool = False
    code: bool = False
    link: str | None = None


@dataclass(frozen=True)
class Grid:
    """A table with a heading, and notes under it."""

    kind: ClassVar[str] = "grid"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Box, ...], ...]
    facts: str = ""
    footnotes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    wide: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str
    wide: bool = True


@dataclass(frozen=True)
class Figure:
    """A chart that the page's script draws."""

    kind: ClassVar[str] = "figure"
    chart: Chart
    wide: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures one under another, each with its label, at the same width."""

    kind: ClassVar[str] = "strip"
    title: str
    pictures: tuple[tuple[str, Embedded | None, str], ...]
    wide: bool = True


@dataclass(frozen=True)
class Folds:
    """Texts one click away: (summary, text)."""

    kind: ClassVar[str] = "folds"
    items: tuple[tuple[str, str], ...]
    wide: bool = True


Block = Grid | Prose | Figure | Strip | Folds


@dataclass(frozen=True)
class Section:
    """A part of the page, with a heading that the contents link to."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Content:
    """What the sections draw on, computed once."""

    sweep: Sweep
    tables: tuple[PaperTable, ...]
    charts: tuple[Chart, ...]
    series: dict[int, Series]
    names: dict[int, str]

    def charts_of(self, *names: str, table: PaperTable | None = None) -> list[Block]:
        """The charts whose name begins as one of `names`, of `table` if given."""
        return [
            Figure(chart)
            for chart in self.charts
            if chart.name.startswith(names) and (table is None or chart.table == table)
        ]


def content(sweep: Sweep) -> Content:
    """Name, arrange and draw what the sweep left."""
    series = name_series(sweep.cells)
    return Content(
        sweep=sweep,
        tables=tuple(paper_tables(sweep)),
        charts=tuple(sweep_charts(sweep)),
        series=series,
        names=name_cells(sweep.cells, series),
    )


def page(sweep: Sweep) -> str:
    """The whole report as HTML."""
    everything = content(sweep)
    sections = [section for make in SECTIONS if (section := make(everything)) is not None]
    return _template().render(
        title=sweep.title,
        command=one_line(sweep.plan.command),
        created=sweep.plan.created,
        summary=summary(everything),
        failures=[(everything.names[c.number], c.status, c.error) for c in sweep.cells if c.error is not None],
        plan_notes=sweep.plan.notes,
        sections=sections,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        specs=script_json({chart.name: page_spec(chart) for chart in everything.charts}),
        library=_chart_library() if everything.charts else "",
        code=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


@functools.cache
def _chart_library() -> Markup:
    """Vega, Vega-Lite and vega-embed as one script of 0.9 MB, bundled once a process (1.5 s)."""
    from vl_convert import javascript_bundle

    script: str = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in script.lower() or "<!--" in script:
        raise AssertionError("the chart library can't stand inside a script element as it is")
    return Markup(script)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def script_json(value: Any) -> Markup:
    """JSON that nothing inside can break out of: it holds no "<", ">" or "&" (WHATWG HTML, 4.12.1.3)."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


# What was run


def summary(content: Content) -> str:
    """One paragraph: how many cells of what, on what model, data and machine, and how they ended."""
    cells = content.sweep.cells
    done = [cell for cell in cells if cell.status == "done"]

    def values(name: str) -> list[Any]:
        return list(dict.fromkeys(v for c in cells if (v := c.plan.labels.get(name)) is not None))

    def recipe(*path: str) -> list[Any]:
        found = (c.result.recipe_value(*path) for c in done if c.result)
        return list(dict.fromkeys(v for v in found if isinstance(v, str | int | float)))

    series = sorted(set(content.series.values()), key=lambda s: s.index)
    parts = [f"{_count(len(cells), 'cell')}: {_listed(s.label for s in series)}"]
    if steps := sorted(values("steps")):
        parts[0] += f"; {_listed(map(str, steps))} steps"
    if values("spacing"):
        parts[0] += f"; spacing {_listed(map(str, values('spacing')))}"
    model = f"Data: {_listed(map(str, values('data'))) or 'not said'}. Model: {_listed(map(str, values('model')))}"
    extra = [f"{p:,} parameters" for p in recipe("model", "parameters")]
    extra += [f"{'EMA' if w == 'ema' else w} weights" for w in recipe("model", "weights")]
    extra += [f"training seed {s}" for s in recipe("model", "training_seed")]
    parts.append(model + (f" ({', '.join(extra)})" if extra else ""))
    if counts := values("num_samples"):
        text = f"{_listed(f'{n:,}' for n in counts)} samples a cell"
        if batches := values("batch_size"):
            text += f", in batches of {_listed(map(str, batches))}"
        if seeds := values("seed"):
            text += f", seed {_listed(map(str, seeds))}"
        if any(cell.plan.task != "reconstruct" for cell in cells):
            text += ": sample i starts from the same noise x_T in every cell of a seed"
        parts.append(text)
    if devices := recipe("runtime", "device_name") or recipe("runtime", "device"):
        compiled = [", compiled" if c.result and c.result.recipe_value("runtime", "compile") else "" for c in done]
        arithmetic = (c.result.recipe_value("runtime", "precision") if c.result else None for c in done)
        said = dict.fromkeys(f"{name}{how}" for name, how in zip(arithmetic, compiled, strict=True) if name)
        parts.append(f"On {_listed(map(str, devices))}, {_listed(said)}")
    cached = sum(1 for c in done if c.pointer and c.pointer.cached)
    outcome = f"{len(done)} of {len(cells)} done"
    if cached:
        outcome += f", {cached} of them found in the store"
    if seconds := math.fsum(c.pointer.seconds for c in cells if c.pointer and c.pointer.seconds):
        outcome += f"; the jobs took {_duration(seconds)}"
    parts.append(outcome)
    return ". ".join(parts) + "."


def _listed(texts: Iterable[str]) -> str:
    items = list(texts)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# Sections


def sweeps_section(content: Content) -> Section | None:
    """Of a comparison: which sweeps stand beside each other, and what they were."""
    members = content.sweep.members
    if not members:
        return None

    def told(sweep: Sweep, *path: str) -> str:
        found = (cell.result.recipe_value(*path) for cell in sweep.cells if cell.result)
        return ", ".join(dict.fromkeys(str(value)[:60] for value in found if value is not None)) or DASH

    rows = tuple(
        (
            Box(name, head=True),
            Box(sweep.title),
            Box(", ".join(dict.fromkeys(str(cell.plan.labels.get("model")) for cell in sweep.cells))),
            Box(", ".join(dict.fromkeys(text[:12] for text in told(sweep, "model", "digest").split(", "))), code=True),
            Box(f"{told(sweep, 'runtime', 'device_name')}, {told(sweep, 'runtime', 'precision')}"),
            Box(_commit(sweep.plan.environment)[:12], code=True),
            Box(sweep.plan.created),
            Box(one_line(sweep.plan.command), code=True),
        )
        for name, sweep in members.items()
    )
    columns = ("", "title", "model", "weights", "device", "commit", "started", "command")
    return Section("sweeps", "Sweeps", (Grid("", columns, rows, wide=True),))


def results_section(content: Content) -> Section | None:
    """The paper-shaped tables, and for each its charts and paired differences; then what its tasks measured."""
    blocks: list[Block] = []
    for table in content.tables:
        measures = measures_of(table.cells)
        if table.metric is not None or not measures:
            blocks.append(_text_grid(paper_text(content.sweep, table), table, field=table.measure))
        if (beside := equal_n_text(table)) is not None:
            blocks.append(_text_grid(beside, table, field="fd_at_equal_n"))
        if (seeds := over_training_seeds(table)) is not None:
            blocks.append(_text_grid(seeds, replace(table, rows=()), field="fd"))
        if table.metric is not None:
            blocks += content.charts_of("fd_against", table=table)
        if (differences := _difference_grid(table)) is not None:
            blocks.append(differences)
        if (others := _others_grid(content, table)) is not None:
            blocks.append(others)
        for measure in measures:
            text = measure_text(content.sweep, table, measure)
            blocks.append(_text_grid(text, table, field=measure.field, ranked=measure.ranked))
            blocks += content.charts_of(f"{measure.field}_against", table=table)
    return Section("results", "Results", tuple(blocks)) if blocks else None


def _text_grid(text: TextTable, table: PaperTable, *, field: str, ranked: bool = True) -> Grid:
    """A text table as boxes, tinted by the distance from the published numbers if there are any to compare with.

    Without them by value, if `ranked`.
    """
    distance = any(e and e.difference is not None for _, entries in text.rows for e in entries)
    footnotes = text.footnotes()
    values = [e.value for _, entries in text.rows for e in entries if e and e.value is not None and e.value > 0]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)

    def tint(entry: Entry) -> tuple[str | None, float]:
        if entry.value is None or entry.value <= 0:
            return None, 0.0
        if distance:
            if entry.difference is None or entry.paper is None or entry.paper <= 0:
                return None, 0.0
            return "far", min(1.0, abs(math.log2(entry.value / entry.paper)))
        if high <= low or not ranked:
            return None, 0.0
        return "best", 1.0 - math.log(entry.value / low) / math.log(high / low)

    def box(entry: Entry | None, cell: Cell | None) -> Box:
        if entry is None:
            return Box("")
        under = [] if entry.aside is None else [entry.aside]
        if entry.paper is not None:
            under.append(f"paper {entry.paper:g}")
        if entry.difference is not None:
            under.append(number(entry.difference, decimals([entry.paper]), sign=True))
        name, strength = tint(entry)
        shown, _, error = entry.text.partition(" ± ")
        return Box(
            shown,
            error=error,
            exact=None if entry.value is None else exact(entry.value),
            field=None if cell is None else field,
            cell=None if cell is None else cell.number,
            under=tuple(under),
            tint=name,
            strength=round(strength, 3),
            mark=footnotes.index(entry.note) + 1 if entry.note else None,
        )

    rows = []
    for index, (label, entries) in enumerate(text.rows):
        cells = table.rows[index].cells if index < len(table.rows) else {}
        boxes = (box(entry, cells.get(steps)) for entry, steps in zip(entries, table.columns, strict=True))
        rows.append((Box(label, head=True), *boxes))
    notes = list(text.notes)
    if distance:
        notes.append("The stronger the colour, the further from the paper: full at half or twice its value.")
    elif high > low and ranked:
        notes.append("The stronger the colour, the lower (better) the value, on a log scale.")
    return Grid(
        text.heading,
        ("", *text.columns),
        tuple(rows),
        facts=text.facts,
        footnotes=tuple(footnotes),
        notes=tuple(notes),
        wide=len(text.columns) > 5,
    )


def _difference_grid(table: PaperTable) -> Grid | None:
    comparisons = neighbours(table)
    if not comparisons:
        return None
    found = [d for c in comparisons for d in c.differences.values()]
    places = decimals([], [d.se for d in found])

    def box(comparison_steps: int | None, differences: Mapping[int | None, Any]) -> Box:
        difference = differences.get(comparison_steps)
        if difference is None:
            return Box("")
        shown, error = number(difference.value, places, sign=True), number(difference.se, places)
        clear = difference.se > 0 and abs(difference.value) > 2 * difference.se
        return Box(shown, error, exact(difference.value), tint="clear" if clear else None, strength=1.0)

    rows = tuple(
        (
            Box(f"{c.second.label} − {c.first.label}", head=True),
            *(box(steps, c.differences) for steps in table.columns),
        )
        for c in comparisons
    )
    heading, facts = metric_facts(table)
    which = "Neighbouring rows"
    if any(not c.adjacent for c in comparisons):
        which = "Neighbouring rows, and the neighbours among the rows of each sweep,"
    return Grid(
        f"Paired differences of {heading}",
        ("", *map(steps_text, table.columns)),
        rows,
        facts=facts,
        notes=(
            f"{which} at the same steps, lower minus upper, ± the paired jackknife standard error: sample i starts "
            "from the same x_T in both, so what they share cancels. Bold: more than two standard errors.",
        ),
        wide=True,
    )


OTHERS: tuple[tuple[str, str, str | None], ...] = (
    ("kid", "kernel distance", "kid_spread"),
    ("inception_score", "Inception Score", "inception_score_spread"),
    ("improved_precision", "precision", None),
    ("improved_recall", "recall", None),
)
"""What is measured beside the Fréchet distance on the same features: column of results.csv, heading, its spread."""


def _others_grid(content: Content, table: PaperTable) -> Grid | None:
    """The kernel distance, the Inception Score, precision and recall, cell by cell; None where none was measured."""
    rows = [(cell, cell_row(cell)) for cell in table.cells]
    found = [column for column in OTHERS if any(row[column[0]] is not None for _, row in rows)]
    if not found:
        return None

    def box(cell: Cell, row: Mapping[str, Any], name: str, spread: str | None) -> Box:
        shown = _row_box(cell, row, name, lambda value: f"{value:.4g}".replace("-", "−"))
        around = row[spread] if spread else None
        return shown if around is None else replace(shown, error=f"{around:.2g}")

    lines = tuple(
        (Box(content.names[cell.number], head=True), *(box(cell, row, name, spread) for name, _, spread in found))
        for cell, row in rows
    )
    facts = metric_facts(table)[1]
    notes = ["On the features of the Fréchet distance."]
    measured = {column for column, _, _ in found}
    if measured & {"kid", "inception_score"}:
        notes[0] += " ± is a spread over parts of the images, no standard error."
    subsets = {
        (q.kid_subsets, q.kid_subset_size, q.num_samples)
        for cell, _ in rows
        if (q := cell.quality) and q.kid is not None and q.kid_subsets and q.kid_subset_size
    }
    for count, size, of in sorted(subsets, key=str):
        told = f"Kernel distance: mean over {count} {'subset' if count == 1 else 'subsets'} of {size:,} images."
        if of is not None and size >= of and count > 1:
            told += f" All {of:,} samples are in each: its spread is over subsets of the reference alone."
        notes.append(told)
    if measured & {"improved_precision", "improved_recall"}:
        notes.append("Precision and recall drift with the number of images: compare them at equal N alone.")
    is_fid = table.metric is not None and table.metric.name == "FID"  # KID, too, is of Inception's features alone
    columns = ("", *("KID" if is_fid and name == "kid" else heading for name, heading, _ in found))
    return Grid("Beside the Fréchet distance", columns, lines, facts=facts, notes=tuple(notes), wide=True)


def speed_section(content: Content) -> Section | None:
    """Time against steps with its fit, and every cell's timing."""
    cells = [cell for cell in content.sweep.cells if cell.speed is not None]
    if not cells:
        return None
    blocks: list[Block] = content.charts_of("time_against_steps")
    fits = timing_fits(content.sweep.cells, content.series)
    if fits:
        rows = tuple(
            (
                Box(fit.series.label if fit.series else "all series", head=True),
                Box(f"{fit.line.slope * 1e3:.4g}", exact=exact(fit.line.slope * 1e3)),
                Box(number(fit.line.intercept * 1e3, 3), exact=exact(fit.line.intercept * 1e3)),
                Box(DASH if fit.line.r_squared is None else f"{fit.line.r_squared:.5f}"),
                Box(str(fit.line.points)),
            )
            for fit in fits
        )
        blocks.append(
            Grid(
                "Linear fit: time an image = intercept + slope · forwards",
                ("", "slope, ms a step an image", "intercept, ms", "R²", "points"),
                rows,
                notes=("Least squares on the medians. R² says nothing for two points and is left out there.",),
            )
        )
    lines = tuple(_speed_row(content, cell) for cell in cells)
    notes = [
        "Median of the repeats over one batch; quartiles in brackets.",
        "Times as fast as the slowest: of the cells of the same device, runtime, images a batch, data and network.",
        "Forward's share: the network's forwards alone over the whole walk; median of the ratios, timed in pairs.",
        "Peak memory: what a GPU had allocated at most during the walk; on a CPU it is not known.",
    ]
    if late := contended(cells):
        notes.append(
            f"{_count(len(late), 'cell')} marked “contended” ran beside other work (another job here, or on a CPU "
            "anything that took a core): the time is no fair measure, and stays out of the charts and the fit."
        )
    columns = (
        "",
        "NFE",
        "ms an image",
        "quartiles",
        "hours for 50,000 images",
        "times as fast as the slowest",
        "images a second",
        "forward's share",
        "peak memory",
        "",
    )
    blocks.append(Grid("Timing", columns, lines, notes=tuple(notes), wide=True))
    return Section("speed", "Speed", tuple(blocks))


def _speed_row(content: Content, cell: Cell) -> tuple[Box, ...]:
    row, speed = cell_row(cell), cell.speed

    def box(name: str, shown: Callable[[Any], str]) -> Box:
        return _row_box(cell, row, name, shown)

    quartiles = DASH
    if speed and speed.images and speed.seconds_q1 is not None and speed.seconds_q3 is not None:
        quartiles = f"[{speed.seconds_q1 / speed.images * 1e3:.3g}, {speed.seconds_q3 / speed.images * 1e3:.3g}]"
    peers = [c for c in content.sweep.cells if conditions(c) == conditions(cell)]
    slowest = max((c.seconds_per_image for c in peers if c.seconds_per_image), default=0.0)
    speed_up = f"{slowest / cell.seconds_per_image:.3g}×" if cell.seconds_per_image else DASH
    return (
        Box(content.names[cell.number], head=True),
        box("nfe", str),
        box("seconds_per_image", lambda value: f"{value * 1e3:.4g}"),
        Box(quartiles),
        Box(f"{cell.seconds_per_image * 50_000 / 3600:.3g}" if cell.seconds_per_image else DASH),
        Box(speed_up),
        box("images_per_second", lambda value: f"{value:,.4g}"),
        box("forward_share", lambda value: f"{value:.1%}"),
        box("peak_memory", lambda value: f"{value / 2**20:,.0f} MiB"),
        Box("contended", tint="far", strength=0.6) if speed and speed.contended else Box(""),
    )


def _row_box(cell: Cell, row: Mapping[str, Any], name: str, shown: Callable[[Any], str], code: bool = False) -> Box:
    """The value `name` of a cell's row, shown short and kept exact; a dash where there is none."""
    value = row[name]
    if value is None:
        return Box(DASH)
    return Box(shown(value), exact=exact(value), field=name, cell=cell.number, code=code)


def samples_section(content: Content) -> Section | None:
    """One row of samples a cell, the same x_T down the columns; then the files of cells that kept all of them."""
    ordered = sorted(
        (cell for cell in content.sweep.cells if cell.folder is not None),
        key=lambda cell: (content.series[cell.number].index, cell.steps or 0, cell.number),
    )
    cells = [cell for cell in ordered if cell.folder and (cell.folder / "preview.png").exists()]
    blocks: list[Block] = []
    if kept := kept_samples(content.sweep):
        links = {number: f"./{quote(path)}" for number, path in kept.items()}  # "./": no path may name a scheme
        rows = tuple(
            (Box(content.names[number], head=True), Box(path, code=True, link=links[number]))
            for number, path in kept.items()
        )
        blocks.append(Grid("Images that were kept", ("", "samples.npz"), rows, notes=(KEPT,), wide=True))
    if not cells:
        return Section("samples", "Samples", tuple(blocks)) if blocks else None
    pictures = embed([cell.folder / "preview.png" for cell in cells if cell.folder], PREVIEW_BUDGET)
    groups: dict[tuple[str, str], list[tuple[str, Embedded | None, str]]] = {}
    for cell, picture in zip(cells, pictures, strict=True):
        group = tuple(str(cell.plan.labels.get(name)) for name in ("data", "seed"))
        groups.setdefault((group[0], group[1]), []).append((content.names[cell.number], picture, ""))
    text = "The first images of each cell. A column is one sample: it starts from the same noise x_T in every row."
    if any(picture and picture.reduced for picture in pictures):
        text += " Compressed to keep this page small; preview.png in each cell's folder is exact."
    strips = [
        Strip(f"{data}, seed {seed}" if len(groups) > 1 else "", tuple(found)) for (data, seed), found in groups.items()
    ]
    return Section("samples", "Samples", (Prose(text), *strips, *blocks))


def determinism_section(content: Content) -> Section | None:
    """Whether the same start gives the same images, and how much the sampler's own noise matters."""
    cells = [cell for cell in content.sweep.cells if cell.determinism is not None]
    if not cells:
        return None
    rows = []
    for cell in cells:
        row = cell_row(cell)
        sizes = ", ".join(map(str, (cell.determinism and cell.determinism.batch_sizes) or ()))
        split, se = _row_box(cell, row, "batch_max_abs_diff", _small), cell.value("noise_variance_se")
        rows.append(
            (
                Box(content.names[cell.number], head=True),
                _row_box(cell, row, "repeat_max_abs_diff", _small),
                _row_box(cell, row, "repeat_identical", lambda value: "yes" if value else "no"),
                split,
                Box(sizes),
                replace(_row_box(cell, row, "noise_variance", "{:.3g}".format), error=f"{se:.2g}" if se else ""),
                _row_box(cell, row, "sha256", lambda value: value[:12], code=True),
                _row_box(cell, row, "determinism_images", str),
            )
        )
    columns = (
        "",
        "same x_T twice: max |difference|",
        "bitwise equal",
        "two batch sizes: max |difference|",
        "batch sizes",
        "variance across noise seeds",
        "SHA-256 of all samples",
        "tested on images",
    )
    notes = (
        "The same x_T sampled twice, and in batches of two sizes: differences of the final state, in which images "
        "span [−1, 1]. Variance: over noise seeds at fixed x_T, ± its standard error over images where that was taken; "
        "at η 0 nothing is drawn, so it must be exactly 0.",
    )
    blocks: list[Block] = []
    for table in content.tables:
        if has_noise_variance(table.cells):
            text = measure_text(content.sweep, table, NOISE_VARIANCE)
            blocks.append(_text_grid(text, table, field=NOISE_VARIANCE.field, ranked=NOISE_VARIANCE.ranked))
            blocks += content.charts_of(f"{NOISE_VARIANCE.field}_against", table=table)
    title = "Repeats and batch sizes" if blocks else ""
    blocks.append(Grid(title, columns, tuple(rows), notes=notes, wide=True))
    return Section("determinism", "Determinism", tuple(blocks))


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")


def nearest_section(content: Content) -> Section | None:
    """Nearest-neighbour distances: does the model copy its training images?"""
    cells = [cell for cell in content.sweep.cells if cell.quality and cell.quality.nearest]
    if not cells:
        return None
    names = ("nearest_samples_to_train", "nearest_samples_to_held_out", "nearest_held_out_to_train")
    rows = []
    for cell in cells:
        row = cell_row(cell)
        boxes = (_row_box(cell, row, name, lambda value: f"{value:.3f}") for name in names)
        rows.append((Box(content.names[cell.number], head=True), *boxes))
    columns = (
        "",
        "sample → nearest training image",
        "sample → nearest held-out image",
        "held-out → nearest training image",
    )
    note = (
        "Median Euclidean distance over pixels, with values in [−1, 1]. A model that copies has samples much nearer to "
        "the training images than held-out real images are: the first column far below the last. New images give about "
        "the same in both."
    )
    return Section("nearest", "Nearest neighbours", (Grid("", columns, tuple(rows), notes=(note,), wide=True),))


def tasks_section(content: Content) -> Section | None:
    """Tables and pictures that tasks added to their cells, those of one title together."""
    ordered = sorted(
        (cell for cell in content.sweep.cells if cell.result and (cell.result.tables or cell.result.pictures)),
        key=lambda cell: (content.series[cell.number].index, cell.steps or 0, cell.number),
    )
    tables: dict[tuple[str, tuple[str, ...]], list[tuple[str, TaskTable]]] = {}
    pictures: dict[str, list[tuple[str, Path, str]]] = {}
    for cell in ordered:
        name = content.names[cell.number]
        for table in cell.result.tables if cell.result else ():
            tables.setdefault((table.title, table.columns), []).append((name, table))
        for picture in cell.result.pictures if cell.result and cell.folder else ():
            if cell.folder is not None and Path(picture.file).name == picture.file:  # beside result.json, nowhere else
                pictures.setdefault(picture.title, []).append((name, cell.folder / picture.file, picture.caption))
    blocks: list[Block] = [_task_grid(*key, found) for key, found in tables.items()]
    files = [path for found in pictures.values() for _, path, _ in found]
    embedded = dict(zip(files, embed(files, TASK_PICTURE_BUDGET), strict=True))
    blocks += [
        Strip(title, tuple((name, embedded[path], caption) for name, path, caption in found))
        for title, found in pictures.items()
    ]
    return Section("tasks", "Task results", tuple(blocks)) if blocks else None


def _task_grid(title: str, columns: tuple[str, ...], found: Sequence[tuple[str, TaskTable]]) -> Grid:
    """The tables of one title under one heading; the cell's name leads its first row where there are several cells."""
    several = len(found) > 1
    rows = []
    for name, table in found:
        for index, values in enumerate(table.rows):
            boxes = tuple(Box(_plain(value), exact=exact(value)) for value in values)
            rows.append((Box(name if index == 0 else "", head=True), *boxes) if several else boxes)
    facts = "" if several else found[0][0]
    return Grid(title, ("", *columns) if several else columns, tuple(rows), facts=facts)


def _plain(value: Any) -> str:
    if value is None:
        return DASH
    return f"{value:.5g}".replace("-", "−") if isinstance(value, float) else str(value)


def cost_section(content: Content) -> Section | None:
    """The training curve, and where the time went."""
    blocks = content.charts_of("training_curve", "time_per_phase")
    return Section("cost", "Training and cost", tuple(blocks)) if blocks else None


def recipes_section(content: Content) -> Section | None:
    """Each cell's full recipe, one click away, and every number of results.csv."""
    items = []
    for cell in content.sweep.cells:
        lines = [f"overrides: {' '.join(cell.plan.overrides) or 'none'}", f"status: {cell.status}"]
        if cell.error:
            lines.append(f"error: {cell.error}")
        if cell.key:
            lines.append(f"cell: {cell.key}")
        text = "\n".join(lines)
        if cell.result:
            text += "\nrecipe: " + pretty(cell.result.recipe)
        items.append((f"{content.names[cell.number]}{'' if cell.status == 'done' else f' ({cell.status})'}", text))
    rows = []
    for cell in content.sweep.cells:
        row = cell_row(cell)
        boxes = (Box(exact(row[n]), exact=exact(row[n]), field=n, cell=cell.number) for n in COLUMNS)
        rows.append((Box(content.names[cell.number], head=True), *boxes))
    numbers = Grid("Every number, as in results.csv", ("", *COLUMNS), tuple(rows), wide=True, folded=True)
    return Section("recipes", "Recipes", (Folds(tuple(items)), numbers))


def pretty(value: Any, indent: int = 0) -> str:
    """JSON for reading: objects one entry a line, lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = "  " * (indent + 1)
    entries = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {pretty(v, indent + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(entries) + "\n" + "  " * indent + "}"


def environment_section(content: Content) -> Section | None:
    """Versions, commit, and what the standard error covers."""
    here = content.sweep.plan.environment
    facts = [(name, value) for name, value in here.items() if name not in ("git_commit", "git_dirty", "packages")]
    facts.append(("git commit", _commit(here)))
    commits = {_commit(c.result.environment) for c in content.sweep.cells if c.result and c.result.environment}
    if commits - {_commit(here)}:
        facts.append(("cells computed at commit", ", ".join(sorted(commits))))
    packages: dict[str, set[str]] = {}
    for cell in content.sweep.cells:
        found = cell.result.environment.get("packages") if cell.result else None
        for name, version in found.items() if isinstance(found, dict) else ():
            packages.setdefault(str(name), set()).add(str(version))
    facts += [(name, ", ".join(sorted(versions))) for name, versions in sorted(packages.items()) if name not in here]
    rows = tuple((Box(str(name), head=True), Box(DASH if v is None else str(v), code=True)) for name, v in facts)
    blocks: list[Block] = [Grid("", ("", ""), rows)]
    if any(cell.quality for cell in content.sweep.cells):
        blocks.append(Prose(STANDARD_ERROR, wide=False))
    return Section("environment", "Environment", tuple(blocks))


def _commit(environment: Mapping[str, Any]) -> str:
    commit, dirty = environment.get("git_commit"), environment.get("git_dirty")
    if not commit:
        return "not in a git checkout"
    return f"{commit}{' with uncommitted changes' if dirty else ', clean' if dirty is False else ''}"


SECTIONS: tuple[Callable[[Content], Section | None], ...] = (
    sweeps_section,
    results_section,
    samples_section,
    speed_section,
    determinism_section,
    nearest_section,
    tasks_section,
    cost_section,
    recipes_section,
    environment_section,
)
