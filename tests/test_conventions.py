"""The audit's parts: what becomes of images, protocols, and distances by them, against the same written out by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import configure

from ddim_lab.audit import audit
from ddim_lab.conventions.factors import SCORING, Subject, scoring
from ddim_lab.conventions.passes import Passes, Real, counted
from ddim_lab.conventions.pixels import First, Mirrored, as_levels, jpeg, round_trip
from ddim_lab.conventions.protocol import PLAIN, Factor, Protocol, compatible, together
from ddim_lab.conventions.records import Audited
from ddim_lab.conventions.source import FileSource
from ddim_lab.data.base import load_data
from ddim_lab.data.images import MemoryImages, from_uint8
from ddim_lab.data.samples import read_samples
from ddim_lab.metrics.features import Features, obtain_features
from ddim_lab.metrics.frechet import frechet_distance
from ddim_lab.metrics.statistics import Moments
from ddim_lab.store import Store

CPU = torch.device("cpu")


def factor(name: str) -> Factor:
    return next(each for each in SCORING if each.name == name)


# -- pixels ---------------------------------------------------------------------------------------------


def test_a_round_trip_takes_one_from_63_of_256_levels() -> None:
    lost = torch.arange(256) - round_trip().long()
    assert lost.unique().tolist() == [0, 1]
    assert int(lost.sum()) == 63


def test_truncation_of_rounded_images_is_that_of_values_in_distribution() -> None:
    """Uniform values: truncated, beside rounded and then truncated by coins: each level as often, to 5 errors."""
    values = torch.rand(64, 1, 40, 40, generator=torch.Generator().manual_seed(1)) * 20.0 + 100.0
    exact = as_levels(values, "truncated", torch.arange(64))
    coined = as_levels(values.round().to(torch.uint8), "truncated", torch.arange(64))
    raised = as_levels(exact, "raised", torch.arange(64))
    rounded = as_levels(values, "rounded", torch.arange(64))
    for one, other in ((exact, coined), (rounded, raised)):
        inside = slice(102, 118)  # the ends of the range are others
        counts = [torch.bincount(images.flatten().long(), minlength=130)[inside].double() for images in (one, other)]
        assert ((counts[0] - counts[1]).abs() < 5.0 * (counts[0] + 1.0).sqrt()).all()
    assert float(exact.double().mean() - rounded.double().mean()) == pytest.approx(-0.5, abs=0.02)


def test_coins_are_named_by_the_image_and_leave_both_ends() -> None:
    images = torch.randint(0, 256, (12, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images[0, 0] = 0
    images[1, 0] = 255
    whole = as_levels(images, "truncated", torch.arange(12))
    parts = [as_levels(images[i], "truncated", i) for i in torch.split(torch.arange(12), 5)]
    assert torch.equal(whole, torch.cat(parts))
    assert not whole[0, 0].any()
    assert bool((whole[1, 0] == 255).all())


def test_floats_stay_what_they_are_and_are_not_made_up() -> None:
    values = torch.rand(2, 1, 4, 4) * 255.0
    assert as_levels(values, "float", torch.arange(2)) is values
    with pytest.raises(ValueError, match="not known"):
        as_levels(values.to(torch.uint8), "float", torch.arange(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_writes(channels: int) -> None:
    images = torch.randint(0, 256, (3, channels, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = jpeg(images, 75)
    assert found.shape == images.shape
    for image, through in zip(images, found, strict=True):
        file = io.BytesIO()
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, "JPEG")  # whose default is 75
        again = np.asarray(Image.open(file)).reshape(pixels.shape)
        assert np.array_equal(through.permute(1, 2, 0).numpy(), again)
    assert (jpeg(images, 95).int() - images.int()).abs().float().mean() < (
        found.int() - images.int()
    ).abs().float().mean()


def test_parts_and_mirror_images_of_a_set() -> None:
    images = MemoryImages(torch.arange(24, dtype=torch.uint8).reshape(4, 1, 2, 3), torch.arange(4))
    mirrored = Mirrored(First(images, 3))
    assert len(mirrored) == 6
    assert torch.equal(mirrored.first(6)[3:], images.first(3).flip(-1))
    assert torch.equal(mirrored.batch(torch.tensor([4, 1])), torch.stack([images.images[1].flip(-1), images.images[1]]))
    assert [len(part) for part in mirrored.batches(4)] == [4, 2]


# -- protocols ------------------------------------------------------------------------------------------


def test_factors_that_say_something_of_the_same_exclude_each_other() -> None:
    jpeg_75, jpeg_95, half = factor("samples_jpeg_75"), factor("samples_jpeg_95"), factor("samples_half")
    assert compatible([jpeg_75, half])
    assert not compatible([jpeg_75, jpeg_95])
    assert together([jpeg_75, half]) == Protocol(jpeg=75, count="half")
    with pytest.raises(ValueError, match="exclude each other"):
        together([jpeg_75, jpeg_95])
    assert not compatible([jpeg_75, factor("levels_float")])  # JPEG is of 8 bits

    def made(name: str, aspect: str) -> Factor:
        return Factor(name, "sampling", name, "", (), "", 1, None, {"made": ((aspect, "x"),)})

    assert together([made("b", "b"), made("a", "a")]).made == (("a", "x"), ("b", "x"))
    assert not compatible([made("a", "a"), made("c", "a")])


def test_every_convention_says_who_follows_it_and_where_that_stands() -> None:
    for each in SCORING:
        assert each.who, each.name
        assert all(each.who), each.name
        assert each.source, each.name
        assert each.says.endswith("."), each.name
    assert len({each.name for each in SCORING}) == len(SCORING)
    assert len({each.label for each in SCORING}) == len(SCORING)


def test_what_can_t_be_tried_says_why() -> None:
    small = Subject(128, 2, False, "statistics", None, 0, False, 64)
    why = {each.name: each.why_not for each in scoring(small)}
    assert why["reference_held_out"] == "the reference is a mean and a covariance: its images are not known"
    assert why["samples_whole_batches"] == "N = 128 is a multiple of 64"
    assert "8 bits" in (why["levels_float"] or "")
    assert "1 or 3 channels" in (why["samples_jpeg_75"] or "")
    assert why["samples_half"] is None
    assert why["samples_infinite"] == "an extrapolation in 64 features needs 1,280 samples"
    assert why["covariance_n"] == "of how many images the reference is, is not known"
    large = Subject(50_000, 3, True, "split", 50_000, 10_000, True, 2048)
    assert [each.name for each in scoring(large) if each.why_not] == []


def test_how_many_images_are_counted() -> None:
    assert [counted(count, 50_000) for count in (None, "half", "whole_batches", 10_000, 60_000)] == [
        *(50_000, 25_000, 49_984, 10_000, 50_000),
    ]


# -- distances, written out by hand ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images near the digits, in a file; and an outputs folder."""
    folder = tmp_path_factory.mktemp("audit")
    held_out = load_data(configure("data=digits").data).held_out.first(300)
    noise = np.random.default_rng(5).normal(0.0, 12.0, held_out.shape)
    images = np.clip(held_out.numpy() + noise, 0, 255).round().astype(np.uint8)
    np.savez(folder / "samples.npz", arr_0=images.transpose(0, 2, 3, 1))
    return folder / "samples.npz", folder / "outputs"


def pixels(images: torch.Tensor, divisor: int = 1) -> Moments:
    flat = from_uint8(images).flatten(1).double()
    return Moments(flat.mean(0), torch.cov(flat.T, correction=divisor), len(flat))


def by_hand(name: str, samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor) -> float:
    half, order = samples[: len(samples) // 2], torch.arange
    reference = {
        "reference_held_out": lambda: held_out,
        "reference_all": lambda: torch.cat([train, held_out]),
        "reference_half": lambda: train[: len(train) // 2],
        "reference_flipped": lambda: torch.cat([train, train.flip(-1)]),
        "reference_jpeg_75": lambda: jpeg(train, 75),
        "reference_round_trip": lambda: round_trip()[train.long()],
    }.get(name, lambda: train)()
    seen = {
        "samples_half": lambda: half,
        "samples_whole_batches": lambda: samples[:256],
        "samples_jpeg_95": lambda: jpeg(samples, 95),
        "levels_truncated": lambda: as_levels(samples, "truncated", order(len(samples))),
        "levels_round_trip": lambda: round_trip()[samples.long()],
    }.get(name, lambda: samples)()
    divisor = 0 if name == "covariance_n" else 1
    return frechet_distance(pixels(reference, divisor), pixels(seen, divisor))


@pytest.fixture(scope="module")
def audited(scored: tuple[Path, Path]) -> Audited:
    path, outputs = scored
    return audit(path, ["data=digits", "metrics.features=pixels", f"outputs_dir={outputs}", "progress=none"])


@pytest.mark.slow
def test_each_convention_gives_what_it_says(scored: tuple[Path, Path], audited: Audited) -> None:
    data, samples = load_data(configure("data=digits").data), read_samples(scored[0]).images.first(300)
    train, held_out = data.train.first(2000), data.held_out.first(2000)
    found = {tried.factors[0]: tried.measured[0] for tried in audited.tried}
    assert audited.plain.measured[0].value == pytest.approx(by_hand("", samples, train, held_out), rel=1e-6)
    named = {
        *("reference_held_out", "reference_all", "reference_half", "reference_flipped", "reference_jpeg_75"),
        *("reference_round_trip", "samples_half", "samples_whole_batches", "samples_jpeg_95", "levels_truncated"),
        *("levels_round_trip", "covariance_n"),
    }
    assert named <= found.keys()
    for name in named:
        assert found[name].value == pytest.approx(by_hand(name, samples, train, held_out), rel=1e-6), name
        change = found[name].value - audited.plain.measured[0].value
        assert found[name].change == pytest.approx(change)
        assert found[name].change_se is not None


def test_a_variant_never_bears_the_plain_name(audited: Audited) -> None:
    assert audited.plain.name == audited.metric == "FD (digits pixels)"
    assert all(tried.name.startswith("FD (digits pixels) variant: ") for tried in audited.tried)


def test_what_was_not_tried_is_said(audited: Audited) -> None:
    why = {untried.factors[0]: untried.why_not for untried in audited.untried}
    assert why["levels_float"].startswith("the images have 8 bits")
    assert why["class_proportions"].startswith("no network at hand tells")
    assert "samples_infinite" in why  # 300 images of 64 features
    assert "resize" in why
    told = {*why, *(tried.factors[0] for tried in audited.tried)}
    assert {each.name for each in SCORING} <= told


def test_a_record_is_read_as_it_was_written(audited: Audited) -> None:
    assert Audited.read(audited.content()) == audited


def test_an_audit_makes_no_pass_twice(
    scored: tuple[Path, Path], audited: Audited, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Passes, variant: str) -> None:
        raise AssertionError("a network was loaded")

    path, outputs = scored
    config = configure("data=digits", "metrics.features=pixels")
    store, data = Store(outputs), load_data(config.data)
    features = obtain_features(config.metrics.networks[0], data, store)
    passes = Passes(features, (), None, Real(data, "train", None, None, "", True), store, CPU)
    source = FileSource(read_samples(path))
    protocols = [together([factor(name)]) for name in ("samples_jpeg_75", "reference_flipped", "reference_all")]
    cost = passes.cost([(source, each, 300) for each in (PLAIN, *protocols)])
    assert (cost.passes, cost.forwards, cost.distances) == ((), 0, 4)
    new = passes.cost([(source, Protocol(jpeg=60), 300), (source, Protocol(jpeg=60, flips=True), 300)])
    assert [one.images for one in new.passes] == [300]
    monkeypatch.setattr(Passes, "_network", never)
    known = next(tried.measured[0] for tried in audited.tried if tried.factors == ("samples_jpeg_75",))
    found = passes.estimate(source, protocols[0], 300)
    assert (found.value, found.se) == (known.value, known.se)


def test_classes_and_extrapolation_are_what_a_cell_says(tmp_path: Path, digits: object) -> None:
    """To the last digit, the plain distance too, from `ddim_lab.score`'s own code."""
    from ddim_lab.config.metrics import MetricsConfig
    from ddim_lab.score import score

    assert callable(digits)
    outputs = digits(tmp_path / "outputs")
    data = load_data(configure("data=digits").data)
    images = data.train.first(1400).numpy().copy()
    images[::3] = np.roll(images[::3], 1, axis=-1)
    np.savez(tmp_path / "samples.npz", arr_0=images.transpose(0, 2, 3, 1))
    options = ["data=digits", "metrics.features=[pixels,classifier]", f"outputs_dir={outputs}", "progress=none"]
    chosen = ["class_proportions", "samples_infinite", "samples_half"]
    found = audit(tmp_path / "samples.npz", options, factors=chosen)
    metrics: MetricsConfig = configure("metrics.features=[pixels,classifier]").metrics
    store = Store(outputs)
    features: list[Features] = [obtain_features(network, data, store) for network in metrics.networks]
    values = score(read_samples(tmp_path / "samples.npz"), None, None, metrics, data, features, store, CPU)["pixels"]
    by_name = {value.name: value for value in values}
    tried = {each.factors[0]: each.measured[0] for each in found.tried}
    for measured, name in (
        (found.plain.measured[0], "fd"),
        (tried["class_proportions"], "fd_post_stratified"),
        (tried["samples_infinite"], "fd_extrapolated"),
    ):
        assert (measured.value, measured.se) == (by_name[name].value, by_name[name].se), name
