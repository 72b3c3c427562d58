"""Task `speed_peers`: the same weights under other people's loops (`ddim_lab.tasks.peers`) and ours, timed in turns.

Ours is the job's sampler and runtime, in the job's process, from noise to images in the host's memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from pydantic import Field, StrictInt
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.data.images import to_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.speed import speed_values, timed, timed_libraries
from ddim_lab.store.records import Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.peers import DIFFUSERS, OPTIMISED, PAPER, Given, peers
from ddim_lab.tasks.walks import start

__all__ = ["SpeedPeers"]

OURS: Final = "ours"

MEASURED_VERSION: Final = 2
"""Raise when what is timed changes; 2: each peer in a process of its own."""


@final
class SpeedPeers(Task):
    """conf/task/speed_peers: other people's loops around the same network, in turns with ours.

    Attributes:
        rounds: of everybody, in turns.
        images: how many are made in a round, by others in one batch and by ours in batches of `batch_size` at most;
            None is one batch of that size for everybody.
    """

    any_formula: ClassVar[bool] = False
    eps_alone: ClassVar[bool] = True
    reads_images: ClassVar[bool] = False

    name: Literal["speed_peers"]
    rounds: Annotated[StrictInt, Field(ge=3)]
    images: Annotated[StrictInt, Field(ge=2)] | None

    def check(self, config: Config) -> None:
        sampler = config.sampler
        if not config.model.is_unet:
            raise ConfigError(
                f"task=speed_peers needs a U-Net, which others can run: model={config.model.kind} is not one"
            )
        if (sampler.variance, sampler.clip, sampler.spacing, sampler.timesteps) != (
            "posterior",
            "none",
            "uniform",
            None,
        ):
            raise ConfigError(
                "task=speed_peers compares walks that all peers have: set sampler.variance=posterior sampler.clip=none"
                " sampler.spacing=uniform sampler.timesteps=null"
            )

    def forwards(self, config: Config) -> int:
        return 0  # it takes what time it takes, whatever N is

    def identity(self, job: Job) -> dict[str, Any]:
        """The package that is compared with, and the libraries whose kernels are timed."""
        from diffusers import __version__

        return {"version": MEASURED_VERSION, "diffusers": __version__, "libraries": timed_libraries()}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Seconds of everyone for `images` and for one image; ratios to ours, round by round."""
        config, device = job.config, job.runtime.torch_device
        images = self.images or config.batch_size
        phases: dict[str, float] = {}
        seconds: dict[int, dict[str, list[float]]] = {}
        first: dict[int, dict[str, float]] = {}
        contended = False
        given = Given(job.model.load(), job.sampler, job.data.shape, device, job.runtime.compile)
        with job.timed_alone("times") as meanwhile, peers(given) as others:
            for size in sorted({1, images}):
                clock = time.perf_counter()
                run = _ours(job, size)
                runs = {peer.name: peer.seconds for peer in others}
                if size == 1:
                    # It would be compiled once more, for a minute on a GPU.
                    del runs[OPTIMISED]

                def alone(count: int, run: Callable[[int], Tensor] = run) -> float:
                    meanwhile.begin()
                    taken = timed(partial(run, count), device)[1]
                    meanwhile.look()
                    return taken

                runs[OURS] = alone
                first[size] = {name: take(size) for name, take in runs.items()}
                meanwhile.forget()  # who compiles waits for cores by itself
                for peer in others:
                    peer.forget()
                seconds[size] = {name: [] for name in runs}
                for _ in range(self.rounds):
                    for name, take in runs.items():
                        seconds[size][name].append(take(size))
                contended = contended or meanwhile.seen or any(peer.contended for peer in others)
                phases[f"batch {size}"] = time.perf_counter() - clock
        found = {
            size: {name: _ratio(of[name], of[OURS]) for name in of if name != OURS} for size, of in seconds.items()
        }
        ours = seconds[images][OURS]
        low, median, high = np.quantile(ours, (0.25, 0.5, 0.75)).tolist()
        ratio, optimised = found[images][DIFFUSERS], found[images].get(OPTIMISED)
        in_batches = (
            f" in one batch, ours in batches of {config.batch_size:,}" if config.batch_size < images else " at once"
        )
        return Outcome(
            nfe=job.sampler.nfe,
            headline=f"{ratio.median:.2f} × diffusers ({ratio.low:.2f} – {ratio.high:.2f}),"
            f" {found[1][DIFFUSERS].median:.2f} × for one image",
            values=[
                Value(
                    name="times_diffusers",
                    value=ratio.median,
                    heading="Times diffusers' pipeline",
                    facts="how many times as long diffusers' DDIMPipeline took for the same weights, steps and number"
                    " of images, which it makes in one batch, in a process of its own; median over rounds in turns; the"
                    " cell's table has the others, too",
                    count=images,
                ),
                Value(
                    name="one_image_times_diffusers",
                    value=found[1][DIFFUSERS].median,
                    heading="Times diffusers' pipeline, one image",
                    facts="the same for one image alone: how much sooner it is there",
                ),
                Value(name="times_diffusers_low", value=ratio.low),
                Value(name="times_diffusers_high", value=ratio.high),
                Value(name="times_diffusers_coverage", value=ratio.coverage),
                Value(name="times_diffusers_optimised", value=optimised.median if optimised else None),
                Value(name="times_papers_code", value=found[images][PAPER].median),
                Value(name="one_image_seconds", value=float(np.median(seconds[1][OURS])), unit="s"),
                *speed_values(
                    {
                        "images": images,
                        "at_once": min(images, config.batch_size),
                        "repeats": self.rounds,
                        "seconds_median": median,
                        "seconds_q1": low,
                        "seconds_q3": high,
                        "images_per_second": images / median,
                        "seconds_per_image": median / images,
                        "warmup_seconds": first[images][OURS],
                        "contended": contended,
                    }
                ),
            ],
            phases=phases,
            tables=[
                _table(
                    f"1 image at once, {self.rounds} rounds in turns"
                    if size == 1
                    else f"{size:,} images{in_batches}, {self.rounds} rounds in turns",
                    size,
                    seconds[size],
                    found[size],
                    first[size],
                )
                for size in seconds
            ],
        )


def _ours(job: Job, size: int) -> Callable[[int], Tensor]:
    """What we do for as many images: call it with their number, or with a smaller one."""
    batch = min(size, job.config.batch_size)
    sampler, engine, noise = job.sampler, job.network(batch), job.runtime.noise(job.config.seed)

    def ours(count: int) -> Tensor:
        with job.runtime.applied(), torch.inference_mode():
            made = []
            for indices in torch.split(torch.arange(count, device=job.runtime.torch_device), batch):
                x_0 = sampler.sample(engine, start(job, indices), indices=indices, noise=noise)
                made.append(to_uint8(x_0).cpu())
            return torch.cat(made)

    return ours


@final
class _Ratio:
    """How many times as long a peer took: median over rounds, with an interval between two of them.

    The median of what the rounds are drawn from lies below k or fewer of n with probability P(Bin(n, 1/2) <= k): the
    interval is the narrowest that covers it with 95 %, or all of the rounds, where they are fewer than six.
    """

    def __init__(self, ratios: list[float]) -> None:
        from scipy.stats import binom

        ordered, outside = sorted(ratios), 0
        while 1.0 - 2.0 * binom.cdf(outside + 1, len(ratios), 0.5) >= 0.95:
            outside += 1
        self.median = float(np.median(ratios))
        self.low, self.high = ordered[outside], ordered[-1 - outside]
        self.coverage = float(1.0 - 2.0 * binom.cdf(outside, len(ratios), 0.5))


def _ratio(peer: list[float], ours: list[float]) -> _Ratio:
    return _Ratio([a / b for a, b in zip(peer, ours, strict=True)])


def _table(
    title: str, size: int, seconds: dict[str, list[float]], found: dict[str, _Ratio], first: dict[str, float]
) -> Tabled:
    rows = []
    coverage = found[DIFFUSERS].coverage
    for name, values in seconds.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        ratio = found.get(name)
        rows.append(
            (
                name,
                f"{size / median:,.4g}",
                f"{median:.4g} ({low:.4g} – {high:.4g})",
                "1" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f})",
                f"{first[name]:.3g}",
            )
        )
    return Tabled(
        title=title,
        columns=("who", "images/s", "seconds (quartiles)", f"times ours ({coverage:.0%})", "first call, s"),
        rows=tuple(rows),
    )
