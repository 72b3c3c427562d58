"""The forward process and the three predictions, by their algebra."""

from __future__ import annotations

import math

import pytest
import torch

from ddim_lab.diffusion import (
    PREDICTIONS,
    eps_from,
    eps_loss,
    per_sample,
    q_sample,
    timestep_shares,
    timesteps_by_share,
    x0_from_eps,
)
from ddim_lab.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_q_sample_is_undone_by_x0_from_eps(t: int) -> None:
    ab = SCHEDULE.alpha_bar(t)
    x_0, eps = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1)
    x_t = q_sample(x_0, eps, ab)
    assert torch.allclose(x_t, math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * eps, rtol=1e-14)
    assert torch.allclose(x0_from_eps(x_t, eps, ab), x_0, atol=1e-12)


def test_q_sample_takes_one_level_a_sample_at_full_precision() -> None:
    """1 - alpha_bar(0) = 1e-4 is taken in float64 even where the images are float32: no digit is lost."""
    t = torch.tensor([0, 1, 999])
    ab = torch.tensor(SCHEDULE.alpha_bars)[t].reshape(-1, 1, 1, 1)
    x_0, eps = normal(3, 1, 4, 4, dtype=torch.float32), normal(3, 1, 4, 4, seed=1, dtype=torch.float32)
    x_t = q_sample(x_0, eps, ab)
    assert x_t.dtype == torch.float32
    for i, level in enumerate(t.tolist()):
        assert torch.equal(x_t[i], q_sample(x_0[i], eps[i], SCHEDULE.alpha_bar(level)))
    exact = q_sample(x_0.double(), eps.double(), ab)
    assert float((x_t.double() - exact).abs().max()) < 5e-7


def test_q_sample_composes_as_the_markov_chain_does() -> None:
    """q(x_t | x_0) is one-step noising repeated: signal prod sqrt(1 - beta), variances 1 - prod (1 - beta)."""
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(SCHEDULE.betas[:50]):
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        one = torch.ones(1, dtype=torch.float64)
        ab = SCHEDULE.alpha_bar(t)
        assert float(q_sample(one, 0 * one, ab)) == pytest.approx(signal, rel=1e-13)
        assert float(q_sample(0 * one, one, ab)) ** 2 == pytest.approx(variance, rel=1e-11)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_the_three_predictions_stand_for_one_eps(t: int) -> None:
    ab = SCHEDULE.alpha_bar(t)
    x_0, eps = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    x_t = q_sample(x_0, eps, ab)
    outputs = {"eps": eps, "x0": x_0, "v": math.sqrt(ab) * eps - math.sqrt(1 - ab) * x_0}
    assert set(outputs) == set(PREDICTIONS)
    for prediction in PREDICTIONS:
        assert torch.allclose(eps_from(prediction, outputs[prediction], x_t, ab), eps, atol=1e-11)
    assert eps_from("eps", eps, x_t, ab) is eps


def test_v_is_the_velocity_on_the_circle() -> None:
    """With sqrt(ab) = cos(a), sqrt(1 - ab) = sin(a): v = dx/da (Salimans & Ho 2022)."""
    x_0, eps, angle, h = normal(8), normal(8, seed=1), 0.7, 1e-6
    v = (q_sample(x_0, eps, math.cos(angle + h) ** 2) - q_sample(x_0, eps, math.cos(angle - h) ** 2)) / (2 * h)
    x_t = q_sample(x_0, eps, math.cos(angle) ** 2)
    assert torch.allclose(eps_from("v", v, x_t, math.cos(angle) ** 2), eps, atol=1e-8)


def test_loss_is_the_mean_over_elements() -> None:
    """Sums would change what gradient clipping at 1 does, by the number of elements."""
    eps = normal(2, 3, 4, 4)
    assert float(eps_loss(eps + 0.5, eps)) == pytest.approx(0.25)
    assert float(eps_loss(eps, eps)) == 0.0
    assert eps_loss(eps.bfloat16(), eps.float()).dtype == torch.float32


def test_per_sample_broadcasts() -> None:
    like = torch.zeros(3, 2, 4, 4)
    values = per_sample(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), like)
    assert values.shape == (3, 1, 1, 1)
    assert values.dtype == like.dtype
    assert per_sample(torch.ones(3), torch.zeros(3)).shape == (3,)


def test_timesteps_by_share_have_the_loss_of_uniform_ones_and_the_gradient_of_more_images() -> None:
    """On standard normal images, with residuals of the least loss ab(t): the mean stays, the variance falls."""
    ab = torch.tensor(SCHEDULE.alpha_bars)
    shares = timestep_shares(ab)
    assert float(shares.sum()) == pytest.approx(1.0, rel=1e-12)
    weights = 1.0 / (len(ab) * shares)
    assert float(weights.max()) <= 2.0
    loss = ab * 3.0
    assert float((shares * weights * loss).sum()) == pytest.approx(float(loss.mean()), rel=1e-12)
    second = float((shares * (weights * loss).square()).sum()), float(loss.square().mean())
    assert second[0] - float(loss.mean()) ** 2 < 0.25 * (second[1] - float(loss.mean()) ** 2)


def test_timesteps_by_share_are_the_inverse_of_their_distribution() -> None:
    """Over an even grid of u each t comes as often as its share says; a share of 0 never comes; u just below 1 fits."""
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
    t, weights = timesteps_by_share(shares, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(t, minlength=4).tolist() == [500, 0, 300, 200]
    assert torch.allclose(weights, 1.0 / (4 * shares[t]))
    assert timesteps_by_share(shares, torch.tensor([0.0, 1.0 - 2.0**-24]))[0].tolist() == [0, 3]


def test_a_weighted_loss_is_the_mean_of_each_samples_times_its_weight() -> None:
    predicted, eps = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    each = [float(eps_loss(predicted[i], eps[i])) for i in range(3)]
    weights = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    assert float(eps_loss(predicted, eps, weights)) == pytest.approx((2.0 * each[0] + 0.5 * each[1]) / 3)
    assert float(eps_loss(predicted, eps, torch.ones(3))) == pytest.approx(float(eps_loss(predicted, eps)))
