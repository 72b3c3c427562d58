"""Task `trajectory`: what a sample looks like on the way: x_t, and the x_0 predicted at each step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddim_lab.config import TrajectoryConfig
from ddim_lab.tasks.job import Job, Measured
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.sampling import batches, finite, network_in_place, squared_error, start

__all__ = ["identity", "measure"]

SHOWN: Final = 4
"""Samples of the picture, two rows each."""


def identity(job: Job) -> dict[str, Any]:
    """Nothing but the task's own settings."""
    return {}


def measure(job: Job, folder: Path, work: Path) -> Measured:
    """Sample, stopping at `task.columns` moments; writes preview.png and trajectory.png into `folder`."""
    task, sampler = job.config.task, job.sampler
    assert isinstance(task, TrajectoryConfig)
    moments = shown_moments(sampler.nfe, task.columns)
    timesteps = [transition.t for transition in sampler.transitions] + [sampler.transitions[-1].t_prev]
    noise = job.runtime.noise(job.config.seed)
    clock = time.perf_counter()
    parts: list[Tensor] = []  # [B, moments, 2, C, H, W]
    with network_in_place(job) as network:
        for indices in batches(job, job.config.num_samples):
            walk = sampler.moments(network, start(job, indices), indices=indices, noise=noise)
            # at the start nothing has been predicted: the first prediction stands there, for it is made from x_T
            kept, previous = [], None
            for position, moment in enumerate(walk):
                if previous is not None and position - 1 in moments:
                    kept.append(torch.stack([previous.x, _predicted(moment.x0)], dim=1))
                previous = moment
            assert previous is not None
            kept.append(torch.stack([previous.x, previous.x], dim=1))
            parts.append(torch.stack(kept, dim=1).cpu())
    states = finite(torch.cat(parts), sampler)
    seconds = time.perf_counter() - clock
    final = states[:, -1, 0]
    # as the pictures show them: the first predictions are divided by sqrt(ab) << 1 and leave the range of images
    images = states.clamp(-1.0, 1.0)
    errors = [float(squared_error(images[:, k, 1], images[:, -1, 0]).mean()) for k in range(len(moments))]
    preview(folder, final)
    strips = states[:SHOWN].transpose(1, 2).flatten(0, 1)  # [2 SHOWN, moments, C, H, W]: x_t over predicted x_0
    sheet(folder / "trajectory.png", strips)
    return Measured(
        measurements={
            "nfe": sampler.nfe,
            "headline": f"first predicted x_0 is {errors[0]:.3g} (MSE) from the image",
            "first_prediction_mse": errors[0],
            "halfway_prediction_mse": errors[len(errors) // 2],
        },
        phases={"sampling": seconds},
        tables=[
            {
                "title": "Predicted x_0 along the way",
                "columns": ["t", "MSE to the final image"],
                "rows": [
                    ["image" if timesteps[m] < 0 else timesteps[m], e] for m, e in zip(moments, errors, strict=True)
                ],
            }
        ],
        pictures=[
            {
                "title": "From noise to image: x_t over the x_0 predicted from it",
                "file": "trajectory.png",
                "caption": "t = " + ", ".join(str(timesteps[m]) for m in moments[:-1]) + ", then the image",
            }
        ],
    )


def shown_moments(nfe: int, columns: int) -> list[int]:
    """Positions on the walk (0: x_T, nfe: the image), evenly spread, both ends included, none twice."""
    count = min(columns, nfe + 1)
    return [round(k * nfe / (count - 1)) for k in range(count)]


def _predicted(x0: Tensor | None) -> Tensor:
    assert x0 is not None  # there after the first step
    return x0
