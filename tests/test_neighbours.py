"""Density, coverage and memorisation: against the published formulas, closed forms, simulation and planted copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu

from ddim_lab.config.metrics import METRICS
from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.metrics import distances
from ddim_lab.metrics.base import Comparison, Metric
from ddim_lab.metrics.distances import squared_nearest
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.networks.pixels import PixelFeatures
from ddim_lab.metrics.of_samples.density_coverage import density_coverage, expected_coverage
from ddim_lab.metrics.of_samples.memorisation import chance, memorised
from ddim_lab.metrics.references import Reference, obtain_held_out, obtain_reference
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.store import Store

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def normal(seed: int, count: int, size: int, scale: float = 1.0) -> Vectors:
    return (scale * np.random.default_rng(seed).standard_normal((count, size))).astype(np.float32)


def all_distances(a: Vectors, b: Vectors) -> Any:
    return cdist(a.astype(np.float64), b.astype(np.float64))


# -- density and coverage -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1000, 2**24])
def test_density_and_coverage_are_the_published_formulas(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naeem et al.'s Eq. 3 and 4, over all pairs at once; whatever the blocks."""
    monkeypatch.setattr(distances, "BLOCK", block)
    fake, real, k = 0.3 + normal(0, 250, 8, 0.8), normal(1, 200, 8), 5
    radii = np.sort(all_distances(real, real), axis=1)[:, k]  # the point itself comes first
    inside = all_distances(real, fake) < radii[:, None]
    density, coverage = density_coverage(fake, real, k)
    assert density.value == pytest.approx(inside.sum() / (k * len(fake)), rel=1e-6)
    assert coverage.value == pytest.approx(inside.any(axis=1).mean(), abs=1e-6)
    assert 0.1 < coverage.value < 1.0
    # what each group of samples is worth to first order
    of_each = inside.sum(axis=0) / k
    assert density.se == pytest.approx(of_each.std(ddof=1) / np.sqrt(len(fake)), rel=0.2)
    assert density.interactions == ()
    left_out = [np.delete(inside, np.s_[g::100], axis=1).any(axis=1).mean() for g in range(100)]
    differences = np.array(coverage.replicates) - np.array(left_out)
    assert np.corrcoef(coverage.replicates, left_out)[0, 1] > 0.99
    assert np.ptp(differences) < 0.2 * np.ptp(left_out)


def test_density_and_coverage_at_the_limits() -> None:
    real = normal(0, 200, 5)
    density, coverage = density_coverage(real, real, 5)
    assert coverage.value == 1.0
    # each is in its own ball, and in those of 5 others on average, some of them on the edge up to rounding
    assert density.value == pytest.approx(1.2, abs=0.02)
    density, coverage = density_coverage(real + 100.0, real, 5)
    assert (density.value, coverage.value, density.se, coverage.se) == (0.0, 0.0, 0.0, 0.0)
    one_place = np.repeat(real[:1], 300, axis=0)
    assert density_coverage(one_place, real, 5)[1].value < 0.1  # dense, perhaps, but it covers nothing
    # an outlier among the real images makes the samples in its ball real to precision, not dense
    outlier = np.concatenate([real, np.full((1, 5), 50.0, dtype=np.float32)])
    assert density_coverage(real[:100] + 20.0, outlier, 5)[0].value == pytest.approx(0.2)
    with pytest.raises(ValueError, match="5 neighbours need at least 6 points, got 4"):
        density_coverage(real, real[:4], 5)


def test_of_one_distribution_they_are_what_theory_expects() -> None:
    """1 and 1 - (N - 1) ... (N - k) / ((M + N - 1) ... (M + N - k)), over draws of both sets."""
    draws = [density_coverage(normal(2 * i, 80, 4), normal(2 * i + 1, 60, 4), 3) for i in range(150)]
    for found, expected in zip(zip(*draws, strict=True), (1.0, expected_coverage(80, 60, 3)), strict=True):
        values = [each.value for each in found]
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(len(values))
    assert expected_coverage(10**6, 10**6, 5) == pytest.approx(1 - 2**-5, abs=1e-5)


@pytest.mark.parametrize(("shift", "narrow", "wide"), [(0.0, 1.0, 1.5), (0.5, 0.85, 1.2), (1.0, 0.8, 1.2)])
def test_their_errors_are_those_of_new_samples(shift: float, narrow: float, wide: float) -> None:
    """Mean error over the deviation that 100 draws of samples have, beside one reference."""
    real = normal(0, 300, 8)
    radii = distances.squared_radii(real, 5)
    draws = [density_coverage(shift + normal(i, 300, 8), real, 5, radii) for i in range(1, 101)]
    ratios = []
    for found in zip(*draws, strict=True):
        errors = [each.se for each in found if each.se is not None]
        ratios.append(np.mean(errors) / np.std([each.value for each in found], ddof=1))
    assert 0.8 < ratios[0] < 1.25
    assert narrow < ratios[1] < wide


# -- memorisation, and what the store keeps ---------------------------------------------------------------


def test_memorisation_is_mann_and_whitneys_statistic_with_its_ties() -> None:
    samples, held_out = (np.random.default_rng(seed).integers(0, 30, 200 - 60 * seed) for seed in (0, 1))
    nearer, nearest = memorised(samples, held_out)
    u = mannwhitneyu(held_out, samples).statistic  # pairs with the sample nearer, and half of those that tie
    assert nearer.value == pytest.approx(u / (len(samples) * len(held_out)), rel=1e-12)
    ranks = [(np.mean(held_out < d) + np.mean(held_out <= d)) / 2 for d in samples]
    assert nearest.value == pytest.approx(np.mean([r < 0.05 for r in ranks]))
    assert nearer.se == pytest.approx(np.std(ranks, ddof=1) / np.sqrt(len(samples)), rel=0.2)


@pytest.mark.parametrize("held_out", [2, 40, 100])
def test_memorisation_by_chance_is_what_theory_expects(held_out: int) -> None:
    generator = np.random.default_rng(held_out)
    draws = [memorised(generator.random(60), generator.random(held_out)) for _ in range(600)]
    for found, (level, spread) in zip(zip(*draws, strict=True), chance(60, held_out), strict=True):
        values = [each.value for each in found]
        assert abs(np.mean(values) - level) < 4 * spread / np.sqrt(len(values))
        assert np.std(values) == pytest.approx(spread, rel=0.12)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Features, Reference, Reference]:
    """The digits as pixels: training and held-out images."""
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path_factory.mktemp("store"))
    features = PixelFeatures().obtain(data, store)
    held_out = obtain_held_out(features, data, store, count=1000)
    assert held_out is not None
    return store, features, obtain_reference(features, data, "train", store, keep_features=True), held_out


def part_of(reference: Reference, rows: slice) -> Reference:
    """Some of its images, as a reference of their own."""
    assert reference.features is not None
    vectors = np.array(reference.features[rows])
    moments = FeatureSums.of([torch.from_numpy(vectors)]).moments()
    return Reference(f"{reference.name} {rows}", f"{reference.key} {rows}", moments, vectors, None)


def measured(
    name: str, seen: tuple[Store, Features, Reference, Reference], held_out: Reference | None, vectors: Vectors
) -> dict[str, Any]:
    """The values of a metric by name, of samples beside the digits."""
    store, features, reference, _ = seen
    chosen = tiny.configure("metrics.features=pixels").metrics.chosen
    (metric,) = (each for each in chosen if each.name == name)
    assert isinstance(metric, Metric)
    comparison = Comparison(features, None, reference, len(vectors), held_out, None, None, store, None)
    return {value.name: value for value in metric.start(comparison).compute(vectors)}


def test_planted_copies_are_found_and_held_out_images_are_not(
    seen: tuple[Store, Features, Reference, Reference],
) -> None:
    """Of held-out images with a share replaced by training images plus noise, both values find the share."""
    reference, held_out = seen[2], part_of(seen[3], slice(0, None, 2))
    others = np.array(part_of(seen[3], slice(1, None, 2)).features)
    assert reference.features is not None
    copies = reference.features[: len(others)] + 0.01 * normal(0, *others.shape)
    (half, luck), (twentieth, luck_of_nearest) = chance(len(others), len(others))
    for share in (0.0, 0.1, 0.3, 1.0):
        count = round(share * len(others))
        found = measured("memorisation", seen, held_out, np.concatenate([copies[:count], others[count:]]))
        nearer, nearest = found["memorisation"], found["memorisation_nearest"]
        assert abs((nearer.value - half) / (1 - half) - share) < 4 * luck
        assert abs((nearest.value - twentieth) / (1 - twentieth) - share) < 4 * luck_of_nearest
        assert nearer.se <= luck
        if share == 0.1:  # few copies are seen better by the second
            assert (nearest.value - twentieth) / luck_of_nearest > 2 > (nearer.value - half) / luck
    assert f"by chance 4.97 % ± {100 * luck_of_nearest:.2g} %, with {len(others)} held-out images" in nearest.notes[0]
    assert "by chance 50 % ± " in nearer.notes[0]


def test_memorisation_is_not_given_where_nothing_is_held_out(
    seen: tuple[Store, Features, Reference, Reference],
) -> None:
    vectors = normal(0, 20, 64)
    (value,) = measured("memorisation", seen, None, vectors).values()
    assert value.value is None
    assert value.why_not.startswith("it needs the training images as reference")


@pytest.mark.parametrize("name", [name for name, metric in METRICS.ours().items() if metric.needs_vectors])
def test_what_compares_vectors_looks_at_no_more_than_it_says(
    name: str, seen: tuple[Store, Features, Reference, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`KEPT_AT_MOST` vectors: beyond them, no value takes more memory or time."""
    assert seen[2].features is not None
    many = seen[2].features[:120] + np.repeat([[0.05], [0.5]], 60, axis=0).astype(np.float32) * normal(0, 120, 64)
    few = many[:60]
    of_all = measured(name, seen, seen[3], many)
    expected = measured(name, seen, seen[3], few)
    monkeypatch.setattr(f"ddim_lab.metrics.of_samples.{name}.KEPT_AT_MOST", 60)
    found = measured(name, seen, seen[3], many)
    for value in expected.values():
        assert found[value.name].value == value.value
    assert any(found[value.name].value != value.value for value in of_all.values())


def test_what_is_known_of_real_images_is_computed_once(
    seen: tuple[Store, Features, Reference, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Radii of the reference and distances of held-out images come from the store for the second cell."""
    vectors, names = normal(0, 50, 64), ("density_coverage", "memorisation", "precision_recall")
    first = [measured(name, seen, seen[3], vectors) for name in names]

    def again(*_: Any) -> Any:
        raise AssertionError("it was there")

    monkeypatch.setattr(distances, "squared_radii", again)
    monkeypatch.setattr(distances, "squared_nearest", again)
    assert [measured(name, seen, seen[3], vectors) for name in names] == first
    monkeypatch.undo()
    _, _, reference, held_out = seen
    assert reference.features is not None
    assert held_out.features is not None
    assert squared_nearest(held_out.features, reference.features) == pytest.approx(
        all_distances(np.array(held_out.features), np.array(reference.features)).min(1) ** 2, rel=1e-4
    )
