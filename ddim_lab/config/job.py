"""The configuration, typed and strict: what conf/ may say, checked before any work starts.

Hydra composes, pydantic checks. An unknown option, a value out of range or an impossible combination is a
`ConfigError` whose message is one line: what is wrong and what to do.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializeAsAny,
    StrictBool,
    StrictInt,
)
from pydantic_core import PydanticCustomError

from ddim_lab.config.data import DataConfig
from ddim_lab.config.found import origin_of
from ddim_lab.config.kinds import TASKS, TaskOptions
from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.config.model import CheckpointOptions, ModelConfig, PretrainedConfig, UNetConfig
from ddim_lab.config.options import (
    Options,
    PathOption,
    Positive,
    PositiveInt,
    Seed,
    Words,
    checked,
)
from ddim_lab.config.runtime import RuntimeConfig
from ddim_lab.config.sampler import SamplerConfig
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.config.stop import StopConfig
from ddim_lab.config.study import StudyConfig
from ddim_lab.config.training import TrainingConfig
from ddim_lab.console import ProgressMode
from ddim_lab.errors import ConfigError
from ddim_lab.schedule import LEVEL_SPACINGS, NoiseSchedule
from ddim_lab.transitions import Gamma, Prediction, Transition, transitions

if TYPE_CHECKING:
    from ddim_lab.labels import NamedLabels
    from ddim_lab.sampler import Formula, Sampler

__all__ = ["Config"]

EXACT: Final = "exact"
"""What the model is called of a task that brings models of its own."""

AUTO: Final = 0
"""What `batch_size=auto` and `num_samples=auto` are until they are known; a job that runs has numbers."""


def _number_or_auto(least: int) -> tuple[BeforeValidator, PlainSerializer]:
    def read(given: Any) -> Any:
        if given == "auto":
            return AUTO
        if isinstance(given, int) and given < least:
            raise PydanticCustomError("number_or_auto", "must be at least {least}, or auto", {"least": least})
        return given

    return BeforeValidator(read), PlainSerializer(lambda n: "auto" if n == AUTO else n)


class LoggerConfig(Options):
    """conf/logger: what mirrors the files."""

    name: Literal["wandb", "csv"]
    project: Words | None = None
    entity: Words | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


class Config(Options):
    """One job."""

    data: DataConfig
    model: ModelConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    sampler: SamplerConfig
    task: Annotated[SerializeAsAny[TaskOptions], BeforeValidator(TASKS.chosen)]
    metrics: MetricsConfig
    runtime: RuntimeConfig
    logger: LoggerConfig
    study: StudyConfig
    steps: PositiveInt
    nfe: PositiveInt | None
    num_samples: Annotated[StrictInt, *_number_or_auto(2)]
    batch_size: Annotated[StrictInt, *_number_or_auto(1)]
    stop: StopConfig
    checkpoint_seconds: Positive
    seed: Seed
    variance_images: Annotated[StrictInt, Field(ge=10)]
    sampling_devices: PositiveInt
    save_samples: StrictBool
    force: StrictBool
    outputs_dir: PathOption
    progress: ProgressMode

    @classmethod
    def from_hydra(cls, composed: DictConfig) -> Config:
        """The checked configuration of one job.

        Raises:
            ConfigError: with one line for the user.
        """
        try:
            if missing := sorted(OmegaConf.missing_keys(composed)):
                raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=...")
            values = OmegaConf.to_container(composed, resolve=True)
        except OmegaConfBaseException as error:
            ours, raised, text = _first_line(error).partition("ConfigError raised while resolving interpolation: ")
            raise ConfigError(f"{error.full_key} {text}" if raised else ours) from None
        config = checked(cls, values)
        if config.nfe is not None:
            config = config.model_copy(update={"steps": config.steps_for(config.nfe)})
        for each in config.looks[:: max(1, len(config.looks) - 1)]:  # the first and the last
            each.check()
        return config

    @property
    def grows(self) -> bool:
        """Whether N is `auto`: that of each look, until what the sweep compares needs no more (`stop`)."""
        return self.num_samples == AUTO

    def of(self, num_samples: int) -> Config:
        """The same with N samples."""
        return self.model_copy(update={"num_samples": num_samples})

    @property
    def looks(self) -> tuple[Config, ...]:
        """The job at each N that it may be measured at; itself where that is one number."""
        if not self.grows:
            return (self,)
        if not self.task.scores_samples:
            raise ConfigError(
                "num_samples=auto is for tasks that score their samples:"
                f" task={self.task.name} does not, so give a number"
            )
        if self.stop.counts[0] < 2:
            raise ConfigError(
                f"stop.samples={self.stop.samples} is too few for stop.looks={self.stop.looks}: the first look needs 2"
                " samples"
            )
        return tuple(map(self.of, self.stop.counts))

    def check(self) -> None:
        """What no single value shows: combinations. Raises ConfigError."""
        if (variance := self.sampler.variance) in ("analytic", "learned") and self.sampler.formula is not None:
            raise ConfigError(
                f"sampler.variance={variance} is of the DDIM family, around whose mean it is taken:"
                f" sampler={self.sampler.name} has a formula of its own"
            )
        if variance == "learned" and not self.task.samples_model:
            raise ConfigError(
                f"sampler.variance=learned needs a network that learned it, and task={self.task.name} brings models of"
                " its own, which did not: choose another"
            )
        self.sampler.check(self.model.path if isinstance(self.model, PretrainedConfig) else None)
        try:
            self.build_transitions()
            if self.sampler.formula is not None:
                _check_walk(self.build_sampler(), self.task.samples_model)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._check_task()
        self.metrics.check(self.data)
        if isinstance(self.model, UNetConfig):
            widths, groups = self.model.block_out_channels, self.model.norm_num_groups
            if len(self.model.attention) != len(widths):
                raise ConfigError(
                    f"model.attention needs one true or false a level: {len(widths)}, got {len(self.model.attention)}"
                )
            if any(width % groups for width in widths):
                raise ConfigError(f"model.block_out_channels must be multiples of model.norm_num_groups={groups}")
            if any(side % 2 ** (len(widths) - 1) for side in self.data.shape[1:]):
                raise ConfigError(
                    f"data={self.data.name} has images of {self.data.shape[1]}x{self.data.shape[2]}, which can't be"
                    f" halved {len(widths) - 1} times: model.block_out_channels has too many levels"
                )
        if self.training.batch_size % self.training.devices:
            raise ConfigError(
                f"training.devices={self.training.devices} must divide training.batch_size={self.training.batch_size}"
            )
        if self.training.warmup_steps > self.training.max_steps:
            raise ConfigError(
                f"training.warmup_steps={self.training.warmup_steps} exceeds"
                f" training.max_steps={self.training.max_steps}: set training.warmup_steps to"
                f" {self.training.max_steps} at most"
            )
        self._check_published()

    def _check_published(self) -> None:
        if (published := self.study.published) is None:
            return
        if unknown := [name for name in published.rows if name not in published.samplers]:
            raise ConfigError(
                f"study.published.rows.{unknown[0]}: conf/sampler has no such preset, so say what it is:"
                f" study.published.samplers.{unknown[0]}={{eta: ..., variance: ..., clip: ...}}"
            )
        if unknown := [name for name in published.samplers if name not in published.rows]:
            raise ConfigError(f"study.published.samplers.{unknown[0]}: study.published.rows has no such row")

    def _check_task(self) -> None:
        task = self.task
        if self.sampler.formula is not None and not task.any_formula:
            raise ConfigError(
                f"task={task.name} is for the DDIM family: sampler={self.sampler.name} has a formula of its own"
            )
        if self.sampling_devices > 1 and not task.on_several_devices:
            raise ConfigError(f"sampling_devices={self.sampling_devices} is not for task={task.name}: set it to 1")
        if self.metrics.reference_statistics is not None and not task.scores_samples:
            raise ConfigError(f"metrics.reference_statistics is not for task={task.name}, which compares with images")
        untrained = isinstance(self.model, UNetConfig) and self.model.weights == "random"
        if untrained and self.needs_images:
            raise ConfigError(
                f"model.weights=random is an untrained network, to be timed alone: task={task.name} needs ema or raw"
            )
        if self.save_samples and not task.keeps_samples:
            raise ConfigError(f"save_samples=true is not for task={task.name}, which has no samples.npz to keep")
        self._check_classes()
        task.check(self)

    def _check_classes(self) -> None:
        """Of a network that is made here; what a checkpoint is shows when it is read."""
        guidance, model, task = self.sampler.guidance, self.model, self.task
        if guidance is not None and not task.samples_model:
            raise ConfigError(f"sampler.guidance is not for task={task.name}, which brings models of its own: drop it")
        if isinstance(model, CheckpointOptions):
            return
        conditional = isinstance(model, UNetConfig) and model.conditional
        if guidance is not None and not conditional:
            raise ConfigError(
                f"sampler.guidance={guidance:g} needs a class-conditional network: set model.conditional=true, or give"
                " such a checkpoint"
            )
        if conditional and task.samples_model:
            self.check_takes_labels()
        if not isinstance(model, UNetConfig):
            return
        if conditional and not self.data.has_labels:
            raise ConfigError(f"model.conditional=true needs labels, and data={self.data.name} has none")
        if not conditional and model.labels != "uniform":
            raise ConfigError("model.labels is for class-conditional networks: set model.conditional=true, or drop it")
        count = self.data.known_classes
        if conditional and count is not None and isinstance(model.labels, int) and model.labels >= count:
            raise ConfigError(
                f"model.labels={model.labels} is no class of data={self.data.name}, whose are 0 to {count - 1}"
            )

    @property
    def learns_labels(self) -> bool:
        """Whether the model is told the classes of the training images, or samples by their shares."""
        conditional = isinstance(self.model, UNetConfig) and self.model.conditional
        return conditional or getattr(self.model, "labels", None) == "data"

    def check_takes_labels(self) -> None:
        """Raise ConfigError where the model is class-conditional and task or sampler are not for that."""
        if not self.task.takes_labels:
            raise ConfigError(
                f"task={self.task.name} is for networks without classes: its images would have no labels to be made by"
            )
        if self.sampler.variance == "analytic":
            raise ConfigError(
                "sampler.variance=analytic is estimated without labels, which a class-conditional network needs: choose"
                " another variance"
            )

    @property
    def needs_images(self) -> bool:
        """Whether the job reads its data set: timing a network that is there already does not."""
        if not self.task.samples_model:
            return self.task.reads_images
        given = isinstance(self.model, CheckpointOptions) or (
            isinstance(self.model, UNetConfig) and self.model.weights == "random"
        )
        return self.task.reads_images or not given

    @property
    def forwards(self) -> int:
        """NFE: network forwards that one sample costs."""
        return self.forwards_at()

    def forwards_at(self, steps: int | None = None) -> int:
        """The same with that many steps (instead of a list of timesteps)."""
        if self.sampler.formula is None:
            return len(self.build_transitions(steps)) * (2 if self.sampler.is_guided else 1)
        return self.build_sampler(steps=steps).nfe

    def steps_for(self, nfe: int) -> int:
        """The largest number of steps that costs at most `nfe` forwards a sample; or one that `check` refuses.

        Raises:
            ConfigError: there is none; says the fewest forwards that the sampler can do.
        """
        if self.sampler.timesteps is not None:
            raise ConfigError(f"nfe={nfe} chooses how many steps are taken, and sampler.timesteps lists them: drop one")

        @functools.cache
        def cost(steps: int) -> int | None:
            """None where the sampler can't take so many, or so few."""
            try:
                return self.forwards_at(steps)
            except ValueError:
                return None

        most = self.build_schedule().num_timesteps

        def ordered(steps: int) -> int:
            """Costs grow with the steps; those that are refused stand at their end of the line."""
            found = cost(steps)
            return (0 if steps <= nfe else most + 1) if found is None else found

        end = min(nfe, most)  # only a spacing that drops repeats costs less than its steps
        while end < most and ordered(end) <= nfe:
            end = min(2 * end, most)
        above = bisect.bisect_right(range(1, end + 1), nfe, key=ordered)
        for steps in range(above, 0, -1):
            if (found := cost(steps)) is not None and found <= nfe:
                asked = min(nfe, most)
                # An eta, say, that one step bears and two do not: `check` says what is wrong with as many as asked for.
                return asked if cost(min(steps + 1, most)) is None and cost(asked) is None else steps
        fewest = next(filter(None, map(cost, range(1, most + 1))), None)
        if fewest is None:  # what is wrong is so at every number of steps, and `check` says it
            return min(nfe, most)
        raise ConfigError(
            f"nfe={nfe} is too few for sampler={self.sampler.name}: it takes {fewest} forwards at the least"
        )

    def build_transitions(self, steps: int | None = None) -> tuple[Transition, ...]:
        """The walk from noise to image; with `steps`, of that many (instead of a list of timesteps).

        Needs no torch in the DDIM family.

        Raises:
            ValueError: the walk is impossible; says what is possible.
        """
        if self.sampler.formula is not None:
            return self.build_sampler(steps=steps).transitions
        return transitions(self.build_schedule(), **self._numbers(steps))

    @property
    def first_batch(self) -> int:
        """Images of the cell's first batch, before batch_size=auto is known."""
        return self.num_samples if self.batch_size == AUTO else min(self.batch_size, self.num_samples)

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.schedule.build()

    def build_sampler(
        self,
        prediction: Prediction = "eps",
        steps: int | None = None,
        formula: Formula | None = None,
        gamma: Gamma | None = None,
        labels: NamedLabels | None = None,
    ) -> Sampler:
        """The sampler on its schedule.

        Args:
            prediction: what the model predicts.
            steps: the same with that many steps (instead of a list of timesteps).
            formula: how it steps, if not as conf/sampler says.
            gamma: of the model, for sampler.variance=analytic; without it the noise is not known, and the sampler can
                be looked at but samples nothing. A task that brings models of its own knows theirs.
            labels: of the samples, where the model is class-conditional; without them the sampler can be looked at.
        """
        from ddim_lab.sampler import Sampler

        return Sampler(
            self.build_schedule(),
            **self._numbers(steps),
            clip=self.sampler.family_clip,
            prediction=prediction,
            formula=self.sampler.build_formula() if formula is None else formula,
            gamma=self.task.own_gamma(self.build_schedule()) if gamma is None else gamma,
            labels=labels,
            guidance=self.sampler.guidance,
        )

    def _numbers(self, steps: int | None) -> dict[str, Any]:
        """What makes the walk's transitions, beside the schedule."""
        if steps is None:
            return {"steps": self.steps, **self.sampler.numbers()}
        return {**self.sampler.numbers(), "steps": steps, "timesteps": None}

    def _model_name(self) -> str:
        if not self.task.samples_model:
            return EXACT
        labels = getattr(self.model, "labels", "uniform")
        asked = "" if labels == "uniform" else f", labels {labels}"
        if isinstance(self.model, CheckpointOptions):
            return f"{self.model.path}{asked}"
        conditional = isinstance(self.model, UNetConfig) and self.model.conditional
        return f"{self.model.kind}, class-conditional{asked}" if conditional else self.model.kind

    @property
    def _spacing(self) -> str:
        """What the timesteps go by in reports."""
        spacing = self.sampler.spacing if self.sampler.timesteps is None else "custom"
        return (
            f"{spacing} (integer)" if self.sampler.timesteps_as == "integer" and spacing in LEVEL_SPACINGS else spacing
        )

    def plugins(self) -> list[dict[str, str]]:
        """What installed packages bring to this job: which package, version and files; it enters the cell's key."""
        chosen = [("data", self.data), ("sampler", self.sampler), ("task", self.task), *self.metrics.owners]
        found = ((kind, origin_of(options)) for kind, options in chosen)
        return [{"kind": kind, **asdict(origin)} for kind, origin in found if origin is not None]

    def labels(self) -> dict[str, Any]:
        """What names this job among the others of a sweep; a formula only where it is not the DDIM family's."""
        formula = {} if self.sampler.formula is None else {"formula": self.sampler.formula}
        guidance = {} if self.sampler.guidance is None else {"guidance": self.sampler.guidance}
        return {
            **formula,
            **guidance,
            "data": self.data.name,
            "model": self._model_name(),
            "sampler": self.sampler.name,
            "eta": self.sampler.eta,
            "variance": self.sampler.variance,
            "spacing": self._spacing,
            "clip": self.sampler.clip,
            "steps": self.steps if self.sampler.timesteps is None else len(self.sampler.timesteps),
            **({} if self.nfe is None else {"nfe_asked": self.nfe}),
            "num_samples": "auto" if self.grows else self.num_samples,
            "batch_size": "auto" if self.batch_size == AUTO else self.batch_size,
            "seed": self.seed,
            "training_seed": self.training.seed,
        }


def _check_walk(sampler: Sampler, samples_model: bool) -> None:
    """Raise ValueError where a formula's walk is known to fail; one that diverges may still be looked at."""
    _ = sampler.is_random
    if samples_model and (why := sampler.formula.diverges) is not None:
        raise ValueError(why)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
