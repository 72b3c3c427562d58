"""A search as its reader sees it: the trials as a table and a file, two charts."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddim_lab.store.records import Tabled
from ddim_lab.tasks.search.trials import Timesteps, Trial

__all__ = ["FOUND", "finite", "search_chart", "timesteps_chart", "trials_table", "write_trials"]

FOUND: Final = "found"
"""What the found list is called among the spacings."""


def trials_table(title: str, tried: Sequence[Trial]) -> Tabled:
    return Tabled(
        title=title,
        columns=("trial", "proposed by", "FD", "lowest so far"),
        rows=tuple(
            (number, trial.proposed_by, finite(trial.fd), finite(lowest))
            for number, (trial, lowest) in enumerate(zip(tried, _lowest_so_far(tried), strict=True))
        ),
    )


def _lowest_so_far(tried: Sequence[Trial]) -> list[float]:
    lowest, found = math.inf, []
    for trial in tried:
        lowest = min(lowest, trial.fd)
        found.append(lowest)
    return found


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_trials(path: Path, tried: Sequence[Trial]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "proposed_by", "fd", "timesteps"])
        for number, trial in enumerate(tried):
            writer.writerow([number, trial.proposed_by, repr(trial.fd), " ".join(map(str, trial.timesteps))])


def timesteps_chart(path: Path, walks: Mapping[str, Timesteps], num_timesteps: int) -> None:
    points = [{"spacing": name, "t": t} for name, timesteps in walks.items() for t in timesteps]
    _chart(
        path,
        {
            "data": {"values": points},
            "mark": {"type": "tick", "thickness": 2},
            "height": {"step": 26},
            "encoding": {
                "x": {
                    "field": "t",
                    "type": "quantitative",
                    "title": "timestep t (0: nearly clean)",
                    "scale": {"domain": [0, num_timesteps - 1], "nice": False},
                },
                "y": {"field": "spacing", "type": "nominal", "title": None, "sort": list(walks)},
                "color": {
                    "condition": {"test": f"datum.spacing === '{FOUND}'", "value": "#c0392b"},
                    "value": "#4c6a92",
                },
            },
        },
    )


def search_chart(path: Path, tried: Sequence[Trial], name: str) -> None:
    points = [
        {"trial": number, "fd": finite(trial.fd), "lowest": finite(lowest), "start": trial.proposed_by != "search"}
        for number, (trial, lowest) in enumerate(zip(tried, _lowest_so_far(tried), strict=True))
    ]
    x = {"field": "trial", "type": "quantitative", "title": "trial (filled: a built-in spacing; line: lowest so far)"}
    y = {"type": "quantitative", "title": name, "scale": {"type": "symlog"}}
    _chart(
        path,
        {
            "data": {"values": points},
            "height": 260,
            "encoding": {"x": x},
            "layer": [
                {
                    "mark": {"type": "point", "color": "#4c6a92"},
                    "encoding": {
                        "y": {**y, "field": "fd"},
                        "fillOpacity": {"condition": {"test": "datum.start", "value": 1.0}, "value": 0.0},
                        "fill": {"value": "#4c6a92"},
                    },
                },
                {
                    "mark": {"type": "line", "interpolate": "step-after", "color": "#c0392b"},
                    "encoding": {"y": {**y, "field": "lowest"}},
                },
            ],
        },
    )


def _chart(path: Path, spec: Mapping[str, Any]) -> None:
    """A Vega-Lite chart as a PNG, 2 pixels a point, on white."""
    import vl_convert

    path.write_bytes(vl_convert.vegalite_to_png({**spec, "width": 560, "background": "white", "padding": 12}, scale=2))
