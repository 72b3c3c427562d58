"""The sampler family against the papers: one step, the whole walk, its moments, the traps, and the interface."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from official import Counting, Replay, ddpm_posterior, labels, refuse, relative_difference
from official import one_thread as one_thread
from torch import Tensor, nn

from ddim_lab.analytic import GaussianEps, GaussianMixtureEps
from ddim_lab.noise import INITIAL, NamedNoise
from ddim_lab.sampler import Ddim, Draw, Formula, Predict, Sampler, State, Transition, largest_eta, sigma, step
from ddim_lab.schedule import (
    CLEAN,
    LEVEL_SPACINGS,
    SPACINGS,
    WHOLE_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
    timestep_pairs,
)

SCHEDULE = NoiseSchedule.linear()
ETAS = (0.0, 0.2, 0.5, 1.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture() -> GaussianMixtureEps:
    return GaussianMixtureEps(SCHEDULE, normal(3, 2, 4, 4, seed=9), torch.tensor([0.05, 0.1, 0.3], dtype=torch.float64))


def pairs(spacing: str, steps: int) -> tuple[tuple[float, float], ...]:
    return timestep_pairs(spaced_timesteps(spacing, steps, SCHEDULE), 1000)


# -- the numbers of a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "t_prev", "variance"), [(420, 400, 0.14771), (980, 960, 0.32460)])
def test_sigma_goldens(t: int, t_prev: int, variance: float) -> None:
    """The variances that diffusers pins for these steps."""
    value = sigma(1.0, SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev))
    assert value**2 == pytest.approx(variance, abs=1.2e-5)


def test_eta_scales_the_standard_deviation() -> None:
    ab, ab_prev = SCHEDULE.alpha_bar(500), SCHEDULE.alpha_bar(480)
    assert sigma(0.5, ab, ab_prev) == pytest.approx(0.5 * sigma(1.0, ab, ab_prev), rel=1e-15)
    assert sigma(1.0, ab, ab_prev) ** 2 == pytest.approx(ddpm_posterior(ab, ab_prev)[2], rel=1e-12)
    assert sigma(1.0, SCHEDULE.alpha_bar(0), 1.0) == 0.0


@pytest.mark.parametrize(("steps", "limit"), [(10, 1.0004), (20, 1.0016), (50, 1.0080), (100, 1.0235), (1000, 1.3541)])
def test_the_largest_eta_is_named_and_works(steps: int, limit: float) -> None:
    """Beyond it the official formula takes the root of a negative number and every image is NaN."""
    assert math.floor(largest_eta(SCHEDULE, pairs("uniform", steps)) * 1e4) / 1e4 == limit
    x_T = normal(2, 3)
    x_0 = Sampler(SCHEDULE, steps=steps, eta=limit).sample(lambda x, t: 0.9 * x, x_T, noise=Replay(x_T))
    assert bool(torch.isfinite(x_0).all())
    with pytest.raises(ValueError, match=f"largest valid eta is {limit:.4f}"):
        Sampler(SCHEDULE, steps=steps, eta=limit + 1e-4)


def test_eta_at_its_exact_bound_leaves_no_eps_in_one_step() -> None:
    limit = largest_eta(SCHEDULE, pairs("uniform", 10))
    transitions = Sampler(SCHEDULE, steps=10, eta=limit).transitions
    slack = [1.0 - transition.alpha_bar_prev - transition.sigma**2 for transition in transitions[:-1]]
    assert min(slack) == pytest.approx(0.0, abs=1e-12)
    assert largest_eta(SCHEDULE, [(999, CLEAN)]) == math.inf


def test_sigma_hat_is_large_where_the_image_is_nearly_done() -> None:
    """S = 10, from t = 100 to 0: 0.3237 of noise where the posterior has 0.0100. Hence FID 367 in Table 1."""
    hat = Sampler(SCHEDULE, steps=10, eta=1.0, variance="large").transitions
    posterior = Sampler(SCHEDULE, steps=10, eta=1.0).transitions
    assert (hat[-2].t, hat[-2].t_prev) == (100, 0)
    assert hat[-2].noise_std == pytest.approx(0.3237, abs=5e-5)
    assert posterior[-2].noise_std == pytest.approx(0.0100, abs=5e-5)
    for a, b in zip(hat, posterior, strict=True):
        assert a.sigma == b.sigma  # the mean is that of eta = 1
        if a.t_prev != CLEAN:
            assert a.noise_std == pytest.approx(math.sqrt(1 - a.alpha_bar / a.alpha_bar_prev), rel=1e-15)
            assert a.noise_std > b.noise_std == b.sigma


def test_sigma_hat_over_all_timesteps_is_sqrt_beta() -> None:
    transitions = Sampler(SCHEDULE, steps=1000, eta=1.0, variance="large").transitions
    for transition in transitions[:-1]:
        assert transition.noise_std**2 == pytest.approx(SCHEDULE.betas[transition.t], rel=1e-10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["posterior", "large"])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_last_step_adds_no_noise(spacing: str, variance: str, steps: int) -> None:
    """Also where the list does not contain 0: masking on t == 0, as the official code does, would end noisy."""
    last = Sampler(SCHEDULE, steps=steps, eta=1.0, variance=variance, spacing=spacing).transitions[-1]
    assert last.t_prev == CLEAN
    assert last.alpha_bar_prev == 1.0
    assert last.sigma == last.noise_std == 0.0


# -- one step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 10, 300, 1000])
def test_eta_1_is_the_ddpm_posterior_step(spacing: str, steps: int) -> None:
    """Ho et al. Eq. 7 over skips, each step from the same state: mean and variance to 1e-12.

    A thousand levels that are even in logSNR lie so close at the image that Eq. 7 itself loses a digit.
    """
    to = 1e-11 if spacing in LEVEL_SPACINGS and steps == 1000 else 1e-12
    x_0, eps, z = normal(16), normal(16, seed=1), normal(16, seed=2)
    for transition in Sampler(SCHEDULE, steps=steps, eta=1.0, spacing=spacing).transitions:
        x_t = math.sqrt(transition.alpha_bar) * x_0 + math.sqrt(1 - transition.alpha_bar) * eps
        of_x0, of_xt, variance = ddpm_posterior(transition.alpha_bar, transition.alpha_bar_prev)
        expected = of_x0 * x_0 + of_xt * x_t
        assert float((step(transition, x_t, eps, torch.zeros(16)) - expected).abs().max()) < to
        assert float((step(transition, x_t, eps, z) - expected - math.sqrt(variance) * z).abs().max()) < to


def test_sigma_hat_step_is_the_posterior_mean_of_the_clamped_image() -> None:
    """`large` with `x0_eps`, the official code's ddpm_noisy: clamp x_0, posterior mean, std sqrt(beta)."""
    x_t, eps, z = 2 * normal(64), normal(64, seed=1), normal(64, seed=2)
    clamped = 0
    for transition in Sampler(SCHEDULE, steps=20, eta=1.0, variance="large", clip="x0_eps").transitions:
        x_0 = (x_t - math.sqrt(1 - transition.alpha_bar) * eps) / math.sqrt(transition.alpha_bar)
        clamped += int((x_0.abs() > 1).sum())
        of_x0, of_xt, _ = ddpm_posterior(transition.alpha_bar, transition.alpha_bar_prev)
        std = 0.0 if transition.t_prev == CLEAN else math.sqrt(1 - transition.alpha_bar / transition.alpha_bar_prev)
        expected = of_x0 * x_0.clamp(-1, 1) + of_xt * x_t + std * z
        assert float((step(transition, x_t, eps, z, clip="x0_eps") - expected).abs().max()) < 1e-12
    assert clamped > 200


@pytest.mark.parametrize("eta", ETAS)
def test_each_clip_is_its_definition(eta: float) -> None:
    """`x0` clamps and keeps eps, `x0_eps` keeps (x_0, eps) fitting x_t: the seed text's fault is the former."""
    x_t, eps, z = 2 * normal(64), normal(64, seed=1), normal(64, seed=2)
    for transition in Sampler(SCHEDULE, steps=10, eta=eta).transitions:
        signal, noise = math.sqrt(transition.alpha_bar), math.sqrt(1 - transition.alpha_bar)
        direction = math.sqrt(1 - transition.alpha_bar_prev - transition.sigma**2)
        free = (x_t - noise * eps) / signal
        clamped = free.clamp(-1, 1)
        rederived = (x_t - signal * clamped) / noise
        for clip, x_0, e in (("none", free, eps), ("x0", clamped, eps), ("x0_eps", clamped, rederived)):
            expected = math.sqrt(transition.alpha_bar_prev) * x_0 + direction * e + transition.noise_std * z
            assert float((step(transition, x_t, eps, z, clip=clip) - expected).abs().max()) < 1e-11
    inside = 0.01 * x_t
    quiet = Sampler(SCHEDULE, steps=10, eta=eta).transitions[-3]
    assert torch.allclose(step(quiet, inside, 0 * eps, z, "x0"), step(quiet, inside, 0 * eps, z), atol=1e-14)


def test_a_noisy_step_asks_for_its_noise() -> None:
    transition = Sampler(SCHEDULE, steps=10, eta=1.0).transitions[0]
    with pytest.raises(ValueError, match="t=900 adds noise"):
        step(transition, normal(2), normal(2))


@pytest.mark.parametrize("clip", ["none", "x0_eps"])
@pytest.mark.parametrize(("eta", "variance"), [(0.0, "posterior"), (0.5, "posterior"), (1.0, "large")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_repeated_timestep_moves_nothing(clip: str, eta: float, variance: str, dtype: torch.dtype) -> None:
    """Bitwise, and it draws nothing: one forward more, the same image."""
    x_T, model = normal(3, 2, 4, 4, dtype=dtype), mixture()
    once = Sampler(SCHEDULE, timesteps=[0, 300, 999], eta=eta, variance=variance, clip=clip)
    often = Sampler(SCHEDULE, timesteps=[0, 0, 0, 300, 300, 999, 999], eta=eta, variance=variance, clip=clip)
    calm, busy = Replay(x_T), Replay(x_T)
    assert torch.equal(once.sample(model, x_T, noise=calm), often.sample(model, x_T, noise=busy))
    assert calm.asked == busy.asked == ([] if eta == 0 else [999, 300])
    assert (once.nfe, often.nfe, often.steps) == (3, 7, 7)


# -- the walk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 100, 300])
def test_the_model_sees_each_timestep_once_from_noise_to_image(spacing: str, steps: int) -> None:
    sampler, model = Sampler(SCHEDULE, steps=steps, spacing=spacing), Counting(lambda x, t: 0.5 * x)
    sampler.sample(model, normal(2, 3))
    assert model.seen == spaced_timesteps(spacing, steps, SCHEDULE)[::-1].tolist()
    whole = spacing in WHOLE_SPACINGS or steps == 1
    assert (model.dtype, sampler.whole) == (torch.int64 if whole else torch.float32, whole)
    assert len(model.seen) == sampler.nfe
    assert sampler.steps == steps
    assert [transition.alpha_bar_prev for transition in sampler.transitions] == [
        SCHEDULE.alpha_bar(t) for t in [*model.seen[1:], CLEAN]
    ]


@pytest.mark.parametrize("given", [[999, 500, 1], [1, 500, 999]])
def test_custom_timesteps(given: list[int]) -> None:
    sampler = Sampler(SCHEDULE, timesteps=given)
    assert [(transition.t, transition.t_prev) for transition in sampler.transitions] == [
        (999, 500),
        (500, 1),
        (1, CLEAN),
    ]
    assert (sampler.steps, sampler.nfe, sampler.spacing) == (3, 3, "custom")


def test_eta_0_draws_nothing() -> None:
    state = torch.get_rng_state()
    for clip in ("none", "x0", "x0_eps"):
        sampler = Sampler(SCHEDULE, steps=20, clip=clip)
        x_T = normal(2, 2, 4, 4)
        assert torch.equal(sampler.sample(mixture(), x_T, noise=refuse), sampler.sample(mixture(), x_T, seed=5))
    assert Sampler(SCHEDULE, steps=1, eta=1.0).transitions[0].noise_std == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_asked_for_by_name_at_every_step_but_the_last() -> None:
    x_T, asked = normal(2, 3), []

    def noise(indices: Tensor, t: int, like: Tensor) -> Tensor:
        asked.append((indices.tolist(), t, like.dtype))
        return torch.zeros_like(like)

    Sampler(SCHEDULE, steps=5, eta=0.3).sample(lambda x, t: x, x_T, indices=torch.tensor([7, 3]), noise=noise)
    assert asked == [([7, 3], t, torch.float64) for t in (800, 600, 400, 200)]


def test_a_sample_is_its_name_whatever_the_batch() -> None:
    """Same seed and index: the same image to rounding alone, in a batch, in any order; another seed gives another."""
    sampler, model = Sampler(SCHEDULE, steps=10, eta=1.0), mixture()
    indices = torch.arange(8)
    x_T = NamedNoise(1).initial(indices, torch.zeros(8, 2, 4, 4, dtype=torch.float64))
    together = sampler.sample(model, x_T, seed=1)
    for order in (torch.tensor([3]), torch.tensor([6, 0, 2])):
        assert torch.allclose(sampler.sample(model, x_T[order], seed=1, indices=order), together[order], atol=1e-12)
    assert torch.equal(sampler.sample(model, x_T, seed=1, indices=indices, noise=NamedNoise(1)), together)
    assert float((sampler.sample(model, x_T, seed=2) - together).abs().max()) > 0.1
    assert torch.equal(x_T, NamedNoise(1)(indices, INITIAL, x_T))


def test_every_sampler_starts_from_the_same_x_T() -> None:
    """The seed text says so, and draws a new one each run."""
    x_T = normal(2, 2, 4, 4)
    for eta in ETAS:
        sampler = Sampler(SCHEDULE, steps=20, eta=eta)
        assert torch.equal(next(sampler.trajectory(mixture(), x_T)), x_T)


def test_variance_across_noise_at_a_fixed_x_T() -> None:
    """Exact, for data N(0, 1/4) and S = 20: 0 at eta 0, then growing; at eta 1 a little below eta 3/4 again.

    x_T is forgotten by then, and what is left is the total variance, which few DDPM steps make too small (0.153 of
    0.25; DDIM 0.188).
    """
    spreads = []
    for eta in (0.0, 0.25, 0.5, 0.75, 1.0):
        sampler = Sampler(SCHEDULE, steps=20, eta=eta)
        noisy = [transition.t for transition in sampler.transitions if transition.noise_std > 0]

        def unit_noise(indices: Tensor, t: int, like: Tensor, noisy: list[int] = noisy) -> Tensor:
            return (indices == noisy.index(t)).to(like.dtype)[:, None]

        starts = torch.full((20, 1), 0.8, dtype=torch.float64)  # the last row's noise is 0 at every step
        x_0 = sampler.sample(GaussianEps(SCHEDULE, 0.0, 0.25), starts, noise=unit_noise)
        spreads.append(float((x_0 - x_0[-1]).square().sum()))
    assert spreads[0] == 0.0
    assert spreads == pytest.approx([0.0, 0.06950, 0.15559, 0.16995, 0.15324], abs=1e-5)


@pytest.mark.parametrize("clip", ["none", "x0", "x0_eps"])
def test_the_walk_tells_what_sample_does(clip: str) -> None:
    sampler, x_T, model = Sampler(SCHEDULE, steps=6, eta=0.7, clip=clip), normal(2, 2, 4, 4), mixture()
    states = list(sampler.walk(model, x_T, seed=4))
    assert [state.t for state in states] == [*[transition.t for transition in sampler.transitions], CLEAN]
    assert torch.equal(states[0].x, x_T)
    assert torch.equal(states[-1].x, sampler.sample(model, x_T, seed=4))
    alone = sampler.trajectory(model, x_T, seed=4)
    assert all(torch.equal(state.x, x) for state, x in zip(states, alone, strict=True))
    assert states[0].x0 is None
    assert torch.allclose(states[-1].x, states[-1].x0, atol=1e-12)  # the last step goes to the predicted image
    for before, after in pairwise(states):
        ab = SCHEDULE.alpha_bar(before.t)
        eps = model(before.x, labels(before.t, before.x))
        x_0 = (before.x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        assert torch.allclose(after.x0, x_0 if clip == "none" else x_0.clamp(-1, 1), atol=1e-12)


def test_sample_is_the_loop_over_step_to_the_last_bit() -> None:
    """Written out: what the walk adds around `step` changes nothing."""
    x_T, model, indices = normal(3, 2, 4, 4, dtype=torch.float32), mixture(), torch.arange(3)
    for eta, variance, clip in ((0.0, "posterior", "none"), (0.6, "posterior", "x0"), (1.0, "large", "x0_eps")):
        sampler = Sampler(SCHEDULE, steps=12, eta=eta, variance=variance, clip=clip)
        x = x_T
        for transition in sampler.transitions:
            z = NamedNoise(5)(indices, transition.t, x) if transition.noise_std > 0 else None
            x = step(transition, x, model(x, labels(transition.t, x)), z, clip)
        assert torch.equal(sampler.sample(model, x_T, seed=5), x)
        assert torch.equal(
            Sampler(SCHEDULE, steps=12, eta=eta, variance=variance, formula=Ddim(clip)).sample(model, x_T, seed=5), x
        )


def test_the_walk_is_lazy_and_leaves_the_caller_its_gradients() -> None:
    model = Counting(lambda x, t: 0.5 * x)
    sampler, x_T = Sampler(SCHEDULE, steps=5), normal(1, 2).requires_grad_()
    for walk in (sampler.walk(model, x_T), sampler.trajectory(model, x_T)):
        model.seen.clear()
        next(walk)
        assert model.seen == []
        state = next(walk)
        assert not getattr(state, "x", state).requires_grad
        assert not getattr(state, "x0", state).requires_grad
        assert model.seen == [800]
        assert torch.is_grad_enabled()


def test_sampling_keeps_no_state_but_the_one_it_is_at() -> None:
    """A past state and its eps would be memory that every forward stands beside."""
    given: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        alive.append(sum(past() is not None for past in given))
        given.append(weakref.ref(x))
        return 0.5 * x

    Sampler(SCHEDULE, steps=6, eta=1.0).sample(model, normal(2, 3))
    assert alive == [0, 1, 1, 1, 1, 1]  # x_T alone, which is the caller's
    given.clear(), alive.clear()
    for _ in Sampler(SCHEDULE, steps=6, eta=1.0).trajectory(model, normal(2, 3)):
        pass
    assert max(alive) == 1


# -- formulas of one's own -----------------------------------------------------------------------------------------


class Ancestral(Formula):
    """k-diffusion's Euler with ancestral noise: y = x / sqrt(ab) has noise of level s = sqrt((1 - ab) / ab).

    Down to s_down, then up by s_up, where s_down^2 + s_up^2 = s_to^2.
    """

    def __init__(self, eta: float) -> None:
        self.eta = eta

    def levels(self, transition: Transition) -> tuple[float, float, float]:
        s_from, s_to = (math.sqrt((1 - ab) / ab) for ab in (transition.alpha_bar, transition.alpha_bar_prev))
        s_up = min(s_to, self.eta * math.sqrt(s_to**2 * (s_from**2 - s_to**2) / s_from**2))
        return s_from, math.sqrt(s_to**2 - s_up**2), s_up

    def noise_std(self, transition: Transition) -> float:
        return self.levels(transition)[2]

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        s_from, s_down, s_up = self.levels(transition)
        y = x_t / math.sqrt(transition.alpha_bar) + eps * (s_down - s_from)
        return math.sqrt(transition.alpha_bar_prev) * (y if z is None else y + s_up * z)

    def recipe(self) -> dict[str, Any]:
        return {"name": "ancestral", "eta": self.eta}


@pytest.mark.parametrize("eta", ETAS)
def test_a_formula_of_ones_own_has_noise_states_and_a_key(eta: float) -> None:
    """Ancestral Euler is DDIM at that eta; it is asked for its own noise, whatever the transitions say."""
    x_T, model, ours = normal(2, 2, 4, 4), mixture(), Sampler(SCHEDULE, steps=20, eta=eta)
    theirs = Sampler(SCHEDULE, steps=20, formula=Ancestral(eta))
    asked, expected = Replay(x_T), Replay(x_T)
    states = list(theirs.walk(model, x_T, noise=asked))
    assert relative_difference(states[-1].x, ours.sample(model, x_T, noise=expected)) < 1e-12
    assert asked.asked == expected.asked
    for one, other in zip(states[1:], [*ours.walk(model, x_T, noise=Replay(x_T))][1:], strict=True):
        assert torch.allclose(one.x0, other.x0, rtol=0, atol=1e-9)
    assert theirs.recipe() == {**Sampler(SCHEDULE, steps=20).recipe(), "formula": {"name": "ancestral", "eta": eta}}
    assert "formula" not in ours.recipe()
    assert f"formula=Ancestral(eta={eta})" in repr(theirs)


class Heun(Formula):
    """Second order: eps is averaged over a DDIM step's two ends; at the clean end there is none, and eps stays."""

    def step(self, transition: Transition, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
        return step(transition, x_t, eps)

    def nfe(self, transitions: Sequence[Transition]) -> int:
        return 2 * len(transitions) - 1

    def walk(self, predict: Predict, x_T: Tensor, transitions: Sequence[Transition], draw: Draw) -> Iterator[State]:
        x = x_T
        yield State(transitions[0].t, x)
        for transition in transitions:
            eps = predict(x, transition.t)
            if transition.t_prev != CLEAN:
                eps = (eps + predict(self.step(transition, x, eps, None), transition.t_prev)) / 2
            x = self.step(transition, x, eps, None)
            yield State(transition.t_prev, x)

    def recipe(self) -> dict[str, Any]:
        return {"name": "heun"}


def test_a_formula_may_evaluate_as_often_as_it_likes() -> None:
    """Its forwards are counted, and the order it is made for shows: DDIM's error halves with the step, Heun's quarters.

    The error is that of the walk down to t = 100, so that the last step, which is of first order, has no part in it.
    """
    x_T, model = normal(4, 2, 4, 4), Counting(GaussianEps(SCHEDULE, 0.3, 0.25))

    def at_100(steps: int, formula: Formula | None) -> Tensor:
        sampler = Sampler(SCHEDULE, timesteps=[100 + 800 * k // steps for k in range(steps + 1)], formula=formula)
        model.seen.clear()
        *_, state, _ = sampler.walk(model, x_T)
        assert state.t == 100
        assert len(model.seen) == sampler.nfe == (steps + 1 if formula is None else 2 * steps + 1)
        return state.x

    exact = at_100(800, Heun())
    for formula, factor in ((None, 2.0), (Heun(), 4.0)):
        coarse, fine = (float((at_100(steps, formula) - exact).square().mean().sqrt()) for steps in (20, 40))
        assert coarse / fine == pytest.approx(factor, rel=0.2)


def test_a_formula_is_refused_what_only_the_default_one_has() -> None:
    with pytest.raises(ValueError, match="clip=x0 is for the default formula"):
        Sampler(SCHEDULE, steps=5, clip="x0", formula=Ancestral(0.0))
    with pytest.raises(ValueError, match="this sampler steps by Heun"):
        Sampler(SCHEDULE, steps=5, formula=Heun()).encode(mixture(), normal(1, 2, 4, 4))
    with pytest.raises(ValueError, match="clip must be 'none', got 'x0'"):
        Sampler(SCHEDULE, steps=5, formula=Ddim("x0")).encode(mixture(), normal(1, 2, 4, 4))


# -- marginals, exactly --------------------------------------------------------------------------------------------


ROTATION = torch.linalg.qr(normal(3, 3, seed=21))[0]
DATA_MEAN = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64)
DATA_VARIANCES = torch.tensor([0.02, 0.4, 1.7], dtype=torch.float64)


def correlated_eps(x: Tensor, t: Tensor) -> Tensor:
    """The exact eps of N(m, Q diag(v) Q^T): the diagonal one in the rotated frame."""
    return GaussianEps(SCHEDULE, DATA_MEAN @ ROTATION, DATA_VARIANCES)(x @ ROTATION, t) @ ROTATION.T


def exact_marginal(
    walk: tuple[tuple[int, int], ...], eta: float, variance: str, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance after the walk, by the linear-Gaussian recursion with the Kalman gain of x_0 given x_t."""
    identity, data = torch.eye(3, dtype=torch.float64), ROTATION @ DATA_VARIANCES.diag() @ ROTATION.T
    for t, t_prev in walk:
        a, a_prev = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(t_prev)
        posterior = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        gain = math.sqrt(a) * data @ torch.linalg.inv(a * data + (1 - a) * identity)
        # E[x_0 | x] = m + gain (x - sqrt(a) m), the eps that fits it, and the step
        x0_matrix, x0_shift = gain, DATA_MEAN - math.sqrt(a) * gain @ DATA_MEAN
        eps_matrix, eps_shift = (
            (identity - math.sqrt(a) * x0_matrix) / math.sqrt(1 - a),
            -math.sqrt(a / (1 - a)) * x0_shift,
        )
        along = math.sqrt(1 - a_prev - eta**2 * posterior)
        matrix = math.sqrt(a_prev) * x0_matrix + along * eps_matrix
        shift = math.sqrt(a_prev) * x0_shift + along * eps_shift
        added = eta**2 * posterior
        if variance == "large":
            added = 0.0 if t_prev == CLEAN else 1 - a / a_prev
        mean = matrix @ mean + shift
        covariance = matrix @ covariance @ matrix.T + added * identity
    return mean, covariance


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("eta", "variance"), [*[(eta, "posterior") for eta in (*ETAS, 1.0001)], (1.0, "large")], ids=str
)
def test_mean_and_covariance_are_those_of_the_exact_recursion(spacing: str, eta: float, variance: str) -> None:
    """The walk is affine in (x_T, noises): unit vectors give its matrices, hence its exact moments."""
    sampler = Sampler(SCHEDULE, steps=10, eta=eta, variance=variance, spacing=spacing)
    noisy = [transition.t for transition in sampler.transitions if transition.noise_std > 0]
    starts = torch.zeros(1 + 3 + 3 * len(noisy), 3, dtype=torch.float64)
    starts[1:4] = torch.eye(3)

    def unit_noise(indices: Tensor, t: int, like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        row = 4 + 3 * noisy.index(t)
        z[row : row + 3] = torch.eye(3)
        return z

    ends = sampler.sample(correlated_eps, starts, noise=unit_noise)
    mean, responses = ends[0], ends[1:] - ends[0]
    covariance = responses.T @ responses
    walk = tuple((transition.t, transition.t_prev) for transition in sampler.transitions)
    start_mean, start_covariance = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    exact_mean, exact_covariance = exact_marginal(walk, eta, variance, start_mean, start_covariance)
    assert torch.allclose(mean, exact_mean, rtol=0, atol=1e-11)
    assert torch.allclose(covariance, exact_covariance, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eta", ETAS)
def test_enough_steps_give_the_data_distribution(eta: float) -> None:
    """The recursion itself, for S = 1000: every eta ends at the data's mean and covariance."""
    mean, covariance = exact_marginal(
        pairs("uniform", 1000), eta, "posterior", torch.zeros(3).double(), torch.eye(3).double()
    )
    data = ROTATION @ DATA_VARIANCES.diag() @ ROTATION.T
    assert torch.allclose(mean, DATA_MEAN, atol=0.01)
    assert torch.allclose(covariance, data, atol=0.02)


# -- encoding ------------------------------------------------------------------------------------------------------


def test_encode_evaluates_at_the_source_or_the_target() -> None:
    """S forwards each way; the source is clamped at 0: a model was never trained on t = -1."""
    sampler, model = Sampler(SCHEDULE, steps=5), Counting(mixture())
    x_0 = normal(2, 2, 4, 4)
    sampler.encode(model, x_0)
    assert model.seen == [0, 0, 200, 400, 600]
    model.seen.clear()
    sampler.encode(model, x_0, at="target")
    assert model.seen == [0, 200, 400, 600, 800]


@pytest.mark.parametrize("at", ["source", "target"])
def test_encode_is_its_formula(at: str) -> None:
    sampler, model, x = Sampler(SCHEDULE, steps=10), mixture(), normal(2, 2, 4, 4)
    encoded = sampler.encode(model, x, at=at)
    for transition in reversed(sampler.transitions):
        t = max(transition.t_prev, 0) if at == "source" else transition.t
        eps = model(x, labels(t, x))
        x_0 = (x - math.sqrt(1 - transition.alpha_bar_prev) * eps) / math.sqrt(transition.alpha_bar_prev)
        x = math.sqrt(transition.alpha_bar) * x_0 + math.sqrt(1 - transition.alpha_bar) * eps
    assert relative_difference(encoded, x) < 1e-12


def test_encode_undoes_sampling_exactly_where_eps_is_constant() -> None:
    """With the same eps in both directions the two walks are inverse maps."""
    eps, x_T = normal(1, 2, 4, 4, seed=3), normal(3, 2, 4, 4)
    for at in ("source", "target"):
        sampler = Sampler(SCHEDULE, steps=50, spacing="trailing")
        x_0 = sampler.sample(lambda x, t: eps.expand_as(x), x_T)
        assert torch.allclose(sampler.encode(lambda x, t: eps.expand_as(x), x_0, at=at), x_T, atol=1e-10)


def test_encode_refuses_what_cannot_be_inverted() -> None:
    for arguments in ({"eta": 0.5}, {"clip": "x0"}, {"clip": "x0_eps"}):
        with pytest.raises(ValueError, match=r"eta must be 0|clip must be"):
            Sampler(SCHEDULE, steps=5, **arguments).encode(mixture(), normal(1, 2, 4, 4))
    with pytest.raises(ValueError, match="source, target"):
        Sampler(SCHEDULE, steps=5).encode(mixture(), normal(1, 2, 4, 4), at="middle")


# -- models --------------------------------------------------------------------------------------------------------


def converted(model: GaussianMixtureEps, prediction: str):
    """The same model, saying x_0 or v instead of eps."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        ab = SCHEDULE.alpha_bar(int(t[0]))
        eps = model(x, t)
        x_0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        return {"eps": eps, "x0": x_0, "v": math.sqrt(ab) * eps - math.sqrt(1 - ab) * x_0}[prediction]

    return predict


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predictions_give_the_same_images(prediction: str) -> None:
    x_T = normal(2, 2, 4, 4)
    for eta, clip in ((0.0, "none"), (0.5, "x0"), (1.0, "x0_eps")):
        ours = Sampler(SCHEDULE, steps=20, eta=eta, clip=clip, prediction=prediction)
        plain = Sampler(SCHEDULE, steps=20, eta=eta, clip=clip)
        a = ours.sample(converted(mixture(), prediction), x_T, noise=Replay(x_T))
        assert relative_difference(a, plain.sample(mixture(), x_T, noise=Replay(x_T))) < 1e-11
    x_0 = 0.3 * x_T
    for at in ("source", "target"):
        a = Sampler(SCHEDULE, steps=20, prediction=prediction).encode(converted(mixture(), prediction), x_0, at=at)
        assert relative_difference(a, Sampler(SCHEDULE, steps=20).encode(mixture(), x_0, at=at)) < 1e-11


class Network(nn.Module):
    """A small fixed eps-network that says what it was given."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Conv2d(2, 2, 3, padding=1)
        self.given: list[tuple[torch.dtype, torch.dtype, int]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.given.append((x.dtype, t.dtype, int(t[0])))
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("start", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_state_is_at_least_float32_whatever_the_model(weights: torch.dtype, start: torch.dtype) -> None:
    """The model gets its own dtype and whole timesteps: bfloat16 would round t = 999 to 1000."""
    model, x_T = Network().to(weights), normal(1, 2, 4, 4).to(start)
    state = torch.float64 if start == torch.float64 else torch.float32
    sampler = Sampler(SCHEDULE, timesteps=[0, 751, 999], eta=0.5)
    assert {x.dtype for x in sampler.trajectory(model, x_T)} == {state}
    assert sampler.sample(model, x_T).dtype == state
    assert Sampler(SCHEDULE, steps=3).encode(model, x_T).dtype == state
    assert model.given[:3] == [(weights, torch.int64, t) for t in (999, 751, 0)]
    assert {dtype for dtype, _, _ in model.given} == {weights}


def test_a_coarse_model_leaves_only_its_own_error() -> None:
    """With bfloat16 weights the state stays float32: far nearer to float32's images than a bfloat16 state would be."""
    x_T = normal(4, 2, 4, 4, dtype=torch.float32)
    exact = Sampler(SCHEDULE, steps=30).sample(Network(), x_T)
    coarse = Sampler(SCHEDULE, steps=30).sample(Network().bfloat16(), x_T)
    assert relative_difference(coarse, exact) < 0.02


def test_outputs_that_wrap_a_tensor_are_unwrapped() -> None:
    x_T = normal(2, 3)
    plain = Sampler(SCHEDULE, steps=4).sample(lambda x, t: 0.5 * x, x_T)
    wrapped = Sampler(SCHEDULE, steps=4).sample(lambda x, t: SimpleNamespace(sample=0.5 * x), x_T)
    assert torch.equal(plain, wrapped)


def test_a_wrong_output_is_a_clear_error() -> None:
    x_T = normal(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 9, 4, 4\) for a state of shape \(2, 3, 4, 4\)"):
        Sampler(SCHEDULE, steps=4).sample(lambda x, t: torch.cat([x, x, x], 1), x_T)
    for wrong in ((x_T,), None, SimpleNamespace(logits=x_T)):
        with pytest.raises(TypeError, match=f"model returned {type(wrong).__name__}"):
            Sampler(SCHEDULE, steps=4).sample(lambda x, t, wrong=wrong: wrong, x_T)


def test_the_python_interface_as_the_readme_shows_it() -> None:
    """Every argument by name; a plain module, a lambda and a diffusers model."""
    from diffusers import UNet2DModel

    schedule = NoiseSchedule.linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    sampler = Sampler(
        schedule,
        steps=3,
        eta=0.0,
        variance="posterior",
        spacing="uniform",
        clip="none",
        timesteps=None,
        prediction="eps",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    x_T = normal(2, 2, 8, 8, dtype=torch.float32)
    for model in (Network(), lambda x, t: 0.9 * x, unet, unet.double()):
        x_0 = sampler.sample(model, x_T, seed=0, indices=None, noise=None)
        assert x_0.shape == x_T.shape
        assert x_0.dtype == torch.float32
        assert bool(torch.isfinite(x_0).all())
        states = list(sampler.trajectory(model, x_T))
        assert torch.equal(states[-1], x_0)
        encoded = sampler.encode(model, x_0, at="source")
        assert encoded.shape == x_T.shape


def test_repr_says_what_it_is() -> None:
    text = repr(Sampler(SCHEDULE, steps=100, spacing="quadratic", eta=0.5))
    assert "steps=100, nfe=96, eta=0.5" in text


def test_a_transition_is_immutable() -> None:
    with pytest.raises(AttributeError):
        Transition(1, 0, 0.5, 0.6, 0.0, 0.0).sigma = 1.0


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cuda_equals_cpu(eta: float) -> None:
    x_T, sampler = normal(4, 2, 4, 4), Sampler(SCHEDULE, steps=100, eta=eta)
    there = sampler.sample(mixture(), x_T.cuda(), seed=2)
    assert there.device.type == "cuda"
    assert relative_difference(there.cpu(), sampler.sample(mixture(), x_T, seed=2)) < 1e-10
    if eta == 0.0:
        encoded = sampler.encode(mixture(), there)
        assert relative_difference(encoded.cpu(), sampler.encode(mixture(), there.cpu())) < 1e-8
