"""The report's charts as Vega-Lite specifications, built with Altair; as pictures through vl-convert.

A series has the same colour and mark in every chart. Colours are those of Okabe and Ito (2008), which the
colour-blind can tell apart, less the yellow and the black that vanish on one of the two backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.report.measures import NOISE_VARIANCE, Measure, measures_of
from ddim_lab.report.pareto import pareto_front
from ddim_lab.report.series import PaperTable, Series, held_out_levels, name_cells, name_series, paper_tables
from ddim_lab.report.sweep import Cell, Sweep, finite, training_curves
from ddim_lab.report.text import decimals, level_text, measure_heading, metric_facts, number, small
from ddim_lab.report.timing import contended, timed, timing_fits

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
GREY = "#888888"
ONCE = ("train", "feature_network")
"""Phases that are done once a sweep, beside which the others would vanish."""
FORWARDS = "network forwards a sample (NFE)"
HEIGHT = 300
STATIC_WIDTH = 560


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend."""

    label: str
    colour: str
    shape: str = "circle"


@dataclass(frozen=True)
class Chart:
    """A chart: `name` is unique in the sweep, `spec` Vega-Lite without width, configuration and legend."""

    name: str
    title: str
    spec: dict[str, Any]
    keys: tuple[Key, ...]
    caption: str
    table: PaperTable | None = None


def series_key(series: Series) -> Key:
    """The series' colour and mark, the same in every chart."""
    return Key(series.label, PALETTE[series.index % len(PALETTE)], SHAPES[series.index % len(SHAPES)])


def sweep_charts(sweep: Sweep) -> list[Chart]:
    """Every chart that the sweep has data for."""
    series = name_series(sweep.cells)
    charts: list[Chart | None] = []
    everything = paper_tables(sweep)
    tables = [table for table in everything if table.metric is not None]
    for index, table in enumerate(tables, start=1):
        suffix = "" if len(tables) == 1 else f"_{index}"
        charts.append(_quality_chart(table, f"fd_against_steps{suffix}"))
        if any(cell.forwards not in (None, cell.steps) for cell in table.cells):
            charts.append(_quality_chart(table, f"fd_against_forwards{suffix}", forwards=True))
        charts.append(_front_chart(table, f"fd_against_seconds{suffix}"))
    for index, table in enumerate(everything, start=1):
        suffix = "" if len(everything) == 1 else f"_{index}"
        for measure in measures_of(table.cells):
            charts.append(_measure_chart(table, measure, f"{measure.field}_against_steps{suffix}"))
        charts.append(_variance_chart(table, f"{NOISE_VARIANCE.field}_against_eta{suffix}"))
    charts += [_time_chart(sweep, series), _training_chart(sweep), _phases_chart(sweep, series)]
    return [chart for chart in charts if chart is not None]


def _quality_chart(table: PaperTable, name: str, *, forwards: bool = False) -> Chart | None:
    """FD against steps, or against the forwards really done; log-log, with bars of one standard error."""
    import altair as alt

    def cost(cell: Cell) -> int | None:
        return cell.forwards if forwards else cell.steps

    found = [(row.series, c) for row in table.rows for c in row.cells.values() if _positive(c.fd) and cost(c)]
    if not found:
        return None
    heading, facts = metric_facts(table)
    places = decimals([c.fd for _, c in found], [c.quality.fd_se for _, c in found if c.quality])
    records: list[dict[str, Any]] = []
    for series, cell in found:
        fd, se = cell.fd or 0.0, finite(cell.quality.fd_se if cell.quality else None)
        records.append(
            {
                "series": series.label,
                "steps": cost(cell),
                "fd": fd,
                # a bar that reaches zero has no lower end on a log axis: it stops at a tenth of the value
                "low": max(fd - (se or 0.0), fd / 10),
                "high": fd + (se or 0.0),
                "shown": number(fd, places) + (f" ± {number(se, places)}" if se is not None else ""),
            }
        )
    levels = held_out_levels(table)
    level = levels.get(table.metric.num_samples or -1) if table.metric else None
    extent = [value for r in records for value in (r["low"], r["high"])]
    extent += [level.value] if level and _positive(level.value) else []

    steps = sorted({int(r["steps"]) for r in records})
    x = alt.X("steps:Q").scale(type="log", domain=_padded(steps, 1.15), nice=False)
    x = x.axis(values=steps, format="d", grid=False).title(FORWARDS if forwards else "steps S")
    y = _log_y(alt, "fd:Q", extent, heading)
    keys = _keys(series for series, _ in found)
    base = alt.Chart(alt.InlineData(values=records))
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(x=x, y=_log_y(alt, "low:Q", extent, heading), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(x=x, y=y),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x,
            y=y,
            shape=_shape(alt, keys),
            tooltip=[
                alt.Tooltip("series:N", title="series"),
                alt.Tooltip("steps:Q", title="forwards" if forwards else "steps"),
                alt.Tooltip("shown:N", title="FD ± 1 se"),
            ],
        ),
    ]
    layers = [layer.encode(color=_colour(alt, keys)) for layer in layers]
    caption = f"{facts}. Bars: ±1 standard error."
    if level and _positive(level.value):
        rule = alt.Chart(alt.InlineData(values=[{"fd": level.value, "text": "held-out real images"}]))
        layers.append(rule.mark_rule(color=GREY, strokeDash=[6, 4]).encode(y=y))
        layers.append(
            rule.mark_text(align="right", baseline="bottom", dx=-4, dy=-3).encode(
                x=alt.value("width"), y=y, text="text:N"
            )
        )
        caption += f" Dashed: one draw of held-out real images at the same N ({level_text(level)})."
    elif levels:
        caption += " Held-out real images were measured at a smaller N, so their level is not drawn here."
    title = f"{heading} against {'network forwards' if forwards else 'steps'}"
    return Chart(name, title, _spec(alt.layer(*layers)), keys, caption, table)


def _measure_chart(table: PaperTable, measure: Measure, name: str) -> Chart | None:
    """A task's measure against steps, log-log, with bars of one standard error; None for fewer than two steps."""
    import altair as alt

    cells = [(row.series, cell) for row in table.rows for cell in row.cells.values() if cell.steps]
    found = [(series, cell, value) for series, cell in cells if _positive(value := cell.value(measure.field))]
    if len({cell.steps for _, cell, _ in found}) < 2:
        return None
    records: list[dict[str, Any]] = []
    for series, cell, value in found:
        fine = value or 0.0
        se = cell.value(measure.se) if measure.se else None
        low, high = max(fine - (se or 0.0), fine / 10), fine + (se or 0.0)
        records.append(
            {"series": series.label, "steps": cell.steps, "value": fine, "low": low, "high": high}
            | {"shown": small(fine, 6) + (f" ± {small(se, 6)}" if se is not None else "")}
        )
    heading = measure_heading(table, measure)
    steps = sorted({int(r["steps"]) for r in records})
    extent = [value for r in records for value in (r["low"], r["high"])]
    x = alt.X("steps:Q").scale(type="log", domain=_padded(steps, 1.15), nice=False)
    x = x.axis(values=steps, format="d", grid=False).title("steps S")
    y = _log_y(alt, "value:Q", extent, measure.heading)
    keys = _keys(series for series, _, _ in found)
    base = alt.Chart(alt.InlineData(values=records))
    tooltip = [
        alt.Tooltip("series:N", title="series"),
        alt.Tooltip("steps:Q", title="steps"),
        alt.Tooltip("shown:N", title=measure.heading),
    ]
    layers = [
        base.mark_rule(strokeWidth=1.5).encode(
            x=x, y=_log_y(alt, "low:Q", extent, measure.heading), y2="high:Q", color=_colour(alt, keys)
        ),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=_colour(alt, keys)),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=_colour(alt, keys), shape=_shape(alt, keys), tooltip=tooltip
        ),
    ]
    caption = f"{measure.facts[0].upper()}{measure.facts[1:]}."
    if measure.se:
        caption += " Bars: ±1 standard error."
    if any(cell.value(measure.field) == 0 for _, cell in cells):
        caption += " Values of exactly 0 have no place on a log axis and are left out."
    return Chart(name, f"{heading} against steps", _spec(alt.layer(*layers)), keys, caption, table)


def _variance_chart(table: PaperTable, name: str) -> Chart | None:
    """The variance across noise seeds against eta, linear, a line for each number of steps; from three etas on."""
    import altair as alt

    places: dict[tuple[int, str], dict[float, tuple[float, float | None]]] = {}
    spacings = {str(cell.plan.labels.get("spacing")) for cell in table.cells}
    for cell in table.cells:
        labels, value = cell.plan.labels, cell.value(NOISE_VARIANCE.field)
        eta = labels.get("eta")
        if value is not None and isinstance(eta, int | float) and cell.steps and labels.get("variance") != "large":
            spacing = str(labels.get("spacing")) if len(spacings) > 1 else ""
            places.setdefault((cell.steps, spacing), {}).setdefault(
                float(eta), (value, cell.value("noise_variance_se"))
            )
    lines = {key: points for key, points in sorted(places.items()) if len(points) > 2}
    if not lines:
        return None
    names = {key: f"S = {key[0]}" + (f", {key[1]}" if key[1] else "") for key in lines}
    records: list[dict[str, Any]] = [
        {"series": names[key], "eta": eta, "variance": value, "low": value - (se or 0.0), "high": value + (se or 0.0)}
        | {"shown": small(value, 4) + (f" ± {small(se, 4)}" if se is not None else "")}
        for key, points in lines.items()
        for eta, (value, se) in sorted(points.items())
    ]
    keys = tuple(
        Key(label, PALETTE[i % len(PALETTE)], SHAPES[i % len(SHAPES)]) for i, label in enumerate(names.values())
    )
    etas, top = sorted({r["eta"] for r in records}), max(r["high"] for r in records)
    x = alt.X("eta:Q").scale(domain=[0, max(etas) * 1.03 or 1.0], nice=False)
    x = x.axis(values=etas, format="~g", grid=False).title("η")
    y = alt.Y("variance:Q").scale(domain=[0, top * 1.08 or 1.0], nice=False).axis(tickCount=6)
    y = y.title("variance across noise seeds")
    tooltip = [
        alt.Tooltip("series:N", title="steps"),
        alt.Tooltip("eta:Q", title="η"),
        alt.Tooltip("shown:N", title="variance"),
    ]
    base = alt.Chart(alt.InlineData(values=records))
    chart = alt.layer(
        base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=_colour(alt, keys)),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=_colour(alt, keys)),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=_colour(alt, keys), shape=_shape(alt, keys), tooltip=tooltip
        ),
    )
    caption = "Between runs from the same x_T with different noise. At η 0 nothing is drawn: exactly 0."
    if any(se is not None for points in lines.values() for _, se in points.values()):
        caption += " Bars: ±1 standard error over images."
    return Chart(name, f"{measure_heading(table, NOISE_VARIANCE)} against η", _spec(chart), keys, caption, table)


def _front_chart(table: PaperTable, name: str) -> Chart | None:
    """FD against seconds an image, both log, with the Pareto front."""
    import altair as alt

    found = [
        (row.series, c)
        for row in table.rows
        for c in row.cells.values()
        if _positive(c.fd) and _positive(c.seconds_per_image)
    ]
    if not found:
        return None
    heading, _ = metric_facts(table)
    points = [(cell.seconds_per_image or 0.0, cell.fd or 0.0) for _, cell in found]
    front = pareto_front(points)
    places = decimals([fd for _, fd in points])
    records: list[dict[str, Any]] = [
        {
            "series": series.label,
            "ms": seconds * 1e3,
            "fd": fd,
            "steps": str(cell.steps if cell.steps is not None else ""),
            "shown": number(fd, places),
            "front": "yes" if index in front else "no",
        }
        for index, ((series, cell), (seconds, fd)) in enumerate(zip(found, points, strict=True))
    ]
    times, values = [r["ms"] for r in records], [r["fd"] for r in records]
    x = alt.X("ms:Q").scale(type="log", domain=_padded(times, 1.25), nice=False)
    x = x.axis(values=_ticks(times), format="~g", grid=False).title("milliseconds an image")
    y = _log_y(alt, "fd:Q", values, heading, room=1.35)
    keys = _keys(series for series, _ in found)
    base = alt.Chart(alt.InlineData(values=records))
    line = alt.Chart(alt.InlineData(values=[records[index] for index in front]))
    tooltip = [
        alt.Tooltip("series:N", title="series"),
        alt.Tooltip("steps:N", title="steps"),
        alt.Tooltip("shown:N", title="FD"),
        alt.Tooltip("ms:Q", title="ms an image", format=".3~g"),
        alt.Tooltip("front:N", title="on the front"),
    ]
    chart = alt.layer(
        line.mark_line(color=GREY, strokeDash=[6, 4], interpolate="step-after").encode(x=x, y=y),
        line.mark_point(filled=False, size=230, color=GREY, opacity=1).encode(x=x, y=y),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=_colour(alt, keys), shape=_shape(alt, keys), tooltip=tooltip
        ),
        line.mark_text(dx=-14, dy=12).encode(x=x, y=y, text="steps:N"),
    )
    caption = (
        "Ringed and dashed: the Pareto front, which nothing beats in both, with its numbers of steps. Both axes are "
        "logarithmic; low and left is better."
    )
    caption += _left_out(table.cells)
    return Chart(name, f"{heading} against time", _spec(chart), keys, caption, table)


def _time_chart(sweep: Sweep, series: dict[int, Series]) -> Chart | None:
    """Time an image against network forwards, linear, with quartiles and the fitted line."""
    import altair as alt

    found = timed(sweep.cells)
    if not found:
        return None
    records: list[dict[str, Any]] = []
    for cell, count, seconds in found:
        speed = cell.speed
        images = speed.images if speed and speed.images else None
        quartiles = [speed.seconds_q1, speed.seconds_q3] if speed else [None, None]
        low, high = (q / images if q is not None and images else seconds for q in quartiles)
        records.append(
            {
                "series": series[cell.number].label,
                "forwards": count,
                "ms": seconds * 1e3,
                "low": low * 1e3,
                "high": high * 1e3,
            }
        )
    fits = timing_fits(sweep.cells, series)
    shown = fits[:1] if fits and fits[0].series is None else fits
    keys = _keys(series[cell.number] for cell, _, _ in found)
    lines: list[dict[str, Any]] = [
        {
            "series": fit.series.label if fit.series else "",
            "forwards": end,
            "ms": 1e3 * (fit.line.intercept + fit.line.slope * end),
        }
        for fit in shown
        for end in fit.forwards
    ]
    same = all(count == cell.steps for cell, count, _ in found)
    most = max(r["forwards"] for r in records)
    x = alt.X("forwards:Q").scale(domain=[0, most * 1.05], nice=False).axis(grid=False, tickCount=6)
    x = x.title("steps S" if same else FORWARDS)
    top = max([r["high"] for r in records] + [r["ms"] for r in lines])
    y = alt.Y("ms:Q").scale(domain=[0, top * 1.08 or 1.0], nice=False).axis(tickCount=6)
    y = y.title("milliseconds an image")
    base = alt.Chart(alt.InlineData(values=records))
    fitted = alt.Chart(alt.InlineData(values=lines)).mark_line(strokeWidth=1.5, clip=True)
    common = bool(fits) and fits[0].series is None
    layers = [
        fitted.encode(x=x, y=y, color=alt.value(GREY)) if common else fitted.encode(x=x, y=y, color=_colour(alt, keys)),
        base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=_colour(alt, keys)),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x,
            y=y,
            color=_colour(alt, keys),
            shape=_shape(alt, keys),
            tooltip=[
                alt.Tooltip("series:N", title="series"),
                alt.Tooltip("forwards:Q", title="forwards"),
                alt.Tooltip("ms:Q", title="ms an image", format=".4~g"),
            ],
        ),
    ]
    caption = "Median of the repeats; bars: quartiles."
    if shown:
        caption += " Lines: least squares" + (", all series together." if common else ", series by series.")
    caption += _left_out(sweep.cells)
    return Chart("time_against_steps", "Time against steps", _spec(alt.layer(*layers)), keys, caption)


def _training_chart(sweep: Sweep) -> Chart | None:
    """The training loss over optimiser steps, log y."""
    import altair as alt

    curves = training_curves(sweep)
    records: list[dict[str, Any]] = [
        {"series": curve.name, "step": step, "loss": loss}
        for curve in curves
        for step, loss in curve.points
        if loss > 0
    ]
    if not records:
        return None
    names = list(dict.fromkeys(str(r["series"]) for r in records))
    keys = tuple(Key(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names))
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("step:Q").axis(grid=False, tickCount=5).title("optimiser step"),
            y=_log_y(alt, "loss:Q", [float(r["loss"]) for r in records], "loss"),
            color=_colour(alt, keys),
            tooltip=[
                alt.Tooltip("step:Q", title="step", format=",.0f"),
                alt.Tooltip("loss:Q", title="loss", format=".4~g"),
            ],
        )
    )
    caption = "Each point is the mean over its stretch of the recorded losses."
    return Chart("training_curve", "Training loss", _spec(chart), keys, caption)


def phases(cell: Cell) -> dict[str, float]:
    """Seconds a phase: of this job, or, where it found its cell there, of the job that computed it."""
    pointer = cell.pointer
    if pointer and pointer.phases and not pointer.cached:
        return pointer.phases
    return cell.result.phases if cell.result else {}


def phase_name(phase: str) -> str:
    """A phase as readers call it."""
    return {"tracking": "W&B", "loop": "loop around it"}.get(phase, phase.replace("_", " "))


def _phases_chart(sweep: Sweep, series: dict[int, Series]) -> Chart | None:
    """Where each cell's time went: stacked bars, without what is done ONCE."""
    import altair as alt

    cell_names = name_cells(sweep.cells, series)
    records: list[dict[str, Any]] = [
        {"cell": cell_names[cell.number], "phase": phase_name(phase), "seconds": seconds, "order": order}
        for cell in sweep.cells
        for order, (phase, seconds) in enumerate(phases(cell).items())
        if _positive(seconds) and phase not in ONCE
    ]
    if not records:
        return None
    names = list(dict.fromkeys(str(r["phase"]) for r in records))
    keys = tuple(Key(name, PALETTE[i % len(PALETTE)], "square") for i, name in enumerate(names))
    bars = list(dict.fromkeys(str(r["cell"]) for r in records))
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q").axis(tickCount=5).title("seconds"),
            y=alt.Y("cell:N").sort(bars).axis(grid=False, labelLimit=150).title(None),
            color=_colour(alt, keys, field="phase"),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("cell:N", title="cell"),
                alt.Tooltip("phase:N", title="phase"),
                alt.Tooltip("seconds:Q", title="seconds", format=".3~g"),
            ],
        )
    )
    once = [*sweep.plan.phases.items()]
    once += [(phase_name(name), sum(phases(cell).get(name, 0.0) for cell in sweep.cells)) for name in ONCE]
    caption = "A cell found in the store shows what it cost when it was computed."
    if told := ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in once if seconds >= 0.05):
        caption = f"Not drawn: {told}. {caption}"
    height = max(120, 20 * len(bars))
    return Chart("time_per_phase", "Time per phase", _spec(chart, height), keys, caption)


# pieces


def _left_out(cells: Sequence[Cell]) -> str:
    """How many of the cells have a time that does not count, as the end of a caption; nothing if none has."""
    count = len(contended(cells))
    return f" {count} timed beside other work, left out." if count else ""


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _keys(series: Iterable[Series]) -> tuple[Key, ...]:
    return tuple(series_key(one) for one in sorted(set(series), key=lambda one: one.index))


def _colour(alt: Any, keys: Sequence[Key], field: str = "series") -> Any:
    scale = {"domain": [key.label for key in keys], "range": [key.colour for key in keys]}
    return alt.Color(f"{field}:N").scale(**scale).title(None)


def _shape(alt: Any, keys: Sequence[Key]) -> Any:
    scale = {"domain": [key.label for key in keys], "range": [key.shape for key in keys]}
    return alt.Shape("series:N").scale(**scale).title(None)


def _log_y(alt: Any, field: str, values: Sequence[float], title: str, room: float = 1.15) -> Any:
    y = alt.Y(field).scale(type="log", domain=_padded(values, room), nice=False)
    return y.axis(values=_ticks(values), format="~g").title(title)


def _padded(values: Sequence[float], factor: float) -> list[float]:
    """The values' range on a log axis with room at both ends, and some width if all are equal."""
    low, high = min(values), max(values)
    if high <= low:
        factor = max(factor, 1.5)
    return [low / factor, high * factor]


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers across the values' range: 1, 2, 5 times powers of ten; finer if these are too few."""
    low, high = _padded(values, 1.15)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [d / 10 for d in range(10, 100, 2)]):
        ticks = [float(f"{d}e{e}") for e in decades for d in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return inside


def _spec(chart: Any, height: int = HEIGHT) -> dict[str, Any]:
    """The chart's specification; `$schema` is left out, for it names an address that nothing needs."""
    spec: dict[str, Any] = chart.properties(height=height).to_dict()
    for name in ("$schema", "config"):
        spec.pop(name, None)
    return spec


def page_spec(chart: Chart) -> dict[str, Any]:
    """The chart for the page: as wide as its place, transparent; the page draws the legend and the text colour."""
    legend = {"disable": True}
    return {
        **chart.spec,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": {**_config(), "background": "transparent", "legend": legend},
    }


def static_png(chart: Chart) -> bytes:
    """The chart as a PNG, 2 pixels a point, on white, with title and legend."""
    import vl_convert

    png: bytes = vl_convert.vegalite_to_png(_static_spec(chart), scale=2)
    return png


def static_svg(chart: Chart) -> str:
    """The chart as an SVG, otherwise as `static_png`."""
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(_static_spec(chart))
    return svg


def _static_spec(chart: Chart) -> dict[str, Any]:
    several = len(chart.keys) > 1
    legend = {"orient": "bottom", "columns": min(6, len(chart.keys))} if several else {"disable": True}
    return {
        **chart.spec,
        "title": chart.title,
        "width": STATIC_WIDTH,
        "config": {**_config(), "background": "white", "padding": 12, "legend": legend},
    }


def _config() -> dict[str, Any]:
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
    return {
        "font": font,
        "view": {"stroke": None},
        "axis": {
            "domainColor": GREY,
            "tickColor": GREY,
            "gridColor": GREY,
            "gridOpacity": 0.25,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "labelOverlap": "greedy",
        },
        "title": {"fontSize": 14, "anchor": "start"},
        "text": {"fontSize": 11},
    }
