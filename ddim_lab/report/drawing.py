"""Charts drawn: by the page's own script, or as PNG and SVG."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ddim_lab.report.charts import Chart
from ddim_lab.report.vega import GREY
from ddim_lab.store import sealed_text, text_fault, write_text
from ddim_lab.store.files import HASH_LINE

STATIC_WIDTH = 560


@functools.cache
def chart_library() -> Markup:
    """Vega, Vega-Lite and vega-embed as one script of 0.9 MB.

    Bundling takes 1.5 s, so it is kept in the user's cache folder, under the version of what bundles and with its hash;
    a copy that is not whole, or that can't be written, is made again.
    """
    name = f"vega-{importlib.metadata.version('vl-convert-python')}.txt"
    file = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ddim_lab", name)
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last where there is no home directory
        file = file.expanduser()
        text = file.read_bytes().decode()
        if text.startswith(HASH_LINE) and text_fault(file) is None:
            return Markup(text.partition("\n")[2])
    from vl_convert import javascript_bundle

    script: str = javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if "</script" in script.lower() or "<!--" in script:
        raise AssertionError("the chart library can't stand inside a script element as it is")
    if not str(file).startswith("~"):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, sealed_text(script))
    return Markup(script)


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
