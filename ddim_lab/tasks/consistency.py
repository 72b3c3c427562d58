"""Task `consistency`: the same x_T at S steps and at `many_steps` (paper, section 5.2 and Figure 5).

At eta = 0 the image is a function of x_T that converges as S grows; at eta = 1 the noise of the steps decides it. What
is compared with is this very sampler with more steps: what differs is S alone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from ddim_lab.config.job import Config
from ddim_lab.config.options import PositiveInt
from ddim_lab.errors import ConfigError
from ddim_lab.sampler import Sampler
from ddim_lab.store import content_key
from ddim_lab.store.records import Pictured, Value
from ddim_lab.tasks.base import Job, Outcome, Task, drawn, need_room
from ddim_lab.tasks.pictures import preview, sheet
from ddim_lab.tasks.walks import (
    extract,
    mean_and_se,
    network_in_place,
    sample_states,
    squared_error,
    states_identity,
)

__all__ = ["Consistency"]

STATES_VERSION: Final = 1
SHOWN: Final = 12
UNRELATED: Final = "Two of them from different x_T"


@final
class Consistency(Task):
    """conf/task/consistency: the same x_T at S steps and at `many_steps` (paper, Figure 5)."""

    takes_labels: ClassVar[bool] = True

    name: Literal["consistency"]
    many_steps: PositiveInt

    def further_walks(self, config: Config) -> Iterator[Sampler]:
        yield config.build_sampler(steps=self.many_steps)

    def check(self, config: Config) -> None:
        try:
            config.forwards_at(self.many_steps)
        except ValueError as error:
            raise ConfigError(f"task.many_steps={self.many_steps}: {error}") from None
        need_room(config)

    def forwards(self, config: Config) -> int:
        own, longest = config.build_transitions(), config.build_transitions(steps=self.many_steps)
        return 0 if own == longest else config.num_samples * config.forwards

    def shared(self, config: Config) -> tuple[Hashable, int]:
        many = config.num_samples * config.forwards_at(self.many_steps)
        return (drawn(config), config.runtime, self.many_steps), many

    def identity(self, job: Job) -> dict[str, Any]:
        """The walk that this cell is compared with; for the feature distance, the first network of metrics.features."""
        return {
            "many": content_key(_many_identity(job, _many_sampler(job))),
            "features": job.features[0].digest,
        }

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Sample, and compare with many steps; writes preview.png and against_many.png into `folder`.

        A cell of that many steps is compared with itself: sampled once, with distances of exactly 0.
        """
        own, count = job.sampler, job.config.num_samples
        many_sampler = _many_sampler(job)
        clock = time.perf_counter()
        with network_in_place(job) as network:
            many = _many_steps(job, many_sampler, network)
            referred = time.perf_counter()
            same = own.transitions == many_sampler.transitions
            images = many if same else sample_states(job, own, network, count)
        sampled = time.perf_counter()
        of_images, of_many = (features.cpu().double() for features in extract(job, images, many))
        mse, mse_se = mean_and_se(squared_error(images, many))
        distance, distance_se = mean_and_se((of_images - of_many).norm(dim=1))
        preview(folder, images)
        sheet(folder / "against_many.png", torch.stack([images[:SHOWN], many[:SHOWN]]))
        steps = many_sampler.steps
        return Outcome(
            nfe=own.nfe,
            headline=f"MSE {mse:.3g}, feature distance {distance:.3g} to S = {steps}",
            values=[
                Value(
                    name="consistency_mse",
                    value=mse,
                    heading="MSE to many steps",
                    facts="the same x_T at S steps and at many, a dimension, on the [0, 1] scale",
                    se=mse_se,
                    error="over images",
                    count=count,
                    better="lower",
                    level="unrelated_mse",
                    level_says=UNRELATED,
                ),
                Value(
                    name="feature_distance",
                    value=distance,
                    heading="Feature distance to many steps",
                    facts="the same x_T at S steps and at many, mean Euclidean distance in the feature network",
                    se=distance_se,
                    error="over images",
                    count=count,
                    better="lower",
                    level="unrelated_feature_distance",
                    level_says=UNRELATED,
                ),
                # what images of different x_T score: the scale of the two above
                Value(name="unrelated_mse", value=float(squared_error(many, many.roll(1, 0)).mean())),
                Value(
                    name="unrelated_feature_distance",
                    value=float((of_many - of_many.roll(1, 0)).norm(dim=1).mean()),
                ),
                Value(name="many_steps", value=steps),
                Value(name="compared_images", value=count),
            ],
            phases={
                "many_steps": referred - clock,
                "sampling": sampled - referred,
                "metrics": time.perf_counter() - sampled,
            },
            pictures=[
                Pictured(title=f"Each cell over S = {steps} from the same x_T", file="against_many.png", caption="")
            ],
        )


def _many_sampler(job: Job) -> Sampler:
    task = job.task
    assert isinstance(task, Consistency)
    return job.sampler_at(task.many_steps)


def _many_identity(job: Job, sampler: Sampler) -> dict[str, Any]:
    return {"kind": "states", "version": STATES_VERSION, **states_identity(job, sampler, job.runtime)}


def _many_steps(job: Job, sampler: Sampler, network: nn.Module) -> Tensor:
    """x_0 at many steps, float32 [N, C, H, W]: from the store, or sampled and kept there."""

    def build(folder: Path) -> None:
        np.save(folder / "states.npy", sample_states(job, sampler, network, job.config.num_samples).numpy())

    folder, _ = job.store.obtain("references", content_key(_many_identity(job, sampler)), build)
    return torch.from_numpy(np.load(io.BytesIO((folder / "states.npy").read_bytes()), allow_pickle=False))
