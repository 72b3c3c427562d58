"""N images of a cell: sampled batch by batch, on one device or several, and measured: quality, speed, determinism."""

from __future__ import annotations

import contextlib
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim_lab.config.job import Config
from ddim_lab.data.base import load_data
from ddim_lab.data.images import from_uint8, to_uint8
from ddim_lab.device.memory import Halving
from ddim_lab.device.ranks import on_ranks
from ddim_lab.device.runtime import Runtime
from ddim_lab.metrics.determinism import ImagesHash, max_abs_diff, nhwc, noise_variance
from ddim_lab.metrics.extractor import Extractor
from ddim_lab.metrics.references import obtain_level, obtain_reference, read_moments
from ddim_lab.metrics.speed import Contention, PeakMemory, larger, timed
from ddim_lab.models.obtain import obtain_model
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.store import Store, read_json
from ddim_lab.store.chunks import Batch, SampleChunks
from ddim_lab.tasks.base import Job, Outcome
from ddim_lab.tasks.pictures import PREVIEW, preview
from ddim_lab.tasks.scored import COMPARED, FORWARDS_ALONE
from ddim_lab.tasks.walks import batches, check_finite, mean_and_se, network_in_place

if TYPE_CHECKING:
    from ddim_lab.metrics.quality import Quality

__all__ = ["measure_samples", "resample", "sample_uint8"]


@final
@dataclass
class _Maker:
    """Makes batch after batch under Lightning's test loop, and hands each to the chunks."""

    sampler: Sampler
    network: Halving
    features: Extractor
    chunks: SampleChunks
    shape: tuple[int, int, int]
    noise: NamedNoise
    device: torch.device
    meanwhile: Contention
    bar: Any
    warm: bool = False
    peak_memory: int | None = None
    phases: dict[str, float] = field(default_factory=lambda: {"sampling": 0.0, "features": 0.0})

    def start(self, indices: Tensor) -> Tensor:
        """x_T of the samples."""
        return self.noise.initial(indices, torch.empty(len(indices), *self.shape, device=self.device))

    def forwards(self, x_T: Tensor) -> float:
        """Seconds of the walk's forwards without the walk, from a few of them timed in a row."""
        some = self.sampler.transitions[:: min(FORWARDS_ALONE, self.sampler.nfe)]

        def run() -> None:
            for transition in some:
                t = torch.full((len(x_T),), transition.t, dtype=torch.int64, device=self.device)
                self.network(x_T, t)

        return timed(run, self.device)[1] / len(some) * self.sampler.nfe

    def __call__(self, indices: Tensor) -> None:
        first = int(indices[0])
        indices = indices.to(self.device)
        x_T = self.start(indices)

        def walk(model: EpsModel) -> Tensor:
            return self.sampler.sample(model, x_T, indices=indices, noise=self.noise)

        self.meanwhile.begin()
        with PeakMemory(self.device) as peak:
            x_0, sampling = timed(lambda: walk(self.network), self.device)
        forwards = self.forwards(x_T)

        def extract() -> tuple[Tensor, Tensor]:
            check_finite(x_0, walk, self.network, self.sampler)
            images = to_uint8(x_0)
            return images, self.features(images)

        (images, features), extracting = timed(extract, self.device)
        tensors = {"features": features.cpu()} | ({"x_0": x_0[:COMPARED].cpu()} if first == 0 else {})
        seconds = {"sampling": sampling, "features": extracting, "forwards": forwards}
        self.chunks.add(Batch(first, images.cpu(), tensors, seconds, self.warm, self.meanwhile.look()))
        self.warm = True
        self.peak_memory = larger(self.peak_memory, peak.nbytes)
        for name in self.phases:
            self.phases[name] += seconds[name]
        self.bar.update(len(images))


class _Timed(NamedTuple):
    """Seconds of one batch's walk, and of its forwards alone, timed right after it."""

    walk: float
    forwards: float


@final
class _Samples:
    """What the measurements need of all samples, in one reading of the chunks; not the images of large N.

    Args:
        chunks: all of the cell.
        quality: is given the features and images.
    """

    def __init__(self, chunks: SampleChunks, quality: Quality) -> None:
        self.full_batches: list[_Timed] = []
        self.contended = False
        sha256 = ImagesHash()
        images = []
        count = 0
        for batch in chunks:
            if count == 0:
                self.size, self.warmup_seconds = len(batch), batch.seconds["sampling"]
                self.first = batch.tensors["x_0"]
            quality.update(batch.tensors["features"], count, batch.images)
            sha256.update(batch.images)
            if count < PREVIEW:
                images.append(batch.images[: PREVIEW - count])
            if batch.warm and len(batch) == self.size:
                self.full_batches.append(_Timed(batch.seconds["sampling"], batch.seconds["forwards"]))
            self.contended |= batch.contended
            count += len(batch)
        self.sha256 = sha256.hexdigest()
        self.images = torch.cat(images)


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
        NonFiniteError: as `check_finite`.
    """
    indices = indices.to(device)
    x_T = noise.initial(indices, torch.empty(len(indices), *shape, device=device))

    def walk(model: EpsModel) -> Tensor:
        return sampler.sample(model, x_T, indices=indices, noise=noise)

    x_0 = walk(network)
    check_finite(x_0, walk, network, sampler)
    return to_uint8(x_0)


def measure_samples(job: Job, folder: Path, work: Path, sampler: Sampler | None = None) -> Outcome:
    """Sample, score, time and repeat one cell; writes preview.png (and samples.npz) into `folder`.

    Args:
        job: the cell.
        folder: the cell's folder.
        work: durable folder of the unfinished cell: the samples that are there are not made again.
        sampler: what samples, if not the job's own.
    """
    # Lightning and torchmetrics, seconds to import: only where something is sampled.
    from ddim_lab.metrics.quality import Quality
    from ddim_lab.tasks.evaluation import run_over_batches

    config, data, features, store = job.config, job.data, job.features, job.store
    runtime, metrics = job.runtime, job.config.metrics
    sampler = job.sampler if sampler is None else sampler
    device = runtime.torch_device
    phases: dict[str, float] = {}
    clock = time.perf_counter()
    if metrics.reference_statistics is None:
        keep = metrics.needs_vectors
        reference = obtain_reference(features, data, metrics.reference, store, keep_features=keep, device=device)
    else:
        reference = read_moments(Path(metrics.reference_statistics), features)
    held_out = None
    if metrics.reference == "train":
        held_out = obtain_level(reference, features, data, store, count=config.num_samples, device=device)
    phases["references"] = time.perf_counter() - clock
    chunks = SampleChunks(work, config.num_samples, config.batch_size, config.checkpoint_seconds)
    missing = chunks.missing()
    if missing and config.sampling_devices > 1:
        clock = time.perf_counter()
        _sample_on_ranks(job, work, missing, sampler)
        phases["ranks"] = time.perf_counter() - clock
        chunks = SampleChunks(work, config.num_samples, config.batch_size, config.checkpoint_seconds)
        missing = chunks.missing()
    with runtime.applied(), job.alone("images"), store.presence(runtime.hardware) as others_busy:
        network = Halving(job.network(min(config.batch_size, config.num_samples)))
        meanwhile = Contention(others_busy, runtime.cpu_threads)
        there = config.num_samples - sum(map(len, missing))
        with tqdm(
            total=config.num_samples, initial=there, desc=job.progress, unit="image", disable=None, leave=False
        ) as bar:
            maker = _maker(job, sampler, network, chunks, meanwhile, bar)
            clock = time.perf_counter()
            if missing:
                run_over_batches(maker, network, job.sampler.schedule, runtime, missing)
                chunks.flush()
            loop = time.perf_counter() - clock - sum(maker.phases.values())
        network.to(device)  # where Lightning's teardown took it from
        clock = time.perf_counter()
        measured = Quality(
            metrics, features, maker.features, reference, config.num_samples, work, store, held_out, device, data
        )
        samples = _Samples(chunks, measured)
        read = time.perf_counter() - clock
        phases |= {**maker.phases, "loop": loop}  # of this process, now: what others made is in "ranks", or was before
        clock = time.perf_counter()
        with torch.inference_mode():
            speed = _speed(config, maker, samples)
            determinism = _determinism(config, maker, samples)
        phases["speed_and_determinism"] = time.perf_counter() - clock
    clock = time.perf_counter()
    quality = measured.compute()
    preview(folder, from_uint8(samples.images))
    if config.save_samples:
        write_samples(folder / "samples.npz", config.num_samples, (batch.images for batch in chunks))
    phases["metrics"] = time.perf_counter() - clock + read
    error = "" if quality["fd_se"] is None else f" ± {quality['fd_se']:.2g}"
    headline = f"{quality['name']} {quality['fd']:.4g}{error}, {speed['images_per_second']:,.0f} images/s"
    measurements = {"nfe": sampler.nfe, "headline": headline, "quality": quality}
    return Outcome({**measurements, "speed": speed, "determinism": determinism}, phases)


def _maker(
    job: Job, sampler: Sampler, network: Halving, chunks: SampleChunks, meanwhile: Contention, bar: Any
) -> _Maker:
    device = job.runtime.torch_device
    return _Maker(
        sampler=sampler,
        network=network,
        features=job.features.load().to(device),
        chunks=chunks,
        shape=job.data.shape,
        noise=job.runtime.noise(job.config.seed),
        device=device,
        meanwhile=meanwhile,
        bar=bar,
    )


# -- a cell on several devices: each makes a share of the batches, and writes the chunks of its own -----


def _sample_on_ranks(job: Job, work: Path, missing: Sequence[range], sampler: Sampler) -> None:
    """Make the missing batches in as many processes as `sampling_devices`, each a run of whole batches of its own."""
    count = job.config.sampling_devices
    shares = [missing[len(missing) * rank // count : len(missing) * (rank + 1) // count] for rank in range(count)]
    on_gpus = job.runtime.torch_device.type == "cuda"
    devices = [f"cuda:{rank}" if on_gpus else job.runtime.device for rank in range(count)]
    with contextlib.nullcontext() if on_gpus else job.alone("images"):  # ranks on GPUs lock each its own
        on_ranks(count, _sample_share, job.config.model_dump(mode="json"), devices, work, shares, sampler)


def _sample_share(
    rank: int, values: dict[str, Any], devices: list[str], work: Path, shares: list[list[range]], sampler: Sampler
) -> None:
    """One of several processes that sample together."""
    from ddim_lab.tasks.evaluation import run_over_batches

    config = Config.model_validate(values)
    runtime = Runtime.resolve(config.runtime.model_copy(update={"device": devices[rank]}))
    data, store = load_data(config.data), Store(Path(config.outputs_dir))
    model = obtain_model(config, data, runtime, store, contextlib.nullcontext)  # it is there: the first process has it
    job = Job(config, data, model, runtime, store, f"rank {rank}")
    if not shares[rank]:
        return
    chunks = SampleChunks(work, config.num_samples, config.batch_size, config.checkpoint_seconds)
    alone = job.alone("images") if runtime.torch_device.type == "cuda" else contextlib.nullcontext()
    with runtime.applied(), alone, store.presence(runtime.hardware) as others_busy:
        network = Halving(job.network(min(config.batch_size, config.num_samples)))
        with tqdm(total=sum(map(len, shares[rank])), desc=job.progress, unit="image", disable=None, leave=False) as bar:
            maker = _maker(job, sampler, network, chunks, Contention(others_busy, runtime.cpu_threads), bar)
            run_over_batches(maker, network, job.sampler.schedule, runtime, shares[rank])
            chunks.flush()


def resample(job: Job, cell: Path) -> Path:
    """A finished cell with samples.npz added, in its place: its images are made again and must be the same."""
    folder, _ = job.store.obtain("cells", cell.name, lambda fresh: _resample(job, fresh, cell), replace=True)
    return folder


def _resample(job: Job, folder: Path, cell: Path) -> None:
    """Write samples.npz into `folder`, and copy the rest of the cell.

    Raises:
        RuntimeError: their SHA-256 is not the one that the cell holds.
    """
    config, runtime, sampler = job.config, job.runtime, job.sampler
    expected = read_json(cell / "result.json")["measurements"]["determinism"]["sha256"]
    noise = runtime.noise(config.seed)
    sha256 = ImagesHash()

    def again() -> Iterator[Tensor]:
        with network_in_place(job) as network:
            for indices in batches(job, config.num_samples):
                images = sample_uint8(sampler, network, indices, job.data.shape, noise, runtime.torch_device).cpu()
                sha256.update(images)
                yield images

    write_samples(folder / "samples.npz", config.num_samples, again())
    if sha256.hexdigest() != expected:
        raise RuntimeError(
            f"sampling again gave other images (SHA-256 {sha256.hexdigest()[:12]}, the cell holds {expected[:12]}): "
            "this machine does not reproduce the cell; force=true replaces it"
        )
    for file in cell.iterdir():
        if file.name != "MANIFEST.json":
            (folder / file.name).write_bytes(file.read_bytes())


def write_samples(path: Path, count: int, batches: Iterable[Tensor]) -> None:
    """samples.npz as the field's evaluators read it: arr_0, uint8, [N, H, W, C]; one batch in memory at a time.

    Args:
        path: where.
        count: N.
        batches: uint8 [B, C, H, W], N images together.
    """
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        for number, images in enumerate(map(nhwc, batches)):
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(images.tobytes())


def _speed(config: Config, maker: _Maker, samples: _Samples) -> dict[str, Any]:
    """Wall-clock time of a full batch: the cell's own batches after a warm-up, and more of them if they are too few.

    The forwards' share is the median over batches of their own time by the walk's, taken one after the other.
    """
    count, device, sampler = samples.size, maker.device, maker.sampler
    indices = torch.arange(count, device=device)
    x_T = maker.start(indices)
    contended = samples.contended

    def again() -> _Timed:
        with PeakMemory(device) as peak:
            _, walk = timed(lambda: sampler.sample(maker.network, x_T, indices=indices, noise=maker.noise), device)
        maker.peak_memory = larger(maker.peak_memory, peak.nbytes)
        return _Timed(walk, maker.forwards(x_T))

    # One forward first: a network that was recorded has been moved since, and is recorded again.
    with PeakMemory(device) as peak:
        maker.network(x_T, torch.zeros(count, dtype=torch.int64, device=device))
    maker.peak_memory = larger(maker.peak_memory, peak.nbytes)
    batches = list(samples.full_batches)
    if len(batches) < config.metrics.speed_repeats and not maker.warm:
        again()
    while len(batches) < config.metrics.speed_repeats:
        maker.meanwhile.begin()
        batches.append(again())
        contended |= maker.meanwhile.look()
    seconds = [batch.walk for batch in batches]
    first, median, third = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
    return {
        "images": count,
        "forward_images": maker.network.at_once(count),
        "repeats": len(seconds),
        "seconds": seconds,
        "seconds_median": median,
        "seconds_q1": first,
        "seconds_q3": third,
        "images_per_second": count / median,
        "seconds_per_image": median / count,
        "forward_share": float(np.median([batch.forwards / batch.walk for batch in batches])),
        "warmup_seconds": samples.warmup_seconds,
        "peak_memory_bytes": maker.peak_memory,
        "contended": contended,
    }


def _determinism(config: Config, maker: _Maker, samples: _Samples) -> dict[str, Any]:
    """The first samples again, in a batch of their own: twice the same, once more with each other seed of the noise.

    Where the cell's batches are no larger than that, two batch sizes are compared on half of them; None of one image.
    """
    count = len(samples.first)

    def run(seed: int, count: int = count) -> Tensor:
        indices = torch.arange(count, device=maker.device)
        noise = NamedNoise(seed, compiled=maker.noise.compiled)
        return maker.sampler.sample(maker.network, maker.start(indices), indices=indices, noise=noise).cpu()

    one, same = run(config.seed), run(config.seed)
    split = count if count < samples.size else count // 2
    part = one if split == count else run(config.seed, split) if split else None
    others = [run(config.seed + k) for k in range(1, config.metrics.noise_seeds)]
    variance, variance_se = mean_and_se(noise_variance([one, *others]))
    return {
        "images": count,
        "repeat_max_abs_diff": max_abs_diff([one, same]),
        "repeat_identical": torch.equal(one, same),
        "batch_max_abs_diff": None if part is None else max_abs_diff([samples.first[:split], part]),
        "batch_sizes": None if part is None else [samples.size, split],
        "noise_seeds": config.metrics.noise_seeds,
        "noise_images": count,
        "noise_variance": variance,
        "noise_variance_se": variance_se,
        "sha256": samples.sha256,
    }
