"""The paper-shaped tables as Markdown and LaTeX, and the entries that the page shares with them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim_lab.errors import one_line
from ddim_lab.report.measures import NOISE_VARIANCE, Measure, has_noise_variance, measures_of
from ddim_lab.report.series import (
    Level,
    PaperTable,
    Row,
    held_out_levels,
    kept_samples,
    name_cells,
    name_series,
    published,
)
from ddim_lab.report.sweep import Cell, Reference, Sweep, finite

DASH = "—"
STANDARD_ERROR = (
    "± is one standard error by the delete-a-group jackknife over groups of samples. It covers sampling only: "
    "neither the training seed nor the bias that a finite N gives the Fréchet distance."
)
KEPT = (
    "All samples of a cell: arr_0, uint8, NHWC; paths from this report's folder. Scored again, in any features: "
    "python -m ddim_lab.score PATH data=..."
)


@dataclass(frozen=True)
class Entry:
    """One place of a table: the text, the exact values behind it, what stands beside it, and why it is empty if so."""

    text: str
    value: float | None = None
    se: float | None = None
    paper: float | None = None
    difference: float | None = None
    aside: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class TextTable:
    """A paper-shaped table, ready to be written: heading, columns, labelled rows of entries, notes under it.

    `rows` pairs each series' label with its entries; a place that was not planned is None.
    """

    heading: str
    facts: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]
    notes: tuple[str, ...]

    def footnotes(self) -> list[str]:
        """The reasons of the holes, each once, in reading order; a hole's mark is its place here + 1."""
        found = (entry.note for _, entries in self.rows for entry in entries if entry and entry.note)
        return list(dict.fromkeys(found))


def decimals(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> int:
    """Decimals that show every value's size and the smallest error's first digit: 2 to 6."""
    numbers = [abs(v) for v in (*values, *errors) if v is not None and math.isfinite(v) and v != 0]
    if not numbers:
        return 2
    return min(6, max(2, -math.floor(math.log10(min(numbers)))))


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A value with a true minus sign."""
    return f"{value:+.{places}f}".replace("-", "−") if sign else f"{value:.{places}f}".replace("-", "−")


def metric_facts(table: PaperTable) -> tuple[str, str]:
    """The table's heading, and the line that keeps network, reference and N beside its values."""
    metric = table.metric
    if metric is None:
        kind = {"seconds_per_image": "Milliseconds an image", "status": "What became of each cell"}[table.measure]
        labels = table.cells[0].plan.labels
        return kind, f"{labels.get('data', 'data not said')}, {labels.get('num_samples', '?')} samples a cell"
    count = f"{metric.num_samples:,}" if metric.num_samples is not None else "not said"
    return metric.name, f"{metric.facts} · N = {count}{_shared_settings(table)}"


def _shared_settings(table: PaperTable) -> str:
    """Weights, and spacing and clipping where all cells share them, to follow the facts."""
    facts = ""
    weights = sorted({w for c in table.cells if c.result and (w := c.result.recipe_value("model", "weights"))})
    if weights:
        facts += f" · weights: {', '.join(map(str, weights))}"
    for field in ("spacing", "clip"):
        if len(values := {str(cell.plan.labels.get(field)) for cell in table.cells}) == 1:
            facts += f" · {field}: {values.pop()}"
    return facts


def unnamed_differences(table: PaperTable) -> list[str]:
    """Notes on settings that differ between the rows though the rows' names do not say so.

    A row's name says no more than it needs to be told apart, so what goes along with it is said here: samplers that
    differ in more than their noise must not pass for samplers that differ in nothing else.
    """
    notes = []
    for field, say in (("spacing", "Spacing"), ("clip", "Clipping"), ("model", "Model"), ("seed", "Seed")):
        rows: dict[str, list[str]] = {}
        for row in table.rows:
            for value in dict.fromkeys(str(cell.plan.labels.get(field)) for cell in row.cells.values()):
                rows.setdefault(value, []).append(row.series.label)
        if len(rows) > 1 and not all(value in label.split() for value, labels in rows.items() for label in labels):
            spelled = "; ".join(f"{value} for {', '.join(labels)}" for value, labels in rows.items())
            notes.append(f"{say} differs between the rows: {spelled}.")
    return notes


def not_comparable(reference: Reference, cell: Cell, metric: str, count: int | None, *, to_real: bool) -> str | None:
    """Why ours minus the published number would mean nothing, in words; None where it means something.

    Args:
        reference: the published numbers.
        cell: ours; it has a result.
        metric: what ours is.
        count: the number of images that ours is of.
        to_real: whether the metric is a distance to a split of real images.
    """
    if metric.casefold() != reference.metric.casefold():
        return f"ours is {metric}, another metric"
    labels, result = cell.plan.labels, cell.result
    assert result is not None
    if reference.data not in (None, labels.get("data")):
        return f"ours is of {labels.get('data')}, theirs of {reference.data}"
    if reference.num_samples not in (None, count):
        ours = "an unknown number of" if count is None else f"{count:,}"
        return f"ours is of {ours} images, theirs of {reference.num_samples:,}"
    if to_real and (statistics := result.recipe_value("metrics", "reference_statistics")) is not None:
        return f"ours is to the statistics in {Path(str(statistics)).name}, theirs to the {reference.reference} images"
    if to_real and reference.reference not in (None, split := result.recipe_value("metrics", "reference")):
        return f"ours is to the {split} images, theirs to the {reference.reference} images"
    weights = result.recipe_value("model", "weights")
    # which ones a checkpoint holds is not told: it is taken for what it was published as
    if reference.weights not in (None, weights) and weights != "pretrained":
        return f"ours is of {weights} weights, theirs of {reference.weights}"
    schedule = result.recipe_value("schedule")
    if reference.schedule not in (None, schedule):
        return f"ours has {_schedule(schedule)}, theirs {_schedule(reference.schedule)}"
    spacing = reference.spacing_at(cell.steps)
    if spacing not in (None, labels.get("spacing")):
        return f"ours has {labels.get('spacing')} timesteps, theirs {spacing}"
    return None


def _schedule(of: Any) -> str:
    """A schedule as name and numbers."""
    if not isinstance(of, dict):
        return "an unknown schedule"
    numbers = ", ".join(f"{name} {value}" for name, value in of.items() if name != "name")
    return f"schedule {of.get('name')} ({numbers})"


def paper_text(sweep: Sweep, table: PaperTable) -> TextTable:
    """The table with our value ± its standard error and, where there is one, the published number."""
    heading, facts = metric_facts(table)
    reference, metric = sweep.plan.reference, table.metric
    papers = {cell.number: published(sweep, cell) for cell in table.cells} if metric else {}
    refused = {
        cell.number: not_comparable(reference, cell, metric.name, metric.num_samples, to_real=True)
        for cell in table.cells
        if reference and metric and cell.result and papers[cell.number] is not None
    }
    values = [cell.fd for cell in table.cells]
    errors = [finite(cell.quality.fd_se) if cell.quality else None for cell in table.cells]
    places = decimals(values, errors)

    def entry(cell: Cell) -> Entry:
        if table.measure == "status" and cell.status == "done":
            return Entry("done")
        if table.measure == "seconds_per_image" and cell.seconds_per_image is not None:
            seconds = cell.seconds_per_image
            return Entry(f"{seconds * 1e3:.3g}", seconds)
        paper = papers.get(cell.number)
        if cell.fd is None or table.measure != "fd":
            return Entry(DASH, paper=paper, note=f"{place(cell)}: {why_empty(cell, table)}")
        se = finite(cell.quality.fd_se) if cell.quality else None
        text = number(cell.fd, places) + (f" ± {number(se, places)}" if se is not None else "")
        difference = cell.fd - paper if paper is not None and refused[cell.number] is None else None
        return Entry(text, cell.fd, se, paper, difference)

    def place(cell: Cell) -> str:
        row = next(row for row in table.rows if cell in row.cells.values())
        return f"{row.series.label}, {steps_text(cell.steps)}"

    notes = [STANDARD_ERROR] if any(e is not None for e in errors) else []
    if reference and any(paper is not None for paper in papers.values()):
        notes.insert(0, _paper_note(reference, table, refused))
    notes += [
        f"{heading} of held-out real images against the same reference: {level_text(level)} at N = {count:,}: one "
        "draw of real images. Compare it with samples at that N only."
        for count, level in held_out_levels(table).items()
    ]
    notes += unnamed_differences(table)
    rows = tuple(
        (
            row.series.label,
            tuple(entry(row.cells[s]) if s in row.cells else None for s in table.columns),
        )
        for row in table.rows
    )
    return TextTable(heading, facts, tuple(steps_text(s) for s in table.columns), rows, tuple(notes))


def _paper_note(reference: Reference, table: PaperTable, refused: Mapping[int, str | None]) -> str:
    """What stands at each place, and why no difference does where none is given.

    Args:
        refused: by cell number the reason, None where the difference is given; of the cells with a published number.
    """
    places: dict[str, list[str]] = {}
    for row in table.rows:
        reasons = {steps: refused[cell.number] for steps, cell in row.cells.items() if cell.number in refused}
        for reason in dict.fromkeys(reason for reason in reasons.values() if reason):
            at = [steps_text(steps) for steps in table.columns if steps in reasons and reasons[steps] == reason]
            whole = len(at) == len(reasons)
            places.setdefault(reason, []).append(row.series.label if whole else f"{row.series.label}, {', '.join(at)}")
    if places and all(refused.values()):
        told = "; ".join(places) if len(places) == 1 else _told(places)
        return f"Each place: ours / paper ({reference.metric}; {reference.source}). No difference is given: {told}."
    note = f"Each place: ours / paper / ours − paper. Paper: {reference.source}."
    return f"{note} No difference is given where it would mean nothing: {_told(places)}." if places else note


def _told(places: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{reason} ({'; '.join(where)})" for reason, where in places.items())


def measure_heading(table: PaperTable, measure: Measure) -> str:
    """What is measured, and in brackets of which data."""
    data = ", ".join(dict.fromkeys(str(cell.plan.labels.get("data")) for cell in table.cells))
    return f"{measure.heading} ({data})"


def measure_text(sweep: Sweep, table: PaperTable, measure: Measure) -> TextTable:
    """The table's cells by a measure of their task, ± its standard error, with published numbers of that measure.

    Numbers of another measure are left out; a difference is given where `not_comparable` finds nothing against it.
    """
    heading = measure_heading(table, measure)
    counts = sorted({int(n) for cell in table.cells if measure.count and (n := cell.value(measure.count))})
    reference = sweep.plan.reference
    of_this = reference is not None and reference.metric.casefold() == measure.heading.casefold()
    papers = {cell.number: published(sweep, cell) for cell in table.cells} if of_this else {}

    def count_of(cell: Cell) -> int | None:
        count = cell.value(measure.count) if measure.count else None
        return None if count is None else int(count)

    refused = {
        cell.number: not_comparable(reference, cell, measure.heading, count_of(cell), to_real=False)
        for cell in table.cells
        if reference and cell.result and papers.get(cell.number) is not None
    }
    values = {cell.number: cell.value(measure.field) for cell in table.cells}
    errors = {cell.number: cell.value(measure.se) if measure.se else None for cell in table.cells}
    # what agrees to rounding (1e-15) must not set the decimals of the others
    places = decimals(*([v for v in found.values() if v and abs(v) >= 1e-6] for found in (values, errors)))
    if not any(errors.values()):
        places = min(6, places + 1)  # no error says how many are worth showing

    def entry(row: str, cell: Cell) -> Entry:
        value, se = values[cell.number], errors[cell.number]
        paper = papers.get(cell.number)
        if value is None:
            if cell.error is not None and table.metric is not None:
                return Entry(DASH, paper=paper)  # the table of the distances has said why
            why = "not measured" if cell.error is None else f"{cell.status}: {cell.error}"
            return Entry(DASH, paper=paper, note=f"{row}, {steps_text(cell.steps)}: {why}")
        if value == se == 0:
            se = None  # equal in every image: there is nothing that an error could be of
        text = small(value, places) + (f" ± {small(se, places)}" if se is not None else "")
        return Entry(
            text, value, se, paper, value - paper if paper is not None and refused[cell.number] is None else None
        )

    rows = tuple(
        (
            row.series.label,
            tuple(entry(row.series.label, row.cells[s]) if s in row.cells else None for s in table.columns),
        )
        for row in table.rows
    )
    facts = measure.facts
    if counts:
        facts += f" · {', '.join(f'{n:,}' for n in counts)} {measure.counted}"
    beside = any(paper is not None for paper in papers.values())
    notes = [_paper_note(reference, table, refused)] if reference and beside else []
    if any(se is not None for se in errors.values()):
        notes.append(f"± is one standard error {measure.error}.")
    if measure.level:
        levels = {steps: cell.value(measure.level) for steps, cell in table.rows[0].cells.items()}
        told = {small(level, places) for level in levels.values() if level is not None}
        if len(told) == 1:
            notes.append(f"{measure.level_says}: {told.pop()}.")
        elif told:
            spelled = "; ".join(f"{small(v, places)} at {steps_text(s)}" for s, v in levels.items() if v is not None)
            notes.append(f"{measure.level_says}: {spelled}.")
    return TextTable(
        heading,
        facts + _shared_settings(table),
        tuple(steps_text(s) for s in table.columns),
        rows,
        (*notes, *unnamed_differences(table)),
    )


def small(value: float, places: int) -> str:
    """A value with so many decimals; 0 as "0", and one that they would hide in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10.0**-places:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return number(value, places)


def table_texts(sweep: Sweep, table: PaperTable) -> list[tuple[str, TextTable]]:
    """Every text table of a paper table, each with the column of results.csv that holds its values."""
    measures = measures_of(table.cells)
    texts: list[tuple[str, TextTable]] = []
    if table.metric is not None or not measures:
        texts.append((table.measure, paper_text(sweep, table)))
    if (beside := equal_n_text(table)) is not None:
        texts.append(("fd_at_equal_n", beside))
    if (seeds := over_training_seeds(table)) is not None:
        texts.append(("fd", seeds))
    texts += [(measure.field, measure_text(sweep, table, measure)) for measure in measures]
    if has_noise_variance(table.cells):
        texts.append((NOISE_VARIANCE.field, measure_text(sweep, table, NOISE_VARIANCE)))
    return texts


def equal_n_text(table: PaperTable) -> TextTable | None:
    """The samples' FD at the number of images that held-out real images allow, and theirs as the last row.

    None where no cell has such values, where their N differs between cells, or where it is the table's own N (the
    held-out level then compares with the table itself).
    """
    levels = held_out_levels(table)
    if len(levels) != 1 or table.metric is None or table.metric.num_samples in levels:
        return None
    ((count, level),) = levels.items()

    def at_equal_n(cell: Cell) -> float | None:
        equal_n = cell.quality.equal_n if cell.quality else None
        return finite(equal_n.fd_samples) if equal_n else None

    values = [at_equal_n(cell) for cell in table.cells]
    places = decimals([*values, level.value], [level.se])

    def entry(cell: Cell) -> Entry:
        value = at_equal_n(cell)
        return Entry(DASH) if value is None else Entry(number(value, places), value)

    rows = [
        (
            row.series.label,
            tuple(entry(row.cells[s]) if s in row.cells else None for s in table.columns),
        )
        for row in table.rows
    ]
    real = Entry(level_text(level, places), level.value, level.se)
    rows.append(("held-out real images", (real,) * len(table.columns)))
    return TextTable(
        f"{table.metric.name} at N = {count:,}, beside held-out real images",
        table.metric.facts,
        tuple(steps_text(s) for s in table.columns),
        tuple(rows),
        (
            "The last row is real images that were not trained on: one draw of them, the same in every column"
            f"{'' if level.se is None else ', ± its standard error'}. Another draw has another level.",
        ),
    )


def level_text(level: Level, places: int | None = None) -> str:
    """A level ± its standard error, if it has one."""
    if places is None:
        places = decimals([level.value], [level.se])
    return number(level.value, places) + (f" ± {number(level.se, places)}" if level.se is not None else "")


def over_training_seeds(table: PaperTable) -> TextTable | None:
    """The mean of the table's values over the networks of each row that was trained more than once, ± their deviation.

    None where no row has two networks: another training seed is another network only where something is trained.
    """
    families: dict[str, list[Row]] = {}
    for row in table.rows:
        families.setdefault(row.series.family, []).append(row)
    if table.metric is None:
        return None

    networks = {name: [_network(row) for row in rows] for name, rows in families.items()}
    families = {name: rows for name, rows in families.items() if len(set(networks[name]) - {None}) > 1}
    if not families:
        return None
    # a row without a result would have been a network of its own
    planned = {name: len(set(networks[name]) - {None}) + networks[name].count(None) for name in families}

    def cells(rows: list[Row], steps: int | None) -> list[Cell]:
        """One of each network, where it has a value."""
        found = {_network(row): row.cells[steps] for row in rows if steps in row.cells and _network(row) is not None}
        return [cell for cell in found.values() if cell.fd is not None]

    found = {(name, steps): cells(rows, steps) for name, rows in families.items() for steps in table.columns}
    values = {place: [cell.fd or 0.0 for cell in of] for place, of in found.items()}
    spreads = {place: statistics.stdev(of) for place, of in values.items() if len(of) > 1}
    errors = {
        place: [se for cell in of if cell.quality and (se := finite(cell.quality.fd_se)) is not None]
        for place, of in found.items()
    }
    se_of = {place: statistics.fmean(of) for place, of in errors.items() if of}
    places = decimals([statistics.fmean(of) for of in values.values() if of], spreads.values())

    def entry(place: tuple[str, int | None]) -> Entry:
        if place not in spreads:
            return Entry(DASH)
        mean, count, of = statistics.fmean(values[place]), len(values[place]), planned[place[0]]
        more = [f"se {number(se_of[place], places)}"] if place in se_of else []
        more += [f"{count} of {of}"] if count != of else []
        text = f"{number(mean, places)} ± {number(spreads[place], places)}"
        return Entry(text, mean, aside="; ".join(more) or None)

    counts = " or ".join(map(str, sorted(set(planned.values()))))
    return TextTable(
        f"{table.metric.name} over {counts} training seeds",
        table.metric.facts,
        tuple(steps_text(steps) for steps in table.columns),
        tuple((name, tuple(entry((name, steps)) for steps in table.columns)) for name in families),
        (
            "Mean ± standard deviation over networks that were trained from other seeds: of one network's FD, not of "
            "the mean. All start from the same x_T, so the sampling error is mostly common to them and not in the "
            "deviation. The mean keeps it: se is the jackknife standard error of one value, averaged over networks.",
        ),
    )


def _network(row: Row) -> str | None:
    """The digest of the weights trained here that the row's cells share; None where that is not known, or not so."""
    results = [cell.result for cell in row.cells.values() if cell.result]
    trained = [result for result in results if result.recipe_value("model", "training_seed") is not None]
    digests = {str(result.recipe_value("model", "digest")) for result in trained}
    return digests.pop() if len(digests) == 1 else None


def why_empty(cell: Cell, table: PaperTable) -> str:
    """Why a cell shows no value in its table."""
    if cell.error is not None:
        return f"{cell.status}: {cell.error}"
    if table.measure == "seconds_per_image":
        timed = cell.speed is not None
        return "timed beside other work, left out" if timed else "not timed"
    value = cell.quality.fd if cell.quality else None
    return "no Fréchet distance was measured" if value is None else f"the Fréchet distance is {value!r}"


def steps_text(steps: int | None) -> str:
    return DASH if steps is None else f"S = {steps}"


# Markdown


def markdown(sweep: Sweep, tables: Iterable[PaperTable]) -> str:
    """table.md: each table under a heading that names metric, network, reference and N."""
    lines = [f"# {md(sweep.title)}", ""]
    if sweep.plan.command:
        lines += [f"    {one_line(sweep.plan.command)}", ""]
    for table in tables:
        for _, text in table_texts(sweep, table):
            lines += _markdown_table(text)
    if kept := kept_samples(sweep):
        names = name_cells(sweep.cells, name_series(sweep.cells))
        lines += ["## Images that were kept", "", md(KEPT), ""]
        lines += [f"- {md(names[number])}: `{path}`" for number, path in kept.items()]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(text: TextTable) -> list[str]:
    footnotes = text.footnotes()

    def show(entry: Entry | None) -> str:
        if entry is None:
            return ""
        mark = f" [{footnotes.index(entry.note) + 1}]" if entry.note else ""
        return md(_with_paper(entry)) + mark

    lines = [f"## {md(text.heading)}", "", md(text.facts), ""]
    lines.append("| " + " | ".join(("", *map(md, text.columns))) + " |")
    lines.append("|---|" + "---:|" * len(text.columns))
    lines += ["| " + " | ".join((md(label), *map(show, entries))) + " |" for label, entries in text.rows]
    lines.append("")
    for index, note in enumerate(footnotes, start=1):
        lines += [f"[{index}] {md(note)}", ""]
    for note in text.notes:
        lines += [md(note), ""]
    return lines


def plain_table(text: TextTable) -> tuple[str, list[str], list[list[str]]]:
    """A table's heading, columns and rows, each place as Markdown has it but unescaped."""
    rows = [
        [label, *("" if entry is None else _with_paper(entry) for entry in entries)] for label, entries in text.rows
    ]
    return text.heading, ["", *text.columns], rows


def _with_paper(entry: Entry) -> str:
    text = entry.text if entry.aside is None else f"{entry.text} ({entry.aside})"
    if entry.paper is None:
        return text
    parts = [text, f"{entry.paper:g}"]
    if entry.difference is not None:
        parts.append(number(entry.difference, decimals([entry.paper]), sign=True))
    return " / ".join(parts)


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", one_line(text)).replace("&", "&amp;").replace("<", "&lt;")


# LaTeX


def latex(sweep: Sweep, tables: Iterable[PaperTable]) -> str:
    """table.tex: each table as a booktabs tabular in a table environment, to paste."""
    lines = ["% needs \\usepackage{booktabs}; encoding UTF-8"]
    for table in tables:
        for _, text in table_texts(sweep, table):
            lines += _latex_table(text)
    return "\n".join(lines) + "\n"


def _latex_table(text: TextTable) -> list[str]:
    footnotes = text.footnotes()

    def show(entry: Entry | None) -> str:
        if entry is None:
            return ""
        mark = f"$^{{{footnotes.index(entry.note) + 1}}}$" if entry.note else ""
        return tex(_with_paper(entry)) + mark

    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{tex(text.heading)}; {tex(text.facts)}.}}",
        f"  \\begin{{tabular}}{{l{'r' * len(text.columns)}}}",
        "    \\toprule",
        "    " + " & ".join(("", *map(tex, text.columns))) + " \\\\",
        "    \\midrule",
    ]
    lines += ["    " + " & ".join((tex(label), *map(show, entries))) + " \\\\" for label, entries in text.rows]
    lines += ["    \\bottomrule", "  \\end{tabular}"]
    remarks = [f"$^{{{i}}}$ {tex(note)}" for i, note in enumerate(footnotes, start=1)]
    for remark in (*remarks, *map(tex, text.notes)):
        lines += ["", f"  {{\\footnotesize {remark}\\par}}"]
    return [*lines, "\\end{table}", ""]


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "η": r"$\eta$",
    "σ\u0302": r"$\hat{\sigma}$",
    "σ": r"$\sigma$",
    "±": r"$\pm$",
    "−": r"$-$",
    "·": r"$\cdot$",
    "—": "---",
    "…": r"\dots{}",
}
_TEX_PATTERN = re.compile("|".join(re.escape(text) for text in sorted(_TEX, key=len, reverse=True)))


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return _TEX_PATTERN.sub(lambda match: _TEX[match.group()], one_line(text))
