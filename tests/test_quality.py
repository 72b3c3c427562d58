"""Kernel distance, Inception Score, precision and recall: against torch-fidelity on the same features, and theory."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddim_lab.config.folders import config_folder
from ddim_lab.config.found import Kind
from ddim_lab.config.metrics import METRICS, NETWORKS, MetricsConfig
from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.errors import ConfigError
from ddim_lab.metrics import distances
from ddim_lab.metrics.base import Batch, Classes, Comparison, Metric
from ddim_lab.metrics.classifier import LARGE, SMALL, make_classifier, recipe_for
from ddim_lab.metrics.extractor import Pixels
from ddim_lab.metrics.features import FeatureNetwork, Features
from ddim_lab.metrics.frechet import FrechetDistance, frechet_distance
from ddim_lab.metrics.networks.pixels import PixelFeatures
from ddim_lab.metrics.of_samples import kid, precision_recall
from ddim_lab.metrics.of_samples.inception_score import InceptionScore
from ddim_lab.metrics.of_samples.kid import kernel_distance
from ddim_lab.metrics.quality import Quality, Seen
from ddim_lab.metrics.references import Reference, obtain_held_out, obtain_reference, read_moments
from ddim_lab.metrics.statistics import FeatureSums, Moments
from ddim_lab.metrics.training import train_classifier
from ddim_lab.store import Store, read_json
from ddim_lab.store.records import Result

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def normal(seed: int, count: int, size: int, scale: float = 1.0) -> Vectors:
    return (scale * np.random.default_rng(seed).standard_normal((count, size))).astype(np.float32)


# -- kernel distance ------------------------------------------------------------------------------------


def test_a_frechet_distance_is_not_below_zero_and_never_a_number_where_it_is_none() -> None:
    draws = [torch.from_numpy(normal(seed, 40, 64, scale=30.0)) for seed in range(20)]
    same = [frechet_distance(*[FeatureSums.of([vectors]).moments()] * 2) for vectors in draws]
    assert 0.0 in same  # which rounding would have brought below
    assert 0.0 <= min(same) <= max(same) < 1e-3
    none = Moments(torch.full((64,), math.nan, dtype=torch.float64), torch.eye(64, dtype=torch.float64), None)
    assert math.isnan(frechet_distance(FeatureSums.of(draws[:1]).moments(), none))


@pytest.mark.parametrize("together", [0, 4096])
def test_kernel_distance_is_torch_fidelitys(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same subsets, one after the other or all at once."""
    monkeypatch.setattr(kid, "TOGETHER_AT_MOST", together)
    fake, real = normal(0, 400, 16, 1.2), normal(1, 300, 16)
    ours = kernel_distance(fake, real, subsets=20, subset_size=100)
    theirs = kid_features_to_metric(
        *(torch.from_numpy(x).double() for x in (fake, real)), kid_subsets=20, kid_subset_size=100, verbose=False
    )
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    """Unbiased at any N: over 200 draws the mean is within four standard errors of 0, where FD is far above it."""
    draws = [kernel_distance(normal(2 * k, 40, 4), normal(2 * k + 1, 40, 4), 1, 40).value for k in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    assert min(draws) < 0 < max(draws)
    shifted = kernel_distance(normal(0, 40, 4) + 1, normal(1, 40, 4), 1, 40).value
    assert shifted > 4 * np.std(draws)


def test_a_kernel_distance_of_all_vectors_has_no_spread() -> None:
    found = kernel_distance(normal(0, 30, 4), normal(1, 30, 4), subsets=100, subset_size=1000)
    assert (found.subsets, found.subset_size, found.spread) == (1, 30, None)
    with pytest.raises(ValueError, match="at least 2 vectors"):
        kernel_distance(normal(0, 1, 4), normal(1, 30, 4), 100, 1000)


# -- Inception Score ------------------------------------------------------------------------------------


def score(logits: torch.Tensor, splits: int, batch: int = 64) -> tuple[float, float]:
    metric = InceptionScore(splits)
    for part, names in zip(logits.split(batch), torch.arange(len(logits)).split(batch), strict=True):
        metric.update(part, names)
    return metric.compute()


def test_inception_score_is_torch_fidelitys() -> None:
    """Its splits are contiguous, ours take every tenth sample: the same after a reordering."""
    logits = torch.from_numpy(normal(0, 500, 7, 3.0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    interleaved = logits.reshape(10, 50, 7).transpose(0, 1).reshape(500, 7)
    mean, spread = score(interleaved, 10)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    sure = 1000.0 * torch.eye(5).repeat(40, 1)
    assert score(sure, 4, batch=7) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-9))
    assert score(torch.ones(40, 5), 4) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
    with pytest.raises(ValueError, match="2 samples a split, 20 in all"):
        score(sure[:19], 10)


# -- precision and recall -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1000, 2**24])
def test_precision_and_recall_are_torch_fidelitys(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", block)
    fake, real = 0.3 + normal(0, 400, 8, 0.8), normal(1, 300, 8)
    theirs = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), verbose=False)
    ours = precision_recall.precision_recall(fake, real, 3)
    assert ours == (pytest.approx(theirs["precision"], abs=1e-6), pytest.approx(theirs["recall"], abs=1e-6))
    assert 0.1 < ours[1] < ours[0] < 1
    radii = distances.squared_radii(real, 3)
    assert precision_recall.precision_recall(fake, real, 3, radii) == ours


def test_precision_and_recall_at_the_limits() -> None:
    real = normal(0, 200, 5)
    assert precision_recall.precision_recall(real, real, 3) == (1.0, 1.0)
    assert precision_recall.precision_recall(real + 100, real, 3) == (0.0, 0.0)
    few = np.repeat(real[:20], 10, axis=0)  # every sample is real, most real images are missing
    precision, recall = precision_recall.precision_recall(few, real, 3)
    assert precision == 1.0
    assert recall <= 0.2
    with pytest.raises(ValueError, match="3 neighbours need at least 4 points"):
        precision_recall.precision_recall(real[:3], real, 3)


# -- references -----------------------------------------------------------------------------------------

PIXELS = Features("FD (pixels)", "pixels", 4, Pixels)


def test_statistics_of_a_file_are_read_and_give_the_same_distance(tmp_path: Path) -> None:
    real, fake = (torch.from_numpy(normal(seed, 60, 4)) for seed in (0, 1))
    np.savez(tmp_path / "s.npz", mu=real.double().mean(0), sigma=np.cov(real.double().T))
    reference = read_moments(tmp_path / "s.npz", PIXELS)
    here, of_file = (FrechetDistance(known).of(fake) for known in (FeatureSums.of([real]).moments(), reference.moments))
    assert of_file.value == pytest.approx(here.value, rel=1e-9)
    assert of_file.replicates == pytest.approx(here.replicates, rel=1e-9)
    assert re.fullmatch(r"s\.npz, SHA-256 [0-9a-f]{12}, n unknown", reference.name)


def test_the_key_of_a_file_is_its_content(tmp_path: Path) -> None:
    def write(name: str, value: float) -> str:
        np.savez(tmp_path / name, mu=np.full(4, value), sigma=np.eye(4))
        return read_moments(tmp_path / name, PIXELS).key

    assert write("a.npz", 1.0) == write("b.npz", 1.0) != write("a.npz", 2.0)


def faulty(**arrays: Any) -> dict[str, Any]:
    return {"mu": np.zeros(4), "sigma": np.eye(4), **arrays}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(4)}, r"the arrays mu and sigma are needed, it has mu"),
        (faulty(mu=np.zeros(5)), r"need mu of shape \(4,\) and sigma of \(4, 4\), it has \(5,\) and \(4, 4\)"),
        (faulty(sigma=np.eye(3)), r"it has \(4,\) and \(3, 3\)"),
        (faulty(mu=np.array([0, 0, 0, np.nan])), "NaN or infinite"),
        (faulty(sigma=np.triu(np.ones((4, 4)))), "must be symmetric"),
        (faulty(sigma=-np.eye(4)), "no negative variance"),
        (faulty(mu=np.array([{}, {}, {}, {}], dtype=object)), r"is not a whole \.npz file of numbers .*pickle"),
        (faulty(mu=np.array(["a", "b", "c", "d"])), r"must be real numbers, it has mu of <U1"),
        (faulty(sigma=np.eye(4) * (1 + 1j)), r"must be real numbers, it has sigma of complex128"),
        (faulty(mu=np.full(4, 1e200)), r"holds values up to 1e\+200, which no features"),
        (faulty(sigma=np.eye(4) * 1e300), r"holds values up to 1e\+300, which no features"),
        (faulty(sigma=np.ones((4, 4)) * 2 - np.eye(4)), r"least eigenvalue is -1 beside a largest of 7"),
    ],
)
def test_faulty_statistics_are_refused_in_one_line(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ConfigError, match=words) as refused:
        read_moments(tmp_path / "s.npz", PIXELS)
    assert "\n" not in str(refused.value)


def test_a_covariance_of_few_images_is_one_in_spite_of_its_rounding(tmp_path: Path) -> None:
    """Rank 9 of 40: 31 eigenvalues are zero, as well as float32 can say it."""
    features = dataclasses.replace(PIXELS, num_features=40)
    sigma = np.cov(normal(0, 10, 40).T).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "s.npz", mu=np.zeros(40), sigma=sigma)
    assert read_moments(tmp_path / "s.npz", features).moments.count is None


def test_damaged_and_missing_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "half.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:200])
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(4))
    for name in ("half.npz", "empty.npz", "array.npy"):
        with pytest.raises(ConfigError, match=r"is not a whole \.npz file of numbers"):
            read_moments(tmp_path / name, PIXELS)
    with pytest.raises(ConfigError, match="there is no such file"):
        read_moments(tmp_path / "none.npz", PIXELS)


# -- all of them ----------------------------------------------------------------------------------------


def metrics(*overrides: str) -> MetricsConfig:
    return tiny.configure(*overrides).metrics


def test_one_pass_gives_every_measure_whatever_the_batches(tmp_path: Path) -> None:
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    features = PixelFeatures().obtain(data, store)
    reference = obtain_reference(features, data, "train", store, keep_features=True)
    held_out = obtain_held_out(features, data, store, count=100)
    assert held_out is not None
    assert held_out.count == 100
    network = Pixels()
    network.head = nn.Linear(64, 10)
    images = data.train.first(150)

    def measured(reference: Reference, batch: int) -> dict[str, Any]:
        settings = metrics("metrics.features=pixels", "metrics.kid_subset_size=50")
        seen = Seen("pixels", features, network, reference, held_out)
        quality = Quality(settings, [seen], 150, tmp_path, store)
        for part in images.split(batch):
            quality.update([network(part)])
        (found,) = quality.values().values()
        return {**tiny.columns(found), "why_not": {value.name for value in found if value.why_not is not None}}

    whole, parts = measured(reference, 150), measured(reference, 33)
    assert reference.features is not None
    assert reference.features.shape == (1437, 64)
    for name in (
        *("fd", "fd_se", "kid", "kid_spread", "inception_score", "improved_precision", "improved_recall"),
        *("density", "density_se", "coverage", "coverage_se", "memorisation", "memorisation_nearest"),
    ):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6), name
    # Pixels that never change make the covariance singular: its root magnifies rounding.
    known = frechet_distance(reference.moments, held_out.moments)
    assert whole["fd_held_out_at_equal_n"] == pytest.approx(known, rel=1e-7)
    assert whole["improved_precision"] == 1.0  # they are real
    assert whole["equal_n"] == 100
    assert whole["why_not"] == {"fd_extrapolated"}  # 150 samples are too few for 64 pixels
    np.savez(tmp_path / "s.npz", mu=reference.moments.mean, sigma=reference.moments.covariance)
    of_file = measured(read_moments(tmp_path / "s.npz", features), 150)
    assert of_file["fd"] == pytest.approx(whole["fd"], rel=1e-9)
    for name in ("fd_at_equal_n", "fd_held_out_at_equal_n"):
        assert of_file[name] == pytest.approx(whole[name], rel=1e-9)
    neighbours = {"improved_precision", "improved_recall", "density", "coverage", "memorisation"}
    assert of_file["why_not"] == {"fd_extrapolated", "mmd", "kid", *neighbours}


# -- what is found by name --------------------------------------------------------------------------------


def test_options_of_conf_metrics_are_those_that_networks_and_metrics_declare() -> None:
    written = OmegaConf.to_container(OmegaConf.load(config_folder() / "metrics" / "default.yaml"))
    assert isinstance(written, dict)
    kinds = [*NETWORKS.ours().values(), *METRICS.ours().values()]
    declared = [*MetricsConfig.model_fields, *(name for kind in kinds for name in kind.model_fields)]
    assert sorted(set(declared)) == sorted(written)
    config = metrics()
    assert config.model_dump() == {**written, "features": ("pixels", "classifier")}
    assert MetricsConfig.model_validate(config.model_dump()) == config != metrics("metrics.kid_subsets=7")
    assert config.identity() == {
        **{"frechet_post_stratified": True, "frechet_extrapolated": True, "mmd": True, "mmd_bandwidth": None},
        **{"class_proportions": True, "errors": "influence"},
        **{"kid": True, "kid_subsets": 100, "kid_subset_size": 1000},
        **{"inception_score": True, "inception_score_splits": 10, "precision_recall": True, "neighbours": 3},
        **{"density_coverage": True, "density_coverage_neighbours": 5, "memorisation": True},
        **{"speed_repeats": 3, "noise_seeds": 2},
    }


@pytest.mark.parametrize("kind", [NETWORKS, METRICS])
def test_each_is_named_as_its_file_and_its_options_after_it(kind: Kind[Any]) -> None:
    found = kind.ours()
    assert len(found) > 2
    for name, each in found.items():
        assert each.name == name
        assert issubclass(each, FeatureNetwork if kind is NETWORKS else Metric)
        own = [option for option in each.model_fields if option in each.__annotations__]
        assert all(option.startswith(name) or option == "neighbours" for option in own)


@pytest.mark.parametrize("name", METRICS.ours())
def test_each_metric_says_what_its_values_mean_nothing_without(name: str, tmp_path: Path) -> None:
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    features = PixelFeatures().obtain(data, store)
    reference = obtain_reference(features, data, "train", store, keep_features=True)
    settings = metrics("metrics.features=pixels", "metrics.kid_subset_size=20")
    network, images = Pixels(), data.train.first(60)
    network.head = nn.Linear(64, 10)
    (metric,) = (each for each in settings.chosen if each.name == name)
    assert isinstance(metric, Metric)
    features = dataclasses.replace(features, tells_classes=True)
    classes = Classes("digits pixels", torch.full((10,), 0.1, dtype=torch.float64))
    held_out = obtain_held_out(features, data, store, count=40) if name == "memorisation" else None
    comparison = Comparison(features, network.head, reference, 60, held_out, classes, data, store, None)
    running = metric.start(comparison)
    with torch.inference_mode():
        running.update(Batch(network(images), torch.arange(60), images, torch.arange(60) % 10))
    values = running.compute(network(images).numpy())
    assert values
    for value in values:
        assert isinstance(value.value, float) == (value.name != "fd_extrapolated")  # 60 samples are too few
        if value.value is None:
            continue
        assert value.why_not is None
        assert value.heading or value.column
        assert value.count == 60 or value.name == "nearest_held_out_to_train"
        assert (value.se is None and value.spread is None) or value.error
        if value.replicates:  # it is compared between cells
            assert (value.comparable["name"], value.comparable["features"]) == (features.name, features.digest)


def test_a_metric_that_is_off_is_not_measured(tmp_path: Path) -> None:
    names = ("kid", "inception_score", "precision_recall", "mmd", "class_proportions")
    names += ("density_coverage", "memorisation")
    off = tuple(f"metrics.{name}=false" for name in names)
    settings = metrics(*off)
    assert [metric.name for metric in settings.chosen] == ["frechet", "nearest"]
    assert not settings.needs_vectors("pixels")
    on = metrics(*off[1:])
    assert on.needs_vectors("pixels")
    assert not on.needs_vectors("inception_spatial")
    assert [metric.name for metric in on.chosen_in("inception_spatial")] == ["frechet", "nearest"]


def test_options_of_metrics_are_checked_as_their_own() -> None:
    for override, words in (
        ("metrics.kid_subset_size=1", r"metrics\.kid_subset_size=1: must be at least 2"),
        ("metrics.kid=3", r"metrics\.kid=3: must be true or false"),
        ("+metrics.kid_subset=3", r"metrics\.kid_subset: no such option"),
        ("~metrics.neighbours", r"metrics\.neighbours is not set"),
        ("metrics.features=[]", r"metrics\.features=\[\] names no network: give some of 'classifier', .*"),
        (
            "metrics.features=[pixels,x]",
            r"metrics\.features=\[pixels,x\]: x must be 'classifier', 'clip', 'dinov2', .*",
        ),
        ("metrics.features=[pixels,pixels]", r"metrics\.features=\[pixels,pixels\] names pixels twice"),
        (
            "metrics.features=3",
            r"metrics\.features=3: must be 'classifier', 'clip', .*, 'inception_spatial' or 'pixels'",
        ),
        (
            "metrics.features=x",
            r"metrics\.features=x: must be 'classifier', 'clip', .*, 'inception_spatial' or 'pixels'",
        ),
        ("metrics.inception_weights=''", r"metrics\.inception_weights is empty: .*"),
    ):
        with pytest.raises(ConfigError) as refused:
            metrics(override)
        assert re.fullmatch(words, str(refused.value))


def test_networks_and_metrics_are_found_and_checked_without_torch() -> None:
    script = "from ddim_lab.config.metrics import METRICS, NETWORKS; print(*METRICS.ours(), *NETWORKS.ours())"
    line = [sys.executable, "-c", f"{script}; import sys; print(*sys.modules)"]
    names, modules = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert names.split() == [*METRICS.ours(), *NETWORKS.ours()]
    assert not {"torch", "torchmetrics", "scipy", "safetensors"} & set(modules.split())


def test_the_recipe_goes_by_the_size_of_the_images() -> None:
    assert recipe_for((1, 8, 8)) == recipe_for((3, 16, 16)) == SMALL
    assert recipe_for((1, 32, 32)) == recipe_for((3, 64, 17)) == LARGE
    for shape in ((1, 32, 32), (3, 64, 48)):
        network = make_classifier(shape[0], 7, LARGE).eval()
        features = network(torch.zeros(2, *shape, dtype=torch.uint8))
        assert features.shape == (2, 128)
        assert network.head(features).shape == (2, 7)


def test_the_larger_recipes_network_learns() -> None:
    """At a tenth of its size, in a few steps."""
    recipe = {**LARGE, "widths": [8, 16], "num_features": 16, "steps": 60}
    data = load_data(Digits(name="digits", root=None, num_samples=10))
    assert train_classifier(make_classifier(1, 10, recipe), data, recipe) > 0.6


def test_a_folder_without_labels_has_no_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c", "d"):
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    line = ("data=image_folder", f"data.root={tmp_path}", "data.image_size=8", "data.channels=1", "model=gaussian")
    assert tiny.run(tmp_path / "o", *line, settings=tiny.SMALL) == 2
    assert re.fullmatch(r"ddim_lab: metrics\.features=classifier learns from labels.*\n", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_a_cell_has_them_in_its_result_and_row(tmp_path: Path) -> None:
    arguments = ("model=gaussian", "steps=3", "logger=csv", "metrics.features=pixels", "metrics.kid_subset_size=20")
    assert tiny.run(tmp_path, *arguments, settings=tiny.SMALL) == 0
    (result,) = (tmp_path / "cells").glob("*/result.json")
    quality = tiny.measured(read_json(result))
    (row,) = tiny.results(*tiny.sweeps(tmp_path))
    for column in ("kid", "kid_spread", "improved_precision", "improved_recall"):
        assert float(row[column]) == quality[column]
    assert "inception_score" not in row
    score = next(value for value in read_json(result)["values"] if value["name"] == "inception_score")
    assert score["why_not"] == "FD (digits pixels): the network knows no classes"
    assert not list((tmp_path / "cells").glob("*.partial"))


@pytest.mark.slow
def test_several_networks_look_at_the_same_images_in_one_pass(
    tmp_path: Path, digits: Callable[[Path], Path], walked: list[int]
) -> None:
    """Each network's values are those of a cell that has it alone, under its name."""
    outputs = digits(tmp_path / "outputs")
    line = ("model=gaussian", "steps=3", "logger=csv", "metrics.kid_subset_size=20")
    found = {}
    for features in ("[pixels,classifier]", "pixels", "classifier"):
        walked.clear()
        assert tiny.run(outputs, *line, f"metrics.features={features}", settings=tiny.SMALL) == 0
        (row,) = tiny.results(tiny.sweeps(outputs)[-1])
        found[features] = row, sum(walked)
    (both, cost), (pixels, alone), (classifier, _) = found.values()
    assert cost > 0
    assert alone == 0  # the samples are there
    own = ("fd", "fd_se", "fd_features", "fd_reference", "fd_reference_key", "kid", "kid_spread", "improved_recall")
    for name in own:
        assert both[name] == pixels[name], name
        stem, part = ("fd", name[2:]) if name.startswith("fd") else (name.removesuffix("_spread"), "")
        renamed = f"{stem}_classifier{part or name.removeprefix(stem)}"
        assert both[renamed] == classifier[name], name
    assert both["nearest_samples_to_train"] == pixels["nearest_samples_to_train"]
    assert "nearest_samples_to_train_classifier" not in both
    assert both["inception_score_classifier"] == classifier["inception_score"]
    cell = Result.read(read_json(outputs / "cells" / both["cell"] / "result.json"))
    assert cell.identity["measured"]["features"] == [pixels["fd_features"], classifier["fd_features"]]
    assert re.match(r"FD \(digits pixels\) \S+ ± \S+, FD \(digits classifier\) \S+ ± ", cell.headline)
    page = (tiny.sweeps(outputs)[0] / "report.html").read_text(encoding="utf-8")
    for network in ("pixels", "classifier"):
        name = f"FD (digits {network})"
        facts = next(value.facts for value in cell.values if value.heading == name)
        table = page[page.index(f"Beside {name}") :]  # its own table, with the network's digest
        assert facts in re.sub("<[^>]*>", "", table)[:1000], network


def test_a_file_of_statistics_is_of_one_network() -> None:
    with pytest.raises(
        ConfigError, match=r"reference_statistics is .* of one network's features, .* names 2 that go by them: name one"
    ):
        metrics("metrics.features=[pixels,classifier]", "metrics.reference_statistics=s.npz")
    assert metrics("metrics.features=[pixels]") == metrics("metrics.features=pixels")
    with pytest.raises(ConfigError, match=r"inception_tf32 is for metrics\.features=inception, not pixels, classifier"):
        metrics("metrics.features=[pixels,classifier]", "metrics.inception_tf32=true")


def test_a_cell_refers_to_a_file_of_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
    line = ("model=gaussian", "steps=3", "logger=csv", "metrics.features=pixels")
    line = (*line, f"metrics.reference_statistics={tmp_path}/s.npz")
    assert tiny.run(tmp_path / "o", *line, settings=tiny.SMALL) == 0
    (result,) = (tmp_path / "o" / "cells").glob("*/result.json")
    assert str(tmp_path) not in str(read_json(result)["identity"])
    (row,) = tiny.results(*tiny.sweeps(tmp_path / "o"))
    assert re.fullmatch(r"s\.npz, SHA-256 [0-9a-f]{12}, n unknown", row["fd_reference"])
    assert not {"kid", "improved_precision"} & row.keys()  # no row has them: the images are not known
    assert row["precision"] == "fp32"
    assert float(row["fd_held_out_at_equal_n"]) > 0
    assert tiny.run(tmp_path / "o", *line, "metrics.reference=all", settings=tiny.SMALL) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "o")[-1])
    assert row["cached"] == "False"  # no images are left out: another cell
    assert "fd_held_out_at_equal_n" not in row
    assert tiny.run(tmp_path / "o", *line, "task=consistency", settings=tiny.SMALL) == 2
    assert "metrics.reference_statistics is not for task=consistency" in capsys.readouterr().err


# -- what is promised of all ------------------------------------------------------------------------------

SCORING = """
import resource, sys
from pathlib import Path
import torch
from ddim_lab.jobs.plan import checked_config
from ddim_lab.metrics.classifier import LARGE, make_classifier
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.quality import Quality, Seen
from ddim_lab.metrics.references import Reference
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.store import Store

torch.set_num_threads(1)
folder = Path(sys.argv[1])
off = ["kid", "mmd", "precision_recall", "density_coverage", "memorisation"]
metrics = checked_config([f"metrics.{name}=false" for name in off]).metrics
network = make_classifier(3, 10, {**LARGE, "widths": [8, 16]}).eval()
images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8)
features = network(images).detach()
reference = Reference("random", "random", FeatureSums.of([features]).moments(), None, None)
found = Features("FD (random)", "random", 128, lambda: network)
layer = Features("sFID", "layer", 32, lambda: network)
moments = FeatureSums.of([features[:, :32]]).moments()
seen = [
    Seen("pixels", found, network, reference, None),
    Seen("inception_spatial", layer, network, Reference("layer", "layer", moments, None, None), None),
]
for count in map(int, sys.argv[2:]):
    quality = Quality(metrics, seen, count, folder, Store(folder))
    for start in range(0, count, 256):
        with torch.inference_mode():
            vectors = network(images[: count - start])
            quality.update([vectors, vectors[:, :32]])
    values = {value.name: value for found in quality.values().values() for value in found}
    assert values["fd_inception_spatial"].count == count and "inception_score_inception_spatial" not in values
    assert values["fd"].count == count and values["fd"].value >= 0 and values["inception_score"].value >= 1
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """Peak resident memory of scoring 10,000 and then 30,000 images at 32x32, which alone would be 31 and 92 MB.

    Both are more than the vectors of a block; those on disk, which count where they are mapped, are 13 MB more.
    """
    command = [sys.executable, "-c", SCORING, str(tmp_path), "10000", "30000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    few, many = (int(peak) / 1024 for peak in done.stdout.split())
    assert many - few < 40
    assert many < 4 * 1024
