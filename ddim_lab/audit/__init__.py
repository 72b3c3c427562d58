"""Why is my FID different? A claimed number held beside ours, with one convention of the field changed at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddim_lab.conventions.records import Audited

__all__ = ["audit"]


def audit(
    path: Path | str | None = None,
    options: Sequence[str] = (),
    *,
    claimed: str | None = None,
    claimed_samples: int | None = None,
    paper: str | None = None,
    reference: Path | str | None = None,
    factors: Sequence[str] | None = None,
    budget: float | None = None,
) -> Audited:
    """What `python -m ddim_lab.audit` finds, as a record: `tried` is its table.

    Args:
        path: samples.npz or a folder of images; None to make the samples by the model that the options name.
        options: as on the command line, "data=cifar10".
        claimed: "4.16", or several as "10:13.36,50:4.67", over N of images that are there, over S of those of a model.
        claimed_samples: of how many images the claimed number is; None for as many as are audited.
        paper: a study of experiments/, whose published numbers are the claim; of a model.
        reference: images, statistics or both, as `ddim_lab.score --reference`; None for the data set's.
        factors: names of the conventions to try; None for all.
        budget: seconds that it may take; None for what singles take, and about as long for pairs.

    Raises:
        ConfigError: something of it can't be used; one line.
    """
    from ddim_lab.audit.auditing import Asked, carry_out

    asked = Asked(
        path=None if path is None else Path(path),
        options=tuple(options),
        claimed=claimed,
        claimed_samples=claimed_samples,
        paper=paper,
        reference=None if reference is None else Path(reference),
        factors=None if factors is None else tuple(factors),
        budget=budget,
    )
    return carry_out(asked)
