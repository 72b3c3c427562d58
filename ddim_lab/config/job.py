"""The configuration, typed and strict: what conf/ may say, checked before any work starts.

Hydra composes, pydantic checks. An unknown option, a value out of range or an impossible combination is a
`ConfigError` whose message is one line: what is wrong and what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializeAsAny,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ddim_lab.config.data import DataConfig
from ddim_lab.config.kinds import TASKS, TaskOptions
from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.config.options import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Number,
    Options,
    Positive,
    PositiveInt,
    Seed,
    StepsKey,
    Switch,
    Words,
    checked,
)
from ddim_lab.errors import ConfigError
from ddim_lab.schedule import SPACINGS, NoiseSchedule
from ddim_lab.transitions import Clip, Prediction, Transition, Variance, transitions

if TYPE_CHECKING:
    from ddim_lab.sampler import Formula, Sampler

__all__ = ["Config", "config_folder"]

AUTO: Final = 0
"""What `batch_size=auto` is until the network is known; a job that runs has a number."""


def _batch_size(given: Any) -> Any:
    if given == "auto":
        return AUTO
    if isinstance(given, int) and given < 1:
        raise PydanticCustomError("batch_size", "must be at least 1, or auto")
    return given


def config_folder() -> Path:
    """Where the YAML files are: inside the package when installed as a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


class ModelOptions(Options):
    """conf/model: where the eps-model comes from.

    Attributes:
        is_unet: whether it is a U-Net, which other people's code can run, too.
    """

    is_unet: ClassVar[bool] = False


class UNetConfig(ModelOptions):
    """conf/model: a diffusers `UNet2DModel`, sized by the data."""

    is_unet: ClassVar[bool] = True

    kind: Literal["unet"]
    weights: Literal["ema", "raw", "random"]
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    attention: tuple[StrictBool, ...]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt
    dropout: Fraction


class PretrainedConfig(ModelOptions):
    """conf/model/pretrained: a checkpoint made elsewhere, in diffusers' format; no training."""

    is_unet: ClassVar[bool] = True

    kind: Literal["pretrained"]
    path: Words


class GaussianConfig(ModelOptions):
    """conf/model/gaussian: exact eps of one Gaussian with the training images' mean and variance; no training."""

    kind: Literal["gaussian"]


class EmpiricalConfig(ModelOptions):
    """conf/model/empirical: exact eps of the training images as point masses; no training."""

    kind: Literal["empirical"]


class _BetaRange(Options):
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


class ConstantConfig(Options):
    """conf/schedule/constant."""

    name: Literal["constant"]
    num_timesteps: PositiveInt
    beta_end: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.constant(self.num_timesteps, self.beta_end)


class CosineConfig(Options):
    """conf/schedule/cosine."""

    name: Literal["cosine"]
    num_timesteps: PositiveInt
    offset: NonNegative
    max_beta: Number

    def build(self) -> NoiseSchedule:
        return NoiseSchedule.cosine(self.num_timesteps, self.offset, self.max_beta)


class BetasFileConfig(Options):
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


class TrainingConfig(Options):
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


class SamplerConfig(Options):
    """conf/sampler: a few numbers on the one sampler."""

    name: Words
    eta: NonNegative
    variance: Variance
    spacing: StrictStr
    clip: Clip
    timesteps: tuple[StrictInt, ...] | None


class RuntimeConfig(Options):
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


class LoggerConfig(Options):
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


class RowConfig(Options):
    """What the sampler of a published row is: its noise and its clipping."""

    eta: NonNegative
    variance: Variance
    clip: Clip


class ReferenceConfig(Options):
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
    samplers: Annotated[dict[StrictStr, RowConfig], Field(default_factory=dict, validate_default=True)]

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


class StudyConfig(Options):
    """What the report says of a sweep: title, notes, and known numbers to stand beside ours."""

    title: StrictStr | None
    notes: StrictStr | None
    reference: ReferenceConfig | None


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
        config = checked(cls, values)
        config.check()
        return config

    def check(self) -> None:
        """What no single value shows: combinations. Raises ConfigError."""
        try:
            self.build_transitions()
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
        task = self.task
        task.check(self)
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

    @property
    def needs_images(self) -> bool:
        """Whether the job reads its data set: timing a network that is there already does not."""
        given = isinstance(self.model, PretrainedConfig) or (
            isinstance(self.model, UNetConfig) and self.model.weights == "random"
        )
        return self.task.reads_images or not given

    @property
    def nfe(self) -> int:
        """Forwards that one sample costs."""
        return len(self.build_transitions())

    def build_transitions(self, steps: int | None = None) -> tuple[Transition, ...]:
        """The walk from noise to image; with `steps`, of that many (instead of a list of timesteps). Needs no torch.

        Raises:
            ValueError: the walk is impossible; says what is possible.
        """
        return transitions(self.build_schedule(), **self._numbers(steps))

    @property
    def first_batch(self) -> int:
        """Images of the cell's first batch, before batch_size=auto is known."""
        return self.num_samples if self.batch_size == AUTO else min(self.batch_size, self.num_samples)

    def build_schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.schedule.build()

    def build_sampler(
        self, prediction: Prediction = "eps", steps: int | None = None, formula: Formula | None = None
    ) -> Sampler:
        """The sampler on its schedule.

        Args:
            prediction: what the model predicts.
            steps: the same with that many steps (instead of a list of timesteps).
            formula: how it steps, if not as the DDIM family.
        """
        from ddim_lab.sampler import Sampler

        return Sampler(
            self.build_schedule(),
            **self._numbers(steps),
            clip=self.sampler.clip,
            prediction=prediction,
            formula=formula,
        )

    def _numbers(self, steps: int | None) -> dict[str, Any]:
        """What makes the walk's transitions, beside the schedule."""
        sampler = self.sampler
        return {
            "steps": self.steps if steps is None else steps,
            "eta": sampler.eta,
            "variance": sampler.variance,
            "spacing": sampler.spacing,
            "timesteps": sampler.timesteps if steps is None else None,
        }

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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
