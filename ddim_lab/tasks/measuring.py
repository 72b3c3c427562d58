"""N images of a cell, measured: quality, speed, determinism."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.console import Progress
from ddim_lab.data.images import from_uint8
from ddim_lab.metrics.base import in_short
from ddim_lab.metrics.determinism import ImagesHash, determinism_values, max_abs_diff, noise_variance
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.quality import Quality, Seen
from ddim_lab.metrics.references import Reference, obtain_held_out, obtain_reference, read_moments
from ddim_lab.metrics.speed import speed_values
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.store.chunks import SampleChunks, kept
from ddim_lab.tasks.base import Job, Outcome
from ddim_lab.tasks.pictures import PREVIEW, preview
from ddim_lab.tasks.samples_file import write_samples
from ddim_lab.tasks.sampling import Maker, chunks_of, maker_in_place, sample_on_ranks, samples_folder
from ddim_lab.tasks.scored import compared_samples
from ddim_lab.tasks.walks import mean_and_se

__all__ = ["measure_samples"]

COLD: Final = 3
"""First steps of a process's first walk, which choose algorithms, compile and record: they tell no speed."""


def measure_samples(job: Job, folder: Path, work: Path, sampler: Sampler | None = None) -> Outcome:
    """Sample, score, time and repeat one cell; writes preview.png (and samples.npz) into `folder`.

    Samples that are there, of this cell or of one with another N, other metrics or networks, are not made again.

    Args:
        job: the cell.
        folder: the cell's folder.
        work: folder for what takes room meanwhile.
        sampler: what samples, if not the job's own.
    """
    config = job.config
    sampler = job.sampler if sampler is None else sampler
    phases: dict[str, float] = {}
    clock = time.perf_counter()
    references = _references(job)
    phases["references"] = time.perf_counter() - clock
    with samples_folder(job, sampler) as place:
        chunks = chunks_of(job, place)
        there = config.num_samples - sum(map(len, chunks.missing()))
        if config.sampling_devices > 1 and chunks.missing():
            clock = time.perf_counter()
            sample_on_ranks(job, place, chunks.missing(), sampler)
            phases["ranks"] = time.perf_counter() - clock
            chunks = chunks_of(job, place)
        with maker_in_place(job, sampler, chunks) as maker:
            maker.make(chunks.missing(), config.num_samples)
            maker.see()
            phases |= maker.phases  # of this process, now: what others made is in "ranks", or was before
            clock = time.perf_counter()
            quality = _quality(job, maker, work, references)
            samples = _Samples(chunks, maker, quality)
            read = time.perf_counter() - clock
            clock = time.perf_counter()
            with torch.inference_mode():
                speed = _speed(config, maker, samples)
                determinism = _determinism(config, maker, samples, place)
            phases["speed_and_determinism"] = time.perf_counter() - clock
        clock = time.perf_counter()
        if config.save_samples:
            write_samples(folder / "samples.npz", config.num_samples, (batch.images for batch in chunks))
    by_network = quality.values()
    found = [value for values in by_network.values() for value in values]
    preview(folder, from_uint8(samples.images))
    phases["metrics"] = time.perf_counter() - clock + read
    leading = (next((v for v in values if v.heading and v.number is not None), None) for values in by_network.values())
    distances = ", ".join(in_short(value) for value in leading if value is not None)
    headline = f"{distances}, {speed['images_per_second']:,.0f} images/s"
    last = [value for value in found if value.section]
    first = [value for value in found if not value.section]
    values = [*first, *speed_values(speed), *determinism_values(determinism), *last]
    return Outcome(sampler.nfe, headline, values, phases, quality.tables(), images_there=there)


def _references(job: Job) -> list[tuple[Reference, Reference | None]]:
    """The real images that the samples are compared with, and the held-out ones, as each network sees them."""
    pairs = zip(job.config.metrics.networks, job.features, strict=True)
    return [_reference(job, network.name, features) for network, features in pairs]


def _reference(job: Job, network: str, features: Features) -> tuple[Reference, Reference | None]:
    """The real images that the samples are compared with, and the held-out ones beside training images."""
    config, data, device = job.config, job.data, job.runtime.torch_device
    metrics = config.metrics
    if metrics.reference_statistics is None:
        keep = metrics.needs_vectors(network)
        reference = obtain_reference(features, data, metrics.reference, job.store, keep_features=keep, device=device)
    else:
        reference = read_moments(Path(metrics.reference_statistics), features)
    if metrics.reference != "train":
        return reference, None
    return reference, obtain_held_out(features, data, job.store, count=config.num_samples, device=device)


def _quality(job: Job, maker: Maker, work: Path, references: Sequence[tuple[Reference, Reference | None]]) -> Quality:
    """The metrics of the job, for its samples."""
    metrics = job.config.metrics
    each = zip(metrics.networks, job.features, maker.networks, references, strict=True)
    seen = [Seen(options.name, features, network, *compared) for options, features, network, compared in each]
    return Quality(metrics, seen, job.config.num_samples, work, job.store, maker.device, job.data)


@final
class _Samples:
    """What the measurements need of all samples, in one reading of the chunks; not the images of large N.

    Args:
        chunks: all of the cell.
        maker: of the cell: its networks see images whose features are not kept.
        quality: is given features and images.

    Attributes:
        size: images of a full batch.
        first: x_0 of the samples that determinism is measured on.
        walks: seconds of each full batch whose process had made another before.
        shares: of each of these, what its forwards took.
        steps: seconds of warm steps and of their forwards, of all full batches.
        warmup_seconds: of the first batch.
        contended: whether other processes were busy meanwhile.
    """

    def __init__(self, chunks: SampleChunks, maker: Maker, quality: Quality) -> None:
        self.walks: list[float] = []
        self.shares: list[float] = []
        self.contended = False
        steps: list[Tensor] = []
        sha256 = ImagesHash()
        images = []
        count = 0
        for batch in chunks:
            if count == 0:
                self.size, self.warmup_seconds = len(batch), batch.seconds["sampling"]
                self.first = batch.tensors["x_0"][: compared_samples(maker.job.config)]
            quality.update(maker.features_of(batch), batch.images)
            sha256.update(batch.images)
            if count < PREVIEW:
                images.append(batch.images[: PREVIEW - count])
            if len(batch) == self.size and (taken := batch.tensors.get("steps")) is not None:
                taken = _by_step(taken, maker)
                steps.append(taken if batch.warm else taken[min(COLD, max(1, len(taken) - 1)) :])
                if batch.warm:
                    self.walks.append(batch.seconds["sampling"])
                    self.shares.append(float(taken[:, 1].sum()) / batch.seconds["sampling"])
            self.contended |= batch.contended
            count += len(batch)
        self.steps = torch.cat(steps) if steps else torch.empty(0, 2)
        self.sha256 = sha256.hexdigest()
        self.images = torch.cat(images)


def _by_step(forwards: Tensor, maker: Maker) -> Tensor:
    """`StepClock.steps` of a walk's forwards [F, 2], a row a step: with guidance two forwards together."""
    return forwards.reshape(-1, 2, 2).sum(1) if maker.sampler.guided else forwards


def _speed(config: Config, maker: Maker, samples: _Samples) -> dict[str, Any]:
    """Wall-clock time of a full batch, from the cell's own after a warm-up; from their steps, if they are too few.

    The forwards' share is what they took of the walks, or of the steps.
    """
    count, nfe, contended = samples.size, maker.sampler.nfe, samples.contended
    if maker.device.type == "cuda" and maker.peak_memory is None:  # every batch is another process's
        with maker.memory_seen():
            x_T = torch.zeros(count, *maker.job.data.shape, device=maker.device)
            labels = (
                None if maker.sampler.labels is None else torch.zeros(count, dtype=torch.int64, device=maker.device)
            )
            maker.sampler.predict_eps(maker.network, x_T, maker.sampler.transitions[0].t, labels)
    seconds, shares = samples.walks, samples.shares
    if of_steps := len(seconds) < config.metrics.speed_repeats:
        steps = samples.steps
        if len(steps) == 0:
            walk = maker.walk(torch.arange(count, device=maker.device), maker.noise)
            if not maker.warm:
                maker.time_walk(walk)
            maker.contention.begin()
            _, _, steps = maker.time_walk(walk)
            steps = _by_step(steps, maker)
            contended |= maker.contention.look()
        seconds = ((nfe // 2 if maker.sampler.guided else nfe) * steps[:, 0]).tolist()
        shares = [float(steps[:, 1].sum() / steps[:, 0].sum())]
    first, median, third = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
    return {
        "images": count,
        "forward_images": maker.network.at_once(count),
        "repeats": len(seconds),
        "of_steps": of_steps,
        "seconds_median": median,
        "seconds_q1": first,
        "seconds_q3": third,
        "images_per_second": count / median,
        "seconds_per_image": median / count,
        "forward_share": float(np.median(shares)),
        "warmup_seconds": samples.warmup_seconds,
        "peak_memory_bytes": maker.peak_memory,
        "contended": contended,
    }


def _determinism(config: Config, maker: Maker, samples: _Samples, place: Path) -> dict[str, Any]:
    """The first samples again, in a batch of their own: twice the same, once more with each other seed of the noise.

    Where the cell's batches are no larger than that, two batch sizes are compared on half of them; None of one image.
    Each walk is kept in `place`, the samples' folder, as soon as it is done, by what it is of: those of another N, of
    as many samples, are the same.
    """
    count = len(samples.first)
    walks = 1 + config.metrics.noise_seeds + (count == samples.size > 1)

    def run(seed: int = config.seed, count: int = count, times: int = 1) -> Tensor:
        """x_0 of so many walks in a row, by one process: [times, count, C, H, W]."""
        indices = torch.arange(count, device=maker.device)
        walk = maker.walk(indices, NamedNoise(seed, compiled=maker.noise.compiled))

        def walked() -> Tensor:
            return torch.stack([walk(maker.network).cpu() for _ in range(times)])

        x_0 = kept(place, f"walk_of_{count}_seed_{seed}_times_{times}", walked)
        progress.update(times)
        return x_0

    with Progress(f"{maker.job.progress} determinism", walks, "walk") as progress:
        one, same = run(times=2)
        split = count if count < samples.size else count // 2
        part = one if split == count else run(count=split)[0] if split else None
        others = [run(config.seed + k)[0] for k in range(1, config.metrics.noise_seeds)]
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
