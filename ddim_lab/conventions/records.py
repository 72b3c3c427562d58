"""What an audit found, as audit.json holds it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ddim_lab.store.records import Record, Using

__all__ = ["Audited", "Claim", "Measured", "Tried", "Untried"]


class Claim(Record):
    """A number that somebody gives, and its own error.

    Attributes:
        value: the number.
        at: what tells it apart from other claims of one audit, as "S = 10" or "N = 5,000"; "" where it is the only one.
        num_samples: of how many images it is.
        half_digit: half a unit of its last digit: it was rounded to that.
        source: who gives it: "--claimed", or a publication.
    """

    value: float
    at: str = ""
    num_samples: int
    half_digit: float
    source: str = ""


class Measured(Record):
    """The distance by one protocol at one point: one claim, or the images alone.

    Attributes:
        value, se: the distance and its standard error, as `ddim_lab.store.records.Value`.
        change, change_se: less the plain one of the same point, and the paired error of that; None of the plain.
        replicates, interactions: what errors are taken from, as of a Value.
    """

    value: float
    se: float | None
    change: float | None = None
    change_se: float | None = None
    replicates: tuple[float, ...] = ()
    interactions: tuple[float, ...] = ()


class Tried(Record):
    """One protocol: the plain one, with one convention changed, or with two.

    Attributes:
        factors: names of the factors; none of the plain one, two of a pair.
        label: in a few words; of a pair, both with " + " between them.
        name: what the number is called: "FID" of the plain one alone, "FID variant: antialiased resize" of others.
        says, who, source, common, part: as of `ddim_lab.conventions.protocol.Factor`; of a pair both, the common of the
            rarer one.
        measured: at each point, in the order of the claims.
        images: identifies the images that were looked at, and `passes` the passes over them, by content.
    """

    factors: tuple[str, ...] = ()
    label: str = ""
    name: str = ""
    says: str = ""
    who: tuple[str, ...] = ()
    source: str = ""
    common: int = 3
    part: str = ""
    measured: tuple[Measured, ...] = ()
    passes: tuple[str, ...] = ()


class Untried(Record):
    """What was not tried, and why.

    Attributes:
        factors, label: as of `Tried`.
        why_not: the reason, one line.
        left: whether a budget or the choice of conventions left it out, so that another command would try it.
    """

    factors: tuple[str, ...]
    label: str
    why_not: str
    left: bool = False


class Audited(Using):
    """audit.json.

    Attributes:
        command: that made it; created: when.
        subject: what was audited, in words.
        metric: what the plain number is called, as "FID" or "FD (digits pixels)".
        facts: the feature network and the reference, in words.
        num_samples: N.
        points: what tells the points apart, as `Claim.at`; one "" where there is one.
        claims: at each point; none where nothing was claimed.
        plain: the number as the field takes it.
        tried: singles first, then pairs, each in the order in which they were tried.
        untried: what was not.
        verdict, paragraph: what follows for the claims; "" where nothing was claimed.
        explained: factors of those that fit, best first, singles before pairs; see `ddim_lab.conventions.explanation`.
        forwards, seconds: what this run of it cost: image-forwards, and wall-clock time.
        environment: versions.
    """

    command: str = ""
    created: str = ""
    subject: str
    metric: str
    facts: str = ""
    num_samples: int
    points: tuple[str, ...] = ("",)
    claims: tuple[Claim, ...] = ()
    plain: Tried
    tried: tuple[Tried, ...] = ()
    untried: tuple[Untried, ...] = ()
    verdict: Literal["", "agrees", "identified", "ambiguous", "unexplained"] = ""
    paragraph: str = ""
    explained: tuple[tuple[str, ...], ...] = ()
    forwards: int = 0
    seconds: float = 0.0
    environment: dict[str, Any] = Field(default_factory=dict)
