"""What a sweep has settled, in words: every comparison that it makes, tested together at 95 %.

One family holds all comparisons of all values, and Holm's correction keeps the probability that any of its settled
findings is false at 5 % or below. Where N grew until all was settled, p is over all looks (`metrics.sequential`). A
comparison that is not settled has no winner: it has a number of samples that would settle a difference of its size.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ddim_lab.metrics.sequential import nominal_p, sequential_p
from ddim_lab.metrics.significance import critical_t, first_threshold, holm, samples_to_settle, two_sided_p
from ddim_lab.report.numbers import DASH, with_error
from ddim_lab.report.tables import ValueTable
from ddim_lab.report.together import Comparison, Difference, Kind, against_published, comparisons
from ddim_lab.store.records import Published, StopRule

ALPHA: Final = 0.05
"""The probability that any settled finding of a sweep is false is at most this."""

LEVEL: Final = "95 %"

THE_SAME: Final = 1e-9
"""Differences and errors of this share of the values are rounding: both are of the same images."""

COLUMNS: Final = (
    *("value", "compared", "finding", "first", "second", "place", "difference", "se", "freedom", "p", "p_holm"),
    *("settled", "samples_to_settle"),
)
"""Of `Finding.row`."""


@dataclass(frozen=True)
class Finding:
    """One comparison and what came of it.

    Attributes:
        name, heading: of the value; the heading tells it from the sweep's other values.
        better: how values are ranked, if they are.
        kind: what is compared; `first`, `second`, `place` say it in words.
        difference: second minus first, with its standard error and degrees of freedom.
        p: two-sided, over all looks where N grew; None of what is the same to every digit, which is not tested.
        corrected: p after Holm's correction over the sweep's comparisons.
        samples: how many on either side would settle a difference of this size; None where it is settled, or not known.
    """

    name: str
    heading: str
    better: str | None
    kind: Kind
    first: str
    second: str
    place: str
    difference: Difference
    p: float | None = None
    corrected: float | None = None
    samples: int | None = None

    @property
    def settled(self) -> bool:
        return self.corrected is not None and self.corrected <= ALPHA

    @property
    def where(self) -> str:
        """ "at S = 10", of columns "for η 0"; "" where there is one place only."""
        return f"{'for' if self.kind == 'steps' else 'at'} {self.place}" if self.place else ""

    @property
    def pair(self) -> str:
        """Both, in the table's order; ours before what it is compared with."""
        return " and ".join((self.first, self.second) if self.kind in ("rows", "steps") else (self.second, self.first))

    @property
    def word(self) -> str:
        """What the second is beside the first, once it is settled."""
        if self.better is None:
            return "larger" if self.difference.value > 0 else "smaller"
        return "better" if (self.difference.value < 0) == (self.better == "lower") else "worse"

    @property
    def size(self) -> str:
        """The difference without its sign ± its standard error, whose two first digits set the decimals."""
        se = self.difference.se
        places = min(6, max(0, 1 - math.floor(math.log10(se)))) if se > 0 else 2
        return with_error(abs(self.difference.value), se, places)

    @property
    def sentence(self) -> str:
        """It by itself."""
        pair, where = self.pair, self.where and f" {self.where}"
        if self.p is None:
            return f"{self.heading}: the same, to every digit: {pair}{where}"
        if self.settled:
            return f"{self.heading}: {self.second} is {self.word} than {self.first}{where}, by {self.size}"
        told = f"{self.heading}: not settled: {pair}{where} (difference {self.size})"
        if self.samples is None:
            return told
        return f"{told}; about {_count(self.samples)} samples would settle a difference of this size"

    def row(self) -> dict[str, Any]:
        """By COLUMNS."""
        d = self.difference
        found = (self.heading, self.kind, self.sentence, self.first, self.second, self.place, d.value, d.se, d.freedom)
        return dict(zip(COLUMNS, (*found, self.p, self.corrected, self.settled, self.samples), strict=True))


def _count(samples: int) -> str:
    return f"{samples:,}" if samples < 10**9 else f"{samples:.1e}".replace("e+", "e")


@dataclass(frozen=True)
class Part:
    """Findings of one value and one outcome, in lines: what is compared, and all places where it came out so."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """All findings of a sweep, in the order of its tables; false where nothing could be compared.

    `rule` says in words how N was come to, where it was not fixed; "" else.
    """

    all: tuple[Finding, ...] = ()
    rule: str = ""
    _settled: frozenset[Any] = field(default=frozenset(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def tested(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.all if finding.p is not None)

    @property
    def settled(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.all if finding.settled)

    def is_settled(self, name: str, kind: Kind, difference: Difference) -> bool:
        """Whether the finding on this difference of the value of that name is settled."""
        return _key(name, kind, difference) in self._settled

    def need_more(self, se: float | None, count: int) -> tuple[Finding, ...]:
        """Those for which N = `count` samples are not enough.

        They are not settled, their error is not below `se` (if that is given), and they are of all N samples: what
        compares fewer, as many as there are held-out images, gains nothing from more. Nor does what no N would settle,
        since the error of the other side stays.
        """

        def gains(d: Difference) -> bool:
            if d.fixed_se >= (se or math.inf):
                return False  # the error of what it is compared with, which stays
            return d.samples is None or d.samples >= count * max(map(len, d.of))

        left = (f for f in self.tested if not f.settled and gains(f.difference))
        return tuple(
            f
            for f in left
            if (se is None or f.difference.se >= se) and not (f.samples is None and f.difference.fixed_se > 0)
        )

    @property
    def summary(self) -> str:
        """How many are settled, at which level, what the errors cover, and how N was come to."""
        return f"{self._summary} {self.rule}".rstrip()

    @property
    def _summary(self) -> str:
        if not self.tested:
            return "What is compared is the same, to every digit."
        count, of_all = len(self.settled), len(self.tested)
        seeds = max(len(finding.difference.of[1]) for finding in self.all)
        return (
            f"{count} of {of_all} comparison{'' if of_all == 1 else 's'} {'is' if count == 1 else 'are'} settled at"
            f" {LEVEL}, after Holm's correction over all of them. ± is one standard error, of the samples alone: not of"
            " the training seed."
            + (
                f" Differences are means over {seeds} sampling seeds, their samples counted together."
                if seeds > 1
                else ""
            )
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is settled, value by value; then what is not, and how many samples would settle it."""
        headings = dict.fromkeys(finding.heading for finding in self.all)
        found = []
        for outcome, title in (
            (_told_settled, "{}: settled"),
            (
                _told_open,
                "{}: not settled (difference; samples that would settle one of its size)",
            ),
            (_told_same, "{}: the same, to every digit"),
        ):
            for heading in headings:
                lines = tuple(outcome([finding for finding in self.all if finding.heading == heading]))
                if lines:
                    found.append(Part(title.format(heading), lines))
        return tuple(found)

    def lines(self, most: int, width: int) -> list[str]:
        """Summary and parts as at most so many lines of text (4 or more) of about so many characters.

        Where they are more, each part has its first lines, about as many as the others, and the rest is counted.
        """
        if not self:
            return []
        parts = self.parts[: (most - 2) // 2]
        room = most - 1 - len(parts)
        in_all = sum(len(part.lines) for part in self.parts)
        shown = [0] * len(parts)
        if in_all > room or len(parts) < len(self.parts):
            room -= 1
        while room > 0 and any(shown[i] < len(part.lines) for i, part in enumerate(parts)):
            for i, part in enumerate(parts):
                if room > 0 and shown[i] < len(part.lines):
                    shown[i], room = shown[i] + 1, room - 1
        found = [f"Findings: {self.summary}"]
        for part, count in zip(parts, shown, strict=True):
            lines = (textwrap.shorten(line, width, placeholder=" …") for line in part.lines[:count])
            found += [part.title, *(f"  {line}" for line in lines)]
        if left := in_all - sum(shown):
            found.append(f"… and {left} more line{'' if left == 1 else 's'} in the report")
        return found


# -- from tables to findings ----------------------------------------------------------------------------


def findings(
    tables: Iterable[ValueTable],
    reference: Published | None,
    rule: StopRule | None = None,
    earlier: Sequence[Iterable[ValueTable]] = (),
) -> Findings:
    """What the values of a sweep's tables settle, by all comparisons that they make (`comparisons`).

    A pair that stands in two comparisons, as a solver below DDIM does, is tested once.

    Where N grew, each p allows for the looks at which the comparison was made (`sequential_p`), and Holm's correction
    counts those, too, that were made at earlier looks alone, or are to be made at another N: ours with published
    numbers of that N.

    Args:
        tables: of all values that are shown.
        reference: published numbers of the sweep, if there are any.
        rule: by which N grew, if it did.
        earlier: the tables of the looks before, one for each but the last of `rule.made`.
    """
    found = _gathered(tables := list(tables), reference)
    p: dict[Any, float] = {key: finding.p for key, finding in found.items() if finding.p is not None}
    looks: dict[Any, tuple[float, ...]] = {}
    others: set[Any] = set()
    if rule is not None:
        before = [_gathered(of, reference) for of in earlier]
        for key in p:
            seen = [(n, at[key].p) for n, at in zip(rule.made, before, strict=False) if key in at]
            made = [(n / rule.counts[-1], q) for n, q in (*seen, (rule.shown, p[key])) if q is not None]
            looks[key] = tuple(t for t, _ in made)
            p[key] = sequential_p(looks[key], p[key])
        others = {key for at in before for key, finding in at.items() if finding.p is not None} - p.keys()
        others |= _at_another_count(tables, reference, rule) - p.keys()
    corrected = holm([*p.values(), *(1.0 for _ in others)])
    threshold = first_threshold(corrected, ALPHA)
    judged = dict(zip(p, corrected, strict=False))
    told = {
        key: _judged(replace(finding, p=p.get(key)), judged.get(key), threshold, looks.get(key))
        for key, finding in found.items()
    }
    settled = frozenset(key for key, finding in told.items() if finding.settled)
    return Findings(tuple(told.values()), "" if rule is None else _told_rule(rule, len(others)), settled)


def _gathered(tables: Iterable[ValueTable], reference: Published | None) -> dict[Any, Finding]:
    """Every comparison of the tables by what tells it from others, with the p of these samples alone."""
    tables = list(tables)
    titles = [of.heading for of in tables]
    found: dict[Any, Finding] = {}
    for of, title in zip(tables, titles, strict=True):
        heading = title if titles.count(title) == 1 else f"{title} ({of.facts})"
        for comparison in comparisons(of, reference):
            for finding in _of_comparison(of, heading, comparison):
                found.setdefault(_key(of.value.name, finding.kind, finding.difference), finding)
    return found


def _at_another_count(tables: Iterable[ValueTable], reference: Published | None, rule: StopRule) -> set[Any]:
    """What would be compared with published numbers if N were theirs, where another look's is."""
    if reference is None or reference.num_samples not in set(rule.counts) - {rule.shown}:
        return set()
    of_any = reference.model_copy(update={"num_samples": None})
    return {
        _key(of.value.name, comparison.kind, difference)
        for of in tables
        for comparison in against_published(of, of_any)
        for difference in comparison.differences.values()
    }


def p_value(difference: Difference) -> float:
    """The probability of a difference at least as large where there is none: Student's t, two-sided."""
    return two_sided_p(difference.value / difference.se, difference.freedom)


def _key(name: str, kind: Kind, difference: Difference) -> Any:
    """What tells a comparison from the sweep's others: of two cells these, whichever is named first."""
    return name, None if all(difference.of) else kind, frozenset(difference.of)


def _of_comparison(of: ValueTable, heading: str, comparison: Comparison) -> Iterator[Finding]:
    """The findings on its places, before all are judged together; none where an error is 0 by itself."""
    values = {cell.number: of.number_of(cell) or 0.0 for cell in of.table.cells}
    for place, difference in comparison.differences.items():
        scale = max(abs(values[number]) for numbers in difference.of for number in numbers)
        same = abs(difference.value) <= THE_SAME * scale and difference.se <= THE_SAME * scale
        if not same and not difference.se > 0.0:
            continue
        yield Finding(
            of.value.name,
            heading,
            of.value.better,
            comparison.kind,
            comparison.first,
            comparison.second,
            "" if place == DASH else place,
            difference,
            None if same else p_value(difference),
        )


def _judged(
    finding: Finding, corrected: float | None, threshold: float | None, looks: Sequence[float] | None
) -> Finding:
    """A finding once all p are known; of one that was looked at before, the last boundary is what would settle it."""
    samples, difference = None, finding.difference
    if corrected is not None and corrected > ALPHA and threshold is not None and difference.samples is not None:
        nominal = threshold if looks is None else nominal_p(looks, threshold)
        critical = critical_t(nominal, difference.freedom)
        samples = samples_to_settle(difference.value, difference.se, difference.samples, critical, difference.fixed_se)
    return replace(finding, corrected=corrected, samples=samples)


def _told_rule(rule: StopRule, others: int) -> str:
    """How N was come to, and what that does to p."""
    counts = [f"{count:,}" for count in rule.made or (rule.shown,)]
    enough = "is settled" if rule.se is None else f"is settled, or has an error below {rule.se:g}"
    end = {
        "enough": f"there every comparison that gains by more samples {enough}",
        "samples": "the largest that was allowed",
        "hours": f"there the clock ended it (stop.hours={rule.hours:g}), which is not reproducible"
        if rule.hours is not None
        else "",
        "nothing": "there nothing was left to compare",
        None: "there it was cut short",
    }[rule.ended]
    also = f" The correction counts {others} more that other N compare." if others else ""
    return (
        f"N was not fixed: comparisons were looked at with N = {_listed(counts)} of at most {rule.counts[-1]:,}; {end}."
        f" p is of these samples, and allows for all looks by alpha spending, {rule.spending}.{also}"
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# -- findings as lines ----------------------------------------------------------------------------------


def _told_settled(found: Sequence[Finding]) -> Iterator[str]:
    groups: dict[tuple[str, str, str, Kind], list[Finding]] = {}
    for finding in found:
        if finding.settled:
            groups.setdefault((finding.first, finding.second, finding.word, finding.kind), []).append(finding)
    for (first, second, word, _), group in groups.items():
        yield f"{second} is {word} than {first}{_places(group, [f'by {finding.size}' for finding in group])}"


def _told_open(found: Sequence[Finding]) -> Iterator[str]:
    for group in _by_pair(finding for finding in found if finding.p is not None and not finding.settled):
        asides = [f"{f.size}{'' if f.samples is None else f'; {_count(f.samples)}'}" for f in group]
        yield f"{group[0].pair}{_places(group, asides)}"


def _told_same(found: Sequence[Finding]) -> Iterator[str]:
    for group in _by_pair(finding for finding in found if finding.p is None):
        yield f"{group[0].pair}{_places(group, [''] * len(group))}"


def _by_pair(found: Iterable[Finding]) -> list[list[Finding]]:
    groups: dict[tuple[str, str, Kind], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.first, finding.second, finding.kind), []).append(finding)
    return list(groups.values())


def _places(group: Sequence[Finding], asides: Sequence[str]) -> str:
    """ " at S = 10 (by 0.31 ± 0.04) and S = 25 (by ...)"."""
    told = [f"{f.place}{aside and f' ({aside})'}".strip() for f, aside in zip(group, asides, strict=True)]
    listed = _listed(told)
    joint = ("for" if group[0].kind == "steps" else "at") if group[0].place else ""
    return "".join(f" {word}" for word in (joint, listed) if word)
