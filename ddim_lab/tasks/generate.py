"""Task `generate`: sample N images, and measure their quality, the sampler's speed and its determinism."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim_lab.config import Config
from ddim_lab.data import ImageData, MemoryImages, from_uint8, to_uint8
from ddim_lab.metrics.determinism import max_abs_diff, noise_variance
from ddim_lab.metrics.estimates import jackknife_se
from ddim_lab.metrics.features import Features, reference_key
from ddim_lab.metrics.speed import peak_memory_bytes, synchronize, timed
from ddim_lab.metrics.statistics import FeatureSums, median_nearest_distance
from ddim_lab.noise import NamedNoise, NoiseSource
from ddim_lab.sampler import EpsModel, Transition
from ddim_lab.store import Store, read_json
from ddim_lab.tasks.job import Job, Measured
from ddim_lab.tasks.pictures import PREVIEW, preview

if TYPE_CHECKING:
    from ddim_lab.metrics.frechet import FrechetDistance

__all__ = ["Walk", "identity", "measure", "resample"]

COMPARED: Final = 32
"""First samples, at most, on which determinism is measured, in a batch of their own."""

NEAREST_AT_MOST: Final = 10_000
"""Samples whose nearest neighbours are looked up, at most."""

NEAREST_WORK: Final = 10**11
"""The search costs samples x training images x pixels, and takes so many products at most."""


class Walk(Protocol):
    """What samples: a `Sampler`, or a formula that a lesson puts in its place."""

    @property
    def transitions(self) -> tuple[Transition, ...]:
        """The timesteps visited."""
        ...

    @property
    def nfe(self) -> int:
        """Forwards a sample costs."""
        ...

    def sample(
        self,
        model: EpsModel,
        x_T: Tensor,
        seed: int = 0,
        indices: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        """As `Sampler.sample`."""
        ...


def reference_sums(
    features: Features, data: ImageData, split: str, count: int | None, store: Store
) -> tuple[FeatureSums, str]:
    """Statistics of real images, from the store or computed, and their key.

    Args:
        features: extractor.
        data, split: which images.
        count: the first so many; None for all.
        store: where they are kept.
    """
    images = data.split(split)  # type: ignore[arg-type]
    key = reference_key(features, data, split, len(images) if count is None else min(count, len(images)))

    def build(folder: Path) -> None:
        network = features.load()
        with torch.inference_mode():
            FeatureSums.of(network(part) for part in images.batches(512, count)).save(folder / "statistics.npz")

    folder, _ = store.obtain("references", key, build)
    return FeatureSums.load(folder / "statistics.npz"), key


@final
@dataclass
class _Generation:
    """Samples batch after batch under Lightning's test loop; keeps what the metrics need, not the images of large N."""

    sampler: Walk
    network: nn.Module
    features: nn.Module
    distance: FrechetDistance
    shape: tuple[int, int, int]
    seed: int
    batch_size: int
    device: torch.device
    keep_images: bool
    equal_n: int
    bar: Any
    phases: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "features": 0.0})
    seconds: list[float] = field(default_factory=list)
    first: Tensor | None = None
    images: list[Tensor] = field(default_factory=list)
    first_features: list[Tensor] = field(default_factory=list)
    preview: list[Tensor] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.noise = NamedNoise(self.seed)
        self.sha256 = hashlib.sha256()

    def __call__(self, indices: Tensor) -> None:
        indices = indices.to(self.device)
        x_T = self.noise.initial(indices, torch.empty(len(indices), *self.shape, device=self.device))
        x_0, seconds = timed(
            lambda: self.sampler.sample(self.network, x_T, indices=indices, noise=self.noise), self.device
        )
        start = time.perf_counter()
        images = finite_uint8(x_0, self.sampler)
        features = self.features(images)
        self.distance.update(features, indices)
        synchronize(self.device)
        self.phases["sampling"] += seconds
        self.phases["features"] += time.perf_counter() - start
        if len(indices) == self.batch_size:
            self.seconds.append(seconds)
        if self.first is None:
            self.first = x_0[:COMPARED].cpu()
        on_cpu = images.cpu()
        self.sha256.update(on_cpu.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        if self.count < PREVIEW:
            self.preview.append(on_cpu[: PREVIEW - self.count])
        if self.count < self.equal_n:
            self.first_features.append(features[: self.equal_n - self.count].cpu())
        if self.keep_images:
            self.images.append(on_cpu)
        self.count += len(images)
        self.bar.update(len(images))


def sample_uint8(
    sampler: Walk,
    network: nn.Module,
    indices: Tensor,
    shape: tuple[int, int, int],
    noise: NamedNoise,
    device: torch.device,
) -> Tensor:
    """The named samples as uint8 [B, C, H, W] on the device."""
    indices = indices.to(device)
    x_T = noise.initial(indices, torch.empty(len(indices), *shape, device=device))
    return finite_uint8(sampler.sample(network, x_T, indices=indices, noise=noise), sampler)


def finite_uint8(x_0: Tensor, sampler: Walk) -> Tensor:
    """`to_uint8`; ValueError names the sampler where the images are not finite."""
    try:
        return to_uint8(x_0)
    except ValueError as error:
        raise ValueError(f"{error}: {sampler} diverged on this model") from None


def identity(job: Job) -> dict[str, Any]:
    """What of the task's settings names a cell: those of the metrics, with the digests of what they compare with."""
    metrics, images = job.config.metrics, job.data.split(job.config.metrics.reference)
    return {
        **metrics.model_dump(exclude={"features", "reference"}),
        "features": job.features.digest,
        "reference": reference_key(job.features, job.data, metrics.reference, len(images)),
    }


def measure(job: Job, folder: Path, walk: Walk | None = None) -> Measured:
    """Sample, score, time and repeat one cell; writes preview.png (and samples.npz) into `folder`.

    Args:
        job: the cell.
        folder: the cell's folder.
        walk: what samples, if not the job's sampler.
    """
    # Lightning and torchmetrics, seconds to import: only where something is sampled.
    from ddim_lab.evaluation import run_over_samples
    from ddim_lab.metrics.frechet import FrechetDistance

    config, data, model, features, store = job.config, job.data, job.model, job.features, job.store
    runtime, sampler = job.runtime, job.sampler if walk is None else walk
    device = runtime.torch_device
    phases: dict[str, float] = {}
    clock = time.perf_counter()
    reference, _ = reference_sums(features, data, config.metrics.reference, None, store)
    equal_n = min(config.num_samples, len(data.held_out)) if config.metrics.reference == "train" else 0
    held_out = reference_sums(features, data, "held_out", equal_n, store)[0] if equal_n >= 2 else None
    phases["references"] = time.perf_counter() - clock
    # One process samples on a device at a time, so that the times are of this sampler alone.
    alone = store.lock(f"timed-{runtime.device.replace(':', '-')}", waiting_for=f"images on {runtime.device}")
    with runtime.applied(), alone, store.presence(runtime.device) as others_busy:
        busy = others_busy()
        network = runtime.wrap(model.load().to(device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with tqdm(total=config.num_samples, desc=job.progress, unit="image", disable=None, leave=False) as bar:
            generation = _Generation(
                sampler=sampler,
                network=network,
                features=features.load().to(device),
                distance=FrechetDistance(reference).to(device),
                shape=data.shape,
                seed=config.seed,
                batch_size=min(config.batch_size, config.num_samples),
                device=device,
                keep_images=config.save_samples or config.num_samples <= NEAREST_AT_MOST,
                equal_n=equal_n,
                bar=bar,
            )
            clock = time.perf_counter()
            run_over_samples(generation, network, job.sampler.schedule, runtime, config.num_samples, config.batch_size)
            loop = time.perf_counter() - clock
        network.to(device)  # where Lightning's teardown took it from
        phases |= generation.phases
        phases["loop"] = loop - sum(generation.phases.values())
        if generation.count != config.num_samples:
            raise RuntimeError(f"{config.num_samples} samples were asked for, {generation.count} were made")
        clock = time.perf_counter()
        with torch.inference_mode():
            speed = _speed(config, generation)
            determinism = _determinism(config, generation)
        speed["contended"] = busy or others_busy()
        phases["speed_and_determinism"] = time.perf_counter() - clock
    clock = time.perf_counter()
    quality = _quality(config, data, features, generation, reference, held_out)
    preview(folder, from_uint8(torch.cat(generation.preview)))
    if config.save_samples:
        write_samples(folder / "samples.npz", torch.cat(generation.images))
    phases["metrics"] = time.perf_counter() - clock
    error = "" if quality["fd_se"] is None else f" ± {quality['fd_se']:.2g}"
    headline = f"{quality['name']} {quality['fd']:.4g}{error}, {speed['images_per_second']:,.0f} images/s"
    measurements = {"nfe": sampler.nfe, "headline": headline, "quality": quality}
    return Measured({**measurements, "speed": speed, "determinism": determinism}, phases)


def resample(job: Job, folder: Path, cell: Path) -> None:
    """Add samples.npz to a copy of a finished cell: its images are made again and must be the same.

    Raises:
        RuntimeError: their SHA-256 is not the one that the cell holds.
    """
    config, data, model, runtime, sampler = job.config, job.data, job.model, job.runtime, job.sampler
    expected = read_json(cell / "result.json")["measurements"]["determinism"]["sha256"]
    device = runtime.torch_device
    noise = NamedNoise(config.seed)
    batches = []
    with runtime.applied(), tqdm(total=config.num_samples, desc=job.progress, unit="image", disable=None) as bar:
        network = runtime.wrap(model.load().to(device))
        for indices in torch.split(torch.arange(config.num_samples), config.batch_size):
            batches.append(sample_uint8(sampler, network, indices, data.shape, noise, device).cpu())
            bar.update(len(indices))
    images = torch.cat(batches)
    found = hashlib.sha256(_nhwc(images).tobytes()).hexdigest()
    if found != expected:
        raise RuntimeError(
            f"sampling again gave other images (SHA-256 {found[:12]}, the cell holds {expected[:12]}): "
            "this machine does not reproduce the cell; force=true replaces it"
        )
    for file in cell.iterdir():
        if file.name != "MANIFEST.json":
            (folder / file.name).write_bytes(file.read_bytes())
    write_samples(folder / "samples.npz", images)


def write_samples(path: Path, images: Tensor) -> None:
    """samples.npz as the field's evaluators read it: arr_0, uint8, [N, H, W, C]."""
    np.savez(path, arr_0=_nhwc(images))


def _nhwc(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _speed(config: Config, generation: _Generation) -> dict[str, Any]:
    """Wall-clock time of a full batch: the cell's own batches after the first, which warms up, and more if too few."""
    count, device, sampler = generation.batch_size, generation.device, generation.sampler
    indices = torch.arange(count, device=device)
    x_T = generation.noise.initial(indices, torch.empty(count, *generation.shape, device=device))
    seconds = generation.seconds[1:]
    while len(seconds) < config.metrics.speed_repeats:
        again = timed(lambda: sampler.sample(generation.network, x_T, indices=indices, noise=generation.noise), device)
        seconds.append(again[1])

    # Forwards alone, a tenth of the walk's in a row as in the loop, three times: enough for their share of it.
    some = sampler.transitions[:: min(10, sampler.nfe)]

    def forwards() -> None:
        for transition in some:
            generation.network(x_T, torch.full((count,), transition.t, dtype=torch.int64, device=device))

    alone = float(np.median([timed(forwards, device)[1] for _ in range(3)])) / len(some)
    first, median, third = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
    return {
        "images": count,
        "repeats": len(seconds),
        "seconds": seconds,
        "seconds_median": median,
        "seconds_q1": first,
        "seconds_q3": third,
        "images_per_second": count / median,
        "seconds_per_image": median / count,
        "forward_share": alone * sampler.nfe / median,
        "warmup_seconds": generation.seconds[0],
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _determinism(config: Config, generation: _Generation) -> dict[str, Any]:
    """The first samples again, in a batch of their own: twice the same, once more with each other seed of the noise."""
    assert generation.first is not None
    count, device = len(generation.first), generation.device
    indices = torch.arange(count, device=device)
    x_T = generation.noise.initial(indices, torch.empty(count, *generation.shape, device=device))

    def run(seed: int) -> Tensor:
        return generation.sampler.sample(generation.network, x_T, indices=indices, noise=NamedNoise(seed)).cpu()

    one, same = run(config.seed), run(config.seed)
    others = [run(config.seed + k) for k in range(1, config.metrics.noise_seeds)]
    return {
        "images": count,
        "repeat_max_abs_diff": max_abs_diff([one, same]),
        "repeat_identical": torch.equal(one, same),
        "batch_max_abs_diff": max_abs_diff([generation.first, one]),
        "batch_sizes": [generation.batch_size, count],
        "noise_seeds": config.metrics.noise_seeds,
        "noise_images": count,
        "noise_variance": noise_variance([one, *others]),
        "sha256": generation.sha256.hexdigest(),
    }


def _quality(
    config: Config,
    data: ImageData,
    features: Features,
    generation: _Generation,
    reference: FeatureSums,
    held_out: FeatureSums | None,
) -> dict[str, Any]:
    from ddim_lab.metrics.frechet import FrechetDistance

    distance = generation.distance
    replicates = distance.leave_one_out()
    equal = None
    if held_out is not None:
        first = torch.cat(generation.first_features)
        some = FrechetDistance(reference)
        some.update(first, torch.arange(len(first)))
        real = FrechetDistance.between(reference, held_out)
        equal = {"num_samples": len(first), "fd_samples": float(some.compute()), "fd_held_out": real}
    nearest = None
    if generation.images and isinstance(data.train, MemoryImages) and isinstance(data.held_out, MemoryImages):
        at_most = min(NEAREST_AT_MOST, NEAREST_WORK // data.train.images.numel())
        images = from_uint8(torch.cat(generation.images)[:at_most])
        train, unseen = from_uint8(data.train.images), from_uint8(data.held_out.images[:at_most])
        nearest = {
            "samples_to_train": median_nearest_distance(images, train),
            "samples_to_held_out": median_nearest_distance(images, unseen),
            "held_out_to_train": median_nearest_distance(unseen, train),
        }
    return {
        "fd": float(distance.compute()),
        "fd_se": jackknife_se(replicates) if len(replicates) > 1 else None,
        "name": features.name,
        "features": features.digest,
        "reference": f"{data.name} {config.metrics.reference}, n={reference.count}",
        "num_samples": distance.num_samples,
        "leave_one_out": replicates,
        "equal_n": equal,
        "nearest": nearest,
    }
