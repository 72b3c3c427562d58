"""DINOv2 and CLIP: the same features by two libraries, images resized as the recipes do, weights checked before use.

The published weights are not needed: random ones of a few layers go through the same code.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ddim_lab.data.base import load_data
from ddim_lab.data.digits import Digits
from ddim_lab.errors import ConfigError
from ddim_lab.metrics import resizing, transformer
from ddim_lab.metrics.features import FeatureNetwork, Features
from ddim_lab.metrics.networks import clip, dinov2
from ddim_lab.metrics.networks.clip import CLIPFeatures
from ddim_lab.metrics.networks.dinov2 import RESIZED, DINOv2Features
from ddim_lab.metrics.of_samples.mmd import GaussianKernel
from ddim_lab.metrics.weights import Published, find_weights, weights_digest
from ddim_lab.store import Store

WIDTH = 128
DINO = {"dinov2_size": None, "dinov2_recipe": "dgm_eval", "dinov2_tf32": False}


def saved(network: Any, folder: Path, seed: int) -> Path:
    """The folder of a network whose weights are all drawn at random, the biases and scales too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    network.save_pretrained(folder)
    return folder


def make_dinov2(folder: Path, *, patch: int = 56, side: int = 224, swiglu: bool = False, seed: int = 0) -> Path:
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        use_swiglu_ffn=swiglu,
    )
    return saved(transformers.Dinov2Model(config), folder, seed)


def make_clip(folder: Path, *, seed: int = 0) -> Path:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
    )
    return saved(transformers.CLIPVisionModelWithProjection(config), folder, seed)


def openais(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors by OpenAI's names, and some of the half that reads text."""
    found: dict[str, Tensor] = {"positional_embedding": torch.zeros(4, 8), "ln_final.bias": torch.zeros(8)}
    for name, tensor in state.items():
        layer = re.match(r"vision_model\.encoder\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            plain = {
                "visual_projection.weight": "proj",
                "vision_model.embeddings.class_embedding": "class_embedding",
                "vision_model.embeddings.position_embedding.weight": "positional_embedding",
                "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
                "vision_model.pre_layrnorm.weight": "ln_pre.weight",
                "vision_model.pre_layrnorm.bias": "ln_pre.bias",
                "vision_model.post_layernorm.weight": "ln_post.weight",
                "vision_model.post_layernorm.bias": "ln_post.bias",
            }[name]
            found[f"visual.{plain}"] = tensor.T.contiguous() if plain == "proj" else tensor
            continue
        block, part = f"visual.transformer.resblocks.{layer[1]}", layer[2]
        if part.startswith("self_attn.q_proj"):
            kind = part.rpartition(".")[2]
            names = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[one] for one in names])
        elif not part.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            for old, new in (("self_attn", "attn"), ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj")):
                part = part.replace(old, new)
            found[f"{block}.{part}"] = tensor
    return found


def timms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's tensors by timm's names."""
    found: dict[str, Tensor] = {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "weights_in": "fc1",
        "weights_out": "fc2",
        "encoder.layer": "blocks",
    }
    for name, tensor in state.items():
        if re.search(r"mask_token|attention\.(key|value)", name):
            continue
        new = name
        if ".attention.attention.query" in name:
            tensor = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
            new = new.replace("attention.attention.query", "attn.qkv")
        for old, timm in names.items():
            new = new.replace(old, timm)
        found[new] = tensor
    return found


@functools.cache
def digits() -> Any:
    return load_data(Digits(name="digits", root=None, num_samples=10))


def features(network: FeatureNetwork, tmp_path: Path) -> Features:
    return network.obtain(digits(), Store(tmp_path / "store"))


def images_of(seed: int, count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor, pixels: transformer.Pixels) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1) for values in pixels)
    return ((images.double() / 255 - mean) / std).float()


# -- the same features by two libraries -----------------------------------------------------------------


@pytest.mark.parametrize("swiglu", [False, True])
@torch.inference_mode()
def test_dinov2_is_timms_on_the_same_weights(swiglu: bool, tmp_path: Path) -> None:
    """At 224x224 no recipe resizes; SwiGLU is what the giant has."""
    folder, images = make_dinov2(tmp_path / "w", patch=14, swiglu=swiglu), images_of(1, 2, 3, 224, 224)
    packed: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 344 * 2 / WIDTH}
    theirs = VisionTransformer(
        img_size=224,
        patch_size=14,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        init_values=1.0,
        num_classes=0,
        **(packed if swiglu else {}),
    )
    theirs.load_state_dict(timms(load_file(folder / "model.safetensors")))
    expected = theirs.eval()(normalised(images, transformer.IMAGENET_PIXELS))
    for recipe in RESIZED:
        options = DINO | {"dinov2_weights": str(folder), "dinov2_recipe": recipe}
        found = features(DINOv2Features(**options), tmp_path).load()(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_clip_is_timms_on_the_same_weights_by_either_names(tmp_path: Path) -> None:
    folder, images = make_clip(tmp_path / "w"), images_of(2, 3, 3, 42, 42)
    state = load_file(folder / "model.safetensors")
    save_file(openais(state), tmp_path / "openai.safetensors")
    theirs = VisionTransformer(
        img_size=42,
        patch_size=14,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        pre_norm=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-5),
        act_layer="quick_gelu",
        num_classes=48,
    )
    theirs.load_state_dict(checkpoint_filter_fn(openais(state), theirs))
    expected = theirs.eval()(normalised(images, transformer.CLIP_PIXELS))
    expected /= expected.norm(dim=1, keepdim=True)
    found = []
    for weights in (folder, tmp_path / "openai.safetensors"):
        network = CLIPFeatures(clip_weights=str(weights), clip_tf32=False)
        assert network.num_features(digits().shape) == 48
        found.append(features(network, tmp_path).load()(images))
        torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def keys(distance: np.ndarray[Any, Any], a: float) -> np.ndarray[Any, Any]:
    """Keys's cubic convolution kernel."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0.0))


def test_positions_are_resampled_as_metas_code_does_and_not_as_transformers_does() -> None:
    positions = torch.randn(1, 1 + 37**2, 4, generator=torch.Generator().manual_seed(3))
    rows = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            rows[i, min(max(j, 0), 36)] += keys(np.array(at - j), -0.75)
    square = positions[0, 1:].reshape(37, 37, 4).double().numpy()
    expected = np.einsum("ip,jq,pqd->ijd", rows, rows, square).reshape(256, 4)
    found = transformer.positions_at(positions, 16)[0]
    assert torch.equal(found[0], positions[0, 0])
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-4)
    planes = torch.from_numpy(square).permute(2, 0, 1)[None]
    without_offset = nn.functional.interpolate(planes, (16, 16), mode="bicubic")[0].permute(1, 2, 0).reshape(256, 4)
    assert (without_offset - found[1:]).abs().max() > 0.1
    assert transformer.positions_at(positions, 37) is positions


# -- images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (301, 250)])
def test_resizing_is_pillows_torchs_and_tensorflows(height: int, width: int) -> None:
    """Pillow's to the bit; torch's to 0.005 of a level, not clamped; TF1's to 0.02 (positions in float32)."""
    images = images_of(4, 2, 3, height, width)
    pillow = resizing.pillow_bicubic(images, 224)
    for found, given in zip(pillow, images, strict=True):
        expected = Image.fromarray(given.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))

    def matrix(size: int) -> np.ndarray[Any, Any]:
        scale = size / 224
        centres = (np.arange(224) + 0.5) * scale
        weights = keys((np.arange(size) + 0.5 - centres[:, None]) / max(1.0, scale), -0.5)
        return weights / weights.sum(1, keepdims=True)

    exact = matrix(height) @ images.double().numpy() @ matrix(width).T
    found = resizing.torch_bicubic(images, 224).numpy()
    np.testing.assert_allclose(found, exact, atol=5e-3)
    assert found.min() < 0
    assert found.max() > 255

    def lower(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        at = np.arange(224) * (size / 224)
        return at.astype(int), np.minimum(at.astype(int) + 1, size - 1), at - at.astype(int)

    (y, y1, dy), (x, x1, dx) = lower(height), lower(width)
    given = images.double().numpy()
    top, bottom = (given[:, :, r][..., x] * (1 - dx) + given[:, :, r][..., x1] * dx for r in (y, y1))
    expected = top * (1 - dy[:, None]) + bottom * dy[:, None]
    np.testing.assert_allclose(resizing.tf1_bilinear(images, 224).numpy(), expected, atol=0.02)


def test_on_smooth_images_torchs_bicubic_is_pillows_to_a_level() -> None:
    ramp = torch.linspace(60, 200, 48)
    image = (ramp[:, None] + ramp[None, :]).div(2).round().to(torch.uint8).expand(1, 3, -1, -1)
    difference = resizing.torch_bicubic(image, 224) - resizing.pillow_bicubic(image, 224)
    assert 0 < difference.abs().max() <= 1.0


@pytest.mark.parametrize(("height", "width"), [(5, 8), (9, 4), (6, 6)])
def test_the_centre_square_is_cmmds_box(height: int, width: int) -> None:
    image = images_of(5, 1, 3, height, width)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(image[0].permute(1, 2, 0).numpy()).crop((left, top, left + side, top + side))
    assert np.array_equal(resizing.centre_square(image)[0].permute(1, 2, 0).numpy(), np.asarray(crop))


@torch.inference_mode()
def test_grey_images_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = features(DINOv2Features(dinov2_weights=str(make_dinov2(tmp_path / "w")), **DINO), tmp_path).load()
    grey = images_of(6, 5, 1, 8, 8)
    whole = network(grey)
    assert whole.shape == (5, WIDTH)
    assert whole.dtype == torch.float32
    monkeypatch.setattr(transformer, "AT_ONCE", 2)
    torch.testing.assert_close(network(grey.repeat(1, 3, 1, 1)), whole, rtol=0, atol=1e-5)


# -- names ----------------------------------------------------------------------------------------------


def test_three_recipes_are_three_distances(tmp_path: Path) -> None:
    folder = make_dinov2(tmp_path / "w", side=280)
    found = {
        recipe: features(DINOv2Features(dinov2_weights=str(folder), **DINO | {"dinov2_recipe": recipe}), tmp_path)
        for recipe in RESIZED
    }
    assert len({each.digest for each in found.values()}) == 3
    for recipe, by in RESIZED.items():
        name = rf"FD \(DINOv2 ViT 2x128/56, weights [0-9a-f]{{8}}, CLS, squashed to 224 by {by}\)"
        assert re.fullmatch(name, found[recipe].name)
        assert found[recipe].known_as is None


def test_published_weights_have_the_fields_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = make_dinov2(tmp_path / "w"), make_clip(tmp_path / "c")
    sha = sha256(folder)
    monkeypatch.setitem(dinov2.FILES, "large", ("0" * 40, sha))
    monkeypatch.setattr(dinov2, "PUBLISHED", {sha})
    known = features(DINOv2Features(dinov2_weights=str(folder), **DINO), tmp_path)
    assert known.name == "FD (DINOv2 ViT 2x128/56, CLS, squashed to 224 by Pillow's bicubic)"
    assert known.known_as == "FD-DINOv2, as dgm-eval takes it"
    rounded = DINOv2Features(dinov2_weights=str(folder), **DINO | {"dinov2_tf32": True})
    assert features(rounded, tmp_path).known_as is None
    assert features(CLIPFeatures(clip_weights=str(other), clip_tf32=False), tmp_path).kernel is None
    monkeypatch.setattr(clip, "SHA256", sha256(other))
    published = features(CLIPFeatures(clip_weights=str(other), clip_tf32=False), tmp_path)
    assert published.name == "FD (CLIP ViT 2x128/14@42, unit vectors, centre square by Pillow's bicubic)"
    assert published.kernel is not None
    assert (published.kernel.name, published.kernel.bandwidth) == ("CMMD", 10.0)
    assert features(CLIPFeatures(clip_weights=str(other), clip_tf32=True), tmp_path).kernel is None


def sha256(folder: Path) -> str:
    return weights_digest(folder / "model.safetensors")


def test_tf32_is_a_network_of_its_own_and_off_unless_asked_for(tmp_path: Path) -> None:
    weights, image = str(make_clip(tmp_path / "w")), images_of(7, 1, 1, 8, 8)
    exact, rounded = (features(CLIPFeatures(clip_weights=weights, clip_tf32=tf32), tmp_path) for tf32 in (False, True))
    assert exact.digest != rounded.digest
    assert rounded.name == exact.name.replace(")", ", TF32)")
    for of, allowed in ((exact, False), (rounded, True)):
        network, seen = of.load(), []
        body = network.get_submodule("body")
        body.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        )
        with torch.inference_mode():
            network(image)
        assert seen == [(allowed, allowed)]


# -- weights --------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A fault of a folder's weights."""

    def of(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return of


def rewritten(content: Callable[[bytes], bytes], name: str = "model.safetensors") -> Callable[[Path], None]:
    def of(folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content(whole))

    return of


def configured(**settings: Any) -> Callable[[Path], None]:
    def of(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return of


def pickled(folder: Path) -> None:
    torch.save({"cls_token": torch.zeros(2)}, folder / "model.safetensors")


PATCHES, NORM = "embeddings.patch_embeddings.projection.weight", "layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights: model\.safetensors"),
    "pickled alone": (rewritten(lambda _: b"PK", "pytorch_model.bin"), r"pickled weights alone \(pytorch_model\.bin\)"),
    "a pickle by another name": (pickled, r"is pickled, and never read: give the same weights as \.safetensors"),
    "cut off": (rewritten(lambda whole: whole[: len(whole) // 2]), "is damaged or another kind of file"),
    "empty": (rewritten(lambda _: b""), "is damaged or another kind of file"),
    "text": (rewritten(lambda _: b"root:x:0:0:root\n" * 9), "is damaged or another kind of file"),
    "NaN": (changed(lambda state: state[NORM].fill_(torch.nan)), r"layernorm\.weight holds NaN or infinite"),
    "whole numbers": (
        changed(lambda state: state.update({NORM: state[NORM].int()})),
        r"layernorm\.weight is of I32, and weights are of F64, F32",
    ),
    "another network": (
        changed(lambda state: (state.clear(), state.update({"pos_embed": torch.zeros(2)}))),
        rf"has no {re.escape(PATCHES)}: model\.safetensors of facebook/dinov2-large",
    ),
    "registers": (
        changed(lambda state: state.update({"embeddings.register_tokens": torch.zeros(1, 4, WIDTH)})),
        "is of DINOv2 with registers, another network",
    ),
    "a tensor is missing": (changed(lambda state: state.pop(NORM)), r"lacks 1 of the tensors, layernorm\.weight first"),
    "one too many": (
        changed(lambda state: state.update(more=torch.zeros(2))),
        "has, beside what is needed, 1 of the tensors, more first",
    ),
    "another shape": (
        changed(lambda state: state.update({NORM: torch.zeros(3)})),
        r"has in another shape 1 of the tensors, layernorm\.weight first",
    ),
    "a layer is missing": (
        changed(lambda state: [state.pop(name) for name in list(state) if name.startswith("encoder.layer.0.")]),
        "1 layers are of no such network",
    ),
    "grey patches": (
        changed(lambda state: state.update({PATCHES: torch.zeros(WIDTH, 1, 56, 56)})),
        r"patches of \[128, 1, 56, 56\], .* of no such network",
    ),
    "flat patches": (
        changed(lambda state: state.update({PATCHES: torch.zeros(WIDTH, 9)})),
        r"has the shape \[128, 9\]",
    ),
    "odd patches": (
        changed(lambda state: state.update({PATCHES: torch.zeros(WIDTH, 3, 15, 15)})),
        "images of 224x224 are not whole patches of 15",
    ),
    "no square of positions": (
        changed(lambda state: state.update({"embeddings.position_embeddings": torch.zeros(1, 9, WIDTH)})),
        "of no such network",
    ),
    "an odd width": (
        changed(
            lambda state: state.update(
                {PATCHES: torch.zeros(17, 3, 56, 56), "embeddings.position_embeddings": torch.zeros(1, 17, 17)}
            )
        ),
        "its width, 17, is no multiple of 64",
    ),
    "other heads": (configured(num_attention_heads=4), "says num_attention_heads=4, and 2 is what this network has"),
    "another activation": (configured(hidden_act="relu"), "says hidden_act=relu, and gelu is what this network has"),
    "another model": (configured(model_type="dinov3_vit"), "says model_type=dinov3_vit"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    "a list for a config": (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a configuration"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a folder of DINOv2's weights holds, which are not faulty."""
    folder = make_dinov2(tmp_path_factory.mktemp("whole"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_weights_are_refused_in_one_line(fault: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    network = DINOv2Features(dinov2_weights=str(tmp_path), **DINO)
    make, words = FAULTS[fault]
    make(tmp_path)
    with pytest.raises(ConfigError, match=words) as refused:
        network.check_data(digits(), [])
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_clips_faults_are_told_too(tmp_path: Path) -> None:
    folder, dino = make_clip(tmp_path / "w"), make_dinov2(tmp_path / "d")
    state = load_file(folder / "model.safetensors")
    for name, content, words in (
        ("text alone", {"text_model.x": torch.zeros(2)}, "has no vision_model.embeddings.patch_embedding.weight"),
        ("no head", {n: t for n, t in state.items() if n != "visual_projection.weight"}, "has no visual_projection"),
        ("no layer", {n: t for n, t in state.items() if ".layers." not in n}, "0 layers are of no such network"),
        ("cut", {n: t for n, t in openais(state).items() if "1.mlp.c_fc.bias" not in n}, "lacks 1 of the tensors"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ConfigError, match=words):
            CLIPFeatures(clip_weights=str(tmp_path / f"{name}.safetensors"), clip_tf32=False).check_data(digits(), [])
    with pytest.raises(ConfigError, match="weights of OpenAI's CLIP by the names of OpenAI or of transformers"):
        CLIPFeatures(clip_weights=str(dino), clip_tf32=False).check_data(digits(), [])


def test_the_cache_the_download_and_their_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the pinned commit, from the cache before the network; its content is what is trusted."""
    place, asked = tmp_path / "model.safetensors", []
    published = Published("someone/model", "c0ffee", "model.safetensors", "0" * 64)

    def download(repository: str, file: str, *, revision: str, local_files_only: bool) -> str:
        asked.append((repository, file, revision, local_files_only))
        if not place.is_file():
            raise FileNotFoundError("no\nnetwork")
        return str(place)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"c0ffee is not in .* failed \(no network\): .* set metrics\.clip_weights"):
        find_weights("clip", None, published)
    assert asked == [("someone/model", "model.safetensors", "c0ffee", local) for local in (True, False)]
    place.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=rf"{place} is damaged .*: delete the file"):
        find_weights("clip", None, published)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("metrics.features=dinov2 metrics.dinov2_weights=/nowhere", "there is no such file or folder"),
        ("metrics.dinov2_weights=/nowhere", r"is for metrics\.features=dinov2, not pixels, classifier"),
        ("metrics.dinov2_recipe=edm2", r"is for metrics\.features=dinov2, not pixels, classifier"),
        ("metrics.features=dinov2 metrics.dinov2_recipe=mine", "must be 'dgm_eval', 'edm2' or 'torch_fidelity'"),
        ("metrics.features=dinov2 metrics.dinov2_size=base metrics.dinov2_weights=/nowhere", "drop one"),
        ("metrics.features=dinov2 metrics.dinov2_tf32=true runtime.device=cpu", "needs a CUDA device with TF32"),
        ("metrics.clip_weights=/nowhere", r"is for metrics\.features=clip, not pixels, classifier"),
        ("metrics.features=clip metrics.clip_weights=/nowhere", "there is no such file or folder"),
        ("metrics.features=clip metrics.clip_tf32=true runtime.device=cpu", "needs a CUDA device with TF32"),
    ],
)
def test_the_command_line_says_it_before_any_work(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(tmp_path / "o", *line.split()) == 2
    assert re.fullmatch(rf"ddim_lab: metrics\.(dinov2|clip)_\w+.*{words}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = (DINOv2Features(dinov2_weights="w", **DINO), CLIPFeatures(clip_weights="w", clip_tf32=False))
    data = digits()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for network in networks:
        with pytest.raises(ConfigError, match=rf"needs transformers: pip install 'ddim-lab\[{network.name}\]'"):
            network.check_data(data, [])


# -- CMMD -----------------------------------------------------------------------------------------------


def unit_vectors(seed: int, count: int, shift: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    drawn = np.random.default_rng(seed).normal(size=(count, 32))
    drawn[:, 0] += shift
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def cmmd(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """As it is defined, in float64: sigma = 10, the means over all pairs, times 1000."""

    def mean(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
        squares = np.square(a.astype(np.float64)[:, None] - b.astype(np.float64)[None]).sum(-1)
        return float(np.exp(-squares / (2 * 10.0**2)).mean())

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("shift", [0.0, 0.5, 5.0])
def test_cmmd_is_its_definition(shift: float) -> None:
    """To 2e-5 of its unit: a value of 0.1 is printed with fewer digits. With this sigma it is all but linear."""
    samples, reference = unit_vectors(1, 300, shift), unit_vectors(2, 400, 0.0)
    found, unbiased = (GaussianKernel(10.0).of(samples, reference, biased=biased) for biased in (True, False))
    assert 1000 * found.value == pytest.approx(cmmd(samples, reference), abs=2e-5)
    apart = np.square(samples.astype(np.float64).mean(0) - reference.astype(np.float64).mean(0)).sum()
    assert cmmd(samples, reference) == pytest.approx(10 * apart, rel=0.015)
    assert found.value > unbiased.value
    assert found.se == pytest.approx(unbiased.se, rel=0.01)
    same = GaussianKernel(10.0).of(reference, reference, biased=True)
    assert 1000 * same.value == pytest.approx(0.0, abs=2e-5)


@pytest.mark.slow
def test_a_cell_and_a_report_have_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, three networks; CMMD where the weights are the published ones."""
    dino, other = make_dinov2(tmp_path / "d"), make_clip(tmp_path / "c")
    monkeypatch.setattr(clip, "SHA256", sha256(other))
    outputs, fewer = tmp_path / "outputs", ("metrics.kid=false", "metrics.precision_recall=false")
    weights = (f"metrics.dinov2_weights={dino}", f"metrics.clip_weights={other}")
    (images := tmp_path / "images").mkdir()
    for number, image in enumerate(digits().train.first(80)):
        Image.fromarray(image[0].numpy()).save(images / f"{number}.png")
    data = ("data=image_folder", f"data.root={images}", "data.image_size=8", "data.channels=1", "model=gaussian")
    line = (*data, "metrics.features=[clip,dinov2,pixels]", *weights, "steps=2", "logger=csv", *fewer)
    assert tiny.run(outputs, *line, settings=tiny.SMALL) == 0
    (row,) = tiny.results(tiny.sweeps(outputs)[0])
    assert row["status"] == "done"
    for column in ("fd", "mmd", "cmmd", "cmmd_se", "cmmd_held_out", "fd_dinov2", "mmd_dinov2", "fd_pixels"):
        assert row[column] != "", column
    assert "cmmd_dinov2" not in row
    page = (tiny.sweeps(outputs)[0] / "report.html").read_text()
    for words in ("CMMD", "centre square by Pillow", "as published (Jayasumana et al. 2024)"):
        assert words in page
