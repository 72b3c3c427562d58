"""Task `interpolate`: images between images, by slerp of their x_T at eta = 0 (paper, section 5.3, Figure 6 and D.5).

Three ways from one image to another are compared: slerp of the noises, lerp of the noises, and the plain cross-fade of
the two images, which is the straight line between them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, final

import torch
from pydantic import Field, StrictInt
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.data.images import from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.interpolate import slerp_grid, slerp_line
from ddim_lab.metrics.statistics import NEAREST_AT_MOST, median_nearest_distance
from ddim_lab.store.records import Pictured, Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task, need_determinism
from ddim_lab.tasks.pictures import sheet
from ddim_lab.tasks.walks import Batches, finite, network_in_place, start

__all__ = ["Interpolate"]

SHOWN: Final = 8
"""Lines of the picture."""


@final
class Interpolate(Task):
    """conf/task/interpolate: images between images (paper, Figure 6 and D.5)."""

    name: Literal["interpolate"]
    points: Annotated[StrictInt, Field(ge=3)]
    grid: Annotated[StrictInt, Field(ge=2)]

    def check(self, config: Config) -> None:
        need_determinism(config)
        if config.num_samples < 4:
            raise ConfigError(f"task=interpolate needs 4 samples for the corners of its grid, got {config.num_samples}")
        if self.points % 2 == 0:
            raise ConfigError(f"task.points={self.points} must be odd: a line's middle is one of its points")

    def forwards(self, config: Config) -> int:
        return (2 * (config.num_samples // 2) * self.points + self.grid**2) * config.forwards

    def identity(self, job: Job) -> dict[str, Any]:
        """The training images that the midpoints are compared with."""
        return {"data": job.data.digest}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Decode every line and the grid; writes lines.png and grid.png into `folder`."""
        sampler = job.sampler
        points = self.points
        clock = time.perf_counter()
        ways = {"slerp": _Way(), "lerp": _Way(), "cross-fade": _Way()}
        shown: list[Tensor] = []
        ends: list[Tensor] = []  # [2, B, C, H, W]
        with network_in_place(job) as network:
            for indices in Batches(job, job.config.num_samples // 2):
                a, b = start(job, 2 * indices), start(job, 2 * indices + 1)
                slerped = _decode(job, network, slerp_line(a, b, points))
                ways["slerp"].add(slerped)
                ways["lerp"].add(_decode(job, network, torch.stack([a.lerp(b, w) for w in _weights(points)], dim=1)))
                first, last = slerped[:, 0], slerped[:, -1]
                row = int(indices[0])
                shown.append(slerped[: max(SHOWN - row, 0)].clone())  # a slice would hold on to the whole batch
                ends.append(torch.stack([first, last])[:, : max(NEAREST_AT_MOST - row, 0)].clone())
                ways["cross-fade"].add(torch.stack([first.lerp(last, w) for w in _weights(points)], dim=1))
            grid = _decode(job, network, slerp_grid(start(job, torch.arange(4, device=a.device)), self.grid))
        seconds = time.perf_counter() - clock
        sheet(folder / "lines.png", torch.cat(shown))
        sheet(folder / "grid.png", grid)
        train = from_uint8(job.data.train.batch(torch.arange(min(len(job.data.train), NEAREST_AT_MOST))))
        paths = {name: way.path for name, way in ways.items()}
        nearest = {name: median_nearest_distance(torch.cat(way.midpoints), train) for name, way in ways.items()}
        at_ends = median_nearest_distance(torch.cat(ends, dim=1).flatten(0, 1)[:NEAREST_AT_MOST], train)
        length, largest = paths["slerp"]
        return Outcome(
            nfe=sampler.nfe,
            headline=f"path {length:.3g} times the straight line, its largest step {largest:.2g} of it",
            values=_values(paths, nearest, at_ends, ways["slerp"].count, points),
            phases={"sampling": seconds, "metrics": time.perf_counter() - clock - seconds},
            tables=[
                Tabled(
                    title="Three ways between two images",
                    columns=("way", "path length", "largest step", "midpoint to nearest training image"),
                    rows=(
                        *((name, *paths[name], nearest[name]) for name in ways),
                        ("the ends themselves", None, None, at_ends),
                    ),
                )
            ],
            pictures=[
                Pictured(title="Lines between pairs of x_T (slerp)", file="lines.png"),
                Pictured(title="Grid between four x_T (slerp of slerps)", file="grid.png"),
            ],
        )


def _values(
    paths: Mapping[str, tuple[float, float]], nearest: Mapping[str, float], at_ends: float, lines: int, points: int
) -> list[Value]:
    """Of slerp, with its neighbours' as levels."""
    length, largest = paths["slerp"]
    of: dict[str, Any] = {"count": lines, "counted": "lines"}
    return [
        Value(
            name="interpolation_path_length",
            value=length,
            heading="Path between images",
            facts="length in pixels of the path that slerp of x_T takes, as a multiple of the straight line; median"
            " over lines",
            level="lerp_path_length",
            level_says="By lerp of x_T",
            **of,
        ),
        Value(
            name="interpolation_largest_step",
            value=largest,
            heading="Largest step between neighbours",
            facts="of the path that slerp of x_T takes, as a share of the straight line between its ends; median over"
            " lines",
            level="lerp_largest_step",
            level_says="By lerp of x_T",
            **of,
        ),
        Value(
            name="midpoint_to_train",
            value=nearest["slerp"],
            heading="Distance of midpoints to the training images",
            facts="median Euclidean distance of a slerp's midpoint to its nearest training image, pixels in [−1, 1]",
            level="crossfade_midpoint_to_train",
            level_says="Of the cross-fade of the two end images",
            **of,
        ),
        Value(name="lerp_path_length", value=paths["lerp"][0]),
        Value(name="lerp_largest_step", value=paths["lerp"][1]),
        Value(name="lerp_midpoint_to_train", value=nearest["lerp"]),
        Value(name="crossfade_midpoint_to_train", value=nearest["cross-fade"]),
        Value(name="ends_to_train", value=at_ends),
        Value(name="interpolation_lines", value=lines),
        Value(name="interpolation_points", value=points),
    ]


@final
class _Way:
    """What is measured of one way's lines, batch by batch; the lines are not kept.

    Attributes:
        count: lines so far.
        midpoints: images of the first `NEAREST_AT_MOST` lines, in batches.
    """

    def __init__(self) -> None:
        self.count = 0
        self.midpoints: list[Tensor] = []
        self._lengths: list[Tensor] = []
        self._largest: list[Tensor] = []

    def add(self, lines: Tensor) -> None:
        """Take the next lines, images [B, points, C, H, W]."""
        length, largest = path_lengths(lines)
        self._lengths.append(length)
        self._largest.append(largest)
        self.midpoints.append(lines[: max(NEAREST_AT_MOST - self.count, 0), lines.shape[1] // 2].clone())
        self.count += len(lines)

    @property
    def path(self) -> tuple[float, float]:
        """Medians over lines of `path_lengths`."""
        return float(torch.cat(self._lengths).median()), float(torch.cat(self._largest).median())


def path_lengths(lines: Tensor) -> tuple[Tensor, Tensor]:
    """The length of each line's path and of its largest step, both in units of the straight line's length.

    A straight, even path has length 1 and a largest step of 1 / (points - 1); a jump makes the largest step near 1.

    Args:
        lines: images [B, points, C, H, W].

    Returns:
        Two of float64 [B].
    """
    images = lines.double().flatten(2)
    straight = (images[:, -1] - images[:, 0]).norm(dim=1)
    steps = images.diff(dim=1).norm(dim=2)
    return steps.sum(1) / straight, steps.amax(1) / straight


def _weights(points: int) -> list[float]:
    return [k / (points - 1) for k in range(points)]


def _decode(job: Job, network: nn.Module, x_T: Tensor) -> Tensor:
    """Images of noises [A, B, C, H, W], in batches of `batch_size`; on the CPU."""
    flat = x_T.flatten(0, 1)
    parts = []
    for rows in Batches(job, len(flat), bar=False):
        parts.append(finite(partial(job.sampler.sample, x_T=flat[rows]), network, job.sampler).cpu())
    return torch.cat(parts).reshape(x_T.shape)
