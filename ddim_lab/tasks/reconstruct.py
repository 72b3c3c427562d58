"""Task `reconstruct`: held-out images to noise by the ODE and back (paper, section 5.4 and Table 2).

    x_T = encode(x_0),    x_0' = sample(x_T),    error = mean over dimensions of ((x_0' - x_0) / 2)^2

in images on the [0, 1] scale. Both directions use the same S timesteps, so an exact model's error is that of an
order-1 integrator: x_0' - x_0 falls as 1/S, the squared error as 1/S^2.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import torch

from ddim_lab.config.job import Config
from ddim_lab.data.base import data_set
from ddim_lab.data.images import from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.sampler import EncodeAt
from ddim_lab.store.records import Pictured, Value
from ddim_lab.tasks.base import Job, Outcome, Task, need_determinism
from ddim_lab.tasks.pictures import sheet
from ddim_lab.tasks.walks import Batches, finite, mean_and_se, network_in_place, squared_error

__all__ = ["Reconstruct"]

SHOWN: Final = 12


@final
class Reconstruct(Task):
    """conf/task/reconstruct: held-out images to noise and back (paper, Table 2)."""

    any_formula: ClassVar[bool] = False
    common_start: ClassVar[bool] = False  # each cell encodes images

    name: Literal["reconstruct"]
    at: EncodeAt

    def check(self, config: Config) -> None:
        need_determinism(config)
        if config.sampler.clip != "none":
            raise ConfigError(
                f"task=reconstruct needs an invertible step: set sampler.clip=none, got {config.sampler.clip}"
            )

    def forwards(self, config: Config) -> int:
        held_out = data_set(config.data).held_out_count()
        return 2 * min(config.num_samples, held_out or config.num_samples) * config.forwards

    def identity(self, job: Job) -> dict[str, Any]:
        """The images that are reconstructed."""
        return {"data": job.data.digest, "split": "held_out", "images": _count(job)}

    def measure(self, job: Job, folder: Path, work: Path) -> Outcome:
        """Encode and decode; writes reconstructions.png into `folder`."""
        sampler, device = job.sampler, job.runtime.torch_device
        originals = from_uint8(job.data.held_out.first(_count(job)))
        clock = time.perf_counter()
        codes, decoded = [], []
        with network_in_place(job) as network:
            for indices in Batches(job, len(originals)):
                encode = partial(sampler.encode, x_0=originals[indices.cpu()].to(device), at=self.at)
                code = finite(encode, network, sampler)
                codes.append(code.cpu())
                decoded.append(finite(partial(sampler.sample, x_T=code), network, sampler).cpu())
        x_T, x_0 = torch.cat(codes), torch.cat(decoded)
        seconds = time.perf_counter() - clock
        errors = squared_error(x_0, originals)
        mse, se = mean_and_se(errors)
        sheet(folder / "reconstructions.png", torch.stack([originals[:SHOWN], x_0[:SHOWN]]))
        return Outcome(
            nfe=sampler.nfe,
            headline=f"reconstruction MSE {mse:.3g}" + ("" if se is None else f" ± {se:.1g}"),
            values=[
                Value(
                    name="reconstruction_mse",
                    value=mse,
                    heading="Reconstruction MSE",
                    facts="held-out images encoded and decoded, a dimension, on the [0, 1] scale",
                    se=se,
                    error="over images",
                    count=len(originals),
                    better="lower",
                    level="reconstruction_mse_median",
                    level_says="Median over images instead of mean",
                ),
                Value(name="reconstruction_mse_median", value=float(errors.median())),
                Value(name="reconstruction_images", value=len(originals)),
                # an encoding that worked looks like the noise the model starts from: mean 0, variance 1
                Value(name="code_mean", value=float(x_T.double().mean())),
                Value(name="code_variance", value=float(x_T.double().var())),
            ],
            phases={"encode_and_decode": seconds},
            pictures=[
                Pictured(title="Held-out images over their reconstructions", file="reconstructions.png", caption="")
            ],
        )


def _count(job: Job) -> int:
    return min(job.config.num_samples, len(job.data.held_out))
