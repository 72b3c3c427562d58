"""An audit at work: the distance as the field takes it, with one convention changed at a time, and with two.

What is tried first, where time is short: what costs no forwards, then what is known to change most. Pairs are tried
after that, those first whose effects, added up, come nearest to what was claimed; what counts is what they give.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, final

from ddim_lab.console import duration
from ddim_lab.conventions.passes import BEFORE_ROUNDING, Cost, Passes
from ddim_lab.conventions.protocol import PLAIN, Factor, Protocol, compatible, together
from ddim_lab.conventions.records import Claim, Measured, Tried, Untried
from ddim_lab.conventions.source import Source
from ddim_lab.errors import ConfigError, one_line, terminating
from ddim_lab.metrics.estimates import Estimate

__all__ = ["Point", "Trials"]

PAIRS_AT_LEAST: Final = 20.0
"""Seconds that pairs may take where no budget was given; more where the singles took more."""

SEEDS: Final = "seed_minimum"

MINIMUM_OF_THREE: Final = 0.748
"""Standard deviation of the least of three standard normal numbers: sqrt(1 + sqrt(3) / (2 pi) - 9 / (4 pi))."""


@final
@dataclass(frozen=True)
class Point:
    """One of the numbers that are compared: all of them are of one protocol.

    Attributes:
        at: what tells it from the others, as "S = 10"; "" of the only one.
        source: the samples.
        count: how many of them, from the first.
        claim: what was claimed of it; None where nothing was.
    """

    at: str
    source: Source
    count: int
    claim: Claim | None


@final
class Trials:
    """What has been tried, and what has not.

    Args:
        points: at least one.
        factors: conventions that may be changed, those that can't be with the reason why.
        passes: takes the distances.
        metric: what the plain distance is called.

    Attributes:
        plain: the distance as the field takes it.
        singles, pairs: tried with one convention changed, and with two.
        untried: what was not.
        forwards: image-forwards that this run made.
    """

    def __init__(self, points: Sequence[Point], factors: Sequence[Factor], passes: Passes, metric: str) -> None:
        names = [factor.name for factor in factors]
        assert len(names) == len(set(names)), "two conventions have one name"
        self._points: Final = tuple(points)
        self._passes, self._metric = passes, metric
        self._plain: list[Estimate] = []
        self._found: dict[tuple[str, ...], list[Estimate]] = {}
        self._factors: Final = {factor.name: factor for factor in factors}
        self.untried = [_untried([factor], factor.why_not) for factor in factors if factor.why_not is not None]
        self.plain = Tried()
        self.singles: list[Tried] = []
        self.pairs: list[Tried] = []
        self.forwards = 0

    # -- the plan -----------------------------------------------------------------------------------------

    def usable(self) -> list[Factor]:
        """The conventions that can be changed here, in the order in which they are tried."""
        usable = []
        for factor in (factor for factor in self._factors.values() if factor.why_not is None):
            try:
                self.cost([factor])
            except (ConfigError, ValueError) as error:  # weights that are not there
                self._not(factor, one_line(error))
                continue
            usable.append(factor)
        return sorted(usable, key=self._telling)

    def _telling(self, factor: Factor) -> tuple[bool, float, int]:
        """What costs no forwards, then what is known to change most, then what is done most often.

        Whether they are still to be done does not matter: the order is the same when the command is typed again.
        """
        samples_anew = self._points[0].source.keeps_levels and factor.change.get("levels") in BEFORE_ROUNDING
        return "made" in factor.change or samples_anew, -(factor.effect or 0.0), -factor.common

    def cost(self, factors: Iterable[Factor] | None) -> Cost:
        """What the plain distance and those of single conventions still need; of the plain alone where None."""
        protocols = [PLAIN, *(together([factor]) for factor in factors or ())]
        return self._passes.cost([(p.source, each, p.count) for each in protocols for p in self._points])

    def _pair_cost(self, pair: Sequence[Factor]) -> Cost:
        return self._passes.cost([(p.source, together(pair), p.count) for p in self._points])

    # -- the work -----------------------------------------------------------------------------------------

    def measure_plain(self) -> Tried:
        """The distance as the field takes it."""
        self._plain = self._measured(PLAIN)
        self.plain = Tried(name=self._metric, label="as the field does", measured=self._told(self._plain, plain=True))
        return self.plain

    def try_singles(self, factors: Sequence[Factor], budget: float | None) -> None:
        """Each convention alone, in the order given; those that a budget of seconds has no room for are left out."""
        began = time.monotonic()
        for factor in factors:
            left = None if budget is None else budget - (time.monotonic() - began)
            if left is not None:
                cost = self.cost([factor])
                if cost.seconds > left:
                    there = f"{duration(max(0.0, left))} of the budget were left"
                    self._not(factor, f"it takes about {duration(cost.seconds)}, and {there}", left=True)
                    continue
            if (found := self._try([factor])) is not None:
                self.singles.append(found)
        self._minimum_of_seeds()

    def try_pairs(self, claims: Sequence[Claim], budget: float) -> None:
        """Pairs of what was tried alone, nearest to the claims first, as many as the budget of seconds has room for."""
        began = time.monotonic()
        tried = [self._factors[single.factors[0]] for single in self.singles if single.factors[0] in self._factors]
        candidates = [pair for pair in itertools.combinations(tried, 2) if compatible(pair)]
        ranked = sorted(candidates, key=lambda pair: self._distance_to(claims, pair))
        for pair in ranked:
            left = budget - (time.monotonic() - began)
            try:
                fits = left > 0.0 and self._pair_cost(pair).seconds <= left
            except ValueError as error:  # the two exclude each other, as a model that makes the samples knows
                self.untried.append(_untried(pair, one_line(error)))
                continue
            if not fits:
                self.untried.append(_untried(pair, "the time for pairs is spent: --budget gives more", left=True))
            elif (found := self._try(pair)) is not None:
                self.pairs.append(found)

    def _distance_to(self, claims: Sequence[Claim], pair: Sequence[Factor]) -> float:
        """How far the pair may be from the claims, in errors, if its effects add; half of the lesser may be off."""
        square = 0.0
        for place, claim in enumerate(claims):
            plain = self._plain[place]
            effects = [self._found[factor.name,][place].value - plain.value for factor in pair]
            slack = 0.5 * min(map(abs, effects))
            error = math.sqrt(2.0) * (plain.se or 0.0) + claim.half_digit
            away = max(0.0, abs(plain.value + sum(effects) - claim.value) - slack)
            square += (away / error) ** 2 if error > 0.0 else away**2
        return square

    def _try(self, factors: Sequence[Factor]) -> Tried | None:
        names, label = tuple(factor.name for factor in factors), " + ".join(factor.label for factor in factors)
        try:
            found = self._measured(together(factors))
        except OSError:  # a full disk is nothing of a convention's
            raise
        except Exception as error:  # whatever one of them leads to, what was found of the others is told
            if terminating():
                raise
            self.untried.append(_untried(factors, one_line(error)))
            return None
        self._found[names] = found
        return Tried(
            factors=names,
            label=label,
            name=f"{self._metric} variant: {label}",
            says=" ".join(factor.says for factor in factors),
            who=tuple(dict.fromkeys(who for factor in factors for who in factor.who)),
            source="; ".join(dict.fromkeys(factor.source for factor in factors)),
            common=min(factor.common for factor in factors),
            part=factors[0].part if len(factors) == 1 else "",
            measured=self._told(found),
        )

    def _measured(self, protocol: Protocol) -> list[Estimate]:
        found = []
        for point in self._points:
            cost = self._passes.forwards(point.source, protocol)
            found.append(self._passes.estimate(point.source, protocol, point.count))
            self.forwards += cost
            if not math.isfinite(found[-1].value):
                raise ValueError(f"it is {found[-1].value}")
        return found

    def _told(self, found: Sequence[Estimate], *, plain: bool = False) -> tuple[Measured, ...]:
        return tuple(
            Measured(
                value=one.value,
                se=one.se,
                change=None if plain else one.value - base.value,
                change_se=None if plain else _paired(one, base),
                replicates=one.replicates,
                interactions=one.interactions,
            )
            for one, base in zip(found, self._plain, strict=True)
        )

    def _minimum_of_seeds(self) -> None:
        """The least of three seeds, where all three were tried: it is reported in place of one.

        The least of three independent normal numbers varies by 0.748 of their standard deviation; its error here is so
        much of that of the set that gave it.
        """
        seeds = [single for single in self.singles if any(a == "seed" for a, _ in self._made(single))]
        if len(seeds) < 2:
            return
        each = [self._plain, *(self._found[single.factors] for single in seeds)]
        least = [
            _narrowed(min(found, key=lambda one: one.value), MINIMUM_OF_THREE if len(each) == 3 else 1.0)
            for found in zip(*each, strict=True)
        ]
        label = f"minimum of {'three' if len(each) == 3 else len(each)} seeds"
        values = [found[0].value for found in each]
        told = f"mean {statistics.fmean(values):.4g}, standard deviation {statistics.stdev(values):.2g}"
        self._found[SEEDS,] = least
        self.singles.append(
            Tried(
                factors=(SEEDS,),
                label=label,
                name=f"{self._metric} variant: {label}",
                says=f"The least of the distances of {len(each)} sets of samples is reported; here they have {told}.",
                who=("NVlabs/edm, whose README gives the minimum of three",),
                source="NVlabs/edm, README.md; NVlabs/edm#16",
                common=2,
                part=seeds[0].part,
                measured=self._told(least),
            )
        )

    def _made(self, single: Tried) -> tuple[tuple[str, str], ...]:
        factor = self._factors.get(single.factors[0])
        return () if factor is None else tuple(factor.change.get("made", ()))

    def _not(self, factor: Factor, why_not: str, *, left: bool = False) -> None:
        self.untried.append(_untried([factor], why_not, left=left))


def _untried(factors: Sequence[Factor], why_not: str, *, left: bool = False) -> Untried:
    names, label = tuple(factor.name for factor in factors), " + ".join(factor.label for factor in factors)
    return Untried(factors=names, label=label, why_not=why_not, left=left)


def _narrowed(one: Estimate, by: float) -> Estimate:
    """An estimate whose errors are so much of what they were."""
    replicates = tuple(one.value + by * (replicate - one.value) for replicate in one.replicates)
    return Estimate(one.value, replicates, tuple(by * each for each in one.interactions))


def _paired(one: Estimate, base: Estimate) -> float | None:
    """The error of a change: paired where both are of as many groups of the same samples."""
    if len(one.replicates) == len(base.replicates) > 1:
        return one.paired_se(base)
    return None if one.se is None or base.se is None else math.hypot(one.se, base.se)
