"""Task `interpolate`: images between images, by slerp of their x_T at eta = 0 (paper, section 5.3, Figure 6 and D.5).

Three ways from one image to another are compared: slerp of the noises, lerp of the noises, and the plain cross-fade of
the two images, which is the straight line between them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ddim_lab.config import InterpolateConfig
from ddim_lab.data import from_uint8
from ddim_lab.interpolate import slerp_grid, slerp_line
from ddim_lab.metrics.statistics import median_nearest_distance
from ddim_lab.tasks.job import Job, Measured
from ddim_lab.tasks.pictures import sheet
from ddim_lab.tasks.sampling import batches, finite, network_in_place, start

__all__ = ["identity", "measure"]

SHOWN: Final = 8
"""Lines of the picture."""

NEAREST_AT_MOST: Final = 10_000
"""Midpoints and training images, at most, of the search for the nearest: it costs midpoints x images."""


def identity(job: Job) -> dict[str, Any]:
    """The training images that the midpoints are compared with."""
    return {"data": job.data.digest}


def measure(job: Job, folder: Path, work: Path) -> Measured:
    """Decode every line and the grid; writes lines.png and grid.png into `folder`."""
    task, sampler = job.config.task, job.sampler
    assert isinstance(task, InterpolateConfig)
    points = task.points
    clock = time.perf_counter()
    ways: dict[str, list[Tensor]] = {"slerp": [], "lerp": []}
    with network_in_place(job) as network:
        for indices in batches(job, job.config.num_samples // 2):
            a, b = start(job, 2 * indices), start(job, 2 * indices + 1)
            ways["slerp"].append(_decode(job, network, slerp_line(a, b, points)))
            ways["lerp"].append(_decode(job, network, torch.stack([a.lerp(b, w) for w in _weights(points)], dim=1)))
        grid = _decode(job, network, slerp_grid(start(job, torch.arange(4, device=a.device)), task.grid))
    lines = {name: finite(torch.cat(parts), sampler) for name, parts in ways.items()}
    first, last = lines["slerp"][:, 0], lines["slerp"][:, -1]
    lines["cross-fade"] = torch.stack([first.lerp(last, w) for w in _weights(points)], dim=1)
    seconds = time.perf_counter() - clock
    sheet(folder / "lines.png", lines["slerp"][:SHOWN])
    sheet(folder / "grid.png", grid)
    train = from_uint8(job.data.train.batch(torch.arange(min(len(job.data.train), NEAREST_AT_MOST))))
    paths = {name: path_lengths(line) for name, line in lines.items()}
    nearest = {
        name: median_nearest_distance(line[:, points // 2][:NEAREST_AT_MOST], train) for name, line in lines.items()
    }
    at_ends = median_nearest_distance(torch.cat([first, last])[:NEAREST_AT_MOST], train)
    length, largest = paths["slerp"]
    return Measured(
        measurements={
            "nfe": sampler.nfe,
            "headline": f"path {length:.3g} times the straight line, its largest step {largest:.2g} of it",
            "interpolation_path_length": length,
            "interpolation_largest_step": largest,
            "lerp_path_length": paths["lerp"][0],
            "lerp_largest_step": paths["lerp"][1],
            "midpoint_to_train": nearest["slerp"],
            "lerp_midpoint_to_train": nearest["lerp"],
            "crossfade_midpoint_to_train": nearest["cross-fade"],
            "ends_to_train": at_ends,
            "interpolation_lines": len(first),
            "interpolation_points": points,
        },
        phases={"sampling": seconds, "metrics": time.perf_counter() - clock - seconds},
        tables=[
            {
                "title": "Three ways between two images",
                "columns": ["way", "path length", "largest step", "midpoint to nearest training image"],
                "rows": [
                    *([name, *paths[name], nearest[name]] for name in lines),
                    ["the ends themselves", None, None, at_ends],
                ],
            }
        ],
        pictures=[
            {"title": "Lines between pairs of x_T (slerp)", "file": "lines.png", "caption": ""},
            {"title": "Grid between four x_T (slerp of slerps)", "file": "grid.png", "caption": ""},
        ],
    )


def path_lengths(lines: Tensor) -> tuple[float, float]:
    """Medians over lines of the path's length and of its largest step, both in units of the straight line's length.

    A straight, even path has length 1 and a largest step of 1 / (points - 1); a jump makes the largest step near 1.

    Args:
        lines: images [B, points, C, H, W].
    """
    images = lines.double().flatten(2)
    straight = (images[:, -1] - images[:, 0]).norm(dim=1)
    steps = images.diff(dim=1).norm(dim=2)
    return float((steps.sum(1) / straight).median()), float((steps.amax(1) / straight).median())


def _weights(points: int) -> list[float]:
    return [k / (points - 1) for k in range(points)]


def _decode(job: Job, network: nn.Module, x_T: Tensor) -> Tensor:
    """Images of noises [A, B, C, H, W], in batches of `batch_size`; on the CPU."""
    flat = x_T.flatten(0, 1)
    parts = [job.sampler.sample(network, part).cpu() for part in torch.split(flat, job.config.batch_size)]
    return torch.cat(parts).reshape(x_T.shape)
