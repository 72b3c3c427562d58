"""The eps-model of a job: trained once and kept, or known exactly."""

from __future__ import annotations

import csv
import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn

from ddim_lab.analytic import EmpiricalEps, GaussianEps
from ddim_lab.config.job import AUTO, EXACT, Config
from ddim_lab.config.model import CheckpointOptions, EmpiricalConfig, Labels, UNetConfig
from ddim_lab.data.base import load_data
from ddim_lab.data.images import ImageData, ImageSet, MemoryImages, from_uint8
from ddim_lab.device.imports import large_imports
from ddim_lab.device.ranks import devices_of_ranks, on_ranks
from ddim_lab.device.runtime import Runtime
from ddim_lab.diffusion import Prediction
from ddim_lab.errors import ConfigError
from ddim_lab.labels import NamedLabels
from ddim_lab.sampler import EpsModel
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.store import Store, content_key, read_json, write_json

if TYPE_CHECKING:
    from ddim_lab.models.pretrained import Pretrained

log = logging.getLogger(__name__)

__all__ = ["Mirror", "Model", "check_model", "model_labels", "obtain_model", "training_recipe", "with_batch_size"]

CURVE: Final = "training_curve.csv"

TRAINING_VERSION: Final = 2
"""Raised whenever the same recipe would train to other weights."""

Mirror = Callable[[dict[str, float], int], None]


@final
@dataclass(frozen=True)
class Model:
    """An eps-model that is ready to be loaded.

    Attributes:
        kind: of conf/model: "unet", "gaussian", "empirical", or the format of a checkpoint.
        digest: identifies the weights (or the data and schedule of an exact model).
        weights: "ema", "raw", "random" or "exact"; "unknown" of a checkpoint of which nobody says it.
        parameters: number of them.
        fingerprint: of the training, or None.
        prediction: what it predicts.
        trained: whether this call trained it.
        load: gives the network, on the CPU, in evaluation mode.
        elsewhere: whether it was trained elsewhere: a checkpoint.
        weights_by: who says what a checkpoint's weights are: "user", "card" or "file"; None where nobody does.
        classes: of a class-conditional network, the labels that it takes, from 0 up, the null class among them; None of
            another.
        null_class: the label by which that network is told no class; None where it has none.
        learned_variance: whether it gives twice the channels, of which the second half says the variance.
        source: of a checkpoint in another code base's format: which one's, and its published name.
    """

    kind: str
    digest: str
    weights: str
    parameters: int
    fingerprint: str | None
    prediction: Prediction
    trained: bool
    load: Callable[[], nn.Module]
    elsewhere: bool = False
    weights_by: str | None = None
    classes: int | None = None
    null_class: int | None = None
    learned_variance: bool = False
    source: str | None = None

    def recipe(self) -> dict[str, Any]:
        """What its outputs are a function of; for keys. What is said of a checkpoint's weights changes no image."""
        weights = "pretrained" if self.elsewhere else self.weights
        return {"kind": self.kind, "digest": self.digest, "weights": weights, "prediction": self.prediction}


def training_recipe(config: Config, data: ImageData, runtime: Runtime) -> dict[str, Any]:
    """The allow-list of what makes trained weights what they are, resolved."""
    assert isinstance(config.model, UNetConfig)
    training = config.training.model_dump(exclude={"checkpoint_every", "precision", "compile", "devices"})
    if not config.model.conditional:
        del training["label_dropout"]
    if training["timesteps"] == "uniform":  # what every training was before there was a choice
        del training["timesteps"]
    precision = runtime.training_precision(config.training.precision)
    if precision == "bf16":
        training["fp32"] = ["conv_in", "conv_out"]
    if runtime.training_compiled(config.training.compile):  # other rounding, and dropout from the compiler's generator
        training["compile"] = True
    if config.training.devices > 1:  # other dropout, other rounding
        training["devices"] = config.training.devices
    return {
        "version": TRAINING_VERSION,
        "data": data.digest,
        "model": config.model.architecture(),
        "schedule": config.build_schedule().digest,
        "training": {**training, "precision": precision},
    }


def obtain_model(config: Config, data: ImageData, runtime: Runtime, store: Store, mirror: Callable[[], Any]) -> Model:
    """The model that conf/model names; a U-Net is trained if the store has none of this fingerprint.

    Args:
        config, data, runtime, store: of the job.
        mirror: called if training starts; a context manager that gives a `Mirror` for the training's values.
    """
    if not config.task.samples_model:
        return Model(EXACT, "", "exact", 0, None, "eps", False, _not_sampled)
    schedule = config.build_schedule()
    if isinstance(config.model, UNetConfig):
        return _unet(config, config.model, data, schedule, runtime, store, mirror)
    if isinstance(config.model, CheckpointOptions):
        found = _pretrained(config, config.model)
        if found.note is not None:
            _say_once(found.note)
        return _loadable(config.model.kind, found)
    kind = config.model.kind
    digest = content_key({"kind": kind, "data": data.digest, "schedule": schedule.digest})

    def load() -> nn.Module:
        if kind == "gaussian" and not isinstance(data.train, MemoryImages):
            return _Function(GaussianEps(schedule, *_moments(data.train)))
        # A set on disk is one that `check_model` has found to fit.
        pixels = data.train.images if isinstance(data.train, MemoryImages) else data.train.first(len(data.train))
        images = from_uint8(pixels)
        if kind == "empirical":
            return _Function(EmpiricalEps(schedule, images))
        variance = images.double().var(0).clamp(min=_LEVEL_VARIANCE)
        return _Function(GaussianEps(schedule, images.double().mean(0), variance))

    return Model(kind, digest, "exact", 0, None, "eps", False, load)


def _not_sampled() -> nn.Module:
    raise RuntimeError("this task brings models of its own")


def with_batch_size(config: Config, runtime: Runtime) -> Config:
    """The job with `batch_size=auto` settled; a checkpoint is looked at for it, as when it was checked."""
    if config.batch_size != AUTO:
        return config
    model, channels = config.model, None
    if isinstance(model, UNetConfig):
        channels = model.block_out_channels[0]
    elif isinstance(model, CheckpointOptions):
        channels = _pretrained(config, model).channels
    return config.model_copy(update={"batch_size": runtime.batch_size(channels, config.data.shape)})


HELD_AT_MOST: Final = 2**28
"""Pixel values of the images that an empirical model may hold: 2 GiB as float64."""


@functools.lru_cache(maxsize=1)
def _moments(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and variance of every pixel value in [-1, 1], float64 [C, H, W], in one pass over images on disk."""
    count, mean, squares = 0, torch.zeros(images.shape, dtype=torch.float64), torch.zeros(images.shape).double()
    for part in images.batches(256):
        found = from_uint8(part).double()
        count += len(found)
        shift = found.mean(0) - mean  # Chan's update: sums of squares alone would cancel
        squares += (found - found.mean(0)).square().sum(0) + shift.square() * len(found) * (count - len(found)) / count
        mean += shift * len(found) / count
    return mean, (squares / (count - 1)).clamp(min=_LEVEL_VARIANCE)


_LEVEL_VARIANCE: Final = 127.5**-2
"""A pixel that never changes would have variance 0; one grey level's square keeps it proper."""


def check_model(config: Config, count: int | None = None) -> None:
    """Checks on the model that need no images: a checkpoint must be there, whole, and fit.

    Args:
        config: the job.
        count: images of the data set, if they are on disk.

    Raises:
        ConfigError: with one line for the user.
    """
    if not config.task.samples_model:
        return
    if isinstance(config.model, CheckpointOptions):
        _check_fits(config, config.model, _pretrained(config, config.model))
    elif config.sampler.variance == "learned":
        raise ConfigError(NO_VARIANCE.format(f"model={config.model.kind}"))
    values = (count or 0) * math.prod(config.data.shape)
    if isinstance(config.model, EmpiricalConfig) and values > HELD_AT_MOST:
        raise ConfigError(
            f"model=empirical holds every training image in memory: {count} images of data={config.data.name} are"
            f" {values * 8 / 2**30:.1f} GiB, {HELD_AT_MOST * 8 / 2**30:.0f} GiB at most are taken; use model=gaussian,"
            " fewer images or smaller ones"
        )


NO_VARIANCE: Final = "sampler.variance=learned needs a network that learned it, and {} did not: choose another"


def _check_fits(config: Config, model: CheckpointOptions, found: Pretrained) -> None:
    """Raise ConfigError where sampler or task ask of a checkpoint what it can't do."""
    told = f"model.path={model.path}"
    guidance = config.sampler.guidance
    if found.classes is not None:
        config.check_takes_labels()
        if guidance not in (None, 1.0) and found.null_class is None:
            raise ConfigError(
                f"sampler.guidance={guidance:g} needs a network that can be told no class, and of {told} it is not"
                " known how: give model.null_class, the label that means it, if there is one"
            )
        classes = [label for label in range(found.classes) if label != found.null_class]
        if isinstance(model.labels, int) and model.labels not in classes:
            raise ConfigError(f"model.labels={model.labels} is no class of {told}, whose are {_span(classes)}")
        if model.labels == "data" and not config.data.has_labels:
            raise ConfigError(f"model.labels=data: data={config.data.name} has no labels")
    elif guidance is not None or model.null_class is not None:
        option = "sampler.guidance" if guidance is not None else "model.null_class"
        raise ConfigError(f"{option} is for class-conditional networks, and {told} is none: drop it")
    if config.task.eps_alone and (found.learned_variance or found.whole):
        what = "learned its variance" if found.learned_variance else "has a learned time embedding"
        raise ConfigError(f"{told} {what}, and the code that task={config.task.name} runs is not for that")
    if found.classes is None and model.labels != "uniform":
        raise ConfigError(f"model.labels is for class-conditional networks, and {told} is none: drop it")
    if config.sampler.variance == "learned" and not found.learned_variance:
        raise ConfigError(NO_VARIANCE.format(told))
    if found.whole:
        told = f"{told} has a learned time embedding, a table of whole timesteps, and"
        if not (sampler := config.build_sampler()).whole:
            help = "set sampler.timesteps_as=integer" if sampler.formula.visits is None else "choose another"
            raise ConfigError(f"{told} sampler={config.sampler.name} visits others: {help}")
        if any(not walk.whole for walk in config.task.further_walks(config)):
            raise ConfigError(
                f"{told} task={config.task.name} visits others on its own walks: give those whole ones, or set"
                " sampler.timesteps_as=integer"
            )


def _pretrained(config: Config, model: CheckpointOptions) -> Pretrained:
    from ddim_lab.models.inspection import inspect_pretrained

    return inspect_pretrained(model, config.schedule, config.data.name, config.data.shape)


@functools.cache
def _say_once(note: str) -> None:
    log.info(note)


def _loadable(kind: str, found: Pretrained) -> Model:
    return Model(
        kind=kind,
        digest=found.digest,
        weights=found.weights,
        parameters=found.parameters,
        fingerprint=None,
        prediction=found.prediction,
        trained=False,
        load=found.load,
        elsewhere=True,
        weights_by=found.weights_by,
        classes=found.classes,
        null_class=found.null_class,
        learned_variance=found.learned_variance,
        source=found.source,
    )


def _unet(
    config: Config,
    unet: UNetConfig,
    data: ImageData,
    schedule: NoiseSchedule,
    runtime: Runtime,
    store: Store,
    mirror: Callable[[], Any],
) -> Model:
    if unet.weights == "random":
        return _untrained(config, unet, data)
    if unet.conditional:
        label_shares(unet.labels, data.num_classes + 1, data.num_classes, data)  # before anything is trained
        empty = (torch.bincount(data.train.labels.cpu(), minlength=data.num_classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(f"model.conditional=true: class {empty[0]} of data={data.name} has no training image")
    recipe = training_recipe(config, data, runtime)
    fingerprint = content_key(recipe)

    def build(folder: Path) -> None:
        # diffusers and Lightning, only where something is trained
        from ddim_lab.models.unet import load_unet, weights_digest, write_pipeline

        work = store.work_folder("models", fingerprint)
        with mirror() as send, store.presence(runtime.hardware):  # who is timed meanwhile says so
            if config.training.devices == 1:
                _train(config, data, runtime, work, folder, send)
            else:
                with devices_of_ranks(store, runtime, config.training.devices, all_of_them=True) as devices:
                    values = config.model_dump(mode="json")
                    on_ranks(config.training.devices, _train_rank, values, runtime, devices, work, folder)
                with (folder / CURVE).open(newline="") as file:  # the mirror can't go to another process
                    for row in csv.DictReader(file):
                        values = {"loss": float(row["loss"]), "learning_rate": float(row["learning_rate"])}
                        send(values, int(row["step"]))
        write_pipeline(folder, schedule, config.schedule.model_dump())
        averaged, raw = load_unet(folder), load_unet(folder / "raw")
        description = {
            "fingerprint": fingerprint,
            "recipe": recipe,
            "prediction": "eps",
            "parameters": sum(parameter.numel() for parameter in averaged.parameters()),
            "digests": {"ema": weights_digest(averaged), "raw": weights_digest(raw)},
        }
        write_json(folder / "model.json", description)

    folder, trained = store.obtain("models", fingerprint, build)
    description = read_json(folder / "model.json")

    def load() -> nn.Module:
        from ddim_lab.models.unet import load_unet

        return load_unet(folder if unet.weights == "ema" else folder / "raw")

    model = Model(
        kind="unet",
        digest=description["digests"][unet.weights],
        weights=unet.weights,
        parameters=description["parameters"],
        fingerprint=fingerprint,
        prediction=description["prediction"],
        trained=trained,
        load=load,
    )
    return _told_classes(model, unet, data)


def _told_classes(model: Model, unet: UNetConfig, data: ImageData) -> Model:
    """The model with the data's classes and one more label that means none, where it is class-conditional."""
    return replace(model, classes=data.num_classes + 1, null_class=data.num_classes) if unet.conditional else model


def model_labels(config: Config, model: Model, data: ImageData) -> NamedLabels | None:
    """The labels of the job's samples; None of a model without classes.

    Raises:
        ConfigError: as `label_shares`.
    """
    if model.classes is None:
        return None
    assert isinstance(config.model, UNetConfig | CheckpointOptions)
    shares = label_shares(config.model.labels, model.classes, model.null_class, data)
    return NamedLabels(config.seed, shares, model.null_class)


def label_shares(asked: Labels, count: int, null_class: int | None, data: ImageData) -> list[float]:
    """How often each of a network's labels is drawn.

    Args:
        asked: model.labels.
        count: of the network's labels.
        null_class: that of them which means no class, and is never drawn.
        data: whose classes "data" goes by.

    Raises:
        ConfigError: what is asked for is no class of the network, or the data have more.
    """
    classes = [label for label in range(count) if label != null_class]
    if asked == "data":
        if data.num_classes > len(classes):
            raise ConfigError(
                f"model.labels=data: data={data.name} has {data.num_classes} classes, and the network {len(classes)}:"
                " give uniform or the number of a class"
            )
        counts = torch.bincount(data.train.labels.cpu(), minlength=len(classes)).double()
        by_class = (counts / counts.sum()).tolist()
    elif asked == "uniform":
        by_class = [1.0 / len(classes)] * len(classes)
    else:
        if asked not in classes:
            raise ConfigError(f"model.labels={asked} is no class of the network, whose are {_span(classes)}")
        by_class = [float(label == asked) for label in classes]
    shares = [0.0] * count
    for label, share in zip(classes, by_class, strict=True):
        shares[label] = share
    return shares


def _span(classes: Sequence[int]) -> str:
    return f"{classes[0]} to {classes[-1]}" if classes else "none"


def _train(
    config: Config,
    data: ImageData,
    runtime: Runtime,
    work: Path,
    folder: Path,
    send: Mirror,
    devices: Sequence[str] = (),
    rank: int = 0,
) -> None:
    """Train, and write both networks and the curve into `folder`; of several ranks, a device each, the first does."""
    with large_imports():
        from ddim_lab.models.training import train

    assert isinstance(config.model, UNetConfig)
    indices = [torch.device(device).index for device in devices or [runtime.device]]
    averaged, raw, write_curve = train(
        data,
        config.model,
        config.build_schedule(),
        config.training,
        accelerator=runtime.accelerator,
        device_indices=[index for index in indices if index is not None],
        rank=rank,
        precision=runtime.training_precision(config.training.precision),
        compiled=runtime.training_compiled(config.training.compile),
        deterministic=runtime.deterministic,
        work=work,
        mirror=send,
    )
    if rank == 0:
        averaged.save_pretrained(folder)
        raw.save_pretrained(folder / "raw")
        write_curve(folder / CURVE)


def _train_rank(
    rank: int, values: dict[str, Any], runtime: Runtime, devices: list[str], work: Path, folder: Path
) -> None:
    """One of several processes that train together."""
    config, mine = Config.model_validate(values), replace(runtime, device=devices[rank])
    with Store(Path(config.outputs_dir)).presence(mine.hardware):
        _train(config, load_data(config.data), runtime, work, folder, lambda values, step: None, devices, rank)


def _untrained(config: Config, unet: UNetConfig, data: ImageData) -> Model:
    """The U-Net as it is before its training: as fast as it is after it."""
    from ddim_lab.models.unet import build_unet

    def load() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            classes = data.num_classes if unet.conditional else None
            network: nn.Module = build_unet(unet, data.shape, classes)
        return network.eval().requires_grad_(False)

    digest = content_key({"untrained": unet.architecture(), "shape": data.shape, "seed": config.training.seed})
    parameters = sum(parameter.numel() for parameter in load().parameters())
    return _told_classes(Model("unet", digest, "random", parameters, None, "eps", False, load), unet, data)


@final
class _Function(nn.Module):
    """An exact eps-model as a module, so that it goes where networks go."""

    def __init__(self, function: EpsModel) -> None:
        super().__init__()
        self._function = function

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        output = self._function(x_t, t)
        assert isinstance(output, torch.Tensor)
        return output
