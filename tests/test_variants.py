"""Feature networks as others take them: each variant against the code that does it so, on the same random weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torchvision
from PIL import Image
from test_inception import features_of, random_images, save_random
from test_networks import DINO, make_dinov2
from torch import Tensor, nn
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms import functional as transforms

from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.errors import ConfigError
from ddim_lab.metrics import inception, torchvision_inception
from ddim_lab.metrics.classifier import make_classifier, recipe_for
from ddim_lab.metrics.extractor import Extractor, Pixels
from ddim_lab.metrics.features import FeatureNetwork, Variant
from ddim_lab.metrics.inception import Inception
from ddim_lab.metrics.networks.dinov2 import DINOv2Features
from ddim_lab.metrics.torchvision_inception import check_torchvisions, find_torchvisions
from ddim_lab.store import Store, content_key

ONE = random_images(5, 1, 256)
SHRUNK = torch.randint(0, 256, (1, 3, 310, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
"""Larger than what the network sees, and no square: antialiasing shows, and which side is which."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture(scope="module")
def torchvisions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's, with the auxiliary classifier, its weights drawn at random."""
    torch.manual_seed(1)
    network = torchvision.models.Inception3(init_weights=False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("weights") / "torchvision.pth"
    torch.save(network.state_dict(), path)
    return path


def variants_of(network: FeatureNetwork, folder: Path) -> Mapping[str, Variant]:
    data = load_data(Digits(name="digits", root=None, num_samples=10))
    return {variant.name: variant for variant in network.variants(data, Store(folder))}


@pytest.fixture(scope="module")
def variants(weights: Path, torchvisions: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Variant]:
    return variants_of(features_of(weights, torchvisions=torchvisions), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def load(variants: Mapping[str, Variant]) -> Callable[[str], Any]:
    """A variant's extractor, loaded once for all tests."""
    return functools.cache(lambda name: variants[name].features().load())


@pytest.fixture(scope="module")
def published(weights: Path) -> Inception:
    return Inception(weights)


@pytest.fixture(scope="module")
def torch_fidelitys(weights: Path) -> nn.Module:
    return FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """To a share of the largest feature."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# -- the network of 2015 --------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_the_published_way_is_torch_fidelitys_and_floats_go_through_the_same_layers(
    published: Inception, torch_fidelitys: nn.Module
) -> None:
    """Floats don't go through the library's own forward: the same bits say that nothing of it is left out."""
    for images in (ONE, SHRUNK):
        found = published(images)
        same(found, torch_fidelitys(images)[0])
        assert torch.equal(published(images.float()), found)


@pytest.mark.slow
@torch.inference_mode()
def test_antialiased_is_what_torchmetrics_does_by_default(weights: Path, load: Callable[[str], Any]) -> None:
    theirs = FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).inception
    for images in (ONE, SHRUNK):
        same(load("antialiased")(images), theirs(images))


def pytorch_fids(images: Tensor) -> Tensor:
    """What pytorch-fid gives to its network's first layer, of `ToTensor`'s images."""
    return 2 * functional.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1


def clean_fids(images: Tensor) -> Tensor:
    """clean-fid's mode clean: each channel by Pillow in float32, then its network's normalisation."""

    def channel(plane: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        image = Image.fromarray(plane.astype(np.float32)).resize((299, 299), resample=Image.Resampling.BICUBIC)
        assert image.mode == "F"
        return np.asarray(image).clip(0, 255)

    found = np.stack([np.stack([channel(plane) for plane in image]) for image in images.numpy()])
    return (torch.from_numpy(found) - 128) / 128


def torchvisions_resize(images: Tensor) -> Tensor:
    """torchvision's Resize of Pillow's images, and then the published way, which finds nothing left to resize."""
    pillow = (transforms.resize(transforms.to_pil_image(image), [299, 299]) for image in images)
    return (torch.stack([transforms.pil_to_tensor(image) for image in pillow]).float() - 128) / 128


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "prepared", "tolerance"),
    [
        # 2 x / 255 - 1 is not rounded as (x - 127.5) / 127.5 is
        ("bilinear", pytorch_fids, 1e-5),
        ("pillow_bicubic", clean_fids, 1e-6),
        ("pillow_bilinear", torchvisions_resize, 1e-6),
    ],
)
def test_others_resizes_are_theirs(
    name: str,
    prepared: Callable[[Tensor], Tensor],
    tolerance: float,
    torch_fidelitys: nn.Module,
    load: Callable[[str], Any],
) -> None:
    blocks = [block for kind, block in torch_fidelitys.named_children() if kind != "fc"]
    for images in (ONE, SHRUNK):
        same(load(name)(images), nn.Sequential(*blocks, nn.Flatten())(prepared(images)), tolerance)


# -- torchvision's --------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.inference_mode()
def test_torchvisions_network_is_its_own_forward(torchvisions: Path, load: Callable[[str], Any]) -> None:
    """As `inception_v3` with pretrained weights is built: it undoes the normalisation by itself."""
    theirs = torchvision.models.Inception3(init_weights=False, transform_input=True).eval()
    theirs.load_state_dict(torch.load(torchvisions, weights_only=True))
    theirs.fc = nn.Identity()
    cases = (("torchvision", False, True), ("torcheval", False, False), ("torchvision_corners", True, True))
    for name, corners, normalised in cases:
        pixels = functional.interpolate(ONE / 255, size=(299, 299), mode="bilinear", align_corners=corners)
        if normalised:
            pixels = transforms.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        same(load(name)(ONE), theirs(pixels))


@pytest.mark.slow
def test_torchvisions_weights_are_found_and_checked(
    weights: Path, torchvisions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_torchvisions(torchvisions)
    old = {name: value for name, value in torch.load(torchvisions).items() if "num_batches" not in name}
    for name, state in (
        ("old", old),
        ("part", {"fc.bias": old["fc.bias"]}),
        ("wide", old | {"fc.bias": torch.ones(2)}),
    ):
        torch.save(state, tmp_path / f"{name}.pth")
    check_torchvisions(tmp_path / "old.pth")
    for path in (weights, tmp_path / "part.pth", tmp_path / "wide.pth"):
        with pytest.raises(ConfigError, match=r"does not hold the weights of torchvision's Inception v3$"):
            check_torchvisions(path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision_inception, "WEIGHTS_URL", torchvisions.as_uri())
    place = tmp_path / "hub" / "checkpoints" / "inception_v3_google-0cc3c7bd.pth"
    without = variants_of(features_of(weights), tmp_path)["torchvision"]
    words = rf"{place} is missing, and the download failed .*hash.*set metrics\.inception_torchvision_weights"
    with pytest.raises(ConfigError, match=words) as refused:
        without.features()
    assert "\n" not in str(refused.value)
    place.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"is damaged \(its SHA-256 does not begin 0cc3c7bd\)"):
        find_torchvisions(None)
    with pytest.raises(ConfigError, match=r"metrics\.inception_torchvision_weights=/nowhere: there is no such file"):
        find_torchvisions("/nowhere")
    with pytest.raises(ConfigError, match=r"is for metrics\.features=inception, not pixels"):
        tiny.configure("metrics.features=pixels", "metrics.inception_torchvision_weights=/nowhere")


# -- names, keys, and where they are from ---------------------------------------------------------------


def test_no_variant_is_called_fid_and_each_has_a_name_and_key_of_its_own(
    weights: Path,
    variants: Mapping[str, Variant],
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", inception.weights_digest(weights))
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    plain = features_of(weights).obtain(data, store)
    found = {name: variant.features() for name, variant in variants.items()}
    assert plain.name == "FID"
    digest = inception.weights_digest(weights)
    published = {"kind": "inception", "weights": digest, "resize": "299x299 TF1 bilinear", "layer": 2048}
    assert plain.digest == content_key(published)  # as it was before there were variants
    assert found["antialiased"].name == "FD (Inception, antialiased resize)"
    assert not any(each.is_fid for each in found.values())
    for what in ("name", "digest"):
        assert len({getattr(each, what) for each in (plain, *found.values())}) == len(variants) + 1
    assert all(each.num_features == 2048 for each in found.values())
    of_2015 = ("antialiased", "bilinear", "pillow_bicubic", "pillow_bilinear")
    assert len({load(name).network for name in of_2015}) == 4  # no forward of one is taken for another's
    assert [name for name in variants if not load(name).takes_levels] == ["pillow_bilinear"]


def test_recipes_of_dinov2_are_variants_of_each_other(tmp_path: Path) -> None:
    folder = make_dinov2(tmp_path / "w")
    for recipe in ("dgm_eval", "edm2", "torch_fidelity"):
        network = DINOv2Features(dinov2_weights=str(folder), **DINO | {"dinov2_recipe": recipe})
        found = variants_of(network, tmp_path)
        told(found)
        assert {*found, recipe} == {"dgm_eval", "edm2", "torch_fidelity"}
        data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
        for name, variant in found.items():
            other = DINOv2Features(dinov2_weights=str(folder), **DINO | {"dinov2_recipe": name})
            assert variant.features().digest == other.obtain(data, store).digest
            assert variant.features().digest != network.obtain(data, store).digest


def told(variants: Mapping[str, Variant]) -> None:
    """Each has what a reader needs to look it up."""
    assert variants
    for name, variant in variants.items():
        assert re.fullmatch(r"[a-z0-9_]+", name)
        assert variant.label
        assert re.fullmatch(r"[A-Z].*\.", variant.says)
        assert variant.who
        assert all(variant.who)
        assert "https://" in variant.source
        assert ("effect" in variant.source) == (variant.effect is not None)


def test_each_variant_says_who_and_where(variants: Mapping[str, Variant]) -> None:
    told(variants)


# -- images that were never rounded ---------------------------------------------------------------------


def other_networks(folder: Path) -> dict[str, Extractor]:
    found: dict[str, Extractor] = {
        "pixels": Pixels(),
        "classifier": make_classifier(3, 10, recipe_for(ONE.shape[1:])).eval(),
    }
    dino = DINOv2Features(dinov2_weights=str(make_dinov2(folder)), **DINO | {"dinov2_recipe": "edm2"})
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(folder)
    found["dinov2"] = dino.obtain(data, store).load()
    found["dinov2 by TF1"] = variants_of(dino, folder)["torch_fidelity"].features().load()
    return found


@pytest.mark.slow
@torch.inference_mode()
def test_whole_levels_are_the_uint8_images_and_others_are_not(
    published: Inception, load: Callable[[str], Any], tmp_path: Path
) -> None:
    """The same bits on a CPU; three tenths of a level change features, and by little."""
    names = ("antialiased", "pillow_bicubic", "torchvision")
    inceptions = {"inception": published, **{name: load(name) for name in names}}
    for name, network in {**inceptions, **other_networks(tmp_path / "w")}.items():
        assert network.takes_levels, name
        rounded = network(ONE)
        assert torch.equal(network(ONE.float()), rounded), name
        between = network((ONE.float() + 0.3).clamp(max=255))
        assert 0 < (between - rounded).abs().max() < 0.2 * rounded.abs().max(), name
