"""Planted degradations do what they say, moments match, and a metric is called blind where it is."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from ddim_lab.data.images import MemoryImages, from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.of_samples.mmd import GaussianKernel
from ddim_lab.metrics.statistics import FeatureSums, Moments
from ddim_lab.tasks.degradations import (
    blurred,
    class_dropped,
    degradations,
    draw,
    duplicated,
    moment_matched,
    noisy,
    reweighted,
    shifted,
    with_share_of,
)
from ddim_lab.tasks.metric_power import power, verdict

SIDE, CLASSES = 6, 4


def generator(*named: int) -> np.random.Generator:
    return np.random.default_rng([7, *named])


@cache
def dark() -> MemoryImages:
    """1,200 images of four classes, each a bright bar in its column; half of all values are 0, as in digits."""
    found = generator()
    labels = torch.from_numpy(found.integers(0, CLASSES, 1200))
    images = torch.zeros(1200, 1, SIDE, SIDE)
    rows = torch.arange(1200)
    heights = torch.from_numpy(found.uniform(80.0, 200.0, (1200, SIDE))).float()
    images[rows, 0, :, labels] = heights
    images[rows, 0, :, labels + 1] = heights * 0.3
    return MemoryImages(images.round().to(torch.uint8), labels)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Which images are equal, bool [N]."""
    return (a == b).flatten(1).all(1)


def moments(images: Tensor) -> Moments:
    return FeatureSums.of([from_uint8(images).flatten(1)]).moments()


def vectors(images: Tensor) -> Tensor:
    return from_uint8(images).flatten(1)


# drawing


def test_a_draw_has_sets_that_share_no_image_and_a_reference_with_every_classs_share() -> None:
    total = 1200
    numbered = torch.arange(total)
    images = torch.stack([numbered // 256, numbered % 256], 1).to(torch.uint8).reshape(total, 1, 1, 2)
    drawn = draw(MemoryImages(images, dark().labels), 200, 600, generator())
    sets = [drawn.reference, drawn.plain, drawn.again, drawn.spare[: len(drawn.spare) - 200]]
    names = torch.cat([part.long()[:, 0, 0, 0] * 256 + part.long()[:, 0, 0, 1] for part in sets])
    assert [len(part) for part in sets] == [600, 200, 200, 200]
    assert sorted(names.tolist()) == list(range(total))
    assert torch.equal(dark().labels[names[600:800]], drawn.labels)
    apart = torch.bincount(dark().labels[names[:600]]) - torch.bincount(dark().labels) / 2
    assert apart.abs().max() <= 1.0
    again = draw(MemoryImages(images, dark().labels), 200, 600, generator(1))
    assert not torch.equal(again.plain, drawn.plain)


# each degradation


def test_blur_is_the_gaussians_weights_and_noise_has_its_deviation() -> None:
    point = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    point[..., 4, 4] = 255
    weights = np.exp(-0.5 * np.arange(-4, 5) ** 2 / 0.5**2)
    weights /= weights.sum()
    assert blurred(point, 0.5)[0, 0].numpy() == pytest.approx(255.0 * np.outer(weights, weights), abs=0.6)
    grey = torch.full((200, 1, 9, 9), 128, dtype=torch.uint8)
    added = from_uint8(noisy(grey, 0.1, generator())) - from_uint8(grey)
    assert float(added.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(added.mean())) < 0.003
    images = dark().images[:300]
    assert float(blurred(images, 0.5).float().mean()) == pytest.approx(float(images.float().mean()), rel=0.02)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_share_of_images_is_changed_and_no_more(share: float) -> None:
    images = torch.from_numpy(generator(3).integers(0, 256, (200, 1, SIDE, SIDE), dtype=np.uint8))
    count = round(share * 200)
    others = 255 - images
    mixed = with_share_of(images, others, share, generator())
    assert int(same(mixed, others).sum()) == count
    assert int(same(mixed, images).sum()) == 200 - count
    moved = shifted(images, share, generator())
    changed = ~same(moved, images)
    assert int(changed.sum()) == count
    assert torch.equal(moved[changed][..., 1:], images[changed][..., :-1])
    copied = duplicated(images, share, generator())
    changed = ~same(copied, images)
    assert int(changed.sum()) == count
    assert {tuple(row) for row in copied[changed].flatten(1).tolist()} <= {
        tuple(row) for row in images[~changed].flatten(1).tolist()
    }


def test_what_is_worse_is_worse_in_the_same_places() -> None:
    images = dark().images[:200]
    mild, much = (~same(shifted(images, share, generator()), images) for share in (0.05, 0.2))
    assert bool(mild.any())
    assert bool((much | ~mild).all())


def bars(images: Tensor) -> Tensor:
    """The class of each, by its brightest column."""
    return images[:, 0].float().mean(1).argmax(1)


def test_a_dropped_class_is_absent_and_the_lower_half_of_the_classes_twice_as_frequent() -> None:
    drawn = draw(dark(), 300, 500, generator())
    without = class_dropped(drawn, 2)
    assert torch.equal(bars(drawn.plain), drawn.labels)
    assert not bool((bars(without) == 2).any())
    kept = drawn.labels != 2
    assert torch.equal(without[kept], drawn.plain[kept])
    before, after = (
        torch.bincount(bars(images), minlength=CLASSES) for images in (drawn.plain, reweighted(drawn, generator()))
    )
    upper = int(before[2:].sum())
    assert int(after[2:].sum()) == upper - round(upper / 3)
    assert int(after.sum()) == 300
    with pytest.raises(ValueError, match="images of other classes are needed, and there are 0"):
        class_dropped(draw(MemoryImages(dark().images, torch.zeros(1200, dtype=torch.int64)), 30, 600, generator()), 0)


# moments


def test_matched_images_have_the_moments_of_the_real_ones_after_clamping_and_nothing_else_of_them() -> None:
    """What is left is little beside what real images drawn again score; the bars are gone."""
    drawn = draw(dark(), 300, 600, generator())
    matched, left = moment_matched(drawn.again, generator(1))
    assert matched.dtype == torch.uint8
    of_again = FrechetDistance(moments(drawn.again))
    assert of_again.value(vectors(matched)) == pytest.approx(left, rel=0.05, abs=1e-4)
    assert left < 0.25 * of_again.value(vectors(drawn.plain))
    kernel = GaussianKernel(1.0)
    far = kernel.of(vectors(matched).numpy(), vectors(drawn.reference).numpy())
    near = kernel.of(vectors(drawn.plain).numpy(), vectors(drawn.reference).numpy())
    assert far.se is not None
    assert far.value > near.value + 5.0 * far.se


def test_without_clamping_the_moments_are_those_of_the_images_to_rounding_and_the_rest_is_gaussian() -> None:
    """Uniform grey values that are far from both ends: kurtosis 1.8, and 3 of the images that match."""
    images = torch.from_numpy(generator(4).integers(108, 148, (4000, 1, 2, 2), dtype=np.uint8))
    matched, left = moment_matched(images, generator(5))
    apart = moments(matched).covariance - moments(images).covariance
    assert float(apart.abs().max()) < 0.01 * float(moments(images).covariance.diagonal().max())
    assert float((moments(matched).mean - moments(images).mean).abs().max()) < 2e-4
    assert left < 1e-5
    x = vectors(matched).double()
    standard = (x - x.mean(0)) / x.std(0)
    assert standard.pow(4).mean(0).numpy() == pytest.approx(3.0, abs=0.3)


# z, and the verdict


def test_z_is_measured_over_draws_and_values_that_nothing_moves_are_left_out() -> None:
    changes = [1.0, 2.0, 3.0, 6.0]
    draws = [
        {
            "worse": {"seen": (d, 2.0 * d), "still": (0.0, None), "steady": (0.1, None)},
            "as before": {"seen": (0.0, 0.0)},
        }
        for d in changes
    ]
    measured, own = power(draws)
    assert measured["seen"] == {"worse": pytest.approx(3.0 / np.std(changes, ddof=1)), "as before": 0.0}
    assert measured["steady"] == {"worse": math.inf}
    assert "still" not in measured
    del draws[2]["worse"]["seen"]
    assert "seen" not in power(draws)[0]  # not measured in every draw, and moved by nothing else
    assert own == {"seen": {"worse": pytest.approx(6.0), "as before": 0.0}}


@pytest.mark.parametrize(
    ("z", "told"),
    [
        (31.2, "sees it, z = 31.2"),
        (1.9, "blind, z = 1.9"),
        (-3.0, "blind: takes it for better, z = −3.0"),
        (math.inf, "sees it, z = ∞"),
        (None, "not measured"),
    ],
)
def test_the_verdict_in_words(z: float | None, told: str) -> None:
    assert verdict(z) == told


def test_a_metric_of_two_moments_is_blind_to_matched_noise_and_a_kernel_is_not() -> None:
    """As the task does it, on images whose moments are all that the Fréchet distance in pixels knows."""
    differences = []
    for number in range(5):
        drawn = draw(dark(), 150, 600, generator(number))
        noise, _ = moment_matched(drawn.again, generator(number, 0))
        distance, kernel = FrechetDistance(moments(drawn.reference)), GaussianKernel(1.0)
        reference = vectors(drawn.reference).numpy()
        found = {
            "FD": [distance.value(vectors(images)) for images in (drawn.plain, noise)],
            "MMD": [kernel.of(vectors(images).numpy(), reference).value for images in (drawn.plain, noise)],
        }
        differences.append({"Gaussian": {name: (worse - plain, None) for name, (plain, worse) in found.items()}})
    z, _ = power(differences)
    assert verdict(z["FD"]["Gaussian"]).startswith("blind")
    assert verdict(z["MMD"]["Gaussian"]).startswith("sees it")


# the task

LINE = (
    "task=metric_power",
    "task.draws=2",
    "task.fewer_steps=2",
    "steps=5",
    "model=gaussian",
    "metrics.features=pixels",
)


def test_the_task_at_a_tiny_size(tmp_path: Path) -> None:
    line = (*LINE, "task.reference_images=300", "logger=csv", "num_samples=60", "metrics.kid_subsets=2")
    assert tiny.run(tmp_path, *line, settings=()) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path)[-1])
    cell = tmp_path / "cells" / row["cell"]
    result = json.loads((cell / "result.json").read_text())
    blind, measured, own = result["tables"]
    columns = [*degradations(10), "S = 2"]
    assert measured["columns"] == ["value", *columns]
    z = {name: dict(zip(columns, rest, strict=True)) for name, *rest in measured["rows"]}
    assert {"FD (digits pixels)", "1000 MMD² (digits pixels)", "precision (digits pixels)"} <= set(z)
    assert z["FD (digits pixels)"]["blur, 0.5 pixels"] > 5.0
    assert [name for name, *_ in blind["rows"]] == [name for name, *_ in measured["rows"]]
    with_errors = ("FD", "1000 MMD²", "density", "coverage")
    assert {name for name, *_ in own["rows"]} == {f"{name} (digits pixels)" for name in with_errors}
    assert float(row["power_values"]) == len(measured["rows"])
    assert float(row["power_blind_to_gaussian"]) == sum(told.startswith("blind") for _, told, _ in blind["rows"])
    assert (cell / "degraded.png").is_file()
    page = (tiny.sweeps(tmp_path)[-1] / "report.html").read_text(encoding="utf-8")
    assert "Blind to what? Beside real images drawn again; N = 60, 2 draws, 300 images compared with" in page


def test_it_costs_the_forwards_of_both_walks_in_every_draw() -> None:
    config = tiny.configure(*LINE, "num_samples=60")
    assert config.task.forwards(config) == 60 * 2 * (5 + 2)
    assert config.task.forwards(tiny.configure(*LINE, "num_samples=60", "task.fewer_steps=null")) == 840
    without = tiny.configure(*LINE, "task.fewer_steps=null")
    assert without.task.forwards(without) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("steps=2",), "task.fewer_steps=2 must cost fewer forwards than the cell's own walk, and it takes 2 beside 2"),
        (("task.fewer_steps=2000",), "task.fewer_steps=2000: "),
        (("task.draws=1",), "task.draws=1: must be at least 2"),
        (("data=celeba",), "task=metric_power takes images of 4,096 values at most"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny.configure(*LINE, *arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_too_many_images_are_refused_with_the_most_there_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(tmp_path, *LINE, "logger=csv", "num_samples=500", settings=()) == 1
    assert "N is at most 449" in capsys.readouterr().err
