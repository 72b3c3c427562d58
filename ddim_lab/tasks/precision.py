"""Task `precision`: what a runtime changes in the images, beside fp32 on deterministic kernels from the same x_T."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.data import to_uint8
from ddim_lab.metrics.estimates import jackknife_se, paired_se
from ddim_lab.metrics.references import obtain_reference, reference_of
from ddim_lab.metrics.speed import timed
from ddim_lab.store import content_key
from ddim_lab.tasks.job import Job, Measured
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.sampling import (
    batches,
    finite,
    mean_and_se,
    network_in_place,
    squared_error,
    start,
    states_identity,
)

__all__ = ["identity", "measure"]

REFERENCE_VERSION: Final = 1
SHOWN: Final = 12


def identity(job: Job) -> dict[str, Any]:
    """The images that are compared with, and what distances are taken of."""
    return {
        "yardstick": content_key(_yardstick(job)),
        "features": job.features.digest,
        "reference": reference_of(job.config.metrics, job.features, job.data),
    }


def measure(job: Job, folder: Path, work: Path) -> Measured:
    """Sample under both runtimes, and compare; writes preview.png and against_fp32.png into `folder`."""
    from ddim_lab.metrics.frechet import FrechetDistance

    clock = time.perf_counter()
    plain, plain_seconds = _of_yardstick(job)
    referred = time.perf_counter()
    same = job.runtime.recipe() == job.runtime.yardstick().recipe()
    images, seconds = (plain, plain_seconds) if same else _sampled(job)
    sampled = time.perf_counter()
    reference = obtain_reference(job.features, job.data, job.config.metrics.reference, job.store).moments
    features = job.features.load()
    distances = []
    for states in (plain, images):
        distance = FrechetDistance(reference)
        with torch.inference_mode():
            for indices in torch.split(torch.arange(len(states)), 512):
                distance.update(features(to_uint8(states[indices])), indices)
        distances.append(distance)
    fp32, own = (float(distance.compute()) for distance in distances)
    left_out = [distance.leave_one_out() for distance in distances]
    change, change_se = own - fp32, paired_se(*left_out)
    mse, mse_se = mean_and_se(squared_error(images, plain))
    preview(folder, images)
    sheet(folder / "against_fp32.png", torch.stack([images[:SHOWN], plain[:SHOWN]]))
    speedup = plain_seconds / seconds
    return Measured(
        measurements={
            "nfe": job.sampler.nfe,
            "headline": f"FD {change / fp32:+.3%} ± {change_se / fp32:.3%} of fp32's {fp32:.4g}, MSE {mse:.2g},"
            f" {speedup:.2f} × as fast",
            "precision_fd_change": change,
            "precision_fd_change_se": change_se,
            "precision_fd_percent": 100.0 * change / fp32,
            "precision_fd_percent_se": 100.0 * change_se / fp32,
            "precision_fd_reference": fp32,
            "precision_fd_reference_se": jackknife_se(left_out[0]),
            "precision_max_abs_diff": float((images - plain).abs().max()),
            "precision_mse": mse,
            "precision_mse_se": mse_se,
            "precision_mean_diff": float((images - plain).double().mean()),
            "precision_speedup": speedup,
            "compared_images": len(images),
        },
        phases={
            "reference": referred - clock,
            "sampling": sampled - referred,
            "metrics": time.perf_counter() - sampled,
        },
        pictures=[
            {"title": "Each runtime over fp32 from the same x_T", "file": "against_fp32.png", "caption": ""},
        ],
    )


def _sampled(job: Job) -> tuple[Tensor, float]:
    """The job's x_0, float32 [N, C, H, W] on the CPU, and the median seconds of a full batch after the first."""
    parts, seconds = [], []
    noise, sampler, device = job.runtime.noise(job.config.seed), job.sampler, job.runtime.torch_device
    alone = job.store.lock(f"timed-{job.runtime.hardware}", waiting_for=f"times on {job.runtime.device}")
    with alone, network_in_place(job) as network:
        full = min(job.config.batch_size, job.config.num_samples)
        sampler.sample(network, start(job, torch.arange(full, device=device)), noise=noise)
        for indices in batches(job, job.config.num_samples):
            x_T = start(job, indices)
            x_0, spent = timed(lambda: sampler.sample(network, x_T, indices=indices, noise=noise), device)  # noqa: B023
            parts.append(x_0.cpu())
            if len(indices) == full:
                seconds.append(spent)
    return finite(torch.cat(parts), sampler), float(np.median(seconds))


def _yardstick(job: Job) -> dict[str, Any]:
    return {
        "kind": "yardstick",
        "version": REFERENCE_VERSION,
        **states_identity(job, job.sampler, job.runtime.yardstick()),
    }


def _of_yardstick(job: Job) -> tuple[Tensor, float]:
    """The fp32 images and the seconds of a batch: from the store, or sampled and kept there."""

    def build(folder: Path) -> None:
        images, seconds = _sampled(replace(job, runtime=job.runtime.yardstick()))
        np.savez(folder / "states.npz", states=images.numpy(), seconds=seconds)

    folder, _ = job.store.obtain("references", content_key(_yardstick(job)), build)
    with np.load(io.BytesIO((folder / "states.npz").read_bytes()), allow_pickle=False) as file:
        return torch.from_numpy(file["states"]), float(file["seconds"])
