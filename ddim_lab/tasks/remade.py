"""Samples of a job made again with one convention of sampling changed, or several: what an audit's factors change.

A change that some configuration has, as another spacing, is made as that configuration's cell makes it, and shares its
samples. What none has, as timesteps that are rounded before the network sees them, is made in a folder that no cell
looks into: a number of such images can't enter a sweep.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Final, final

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.config.model import CheckpointOptions, UNetConfig
from ddim_lab.config.sampler import SolverOptions
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.conventions.protocol import Factor, Made
from ddim_lab.conventions.sampling import CONVENTIONS, published_effect
from ddim_lab.conventions.source import Source
from ddim_lab.data.images import ImageSet, MemoryImages, NonFiniteError, to_uint8
from ddim_lab.device.runtime import Precision
from ddim_lab.metrics.speed import time_forwards, timed
from ddim_lab.models.obtain import Model, obtain_model
from ddim_lab.sampler import Ddim, Draw, Formula, Predict, Sampler, State
from ddim_lab.store import content_key
from ddim_lab.store.chunks import Batch, SampleChunks
from ddim_lab.tasks.base import Job
from ddim_lab.tasks.sampling import maker_in_place, samples_folder, samples_identity
from ddim_lab.tasks.walks import Batches, check_finite, start
from ddim_lab.transitions import Transition, Variance, sigma

__all__ = ["JobSource"]

LEVELS: Final = "levels"
"""Name of the tensor of a batch that has the images before they were rounded."""

HELD_AT_MOST: Final = 2**28
"""Bytes of images that are held in memory; those of larger sets are read from their chunks."""

WALKED_OTHERWISE: Final = ("spacing", "schedule", "weights", "first", "arithmetic", "timesteps", "loop")
"""Aspects that change at which t, or of which network, the analytic variance would have to know Gamma(t)."""

BESIDE_A_PIPELINE: Final = ("eta", "weights", "schedule", "arithmetic", "seed")
"""What can be changed together with loop=diffusers, whose pipeline says the rest itself."""

SIXTEEN_BITS: Final[Mapping[str, Precision]] = {"bf16": "bf16", "fp16": "fp16"}

_SCHEDULES: Final[TypeAdapter[Any]] = TypeAdapter(ScheduleConfig)


@final
@dataclass(frozen=True)
class _Plan:
    """How a changed set of samples is made.

    Attributes:
        job: with the configuration, model and runtime that make it.
        sampler: what samples; unused by a pipeline.
        altered: what no configuration has of it, by aspect; none of a plain cell's.
        pipeline: whether diffusers' pipeline makes it.
    """

    job: Job
    sampler: Sampler
    altered: Mapping[str, str]
    pipeline: bool

    @property
    def nfe(self) -> int:
        """Forwards of one sample."""
        return self.sampler.steps if self.pipeline else self.sampler.nfe


@final
class JobSource(Source):
    """The samples of a job, and the same job's made otherwise.

    Samples that are there are not made again, whatever force=true says: whoever wants that discards them first. They
    are made by one process on one device.

    Args:
        job: N and the size of a batch are numbers.
    """

    keeps_levels = True

    def __init__(self, job: Job) -> None:
        config = job.config
        self._job: Final = replace(job, config=config.model_copy(update={"force": False}))
        self.name = (
            f"{config.num_samples:,} samples of {config.data.name} {job.model.kind}, {config.sampler.name}"
            f" eta={config.sampler.eta:g} S={job.sampler.steps}, seed {config.seed}"
        )
        self.count = config.num_samples
        self.shape = job.data.shape
        self._plans: Final[dict[Made, _Plan]] = {}
        self._made: Final[set[str]] = set()

    # -- what can be changed -------------------------------------------------------------------------------

    def factors(self) -> Sequence[Factor]:
        """The choices other than the job's own, each with why it can't be tried where it can't."""
        found = []
        for each in CONVENTIONS:
            own = self._own(each.aspect)
            if each.choice == own:
                continue
            base = (self._noise() if each.aspect in ("eta", "variance") else own) or ""
            effect = published_effect(each.aspect, base, each.choice, self._job.sampler.steps)
            why_not = None
            try:
                plan, plain = self._plan(((each.aspect, each.choice),)), self._plan(())
                if self._identity(plan) == self._identity(plain):
                    why_not = "it would change nothing here"
            except ValueError as error:
                why_not = str(error)
            found.append(each.factor(effect, why_not))
        return found

    def _own(self, aspect: str) -> str | None:
        """The job's own choice, by the names of `CONVENTIONS`; None where it is none of them."""
        config, runtime = self._job.config, self._job.runtime
        sampler = config.sampler
        return {
            "spacing": None if sampler.timesteps is not None else sampler.spacing,
            "clip": sampler.clip,
            "eta": f"{sampler.eta:g}" if sampler.variance == "posterior" else None,
            "variance": sampler.variance,
            "weights": self._job.model.weights,
            "schedule": config.schedule.name,
            "arithmetic": None if runtime.keep_fp32 else runtime.precision,
        }.get(aspect)

    def _noise(self) -> str:
        """What of Table 1's rows the job's noise is: "0", "1" or "large"; "" where it is none of them."""
        sampler = self._job.config.sampler
        return {"posterior": f"{sampler.eta:g}", "large": "large"}.get(sampler.variance, "")

    # -- how a change is made ------------------------------------------------------------------------------

    def _plan(self, made: Made) -> _Plan:
        """How these changes are made.

        Raises:
            ValueError: they are not possible, or not together; one line.
        """
        made = tuple(sorted(made))
        if made not in self._plans:
            self._plans[made] = self._planned(made)
        return self._plans[made]

    def _planned(self, made: Made) -> _Plan:
        known = {(each.aspect, each.choice) for each in CONVENTIONS}
        if unknown := [pair for pair in made if pair not in known]:
            raise ValueError(f"{unknown[0][0]}={unknown[0][1]} is no convention of sampling that is known here")
        if twice := [aspect for (aspect, _), (after, _) in pairwise(made) if aspect == after]:
            raise ValueError(f"two choices of {twice[0]} can't hold together")
        asked = dict(made)
        self._check_together(asked)
        job = self._job
        model = self._weights(asked["weights"]) if "weights" in asked else job.model
        config = self._configured(asked)
        runtime = job.runtime
        if "arithmetic" in asked:
            runtime = replace(runtime, precision=SIXTEEN_BITS[asked["arithmetic"]], keep_fp32=())
        words = " ".join(f"{aspect}={choice}" for aspect, choice in made)
        told = replace(model, load=lambda: _RoundedTimesteps(model.load())) if "timesteps" in asked else model
        remade = Job(config, job.data, told, runtime, job.store, f"{job.progress} {words}".strip())
        sampler = self._sampler(remade, asked)
        if "timesteps" in asked:
            self._check_rounding(sampler)
        if pipeline := "loop" in asked:
            self._check_pipeline(remade)
        beside = ("schedule", "last", "timesteps", "loop")
        altered = {aspect: asked[aspect] for aspect in beside if aspect in asked}
        return _Plan(remade, sampler, altered, pipeline)

    def _check_together(self, asked: Mapping[str, str]) -> None:
        """Raise ValueError where changes exclude each other, or the job."""
        config = self._job.config
        sampler = config.sampler
        if "loop" in asked and (other := [aspect for aspect in asked if aspect not in ("loop", *BESIDE_A_PIPELINE)]):
            raise ValueError(
                f"diffusers' pipeline has its own {other[0]}: loop=diffusers is not tried together with it"
            )
        if "eta" in asked and "variance" in asked:
            raise ValueError("sigma-hat is at eta 1: eta is not changed together with it")
        if config.model.kind in ("gaussian", "empirical") and (
            other := [aspect for aspect in ("weights", "arithmetic", "timesteps", "loop") if aspect in asked]
        ):
            raise ValueError(f"model={config.model.kind} is exact, and no network: there is no {other[0]} to change")
        if sampler.variance == "analytic" and (other := [aspect for aspect in WALKED_OTHERWISE if aspect in asked]):
            raise ValueError(
                f"with {other[0]} changed Gamma(t) of sampler.variance=analytic would have to be estimated again"
            )
        if sampler.formula is not None:
            if other := [aspect for aspect in ("clip", "eta", "variance", "last", "loop") if aspect in asked]:
                raise ValueError(
                    f"{other[0]} is of the DDIM family, and sampler={sampler.name} has a formula of its own"
                )
            if ("spacing" in asked or "first" in asked) and not isinstance(sampler, SolverOptions):
                raise ValueError(f"sampler={sampler.name} chooses its own timesteps")
        if asked.get("arithmetic") == "fp16" and self._job.runtime.torch_device.type != "cuda":
            raise ValueError("fp16 is for GPUs, and this device is a CPU")

    def _configured(self, asked: Mapping[str, str]) -> Config:
        """The job's configuration with all that a configuration can say of the changes."""
        config = self._job.config
        sampler: dict[str, Any] = {}
        update: dict[str, Any] = {}
        if "spacing" in asked:
            sampler |= {"spacing": asked["spacing"], "timesteps": None}
            update["steps"] = self._job.sampler.steps
        if "clip" in asked:
            sampler["clip"] = asked["clip"]
        if "eta" in asked:
            kept = "analytic" if config.sampler.variance == "analytic" else "posterior"
            sampler |= {"eta": float(asked["eta"]), "variance": kept}
        if "variance" in asked:
            sampler |= {"eta": 1.0, "variance": asked["variance"]}
        if "seed" in asked:
            update["seed"] = config.seed + int(asked["seed"].removeprefix("plus_"))
        if "schedule" in asked:
            update["schedule"] = self._schedule(asked["schedule"])
        if "arithmetic" in asked:
            said = {"precision": asked["arithmetic"], "keep_fp32": ()}
            update["runtime"] = config.runtime.model_copy(update=said)
        changed = config.model_copy(update={**update, "sampler": config.sampler.model_copy(update=sampler)})
        if "first" in asked:
            later = self._one_later(changed)
            changed = changed.model_copy(update={"sampler": changed.sampler.model_copy(update={"timesteps": later})})
        changed.check()
        return changed

    def _one_later(self, config: Config) -> tuple[float, ...]:
        """The walk's timesteps, each one later and T - 1 at most, ascending."""
        sampler = config.build_sampler()
        if sampler.formula.visits is not None:
            raise ValueError(f"sampler={config.sampler.name} chooses its own timesteps")
        last = sampler.schedule.num_timesteps - 1
        return tuple(sorted({min(each.t + 1, last) for each in sampler.transitions}))

    def _schedule(self, name: str) -> Any:
        """The named schedule with as many timesteps as the job's, and its range of betas where it has one."""
        own = self._job.config.schedule
        count = own.build().num_timesteps
        if name == "cosine":
            return _SCHEDULES.validate_python(
                {"name": name, "num_timesteps": count, "offset": 0.008, "max_beta": 0.999}
            )
        ends = {"beta_start": getattr(own, "beta_start", 1e-4), "beta_end": getattr(own, "beta_end", 0.02)}
        return _SCHEDULES.validate_python({"name": name, "num_timesteps": count, **ends})

    def _weights(self, weights: str) -> Model:
        """The same model with its averaged or raw weights; ValueError where they are not at hand."""
        job, options = self._job, self._job.config.model
        assert isinstance(options, UNetConfig | CheckpointOptions)
        if options.model_dump().get("weights") == "random":
            raise ValueError("an untrained network has neither averaged nor raw weights")
        config = job.config.model_copy(update={"model": options.model_copy(update={"weights": weights})})
        told = f"model.path={options.path}" if isinstance(options, CheckpointOptions) else f"model={options.kind}"
        try:
            model = obtain_model(config, job.data, job.runtime, job.store, contextlib.nullcontext)
        except ValueError as error:
            raise ValueError(f"{told}: its {weights} weights are not at hand ({error})") from None
        if model.digest == job.model.digest:
            raise ValueError(f"{told} holds one network: averaged and raw weights are not both at hand")
        return model

    def _sampler(self, job: Job, asked: Mapping[str, str]) -> Sampler:
        if "last" not in asked:
            return job.sampler
        config, moments = job.config, job.second_moments()
        options = config.sampler
        if options.variance == "learned":
            raise ValueError("the network's variance was learned for a last step that ends at the clean image")
        schedule = config.build_schedule()
        ends = _EndsAtZero(Ddim(options.family_clip), schedule.alpha_bar(0), options.eta, options.variance)
        unclipped = config.model_copy(
            update={"sampler": options.model_copy(update={"clip": "none"})}
        )  # it clips itself
        gamma = None if moments is None else moments.gamma
        return unclipped.build_sampler(job.model.prediction, formula=ends, gamma=gamma, labels=job.labels)

    @cached_property
    def _network(self) -> nn.Module:
        """The job's network as it is loaded, to be looked at."""
        return self._job.model.load()

    def _check_rounding(self, sampler: Sampler) -> None:
        """Raise ValueError where rounded timesteps are not what such a network is ever told, or change nothing."""
        asked = [level for each in sampler.transitions for level in (each.t, *(each.between or ())[:1])]
        if all(_rounded(t) == t for t in asked):
            raise ValueError("bfloat16 has every timestep of this walk exactly: nothing would change")
        if not _is_unet(self._network):
            raise ValueError("it is done to diffusers' U-Nets, and this network is none")
        if self._network.config.time_embedding_type == "learned":  # type: ignore[union-attr]
            raise ValueError(
                "this network's time embedding is a table, whose entries are counted: it takes no rounded t"
            )

    def _check_pipeline(self, job: Job) -> None:
        """Raise ValueError where diffusers' DDIMPipeline can't sample this model, or would not for this job."""
        variance, options = job.config.sampler.variance, job.config.sampler
        if job.model.classes is not None or options.guidance is not None:
            raise ValueError("DDIMPipeline tells a network no class")
        if not _is_unet(self._network):
            raise ValueError("DDIMPipeline is for diffusers' UNet2DModel, and this network is none")
        if variance != "posterior":
            raise ValueError(f"DDIMPipeline adds the posterior's noise, and sampler.variance={variance} is another")
        config: Any = self._network.config
        size = config.sample_size if isinstance(config.sample_size, Sequence) else [config.sample_size] * 2
        if config.out_channels != self.shape[0]:
            raise ValueError("DDIMPipeline takes no network that gives its variance, too")
        if list(size) != list(self.shape[1:]):
            raise ValueError(f"DDIMPipeline makes images of {size}, as the network's config.json says, in no other way")
        if job.runtime.precision == "bf16":
            raise ValueError("DDIMPipeline hands its images to numpy, which has no bfloat16")

    # -- the samples ---------------------------------------------------------------------------------------

    def _identity(self, plan: _Plan, levels: bool = False) -> dict[str, Any]:
        return samples_identity(plan.job, plan.sampler, _altered(plan, levels))

    def key(self, made: Made, *, levels: bool = False) -> str:
        """Identifies the images, by what makes them and how many they are; arguments as `images`."""
        return content_key({"samples": self._identity(self._plan(made), levels), "count": self.count, LEVELS: levels})

    def forwards(self, made: Made, *, levels: bool = False) -> int:
        """Image-forwards of the samples that are not there; arguments as `images`.

        Not counted is what sampler.variance=analytic is estimated by, once a model.
        """
        plan, key = self._plan(made), self.key(made, levels=levels)
        if key in self._made:
            return 0
        folder = self._job.store.path("samples", content_key(self._identity(plan, levels)))
        chunks = SampleChunks(folder, self.count, plan.job.config.batch_size, math.inf)
        return sum(map(len, chunks.missing())) * plan.nfe

    def images(self, made: Made, *, levels: bool = False) -> ImageSet:
        """The samples, made so.

        Args:
            made: what is changed.
            levels: as float32 from 0 to 255, not rounded.

        Raises:
            ValueError: the changes are not possible, or not together; NonFiniteError: the samples diverged.
        """
        plan = self._plan(made)
        config = plan.job.config
        with samples_folder(plan.job, plan.sampler, _altered(plan, levels)) as folder:
            chunks = SampleChunks(folder, self.count, config.batch_size, config.checkpoint_seconds)
            if missing := chunks.missing():
                if plan.pipeline:
                    _make_by_pipeline(plan, chunks, missing, levels)
                elif levels:
                    _make_levels(plan, chunks, missing)
                else:
                    _make(plan, chunks, missing)
                chunks.flush()
        self._made.add(self.key(made, levels=levels))
        named = plan.job.labels
        labels = torch.zeros(self.count, dtype=torch.int64) if named is None else named(torch.arange(self.count))
        images = _ChunkImages(chunks, labels, self.shape, levels)
        if math.prod(self.shape) * self.count * (4 if levels else 1) > HELD_AT_MOST:
            return images
        return MemoryImages(torch.cat(list(images.batches(config.batch_size))), labels)

    def forward_seconds(self) -> float:
        """Seconds of one image's forward, uncompiled, in as large a batch as the job's; measured at the first call."""
        return self._forward_seconds

    @cached_property
    def _forward_seconds(self) -> float:
        job = self._job
        runtime = replace(job.runtime, compile=False, cuda_graphs=False)
        at_once = min(job.config.batch_size, self.count)
        with runtime.applied(), torch.inference_mode():
            network = replace(job, runtime=runtime).network(at_once)
            takes_labels = job.model.classes is not None
            return time_forwards(network, self.shape, at_once, takes_labels, runtime.torch_device).seconds


def _altered(plan: _Plan, levels: bool) -> dict[str, str]:
    return {**plan.altered, **({LEVELS: "kept"} if levels else {})}


def _make(plan: _Plan, chunks: SampleChunks, missing: Sequence[range]) -> None:
    """Make samples as a cell does, but for features of them."""
    with maker_in_place(plan.job, plan.sampler, chunks, see=False) as maker, torch.inference_mode():
        for indices in Batches(plan.job, missing, total=plan.job.config.num_samples):
            maker.add(indices)


def _make_levels(plan: _Plan, chunks: SampleChunks, missing: Sequence[range]) -> None:
    """Make samples as a cell does, and keep them as they are before they are rounded, too."""
    with maker_in_place(plan.job, plan.sampler, chunks, see=False) as maker, torch.inference_mode():
        warm = False
        for indices in Batches(plan.job, missing, total=plan.job.config.num_samples):
            walk = maker.walk(indices, maker.noise)
            maker.contention.begin()
            x_0, seconds, _ = maker.time_walk(walk)
            check_finite(x_0, walk, maker.network, plan.sampler)
            kept = {LEVELS: ((x_0 + 1.0) * 127.5).clamp(0.0, 255.0).cpu()}
            taken = {"sampling": seconds}
            images = to_uint8(x_0).cpu()
            chunks.add(Batch(int(indices[0]), images, kept, {}, taken, warm, maker.contention.look()))
            warm = True


# -- diffusers' own loop ---------------------------------------------------------------------------------


def _make_by_pipeline(plan: _Plan, chunks: SampleChunks, missing: Sequence[range], levels: bool) -> None:
    """Make samples by diffusers' DDIMPipeline, with its own conversion to 8 bits."""
    job = plan.job
    with job.runtime.applied(), job.timed_alone("images") as contention, torch.inference_mode():
        warm, run = False, _pipeline(plan)
        for indices in Batches(job, missing, total=job.config.num_samples):
            contention.begin()
            (pixels, images), seconds = timed(partial(run, indices), job.runtime.torch_device)
            if not bool(torch.isfinite(pixels).all()):
                raise NonFiniteError("the images hold NaN or infinite values: DDIMPipeline diverged on this model")
            kept = {LEVELS: pixels * 255.0} if levels else {}
            chunks.add(Batch(int(indices[0]), images, kept, {}, {"sampling": seconds}, warm, contention.look()))
            warm = True


def _pipeline(plan: _Plan) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """(indices) -> images in [0, 1] as DDIMPipeline gives them, float32, and as its 8 bits; [B, C, H, W] on the CPU.

    What its scheduler is not told are the defaults of that: clipping, leading timesteps, alpha_bar 1 at the end.
    """
    import numpy as np
    from diffusers import DDIMPipeline, DDIMScheduler

    from ddim_lab.models.unet import scheduler_config

    job, sampler = plan.job, plan.sampler
    known = scheduler_config(sampler.schedule, job.config.schedule.model_dump())
    told = {name: known[name] for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
    predicts = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[job.model.prediction]
    scheduler = DDIMScheduler(**told, trained_betas=known["trained_betas"], prediction_type=predicts)
    network: Any = job.model.load().to(job.runtime.torch_device)
    if job.runtime.precision == "fp16":
        network.to(torch.float16)
    pipe = DDIMPipeline(unet=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def run(indices: Tensor) -> tuple[Tensor, Tensor]:
        asked = {"eta": sampler.eta, "num_inference_steps": sampler.steps, "output_type": "np"}
        noise = [_generator(job.config.seed, index) for index in indices.tolist()] if sampler.eta > 0.0 else None
        with _handed(start(job, indices)):
            images = pipe(batch_size=len(indices), generator=noise, **asked).images
        eight_bits = np.stack([np.asarray(image) for image in pipe.numpy_to_pil(images)]).reshape(images.shape)
        pixels, levels = (torch.from_numpy(found).permute(0, 3, 1, 2).contiguous() for found in (images, eight_bits))
        return pixels.to(torch.float32), levels

    return run


@contextlib.contextmanager
def _handed(x_T: Tensor) -> Iterator[None]:
    """Context: a DDIMPipeline starts from this x_T.

    It takes none as an argument, and draws it by one call of `randn_tensor`, a name of its module. No generator gives
    numbers that were chosen, so that name stands for these meanwhile. The scheduler's noise is drawn in another module.
    """
    from diffusers.pipelines.ddim import pipeline_ddim

    drawn = pipeline_ddim.randn_tensor

    def given(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype, **_: object) -> Tensor:
        assert tuple(shape) == tuple(x_T.shape)
        return x_T.to(device=device, dtype=dtype)

    pipeline_ddim.randn_tensor = given
    try:
        yield
    finally:
        pipeline_ddim.randn_tensor = drawn


def _generator(seed: int, index: int) -> torch.Generator:
    """Of a sample's noise: the same whatever the batch."""
    named = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(named[:8], "big") >> 1)


def _is_unet(network: nn.Module) -> bool:
    """Whether it is a `UNet2DModel` of diffusers."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    return isinstance(network, UNet2DModel)


# -- walks and networks that no configuration has --------------------------------------------------------


@final
class _EndsAtZero(Formula):
    """DDIM's step, the last one to the level of t = 0 instead of the clean image.

    As diffusers' set_alpha_to_one=False: alpha_bar_prev is alpha_bar(0), in sigma(eta), too.

    Args:
        step: of the family.
        alpha_bar: at t = 0.
        eta, variance: of the walk; the last step adds noise where the variance is the posterior's.
    """

    def __init__(self, step: Ddim, alpha_bar: float, eta: float, variance: Variance) -> None:
        self._step: Final = step
        self._alpha_bar: Final = alpha_bar
        self._eta: Final = eta
        self._variance: Final = variance

    def _ended(self, transitions: Sequence[Transition]) -> tuple[Transition, ...]:
        *before, last = transitions
        in_mean = sigma(self._eta, last.alpha_bar, self._alpha_bar)
        std = in_mean if self._variance == "posterior" else 0.0
        return (*before, replace(last, alpha_bar_prev=self._alpha_bar, sigma=in_mean, noise_std=std))

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return self._step.step(transition, x_t, eps, z)

    def x0(self, transition: Transition, x_t: Tensor, eps: Tensor) -> Tensor:
        return self._step.x0(transition, x_t, eps)

    def is_random(self, transitions: Sequence[Transition]) -> bool:
        return super().is_random(self._ended(transitions))

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        return super().walk(predict, x_T, self._ended(transitions), draw)

    def recipe(self) -> dict[str, Any]:
        return {"name": "ends at alpha_bar(0)", **self._step.recipe()}


@final
class _RoundedTimesteps(nn.Module):
    """A network that is told timesteps which were rounded to bfloat16, of the dtype that they had."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, *labels: Tensor) -> Any:
        return self.network(x_t, t.to(torch.bfloat16).to(t.dtype), *labels)


def _rounded(t: float) -> float:
    return float(torch.tensor(t, dtype=torch.float32).to(torch.bfloat16))


# -- reading them ----------------------------------------------------------------------------------------


@final
class _ChunkImages(ImageSet):
    """Samples that stay in their chunks; reading them in order reads each chunk once.

    Args:
        chunks: all of the samples are there.
        labels: int64 [N].
        shape: (C, H, W).
        levels: whether they are wanted as they were before they were rounded: float32 from 0 to 255.
    """

    def __init__(self, chunks: SampleChunks, labels: Tensor, shape: tuple[int, int, int], levels: bool) -> None:
        self.labels = labels
        self._chunks, self._shape, self._levels = chunks, shape, levels
        self._rest: Iterator[Batch] = iter(())
        self._held: Batch | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def batch(self, indices: Tensor) -> Tensor:
        dtype = torch.float32 if self._levels else torch.uint8
        found = torch.empty(len(indices), *self._shape, dtype=dtype)
        for place in indices.argsort().tolist():
            batch = self._with(int(indices[place]))
            images = batch.tensors[LEVELS] if self._levels else batch.images
            found[place] = images[int(indices[place]) - batch.start]
        return found

    def _with(self, index: int) -> Batch:
        """The batch that a sample is in: the one at hand, a later one, or from the start again."""
        if self._held is None or index < self._held.start:
            self._rest = iter(self._chunks)
            self._held = next(self._rest)
        while index >= self._held.stop:
            self._held = next(self._rest)
        return self._held

    def content(self) -> Iterator[bytes]:
        yield repr((len(self), *self._shape)).encode()
        for images in self.batches(256):
            yield images.numpy().tobytes()
        yield self.labels.numpy().tobytes()
