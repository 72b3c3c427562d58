"""An audit's report.html: the paragraph, a bar for each convention, the table, and what was not tried."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Final

from ddim_lab.audit.told import (
    change_places,
    distance,
    fitting_pairs,
    notes,
    pairs_not_shown,
    plain_fit,
    reasons,
    singles_by_part,
)
from ddim_lab.conventions.explanation import as_written, with_error
from ddim_lab.conventions.records import Audited, Tried
from ddim_lab.report.blocks import Block, Box, Figure, Folds, Grid, Points, Section
from ddim_lab.report.charts import Chart
from ddim_lab.report.numbers import DASH, exact
from ddim_lab.report.page import render
from ddim_lab.report.vega import GREY, Key, Spec, colour_of, field_of, key_of, layer_of, spec_of, tip

__all__ = ["chart", "page"]

BAR: Final = 24
"""Pixels of a bar's row."""

LABELS: Final = {"expr": "min(320, max(110, 0.4 * (containerSize()[0] || 800)))"}
"""Pixels of a bar's label, at most; on a phone its end is left to the tooltip and the table."""

SPREAD: Final = 20.0
"""Largest change over the median from which on the axis is logarithmic: the others would vanish beside it."""

STYLE: Final = """
#conventions td:last-child, #conventions thead th:last-child, #pairs td:last-child, #pairs thead th:last-child,
#what-each-is td, #what-each-is thead th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
#conventions td:last-child, #pairs td:last-child, #what-each-is td { min-width: 12rem; }
#conventions tbody th, #pairs tbody th { max-width: 26rem; font-weight: 400; }
@media (min-width: 60rem) { #conventions tbody th, #pairs tbody th { min-width: 16rem; } }
#conventions tbody tr:first-child th, #conventions tbody tr:not(:has(data)) th { font-weight: 600; }
"""
"""Words to the left, numbers to the right; the rows without numbers are headings."""


def page(audited: Audited) -> str:
    """The whole report as HTML, which needs nothing beside itself."""
    drawn = chart(audited)
    charts = [] if drawn is None else [drawn]
    conventions: list[Block] = [Figure(one, wide=True) for one in charts]
    conventions.append(_grid(audited))
    sections = [
        Section("conventions", "One convention changed at a time", tuple(conventions)),
        *_pairs(audited),
        *_not_tried(audited),
        Section("what-each-is", "What each is", (_described(audited),)),
        Section("taken", "How it was taken", _taken(audited)),
    ]
    return render(
        title=f"Audit: {audited.subject}",
        summary=audited.paragraph or _summary(audited),
        sections=sections,
        charts=charts,
        command=audited.command,
        created=audited.created,
        style=STYLE,
    )


def _summary(audited: Audited) -> str:
    """Where nothing is claimed: the number, and what was done."""
    numbers = [
        with_error(measured.value, measured.se) + (f" at {point}" if point else "")
        for point, measured in zip(audited.points, audited.plain.measured, strict=False)
    ]
    singles = sum(len(of) for of in singles_by_part(audited).values())
    count = f"N = {audited.num_samples:,}"
    told = "; ".join(filter(None, [count, audited.facts]))
    changed = f"{singles} {'convention was' if singles == 1 else 'conventions were'} changed, one at a time"
    return f"{audited.metric} is {', '.join(numbers)} ({told}). {changed}."


# -- the chart ------------------------------------------------------------------------------------------


def chart(audited: Audited) -> Chart | None:
    """A bar for each convention: its change at the first point, with its error, and the claim's as a band."""
    parts = singles_by_part(audited)
    keys = tuple(Key(part, key_of(index, part).colour, "square") for index, part in enumerate(parts))
    bars: list[Spec] = []
    for part, tried_of in parts.items():
        for tried in tried_of:
            measured = tried.measured[0] if tried.measured else None
            if measured is None or measured.change is None:
                continue
            se = measured.change_se or 0.0
            bars.append(
                {"factor": tried.label, "part": part, "change": measured.change, "zero": 0}
                | {"low": measured.change - se, "high": measured.change + se}
                | {"shown": with_error(measured.change, measured.change_se, sign=True)}
                | {"value": with_error(measured.value, measured.se), "who": ", ".join(tried.who)}
            )
    if not bars:
        return None
    found, at = plain_fit(audited), audited.points[0]
    datasets = {"points": bars, "zero": [{"zero": 0}]}
    reach = [abs(bar[end]) for bar in bars for end in ("low", "high")]
    if found is not None:
        off, sd = found.differences[0], found.sds[0]
        datasets["claim"] = [{"off": off, "low": off - sd, "high": off + sd}]
        reach.append(abs(off) + sd)
    scale, axis, apart = _scale([abs(bar["change"]) for bar in bars], max(reach), found is not None)
    title = f"change of {audited.metric}" + (f" at {at}" if at else "")

    def along(field: str) -> Spec:
        return field_of(field, "quantitative", scale=scale, axis=axis, title=title)

    labels = [bar["factor"] for bar in bars]
    y = field_of("factor", sort=labels, axis={"grid": False, "labelLimit": LABELS, "domain": False}, title=None)
    tooltip = [
        *(tip("factor", "convention"), tip("value", f"{audited.metric} variant"), tip("shown", "change")),
        tip("who", "who does it so"),
    ]
    colour = colour_of(keys, field="part")
    layers = [
        layer_of("points", {"type": "bar", "opacity": 0.5}, x=along("zero"), x2={"field": "change"}, y=y)
        | {"encoding": {"x": along("zero"), "x2": {"field": "change"}, "y": y, "color": colour, "tooltip": tooltip}},
        layer_of("points", {"type": "rule", "strokeWidth": 2}, x=along("low"), x2={"field": "high"}, y=y, color=colour),
        layer_of("zero", {"type": "rule", "color": GREY}, x=along("zero")),
    ]
    caption = f"Each bar: the {audited.metric} variant less the plain {audited.metric}, both of the same images"
    caption += f", at {at}" if at else ""
    caption += "; lines: ±1 standard error of that."
    if found is not None:
        claim = audited.claims[0]
        layers.insert(
            0, layer_of("claim", {"type": "rect", "color": GREY, "opacity": 0.25}, x=along("low"), x2={"field": "high"})
        )
        layers.append(layer_of("claim", {"type": "rule", "color": GREY, "strokeDash": [6, 4]}, x=along("off")))
        off_text = with_error(found.differences[0], found.sds[0], sign=True)
        caption += (
            f" Dashed: the claim, {as_written(claim)}, less the plain {audited.metric}; band: ± its error ({off_text})."
        )
    caption += apart
    spec = spec_of(layers, datasets, height=max(120, BAR * len(set(labels))))
    return Chart("changes", f"What each convention changes{f', at {at}' if at else ''}", spec, keys, caption)


def _scale(changes: Sequence[float], reach: float, claimed: bool) -> tuple[Spec, Spec, str]:
    """The axis of changes: linear, or, where one dwarfs the others, logarithmic on both sides of 0; in words."""
    told = [change for change in changes if change > 0.0]
    median = statistics.median(told) if told else 0.0
    if not told or reach <= SPREAD * median or not median > 1e-12:
        return {"zero": True}, {"tickCount": 7}, ""
    constant = 10.0 ** math.floor(math.log10(median))
    decades = range(math.floor(math.log10(constant)), math.ceil(math.log10(reach)) + 1)
    sizes = [float(f"1e{decade}") for decade in decades]
    values = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    near = f" The axis is linear up to about {constant:g}, logarithmic beyond."
    return {"type": "symlog", "constant": constant}, {"values": values, "format": "~g"}, near


# -- tables ---------------------------------------------------------------------------------------------


def _head(audited: Audited) -> tuple[str, ...]:
    head = ["convention"]
    for point in audited.points:
        head += [point or f"{audited.metric}, or variant", "change"]
    return (*head, *(["errors from the claim"] if audited.claims else []), "who does it so")


def _number(value: float | None, se: float | None, *, sign: bool = False, most: int = 6) -> Box:
    """Short to look at, exact behind that."""
    if value is None:
        return Box(DASH)
    text, _, error = with_error(value, se, sign=sign, most=most).partition(" ± ")
    return Box(text, error=error, exact=exact(value))


def _line(audited: Audited, tried: Tried, label: str) -> tuple[Box, ...]:
    """Number and change at each point, errors, who does it so."""
    boxes, most = [Box(label, head=True)], change_places(audited)
    for index in range(len(audited.points)):
        if index >= len(tried.measured):
            boxes += [Box(DASH), Box(DASH)]
            continue
        one = tried.measured[index]
        change = _number(one.change, one.change_se, sign=True, most=most) if tried.factors else Box("")
        boxes += [_number(one.value, one.se), change]
    errors = [Box(distance(audited, tried).strip())] if audited.claims else []
    return (*boxes, *errors, Box(", ".join(tried.who)))


def _claimed(audited: Audited) -> list[tuple[Box, ...]]:
    """The claims as a line of the table."""
    if not audited.claims:
        return []
    found = plain_fit(audited)
    boxes = [Box("claimed", head=True)]
    for index, claim in enumerate(audited.claims):
        error = "" if found is None else f"{found.claim_sds[index]:.2g}"
        boxes.append(Box(as_written(claim), error=error, exact=exact(claim.value)))
        boxes.append(Box("") if found is None else _number(found.differences[index], found.sds[index], sign=True))
    sources = ", ".join(dict.fromkeys(claim.source for claim in audited.claims if claim.source))
    return [(*boxes, Box(""), Box(sources))]


def _grid(audited: Audited) -> Grid:
    rows = [_line(audited, audited.plain, f"{audited.metric}, as the field takes it"), *_claimed(audited)]
    empty = len(_head(audited)) - 1
    for part, tried_of in singles_by_part(audited).items():
        rows.append((Box(part, head=True), *(Box("") for _ in range(empty))))
        rows += [_line(audited, tried, tried.label) for tried in tried_of]
    facts = " · ".join(filter(None, [audited.facts, f"N = {audited.num_samples:,}"]))
    return Grid("", _head(audited), tuple(rows), facts=facts, notes=tuple(notes(audited)), wide=True)


def _pairs(audited: Audited) -> list[Section]:
    """The pairs that fit, and how many others there are."""
    pairs, others = fitting_pairs(audited)
    if not pairs and not others:
        return []
    more = tuple(filter(None, [pairs_not_shown(len(pairs), others)]))
    rows = tuple(_line(audited, tried, tried.label) for tried in pairs)
    block: Block = Grid("", _head(audited), rows, notes=more, wide=True) if rows else Points("None does", more)
    return [Section("pairs", "Pairs that fit", (block,))]


def _not_tried(audited: Audited) -> list[Section]:
    """All of it, each reason once."""
    lines = {
        left: tuple(f"{', '.join((*r.singles, *r.pairs))}: {r.text}" for r in reasons(audited) if r.left is left)
        for left in (False, True)
    }
    blocks: list[Block] = []
    if lines[False]:
        blocks.append(Points("Can't be tried here", lines[False]))
    if lines[True]:
        blocks.append(Points("Left out: a longer --budget, or no --factors, would try it", lines[True]))
    return [Section("not-tried", "Not tried", tuple(blocks))] if blocks else []


def _described(audited: Audited) -> Grid:
    """Each convention in a sentence, and where it can be read."""
    rows = tuple(
        (Box(tried.label, head=True), Box(tried.says), Box(", ".join(tried.who)), Box(tried.source))
        for tried_of in singles_by_part(audited).values()
        for tried in tried_of
    )
    return Grid("", ("convention", "what is done otherwise", "who does it so", "source"), rows, wide=True)


def _taken(audited: Audited) -> tuple[Block, ...]:
    lines = [
        f"{audited.subject}, N = {audited.num_samples:,}.",
        *([f"{audited.facts}."] if audited.facts else []),
        *(
            f"Claimed{f' at {claim.at}' if claim.at else ''}: {as_written(claim)}, of {claim.num_samples:,} images,"
            f" rounded to ± {claim.half_digit:g}{f' ({claim.source})' if claim.source else ''}."
            for claim in audited.claims
        ),
        f"This run took {audited.forwards:,} image-forwards and {audited.seconds:,.1f} s.",
    ]
    blocks: list[Block] = [Points("Samples, reference and cost", tuple(lines))]
    if audited.environment:
        blocks.append(Folds((("Environment", json.dumps(audited.environment, indent=1, ensure_ascii=False)),)))
    return tuple(blocks)
