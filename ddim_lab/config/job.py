"""The configuration, typed and strict: what conf/ may say, checked before any work starts.

Hydra composes, pydantic checks. An unknown option, a value out of range or an impossible combination is a
`ConfigError` whose message is one line: what is wrong and what to do.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ddim_lab.config.data import DataConfig
from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.diffusion import Prediction
from ddim_lab.errors import ConfigError
from ddim_lab.sampler import Clip, EncodeAt, Sampler, Variance
from ddim_lab.schedule import SPACINGS, NoiseSchedule

__all__ = ["Config", "config_folder"]

PositiveInt = Annotated[StrictInt, Field(ge=1)]
Words = Annotated[StrictStr, Field(min_length=1)]
NonNegativeInt = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
StepsKey = Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9][0-9]*$")]

AUTO: Final = 0
"""What `batch_size=auto` is until the network is known; a job that runs has a number."""


def _batch_size(given: Any) -> Any:
    if given == "auto":
        return AUTO
    if isinstance(given, int) and given < 1:
        raise PydanticCustomError("batch_size", "must be at least 1, or auto")
    return given


def _switch(given: Any) -> Any:
    """Checked here, where the message can say all three."""
    if isinstance(given, bool) or given == "auto":
        return given
    raise PydanticCustomError("switch", "must be true, false or auto")


Switch = Annotated[StrictBool | Literal["auto"], BeforeValidator(_switch)]

MOST_STATES: Final = 8 * 2**30
"""Bytes of float32 states of one set, at most, for tasks that compare two sets image by image in memory."""


def config_folder() -> Path:
    """Where the YAML files are: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UNetConfig(_Group):
    """conf/model: a diffusers `UNet2DModel`, sized by the data."""

    kind: Literal["unet"]
    weights: Literal["ema", "raw", "random"]
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    attention: tuple[StrictBool, ...]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    dropout: Fraction


class PretrainedConfig(_Group):
    """conf/model/pretrained: a checkpoint made elsewhere, in diffusers' format; no training."""

    kind: Literal["pretrained"]
    path: Words


class GaussianConfig(_Group):
    """conf/model/gaussian: exact eps of one Gaussian with the training images' mean and variance; no training."""

    kind: Literal["gaussian"]


class EmpiricalConfig(_Group):
    """conf/model/empirical: exact eps of the training images as point masses; no training."""

    kind: Literal["empirical"]


class _BetaRange(_Group):
    num_timesteps: PositiveInt
    beta_start: Number
    beta_end: Number


class LinearConfig(_BetaRange):
    """conf/schedule/linear."""

    name: Literal["linear"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.linear(self.num_timesteps, self.beta_start, self.beta_end)


class ScaledLinearConfig(_BetaRange):
    """conf/schedule/scaled_linear."""

    name: Literal["scaled_linear"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.scaled_linear(self.num_timesteps, self.beta_start, self.beta_end)


class SigmoidConfig(_BetaRange):
    """conf/schedule/sigmoid."""

    name: Literal["sigmoid"]

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.sigmoid(self.num_timesteps, self.beta_start, self.beta_end)


class ConstantConfig(_Group):
    """conf/schedule/constant."""

    name: Literal["constant"]
    num_timesteps: PositiveInt
    beta_end: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.constant(self.num_timesteps, self.beta_end)


class CosineConfig(_Group):
    """conf/schedule/cosine."""

    name: Literal["cosine"]
    num_timesteps: PositiveInt
    offset: NonNegative
    max_beta: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.cosine(self.num_timesteps, self.offset, self.max_beta)


class BetasFileConfig(_Group):
    """conf/schedule/file: betas from a text file or .npy array."""

    name: Literal["file"]
    path: Words

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.from_file(self.path)


ModelConfig = Annotated[UNetConfig | PretrainedConfig | GaussianConfig | EmpiricalConfig, Field(discriminator="kind")]
ScheduleConfig = Annotated[
    LinearConfig | ScaledLinearConfig | SigmoidConfig | ConstantConfig | CosineConfig | BetasFileConfig,
    Field(discriminator="name"),
]


class TrainingConfig(_Group):
    """conf/training: how the eps-model is trained (Ho et al. 2020, Algorithm 1)."""

    seed: Seed
    max_steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Positive
    learning_rate_decay: Literal["constant", "cosine"]
    warmup_steps: NonNegativeInt
    ema_decay: Fraction
    gradient_clip: Positive
    random_flip: StrictBool
    precision: Literal["auto", "fp32", "bf16"]
    compile: Switch
    devices: PositiveInt
    checkpoint_every: PositiveInt


class SamplerConfig(_Group):
    """conf/sampler: a few numbers on the one sampler."""

    name: Words
    eta: NonNegative
    variance: Variance
    spacing: StrictStr
    clip: Clip
    timesteps: tuple[StrictInt, ...] | None


class GenerateConfig(_Group):
    """conf/task/generate: sample, score, time, repeat."""

    name: Literal["generate"]


class ReconstructConfig(_Group):
    """conf/task/reconstruct: held-out images to noise and back (paper, Table 2)."""

    name: Literal["reconstruct"]
    at: EncodeAt


class InterpolateConfig(_Group):
    """conf/task/interpolate: images between images (paper, Figure 6 and D.5)."""

    name: Literal["interpolate"]
    points: Annotated[StrictInt, Field(ge=3)]
    grid: Annotated[StrictInt, Field(ge=2)]


class ConsistencyConfig(_Group):
    """conf/task/consistency: the same x_T at S steps and at `reference_steps` (paper, Figure 5)."""

    name: Literal["consistency"]
    reference_steps: PositiveInt


class TrajectoryConfig(_Group):
    """conf/task/trajectory: x_t and the predicted x_0 over the steps."""

    name: Literal["trajectory"]
    columns: Annotated[StrictInt, Field(ge=2)]


class CannotSkipConfig(_Group):
    """conf/task/cannot_skip: DDPM's formula on skipped timesteps, with per-step or cumulative alphas."""

    name: Literal["cannot_skip"]
    alphas: Literal["per_step", "cumulative"]


class SearchTimestepsConfig(_Group):
    """conf/task/search_timesteps: the list of timesteps with the lowest distance on this model, kept as a preset."""

    name: Literal["search_timesteps"]
    trials: PositiveInt
    search_features: Literal["classifier", "pixels"] | None
    search_samples: Annotated[StrictInt, Field(ge=2)]
    search_seed: Seed
    preset: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class BenchmarkConfig(_Group):
    """conf/task/benchmark: speed alone."""

    name: Literal["benchmark"]
    batch_sizes: tuple[PositiveInt, ...]
    fitted_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=3)]
    fitted_batches: Annotated[StrictInt, Field(ge=3)]
    rounds: Annotated[StrictInt, Field(ge=3)]


class SpeedPeersConfig(_Group):
    """conf/task/speed_peers: other people's loops around the same network, in the same process."""

    name: Literal["speed_peers"]
    rounds: Annotated[StrictInt, Field(ge=3)]


class PrecisionConfig(_Group):
    """conf/task/precision: what a runtime changes in the images, beside fp32 from the same x_T."""

    name: Literal["precision"]


TaskConfig = Annotated[
    GenerateConfig
    | ReconstructConfig
    | InterpolateConfig
    | ConsistencyConfig
    | TrajectoryConfig
    | CannotSkipConfig
    | SearchTimestepsConfig
    | BenchmarkConfig
    | SpeedPeersConfig
    | PrecisionConfig,
    Field(discriminator="name"),
]


class RuntimeConfig(_Group):
    """conf/runtime: where and in what precision."""

    device: StrictStr
    aim: Literal["faithful", "speed"]
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]
    keep_fp32: tuple[Literal["edges", "norms", "stream"], ...]
    channels_last: Switch
    compile: Switch
    cuda_graphs: Switch
    cudnn_benchmark: Switch
    deterministic: StrictBool


class LoggerConfig(_Group):
    """conf/logger: what mirrors the files."""

    name: Literal["wandb", "csv"]
    project: Words = "ddim_lab"
    entity: Words | None = None
    mode: Literal["auto", "online", "offline"] = "auto"


def _spacings(given: Any) -> Any:
    """One spacing, or one by S: checked here, where the message can say both."""
    by_steps = given if isinstance(given, dict) else {} if given is None else {1: given}
    if all(str(steps).isdecimal() and name in list(SPACINGS) for steps, name in by_steps.items()):
        return given
    raise PydanticCustomError("spacing", "must be one of {known}, or S: one of them", {"known": ", ".join(SPACINGS)})


class RowConfig(_Group):
    """What the sampler of a published row is: its noise and its clipping."""

    eta: NonNegative
    variance: Variance
    clip: Clip


class ReferenceConfig(_Group):
    """study.reference: known numbers to stand beside ours, and what they were taken with.

    A number stands beside the cells whose sampler is its row's, whatever the cell's preset is called. A difference is
    given where all that is said here of the numbers holds for the cell, too.

    Attributes:
        source: where they were published.
        metric: what they are, as the report names it: "FID", "FD (digits classifier)", "Reconstruction MSE".
        data, num_samples: of what data and how many images.
        reference: the split of real images that a Fréchet distance is to.
        weights: of the network.
        spacing: of the timesteps, one for all or by S.
        schedule: as conf/schedule.
        rows: preset of conf/sampler -> S -> number.
        samplers: what the sampler of a row is; conf/sampler says it where it has the preset.
    """

    source: StrictStr
    metric: StrictStr
    data: StrictStr | None = None
    num_samples: PositiveInt | None = None
    reference: Literal["train", "held_out", "all"] = "train"
    weights: Literal["ema", "raw"] | None = None
    spacing: Annotated[StrictStr | dict[StepsKey, StrictStr] | None, BeforeValidator(_spacings)] = None
    schedule: ScheduleConfig | None = None
    rows: Annotated[dict[StrictStr, dict[StepsKey, Number]], Field(min_length=1)]
    samplers: Annotated[dict[StrictStr, RowConfig], Field(validate_default=True)] = {}

    @field_validator("samplers", mode="before")
    @classmethod
    def _look_up_presets(cls, given: Any, info: ValidationInfo) -> Any:
        """The rows' presets as conf/sampler has them, under what is given."""
        if not isinstance(given, dict):
            return given
        found = {}
        for name in info.data.get("rows", {}):
            file = config_folder() / "sampler" / f"{name}.yaml"
            if name not in given and Path(name).name == name and file.is_file():
                preset = OmegaConf.to_container(OmegaConf.load(file))
                assert isinstance(preset, dict)
                found[name] = {field: preset[field] for field in RowConfig.model_fields}
        return {**found, **given}


class StudyConfig(_Group):
    """What the report says of a sweep: title, notes, and known numbers to stand beside ours."""

    title: StrictStr | None
    notes: StrictStr | None
    reference: ReferenceConfig | None


class Config(_Group):
    """One job."""

    data: DataConfig
    model: ModelConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    sampler: SamplerConfig
    task: TaskConfig
    metrics: MetricsConfig
    runtime: RuntimeConfig
    logger: LoggerConfig
    study: StudyConfig
    steps: PositiveInt
    num_samples: Annotated[StrictInt, Field(ge=2)]
    batch_size: Annotated[
        StrictInt, BeforeValidator(_batch_size), PlainSerializer(lambda n: "auto" if n == AUTO else n)
    ]
    checkpoint_seconds: Positive
    seed: Seed
    sampling_devices: PositiveInt
    save_samples: StrictBool
    force: StrictBool
    outputs_dir: Words

    @classmethod
    def from_hydra(cls, composed: DictConfig) -> Config:
        """The checked configuration of one job.

        Raises:
            ConfigError: with one line for the user.
        """
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=...")
        try:
            values = OmegaConf.to_container(composed, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(_first_line(error)) from None
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None
        config.check()
        return config

    def check(self) -> None:
        """What no single value shows: combinations. Raises ConfigError."""
        try:
            self.build_sampler()
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
        if self.sampling_devices > 1 and not isinstance(self.task, GenerateConfig | CannotSkipConfig):
            raise ConfigError(
                f"sampling_devices={self.sampling_devices} needs task=generate, or cannot_skip, not {self.task.name}"
            )
        if self.training.warmup_steps > self.training.max_steps:
            raise ConfigError(
                f"training.warmup_steps={self.training.warmup_steps} exceeds"
                f" training.max_steps={self.training.max_steps}: set training.warmup_steps to"
                f" {self.training.max_steps} at most"
            )
        self._check_reference()

    def _check_reference(self) -> None:
        if (reference := self.study.reference) is None:
            return
        if unknown := [name for name in reference.rows if name not in reference.samplers]:
            raise ConfigError(
                f"study.reference.rows.{unknown[0]}: conf/sampler has no such preset, so say what it is:"
                f" study.reference.samplers.{unknown[0]}={{eta: ..., variance: ..., clip: ...}}"
            )
        if unknown := [name for name in reference.samplers if name not in reference.rows]:
            raise ConfigError(f"study.reference.samplers.{unknown[0]}: study.reference.rows has no such row")

    def _check_task(self) -> None:
        task, sampler = self.task, self.sampler
        if isinstance(task, ReconstructConfig | InterpolateConfig) and sampler.eta != 0:
            raise ConfigError(
                f"task={task.name} needs the deterministic sampler: set sampler.eta=0, got {sampler.eta:g}"
            )
        if isinstance(task, ReconstructConfig) and sampler.clip != "none":
            raise ConfigError(f"task=reconstruct needs an invertible step: set sampler.clip=none, got {sampler.clip}")
        if isinstance(task, InterpolateConfig) and self.num_samples < 4:
            raise ConfigError(f"task=interpolate needs 4 samples for the corners of its grid, got {self.num_samples}")
        if isinstance(task, InterpolateConfig) and task.points % 2 == 0:
            raise ConfigError(f"task.points={task.points} must be odd: a line's middle is one of its points")
        if isinstance(task, CannotSkipConfig) and (sampler.eta, sampler.variance, sampler.clip) != (
            1.0,
            "posterior",
            "none",
        ):
            raise ConfigError(
                "task=cannot_skip writes DDPM's own formula: set sampler=ddpm (eta 1, posterior, no clip)"
            )
        if isinstance(task, ConsistencyConfig):
            try:
                self.build_sampler(steps=task.reference_steps)
            except ValueError as error:
                raise ConfigError(f"task.reference_steps={task.reference_steps}: {error}") from None
        if isinstance(task, ConsistencyConfig | PrecisionConfig):
            size = math.prod(self.data.shape) * 4
            if self.num_samples * size > MOST_STATES:
                raise ConfigError(
                    f"num_samples={self.num_samples} is too many for task={task.name}, which holds all states in"
                    f" memory: at most {MOST_STATES // size} ({MOST_STATES // 2**30} GiB) for data={self.data.name}"
                )
        if isinstance(task, SearchTimestepsConfig):
            self._check_search(task)
        if self.metrics.reference_statistics is not None and not isinstance(task, GenerateConfig | CannotSkipConfig):
            raise ConfigError(f"metrics.reference_statistics is for task=generate, got task={task.name}")
        if isinstance(task, BenchmarkConfig):
            try:
                for steps in task.fitted_steps:
                    self.build_sampler(steps=steps)
            except ValueError as error:
                raise ConfigError(f"task.fitted_steps: {error}") from None
            if len(set(task.fitted_steps)) < 3:
                raise ConfigError("task.fitted_steps needs 3 different numbers of steps for a line")
        if isinstance(task, PrecisionConfig) and self.num_samples < 3:
            raise ConfigError(f"task=precision needs 3 samples for a standard error, got {self.num_samples}")
        if isinstance(task, SpeedPeersConfig):
            self._check_peers()
        untrained = isinstance(self.model, UNetConfig) and self.model.weights == "random"
        if untrained and self.needs_images:
            raise ConfigError(
                f"model.weights=random is an untrained network, to be timed alone: task={task.name} needs ema or raw"
            )
        if self.save_samples and not isinstance(task, GenerateConfig):
            raise ConfigError(f"save_samples=true needs task=generate, got task={task.name}")

    def _check_peers(self) -> None:
        sampler = self.sampler
        if not isinstance(self.model, UNetConfig | PretrainedConfig):
            raise ConfigError(
                f"task=speed_peers needs a U-Net, which others can run: model={self.model.kind} is not one"
            )
        if (sampler.variance, sampler.clip, sampler.spacing, sampler.timesteps) != (
            "posterior",
            "none",
            "uniform",
            None,
        ):
            raise ConfigError(
                "task=speed_peers compares walks that all peers have: set sampler.variance=posterior sampler.clip=none"
                " sampler.spacing=uniform sampler.timesteps=null"
            )

    def _check_search(self, task: SearchTimestepsConfig) -> None:
        total = self.build_schedule().num_timesteps
        if self.sampler.timesteps is not None:
            raise ConfigError(
                "task=search_timesteps looks for the timesteps: leave sampler.timesteps=null and set steps"
            )
        if self.steps >= total:
            raise ConfigError(
                f"task=search_timesteps has nothing to choose at steps={self.steps}:"
                f" set steps below the schedule's {total} timesteps"
            )
        if self.sampler.eta > 1:
            raise ConfigError(f"task=search_timesteps needs sampler.eta from 0 to 1, got {self.sampler.eta:g}")
        if task.trials < len(SPACINGS):
            raise ConfigError(
                f"task.trials={task.trials}: must be at least {len(SPACINGS)}, the built-in spacings are the first"
            )
        if task.search_seed == self.seed:
            raise ConfigError(
                f"task.search_seed={task.search_seed} is the seed of the final score, too: make them differ"
            )
        if self.num_samples < 3:
            raise ConfigError(f"task=search_timesteps needs 3 samples for a standard error, got {self.num_samples}")
        if (config_folder() / "sampler" / f"{task.preset}.yaml").exists():
            raise ConfigError(f"task.preset={task.preset} is a built-in preset: choose another name")

    @property
    def needs_images(self) -> bool:
        """Whether the job reads its data set: timing a network that is there already does not."""
        given = isinstance(self.model, PretrainedConfig) or (
            isinstance(self.model, UNetConfig) and self.model.weights == "random"
        )
        return not (given and isinstance(self.task, BenchmarkConfig | SpeedPeersConfig))

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.schedule.build()

    def build_sampler(self, prediction: Prediction = "eps", steps: int | None = None) -> Sampler:
        """The sampler on its schedule; with `steps`, the same with that many steps (instead of a list of timesteps)."""
        return Sampler(
            self.build_schedule(),
            steps=self.steps if steps is None else steps,
            eta=self.sampler.eta,
            variance=self.sampler.variance,
            spacing=self.sampler.spacing,
            clip=self.sampler.clip,
            timesteps=self.sampler.timesteps if steps is None else None,
            prediction=prediction,
        )

    def labels(self) -> dict[str, Any]:
        """What names this job among the others of a sweep."""
        return {
            "data": self.data.name,
            "model": self.model.path if isinstance(self.model, PretrainedConfig) else self.model.kind,
            "sampler": self.sampler.name,
            "eta": self.sampler.eta,
            "variance": self.sampler.variance,
            "spacing": self.sampler.spacing if self.sampler.timesteps is None else "custom",
            "clip": self.sampler.clip,
            "steps": self.steps if self.sampler.timesteps is None else len(self.sampler.timesteps),
            "num_samples": self.num_samples,
            "batch_size": "auto" if self.batch_size == AUTO else self.batch_size,
            "seed": self.seed,
            "training_seed": self.training.seed,
        }


_BOUNDS: Final = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def _explain(error: ValidationError) -> str:
    """The first fault as `option=value: what it must be`."""
    # A misspelt option before what is missing because of it.
    fault = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
    top, *inner = (str(part) for part in fault["loc"])
    place = ".".join([top, *(inner[1:] if top in _UNIONS else inner)])
    kind, given, context = fault["type"], fault.get("input"), fault.get("ctx", {})
    if isinstance(context.get("error"), ConfigError):  # raised by a validator: the whole line
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"{place}: no such option"
    if kind == "missing":
        return f"{place} is not set"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{place}={given}: must be {words} {context[key]}"
    if kind == "literal_error":
        return f"{place}={given}: must be {context['expected']}"
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return f"{place}={given}: must be a whole number"
    if kind in ("float_type", "float_parsing", "finite_number"):
        return f"{place}={given}: must be a finite number"
    if kind == "string_too_short":
        return f"{place} is empty: give a value, or drop it"
    if kind == "tuple_type":
        return f"{place}={given}: must be a list, as {place}=[A,B]"
    if kind == "bool_type":
        return f"{place}={given}: must be true or false"
    return f"{place}={given}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


_UNIONS: Final = ("model", "schedule", "task")
"""Groups of which a choice has options of its own: pydantic names the choice after the group."""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
