"""Claims, and which of the protocols that were tried explain them; plain numbers in, numbers and words out.

One number rarely identifies a cause. So a claim has an error of its own, all that is compatible with it is given, by
how well it fits and by how often the field does it, and where several fit, or none, that is the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from ddim_lab.conventions.records import Claim, Tried, Untried
from ddim_lab.errors import ConfigError

__all__ = [
    "COMPATIBLE_P",
    "TIE",
    "Explanation",
    "Fit",
    "Verdict",
    "as_written",
    "explain",
    "fit",
    "read_claims",
    "with_error",
]

Verdict = Literal["", "agrees", "identified", "ambiguous", "unexplained"]
Matrix = NDArray[np.float64]

COMPATIBLE_P: Final = 0.01
"""p of a fit from which on a protocol is compatible with the claims: the true one is, 99 times in 100. A cause that is
wrongly left out costs more than one too many, which is said to be one of several."""

TIE: Final = 4.0
"""chi^2 less the best one's, below which two fits can't be told apart: 2 errors."""

WEIGHTS: Final = {3: 4.0, 2: 2.0, 1: 1.0}
"""Prior weight of a convention by how often the field follows it: often, sometimes, rarely."""

MOST: Final = 1e12
"""The largest claim, and the largest of its errors."""

NAMED: Final = 3
"""Protocols that the paragraph names, at most."""

_NUMBER: Final = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


# -- claims ---------------------------------------------------------------------------------------------


def read_claims(text: str, num_samples: int, unit: Literal["S", "N"]) -> tuple[Claim, ...]:
    """The claims of `--claimed`: one number, as "4.16", or several by S or N, as "10:13.36,50:4.67,100:4.16".

    A number is taken to be rounded to its last digit: "4.16" is 4.16 ± 0.005 at the most, "13" is 13 ± 0.5.

    Args:
        text: what was given.
        num_samples: of how many images they are, where the text does not say.
        unit: what the keys are: S, steps, or N, samples; of N, a claim is of as many images.

    Returns:
        The claims in the order given.

    Raises:
        ConfigError: the text is something else.
    """
    what = f"--claimed={text}"
    example = f"give one number, as 4.16, or several by {unit}, as " + (
        "10:13.36,50:4.67" if unit == "S" else "5000:9.3,50000:4.16"
    )
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{what}: a number is missing; {example}")
    keyed = [":" in part for part in parts]
    if len(parts) > 1 and not all(keyed):
        raise ConfigError(f"{what}: of several numbers each needs its {unit}; {example}")
    claims: dict[str, Claim] = {}
    for part in parts:
        key, _, number = part.rpartition(":")
        key, number = key.strip(), number.strip()
        value, half_digit = _rounded(number, what, example)
        at, count = "", num_samples
        if any(keyed):
            if not re.fullmatch(r"[0-9]{1,12}", key) or int(key) < 1:
                raise ConfigError(f"{what}: {unit} is a whole number from 1 on, not {key!r}; {example}")
            at = _at(unit, int(key))
            count = int(key) if unit == "N" else num_samples
        if at in claims:
            raise ConfigError(f"{what}: {at} has two numbers; {example}")
        claims[at] = Claim(value=value, at=at, num_samples=count, half_digit=half_digit, source="--claimed")
    return tuple(claims.values())


def _rounded(text: str, what: str, example: str) -> tuple[float, float]:
    """The number, and half a unit of its last digit."""
    if not _NUMBER.fullmatch(text):
        raise ConfigError(f"{what}: {text!r} is no number from 0 on; {example}")
    exponent = Decimal(text).as_tuple().exponent
    assert isinstance(exponent, int)  # it is finite
    value = float(text)
    half_digit = 0.5 * float(f"1e{exponent}")
    if not value <= MOST or not 1.0 / MOST <= half_digit <= MOST:
        raise ConfigError(f"{what}: {text} is too large or too small a number; {example}")
    return value, half_digit


def _at(unit: str, number: int) -> str:
    return f"{unit} = {number:,}"


def _count(claim: Claim, num_samples: int) -> int:
    """N of ours at the claim's point: where points are N, the point says it."""
    return claim.num_samples if claim.at.startswith("N = ") else num_samples


# -- how well a protocol fits ---------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Fit:
    """How well one protocol's numbers explain all claims together.

    Attributes:
        factors, label: as of `Tried`.
        chi_square: d^T C^-1 d of d = claims less numbers, over m points; C is the covariance of d.
        p: probability of that chi^2 or more, if the claims were taken by this protocol on other samples.
        errors: sqrt(chi^2 / m): of one claim how many of its errors (see `sds`) it is away.
        log_likelihood: -(chi^2 + log det C) / 2.
        weight: prior weight of the protocol.
        differences: d.
        sds: standard error of each d: of our number, of the claim's samples and of its rounding.
        claim_sds: the part of it that is the claim's.
    """

    factors: tuple[str, ...]
    label: str
    chi_square: float
    p: float
    errors: float
    log_likelihood: float
    weight: float
    differences: tuple[float, ...]
    sds: tuple[float, ...]
    claim_sds: tuple[float, ...]

    @property
    def compatible(self) -> bool:
        return self.p >= COMPATIBLE_P

    @property
    def rank(self) -> float:
        """Log of likelihood times prior weight: the higher, the better."""
        return self.log_likelihood + math.log(self.weight)


def fit(claims: Sequence[Claim], tried: Tried, num_samples: int, *, weight: float | None = None) -> Fit | None:
    """How well the protocol's numbers explain all claims together.

        claims ~ Normal(numbers, C),  C = C_ours + C_claims + diag(h^2 / 3)

    C_ours has our standard errors, and between points the correlation of the jackknife's replicates, for they are over
    the same groups of samples. The claims were taken on other samples of N_claim images by the same protocol: their
    errors are ours times sqrt(N / N_claim). Whether all claims are of the same x_T is not said: they err together as
    ours do, or each by itself, and the better fit of the two counts. h is half a unit of a claim's last digit:
    rounding errs evenly within it.

    Args:
        claims: one a point.
        tried: the protocol, measured at the same points.
        num_samples: N of ours, all of them: where `tried` uses a part, the claim did so, too.
        weight: prior weight; None for that of `tried.common`.

    Returns:
        None where there is no claim, or the protocol has no number, or no error of it, at one of the points.
    """
    measured = tried.measured[: len(claims)]
    errors = [one.se for one in measured]
    values = [one.value for one in measured]
    known = [se for se in errors if se is not None]
    if not claims or len(known) < len(claims) or not all(map(math.isfinite, (*known, *values))):
        return None
    ours = np.asarray(known)
    scale = np.asarray([math.sqrt(_count(claim, num_samples) / claim.num_samples) for claim in claims])
    rounding = np.asarray([claim.half_digit**2 / 3.0 for claim in claims])
    floor = np.asarray([(1e-9 * max(1.0, abs(claim.value))) ** 2 for claim in claims])  # no error is exactly 0
    d = np.asarray([claim.value for claim in claims]) - np.asarray(values)
    sds = np.sqrt(ours**2 + (ours * scale) ** 2 + rounding + floor)
    together = _correlation([one.replicates for one in measured])
    found = []
    for of_claims in (together, np.eye(len(claims))):
        covariance = together * np.outer(ours, ours) + of_claims * np.outer(ours * scale, ours * scale)
        # In units of the errors, as points may differ by powers of ten; `_correlation` keeps it away from singular.
        scaled = (covariance + np.diag(rounding + floor)) / np.outer(sds, sds)
        chi_square = float(d / sds @ np.linalg.solve(scaled, d / sds))
        found.append((chi_square, float(np.linalg.slogdet(scaled)[1] + 2.0 * np.log(sds).sum())))
    chi_square, log_det = min(found)
    return Fit(
        factors=tried.factors,
        label=tried.label,
        chi_square=chi_square,
        p=_chi_square_p(chi_square, len(claims)),
        errors=math.sqrt(chi_square / len(claims)),
        log_likelihood=-0.5 * (chi_square + log_det),
        weight=WEIGHTS.get(tried.common, 1.0) if weight is None else weight,
        differences=tuple(d.tolist()),
        sds=tuple(sds.tolist()),
        claim_sds=tuple(np.sqrt((ours * scale) ** 2 + rounding).tolist()),
    )


def _correlation(replicates: Sequence[Sequence[float]]) -> Matrix:
    """Between points, of replicates over the same groups; none where these differ, or are too few to say it."""
    count, groups = len(replicates), {len(of) for of in replicates}
    independent = np.eye(count)
    if count < 2 or len(groups) > 1 or min(groups) < count + 2:
        return independent
    about = np.asarray(replicates, dtype=np.float64)
    about -= about.mean(axis=1, keepdims=True)
    sizes = np.linalg.norm(about, axis=1)
    if not np.isfinite(sizes).all() or (sizes == 0.0).any():
        return independent
    about /= sizes[:, None]
    # What a hundred groups say of a correlation is not good to 1 in 10^4.
    return (1.0 - 1e-4) * (about @ about.T) + 1e-4 * independent


def _chi_square_p(chi_square: float, freedom: int) -> float:
    """P(X >= chi_square) for chi^2 with so many degrees of freedom."""
    from scipy.special import chdtrc

    return float(chdtrc(freedom, chi_square))


# -- what follows ---------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Explanation:
    """What follows for the claims from all that was tried.

    Attributes:
        verdict: "agrees": the plain number is compatible with the claims. Else "identified": one single convention
            alone is, or, where none is, one pair alone; "ambiguous": several are; "unexplained": nothing is. "" where
            the plain number has no error.
        paragraph: that in words, to be pasted.
        plain: the plain number's fit.
        singles, pairs: fits of all that were tried and have errors, each best first.
        explained: factors of the compatible ones, best first, singles before pairs.
        ties: of those of the best one's kind, the best included, which can't be told apart from it.
    """

    verdict: Verdict
    paragraph: str
    plain: Fit | None
    singles: tuple[Fit, ...]
    pairs: tuple[Fit, ...]
    explained: tuple[tuple[str, ...], ...]
    ties: tuple[tuple[str, ...], ...]


def explain(
    claims: Sequence[Claim],
    plain: Tried,
    singles: Sequence[Tried],
    pairs: Sequence[Tried],
    *,
    metric: str,
    num_samples: int,
    facts: str = "",
    untried: Sequence[Untried] = (),
) -> Explanation:
    """What of all that was tried explains the claims, and how sure that is.

    Args:
        claims: at least one.
        plain, singles, pairs: measured at the claims' points; see `fit`.
        metric: what the plain number is called.
        num_samples: N of ours.
        facts: feature network and reference, in words.
        untried: what was not.
    """
    if not claims:
        raise ValueError("nothing was claimed")
    weights = {one.factors: WEIGHTS.get(one.common, 1.0) for one in singles}

    def ranked(protocols: Sequence[Tried]) -> tuple[Fit, ...]:
        found = [fit(claims, one, num_samples, weight=_weight(one, weights)) for one in protocols]
        return tuple(sorted((one for one in found if one is not None), key=lambda one: -one.rank))

    of_plain, of_singles, of_pairs = fit(claims, plain, num_samples), ranked(singles), ranked(pairs)
    fitting = [one for one in of_singles if one.compatible]
    fitting_pairs = [one for one in of_pairs if one.compatible]
    best = fitting or fitting_pairs
    verdict: Verdict
    if of_plain is None:
        verdict, best = "", []
    elif of_plain.compatible:
        verdict = "agrees"
    else:
        verdict = "unexplained" if not best else "identified" if len(best) == 1 else "ambiguous"
    told = Explanation(
        verdict,
        "",
        of_plain,
        of_singles,
        of_pairs,
        tuple(one.factors for one in (*fitting, *fitting_pairs)) if of_plain is not None else (),
        tuple(one.factors for one in best if one.chi_square - best[0].chi_square < TIE),
    )
    paragraph = _paragraph(told, claims, plain, (*singles, *pairs), metric, num_samples, facts, untried)
    return replace(told, paragraph=paragraph)


def _weight(tried: Tried, weights: dict[tuple[str, ...], float]) -> float:
    """Of a pair the product of both."""
    own = WEIGHTS.get(tried.common, 1.0)
    return math.prod(weights.get((name,), own) for name in tried.factors)


# -- in words -------------------------------------------------------------------------------------------


def as_written(claim: Claim) -> str:
    """The claim with the digits it was given with."""
    places = max(0, -math.floor(math.log10(2.0 * claim.half_digit) + 1e-9)) if claim.half_digit > 0.0 else 6
    return f"{claim.value:,.{min(places, 12)}f}"


def with_error(value: float, se: float | None, *, sign: bool = False, most: int = 6) -> str:
    """A value with so many decimals as show two digits of its error; four digits where there is no error.

    Args:
        value, se: the value, and its standard error.
        sign: whether a + stands before it.
        most: decimals, at most: what they would hide is given in powers of ten.
    """
    plus = "+" if sign else ""
    if value == 0.0 and not se:
        return "0"
    if se is None or not se > 0.0:
        return f"{value:{plus}.4g}".replace("-", "−")
    places = min(most, max(0, 1 - math.floor(math.log10(se))))

    def shown(number: float, plus: str = "") -> str:
        text = f"{number:{plus},.{places}f}"
        if number != 0.0 and abs(number) < 0.5 * 10.0**-places:
            mantissa, _, exponent = f"{number:{plus}.0e}".partition("e")
            text = f"{mantissa}e{int(exponent)}"
        return text.replace("-", "−")

    return f"{shown(value, plus)} ± {shown(se)}"


def _paragraph(
    told: Explanation,
    claims: Sequence[Claim],
    plain: Tried,
    tried: Sequence[Tried],
    metric: str,
    num_samples: int,
    facts: str,
    untried: Sequence[Untried],
) -> str:
    """What a reviewer could paste: claims, our number, what fits and what was not tried."""
    sentences = [_opening(told.plain, claims, plain, metric, num_samples, facts)]
    if len({(claim.num_samples, _count(claim, num_samples)) for claim in claims}) == 1:
        theirs, ours = claims[0].num_samples, _count(claims[0], num_samples)
        if theirs != ours:
            sentences.append(f"The claim is of {theirs:,} images, ours of {ours:,}: {metric} falls with N.")
    if told.plain is None:
        return " ".join([*sentences, "Our number has no error, so nothing can be said of a difference."])
    by_factors = {one.factors: one for one in tried}

    def named(one: Fit, *, who: bool = False) -> str:
        return _named(one, by_factors[one.factors], metric, who=who)

    follows = {"identified": _identified, "ambiguous": _ambiguous, "unexplained": _unexplained}
    if told.verdict in follows:
        sentences += follows[told.verdict](told, named)
    else:
        sentences.append(f"They agree, {_errors(told.plain)} apart: nothing needs explaining.")
        if told.singles:
            sentences.append(f"{_share(told.singles, 'single convention')} tried would fit as well.")
    return " ".join([*sentences, *_not_tried(untried)])


def _identified(told: Explanation, named: Callable[..., str]) -> list[str]:
    """One convention, or one pair."""
    single = next((one for one in told.singles if one.compatible), None)
    if single is None:
        pair = next(one for one in told.pairs if one.compatible)
        return [
            f"None of {_counted(len(told.singles), 'single convention')} fits.",
            f"Of {_counted(len(told.pairs), 'pair')} one alone does: {named(pair, who=True)}.",
        ]
    of = _counted(len(told.singles), "convention")
    found = [f"Of {of} changed one at a time, one alone fits: {named(single, who=True)}."]
    if any(one.compatible for one in told.pairs):
        found.append(f"So do {_share(told.pairs, 'pair')} tried, but one convention is the simpler answer.")
    elif told.pairs:
        found.append(f"None of {_counted(len(told.pairs), 'pair')} tried fits.")
    return found


def _ambiguous(told: Explanation, named: Callable[..., str]) -> list[str]:
    """Several conventions, or, where there is none, several pairs."""
    singles = [one for one in told.singles if one.compatible]
    fitting = singles or [one for one in told.pairs if one.compatible]
    none = "" if singles else f"none of {_counted(len(told.singles), 'single convention')} fits, and "
    share = _share(told.singles, "single convention") if singles else _share(told.pairs, "pair")
    these = "; ".join(map(named, fitting[:NAMED]))
    more = f" and {len(fitting) - NAMED} more" if len(fitting) > NAMED else ""
    found = [f"This does not identify a cause: {none}{share} fit, best first: {these}{more}.", _tied(told, fitting)]
    if singles and any(one.compatible for one in told.pairs):
        found.append(f"{_share(told.pairs, 'pair')} fit, too.")
    return found


def _unexplained(told: Explanation, named: Callable[..., str]) -> list[str]:
    """How far the nearest ones are."""
    kinds = [(word, kind) for word, kind in (("convention", told.singles), ("pair", told.pairs)) if kind]
    tried = _listed(_counted(len(kind), word) for word, kind in kinds) or "nothing"
    nearest = _listed(
        f"the nearest {word} is {named(min(kind, key=lambda one: one.chi_square))}" for word, kind in kinds
    )
    return [f"It is not explained by anything tried ({tried}){': ' if nearest else ''}{nearest}."]


def _share(fits: Sequence[Fit], noun: str) -> str:
    """How many of them fit."""
    return f"{sum(one.compatible for one in fits)} of {_counted(len(fits), noun)}"


def _opening(fit: Fit | None, claims: Sequence[Claim], plain: Tried, metric: str, num_samples: int, facts: str) -> str:
    """Claims ± their errors against ours ± theirs."""
    claimed, ours = [], []
    for index, claim in enumerate(claims):
        at = f" at {claim.at}" if claim.at else ""
        error = "" if fit is None else f" ± {fit.claim_sds[index]:.2g}"
        claimed.append(f"{as_written(claim)}{error}{at}")
        measured = plain.measured[index] if index < len(plain.measured) else None
        ours.append("nothing" if measured is None else with_error(measured.value, measured.se))
    count = "" if claims[0].at.startswith("N = ") else f"N = {num_samples:,}"
    of = "; ".join(filter(None, [count, facts]))
    gives = f"{metric} is {_listed(ours)} here{f' ({of})' if of else ''}, {_listed(claimed)} claimed"
    if fit is None or fit.compatible:
        return f"{gives}."
    one = f"{abs(fit.differences[0]):.2g} apart, " if len(claims) == 1 else "apart by "
    return f"{gives}: {one}{_errors(fit)}."


def _named(one: Fit, tried: Tried, metric: str, *, who: bool) -> str:
    """The protocol with its number, where that is one, how far that is, and who does it so."""
    values = [with_error(measured.value, measured.se) for measured in tried.measured[: len(one.differences)]]
    number = f"{metric} variant {values[0]}, " if len(values) == 1 else ""
    does_so = f", as in {_listed(tried.who[:3])}" if who and tried.who else ""
    return f"{one.label} ({number}{_errors(one)} away){does_so}"


def _tied(told: Explanation, fitting: Sequence[Fit]) -> str:
    """Which of those that fit can't be told apart, and what would."""
    tied = len(told.ties)
    more = "more claimed numbers (at other S or N) or more samples, theirs and ours,"
    if tied == len(fitting):
        which = (
            "The other can't be told from the first" if tied == 2 else "None of the others can be told from the first"
        )
        return f"{which} by what is claimed; {more} would."
    if tied == 1:
        return f"The first fits better than the others by over 2 errors; {more} would settle it."
    labels = {one.factors: one.label for one in fitting}
    first = _listed([labels[factors] for factors in told.ties[:NAMED]])
    return f"{first} can't be told apart by what is claimed; {more} would."


def _not_tried(untried: Sequence[Untried]) -> list[str]:
    def counted(found: Sequence[Untried]) -> str:
        pairs = sum(len(one.factors) > 1 for one in found)
        kinds = ((len(found) - pairs, "convention"), (pairs, "pair"))
        return _listed(_counted(count, noun) for count, noun in kinds if count)

    left, impossible = [one for one in untried if one.left], [one for one in untried if not one.left]
    parts = [f"{counted(left)} left out"] if left else []
    parts += [f"{counted(impossible)} that can't be tried here"] if impossible else []
    return [f"Not tried: {_listed(parts)}."] if parts else []


def _errors(one: Fit) -> str:
    """How far, in errors."""
    if one.errors >= 10.0:
        return f"{one.errors:,.0f} errors"
    return f"{one.errors:.1f} errors"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _listed(texts: Iterable[str]) -> str:
    items = list(texts)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
