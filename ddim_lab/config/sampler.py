"""conf/sampler: how the walk from noise to image goes. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, StrictBool, StrictInt, StrictStr

from ddim_lab.config.found import Kind
from ddim_lab.config.options import NonNegative, Options, Words, checked
from ddim_lab.transitions import Clip, Variance

if TYPE_CHECKING:
    from ddim_lab.sampler import Formula

__all__ = ["FORMULAS", "SAMPLERS", "SamplerConfig", "SamplerOptions"]


class SamplerOptions(Options):
    """A few numbers on the DDIM family; one with another formula derives from it, ours or an installed package's.

    Every file of conf/sampler has all of these options, so that presets can be swept beside each other.

    Attributes:
        name: of the preset.
        formula: what takes the steps instead of the DDIM family: a name of `FORMULAS`, or of a package's entry point.
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
        """What takes the steps; None is the DDIM family."""
        return None


class DeisOptions(SamplerOptions):
    """conf/sampler/deis: `ddim_lab.multistep.Deis`."""

    order: Annotated[StrictInt, Field(ge=1, le=4)]
    lower_order_final: StrictBool

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import Deis

        return Deis(self.order, self.lower_order_final)


class IpndmOptions(SamplerOptions):
    """conf/sampler/ipndm: `ddim_lab.multistep.Ipndm`."""

    order: Annotated[StrictInt, Field(ge=1, le=4)]
    lower_order_final: StrictBool

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import Ipndm

        return Ipndm(self.order, self.lower_order_final)


class PndmOptions(SamplerOptions):
    """conf/sampler/pndm: `ddim_lab.multistep.Pndm`."""

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import Pndm

        return Pndm()


class HeunOptions(SamplerOptions):
    """conf/sampler/heun: `ddim_lab.multistep.Heun`."""

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import Heun

        return Heun()


class DpmSolverPPOptions(SamplerOptions):
    """conf/sampler/dpmpp_2m and dpmpp_3m: `ddim_lab.multistep.DpmSolverPP`."""

    order: Annotated[StrictInt, Field(ge=1, le=3)]
    correction: Literal["published", "full"]
    lower_order_final: StrictBool

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import DpmSolverPP

        return DpmSolverPP(self.order, self.correction, self.lower_order_final)


class DpmSolverPPSdeOptions(SamplerOptions):
    """conf/sampler/dpmpp_2m_sde: `ddim_lab.multistep.DpmSolverPPSde`."""

    order: Annotated[StrictInt, Field(ge=1, le=2)]
    lower_order_final: StrictBool

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import DpmSolverPPSde

        return DpmSolverPPSde(self.order, self.lower_order_final)


class UniPCOptions(SamplerOptions):
    """conf/sampler/unipc: `ddim_lab.multistep.UniPC`."""

    order: Annotated[StrictInt, Field(ge=1, le=3)]
    corrector: StrictBool
    bh: Literal["bh1", "bh2"]
    lower_order_final: StrictBool

    def build_formula(self) -> Formula:
        from ddim_lab.multistep import UniPC

        return UniPC(self.order, self.corrector, self.bh, self.lower_order_final)


FORMULAS: Final[dict[str, type[SamplerOptions]]] = {
    "deis": DeisOptions,
    "dpmpp": DpmSolverPPOptions,
    "dpmpp_sde": DpmSolverPPSdeOptions,
    "heun": HeunOptions,
    "ipndm": IpndmOptions,
    "pndm": PndmOptions,
    "unipc": UniPCOptions,
}
"""Our formulas that are not the DDIM family's, by the name that `formula` has in conf/sampler."""

SAMPLERS: Final = Kind("sampler", None, SamplerOptions, "ddim_lab.samplers", names=FORMULAS)


def _chosen(values: Any) -> Any:
    if isinstance(values, SamplerOptions) or not isinstance(values, dict) or values.get("formula") is None:
        return values if isinstance(values, SamplerOptions) else checked(SamplerOptions, values, "sampler")
    name = str(values["formula"])
    return checked(FORMULAS.get(name) or SAMPLERS.find(name), values, "sampler")


SamplerConfig = Annotated[SerializeAsAny[SamplerOptions], BeforeValidator(_chosen)]
"""A field that holds the sampler which its `formula` finds."""
