"""conf/sampler: how the walk from noise to image goes. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BeforeValidator, SerializeAsAny, StrictInt, StrictStr

from ddim_lab.config.found import Kind
from ddim_lab.config.options import NonNegative, Options, Words, checked
from ddim_lab.transitions import Clip, Variance

if TYPE_CHECKING:
    from ddim_lab.sampler import Formula

__all__ = ["SAMPLERS", "SamplerConfig", "SamplerOptions"]


class SamplerOptions(Options):
    """A few numbers on the DDIM family; an installed package derives from it to bring another formula.

    Every file of conf/sampler has all of these options, so that presets can be swept beside each other.

    Attributes:
        name: of the preset.
        formula: of a package's entry point, which takes the steps instead of the DDIM family; None for ours.
        eta, variance, spacing, clip, timesteps: see `ddim_lab.transitions.transitions` and `ddim_lab.sampler.step`.
    """

    name: Words
    formula: Words | None = None
    eta: NonNegative
    variance: Variance
    spacing: StrictStr
    clip: Clip
    timesteps: tuple[StrictInt, ...] | None

    def build_formula(self) -> Formula | None:
        """What takes the steps; None is the DDIM family. A class that a package brings gives its own."""
        return None


SAMPLERS: Final = Kind("sampler", None, SamplerOptions, "ddim_lab.samplers")


def _chosen(values: Any) -> Any:
    if isinstance(values, SamplerOptions) or not isinstance(values, dict) or values.get("formula") is None:
        return values if isinstance(values, SamplerOptions) else checked(SamplerOptions, values, "sampler")
    return checked(SAMPLERS.find(str(values["formula"])), values, "sampler")


SamplerConfig = Annotated[SerializeAsAny[SamplerOptions], BeforeValidator(_chosen)]
"""A field that holds the sampler which its `formula` finds."""
