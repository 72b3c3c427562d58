"""The measurements, against closed forms and against torchmetrics used as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.data.images import from_uint8, to_uint8
from ddim_lab.metrics.determinism import ImagesHash, max_abs_diff, noise_variance
from ddim_lab.metrics.estimates import Estimate, jackknife_se, paired_se
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.networks.classifier import ClassifierFeatures
from ddim_lab.metrics.statistics import FeatureSums, median_nearest_distance
from ddim_lab.store import Store

DIGITS = Digits(name="digits", root=None, num_samples=10)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(reference: Tensor, samples: Tensor) -> Estimate:
    return FrechetDistance(FeatureSums.of(reference.split(100)).moments()).of(samples)


def closed_form(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), by scipy's matrix root."""
    s_a, s_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum()) + float(np.trace(s_a + s_b - 2 * root))


def test_distance_is_the_formula_and_torchmetrics() -> None:
    real, fake = normal(0, 500, 6), 0.3 + normal(1, 333, 6) @ normal(2, 6, 6)
    ours = distance(real, fake).value
    assert ours == pytest.approx(closed_form(real, fake), rel=1e-9)

    class Same(torch.nn.Module):
        num_features = 6

        def forward(self, features: Tensor) -> Tensor:
            return features

    theirs = FrechetInceptionDistance(feature=Same())
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-12)


def test_same_images_are_at_distance_zero() -> None:
    real = normal(0, 400, 5)
    assert distance(real, real).value == pytest.approx(0.0, abs=1e-10)


def test_distance_of_shifted_gaussians_is_the_shift() -> None:
    real = normal(0, 300, 4)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    assert distance(real, real + shift).value == pytest.approx(5.25, rel=1e-9)


def test_images_of_one_grey_have_a_distance() -> None:
    """Their covariance is s^2 1 1^T, so that the root's trace is s (1^T S 1)^(1/2).

    At the product of such covariances a solver for matrices without symmetry may give up: MKL's does in most of these.
    """
    one = torch.ones(64, dtype=torch.float64)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        grey = torch.randint(0, 256, (160, 1), generator=generator) * one
        stripes = (255 * torch.rand(40, 1, generator=generator) * torch.rand(1, 64, generator=generator)).round()
        real, fake = (images.double() / 127.5 - 1.0 for images in (grey, stripes))
        spread, covariance = real[:, 0].std(), torch.cov(fake.T)
        apart = (real.mean(0) - fake.mean(0)).square().sum() + 64 * spread**2 + covariance.trace()
        expected = float(apart - 2.0 * spread * (one @ covariance @ one).sqrt())
        assert distance(real, fake).value == pytest.approx(expected, rel=1e-6)


def test_fewer_than_two_samples_have_no_distance() -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        distance(normal(0, 10, 2), normal(1, 1, 2))


def test_jackknife_of_a_mean_is_the_textbook_error() -> None:
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    without = [(sum(values) - value) / 4 for value in values]
    assert jackknife_se(without) == pytest.approx(np.std(values, ddof=1) / np.sqrt(5), rel=1e-12)
    assert paired_se(without, [value + 3.0 for value in without]) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="at least 2 groups"):
        jackknife_se([1.0])


def test_sums_survive_the_disk(tmp_path: Path) -> None:
    sums = FeatureSums.of([normal(0, 50, 3)])
    sums.save(tmp_path / "s.npz")
    again = FeatureSums.load(tmp_path / "s.npz")
    assert again.count == 50
    assert torch.equal(again.total, sums.total)
    assert torch.equal(again.outer, sums.outer)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"bad\.npz does not hold feature statistics"):
        FeatureSums.load(tmp_path / "bad.npz")


def test_nearest_distance_of_known_points() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    others = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert median_nearest_distance(points, others) == pytest.approx(4.0)
    assert median_nearest_distance(others, others) == 0.0


def test_uint8_rounds_and_comes_back() -> None:
    """All 256 levels survive; truncation, (x + 1) * 127.5 without rounding, would lose some of them."""
    levels = torch.arange(256, dtype=torch.uint8)
    images = from_uint8(levels)
    assert torch.equal(to_uint8(images), levels)
    truncated = ((images + 1) * 127.5).to(torch.uint8)
    assert int((truncated != levels).sum()) > 0
    assert to_uint8(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))


def test_determinism_measures() -> None:
    a, b = normal(0, 4, 3), normal(1, 4, 3)
    assert max_abs_diff([a, a.clone(), a.clone()]) == 0.0
    assert max_abs_diff([a, a, b]) == float((a - b).abs().max())
    assert noise_variance([a, a.clone()]).tolist() == [0.0] * 4
    expected = torch.stack([a, b]).double().var(dim=0).mean(1)
    torch.testing.assert_close(noise_variance([a, b]), expected, rtol=1e-12, atol=0.0)
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    whole, parts = ImagesHash(), ImagesHash()
    whole.update(images)
    for part in images.split(1):
        parts.update(part)
    assert whole.hexdigest() == hashlib.sha256(images.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest()
    assert parts.hexdigest() == whole.hexdigest()
    with pytest.raises(ValueError, match="expected uint8 images"):
        whole.update(images.float())


def test_the_digits_are_the_ones_we_know() -> None:
    data = load_data(DIGITS)
    assert (len(data.train), len(data.held_out), data.shape) == (1437, 360, (1, 8, 8))
    assert data.digest == "2bbe16459b2fe2368cdc38bce3bca25778609c19e1cba4ca3fca89cb436e79ce"


@pytest.mark.slow
def test_the_classifier_is_trained_once_and_knows_digits(tmp_path: Path, digits: Callable[[Path], Path]) -> None:
    from ddim_lab.store import read_json

    data = load_data(DIGITS)
    first = ClassifierFeatures().obtain(data, Store(digits(tmp_path / "a")))
    again = ClassifierFeatures().obtain(data, Store(tmp_path / "a"))
    elsewhere = ClassifierFeatures().obtain(data, Store(tmp_path / "b"))
    assert first.digest == again.digest == elsewhere.digest
    assert first.name == "FD (digits classifier)"
    (description,) = (tmp_path / "a" / "models").glob("*/model.json")
    assert read_json(description)["held_out_accuracy"] > 0.95
