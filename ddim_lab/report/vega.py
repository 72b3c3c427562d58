"""Pieces of Vega-Lite specifications: axes, layers, and the colours and marks of series.

A specification is the JSON that Vega-Lite reads. It is written as such: Altair, which writes it from calls, takes half
a second to import, and what it checks is checked here by drawing every chart in tests.

A series has the same colour and mark in every chart. Colours are those of Okabe and Ito (2008), which the
colour-blind can tell apart, less the yellow and the black that vanish on one of the two backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEIGHT = 300

Spec = dict[str, Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
GREY = "#888888"


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend."""

    label: str
    colour: str
    shape: str = "circle"


def key_of(index: int, label: str) -> Key:
    return Key(label, PALETTE[index % len(PALETTE)], SHAPES[index % len(SHAPES)])


def field_of(name: str, kind: str = "nominal", **more: Any) -> Spec:
    return {"field": name, "type": kind, **more}


def tip(name: str, title: str, kind: str = "nominal", format: str | None = None) -> Spec:
    return field_of(name, kind, title=title) | ({} if format is None else {"format": format})


def layer_of(data: str, mark: Spec, **encoding: Any) -> Spec:
    return {"data": {"name": data}, "mark": mark, "encoding": encoding}


def points_of(x: Spec, y: Spec, keys: Sequence[Key], tooltip: list[Spec], bars: Spec | None = None) -> list[Spec]:
    """Bars from `bars` to "high" if given, a line, and marks with a tooltip."""
    colour, mark = colour_of(keys), {"type": "point", "filled": True, "size": 70, "opacity": 1}
    shape = field_of("series", scale=scale_of(keys, "shape"), title=None)
    layers = [
        layer_of("points", {"type": "line", "strokeWidth": 2}, x=x, y=y, color=colour),
        layer_of("points", mark, x=x, y=y, color=colour, shape=shape, tooltip=tooltip),
    ]
    if bars is None:
        return layers
    rule = {"type": "rule", "strokeWidth": 1.5}
    return [layer_of("points", rule, x=x, y=bars, y2={"field": "high"}, color=colour), *layers]


def scale_of(keys: Sequence[Key], attribute: str) -> Spec:
    return {"domain": [key.label for key in keys], "range": [getattr(key, attribute) for key in keys]}


def colour_of(keys: Sequence[Key], field: str = "series") -> Spec:
    return field_of(field, scale=scale_of(keys, "colour"), title=None)


def linear_axis(field: str, top: float, title: str) -> Spec:
    scale = {"domain": [0, top or 1.0], "nice": False}
    return field_of(field, "quantitative", scale=scale, axis={"tickCount": 6}, title=title)


def log_axis(field: str, values: Sequence[float], title: str = "", room: float = 1.15) -> Spec:
    scale = {"type": "log", "domain": padded(values, room), "nice": False}
    axis = {"values": ticks(values), "format": "~g"}
    return field_of(field, "quantitative", scale=scale, axis=axis, title=title)


def padded(values: Sequence[float], factor: float) -> list[float]:
    """The values' range on a log axis with room at both ends, and some width if all are equal."""
    low, high = min(values), max(values)
    if high <= low:
        factor = max(factor, 1.5)
    return [low / factor, high * factor]


def ticks(values: Sequence[float]) -> list[float]:
    """Round numbers across the values' range: 1, 2, 5 times powers of ten; finer if these are too few."""
    low, high = padded(values, 1.15)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [d / 10 for d in range(10, 100, 2)]):
        ticks = [float(f"{d}e{e}") for e in decades for d in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return inside


def spec_of(layers: Sequence[Spec], datasets: Mapping[str, list[Spec]], height: int = HEIGHT) -> Spec:
    """The chart's specification; `$schema` is left out, for it names an address that nothing needs."""
    return {"height": height, "datasets": dict(datasets), "layer": list(layers)}
