"""FID's network: the same numbers as torch-fidelity on the same weights, and weights that are checked before use.

The published weights are not needed: random ones go through the same code.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddim_lab import score
from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.errors import ConfigError, exit_status
from ddim_lab.metrics import inception
from ddim_lab.metrics.extractor import Pixels, features_by
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.inception import Inception, check_weights, find_weights
from ddim_lab.metrics.networks.inception import InceptionFeatures
from ddim_lab.metrics.networks.inception_spatial import InceptionSpatialFeatures
from ddim_lab.metrics.references import fits, read_moments
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.store import Store


class Blank(FeatureExtractorInceptionV3):
    """The network with the weights it is made with, drawn at random."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return None


def save_random(path: Path) -> Path:
    """Write a file of random weights, scaled so that activations neither vanish nor explode."""
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=nothing)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("weights") / "random.pth")


def features_of(weights: Path, *, tf32: bool = False, torchvisions: Path | None = None) -> InceptionFeatures:
    return InceptionFeatures(
        inception_weights=str(weights),
        inception_tf32=tf32,
        inception_torchvision_weights=None if torchvisions is None else str(torchvisions),
    )


class Images(Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def random_images(seed: int, count: int, highest: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, highest, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


class Every16th(FeatureExtractorInceptionV3):
    """torch-fidelity's network, of whose features most are left out: eigenvalues of 2048 would take it 15 s."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(features[:, ::16] for features in super().forward(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fid_is_torch_fidelitys_on_the_same_images_and_weights(weights: Path) -> None:
    """Over every 16th feature; all of them are compared themselves."""
    real, fake = random_images(1, 5, 256), random_images(2, 4, 200)
    network = Inception(weights)
    with torch.inference_mode():
        distance = FrechetDistance(FeatureSums.of(network(part)[:, ::16] for part in real.split(3)).moments())
        features = network(fake)
        assert network.head is not None
        logits = network.head(features)
    torch_fidelity.register_feature_extractor("every-16th", Every16th)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        fid=True,
        cuda=False,
        feature_extractor="every-16th",
        feature_layer_fid="2048",
        feature_extractor_weights_path=str(weights),
        batch_size=4,
        cache=False,
        verbose=False,
    )
    assert distance.value(features[:, ::16]) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    layers = ["2048", "logits_unbiased"]
    whole = FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(weights))
    with torch.inference_mode():
        for found, expected in zip((features, logits), whole(fake[:2]), strict=True):
            torch.testing.assert_close(found[:2], expected, rtol=1e-4, atol=1e-4)


# -- the spatial layer: sFID ----------------------------------------------------------------------------


def evaluators_layer(weights: Path, images: Tensor) -> Tensor:
    """mixed_6/conv:0 [..., :7] of guided-diffusion's evaluator, from torch-fidelity's own network: [B, 17 * 17 * 7].

    The block mixed_6 is Mixed_6d; conv its 1x1 convolution, batch norm and ReLU; TensorFlow's images are NHWC.
    """
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(weights))
    given: list[Tensor] = []
    theirs.Mixed_6d.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    with torch.inference_mode():
        theirs(images)
        branch = theirs.Mixed_6d.branch1x1
        found = torch.relu(branch.bn(branch.conv(given[0])))
    return found.permute(0, 2, 3, 1)[..., :7].reshape(len(images), -1)


@pytest.mark.slow
def test_the_spatial_layer_is_the_evaluators_and_comes_of_the_same_forward(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "AT_ONCE", 1)
    images, asked = random_images(4, 2, 256), []
    pooled, spatial, other = Inception(weights), Inception(weights, "spatial"), Pixels()
    for network in (pooled, spatial):
        network.body.register_forward_hook(lambda module, inputs, found: asked.append(len(inputs[0])))
    with torch.inference_mode():
        found = features_by([spatial, other, pooled], images)
        assert asked == [1, 1]  # all images once, in parts
        assert [tuple(each.shape) for each in found] == [(2, 2023), (2, 3072), (2, 2048)]
        for each, network in zip(found, (spatial, other, pooled), strict=True):
            assert torch.equal(each, network(images))
    expected = evaluators_layer(weights, images)
    assert expected.std() > 0.01
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert (found[0] >= 0).all()
    assert (found[0] == 0).any()  # after the ReLU
    assert spatial.head is None


def written_out(real: Tensor, fake: Tensor) -> float:
    """FD as |mu - m|^2 + tr S + tr C - 2 tr (S C)^(1/2), the root by the singular values of centred features.

    With A and B the centred features over the roots of n - 1, S C = A'A B'B, whose root has the trace of |A B'|.
    """
    a, b = (((x - x.mean(0)) / (len(x) - 1) ** 0.5).double() for x in (real, fake))
    shift = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    root = torch.linalg.svdvals(a @ b.T).sum()
    return float(shift + a.square().sum() + b.square().sum() - 2.0 * root)


@pytest.mark.slow
def test_sfid_is_the_published_formula(weights: Path, tmp_path: Path) -> None:
    """`score` of a few images against others; nothing but the distance is measured, no vector kept."""
    real, fake = random_images(1, 5, 256), random_images(2, 4, 200)
    for name, images in (("real", real), ("fake", fake)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    line = [str(tmp_path / "fake.npz"), "--reference", str(tmp_path / "real.npz"), "--json", str(tmp_path / "found")]
    line += ["metrics.features=inception_spatial", f"metrics.inception_weights={weights}"]
    line += ["metrics.frechet_extrapolated=false", f"outputs_dir={tmp_path}/o"]
    assert exit_status(lambda: score._main(line)) == 0
    (found,) = json.loads((tmp_path / "found").read_text())["values"]
    layer = evaluators_layer(weights, torch.cat([real, fake]))
    assert found["value"] == pytest.approx(written_out(layer[:5], layer[5:]), rel=1e-5)
    assert re.fullmatch(r"FD \(Inception, spatial, weights \w{8}\)", found["heading"])
    assert found["se"] > 0
    kept = [json.loads(path.read_text())["files"] for path in (tmp_path / "o").rglob("MANIFEST.json")]
    assert any("statistics.npz" in files for files in kept)
    assert not any("features.npy" in files for files in kept)


def test_statistics_of_the_fields_reference_batches_are_told_apart_by_their_names(tmp_path: Path) -> None:
    """mu and sigma are FID's, mu_s and sigma_s sFID's: one file may serve both networks."""
    rng = np.random.default_rng(0)
    names = {"mu": rng.random(4), "sigma": np.diag(rng.random(4)), "mu_s": rng.random(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "batch.npz", **names)

    def features(statistics: tuple[str, str], size: int) -> Features:
        return Features("FD (some)", "digest", size, Pixels, statistics=statistics)

    for size, mean, covariance in ((4, "mu", "sigma"), (3, "mu_s", "sigma_s")):
        of_file = features((mean, covariance), size)
        found = read_moments(tmp_path / "batch.npz", of_file).moments
        assert np.array_equal(found.mean, names[mean])
        assert np.array_equal(found.covariance, names[covariance])
        assert fits(tmp_path / "batch.npz", of_file)
        assert not fits(tmp_path / "batch.npz", features((mean, covariance), 5))
    assert not fits(tmp_path / "batch.npz", features(("mu_t", "sigma_t"), 4))
    np.savez(tmp_path / "pooled.npz", mu=names["mu"], sigma=names["sigma"])
    with pytest.raises(ConfigError, match="the arrays mu_s and sigma_s are needed, it has mu, sigma"):
        read_moments(tmp_path / "pooled.npz", features(("mu_s", "sigma_s"), 3))
    file = f"metrics.reference_statistics={tmp_path}/batch.npz"
    both = tiny.configure("metrics.features=[inception,inception_spatial]", file).metrics
    assert [network.statistics[0] for network in both.networks] == ["mu", "mu_s"]
    with pytest.raises(ConfigError, match=r"\(mu, sigma\) of one network's features, and metrics.features names 2"):
        tiny.configure("metrics.features=[inception,inception_spatial,pixels]", file)


# -- the network, and its weights -----------------------------------------------------------------------


def test_tf32_is_a_network_of_its_own_and_off_unless_asked_for(weights: Path, tmp_path: Path) -> None:
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    networks = (features_of(weights, tf32=tf32) for tf32 in (False, True))
    exact, rounded = (network.obtain(data, store) for network in networks)
    assert exact.digest != rounded.digest
    assert rounded.name == exact.name.replace(")", ", TF32)")
    for features, allowed in ((exact, False), (rounded, True)):
        network, seen = features.load(), []
        network.register_module("body", Switches(seen))
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        network(random_images(1, 2, 256))
        assert seen == [(allowed, allowed)]
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


class Switches(torch.nn.Module):
    """Notes what torch may round to TF32 where the network would run."""

    def __init__(self, seen: list[tuple[bool, bool]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return images.flatten(1).float()


def test_a_grey_image_is_seen_as_three_equal_channels(weights: Path) -> None:
    network, grey = Inception(weights), random_images(3, 2, 256)[:, :1]
    with torch.inference_mode():
        assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))


def test_the_published_weights_give_fid_and_sfid(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of both, where the weights are those; published numbers of the one never stand beside the other."""
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", inception.weights_digest(weights))
    spatial = InceptionSpatialFeatures(inception_weights=str(weights), inception_tf32=False)
    fid, sfid = (network.obtain(data, store) for network in (features_of(weights), spatial))
    assert (fid.name, sfid.name) == ("FID", "sFID")
    assert fid.is_fid
    assert not sfid.is_fid
    assert fid.digest != sfid.digest
    assert (fid.akin, sfid.akin) == (("FID", "FD"), ("sFID",))
    assert sfid.load()(random_images(1, 1, 256)).shape == (1, sfid.num_features)


def test_other_weights_are_not_called_fid(weights: Path, tmp_path: Path) -> None:
    data = load_data(Digits(name="digits", root=None, num_samples=10))
    network = features_of(weights)
    features = network.obtain(data, Store(tmp_path))
    assert re.fullmatch(r"FD \(Inception, weights [0-9a-f]{8}\)", features.name)
    assert features.num_features == network.num_features(data.shape) == 2048


def test_faulty_weights_are_refused_in_one_line(weights: Path, tmp_path: Path) -> None:
    names = ("half.pth", "empty.pth", "other.pth", "thing.pth", "words.pth")
    half, empty, other, thing, words_alone = (tmp_path / name for name in names)
    half.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    empty.touch()
    torch.save({"fc.weight": torch.zeros(3)}, other)
    torch.save([1, 2], thing)
    words_alone.write_text("root:x:0:0:root:/root:/bin/bash\n")  # which leads torch's unpickler to an IndexError
    for path, words in (
        (half, "is damaged or another kind of file"),
        (empty, "is damaged or another kind of file"),
        (other, "does not hold the weights of torch-fidelity's Inception network"),
        (thing, "holds no weights"),
        (words_alone, "is damaged or another kind of file"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            check_weights(path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_that_hide_code_are_refused_and_not_run(tmp_path: Path) -> None:
    trap, mark = tmp_path / "trap.pth", tmp_path / "mark"
    trap.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(ConfigError, match="is damaged or another kind of file"):
        check_weights(trap)
    torch.save({"fc.weight": Touch(mark)}, trap)
    with pytest.raises(ConfigError, match="is damaged or another kind of file"):
        check_weights(trap)
    assert not mark.exists()


def test_the_cache_the_download_and_their_checksum(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    monkeypatch.setattr(inception, "WEIGHTS_URL", (tmp_path / "not_there.pth").as_uri())
    with pytest.raises(ConfigError, match=rf"{place} is missing, and the download failed .*: get file\S+ elsewhere"):
        find_weights(None)
    monkeypatch.setattr(inception, "WEIGHTS_URL", weights.as_uri())
    with pytest.raises(ConfigError, match=r"the download failed .*hash"):
        find_weights(None)
    assert list(place.parent.iterdir()) == []  # what failed its checksum is nowhere
    place.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"is damaged .*: delete it"):
        find_weights(None)


def test_the_command_line_says_it_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (
        (["metrics.features=inception", "metrics.inception_weights=/nowhere.pth"], "there is no such file"),
        (["metrics.inception_weights=/nowhere.pth"], "is for metrics.features=inception, not pixels, classifier"),
        (["metrics.features=inception", "metrics.inception_tf32=true", "runtime.device=cpu"], "needs a CUDA device"),
        (["metrics.inception_tf32=true"], "is for metrics.features=inception, not pixels, classifier"),
    ):
        assert tiny.run(tmp_path / "o", *line) == 2
        assert re.fullmatch(rf"ddim_lab: metrics\.inception_\w+.*{words}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()
