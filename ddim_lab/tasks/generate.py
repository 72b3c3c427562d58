"""Task `generate`: sample N images, and measure their quality, the sampler's speed and its determinism."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ddim_lab.config import Config
from ddim_lab.data import ImageData, from_uint8, to_uint8
from ddim_lab.metrics.determinism import max_abs_diff, noise_variance
from ddim_lab.metrics.estimates import jackknife_se
from ddim_lab.metrics.features import Features, reference_key
from ddim_lab.metrics.frechet import FeatureSums, FrechetDistance, median_nearest_distance
from ddim_lab.metrics.speed import peak_memory_bytes, synchronize, time_repeats
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.store import Store, read_json
from ddim_lab.tasks.job import Job, Measured

__all__ = ["identity", "measure", "resample"]

PREVIEW: Final = 12
"""Images of preview.png, one row; the same x_T in every cell of the same seed."""

TIMED_SHARE: Final = 0.1
"""Largest share of a cell's images that the timed repeats may sample again."""

COMPARED: Final = 64
"""Samples, at most, on which batch splits are compared."""

NEAREST_AT_MOST: Final = 10_000
"""Samples whose nearest neighbours are looked up: the search costs samples x images."""


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
    images = data.split(split).images[:count]  # type: ignore[arg-type]
    key = reference_key(features, data, split, len(images))

    def build(folder: Path) -> None:
        network = features.load()
        with torch.inference_mode():
            FeatureSums.of(network(part) for part in torch.split(images, 512)).save(folder / "statistics.npz")

    folder, _ = store.obtain("references", key, build)
    return FeatureSums.load(folder / "statistics.npz"), key


@final
@dataclass
class _Generation:
    """Samples batch after batch under Lightning's test loop; keeps what the metrics need, not the images of large N."""

    sampler: Sampler
    network: nn.Module
    features: nn.Module
    distance: FrechetDistance
    shape: tuple[int, int, int]
    seed: int
    device: torch.device
    keep_images: bool
    equal_n: int
    bar: Any
    phases: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "features": 0.0})
    images: list[Tensor] = field(default_factory=list)
    first_features: list[Tensor] = field(default_factory=list)
    preview: list[Tensor] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.noise = NamedNoise(self.seed)
        self.sha256 = hashlib.sha256()

    def __call__(self, indices: Tensor) -> None:
        synchronize(self.device)
        start = time.perf_counter()
        images = sample_uint8(self.sampler, self.network, indices, self.shape, self.noise, self.device)
        synchronize(self.device)
        sampled = time.perf_counter()
        features = self.features(images)
        self.distance.update(features, indices)
        synchronize(self.device)
        self.phases["sampling"] += sampled - start
        self.phases["features"] += time.perf_counter() - sampled
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
    sampler: Sampler,
    network: nn.Module,
    indices: Tensor,
    shape: tuple[int, int, int],
    noise: NamedNoise,
    device: torch.device,
) -> Tensor:
    """The named samples as uint8 [B, C, H, W] on the device.

    Raises:
        ValueError: the images are not finite; says so with the sampler.
    """
    indices = indices.to(device)
    x_T = noise.initial(indices, torch.empty(len(indices), *shape, device=device))
    x_0 = sampler.sample(network, x_T, indices=indices, noise=noise)
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


def measure(job: Job, folder: Path) -> Measured:
    """Sample, score, time and repeat one cell; writes preview.png (and samples.npz) into `folder`."""
    from ddim_lab.evaluation import run_over_samples  # Lightning, only where something is sampled

    config, data, model, features, store = job.config, job.data, job.model, job.features, job.store
    runtime, sampler = job.runtime, job.sampler
    device = runtime.torch_device
    phases: dict[str, float] = {}
    clock = time.perf_counter()
    reference, _ = reference_sums(features, data, config.metrics.reference, None, store)
    equal_n = min(config.num_samples, len(data.held_out)) if config.metrics.reference == "train" else 0
    held_out = reference_sums(features, data, "held_out", equal_n, store)[0] if equal_n >= 2 else None
    phases["references"] = time.perf_counter() - clock
    with runtime.applied(), store.presence(runtime.device) as others_busy:
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
                device=device,
                keep_images=config.save_samples or config.num_samples <= NEAREST_AT_MOST,
                equal_n=equal_n,
                bar=bar,
            )
            clock = time.perf_counter()
            run_over_samples(generation, network, sampler.schedule, runtime, config.num_samples, config.batch_size)
            loop = time.perf_counter() - clock
        phases |= generation.phases
        phases["loop"] = loop - sum(generation.phases.values())
        if generation.count != config.num_samples:
            raise RuntimeError(f"{config.num_samples} samples were asked for, {generation.count} were made")
        clock = time.perf_counter()
        with store.lock(f"timed-{runtime.device.replace(':', '-')}", waiting_for="its timings on this device"):
            probe = _probe(config, sampler, network, data.shape, device, others_busy)
        phases["speed_and_determinism"] = time.perf_counter() - clock
    clock = time.perf_counter()
    quality = _quality(config, data, features, generation, reference, held_out)
    _write_preview(folder / "preview.png", torch.cat(generation.preview))
    if config.save_samples:
        write_samples(folder / "samples.npz", torch.cat(generation.images))
    phases["metrics"] = time.perf_counter() - clock
    probe["determinism"]["sha256"] = generation.sha256.hexdigest()
    error = "" if quality["fd_se"] is None else f" ± {quality['fd_se']:.2g}"
    speed = probe["speed"]["images_per_second"]
    headline = f"{quality['name']} {quality['fd']:.4g}{error}, {speed:,.0f} images/s"
    return Measured({"nfe": sampler.nfe, "headline": headline, "quality": quality, **probe}, phases)


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


def _probe(
    config: Config,
    sampler: Sampler,
    network: nn.Module,
    shape: tuple[int, int, int],
    device: torch.device,
    others_busy: Callable[[], bool],
) -> dict[str, Any]:
    """Speed and determinism on the first samples, in one batch. The timed repeats are also the repeats compared."""
    repeats = config.metrics.speed_repeats
    count = _timed_batch(config)
    indices = torch.arange(count, device=device)
    x_T = NamedNoise(config.seed).initial(indices, torch.empty(count, *shape, device=device))

    def run(chosen: slice = slice(None), seed: int = config.seed) -> Tensor:
        return sampler.sample(network, x_T[chosen], indices=indices[chosen], noise=NamedNoise(seed))

    # Forwards alone, on the timesteps of the walk: a fifth of them is enough for their share of the loop.
    timesteps = [transition.t for transition in sampler.transitions][:: min(5, sampler.nfe)]

    def forwards() -> Tensor:
        for t in timesteps:
            output = network(x_T, torch.full((count,), t, dtype=torch.int64, device=device))
        return output if isinstance(output, Tensor) else output.sample

    with torch.inference_mode():
        busy = others_busy()
        clock = time.perf_counter()
        forwards()
        synchronize(device)
        warmup = time.perf_counter() - clock
        timing = time_repeats(run, repeats, device)
        alone = time_repeats(forwards, repeats, device)
        busy = busy or others_busy()
        half = min(count, COMPARED) // 2
        cut = max(1, round(half * 0.6))
        split = torch.cat([run(slice(0, cut)), run(slice(cut, half))]).cpu() if half >= 2 else None
        # Runs of one batch size, so that eta = 0 gives exactly 0 on any device.
        few = slice(0, min(count, 8))
        runs = [run(few, config.seed + k).cpu() for k in range(config.metrics.noise_seeds)]
    median = timing.quantile(0.5)
    difference = max_abs_diff(timing.outputs)
    return {
        "speed": {
            "images": count,
            "repeats": repeats,
            "seconds": list(timing.seconds),
            "seconds_median": median,
            "seconds_q1": timing.quantile(0.25),
            "seconds_q3": timing.quantile(0.75),
            "images_per_second": count / median,
            "seconds_per_image": median / count,
            "forward_share": alone.quantile(0.5) / len(timesteps) * sampler.nfe / median,
            "warmup_seconds": warmup,
            "peak_memory_bytes": peak_memory_bytes(device),
            "contended": busy,
        },
        "determinism": {
            "images": count,
            "repeat_max_abs_diff": difference,
            "repeat_identical": all(torch.equal(timing.outputs[0], other) for other in timing.outputs[1:]),
            "split_max_abs_diff": None if split is None else max_abs_diff([timing.outputs[0][:half], split]),
            "split_sizes": None if split is None else [cut, half - cut],
            "noise_seeds": config.metrics.noise_seeds,
            "noise_images": len(runs[0]),
            "noise_variance": noise_variance(runs),
        },
    }


def _timed_batch(config: Config) -> int:
    """Images in the timed batch: `batch_size`, halved until the repeats are a small share of the cell's own work."""
    count = min(config.num_samples, config.batch_size)
    while count > 8 and config.metrics.speed_repeats * count > TIMED_SHARE * config.num_samples:
        count //= 2
    return count


def _quality(
    config: Config,
    data: ImageData,
    features: Features,
    generation: _Generation,
    reference: FeatureSums,
    held_out: FeatureSums | None,
) -> dict[str, Any]:
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
    if generation.images:
        images = from_uint8(torch.cat(generation.images)[:NEAREST_AT_MOST])
        train, unseen = from_uint8(data.train.images), from_uint8(data.held_out.images)
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


def _write_preview(path: Path, images: Tensor) -> None:
    row = np.concatenate(list(_nhwc(images)), axis=1)
    Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(path)
