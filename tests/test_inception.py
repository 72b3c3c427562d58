"""FID's network: the same numbers as torch-fidelity on the same weights, and weights that are checked before use.

The published weights are not needed: random ones go through the same code.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.errors import ConfigError
from ddim_lab.metrics import inception
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.inception import Inception, check_weights, find_weights
from ddim_lab.metrics.networks.inception import InceptionFeatures
from ddim_lab.metrics.statistics import FeatureSums
from ddim_lab.store import Store


class Blank(FeatureExtractorInceptionV3):
    """The network with the weights it is made with, drawn at random."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights, scaled so that activations neither vanish nor explode."""
    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Blank("blank", ["2048"], feature_extractor_weights_path=nothing)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fid_is_torch_fidelitys_on_the_same_images_and_weights(weights: Path) -> None:
    real, fake = random_images(1, 8, 256), random_images(2, 8, 200)
    network = Inception(weights)
    with torch.inference_mode():
        distance = FrechetDistance(FeatureSums.of(network(part) for part in real.split(4)).moments())
        features = network(fake)
        assert network.head is not None
        logits = network.head(features)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        fid=True,
        cuda=False,
        feature_extractor_weights_path=str(weights),
        batch_size=8,
        cache=False,
        verbose=False,
    )
    assert distance.value(features) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    unbiased = FeatureExtractorInceptionV3("theirs", ["logits_unbiased"], feature_extractor_weights_path=str(weights))
    with torch.inference_mode():
        torch.testing.assert_close(logits[:4], unbiased(fake[:4])[0], rtol=1e-4, atol=1e-4)


def test_tf32_is_a_network_of_its_own_and_off_unless_asked_for(weights: Path, tmp_path: Path) -> None:
    data, store = load_data(Digits(name="digits", root=None, num_samples=10)), Store(tmp_path)
    networks = (InceptionFeatures(inception_weights=str(weights), inception_tf32=tf32) for tf32 in (False, True))
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


def test_other_weights_are_not_called_fid(weights: Path, tmp_path: Path) -> None:
    data = load_data(Digits(name="digits", root=None, num_samples=10))
    network = InceptionFeatures(inception_weights=str(weights), inception_tf32=False)
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
