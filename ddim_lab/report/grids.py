"""Values as grids of the page: paper-shaped, as paired differences, and with a row a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ddim_lab.report.blocks import Box, Grid
from ddim_lab.report.cells import SECONDS_AN_IMAGE, Cell, contended
from ddim_lab.report.findings import LEVEL, Findings
from ddim_lab.report.numbers import DASH, column_heading, decimals, exact, number
from ddim_lab.report.read import Sweep
from ddim_lab.report.tables import Entry, TextTable, ValueTable
from ddim_lab.report.timing import conditions, timing_fits
from ddim_lab.report.together import Comparison, against_best_ddim, against_ddim, neighbours
from ddim_lab.store.records import Value


def text_grid(text: TextTable) -> Grid:
    """A text table as boxes, tinted by the distance from the published numbers if there are any to compare with.

    Without them by value, if values are ranked.
    """
    entries = [entry for _, row in text.rows for entry in row if entry]
    distance = any(entry.difference is not None for entry in entries)
    footnotes = text.footnotes()
    values = [entry.value for entry in entries if entry.value is not None and entry.value > 0 and entry.ranked]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    ranked = text.better is not None and high > low

    def tint(entry: Entry) -> tuple[str | None, float]:
        if entry.value is None or entry.value <= 0 or not entry.ranked:
            return None, 0.0
        if distance:
            if entry.difference is None or entry.paper is None or entry.paper <= 0:
                return None, 0.0
            return "far", min(1.0, abs(math.log2(entry.value / entry.paper)))
        if not ranked:
            return None, 0.0
        place = math.log(entry.value / low) / math.log(high / low)
        return "best", 1.0 - place if text.better == "lower" else place

    def box(entry: Entry | None) -> Box:
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
            field=None if entry.cell is None else text.field,
            cell=entry.cell,
            under=tuple(under),
            tint=name,
            strength=round(strength, 3),
            mark=footnotes.index(entry.note) + 1 if entry.note else None,
        )

    notes = list(text.notes)
    if distance:
        notes.append("The stronger the colour, the further from the paper: full at half or twice its value.")
    elif ranked:
        notes.append(f"The stronger the colour, the {text.better} (better) the value, on a log scale.")
    return Grid(
        text.heading,
        ("", *text.columns),
        tuple((Box(label, head=True), *map(box, row)) for label, row in text.rows),
        facts=text.facts,
        footnotes=tuple(footnotes),
        notes=tuple(notes),
        wide=len(text.columns) > 5,
    )


def difference_grids(of: ValueTable, found: Findings) -> list[Grid]:
    """Paired differences: between neighbouring rows, and of solvers to DDIM; none where nothing can be paired."""
    rows, own, best = neighbours(of), against_ddim(of), against_best_ddim(of)
    which = "Neighbouring rows"
    if any(not c.adjacent for c in rows):
        which = "Neighbouring rows, and the neighbours among the rows of each sweep,"
    budget = "steps" if of.table.unit == "S" else of.table.unit
    solvers = sorted((*own, *best), key=lambda c: [row.series.without_seed for row in of.table.rows].index(c.second))
    against = f"At the same {budget}, against DDIM on the same spacing"
    if best:
        against += (
            ", and on the spacing that scores best in that column: chosen once the values are known, which favours"
            " DDIM, so nothing is settled there"
        )
    grids = [
        _differences(
            of, f"Paired differences of {of.heading}", rows, found, f"{which} at the same {budget}, lower minus upper"
        ),
        _differences(of, f"{of.heading}: solvers against DDIM", solvers, found, against, chosen=best),
    ]
    return [grid for grid in grids if grid is not None]


def _differences(
    of: ValueTable,
    title: str,
    comparisons: Sequence[Comparison],
    found: Findings,
    which: str,
    chosen: Sequence[Comparison] = (),
) -> Grid | None:
    """Differences by pair and column, bold where they are settled; those that were `chosen` by their values never."""
    if not comparisons:
        return None
    places = decimals([], [d.se for c in comparisons for d in c.differences.values()])

    def box(comparison: Comparison, heading: str) -> Box:
        difference = comparison.differences.get(heading)
        if difference is None:
            return Box("")
        shown, error = number(difference.value, places, sign=True), number(difference.se, places)
        clear = comparison not in chosen and found.is_settled(of.value.name, comparison.kind, difference)
        return Box(shown, error, exact(difference.value), tint="clear" if clear else None, strength=1.0)

    several = max(len(d.of[0]) for c in comparisons for d in c.differences.values())
    mean = f" Means over {several} sampling seeds." if several > 1 else ""
    return Grid(
        title,
        ("", *of.table.headings),
        tuple(
            (Box(f"{c.second} − {c.first}", head=True), *(box(c, heading) for heading in of.table.headings))
            for c in comparisons
        ),
        facts=of.facts,
        notes=(
            f"{which}, ± the paired standard error: sample i starts from the same x_T in both, so what they"
            f" share cancels.{mean} Bold: settled at {LEVEL} (Findings).",
        ),
        wide=True,
    )


def findings_grid(found: Findings) -> Grid:
    """Every comparison with its numbers, folded."""

    def plain(value: float | None, form: str) -> Box:
        return Box(DASH) if value is None else Box(format(value, form).replace("-", "−"), exact=exact(value))

    rows = tuple(
        (
            Box(f"{f.heading}: {f.second} − {f.first} {f.where}".rstrip(), head=True),
            plain(f.difference.value, ".4g"),
            plain(f.difference.se, ".2g"),
            plain(f.difference.freedom, ".3g"),
            plain(f.p, ".2g"),
            plain(f.corrected, ".2g"),
            Box(
                "the same" if f.p is None else "settled" if f.settled else "not settled",
                tint="clear" if f.settled else None,
            ),
            plain(f.samples, ",d") if f.samples is not None else Box(""),
        )
        for f in found.all
    )
    columns = (
        "",
        "difference",
        "standard error",
        "degrees of freedom",
        "p",
        "p after Holm",
        "",
        "samples that would settle it",
    )
    note = (
        f"Two-sided p by Student's t. {found.rule}{' ' if found.rule else ''}Settled: p after Holm's correction over"
        " all tests is at most 0.05. Samples: on either side, at which a difference of this size would be settled, all"
        " others as they are."
    )
    return Grid("Every comparison", columns, rows, notes=(note,), wide=True, folded=True)


# -- a row a cell ---------------------------------------------------------------------------------------


def column_grids(
    sweep: Sweep, cells: Sequence[Cell], section: str, facts: str = "", *, under: str | None = None, first: bool = True
) -> list[Grid]:
    """The tables of a section that have a row a cell: one for each title that its values name.

    Args:
        sweep: for the names of the cells.
        cells: the rows.
        section: its title.
        facts: what keeps the values' meaning beside them.
        under: the values of the table that these stand beside: those that say so (`Value.beside`); None for all.
        first: and those that stand beside the cell's first.
    """
    tables: dict[str, dict[str, Value]] = {}
    for cell in cells:
        for value in cell.values.values():
            stands_here = under is None or value.beside == under or (first and value.beside is None)
            if value.column and value.section == section and stands_here:
                tables.setdefault(value.table, {}).setdefault(value.name, value)
    return [_column_grid(sweep, cells, title, list(of.values()), facts) for title, of in tables.items()]


def _column_grid(sweep: Sweep, cells: Sequence[Cell], title: str, found: Sequence[Value], facts: str) -> Grid:
    cells = [cell for cell in cells if any(value.name in cell.values for value in found)]
    told = [cell.values[value.name] for value in found for cell in cells if value.name in cell.values]
    # a column without a number is left out, unless a table of times has its own
    timed = any(value.unit == SECONDS_AN_IMAGE for value in found)
    known = {value.name for value in told if value.value is not None}
    found = [value for value in found if timed or value.name in known]
    columns: list[str] = ["NFE"] if timed else []
    for value in found:
        columns += [column_heading(value)] + (list(TIME_COLUMNS) if value.unit == SECONDS_AN_IMAGE else [])

    def boxes(cell: Cell) -> list[Box]:
        row = [_forwards(cell)] if timed else []
        for value in found:
            row.append(Box.of(cell.values.get(value.name), cell.number))
            if value.unit == SECONDS_AN_IMAGE:
                row += _time_boxes(sweep, cell)
        if timed:
            row.append(Box("contended", tint="far", strength=0.6) if contended([cell]) else Box(""))
        return row

    spreads = [value for value in told if value.spread is not None and value.error]
    notes = [note for value in told for note in value.notes]
    notes += [f"± is {value.error}." for value in spreads]
    notes += [f"{column_heading(v)}: not measured: {v.why_not}." for v in told if v.value is None and v.why_not]
    if timed:
        notes += _time_notes(sweep)
    rows = tuple((Box(sweep.names[cell.number], head=True), *boxes(cell)) for cell in cells)
    headings = ("", *columns, *([""] if timed else []))
    return Grid(title, headings, rows, facts=facts, notes=tuple(dict.fromkeys(filter(None, notes))), wide=True)


# -- times ----------------------------------------------------------------------------------------------

TIME_COLUMNS = ("quartiles", "hours for 50,000 images", "times as fast as the slowest")
"""What follows a time an image."""


def _forwards(cell: Cell) -> Box:
    if cell.forwards is None:
        return Box(DASH)
    return Box(str(cell.forwards), exact=exact(cell.forwards), field="nfe", cell=cell.number)


def _time_boxes(sweep: Sweep, cell: Cell) -> list[Box]:
    """A cell's TIME_COLUMNS."""
    quartiles, seconds = cell.time and cell.time.quartiles, cell.seconds
    shown = f"[{quartiles[0] * 1e3:.3g}, {quartiles[1] * 1e3:.3g}]" if quartiles else DASH
    peers = [other for other in sweep.cells if conditions(other) == conditions(cell)]
    slowest = max((other.seconds for other in peers if other.seconds), default=0.0)
    return [
        Box(shown),
        Box(f"{seconds * 50_000 / 3600:.3g}" if seconds else DASH),
        Box(f"{slowest / seconds:.3g}×" if seconds else DASH),
    ]


def _time_notes(sweep: Sweep) -> list[str]:
    notes = [
        "Times as fast as the slowest: of the cells of the same device, runtime, images a batch, data and network."
    ]
    if late := len(contended(sweep.cells)):
        notes.append(
            f"{late} cell{'' if late == 1 else 's'} marked “contended” ran beside other work (another job here, or on "
            "a CPU anything that took a core): the time is no fair measure, and stays out of the charts and the fit."
        )
    return notes


def fit_grid(sweep: Sweep) -> Grid | None:
    """The lines of time against forwards; None where there is none."""
    rows = tuple(
        (
            Box(fit.series.label if fit.series else "all series", head=True),
            Box(f"{fit.line.slope * 1e3:.4g}", exact=exact(fit.line.slope * 1e3)),
            Box(number(fit.line.intercept * 1e3, 3), exact=exact(fit.line.intercept * 1e3)),
            Box(DASH if fit.line.r_squared is None else f"{fit.line.r_squared:.5f}"),
            Box(str(fit.line.points)),
        )
        for fit in timing_fits(sweep.cells, sweep.series)
    )
    columns = ("", "slope, ms a step an image", "intercept, ms", "R²", "points")
    note = "Least squares on the medians. R² says nothing for two points and is left out there."
    title = "Linear fit: time an image = intercept + slope · forwards"
    return Grid(title, columns, rows, notes=(note,)) if rows else None
