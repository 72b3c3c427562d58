"""Whatever is valid gives finite images at the cost announced; whatever is not is refused before any work."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official import Counting, Replay, refuse
from official import one_thread as one_thread
from torch import Tensor

from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler, largest_eta
from ddim_lab.schedule import SPACINGS, NoiseSchedule, spaced_timesteps, timestep_pairs

PROFILE = settings(max_examples=150, deadline=None, derandomize=True)
CLIPS = ("none", "x0", "x0_eps")


@st.composite
def schedules(draw: st.DrawFn) -> NoiseSchedule:
    total = draw(st.integers(1, 80))
    kind = draw(st.sampled_from(["linear", "scaled_linear", "sigmoid", "constant", "cosine", "any"]))
    if kind == "any":
        exponents = draw(st.lists(st.floats(-12.0, -0.5), min_size=1, max_size=30))
        return NoiseSchedule([10.0**exponent for exponent in exponents])
    if kind == "cosine":
        return NoiseSchedule.cosine(total)
    end = draw(st.floats(1e-3, 0.5))
    if kind == "constant":
        return NoiseSchedule.constant(total, end)
    return getattr(NoiseSchedule, kind)(total, draw(st.floats(1e-6, 1e-3)), end)


@st.composite
def samplers(draw: st.DrawFn, deterministic: bool = False) -> Sampler:
    """Any valid sampler, eta up to its bound."""
    schedule = draw(schedules())
    total = schedule.num_timesteps
    where: dict[str, Any]
    if draw(st.booleans()):
        where = {"steps": draw(st.integers(1, total)), "spacing": draw(st.sampled_from(sorted(SPACINGS)))}
        timesteps = spaced_timesteps(where["spacing"], where["steps"], schedule).tolist()
    else:
        timesteps = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=12).map(sorted))
        where = {"timesteps": draw(st.sampled_from([timesteps, timesteps[::-1]]))}
    variance = "posterior" if deterministic else draw(st.sampled_from(["posterior", "large"]))
    limit = min(largest_eta(schedule, timestep_pairs(timesteps, total)), 5.0)
    eta = (
        0.0
        if deterministic
        else 1.0
        if variance == "large"
        else draw(st.sampled_from([0.0, 1.0, limit]) | st.floats(0, limit))
    )
    return Sampler(
        schedule,
        eta=eta,
        variance=variance,
        clip=draw(st.sampled_from(CLIPS)),
        prediction=draw(st.sampled_from(["eps", "x0", "v"])),
        **where,
    )


@PROFILE
@given(samplers(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**64 - 1))
def test_any_valid_sampler_gives_finite_images_at_the_announced_cost(
    sampler: Sampler, dtype: torch.dtype, seed: int
) -> None:
    model = Counting(lambda x, t: torch.tanh(x))
    x_T = NamedNoise(seed).initial(torch.arange(2), torch.zeros(2, 3, dtype=dtype))
    x_0 = sampler.sample(model, x_T, seed=seed)
    assert x_0.dtype == dtype
    assert bool(torch.isfinite(x_0).all())
    assert len(model.seen) == sampler.nfe <= sampler.steps
    assert model.seen == sorted(model.seen, reverse=True)


@PROFILE
@given(samplers())
def test_sigma_in_the_mean_is_bounded(sampler: Sampler) -> None:
    for transition in sampler.transitions:
        assert 0.0 <= transition.sigma**2 <= (1.0 - transition.alpha_bar_prev) * (1.0 + 1e-12)
        assert transition.noise_std >= 0.0
        assert all(math.isfinite(value) for value in (transition.sigma, transition.noise_std))
        if sampler.variance == "posterior":
            assert transition.noise_std == transition.sigma
    assert sampler.transitions[-1].noise_std == 0.0


@PROFILE
@given(samplers(deterministic=True))
def test_nothing_is_drawn_at_eta_0(sampler: Sampler) -> None:
    state = torch.get_rng_state()
    sampler.sample(lambda x, t: 0.5 * x, torch.ones(1, 2), noise=refuse)
    assert torch.equal(torch.get_rng_state(), state)


@PROFILE
@given(st.data())
def test_repeats_change_nothing(data: st.DataObject) -> None:
    """Bitwise, for clip none and x0_eps; they cost their forwards."""
    schedule = NoiseSchedule.linear(60, 1e-3, 0.2)
    timesteps = sorted(data.draw(st.sets(st.integers(0, 59), min_size=1, max_size=8)))
    counts = data.draw(st.lists(st.integers(1, 3), min_size=len(timesteps), max_size=len(timesteps)))
    repeated = [t for t, count in zip(timesteps, counts, strict=True) for _ in range(count)]
    arguments: dict[str, Any] = {
        "eta": data.draw(st.sampled_from([0.0, 0.4, 1.0])),
        "clip": data.draw(st.sampled_from(["none", "x0_eps"])),
        "prediction": data.draw(st.sampled_from(["eps", "x0", "v"])),
    }
    x_T = NamedNoise(3).initial(torch.arange(2), torch.zeros(2, 5))

    def walk(visited: list[int]) -> tuple[Tensor, int]:
        sampler = Sampler(schedule, timesteps=visited, **arguments)
        return sampler.sample(lambda x, t: torch.sin(3 * x), x_T, noise=Replay(x_T)), sampler.nfe

    (once, nfe), (often, more) = walk(timesteps), walk(repeated)
    assert torch.equal(once, often)
    assert (nfe, more) == (len(timesteps), sum(counts))


INVALID: list[dict[str, Any]] = [
    *({"steps": steps} for steps in (0, -3, 1001, 10.5, math.nan, math.inf, "abc", None, True)),
    *({"eta": eta} for eta in (-1.0, -1e-9, math.nan, math.inf, -math.inf, 2.0)),
    *({"eta": eta, "variance": "large"} for eta in (0.0, 0.5, 1.0000001)),
    *({"timesteps": ts} for ts in ([], [1000], [-1], [5, 3, 4], [1.5, 0.5, 1], [999.5], [math.nan], [math.inf])),
    {"variance": "medium"},
    {"spacing": "cubic"},
    {"clip": "yes"},
    {"clip": True},
    {"prediction": "epsilon"},
]


@pytest.mark.parametrize("arguments", INVALID, ids=str)
def test_the_invalid_is_refused_at_construction(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Sampler(NoiseSchedule.linear(), **arguments)


@PROFILE
@given(
    schedules(), st.floats(allow_nan=True, allow_infinity=True), st.integers(-5, 120), st.sampled_from(sorted(SPACINGS))
)
def test_no_eta_and_no_step_count_gives_nan(schedule: NoiseSchedule, eta: float, steps: int, spacing: str) -> None:
    """Either a ValueError or finite numbers: there is no third outcome."""
    valid = 1 <= steps <= schedule.num_timesteps and math.isfinite(eta) and eta >= 0
    if valid:
        pairs = timestep_pairs(spaced_timesteps(spacing, steps, schedule), schedule.num_timesteps)
        valid = eta <= largest_eta(schedule, pairs)
    if not valid:
        with pytest.raises(ValueError, match=r"eta|steps"):
            Sampler(schedule, steps=steps, eta=eta, spacing=spacing)
        return
    x_0 = Sampler(schedule, steps=steps, eta=eta, spacing=spacing).sample(lambda x, t: 0.1 * x, torch.ones(1, 2))
    assert bool(torch.isfinite(x_0).all())


@PROFILE
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1), max_size=12))
def test_no_betas_give_nan(betas: list[float]) -> None:
    try:
        schedule = NoiseSchedule(betas)
    except ValueError:
        return
    assert (schedule.alpha_bars > 0).all()
    assert (np.diff([1.0, *schedule.alpha_bars]) < 0).all()
    assert largest_eta(schedule, timestep_pairs(range(len(betas)), len(betas))) >= 1.0
    x_0 = Sampler(schedule, steps=len(betas), eta=1.0).sample(
        lambda x, t: torch.zeros_like(x), torch.ones(1, 2).double()
    )
    assert bool(torch.isfinite(x_0).all())
