"""Task `speed_peers`: the same weights under other people's loops, timed in turns in one process.

    diffusers             its DDIMPipeline as a user calls it: fp32, torch's own switches
    diffusers, optimised  the same with what its documentation of inference names: fp16 weights, channels-last,
                          torch.compile; on a CPU channels-last, and torch.compile where the job's runtime compiles
    paper's code          the loop of the paper's published code, written again from its formulas: alpha_bar is
                          computed anew in every step, noise drawn whatever eta is, and each state and prediction sent
                          to the host
    ours                  the job's sampler and runtime

Everyone starts from nothing and ends with images in the host's memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from pydantic import Field, StrictInt
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.data.images import to_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.speed import speed_values, timed, timed_libraries
from ddim_lab.sampler import Sampler
from ddim_lab.store.records import Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.walks import start

__all__ = ["SpeedPeers", "papers_loop", "pipeline"]

OURS: Final = "ours"
DIFFUSERS: Final = "diffusers"
OPTIMISED: Final = "diffusers, optimised"
PAPER: Final = "paper's code"

Run = Callable[[int], object]


@final
class SpeedPeers(Task):
    """conf/task/speed_peers: other people's loops around the same network, in the same process."""

    any_formula: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False

    name: Literal["speed_peers"]
    rounds: Annotated[StrictInt, Field(ge=3)]

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

        return {"diffusers": __version__, "libraries": timed_libraries()}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Seconds of everyone for a full batch and for one image; ratios to ours, round by round."""
        config, device = job.config, job.runtime.torch_device
        phases: dict[str, float] = {}
        seconds: dict[int, dict[str, list[float]]] = {}
        first: dict[int, dict[str, float]] = {}
        with job.timed_alone("times") as meanwhile:
            network = job.model.load().to(device)
            for size in sorted({1, config.batch_size}):
                clock = time.perf_counter()
                # Without the optimised pipeline for one image: it would be compiled once more, for a minute on a GPU.
                runs = _runs(job, network, size, optimised=size > 1)
                first[size] = {name: timed(partial(run, size), device)[1] for name, run in runs.items()}
                seconds[size] = {name: [] for name in runs}
                for _ in range(self.rounds):
                    meanwhile.begin()
                    for name, run in runs.items():
                        seconds[size][name].append(timed(partial(run, size), device)[1])
                    meanwhile.look()
                phases[f"batch {size}"] = time.perf_counter() - clock
        largest = max(seconds)
        found = {
            size: {name: _ratio(of[name], of[OURS]) for name in of if name != OURS} for size, of in seconds.items()
        }
        ours = seconds[largest][OURS]
        low, median, high = np.quantile(ours, (0.25, 0.5, 0.75)).tolist()
        ratio, optimised = found[largest][DIFFUSERS], found[largest].get(OPTIMISED)
        return Outcome(
            nfe=job.sampler.nfe,
            headline=f"{ratio.median:.2f} × diffusers ({ratio.low:.2f} – {ratio.high:.2f}),"
            f" {found[1][DIFFUSERS].median:.2f} × for one image",
            values=[
                Value(
                    name="times_diffusers",
                    value=ratio.median,
                    heading="Times diffusers' pipeline",
                    facts="how many times as long diffusers' DDIMPipeline took for the same weights, steps and batch,"
                    " in one process; median over rounds in turns, the cell's table has the intervals and other peers",
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
                Value(name="times_papers_code", value=found[largest][PAPER].median),
                Value(name="one_image_seconds", value=float(np.median(seconds[1][OURS])), unit="s"),
                *speed_values(
                    {
                        "images": largest,
                        "repeats": self.rounds,
                        "seconds_median": median,
                        "seconds_q1": low,
                        "seconds_q3": high,
                        "images_per_second": largest / median,
                        "seconds_per_image": median / largest,
                        "warmup_seconds": first[largest][OURS],
                        "contended": meanwhile.seen,
                    }
                ),
            ],
            phases=phases,
            tables=[_table(size, seconds[size], found[size], first[size], self.rounds) for size in seconds],
        )


def _runs(job: Job, network: nn.Module, size: int, *, optimised: bool) -> dict[str, Run]:
    """What each of them does for a batch: everyone has a copy of the network."""
    sampler, device = job.sampler, job.runtime.torch_device
    runs: dict[str, Run] = {DIFFUSERS: pipeline(job, copy.deepcopy(network), optimised=False)}
    if optimised:
        runs[OPTIMISED] = pipeline(job, copy.deepcopy(network), optimised=True)
    other, betas = copy.deepcopy(network), torch.tensor(sampler.schedule.betas, dtype=torch.float32, device=device)

    def paper(count: int) -> Tensor:
        x = torch.randn(count, *job.data.shape, device=device)
        return to_uint8(papers_loop(x, sampler, other, betas))

    engine, noise = job.network(size), job.runtime.noise(job.config.seed)

    def ours(count: int) -> Tensor:
        with job.runtime.applied(), torch.inference_mode():
            indices = torch.arange(count, device=device)
            x_0 = sampler.sample(engine, start(job, indices), indices=indices, noise=noise)
            return to_uint8(x_0).cpu()

    return {**runs, PAPER: paper, OURS: ours}


def pipeline(job: Job, network: Any, *, optimised: bool) -> Run:
    """diffusers' DDIMPipeline on a U-Net, with our schedule: call it with a number of images."""
    from diffusers import DDIMPipeline, DDIMScheduler

    from ddim_lab.models.unet import scheduler_config

    schedule = job.sampler.schedule
    config = scheduler_config(schedule, {"name": "betas"})
    network.to(dtype=torch.float32)
    if optimised:
        network.to(memory_format=torch.channels_last)
        on_gpu = job.runtime.torch_device.type == "cuda"
        if on_gpu:
            network.to(dtype=torch.float16)  # its DDIMPipeline hands images to numpy, which has no bfloat16
        if on_gpu or job.runtime.compile:
            network.compile(fullgraph=True, dynamic=False)  # all peers share one cache: another size would be dynamic
    pipe = DDIMPipeline(unet=network, scheduler=DDIMScheduler.from_config(config))
    pipe.set_progress_bar_config(disable=True)
    return lambda count: pipe(batch_size=count, eta=job.sampler.eta, num_inference_steps=job.sampler.steps)


@torch.no_grad()
def papers_loop(x_T: Tensor, sampler: Sampler, network: Callable[[Tensor, Tensor], Any], betas: Tensor) -> Tensor:
    """x_0 on the host, from x_T, as the paper's code walks: every quantity a tensor that is computed in every step.

    Args:
        x_T: [B, C, H, W] on the device.
        sampler: names the timesteps and eta; posterior variance, no clipping.
        network: (x_t, t) -> an object with eps as `.sample`.
        betas: float32 [T] on the device.
    """
    states, predictions = [x_T.cpu()], []
    for transition in sampler.transitions:
        t, t_prev = (torch.full((len(x_T),), step, device=x_T.device) for step in (transition.t, transition.t_prev))
        ab, ab_prev = _alpha_bar(betas, t), _alpha_bar(betas, t_prev)
        x_t = states[-1].to(x_T.device)
        eps = network(x_t, t.float()).sample
        x_0 = (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
        predictions.append(x_0.cpu())
        std = sampler.eta * ((1 - ab / ab_prev) * (1 - ab_prev) / (1 - ab)).sqrt()
        along = (1 - ab_prev - std**2).sqrt()
        states.append((ab_prev.sqrt() * x_0 + std * torch.randn_like(x_t) + along * eps).cpu())
    return states[-1]


def _alpha_bar(betas: Tensor, t: Tensor) -> Tensor:
    with_clean = torch.cat([torch.zeros(1, device=betas.device), betas])
    return (1 - with_clean).cumprod(0).index_select(0, t + 1)[:, None, None, None]


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
    size: int, seconds: dict[str, list[float]], found: dict[str, _Ratio], first: dict[str, float], rounds: int
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
        title=f"{size:,} image{'s' if size > 1 else ''} at once, {rounds} rounds in turns",
        columns=("who", "images/s", "seconds (quartiles)", f"times ours ({coverage:.0%})", "first call, s"),
        rows=tuple(rows),
    )
