"""When a sweep of `num_samples=auto` has samples enough: at which N it looks, and what ends it."""

from __future__ import annotations

from typing import Annotated, final

from pydantic import Field, StrictInt

from ddim_lab.config.options import Options, Positive

__all__ = ["StopConfig"]


@final
class StopConfig(Options):
    """conf/config.yaml's group `stop`.

    Attributes:
        samples: the largest N.
        looks: at how many N the comparisons are looked at, in equal steps up to `samples`.
        se: a comparison whose error is below this, in the unit of its value, needs no more samples.
        hours: of this command, after which no further look is begun.
    """

    samples: Annotated[StrictInt, Field(ge=2, le=10**9)]
    looks: Annotated[StrictInt, Field(ge=1, le=20)]
    se: Positive | None
    hours: Positive | None

    @property
    def counts(self) -> tuple[int, ...]:
        """N of each look."""
        return tuple(self.samples * look // self.looks for look in range(1, self.looks + 1))
