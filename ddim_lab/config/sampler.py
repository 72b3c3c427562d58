"""conf/sampler: how the walk from noise to image goes. Needs no torch."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny, StrictBool, StrictInt, StrictStr

from ddim_lab.config.found import Kind
from ddim_lab.config.options import NonNegative, Number, Options, PathOption, Words, checked
from ddim_lab.errors import ConfigError
from ddim_lab.schedule import is_whole
from ddim_lab.transitions import Clip, TimestepsAs, Variance

if TYPE_CHECKING:
    from ddim_lab.sampler import Formula

__all__ = ["FORMULAS", "SAMPLERS", "SamplerConfig", "SamplerOptions"]


Timestep = Annotated[Number, AfterValidator(lambda t: int(t) if is_whole(t) else t)]


class SamplerOptions(Options):
    """A few numbers on the DDIM family; one with another formula derives from it, ours or an installed package's.

    Every file of conf/sampler has all of these options, so that presets can be swept beside each other.

    Attributes:
        name: of the preset.
        formula: what takes the steps instead of the DDIM family: a name of `FORMULAS`, or of a package's entry point.
        eta, variance, spacing, clip, timesteps, timesteps_as: see `ddim_lab.transitions.transitions` and
            `ddim_lab.sampler.step`.
        guidance: of a class-conditional model, see `ddim_lab.sampler.Sampler`; None where it is not guided. Presets
            that were written before there were the last two do without them.
    """

    name: Words
    formula: Words | None = None
    eta: NonNegative
    variance: Variance
    spacing: StrictStr
    clip: Clip
    timesteps: tuple[Timestep, ...] | None
    timesteps_as: TimestepsAs = "given"
    guidance: Number | None = None

    def build_formula(self) -> Formula | None:
        """What takes the steps; None is the DDIM family."""
        return None

    def check(self, model_path: str | None) -> None:
        """Raise ConfigError for what does not fit the model: its path, or None where it has none."""

    @property
    def is_guided(self) -> bool:
        """Whether each eps is made of two."""
        return self.guidance not in (None, 0.0, 1.0)

    @property
    def family_clip(self) -> Clip:
        """What the DDIM family's step clips; "none" of a formula that says it itself."""
        return self.clip

    def numbers(self) -> dict[str, Any]:
        """The arguments of `ddim_lab.transitions.transitions` that are said here."""
        return {name: getattr(self, name) for name in ("eta", "variance", "spacing", "timesteps", "timesteps_as")}


class SolverOptions(SamplerOptions):
    """Of a formula of ours that is no member of the DDIM family; abstract.

    The fields that it adds to `SamplerOptions` are the arguments of its class, by name.

    Attributes:
        solver: the module and the class.
    """

    solver: ClassVar[tuple[str, str]]

    def build_formula(self) -> Formula:
        module, name = self.solver
        own = {field: getattr(self, field) for field in type(self).model_fields if field not in _EVERY_SAMPLERS}
        formula: Formula = getattr(importlib.import_module(f"ddim_lab.{module}"), name)(**own)
        return formula


_EVERY_SAMPLERS: Final = frozenset(SamplerOptions.model_fields)


class DeisOptions(SolverOptions):
    """conf/sampler/deis."""

    solver = "multistep", "Deis"
    order: Annotated[StrictInt, Field(ge=1, le=4)]
    lower_order_final: StrictBool


class IpndmOptions(SolverOptions):
    """conf/sampler/ipndm."""

    solver = "pndm", "Ipndm"
    order: Annotated[StrictInt, Field(ge=1, le=4)]
    lower_order_final: StrictBool


class PndmOptions(SolverOptions):
    """conf/sampler/pndm."""

    solver = "pndm", "Pndm"
    start: Literal["linear", "runge_kutta"]
    lower_order_final: StrictBool


class HeunOptions(SolverOptions):
    """conf/sampler/heun."""

    solver = "singlestep", "Heun"


class DpmSolver2Options(SolverOptions):
    """conf/sampler/dpm_solver_2."""

    solver = "singlestep", "DpmSolver2"


class DpmSolverPPOptions(SolverOptions):
    """conf/sampler/dpmpp_2m and dpmpp_3m."""

    solver = "multistep", "DpmSolverPP"
    order: Annotated[StrictInt, Field(ge=1, le=3)]
    correction: Literal["published", "full"]
    lower_order_final: StrictBool


class DpmSolverPPSdeOptions(SolverOptions):
    """conf/sampler/dpmpp_2m_sde."""

    solver = "multistep", "DpmSolverPPSde"
    order: Annotated[StrictInt, Field(ge=1, le=2)]
    lower_order_final: StrictBool


class UniPCOptions(SolverOptions):
    """conf/sampler/unipc."""

    solver = "multistep", "UniPC"
    order: Annotated[StrictInt, Field(ge=1, le=3)]
    corrector: StrictBool
    bh: Literal["bh1", "bh2"]
    lower_order_final: StrictBool


class DiffusersOptions(SamplerOptions):
    """conf/sampler/diffusers: a scheduler of the installed diffusers, which chooses its own timesteps.

    Attributes:
        scheduler: the class's name; and arguments of it beside the name, as "DDIMScheduler timestep_spacing:trailing",
            so that each in a sweep has its own.
        options: arguments, too. They say spacing, variance and clipping, which the options of that name can't.
    """

    scheduler: Words
    options: dict[StrictStr, Any] | None
    variance: Literal["scheduler"]  # type: ignore[assignment]
    spacing: Literal["scheduler"]
    clip: Literal["scheduler"]  # type: ignore[assignment]
    timesteps_as: Literal["given"]

    def build_formula(self) -> Formula:
        from ddim_lab.schedulers.adapter import DiffusersScheduler

        name, *words = self.scheduler.split() or [""]
        said = [*map(_argument, words), *(self.options or {}).items()]
        names = [option for option, _ in said]
        if twice := next((option for option in names if names.count(option) > 1), None):
            raise ConfigError(f"sampler.scheduler and sampler.options say {twice} twice: drop one")
        return DiffusersScheduler(name, dict(said), self.eta)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def family_clip(self) -> Clip:
        return "none"

    def numbers(self) -> dict[str, Any]:
        return {"eta": self.eta, "timesteps": self.timesteps}


def _argument(word: str) -> tuple[str, Any]:
    """An argument as option:value."""
    name, colon, value = word.partition(":")
    if not (name and colon and value):
        raise ConfigError(f"sampler.scheduler: {word} is no argument; write it as option:value, as clip_sample:false")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class CheckpointOptions(DiffusersOptions):
    """conf/sampler/checkpoint: the scheduler that the pretrained model's folder ships, with its settings.

    Attributes:
        folder: the model's, or None where the model has none.
        scheduler: none, since the folder says it.
        options: in the place of the folder's.
    """

    folder: PathOption | None
    scheduler: None  # type: ignore[assignment]

    def check(self, model_path: str | None) -> None:
        if self.folder != model_path:
            raise ConfigError(f"sampler.folder={self.folder}: it is the model's folder, {model_path}; drop it")

    def build_formula(self) -> Formula:
        from ddim_lab.schedulers.adapter import DiffusersScheduler
        from ddim_lab.schedulers.folder import shipped_scheduler

        if self.folder is None:
            raise ConfigError(
                "sampler=checkpoint is the scheduler of a checkpoint's folder: give model=pretrained model.path=..."
            )
        return DiffusersScheduler.shipped(*shipped_scheduler(self.folder), self.options or {}, self.eta)


FORMULAS: Final[dict[str, type[SamplerOptions]]] = {
    "checkpoint": CheckpointOptions,
    "deis": DeisOptions,
    "diffusers": DiffusersOptions,
    "dpm_solver_2": DpmSolver2Options,
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
