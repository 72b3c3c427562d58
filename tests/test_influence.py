"""Errors from each sample's influence: against derivatives, closed forms, and the spread of many draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from ddim_lab.metrics.estimates import Estimate, jackknife_se
from ddim_lab.metrics.frechet import FrechetDistance, Strata, frechet_distance
from ddim_lab.metrics.influence import estimate, paired_groups
from ddim_lab.metrics.of_samples.mmd import GaussianKernel, half_median_distance
from ddim_lab.metrics.statistics import FeatureSums, Moments


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted(x: Tensor, weights: Tensor) -> Moments:
    """Mean and covariance of weighted samples, weights of mean 1."""
    count = len(x)
    mean = (weights[:, None] * x).sum(0) / count
    outer = (weights[:, None] * x).T @ x
    return Moments(mean, (outer - count * torch.outer(mean, mean)) / (count - 1), count)


SAMPLES = 0.2 + normal(2, 400, 8) @ normal(3, 8, 8) * 0.3
REFERENCE = FeatureSums.of([1.1 * normal(0, 500, 8)]).moments()


# -- the Fréchet distance's expansion ---------------------------------------------------------------------


def test_a_replicate_is_the_distance_without_its_group_to_first_order() -> None:
    found = FrechetDistance(REFERENCE).of(SAMPLES)
    assert found.value == pytest.approx(frechet_distance(REFERENCE, FeatureSums.of([SAMPLES]).moments()), rel=1e-12)
    for group in (0, 37):
        weights = torch.ones(400, dtype=torch.float64)
        weights[torch.arange(400) % 100 == group] -= 1e-4
        slope = (frechet_distance(REFERENCE, weighted(SAMPLES, weights / weights.mean())) - found.value) / 1e-4
        assert found.replicates[group] - found.value == pytest.approx(slope * 100 / 99, rel=1e-2)


def test_interactions_are_the_second_derivative_in_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr("ddim_lab.metrics.influence._interactions", lambda pairs: taken.append(pairs) or ())
    FrechetDistance(REFERENCE).of(SAMPLES)
    (pairs,) = taken
    member, step = torch.arange(400) % 20, 1e-3

    def moved(g: int, h: int, by_g: float, by_h: float) -> float:
        weights = torch.ones(400, dtype=torch.float64) - by_g - by_h
        weights[member == g] += 20 * by_g
        weights[member == h] += 20 * by_h
        return frechet_distance(REFERENCE, weighted(SAMPLES, weights))

    for g, h in ((0, 1), (3, 3), (2, 9)):
        corners = (sign_g * sign_h * moved(g, h, sign_g * step, sign_h * step)
                   for sign_g, sign_h in itertools.product((1, -1), repeat=2))  # fmt: skip
        assert float(pairs[g, h]) == pytest.approx(math.fsum(corners) / (4 * step**2), rel=2e-2)


def test_a_statistic_of_second_order_alone_has_its_own_error() -> None:
    """|mean|^2 of N(0, I) has variance 2 D / N^2, which a jackknife takes for twice as much."""
    size, count, plain, ours, values = 30, 400, [], [], []
    for draw in range(100):
        x = normal(1000 + draw, count, size)
        mean = x.mean(0)
        groups = torch.arange(count) % paired_groups(count)
        means = torch.stack([x[groups == g].mean(0) for g in range(paired_groups(count))]) - mean
        found = estimate(float(mean @ mean), 2.0 * (x - mean) @ mean, 2.0 * means @ means.T)
        values.append(found.value)
        plain.append(jackknife_se(found.replicates) ** 2)
        ours.append((found.se or 0.0) ** 2)
    truth = 2 * size / count**2
    assert np.var(values) == pytest.approx(truth, rel=0.3)
    assert np.mean(plain) == pytest.approx(2 * truth, rel=0.1)
    assert np.mean(ours) == pytest.approx(truth, rel=0.1)


def gaussian(size: int) -> tuple[Moments, Tensor]:
    """A covariance that is not the identity, and a root of it."""
    root = normal(1, size, size) / size**0.5
    covariance = root @ root.T + 0.05 * torch.eye(size, dtype=torch.float64)
    return Moments(torch.zeros(size, dtype=torch.float64), covariance, None), torch.linalg.cholesky(covariance)


def coverage(found: list[Estimate], truth: float) -> tuple[float, float]:
    """Share of 95 % intervals that hold the truth, and the mean error over the values' deviation."""
    limits = [student.ppf(0.975, len(one.replicates) - 1) * (one.se or 0.0) for one in found]
    held = [abs(one.value - truth) <= limit for one, limit in zip(found, limits, strict=True)]
    deviation = np.std([one.value for one in found], ddof=1)
    return float(np.mean(held)), float(np.mean([one.se or 0.0 for one in found]) / deviation)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "count"), [(64, 1437)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.3, 0.3)])
def test_the_error_covers_the_draw(size: int, count: int, scale: float, shift: float) -> None:
    """Near the reference and far from it: of E[FD_N], which the mean of 100 draws stands for."""
    known, root = gaussian(size)
    distance = FrechetDistance(known)
    found = [distance.of(normal(2000 + draw, count, size) @ root.T * scale + shift) for draw in range(100)]
    held, ratio = coverage(found, float(np.mean([one.value for one in found])))
    assert 0.91 <= held <= 0.99
    assert ratio == pytest.approx(1.05, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.05, 0.05), (1.3, 0.3)])
def test_the_distance_at_infinite_n_is_covered(scale: float, shift: float) -> None:
    """At 20 D samples, where FD_N itself is many errors too large."""
    known, root = gaussian(32)
    distance = FrechetDistance(known)
    truth = frechet_distance(known, Moments(known.mean + shift, known.covariance * scale**2, None))
    samples = [normal(2000 + draw, 640, 32) @ root.T * scale + shift for draw in range(150)]
    held, _ = coverage([distance.extrapolated(x, distance.of(x)) for x in samples], truth)
    assert 0.90 <= held <= 1.0
    assert coverage([distance.of(x) for x in samples], truth)[0] < 0.8 or scale > 1.1
    with pytest.raises(ValueError, match=r"in 32 features needs 640 samples, got 639"):
        distance.extrapolated(samples[0][:639], distance.of(samples[0][:639]))


def test_two_halves_extrapolate_as_they_should() -> None:
    """From N and N/2, the line meets 1/N = 0 at twice the whole less the mean of the halves."""
    known, root = gaussian(8)
    x, distance = normal(5, 200, 8) @ root.T, FrechetDistance(known)
    halves = [distance.value(x[part::2]) for part in (0, 1)]
    assert distance.extrapolated(x, distance.of(x)).value == pytest.approx(
        2 * distance.value(x) - sum(halves) / 2, rel=1e-9
    )


# -- post-stratified ----------------------------------------------------------------------------------------


def of_classes(seed: int, count: int, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Samples of three classes that lie apart, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.multinomial(shares, count, replacement=True, generator=generator)
    return 4.0 * torch.eye(3, 6, dtype=torch.float64)[classes] + normal(seed + 1, count, 6), classes


def test_a_post_stratified_distance_is_that_of_the_weighted_samples() -> None:
    x, classes = of_classes(0, 300, torch.tensor([0.2, 0.3, 0.5]))
    strata = Strata(classes, torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64))
    weights = strata.weights()
    assert float(weights.mean()) == pytest.approx(1.0)
    for name in range(3):
        assert float(weights[classes == name].sum()) / 300 == pytest.approx(float(strata.shares[name]))
    known = FeatureSums.of([of_classes(7, 2000, strata.shares)[0]]).moments()
    found = FrechetDistance(known).of(x, strata)
    assert found.value == pytest.approx(frechet_distance(known, weighted(x, weights)), rel=1e-9)
    even = Strata(classes, torch.bincount(classes).double() / 300)  # as they fell: nothing is weighted
    assert FrechetDistance(known).of(x, even).value == pytest.approx(FrechetDistance(known).value(x), rel=1e-9)
    with pytest.raises(ValueError, match="0 of the samples look like class 3, and 2 are needed"):
        Strata(classes, torch.full((4,), 0.25, dtype=torch.float64)).weights()


def test_post_stratifying_takes_the_luck_of_classes_out_of_value_and_error() -> None:
    shares = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    known = FeatureSums.of([of_classes(7, 20_000, shares)[0]]).moments()
    distance = FrechetDistance(known)
    draws = [of_classes(100 + 2 * draw, 300, shares) for draw in range(100)]
    plain = [distance.of(x) for x, _ in draws]
    found = [distance.of(x, Strata(classes, shares)) for x, classes in draws]
    assert np.std([one.value for one in found]) < 0.7 * np.std([one.value for one in plain])
    held, ratio = coverage(found, float(np.mean([one.value for one in found])))
    assert 0.90 <= held <= 1.0
    assert ratio == pytest.approx(1.0, abs=0.25)


# -- MMD ----------------------------------------------------------------------------------------------------


def by_definition(x: Tensor, y: Tensor, bandwidth: float) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * bandwidth**2))

    m, n = len(x), len(y)
    within = (kernel(x, x).sum() - m) / (m * (m - 1)) + (kernel(y, y).sum() - n) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


@pytest.mark.parametrize("block", [500, 2**24])
def test_mmd_is_its_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim_lab.metrics.distances.BLOCK", block)
    x, y = 0.3 + normal(0, 120, 5), normal(1, 90, 5)
    bandwidth = half_median_distance(y.float().numpy())
    above = torch.triu_indices(90, 90, offset=1)
    assert bandwidth == pytest.approx(0.5 * float(torch.cdist(y, y)[above[0], above[1]].median()), rel=1e-2)
    found = GaussianKernel(bandwidth).of(x.float().numpy(), y.float().numpy())
    assert found.value == pytest.approx(by_definition(x, y, bandwidth), abs=1e-7)
    known = GaussianKernel(bandwidth, reference_mean=GaussianKernel(bandwidth).within(y.float().numpy()))
    assert known.of(x.float().numpy(), y.float().numpy()).value == pytest.approx(found.value, abs=1e-12)


def test_mmd_of_gaussians_is_the_closed_form() -> None:
    """E k of two isotropic Gaussians is (s^2/(s^2 + v + w))^(D/2) exp(-|shift|^2/(2 (s^2 + v + w)))."""
    size, bandwidth, shift = 3, 1.5, 0.4

    def mean(variances: float, apart: float) -> float:
        total = bandwidth**2 + variances
        return float((bandwidth**2 / total) ** (size / 2) * math.exp(-(apart**2) * size / (2 * total)))

    truth = mean(2 * 1.2**2, 0) + mean(2, 0) - 2 * mean(1.2**2 + 1, shift)
    reference = normal(1, 4000, size).float().numpy()
    kernel = GaussianKernel(bandwidth, reference_mean=mean(2, 0))
    found = [kernel.of((shift + 1.2 * normal(10 + k, 400, size)).float().numpy(), reference) for k in range(60)]
    held, ratio = coverage(found, float(np.mean([one.value for one in found])))
    assert np.mean([one.value for one in found]) == pytest.approx(truth, rel=0.1)
    assert 0.88 <= held <= 1.0
    assert ratio == pytest.approx(1.0, abs=0.2)


def test_mmd_sees_what_has_the_same_mean_and_covariance() -> None:
    """Two points of equal weight beside a Gaussian of their moments: a Fréchet distance sees nothing."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (2000, 4), generator=generator).double() * 2 - 1
    gauss = normal(3, 2000, 4)
    distance = FrechetDistance(Moments(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), None))
    assert distance.of(signs).value < 2 * distance.of(normal(4, 2000, 4)).value
    reference = normal(5, 2000, 4).float().numpy()
    kernel = GaussianKernel(half_median_distance(reference))
    seen, same = (kernel.of(x.float().numpy(), reference) for x in (signs, gauss))
    assert same.se is not None
    assert seen.value > 20 * same.se
    assert abs(same.value) < 4 * same.se


def test_few_samples_have_an_error_or_none() -> None:
    for count, se in ((2, True), (7, True), (19, True)):
        found = FrechetDistance(REFERENCE).of(SAMPLES[:count])
        assert (found.se is not None) == se
        assert found.interactions == ()
        assert len(found.replicates) == count
    assert paired_groups(20) == 5
    assert estimate(1.0, torch.zeros(1), None).se is None
