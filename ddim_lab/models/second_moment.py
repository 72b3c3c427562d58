"""Gamma(t) = E |eps(x_t, t)|^2 / d of a model on its training images: what sampler.variance=analytic goes by.

Estimated once for a model, its images and a walk's timesteps, and kept in the store. Image i is a training image drawn
at random, with repeats, and has noise z of its own at each t. Bao et al. 2022 take the mean of |eps|^2 / d over such
draws. Here each image is noised by z and by -z, and the mean of the two is regressed on |z|^2 / d, whose own mean is
known to be 1: Gamma(t) is the value there. The limit is the same, and the error smaller.

It matters at large t, where eps is nearly z, and 1 - Gamma(t), which the variance is made of, is far below the spread
of |z|^2 / d. Of 64 normal pixels of variance 0.3 at t = 900, 1 - Gamma(t) is 8.1e-5: 1,000 forwards tell it to 5.6e-3
by the mean, and to 6e-7 so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ddim_lab.console import Progress
from ddim_lab.data.images import ImageData, ImageSet, NonFiniteError, from_uint8
from ddim_lab.device.memory import Halving
from ddim_lab.device.runtime import Runtime
from ddim_lab.diffusion import q_sample
from ddim_lab.models.obtain import Model
from ddim_lab.noise import NamedNoise, philox4x32
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.schedule import CLEAN
from ddim_lab.store import Store, content_key, read_json, write_json
from ddim_lab.store.records import Tabled
from ddim_lab.transitions import Transition, analytic_std, faintest, gamma_needed_at, sigma, x0_share

__all__ = [
    "FORWARDS_AN_IMAGE",
    "SecondMoments",
    "estimate_second_moments",
    "obtain_second_moments",
    "training_draws",
    "variance_table",
]

VERSION: Final = 1
"""Raised whenever the same recipe would be estimated otherwise."""

FORWARDS_AN_IMAGE: Final = 2
"""At each t: with z and with -z."""


@final
@dataclass(frozen=True)
class SecondMoments:
    """Gamma(t) of one model at the timesteps of a walk.

    Attributes:
        images: N, drawn from the training images, that it is estimated from.
        by_t: t -> Gamma(t) and its standard error.
        key: of the object in the store; "" of one that is not kept.
    """

    images: int
    by_t: dict[float, tuple[float, float]]
    key: str = ""

    def gamma(self, t: float) -> float:
        """Gamma(t)."""
        return self.by_t[t][0]

    def std_se(self, transition: Transition) -> float | None:
        """The standard error of a step's analytic standard deviation, by the delta method; None where a bound gives it.

        d std / d Gamma = -x0_share^2 (1 - ab) / ab / (2 std), see `analytic_std`.
        """
        gamma, se = self.by_t[transition.t]
        ab, ab_prev, std = transition.alpha_bar, transition.alpha_bar_prev, transition.noise_std
        if std != analytic_std(gamma, transition.sigma, ab, ab_prev) or not 0.0 < (1.0 - ab) / ab * (1.0 - gamma) < 1.0:
            return None
        return x0_share(transition.sigma, ab, ab_prev) ** 2 * (1.0 - ab) / ab * se / (2.0 * std)


def obtain_second_moments(
    model: Model,
    data: ImageData,
    sampler: Sampler,
    runtime: Runtime,
    store: Store,
    *,
    images: int,
    batch_size: int,
    progress: str = "",
) -> SecondMoments:
    """Of a model on its training images, at the timesteps that a walk needs: from the store, or estimated and kept.

    Computed in fp32 on deterministic kernels whatever the runtime: walks that differ in the runtime alone are the same
    walk. The draws are the same for every sampling seed, so that cells of several seeds are, too.

    Args:
        model, data, store: of the job.
        sampler: names schedule and timesteps.
        runtime: names the device.
        images: N, drawn.
        batch_size: images of a forward.
        progress: what a progress bar says in front.

    Raises:
        NonFiniteError: the model predicts NaN or infinity.
    """
    plain, timesteps = runtime.yardstick(), gamma_needed_at(sampler.transitions)
    identity: dict[str, Any] = {
        "kind": "second moments",
        "version": VERSION,
        "model": model.recipe(),
        "data": data.digest,
        "schedule": sampler.schedule.digest,
        "timesteps": timesteps,
        "whole": sampler.whole,
        "images": images,
        "batch_size": batch_size,
        "runtime": plain.recipe(),
    }
    key = content_key(identity)

    def build(folder: Path) -> None:
        with torch.inference_mode(False):  # as every network is loaded, see `Job.network`
            network = Halving(plain.wrap(model.load().to(plain.torch_device), batch_size))
        with plain.applied(), store.presence(plain.hardware), torch.inference_mode():
            draws = training_draws(data.train, images, batch_size, plain.torch_device)
            with Progress(
                f"{progress} second moments".lstrip(), FORWARDS_AN_IMAGE * images * len(timesteps), "image"
            ) as shown:
                found = estimate_second_moments(sampler, network, draws, shown)
        values = [[t, gamma, se] for t, (gamma, se) in found.by_t.items()]
        write_json(folder / "second_moments.json", {"schema": 1, "identity": identity, "t_gamma_se": values})

    folder, _ = store.obtain("references", key, build)
    values = read_json(folder / "second_moments.json")["t_gamma_se"]
    return SecondMoments(images, {t: (gamma, se) for t, gamma, se in values}, key)


def training_draws(
    train: ImageSet, count: int, batch_size: int, device: torch.device, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Independent draws of x_0 from the training images, batch by batch: indices int64 [B], images [B, C, H, W].

    Draw i is a function of (seed, i) and the number of images alone.
    """
    key = _stream(f"images {seed}")
    for indices in torch.split(torch.arange(count), batch_size):
        zero = torch.zeros_like(indices)
        word = philox4x32((indices, zero, zero, zero), (key & 0xFFFFFFFF, key >> 32))[0]
        yield indices.to(device), from_uint8(train.batch((word * len(train)) >> 32)).to(device)


def estimate_second_moments(
    sampler: Sampler,
    model: EpsModel,
    draws: Iterator[tuple[Tensor, Tensor]],
    progress: Progress | None = None,
    seed: int = 0,
) -> SecondMoments:
    """Gamma(t), with its standard error over images, at every t where the walk needs it.

    Args:
        sampler: names schedule, timesteps and what the model predicts.
        model: see `ddim_lab.sampler.Sampler`.
        draws: batches of indices [B] and x_0 [B, ...], at least 3 images.
        progress: is told of every forward's images.
        seed: names the noise, in a stream that no sampling seed shares.

    Raises:
        NonFiniteError: the model predicts NaN or infinity.
    """
    noise, timesteps = NamedNoise(_stream(f"noise {seed}")), gamma_needed_at(sampler.transitions)
    products: list[Tensor | float] = [0.0] * len(timesteps)  # see `_at_known_mean`
    count = 0
    for indices, x_0 in draws:
        count += len(indices)
        for place, t in enumerate(timesteps):
            z, ab = noise(indices, t, x_0), sampler.schedule.alpha_bar(t)
            of_eps = [_per_pixel(sampler.predict_eps(model, q_sample(x_0, each, ab), t)) for each in (z, -z)]
            of_z = _per_pixel(z) - 1.0
            rows = torch.stack([torch.ones_like(of_z), of_z, (of_eps[0] + of_eps[1]) / 2.0 - 1.0])
            products[place] = products[place] + (rows[:, None] * rows).sum(-1)  # no product of matrices: no cuBLAS
            if progress is not None:
                progress.update(FORWARDS_AN_IMAGE * len(indices))
    found = {}
    for t, summed in zip(timesteps, products, strict=True):
        of_t = torch.as_tensor(summed).cpu()
        if not bool(torch.isfinite(of_t).all()):
            raise NonFiniteError(
                f"the model predicts NaN or infinite values of training images with noise, at t = {t:g}"
            )
        found[t] = _at_known_mean(count, of_t)
    return SecondMoments(count, found)


def _per_pixel(x: Tensor) -> Tensor:
    """|x|^2 / d of each sample, float64 [B]."""
    return x.double().square().flatten(1).mean(1)


def _at_known_mean(count: int, products: Tensor) -> tuple[float, float]:
    """Gamma(t) and its standard error: 1 + the regression of |eps|^2 / d - 1 on |z|^2 / d - 1, where that is 0.

    Args:
        count: images.
        products: of 1, |z|^2 / d - 1 and |eps|^2 / d - 1 with each other, summed over images, [3, 3].
    """
    inverse = torch.linalg.inv(products[:2, :2])
    coefficients = inverse @ products[:2, 2]
    residual = max(float(products[2, 2] - coefficients @ products[:2, 2]), 0.0) / (count - 2)
    return 1.0 + float(coefficients[0]), math.sqrt(residual * float(inverse[0, 0]))


def _stream(name: str) -> int:
    """A seed that is no sampling seed but by a chance of 2^-64."""
    return int.from_bytes(hashlib.sha256(f"ddim_lab second moments {name}".encode()).digest()[:8], "big")


# -- what is told of it ----------------------------------------------------------------------------------

COLUMNS: Final = ("t", "to", "posterior std", "analytic std", "±", "large std", "Γ", "± of Γ", "limited by")


def variance_table(transitions: Sequence[Transition], eta: float, moments: SecondMoments) -> Tabled:
    """The noise of every step of an analytic walk, beside DDPM's two choices for it."""
    rows = []
    for each in transitions:
        ab, ab_prev = each.alpha_bar, each.alpha_bar_prev
        gamma, gamma_se = moments.by_t.get(each.t, (None, None))
        if each.t_prev == CLEAN:
            limited, to = "last step: none", "image"
        else:
            to, limited = f"{each.t_prev:g}", ""
            if gamma is not None and moments.std_se(each) is None:
                limited = "grey levels" if each.noise_std == faintest(eta) else "bounds"
        rows.append(
            (
                each.t,
                to,
                sigma(1.0, ab, ab_prev),
                each.noise_std,
                None if gamma is None else moments.std_se(each),
                math.sqrt(1.0 - ab / ab_prev),
                gamma,
                gamma_se,
                limited,
            )
        )
    return Tabled(
        title=f"Analytic variance: Γ(t) of N = {moments.images:,} training images, ± one standard error",
        columns=COLUMNS,
        rows=tuple(rows),
    )
