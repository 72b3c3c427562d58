"""What an audit found, as it is told: on the console, and to W&B."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from ddim_lab.conventions.explanation import COMPATIBLE_P, Fit, as_written, fit, with_error
from ddim_lab.conventions.records import Audited, Tried, Untried
from ddim_lab.jobs.tracking import TrackingConfig, offline_sync_hint, track
from ddim_lab.report.numbers import DASH

__all__ = [
    "FITS",
    "PAIRS",
    "Mirrored",
    "Reason",
    "change_places",
    "console",
    "distance",
    "fitting_pairs",
    "mirror",
    "notes",
    "pairs_not_shown",
    "plain_fit",
    "reasons",
    "singles_by_part",
    "wandb_payload",
]

PAIRS: Final = 15
"""Pairs shown, at most."""

WIDTH: Final = 118
"""Columns of the console's table, where labels and numbers leave it so."""

LABEL: Final = 44
LEAST_LABEL: Final = 30
"""Columns of a label, at most: as few as these where numbers need the room. A longer one goes on in the next line."""

WHO: Final = 14
"""Columns, at least, of who does it so."""

FITS: Final = "✓"
"""Stands behind the errors of what is compatible with the claims."""


# -- what there is to tell ------------------------------------------------------------------------------


def singles_by_part(audited: Audited) -> dict[str, list[Tried]]:
    """Single conventions by what they are of, the largest change at the first point first."""
    parts: dict[str, list[Tried]] = {}
    for tried in audited.tried:
        if len(tried.factors) == 1:
            parts.setdefault(tried.part, []).append(tried)
    return {part: sorted(of, key=lambda tried: -_change(tried)) for part, of in parts.items()}


def _change(tried: Tried) -> float:
    """At the first point; of what has none, below all."""
    change = tried.measured[0].change if tried.measured else None
    return -float("inf") if change is None else change


def fitting_pairs(audited: Audited) -> tuple[list[Tried], int]:
    """The pairs that fit, best first and at most PAIRS, and how many more were tried."""
    pairs = {tried.factors: tried for tried in audited.tried if len(tried.factors) > 1}
    shown = [pairs[factors] for factors in audited.explained if factors in pairs][:PAIRS]
    return shown, len(pairs) - len(shown)


def pairs_not_shown(shown: int, others: int) -> str:
    """How many pairs were tried that `fitting_pairs` does not show; "" for none."""
    return (
        f"{others:,} {'more ' if shown else ''}{'pair' if others == 1 else 'pairs'} tried, not shown." if others else ""
    )


def change_places(audited: Audited) -> int:
    """Decimals of a change, at most: two more than the plain number has."""
    errors = [one.se for one in audited.plain.measured if one.se]
    return min(6, max(2, 2 - math.floor(math.log10(min(errors))))) if errors else 6


def plain_fit(audited: Audited) -> Fit | None:
    """The plain number's fit to the claims; None where nothing is claimed."""
    return fit(audited.claims, audited.plain, audited.num_samples)


def distance(audited: Audited, tried: Tried) -> str:
    """How many errors the protocol is from the claims, marked where it is compatible with them."""
    found = fit(audited.claims, tried, audited.num_samples)
    if found is None:
        return DASH
    shown = f"{found.errors:,.0f}" if found.errors >= 10.0 else f"{found.errors:.1f}"
    return f"{shown} {FITS if found.compatible else ' '}"


@final
@dataclass(frozen=True)
class Reason:
    """Why something was not tried, and what that holds of.

    Attributes:
        text: the reason, one line.
        left: whether a longer budget would try it.
        singles: labels of single conventions.
        pairs: labels of pairs.
    """

    text: str
    left: bool
    singles: tuple[str, ...]
    pairs: tuple[str, ...]


def reasons(audited: Audited) -> list[Reason]:
    """What was not tried by why, each reason once; what was left out last."""
    found: dict[tuple[bool, str], list[Untried]] = {}
    for untried in audited.untried:
        found.setdefault((untried.left, untried.why_not), []).append(untried)
    return [
        Reason(
            text,
            left,
            tuple(one.label for one in of if len(one.factors) == 1),
            tuple(one.label for one in of if len(one.factors) != 1),
        )
        for (left, text), of in sorted(found.items(), key=lambda item: item[0][0])
    ]


def notes(audited: Audited) -> list[str]:
    """How the numbers are to be read."""
    found = [
        f"Value and change: ± one standard error, over the drawing of samples alone. A change is less the plain"
        f" {audited.metric} of the same images, and its error is that of pairs.",
        f"Only the first line is {audited.metric} as the field takes it; what has a convention changed is a variant.",
    ]
    if audited.claims:
        several = len(audited.claims) > 1
        found.insert(
            1,
            f"Errors: how far the {'claims are' if several else 'claim is'} off, in standard errors of the difference:"
            " ours, that of other samples which the claim is of, and its rounding"
            + (", all points together (root mean square)" if several else "")
            + f". {FITS}: compatible, p ≥ {COMPATIBLE_P}.",
        )
    return found


# -- the console ----------------------------------------------------------------------------------------


def console(audited: Audited) -> str:
    """Paragraph, table, and what was not tried; no line is wider than WIDTH, if names and numbers leave it so."""
    count = f"N = {audited.num_samples:,}"
    head = [f"{audited.subject}: {'; '.join(filter(None, [audited.metric, count, audited.facts]))}"]
    blocks = [_wrapped(line) for line in (audited.paragraph, *head) if line]
    blocks += ["\n".join(_table(audited)), "\n".join(_wrapped(note) for note in notes(audited))]
    if lines := _not_tried(audited):
        blocks.append("\n".join(lines))
    blocks.append(f"This run took {audited.forwards:,} image-forwards, {audited.seconds:,.1f} s.")
    return "\n\n".join(blocks)


def _wrapped(text: str, behind: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=behind, break_long_words=False, break_on_hyphens=False)


def _table(audited: Audited) -> list[str]:
    """A line a protocol: number and change, how far the number is from the claims, who does it so.

    Of several points there is a column each, which holds the changes.
    """
    several = len(audited.points) > 1
    ending = ["errors"] if audited.claims else []
    head = ["", *(audited.points if several else (audited.metric, "change")), *ending]
    plain = [f"{audited.metric}, as the field takes it"]
    plain += [with_error(one.value, one.se) for one in audited.plain.measured]
    plain += [*([] if several else [""]), *([distance(audited, audited.plain)] if audited.claims else [])]

    def numbers(tried: Tried) -> list[str]:
        found = [tried.measured[i] if i < len(tried.measured) else None for i in range(len(audited.points))]
        cells = [
            DASH
            if one is None or one.change is None
            else with_error(one.change, one.change_se, sign=True, most=change_places(audited))
            for one in found
        ]
        if not several:
            cells.insert(0, DASH if found[0] is None else with_error(found[0].value, found[0].se))
        return [*cells, *([distance(audited, tried)] if audited.claims else [])]

    lines: list[tuple[list[str], Sequence[str]] | str] = [(plain, ()), *((line, ()) for line in _claimed(audited))]
    if several:
        lines.append("and changed by")
    for part, tried_of in singles_by_part(audited).items():
        lines.append(part)
        lines += [([f"  {tried.label}", *numbers(tried)], tried.who) for tried in tried_of]
    pairs, others = fitting_pairs(audited)
    if pairs:
        lines.append("pairs that fit")
        lines += [([f"  {tried.label}", *numbers(tried)], tried.who) for tried in pairs]
    cells = [line[0] for line in lines if not isinstance(line, str)]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    widths[0] = min(widths[0], LABEL, max(LEAST_LABEL, WIDTH - sum(widths[1:]) - 2 * len(widths) - WHO))
    room = WIDTH - sum(widths) - 2 * len(widths)
    shown = [_row(head, widths) + ("  who does it so" if room >= WHO else "")]
    for line in lines:
        if isinstance(line, str):
            shown.append(line)
            continue
        (text, *others_of), who = line
        indent = text[: len(text) - len(text.lstrip())]
        label, *rest = textwrap.wrap(text.strip(), widths[0], initial_indent=indent, subsequent_indent="    ") or [""]
        shown.append(f"{_row([label, *others_of], widths)}  {_who(who, room)}".rstrip())
        shown += rest
    return [*shown, *filter(None, [pairs_not_shown(len(pairs), others)])]


def _claimed(audited: Audited) -> list[list[str]]:
    """The claims in the columns of numbers, and what they are off: beside them, or below where points are several."""
    found = plain_fit(audited)
    if not audited.claims:
        return []
    claims = [
        as_written(claim) + ("" if found is None else f" ± {found.claim_sds[index]:.2g}")
        for index, claim in enumerate(audited.claims)
    ]
    off = [
        "" if found is None else with_error(found.differences[index], found.sds[index], sign=True)
        for index in range(len(audited.claims))
    ]
    if len(audited.points) == 1:
        return [["claimed", *claims, *off, ""]]
    return [["claimed", *claims, ""], ["claimed less that", *off, ""]]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others])


def _who(who: Sequence[str], room: int) -> str:
    """As many of the names as there is room for, and how many more there are."""
    for count in range(len(who), 0, -1):
        text = ", ".join(who[:count]) + (f" +{len(who) - count}" if count < len(who) else "")
        if len(text) <= room:
            return text
    more = f"… +{len(who) - 1}" if len(who) > 1 else "…"
    return f"{who[0][: room - len(more)]}{more}" if who and room >= WHO else ""


def _not_tried(audited: Audited) -> list[str]:
    """Each reason once, with what it holds of; pairs by their number."""
    found = []
    for reason in reasons(audited):
        what = list(reason.singles)
        if reason.pairs:
            what.append(f"{len(reason.pairs):,} {'pair' if len(reason.pairs) == 1 else 'pairs'}")
        head = "Left out" if reason.left else "Not tried"
        found.append(_wrapped(f"{head} ({reason.text}): {', '.join(what)}", "  "))
    return found


# -- W&B ------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Mirrored:
    """What W&B gets of an audit.

    Attributes:
        config: what was audited, and how.
        summary: by name: the plain number and its error, a number a variant by its own name, the verdict.
        columns, rows: all protocols, a row a protocol and point.
    """

    config: dict[str, Any]
    summary: dict[str, Any]
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def wandb_payload(audited: Audited) -> Mirrored:
    """The audit as W&B gets it; numbers are the record's."""
    columns = ("name", "factors", "part", "at", "value", "se", "change", "change_se", "errors", "p", "who", "source")
    summary: dict[str, Any] = {"num_samples": audited.num_samples, "seconds": audited.seconds}
    if audited.claims:
        summary |= {
            "verdict": audited.verdict,
            "paragraph": audited.paragraph,
            "explained": [" + ".join(factors) for factors in audited.explained],
        }
    rows = []
    for tried in (audited.plain, *audited.tried):
        found = fit(audited.claims, tried, audited.num_samples)
        errors, p = (None, None) if found is None else (found.errors, found.p)
        name = tried.name or audited.metric
        for point, measured in zip(audited.points, tried.measured, strict=False):
            at = f" at {point}" if point else ""
            if len(tried.factors) < 2:
                summary[f"{name}{at}"] = measured.value
                summary |= {} if measured.se is None else {f"{name}{at}, se": measured.se}
            rows.append(
                (
                    *(name, " + ".join(tried.factors), tried.part, point),
                    *(measured.value, measured.se, measured.change, measured.change_se),
                    *(errors, p, ", ".join(tried.who), tried.source),
                )
            )
    config = audited.model_dump(
        mode="json", include={"command", "subject", "metric", "facts", "num_samples", "points", "claims", "environment"}
    )
    return Mirrored(config, summary, columns, tuple(rows))


def mirror(audited: Audited, config: TrackingConfig, *, group: str, page: Path | None = None) -> str | None:
    """A W&B run of the audit: what `wandb_payload` holds, and the page. It never stops an audit.

    Args:
        audited: what was found.
        config: how it is tracked.
        group: the audit's name.
        page: report.html, if it is there.

    Returns:
        The command that uploads the run, where it waits for that.
    """
    told = wandb_payload(audited)
    with track(config, job_type="audit", name="audit", group=group, run_config=told.config, tags=["audit"]) as run:
        run.summary(told.summary)
        run.table("conventions", told.columns, told.rows)
        if page is not None and run.mode != "off":
            run.html("report", page)
    return offline_sync_hint([run.directory]) if run.directory is not None and run.mode == "offline" else None
