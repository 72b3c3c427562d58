"""The report's charts: of values, of times and of the training, as Vega-Lite specifications."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ddim_lab.report.cells import Cell, contended
from ddim_lab.report.numbers import decimals, with_error
from ddim_lab.report.read import Sweep, training_curves
from ddim_lab.report.series import Series
from ddim_lab.report.tables import ValueTable
from ddim_lab.report.timing import pareto_front, timed, timing_fits
from ddim_lab.report.vega import (
    GREY,
    PALETTE,
    Key,
    Spec,
    colour_of,
    field_of,
    key_of,
    layer_of,
    linear_axis,
    log_axis,
    points_of,
    spec_of,
    ticks,
    tip,
)

ONCE = ("train", "feature_network")
"""Phases that are done once a sweep, beside which the others would vanish."""
FORWARDS = "network forwards a sample (NFE)"


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart: `name` is unique in the sweep, `spec` Vega-Lite without width, configuration and legend.

    `of` is the table whose values it draws; None for a chart of something else. `table` is the title of what it draws
    of the tables that tasks add to their cells.
    """

    name: str
    title: str
    spec: Spec
    keys: tuple[Key, ...]
    caption: str
    of: ValueTable | None = None
    table: str | None = None


def sweep_charts(sweep: Sweep) -> list[Chart]:
    """Every chart that the sweep has data for."""
    charts: list[Chart | None] = []
    shown = [values for _, found in sweep.shown for values in found]
    for values in shown:
        same = [other for other in shown if other.value.name == values.value.name]
        suffix = "" if len(same) == 1 else f"_{same.index(values) + 1}"
        name = f"{values.value.name}_against"
        if values.value.against == "eta":
            charts.append(_eta_chart(values, f"{name}_eta{suffix}"))
        if values.value.against == "steps":
            in_steps = values.table.unit == "S"
            if in_steps:
                charts.append(_steps_chart(values, f"{name}_steps{suffix}"))
            if not in_steps or any(cell.forwards not in (None, cell.steps) for cell in values.table.cells):
                charts.append(_steps_chart(values, f"{name}_forwards{suffix}", forwards=True))
            if values.leads and values.value.better is not None:
                charts.append(_front_chart(values, f"{name}_seconds{suffix}"))
    charts += [*_table_charts(sweep), _time_chart(sweep), _training_chart(sweep), _phases_chart(sweep)]
    return [chart for chart in charts if chart is not None]


# -- values ---------------------------------------------------------------------------------------------


def _steps_chart(of: ValueTable, name: str, *, forwards: bool = False) -> Chart | None:
    """A value against steps, or against the forwards really done; log-log, with bars of one standard error.

    None for fewer than two of them, but for the value that leads.
    """

    def cost(cell: Cell) -> int | None:
        return cell.forwards if forwards else cell.steps

    found = [
        (row.series, cost(cell), value, of.se_of(cell))
        for row in of.table.rows
        for cell in row.cells.values()
        if (value := of.number_of(cell)) is not None and value > 0 and cost(cell)
    ]
    costs = sorted({cost or 0 for _, cost, _, _ in found})
    if len(costs) < (1 if of.leads else 2):
        return None
    records: list[Spec] = [
        {"series": series.label, "steps": cost, "value": value}
        # a bar that reaches zero has no lower end on a log axis: it stops at a tenth of the value
        | {"low": max(value - (se or 0.0), value / 10), "high": value + (se or 0.0)}
        | {"shown": with_error(value, se, max(of.places, decimals([value])))}
        for series, cost, value, se in found
    ]
    level = of.level if of.level_fits and of.level and (of.level.number or 0.0) > 0 else None
    extent = [value for r in records for value in (r["low"], r["high"])] + ([level.number] if level else [])
    x = {**log_axis("steps", costs), "axis": {"values": costs, "format": "d", "grid": False}}
    x["title"] = FORWARDS if forwards else "steps S"
    y, low = (log_axis(field, extent, of.value.heading) for field in ("value", "low"))
    keys = _keys(series for series, _, _, _ in found)
    tooltip = [
        tip("series", "series"),
        tip("steps", "forwards" if forwards else "steps", "quantitative"),
        tip("shown", of.value.heading),
    ]
    layers = points_of(x, y, keys, tooltip, bars=low)
    caption = f"{of.facts[:1].upper()}{of.facts[1:]}."
    if any(se is not None for _, _, _, se in found):
        caption += " Bars: ±1 standard error."
    datasets = {"points": records}
    if level is not None and level.number is not None:
        datasets["level"] = [{"value": level.number, "text": level.label}]
        layers.append(layer_of("level", {"type": "rule", "color": GREY, "strokeDash": [6, 4]}, y=y))
        text = {"type": "text", "align": "right", "baseline": "bottom", "dx": -4, "dy": -3}
        layers.append(layer_of("level", text, x={"value": "width"}, y=y, text=field_of("text")))
        told = with_error(level.number, level.finite_se, of.places)
        caption += f" Dashed: {level.label}{level.facts and f', {level.facts}'} ({told})."
    elif of.level is not None and of.level.label:
        caption += f" {of.level.label[:1].upper()}{of.level.label[1:]}: measured at another N, not drawn here."
    caption += _not_on_a_log_axis(of)
    title = f"{of.heading} against {'network forwards' if forwards else 'steps'}"
    return Chart(name, title, spec_of(layers, datasets), keys, caption.strip(), of)


def _not_on_a_log_axis(of: ValueTable) -> str:
    left_out = [n for cell in of.table.cells if (n := of.number_of(cell)) is not None and n <= 0]
    if not left_out:
        return ""
    which = "below 0" if any(left_out) else "of exactly 0"
    return f" Values {which} have no place on a log axis and are left out."


def _eta_chart(of: ValueTable, name: str) -> Chart | None:
    """A value against eta, linear, a line for each number of steps; from three etas on."""
    places: dict[tuple[int, str], dict[float, tuple[float, float | None]]] = {}
    table = of.table
    spacings = {str(cell.labels.get("spacing")) for cell in table.cells}
    for cell in table.cells:
        value, eta = of.number_of(cell), cell.labels.get("eta")
        budget, other = cell.budget, cell.labels.get("variance") in ("large", "analytic")
        if value is not None and isinstance(eta, int | float) and budget and not other:
            spacing = str(cell.labels.get("spacing")) if len(spacings) > 1 else ""
            places.setdefault((budget, spacing), {}).setdefault(float(eta), (value, of.se_of(cell)))
    lines = {key: points for key, points in sorted(places.items()) if len(points) > 2}
    if not lines:
        return None
    names = {key: table.heading(key[0]) + (f", {key[1]}" if key[1] else "") for key in lines}
    records: list[Spec] = [
        {"series": names[key], "eta": eta, "value": value, "low": value - (se or 0.0), "high": value + (se or 0.0)}
        | {"shown": with_error(value, se, 4)}
        for key, points in lines.items()
        for eta, (value, se) in sorted(points.items())
    ]
    keys = tuple(key_of(index, label) for index, label in enumerate(names.values()))
    etas, top = sorted({r["eta"] for r in records}), max(r["high"] for r in records)
    x = linear_axis("eta", max(etas) * 1.03, "η") | {"axis": {"values": etas, "format": "~g", "grid": False}}
    y, low = (linear_axis(field, top * 1.08, of.value.heading) for field in ("value", "low"))
    tooltip = [tip("series", "steps"), tip("eta", "η", "quantitative"), tip("shown", of.value.heading)]
    caption = f"{of.facts[:1].upper()}{of.facts[1:]}."
    if any(se is not None for points in lines.values() for _, se in points.values()):
        caption += " Bars: ±1 standard error."
    spec = spec_of(points_of(x, y, keys, tooltip, bars=low), {"points": records})
    return Chart(name, f"{of.heading} against η", spec, keys, caption.strip(), of)


def _front_chart(of: ValueTable, name: str) -> Chart | None:
    """A value against seconds an image, both log, with the Pareto front."""
    found = [
        (row.series, cell, cell.seconds, value)
        for row in of.table.rows
        for cell in row.cells.values()
        if (value := of.number_of(cell)) is not None and value > 0 and cell.seconds
    ]
    if not found:
        return None
    sign = 1.0 if of.value.better == "lower" else -1.0
    front = pareto_front([(seconds, sign * value) for _, _, seconds, value in found])
    records: list[Spec] = [
        {"series": series.label, "ms": seconds * 1e3, "value": value, "shown": with_error(value, None, of.places)}
        | {"budget": str(cell.budget if cell.budget is not None else ""), "front": "yes" if index in front else "no"}
        for index, (series, cell, seconds, value) in enumerate(found)
    ]
    times = [r["ms"] for r in records]
    x = log_axis("ms", times, "milliseconds an image", room=1.25)
    x["axis"] = {"values": ticks(times), "format": "~g", "grid": False}
    y = log_axis("value", [r["value"] for r in records], of.value.heading, room=1.35)
    keys = _keys(series for series, _, _, _ in found)
    tooltip = [
        *(tip("series", "series"), tip("budget", of.table.unit), tip("shown", of.value.heading)),
        *(tip("ms", "ms an image", "quantitative", ".3~g"), tip("front", "on the front")),
    ]
    line = {"type": "line", "color": GREY, "strokeDash": [6, 4], "interpolate": "step-after"}
    rings = {"type": "point", "filled": False, "size": 230, "color": GREY, "opacity": 1}
    layers = [
        layer_of("front", line, x=x, y=y),
        layer_of("front", rings, x=x, y=y),
        points_of(x, y, keys, tooltip)[-1],
        layer_of("front", {"type": "text", "dx": -14, "dy": 12}, x=x, y=y, text=field_of("budget")),
    ]
    caption = (
        f"Ringed and dashed: the Pareto front, which nothing beats in both, with its {of.table.unit}. Both axes are "
        f"logarithmic; {'low' if sign > 0 else 'high'} and left is better."
    )
    spec = spec_of(layers, {"points": records, "front": [records[index] for index in front]})
    return Chart(name, f"{of.heading} against time", spec, keys, caption + _left_out(of.table.cells), of)


def _table_charts(sweep: Sweep) -> list[Chart]:
    """What tasks want drawn of their tables: those of one title together."""
    found: dict[tuple[str, tuple[str, str]], dict[tuple[Series, float, float], None]] = {}  # each point once
    for cell in sweep.by_series:
        for table in cell.result.tables if cell.result else ():
            if table.drawn is not None and set(table.drawn) <= set(table.columns):
                x, y = map(table.columns.index, table.drawn)
                points_of_title = found.setdefault((table.title, table.drawn), {})
                for row in table.rows:
                    if _on_a_log_axis(row[x]) and _on_a_log_axis(row[y]):
                        points_of_title[sweep.series[cell.number], row[x], row[y]] = None
    charts = []
    for number, ((title, (of_x, of_y)), points) in enumerate(found.items(), 1):
        if not points:
            continue
        records: list[Spec] = [{"series": series.label, "x": x, "value": y} for series, x, y in points]
        keys = _keys(series for series, _, _ in points)
        x_axis = log_axis("x", [r["x"] for r in records], of_x)
        y_axis = log_axis("value", [r["value"] for r in records], of_y)
        tooltip = [
            tip("series", "series"),
            *(tip(field, name, "quantitative", ".4~g") for field, name in (("x", of_x), ("value", of_y))),
        ]
        spec = spec_of(points_of(x_axis, y_axis, keys, tooltip), {"points": records})
        charts.append(Chart(f"table_{number}", title, spec, keys, "Both axes are logarithmic.", table=title))
    return charts


def _on_a_log_axis(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


# -- time, training -------------------------------------------------------------------------------------


def _time_chart(sweep: Sweep) -> Chart | None:
    """Time an image against network forwards, linear, with quartiles and the fitted line."""
    found = timed(sweep.cells)
    if not found:
        return None
    records: list[Spec] = []
    for cell, count, seconds in found:
        low, high = (cell.time and cell.time.quartiles) or (seconds, seconds)
        of = {"series": sweep.series[cell.number].label, "forwards": count}
        records.append(of | {"ms": seconds * 1e3, "low": low * 1e3, "high": high * 1e3})
    fits = timing_fits(sweep.cells, sweep.series)
    common = bool(fits) and fits[0].series is None
    lines: list[Spec] = [
        {"series": fit.series.label if fit.series else "", "forwards": end}
        | {"ms": 1e3 * (fit.line.intercept + fit.line.slope * end)}
        for fit in (fits[:1] if common else fits)
        for end in fit.forwards
    ]
    keys = _keys(sweep.series[cell.number] for cell, _, _ in found)
    same = all(count == cell.steps for cell, count, _ in found)
    x = linear_axis("forwards", max(r["forwards"] for r in records) * 1.05, "steps S" if same else FORWARDS)
    x["axis"] = {"grid": False, "tickCount": 6}
    top = max([r["high"] for r in records] + [r["ms"] for r in lines]) * 1.08
    y, low_end = (linear_axis(field, top, "milliseconds an image") for field in ("ms", "low"))
    tooltip = [
        *(tip("series", "series"), tip("forwards", "forwards", "quantitative")),
        tip("ms", "ms an image", "quantitative", ".4~g"),
    ]
    colour = {"value": GREY} if common else colour_of(keys)
    line = layer_of("lines", {"type": "line", "strokeWidth": 1.5, "clip": True}, x=x, y=y, color=colour)
    bars, _, points = points_of(x, y, keys, tooltip, bars=low_end)
    caption = "Median of the repeats; bars: quartiles."
    if lines:
        caption += " Lines: least squares" + (", all series together." if common else ", series by series.")
    spec = spec_of([line, bars, points], {"points": records, "lines": lines})
    return Chart("time_against_steps", "Time against steps", spec, keys, caption + _left_out(sweep.cells))


def _training_chart(sweep: Sweep) -> Chart | None:
    """The training loss over optimiser steps, log y."""
    records: list[Spec] = [
        {"series": curve.name, "step": step, "loss": loss}
        for curve in training_curves(sweep)
        for step, loss in curve.points
        if loss > 0
    ]
    if not records:
        return None
    names = list(dict.fromkeys(str(r["series"]) for r in records))
    keys = tuple(Key(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names))
    x = field_of("step", "quantitative", title="optimiser step", axis={"grid": False, "tickCount": 5})
    y = log_axis("loss", [float(r["loss"]) for r in records], "loss")
    tooltip = [tip("step", "step", "quantitative", ",.0f"), tip("loss", "loss", "quantitative", ".4~g")]
    line = layer_of("points", {"type": "line", "strokeWidth": 1.5}, x=x, y=y, color=colour_of(keys), tooltip=tooltip)
    caption = "Each point is the mean over its stretch of the recorded losses."
    return Chart("training_curve", "Training loss", spec_of([line], {"points": records}), keys, caption)


def phases(cell: Cell) -> dict[str, float]:
    """Seconds a phase: of this job, or, where it found its cell there, of the job that computed it."""
    pointer = cell.pointer
    if pointer and pointer.phases and not pointer.cached:
        return pointer.phases
    return cell.result.phases if cell.result else {}


def phase_name(phase: str) -> str:
    """A phase as readers call it."""
    return {"tracking": "W&B", "loop": "loop around it"}.get(phase, phase.replace("_", " "))


def _phases_chart(sweep: Sweep) -> Chart | None:
    """Where each cell's time went: stacked bars, without what is done ONCE."""
    records: list[Spec] = [
        {"cell": sweep.names[cell.number], "phase": phase_name(phase), "seconds": seconds, "order": order}
        for cell in sweep.cells
        for order, (phase, seconds) in enumerate(phases(cell).items())
        if math.isfinite(seconds) and seconds > 0 and phase not in ONCE
    ]
    if not records:
        return None
    names = list(dict.fromkeys(str(r["phase"]) for r in records))
    keys = tuple(Key(name, PALETTE[i % len(PALETTE)], "square") for i, name in enumerate(names))
    bars = list(dict.fromkeys(str(r["cell"]) for r in records))
    layer = layer_of(
        "points",
        {"type": "bar"},
        x=field_of("seconds", "quantitative", title="seconds", axis={"tickCount": 5}),
        y=field_of("cell", sort=bars, axis={"grid": False, "labelLimit": 150}, title=None),
        color=colour_of(keys, field="phase"),
        order=field_of("order", "quantitative"),
        tooltip=[tip("cell", "cell"), tip("phase", "phase"), tip("seconds", "seconds", "quantitative", ".3~g")],
    )
    once = [*sweep.plan.phases.items()]
    once += [(phase_name(name), sum(phases(cell).get(name, 0.0) for cell in sweep.cells)) for name in ONCE]
    caption = "A cell found in the store shows what it cost when it was computed."
    if told := ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in once if seconds >= 0.05):
        caption = f"Not drawn: {told}. {caption}"
    spec = spec_of([layer], {"points": records}, height=max(120, 20 * len(bars)))
    return Chart("time_per_phase", "Time per phase", spec, keys, caption)


# -- pieces ---------------------------------------------------------------------------------------------


def _left_out(cells: Sequence[Cell]) -> str:
    """How many of the cells have a time that does not count, as the end of a caption; nothing if none has."""
    count = len(contended(cells))
    return f" {count} timed beside other work, left out." if count else ""


def _keys(series: Iterable[Series]) -> tuple[Key, ...]:
    return tuple(key_of(one.index, one.label) for one in sorted(set(series), key=lambda one: one.index))
