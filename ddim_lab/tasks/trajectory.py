"""Task `trajectory`: what a sample looks like on the way: x_t, and the x_0 predicted at each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, final

import torch
from pydantic import Field, StrictInt
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.sampler import EpsModel, State
from ddim_lab.store.records import Pictured, Tabled, Value
from ddim_lab.tasks.base import Job, Outcome, Task
from ddim_lab.tasks.pictures import PREVIEW, preview, sheet
from ddim_lab.tasks.walks import Batches, finite, network_in_place, squared_error, start

__all__ = ["Trajectory"]

SHOWN: Final = 4
"""Samples of the picture, two rows each."""


@final
class Trajectory(Task):
    """conf/task/trajectory: x_t and the predicted x_0 over the steps."""

    takes_labels: ClassVar[bool] = True

    name: Literal["trajectory"]
    columns: Annotated[StrictInt, Field(ge=2)]

    def forwards(self, config: Config) -> int:
        return config.num_samples * config.forwards

    def identity(self, job: Job) -> dict[str, Any]:
        """Nothing but the task's own settings."""
        return {}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Sample, stopping at `self.columns` moments; writes preview.png and trajectory.png into `folder`."""
        sampler = job.sampler
        moments = shown_moments(len(sampler.transitions), self.columns)
        timesteps = [round(transition.t, 2) for transition in sampler.transitions] + [sampler.transitions[-1].t_prev]
        noise = job.runtime.noise(job.config.seed)
        clock = time.perf_counter()
        # Of all samples the errors alone are kept: the states are `moments` times two as large as the images.
        shown: list[Tensor] = []  # of the first SHOWN samples, [B, moments, 2, C, H, W]
        images: list[Tensor] = []  # of the first PREVIEW samples, [B, C, H, W]
        by_sample: list[Tensor] = []  # float64 [moments, B]
        with network_in_place(job) as network:
            for indices in Batches(job, job.config.num_samples):

                def walk(model: EpsModel, indices: Tensor = indices) -> Tensor:
                    return _states(sampler.walk(model, start(job, indices), indices=indices, noise=noise), moments)

                states = finite(walk, network, sampler).cpu()
                # as the pictures show them: the first predictions are divided by sqrt(ab) << 1 and leave images' range
                seen = states.clamp(-1.0, 1.0)
                errors_of = [squared_error(seen[:, k, 1], seen[:, -1, 0]) for k in range(len(moments))]
                by_sample.append(torch.stack(errors_of))
                shown.append(states[: max(SHOWN - int(indices[0]), 0)].clone())
                images.append(states[: max(PREVIEW - int(indices[0]), 0), -1, 0].clone())
        errors = [float(of_moment.mean()) for of_moment in torch.cat(by_sample, dim=1)]
        seconds = time.perf_counter() - clock
        preview(folder, torch.cat(images))
        strips = torch.cat(shown).transpose(1, 2).flatten(0, 1)  # [2 SHOWN, moments, C, H, W]: x_t over predicted x_0
        sheet(folder / "trajectory.png", strips)
        return Outcome(
            nfe=sampler.nfe,
            headline=f"first predicted x_0 is {errors[0]:.3g} (MSE) from the image",
            values=[
                Value(
                    name="first_prediction_mse",
                    value=errors[0],
                    heading="MSE of the first predicted x_0",
                    facts="to the image that the sample becomes, both clamped, a dimension, on the [0, 1] scale",
                    better="lower",
                ),
                Value(name="halfway_prediction_mse", value=errors[len(errors) // 2]),
            ],
            phases={"sampling": seconds},
            tables=[
                Tabled(
                    title="Predicted x_0 along the way",
                    columns=("t", "MSE to the final image"),
                    rows=tuple(
                        ("image" if timesteps[m] < 0 else timesteps[m], e) for m, e in zip(moments, errors, strict=True)
                    ),
                )
            ],
            pictures=[
                Pictured(
                    title="From noise to image: x_t over the x_0 predicted from it",
                    file="trajectory.png",
                    caption="t = " + ", ".join(str(timesteps[m]) for m in moments[:-1]) + ", then the image",
                )
            ],
        )


def _states(walk: Iterator[State], moments: Sequence[int]) -> Tensor:
    """x_t and the x_0 predicted from it at these positions of a walk: [B, moments, 2, C, H, W]; the image twice."""
    # At the start nothing has been predicted: the first prediction stands there, for it is made from x_T.
    kept, previous = [], None
    for position, moment in enumerate(walk):
        if previous is not None and position - 1 in moments:
            kept.append(torch.stack([previous.x, _predicted(moment.x0)], dim=1))
        previous = moment
    assert previous is not None
    return torch.stack([*kept, torch.stack([previous.x, previous.x], dim=1)], dim=1)


def shown_moments(nfe: int, columns: int) -> list[int]:
    """Positions on the walk (0: x_T, nfe: the image), evenly spread, both ends included, none twice."""
    count = min(columns, nfe + 1)
    return [round(k * nfe / (count - 1)) for k in range(count)]


def _predicted(x0: Tensor | None) -> Tensor:
    assert x0 is not None  # there after the first step
    return x0
