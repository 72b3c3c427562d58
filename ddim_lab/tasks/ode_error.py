"""Task `ode_error`: how far an image is from where the probability-flow ODE carries the same x_T.

What a solver is for: at eta = 0 DDIM and all solvers of higher order approximate one and the same image. It is found by
UniPC-3 with many forwards, once for all cells, and checked by another solver: DEIS with half as many. Both take the
step from the last timestep to alpha_bar = 1, which is of first order: their agreement does not speak of that one.
"""

from __future__ import annotations

import io
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from pydantic import Field, StrictStr
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.base import JACKKNIFE
from ddim_lab.metrics.estimates import GROUPS, jackknife_se
from ddim_lab.store import content_key
from ddim_lab.store.records import Pictured, Value
from ddim_lab.tasks.base import Job, Outcome, Task, need_determinism, need_error, need_room
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.walks import network_in_place, sample_states, squared_error, states_identity

if TYPE_CHECKING:
    from ddim_lab.labels import NamedLabels
    from ddim_lab.sampler import Sampler
    from ddim_lab.transitions import Prediction

__all__ = ["OdeError"]

STATES_VERSION: Final = 1
SHOWN: Final = 12

AGREED: Final = 0.1
"""The two fine solutions agree where their distance is at most this part of the distance that is shown."""


@final
class OdeError(Task):
    """conf/task/ode_error: distance to the ODE's fine solution from the same x_T."""

    takes_labels: ClassVar[bool] = True

    name: Literal["ode_error"]
    fine_nfe: Annotated[tuple[PositiveInt, PositiveInt], Field()]
    fine_spacing: StrictStr

    def further_walks(self, config: Config) -> Iterator[Sampler]:
        return (self.fine_sampler(config, which) for which in range(2))

    def check(self, config: Config) -> None:
        need_determinism(config)
        need_error(config)
        need_room(config)
        if max(self.fine_nfe) > (most := config.build_schedule().num_timesteps):
            raise ConfigError(f"task.fine_nfe={max(self.fine_nfe)} exceeds the schedule's {most} timesteps")
        try:
            for which in range(2):
                self.fine_sampler(config, which)
        except ValueError as error:
            raise ConfigError(f"task.fine_spacing={self.fine_spacing}: {error}") from None

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.forwards

    def shared(self, config: Config) -> tuple[Hashable, int]:
        model = config.data, config.model, config.schedule, config.training
        drawn = *model, config.seed, config.num_samples, config.batch_size, config.runtime
        forwards = sum(self.fine_sampler(config, which).nfe for which in range(2))
        return (drawn, config.sampler.guidance, self.fine_nfe, self.fine_spacing), config.num_samples * forwards

    def identity(self, job: Job) -> dict[str, Any]:
        """The two walks that this cell is compared with."""
        return {"fine": [content_key(_identity(job, which)) for which in range(2)]}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Sample, and compare with the fine solution; writes preview.png and against_ode.png into `folder`."""
        count, clock = job.config.num_samples, time.perf_counter()
        with network_in_place(job) as network:
            fine, other = (_fine(job, which, network) for which in range(2))
            referred = time.perf_counter()
            images = sample_states(job, job.sampler, network, count)
        sampled = time.perf_counter()
        of_images = squared_error(images, fine)
        mse, apart = float(of_images.mean()), float(squared_error(other, fine).mean())
        left_out = _without_each_group(of_images)
        agreed = apart <= AGREED * mse
        preview(folder, images)
        sheet(folder / "against_ode.png", torch.stack([images[:SHOWN], fine[:SHOWN]]))
        solvers = f"UniPC-3 and DEIS with {' and '.join(map(str, self.fine_nfe))} forwards"
        return Outcome(
            nfe=job.sampler.nfe,
            headline=f"MSE {mse:.3g} to the ODE's solution"
            + ("" if agreed else f", which is known to {apart:.2g} only: raise task.fine_nfe"),
            values=[
                Value(
                    name="ode_mse",
                    value=mse,
                    heading="MSE to the ODE's solution",
                    facts="from the same x_T, a dimension, on the [0, 1] scale",
                    se=jackknife_se(left_out),
                    error=JACKKNIFE,
                    replicates=tuple(left_out),
                    count=count,
                    better="lower",
                    level="fine_mse",
                    level_says="Two fine solutions of the ODE, one of which is compared with, from each other",
                ),
                Value(name="fine_mse", value=apart, facts=solvers),
                Value(
                    name="fine_agrees",
                    value=agreed,
                    section="The ODE's solution",
                    table="Is it known well enough?",
                    column="known to a tenth",
                    notes=(f"Whether {solvers} are as close to each other as a tenth of the cell's own distance.",),
                ),
            ],
            phases={
                "fine_solution": referred - clock,
                "sampling": sampled - referred,
                "metrics": time.perf_counter() - sampled,
            },
            pictures=[Pictured(title="Each cell over the ODE's solution from the same x_T", file="against_ode.png")],
        )

    def fine_sampler(
        self, config: Config, which: int, prediction: Prediction = "eps", labels: NamedLabels | None = None
    ) -> Sampler:
        """UniPC-3 (0) or DEIS (1) with its number of steps, each a forward, or two with guidance."""
        from ddim_lab.multistep import Deis, UniPC
        from ddim_lab.sampler import Sampler

        formula = (UniPC(3), Deis(3))[which]
        schedule, steps = config.build_schedule(), self.fine_nfe[which]
        return Sampler(
            schedule,
            steps,
            spacing=self.fine_spacing,
            prediction=prediction,
            formula=formula,
            labels=labels,
            guidance=config.sampler.guidance,
        )


def _without_each_group(values: Tensor) -> list[float]:
    """The mean without group g of the samples, i mod GROUPS; of fewer samples without each one."""
    groups = min(GROUPS, len(values))
    return [float(values[torch.arange(len(values)) % groups != group].mean()) for group in range(groups)]


def _fine_sampler(job: Job, which: int) -> Sampler:
    assert isinstance(job.task, OdeError)
    return job.task.fine_sampler(job.config, which, job.model.prediction, job.labels)


def _identity(job: Job, which: int) -> dict[str, Any]:
    return {"kind": "states", "version": STATES_VERSION, **states_identity(job, _fine_sampler(job, which), job.runtime)}


def _fine(job: Job, which: int, network: nn.Module) -> Tensor:
    """x_0 of a fine walk, float32 [N, C, H, W]: from the store, or sampled and kept there."""

    def build(folder: Path) -> None:
        states = sample_states(job, _fine_sampler(job, which), network, job.config.num_samples)
        np.save(folder / "states.npy", states.numpy())

    folder, _ = job.store.obtain("references", content_key(_identity(job, which)), build)
    return torch.from_numpy(np.load(io.BytesIO((folder / "states.npy").read_bytes()), allow_pickle=False))
