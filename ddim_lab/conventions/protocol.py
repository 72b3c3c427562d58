"""How a Fréchet distance is taken, in full, and a change of one of its conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, final

from ddim_lab.data.images import Split

__all__ = ["PLAIN", "Count", "Factor", "Levels", "Made", "Protocol", "compatible", "together"]

Levels = Literal["rounded", "truncated", "raised", "round_trip", "float"]
"""How images became the 256 levels: see `ddim_lab.conventions.pixels`."""

Count = int | Literal["half", "whole_batches"]
"""How many samples, from the first: a number, half of them, or as many as whole batches of 64 hold."""

Made = tuple[tuple[str, str], ...]
"""What is changed of how the samples are made: pairs of an aspect and a choice, sorted; none of a set as it is."""


@final
@dataclass(frozen=True)
class Protocol:
    """How the distance is taken. The defaults are as `ddim_lab.score` does it, which is as the field does.

    Attributes:
        made: how samples are made, where that differs.
        count: how many samples, from the first; None for all.
        levels: of the samples.
        jpeg: quality by which the samples went through JPEG; None where they did not.
        network: a variant of the feature network, by its name (`ddim_lab.metrics.features.Variant`); "" for itself.
        split: of the real images that the reference is; None for the one that conf/metrics names.
        reference_count: how many of them, from the first; None for all.
        reference_levels, reference_jpeg, reference_network: of the reference; the last None for the samples' own.
        flips: whether each image of the reference counts mirrored, too.
        divisor: of covariances, of samples and reference.
        classes: whether samples are weighted to the class proportions of the reference.
        infinite: whether the distance is extrapolated to infinitely many samples.
    """

    made: Made = ()
    count: Count | None = None
    levels: Levels = "rounded"
    jpeg: int | None = None
    network: str = ""
    split: Split | None = None
    reference_count: Count | None = None
    reference_levels: Levels = "rounded"
    reference_jpeg: int | None = None
    reference_network: str | None = None
    flips: bool = False
    divisor: Literal["n-1", "n"] = "n-1"
    classes: bool = False
    infinite: bool = False


PLAIN: Final = Protocol()


@final
@dataclass(frozen=True)
class Factor:
    """One convention, taken otherwise.

    Attributes:
        name: unique, of letters, digits and _, as "jpeg_75_of_reference".
        part: of what it is a convention, as a heading: "reference", "number of samples", "pixels", "network",
            "estimate", "sampling".
        label: in a few words, as "JPEG of quality 75 for the reference".
        says: what is done otherwise, one sentence.
        who: who does it so, with version: libraries, code bases, papers.
        source: where that can be read.
        common: how often the field does it: 1 rarely, 2 sometimes, 3 often.
        effect: what was published of its size, in percent of FID; None where nothing was.
        change: entries of `Protocol` that differ; of `made`, pairs to be added.
        why_not: why it can't be tried on what is audited; None where it can.
    """

    name: str
    part: str
    label: str
    says: str
    who: tuple[str, ...]
    source: str
    common: Literal[1, 2, 3]
    effect: float | None
    change: Mapping[str, Any]
    why_not: str | None = None


def compatible(factors: Sequence[Factor]) -> bool:
    """Whether the factors can hold together: no two say something of the same entry, or aspect of the making.

    Nor are images brought to JPEG's 8 bits and left without.
    """
    entries = [entry for factor in factors for entry in _entries(factor)]
    unrounded = any(factor.change.get("levels") == "float" for factor in factors)
    return len(entries) == len(set(entries)) and not (unrounded and "jpeg" in entries)


def _entries(factor: Factor) -> list[str]:
    plain = [name for name in factor.change if name != "made"]
    return [*plain, *(f"made {aspect}" for aspect, _ in factor.change.get("made", ()))]


def together(factors: Sequence[Factor], base: Protocol = PLAIN) -> Protocol:
    """The protocol with all of these factors.

    Raises:
        ValueError: two of them say something of the same entry, or one names an entry that there is not.
    """
    if not compatible(factors):
        raise ValueError(f"{' and '.join(factor.name for factor in factors)} exclude each other")
    known = {field.name for field in fields(Protocol)}
    for factor in factors:
        if unknown := set(factor.change) - known:
            raise ValueError(f"{factor.name}: a protocol has no {sorted(unknown)[0]}")
        changes = dict(factor.change)
        if "made" in changes:
            changes["made"] = tuple(sorted((*base.made, *changes["made"])))
        base = replace(base, **changes)
    return base
