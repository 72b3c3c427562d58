"""Numbers as texts: in tables with so many decimals, in columns by their unit, in files exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from ddim_lab.report.cells import SECONDS_AN_IMAGE
from ddim_lab.store.records import Value

DASH = "—"


def decimals(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> int:
    """Decimals that show every value's size and the smallest error's first digit: 2 to 6."""
    numbers = [abs(v) for v in (*values, *errors) if v is not None and math.isfinite(v) and v != 0]
    if not numbers:
        return 2
    return min(6, max(2, -math.floor(math.log10(min(numbers)))))


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A value with a true minus sign."""
    return f"{value:+.{places}f}".replace("-", "−") if sign else f"{value:.{places}f}".replace("-", "−")


def small(value: float, places: int) -> str:
    """A value with so many decimals; 0 as "0", and one that they would hide in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10.0**-places:
        return _powers(value, 1)
    return number(value, places)


def with_error(value: float, se: float | None, places: int) -> str:
    """A value ± its standard error, if it has one."""
    return small(value, places) + (f" ± {small(se, places)}" if se is not None else "")


def plain(value: float | int | bool | str | None) -> str:
    """A value by itself: four digits of a float, yes or no."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    if value == 0:
        return "0"
    return _powers(value, 2) if abs(value) < 1e-4 else f"{value:,.4g}".replace("-", "−")


def _powers(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−") if exponent else plain(value)


UNITS: Final[dict[str, tuple[str, Callable[[float], str]]]] = {
    SECONDS_AN_IMAGE: ("ms ", lambda number: f"{number * 1e3:.4g}"),
    "share": ("", lambda number: f"{number:.1%}"),
    "B": ("", lambda number: f"{number / 2**20:,.0f} MiB"),
}
"""What a column's heading begins with, and how it shows a number, by its unit; `plain` for all others."""


def column_heading(value: Value) -> str:
    """Of a column of values as this one."""
    return (UNITS[value.unit][0] if value.unit in UNITS else "") + value.column


def in_column(value: Value) -> str:
    """A value short, as its unit is read; a digest as its first 12 digits."""
    if isinstance(value.value, str) and is_digest(value.value):
        return value.value[:12]
    finite = value.number
    if finite is not None and value.se is not None and not value.unit:
        return plain(float(f"{finite:.3g}"))
    return plain(value.value) if finite is None or value.unit not in UNITS else UNITS[value.unit][1](finite)


def is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32,}", text) is not None


def counted(counts: Iterable[int | None], of: str) -> str:
    """How many of what, as "360 images"; as "N = 360" where it is not said of what."""
    told = ", ".join(f"{count:,}" for count in sorted({count for count in counts if count is not None}))
    return "" if not told else f"{told} {of}" if of else f"N = {told}"


def exact(value: Any) -> str:
    """A value as results.csv writes it: floats so that they read back as they were, None as nothing."""
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
