"""report.html: one self-contained file, made of sections.

Text goes through the template's escaping, charts through `script_json`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ddim_lab.errors import one_line
from ddim_lab.report.blocks import Section
from ddim_lab.report.charts import Chart, sweep_charts
from ddim_lab.report.drawing import chart_library, page_spec
from ddim_lab.report.read import Sweep
from ddim_lab.report.sections import sections

HERE = Path(__file__).parent


def page(sweep: Sweep) -> str:
    """The whole report as HTML."""
    charts = sweep_charts(sweep)
    return render(
        title=sweep.title,
        summary=summary(sweep),
        sections=sections(sweep, charts),
        charts=charts,
        command=sweep.plan.command,
        created=sweep.plan.created,
        notes=sweep.plan.notes or "",
        failures=[(sweep.names[c.number], c.status, c.error) for c in sweep.cells if c.error is not None],
    )


def render(
    *,
    title: str,
    summary: str,
    sections: Sequence[Section],
    charts: Sequence[Chart],
    command: str = "",
    created: str = "",
    notes: str = "",
    failures: Sequence[tuple[str, str, str]] = (),
    style: str = "",
) -> str:
    """A page of these parts as HTML, which needs nothing beside itself.

    Args:
        title, summary, command, created, notes: what stands above the sections; "" for nothing.
        sections: of blocks; each `Figure` draws one of `charts`.
        charts: drawn by the page's script.
        failures: (name, status, error) of what has no result.
        style: CSS of this page alone.
    """
    return _template().render(
        title=title,
        command=one_line(command),
        created=created,
        summary=summary,
        failures=failures,
        plan_notes=notes,
        sections=sections,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8") + style),
        specs=script_json({chart.name: page_spec(chart) for chart in charts}),
        library=chart_library() if charts else "",
        code=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


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


def summary(sweep: Sweep) -> str:
    """One paragraph: how many cells of what, on what model, data and machine, and how they ended."""
    cells = sweep.cells
    done = [cell for cell in cells if cell.status == "done"]

    def values(name: str) -> list[Any]:
        return list(dict.fromkeys(v for c in cells if (v := c.labels.get(name)) is not None))

    def recipe(*path: str) -> list[Any]:
        found = (c.recipe(*path) for c in done)
        return list(dict.fromkeys(v for v in found if isinstance(v, str | int | float)))

    series = sorted(set(sweep.series.values()), key=lambda s: s.index)
    parts = [f"{_count(len(cells), 'cell')}: {_listed(s.label for s in series)}"]
    if nfe := sorted(values("nfe_asked")):
        parts[0] += (
            f"; at {_listed(map(str, nfe))} forwards a sample (NFE), of which each takes as many steps as it can"
        )
    if steps := sorted({cell.budget for cell in cells if cell.budget is not None and cell.budget_unit == "S"}):
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
        if batches := recipe("batch_size") or values("batch_size"):
            text += f", in batches of {_listed(map(str, batches))}"
        if seeds := values("seed"):
            text += f", seed {_listed(map(str, seeds))}"
        if any(cell.result is None or cell.result.common_start for cell in cells):
            text += ": sample i starts from the same noise x_T in every cell of a seed"
        parts.append(text)
    if devices := recipe("runtime", "device_name") or recipe("runtime", "device"):
        arithmetic = [(c.recipe("runtime", "precision"), c.recipe("runtime", "compile")) for c in done]
        said = dict.fromkeys(f"{name}{', compiled' if compiled else ''}" for name, compiled in arithmetic if name)
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
