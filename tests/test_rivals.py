"""The same x_T and the same noise through other people's samplers: the images must agree to rounding.

Differences are relative to max |x|: at most 1e-5 in float32; at most 1e-10 in float64, where the rival's float32
alphas_cumprod is replaced by ours. Where a rival is wrong, that is pinned too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from official import (
    Counting,
    Replay,
    ancestral_euler,
    labels,
    official_ddim,
    official_sequence,
    official_sigma_hat,
    relative_difference,
)
from official import one_thread as one_thread
from torch import Tensor, nn

from ddim_lab.analytic import GaussianMixtureEps
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule, spaced_timesteps

SCHEDULE = NoiseSchedule.linear()
STEPS = (10, 20, 50, 100, 1000)
ETAS = (0.0, 0.2, 0.5, 1.0)
SHAPE = (3, 2, 4, 4)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


MODEL = GaussianMixtureEps(SCHEDULE, normal(3, *SHAPE[1:], seed=9), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))


class Network(nn.Module):
    """A small fixed convolutional eps-network that uses its timestep."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t.to(x.dtype) / 1000)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return x + self.last(torch.tanh(self.first(torch.cat([x, level], dim=1))))


def with_our_alphas(scheduler: Any, dtype: torch.dtype, schedule: NoiseSchedule = SCHEDULE) -> Any:
    """In float64 the rival's tables are replaced by ours; in float32 it keeps its own."""
    if dtype == torch.float64:
        scheduler.alphas_cumprod = torch.tensor(schedule.alpha_bars)
        for one in ("final_alpha_cumprod", "initial_alpha_cumprod", "one"):
            if hasattr(scheduler, one):
                setattr(scheduler, one, torch.tensor(1.0, dtype=torch.float64))
    return scheduler


def make_ddim(dtype: torch.dtype, steps: int, spacing: str = "leading", clip: bool = False, **config: Any) -> Any:
    scheduler = DDIMScheduler(clip_sample=clip, set_alpha_to_one=True, timestep_spacing=spacing, **config)
    with_our_alphas(scheduler, dtype).set_timesteps(steps)
    return scheduler


def walk_ddim(
    scheduler: Any,
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    eta: float,
    noise: Replay,
    rederive: bool = False,
) -> Tensor:
    for t in scheduler.timesteps.tolist():
        z = noise.at(t) if eta > 0 else None
        eps = model(x, labels(t, x))
        x = scheduler.step(eps, t, x, eta=eta, use_clipped_model_output=rederive, variance_noise=z).prev_sample
    return x


# -- diffusers' DDIMScheduler ------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", ETAS)
def test_ddim_scheduler_leading(eta: float, steps: int, dtype: torch.dtype) -> None:
    x_T = normal(*SHAPE, dtype=dtype)
    noise = Replay(x_T)
    ours = Sampler(SCHEDULE, steps=steps, eta=eta).sample(MODEL, x_T, noise=noise)
    theirs = walk_ddim(make_ddim(dtype, steps), MODEL, x_T, eta, noise)
    assert ours.dtype == theirs.dtype == dtype
    assert relative_difference(ours, theirs) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_scheduler_with_a_network(eta: float, dtype: torch.dtype) -> None:
    x_T, model = normal(*SHAPE, dtype=dtype), Network().to(dtype).eval()
    with torch.no_grad():
        theirs = walk_ddim(make_ddim(dtype, 50), model, x_T, eta, Replay(x_T))
    ours = Sampler(SCHEDULE, steps=50, eta=eta).sample(model, x_T, noise=Replay(x_T))
    assert relative_difference(ours, theirs) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(("clip", "rederive"), [("x0", False), ("x0_eps", True)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_scheduler_clips_as_ours(eta: float, clip: str, rederive: bool, dtype: torch.dtype) -> None:
    """Its default is our `x0`, its use_clipped_model_output our `x0_eps`; they differ, and from `none`."""
    x_T = normal(*SHAPE, dtype=dtype)
    theirs = walk_ddim(make_ddim(dtype, 20, clip=True), MODEL, x_T, eta, Replay(x_T), rederive)
    images = {
        c: Sampler(SCHEDULE, steps=20, eta=eta, clip=c).sample(MODEL, x_T, noise=Replay(x_T))
        for c in ("none", "x0", "x0_eps")
    }
    assert relative_difference(images.pop(clip), theirs) <= TOLERANCE[dtype]
    assert all(relative_difference(other, theirs) > 1e-3 for other in images.values())


@DTYPES
@pytest.mark.parametrize(("name", "prediction"), [("sample", "x0"), ("v_prediction", "v")])
def test_ddim_scheduler_on_other_predictions(name: str, prediction: str, dtype: torch.dtype) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + 0.1

    x_T = normal(*SHAPE, dtype=dtype)
    theirs = walk_ddim(make_ddim(dtype, 20, prediction_type=name), model, x_T, 0.5, Replay(x_T))
    ours = Sampler(SCHEDULE, steps=20, eta=0.5, prediction=prediction).sample(model, x_T, noise=Replay(x_T))
    assert relative_difference(ours, theirs) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("steps", [10, 50, 250])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_scheduler_trailing_where_s_divides_t(eta: float, steps: int, dtype: torch.dtype) -> None:
    scheduler = make_ddim(dtype, steps, "trailing")
    assert scheduler.timesteps.tolist() == spaced_timesteps("trailing", steps)[::-1].tolist()
    x_T = normal(*SHAPE, dtype=dtype)
    theirs = walk_ddim(scheduler, MODEL, x_T, eta, Replay(x_T))
    ours = Sampler(SCHEDULE, steps=steps, eta=eta, spacing="trailing").sample(MODEL, x_T, noise=Replay(x_T))
    assert relative_difference(ours, theirs) <= TOLERANCE[dtype]


@DTYPES
def test_ddim_scheduler_linspace_where_it_is_right(dtype: torch.dtype) -> None:
    """Only at S = T, where linspace is every timestep and its t - T // S is the one before."""
    x_T = normal(*SHAPE, dtype=dtype)
    theirs = walk_ddim(make_ddim(dtype, 1000, "linspace"), MODEL, x_T, 0.0, Replay(x_T))
    ours = Sampler(SCHEDULE, steps=1000, spacing="linspace").sample(MODEL, x_T)
    assert relative_difference(ours, theirs) <= TOLERANCE[dtype]


def wrong_pairs(scheduler: DDIMScheduler, steps: int) -> int:
    """Steps that go from t to t - T // S, which is not the next timestep of its own list."""
    visited = [*scheduler.timesteps.tolist(), -1]
    return sum(max(t - 1000 // steps, -1) != after for t, after in pairwise(visited))


@pytest.mark.parametrize(("spacing", "steps", "wrong"), [("trailing", 13, 12), ("linspace", 10, 9), ("leading", 13, 0)])
def test_ddim_scheduler_takes_the_wrong_previous_step(spacing: str, steps: int, wrong: int) -> None:
    """Where S does not divide T (trailing), or at all (linspace), it leaves its own list; ours walks its pairs.

    Fed with our timesteps as if each were its own, the rest of the formulas agree: the pairs alone are at fault.
    """
    scheduler = make_ddim(torch.float64, steps, spacing)
    assert wrong_pairs(scheduler, steps) == wrong
    x_T, timesteps = normal(*SHAPE), scheduler.timesteps.tolist()
    ours = Sampler(SCHEDULE, timesteps=timesteps).sample(MODEL, x_T)
    theirs = walk_ddim(scheduler, MODEL, x_T, 0.0, Replay(x_T))
    if wrong == 0:
        assert relative_difference(ours, theirs) <= 1e-10
        return
    assert relative_difference(ours, theirs) > 1e-3
    # The same steps with the pairs it really takes reproduce it: (t, t - T // S), restarted at each t.
    x = x_T
    for t in timesteps:
        a, a_prev = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(max(t - 1000 // steps, -1))
        eps = MODEL(x, labels(t, x))
        x = math.sqrt(a_prev / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - a_prev) * eps
    assert relative_difference(x, theirs) <= 1e-10


def test_ddim_scheduler_leading_never_visits_the_top() -> None:
    """Its leading tops out at 897 for S = 300 (a stride of 3); our uniform at 996, whatever S."""
    assert int(make_ddim(torch.float32, 300).timesteps[0]) == 897
    assert spaced_timesteps("uniform", 300)[-1] == 996


def test_alpha_one_at_the_end_is_not_a_choice_here() -> None:
    """With set_alpha_to_one=False, as old configurations have it, diffusers stops at alpha_bar(0): noise is left."""
    x_T = normal(*SHAPE)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = torch.tensor(SCHEDULE.alpha_bars)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(10)
    theirs = walk_ddim(scheduler, MODEL, x_T, 0.0, Replay(x_T))
    *_, before, ours = Sampler(SCHEDULE, steps=10).trajectory(MODEL, x_T)
    assert relative_difference(theirs, ours) > 1e-5
    assert relative_difference(theirs, before) <= 1e-10  # its last step, from t = 0 to "alpha_bar(0)", moves nothing


# -- diffusers' DDPMScheduler ------------------------------------------------------------------------------------


def walk_ddpm(scheduler: DDPMScheduler, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The image, and the noise it drew at each timestep."""
    drawn = {}
    for t in scheduler.timesteps.tolist():
        x_before = x
        generator = torch.Generator().manual_seed(77 + t)
        x = scheduler.step(MODEL(x, labels(t, x)), t, x, generator=generator).prev_sample
        drawn[t] = torch.randn(x_before.shape, generator=torch.Generator().manual_seed(77 + t), dtype=x.dtype)
    return x, drawn


def make_ddpm(tables: torch.dtype, steps: int, variance: str, clip: bool, spacing: str) -> DDPMScheduler:
    scheduler = DDPMScheduler(variance_type=variance, clip_sample=clip, timestep_spacing=spacing)
    with_our_alphas(scheduler, tables).set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(
    ("dtype", "tables", "tolerance"),
    [
        # Its 1 - ab_t / ab_prev in float32 alone costs it 1.4e-5; ours, on float64 coefficients, keeps to 1e-5.
        pytest.param(torch.float32, torch.float32, 3e-5, id="float32"),
        pytest.param(torch.float32, torch.float64, 1e-5, id="float32-our-tables"),
        pytest.param(torch.float64, torch.float64, 1e-10, id="float64"),
    ],
)
@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small", "posterior"), ("fixed_large", "large")])
@pytest.mark.parametrize(("clip", "our_clip"), [(False, "none"), (True, "x0_eps")])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), ("leading", 100), ("linspace", 30)])
def test_ddpm_scheduler(
    spacing: str,
    steps: int,
    clip: bool,
    our_clip: str,
    theirs: str,
    ours: str,
    dtype: torch.dtype,
    tables: torch.dtype,
    tolerance: float,
) -> None:
    """It looks the previous timestep up in its list, so linspace is right here."""
    x_T = normal(*SHAPE, dtype=dtype)
    image, drawn = walk_ddpm(make_ddpm(tables, steps, theirs, clip, spacing), x_T)
    sampler = Sampler(
        SCHEDULE,
        steps=steps,
        eta=1.0,
        variance=ours,
        clip=our_clip,
        spacing={"leading": "uniform", "linspace": "linspace"}[spacing],
    )
    assert sampler.transitions[0].t == int(max(drawn))
    ours_image = sampler.sample(MODEL, x_T, noise=lambda indices, t, like: drawn[t])
    assert relative_difference(ours_image, image) <= tolerance


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small", "posterior"), ("fixed_large", "large")])
def test_ddpm_scheduler_over_all_timesteps(theirs: str, ours: str) -> None:
    x_T = normal(*SHAPE)
    image, drawn = walk_ddpm(make_ddpm(torch.float64, 1000, theirs, False, "leading"), x_T)
    sampler = Sampler(SCHEDULE, steps=1000, eta=1.0, variance=ours)
    assert relative_difference(sampler.sample(MODEL, x_T, noise=lambda indices, t, like: drawn[t]), image) <= 1e-10


def test_ddpm_scheduler_ends_noisy_on_a_list_without_0() -> None:
    """Trailing, sigma-hat: it masks the noise at t == 0, which is never visited; ours on the step to the image."""
    x_T = normal(*SHAPE)
    image, drawn = walk_ddpm(make_ddpm(torch.float64, 10, "fixed_large", False, "trailing"), x_T)
    sampler = Sampler(SCHEDULE, steps=10, eta=1.0, variance="large", spacing="trailing")
    ours = sampler.sample(MODEL, x_T, noise=lambda indices, t, like: drawn[t])
    left_over = math.sqrt(1.0 - SCHEDULE.alpha_bar(99))
    assert left_over == pytest.approx(0.3209, abs=5e-5)
    assert relative_difference(ours + left_over * drawn[99], image) <= 1e-10


# -- diffusers' DDIMInverseScheduler -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("theirs", "ours"), [("leading", "uniform"), ("trailing", "trailing")])
def test_inverse_scheduler_is_encode_at_target(theirs: str, ours: str, steps: int, dtype: torch.dtype) -> None:
    x_0 = 0.5 * normal(*SHAPE, dtype=dtype)
    scheduler = DDIMInverseScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing=theirs)
    with_our_alphas(scheduler, dtype).set_timesteps(steps)
    sampler, x = Sampler(SCHEDULE, steps=steps, spacing=ours), x_0
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(MODEL(x, labels(t, x)), t, x).prev_sample
    assert relative_difference(sampler.encode(MODEL, x_0, at="target"), x) <= TOLERANCE[dtype]
    if steps < 1000:
        assert relative_difference(sampler.encode(MODEL, x_0, at="source"), x) > 1e-4


# -- the official code's formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "quad"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [*ETAS, "sigma-hat"])
def test_official_formulas(eta: float | str, steps: int, kind: str) -> None:
    """Table 1's rows, in float64, on its own list: with the repeats that `quad` has, and (ours) without them."""
    x_T, sequence, model = normal(*SHAPE), official_sequence(kind, steps), Counting(MODEL)
    noise = Replay(x_T)
    if eta == "sigma-hat":
        theirs = official_sigma_hat(model, x_T, sequence, SCHEDULE.betas, noise.at)
        settings: dict[str, Any] = {"eta": 1.0, "variance": "large", "clip": "x0_eps"}
    else:
        theirs = official_ddim(model, x_T, sequence, SCHEDULE.betas, float(eta), noise.at)
        settings = {"eta": eta}
    named = Sampler(SCHEDULE, steps=steps, spacing={"uniform": "uniform", "quad": "quadratic"}[kind], **settings)
    ours = named.sample(MODEL, x_T, noise=noise)
    assert relative_difference(ours, theirs) <= 1e-10
    assert len(model.seen) == steps
    assert named.nfe == len(set(sequence))
    if named.nfe < steps:
        listed = Sampler(SCHEDULE, timesteps=sequence, **settings)
        assert listed.nfe == steps
        assert torch.equal(listed.sample(MODEL, x_T, noise=noise), ours)


# -- k-diffusion's ancestral Euler -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [(spacing, steps) for spacing in ("uniform", "quadratic", "trailing") for steps in (10, 20, 50, 100)]
    + [("uniform", 1000)],
)
@pytest.mark.parametrize("eta", ETAS)
def test_ancestral_euler_in_the_other_parametrisation(eta: float, steps: int, spacing: str) -> None:
    """Euler on x / sqrt(ab) over sqrt((1 - ab) / ab) is DDIM, and its sigma_up is sigma(eta) / sqrt(ab_prev)."""
    x_T = normal(*SHAPE)
    noise = Replay(x_T)
    sampler = Sampler(SCHEDULE, steps=steps, eta=eta, spacing=spacing)
    walk = [(transition.t, transition.t_prev) for transition in sampler.transitions]
    theirs = ancestral_euler(MODEL, x_T, walk, SCHEDULE.alpha_bar, eta, noise.at)
    assert relative_difference(sampler.sample(MODEL, x_T, noise=noise), theirs) <= 1e-10


# -- the whole in float32 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_float32_is_near_float64(eta: float, steps: int) -> None:
    """float32 state with float64 coefficients: a thousand steps lose no more than 1e-5 of max |x|."""
    single = normal(*SHAPE, dtype=torch.float32)
    sampler, noise = Sampler(SCHEDULE, steps=steps, eta=eta), Replay(single)
    in_double = sampler.sample(MODEL, single.double(), noise=lambda indices, t, like: noise.at(t).double())
    assert relative_difference(sampler.sample(MODEL, single, noise=noise), in_double) <= 1e-5
    assert np.isfinite(in_double.numpy()).all()
