"""The Inception network of 2015, whose Fréchet distance alone is called FID: its weights found, checked and loaded.

sFID is the same distance in an inner layer, which keeps where in the image something is (Nash et al. 2021, Generating
Images with Sparse Representations): the first 7 channels of what guided-diffusion's evaluator calls mixed_6/conv:0,
17 x 17 values each. In TensorFlow's graph that is the output, after its ReLU, of the 1x1 convolution of the block
mixed_6, which torch-fidelity's table of weights calls Mixed_6d (mixed, mixed_1, ... are Mixed_5b, Mixed_5c, ...): not
Mixed_6e, which some take for it by its name.

The network is torchmetrics' (torch-fidelity's, that is), with TensorFlow 1's bilinear resizing to 299x299 that the
published FIDs were taken with: no antialiasing, pixel corners aligned at the top left. How others resize for it is in
`ddim_lab.metrics.inception_variants`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ddim_lab.errors import ConfigError, one_line
from ddim_lab.metrics.extractor import Layered, exact_float32, tf32_products
from ddim_lab.metrics.resizing import tf1_bilinear

__all__ = [
    "AT_ONCE",
    "PUBLISHED_SHA256",
    "SIDE",
    "SIZES",
    "Inception",
    "Resize",
    "check_weights",
    "find_in_torchs_cache",
    "find_weights",
    "read_weights",
    "weights_digest",
]

POOLED: Final = "pooled"
"""The layer of FID, KID and the Inception Score: the average over places of the last block."""

SPATIAL: Final = "spatial"
"""The layer of sFID."""

CHANNELS: Final = 7
"""Of the spatial layer's 192, those that are compared."""

SIZES: Final = {POOLED: 2048, SPATIAL: 17 * 17 * CHANNELS}
"""D of each layer."""

PUBLISHED_SHA256: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_NAME: Final = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL: Final = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_NAME}"

AT_ONCE: Final = 64
"""Images in one forward: at 299x299 each takes megabytes of activations, whatever its own size."""

SIDE: Final = 299
"""Of the images that the network looks at, in pixels."""

BLOCKS: Final = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)
"""Of the network, by torch-fidelity's names, in their order: from normalised pixels to pooled features."""


@final
@dataclass(frozen=True)
class Resize:
    """How images become the pixels that the network looks at, where that is not the published way.

    Attributes:
        recipe: identifies it in keys: what is done, in words.
        label: in names, as "antialiased resize".
        to: images [B, 3, H, W] from 0 to 255, and a side S -> the same values at [B, 3, S, S].
        centre: c of (x - c) / c, by which they are normalised.
        takes_levels: whether `to` takes float32, too.
    """

    recipe: str
    label: str
    to: Callable[[Tensor, int], Tensor]
    centre: float = 128.0
    takes_levels: bool = True


TF1: Final = Resize("299x299 TF1 bilinear", "TF1's resize", tf1_bilinear)
"""The published way."""


@final
class Inception(Layered):
    """Features of images of any size at one layer; a grey image is seen as three equal channels.

    `head` gives the logits of pooled features without their bias, as Inception Scores are taken.

    Args:
        weights: the file.
        layer: "pooled" (D = 2048), or "spatial" (D = 2023, in the evaluator's order: rows, columns, channels).
        tf32: let a GPU round what it multiplies to TF32, as torch's own setting lets convolutions; else exact float32.
        resize: another way to its pixels; None for the published one.

    Raises:
        ConfigError: the file does not hold the network's weights.
    """

    def __init__(self, weights: Path, layer: str = POOLED, tf32: bool = False, resize: Resize | None = None) -> None:
        super().__init__()
        self.layer = layer
        said = [f"Inception, weights {weights_digest(weights)}", *(["TF32"] if tf32 else [])]
        self.network = ", ".join([*said, *([] if resize is None else [resize.recipe])])
        self._resize: Final = resize
        self.takes_levels = resize is None or resize.takes_levels
        self._precision: Final = tf32_products if tf32 else exact_float32
        from torchmetrics.image.fid import NoTrainInceptionV3

        state = read_weights(weights)
        # The constructor unpickles whatever file it is given, so it gets what was read without unpickling.
        checked = io.BytesIO()
        torch.save(state, checked)
        checked.seek(0)
        try:
            self.body = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=[str(SIZES[POOLED])],
                feature_extractor_weights_path=checked,  # type: ignore[arg-type]
                antialias=False,
            )
        except RuntimeError:
            raise ConfigError(f"{weights} does not hold the weights of torch-fidelity's Inception network") from None
        self.head = None
        if layer == POOLED:
            head = nn.Linear(SIZES[POOLED], len(self.body.fc.weight), bias=False).requires_grad_(False)
            head.weight = self.body.fc.weight
            self.head = head

    def layers(self, images: Tensor, names: Collection[str]) -> Mapping[str, Tensor]:
        colour = images.expand(-1, 3, -1, -1)
        pooled: list[Tensor] = []
        spatial: list[Tensor] = []

        def see(module: nn.Module, given: object, found: Tensor) -> None:
            spatial.append(found[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1).clone())

        with self._precision(), contextlib.ExitStack() as stack:
            if SPATIAL in names:
                hook = self.body.Mixed_6d.branch1x1.register_forward_hook(see)
                stack.callback(hook.remove)
            for part in torch.split(colour, AT_ONCE):
                pooled.append(self._pooled(part))
        found = {POOLED: pooled, SPATIAL: spatial}
        return {name: torch.cat(found[name]) for name in names}

    def _pooled(self, images: Tensor) -> Tensor:
        """Pooled features [B, 2048] of images [B, 3, H, W]."""
        if self._resize is None and images.dtype == torch.uint8:
            published: Tensor = self.body(images)  # which resizes by itself, and takes nothing but uint8
            return published
        resize = TF1 if self._resize is None else self._resize
        found = (resize.to(images, SIDE).float() - resize.centre) / resize.centre
        for name in BLOCKS:
            found = self.body.get_submodule(name)(found)
        return found.flatten(1)


def find_weights(asked: str | None) -> Path:
    """The file of weights: the one asked for, else torch's cache, else the download.

    Raises:
        ConfigError: as `find_in_torchs_cache`.
    """
    wanted_by = "metrics.features=inception"
    return find_in_torchs_cache(wanted_by, "inception_weights", asked, WEIGHTS_NAME, WEIGHTS_URL, PUBLISHED_SHA256)


def find_in_torchs_cache(wanted_by: str, option: str, asked: str | None, name: str, url: str, sha256: str) -> Path:
    """A file of weights: the one asked for, else torch's cache, else the download.

    Args:
        wanted_by: what needs it, in words.
        option: of metrics, that names another file.
        asked: its value.
        name: of the file in torch's cache.
        url: of the published file.
        sha256: of its content, or the first eight digits of it or more.

    Raises:
        ConfigError: it is missing, and can't be downloaded, or is damaged; says what, where and what to do.
    """
    if asked is not None:
        path = Path(asked).absolute()
        if not path.is_file():
            raise ConfigError(f"metrics.{option}={asked}: there is no such file")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # It is in its place only when it is whole and its checksum is the published one.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            reason = one_line(error)
            raise ConfigError(
                f"{wanted_by}: {path} is missing, and the download failed ({reason}):"
                f" get {url} elsewhere, and put it there or set metrics.{option}"
            ) from None
    if not weights_digest(path).startswith(sha256):
        begins = sha256[:8]
        raise ConfigError(f"{path} is damaged (its SHA-256 does not begin {begins}): delete it, to have it downloaded")
    return path


def check_weights(path: Path) -> None:
    """Load the network once, as long as the file's size and time are the same.

    Raises:
        ConfigError: the file does not hold its weights.
    """
    _check(weights_digest(path), path)


@functools.lru_cache(maxsize=4)
def _check(digest: str, path: Path) -> None:
    if digest != PUBLISHED_SHA256:
        Inception(path)


def weights_digest(path: Path) -> str:
    """SHA-256 of the file; read once as long as its size and time are the same."""
    state = path.stat()
    return _digest(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _digest(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> Mapping[str, Any]:
    """The tensors of a file of torch's, read without unpickling what is no tensor.

    Raises:
        ConfigError: it is damaged or holds something else; one line.
    """
    try:
        with warnings.catch_warnings():  # torch's, of a pickle that it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever a damaged file leads it to
        reason = one_line(error)
        raise ConfigError(f"{path} is damaged or another kind of file ({reason[:100]})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no weights, but something else")
    if bad := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ConfigError(f"{path} is damaged: {bad[0]} holds NaN or infinite values")
    return state
