"""Networks of other code bases: what diffusers' answers with their weights is what they answer."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMPipeline, UNet2DModel
from networks import Weights, adm_network, ddim_network
from safetensors.torch import save_file
from torch import Tensor

from ddim_lab.config.model import CheckpointOptions
from ddim_lab.convert import main
from ddim_lab.errors import ConfigError
from ddim_lab.models.foreign import checkpoints, ddim
from ddim_lab.models.foreign.adm import PUBLISHED, convert_adm
from ddim_lab.models.foreign.converted import Converted, build
from ddim_lab.models.foreign.ddim import convert_ddim
from ddim_lab.models.inspection import inspect_pretrained
from ddim_lab.models.pretrained import Pretrained

LACKING = "looks like|has tensors as|is a checkpoint|beside what its network needs|the other tensors ask for"

TIMES = torch.tensor([0, 3, 999])


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def agree(converted: Converted, expected: Tensor, *args: Any) -> None:
    with torch.no_grad():
        got = build(converted)(*args).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"attention": (), "blocks": 1},
        {"attention": (0, 2), "mult": (1, 1, 3)},
        {"with_conv": False},
        {"mult": (1,), "attention": (0,), "blocks": 3},
    ],
)
def test_the_ddim_authors_network(features: dict[str, Any]) -> None:
    weights, x = Weights(), images(1)
    expected = ddim_network(weights, x, TIMES, **features)
    held = dict(weights)
    converted = convert_ddim(held, (16, 16))
    agree(converted, expected, x, TIMES)
    assert held == dict(weights)  # what was given is left as it was
    assert converted.weights is None
    for name in list(held)[::3]:  # every key is needed
        with pytest.raises(ValueError, match=rf"^it lacks .*|{LACKING}"):
            build(convert_ddim({key: tensor for key, tensor in held.items() if key != name}, None))
    with pytest.raises(ValueError, match=r"^it holds, beside what its network needs, another and 1 more$"):
        convert_ddim({**held, "another": torch.zeros(1), "one": torch.zeros(1)}, None)


@pytest.mark.parametrize(
    "features",
    [
        {"heads": 4},
        {"heads": 4, "mult": (1, 2, 4), "attention": (0, 1, 2), "learn_sigma": True},  # other widths: no config says it
        {"head_channels": 16, "new_order": True, "updown": True, "learn_sigma": True},
        {"head_channels": 32, "updown": True, "attention": (), "blocks": 2},
        {"heads": 1, "scale_shift": False, "attention": (0, 2)},
        {"heads": 2, "conv_resample": False},
        {"heads": 2, "mult": (1,), "attention": (0,)},
    ],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_openais_network(features: dict[str, Any], conditional: bool) -> None:
    weights, x = Weights(), images()
    y = torch.tensor([4, 0, 2]) if conditional else None
    expected = adm_network(weights, x, TIMES, y, **features)
    told = {name: features.get(name) for name in ("heads", "head_channels", "new_order")}
    converted = convert_adm(weights, (16, 16), 1000, **told)
    agree(converted, expected, x, TIMES, y)
    assert (converted.heads is None) == (features.get("mult") != (1, 2, 4))


@pytest.mark.parametrize("rescaled", [False, True])
def test_openais_network_of_4000_timesteps_is_given_as_many_or_1000(rescaled: bool) -> None:
    weights, x, t = Weights(), images(), torch.tensor([1, 2, 3999])
    expected = adm_network(weights, x, t * 0.25 if rescaled else t, heads=2)
    agree(convert_adm(weights, None, 4000, heads=2, rescaled=rescaled), expected, x, t)
    with pytest.raises(ValueError, match="say rescale_timesteps"):
        convert_adm(weights, None, 4000, heads=2)


@pytest.mark.parametrize("make", ["official", "adm"])
def test_a_tensor_of_any_other_shape_is_a_value_error(make: str) -> None:
    state = official() if make == "official" else adm()
    for name in list(state)[::5]:
        for wrong in (torch.zeros(()), torch.zeros(2, 5, 1, 1)):
            broken = {**state, name: wrong}
            with pytest.raises(ValueError, match=r"\w+\)? (is|has|have|holds|lacks)"):
                build(convert_ddim(broken, None) if make == "official" else convert_adm(broken, None, 1000, heads=2))


# -- published networks, by their shapes alone ------------------------------------------------------------


class Outlines(Weights):
    """A state dict of shapes without numbers."""

    def get_or_make(self, name: str, *shape: int, around: float = 0.0) -> Tensor:
        return self.setdefault(name, torch.empty(shape, device="meta"))


def outline(size: int) -> tuple[Outlines, Tensor, Tensor]:
    return Outlines(), torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta")


def parameters(converted: Converted) -> int:
    """Of the network, as diffusers builds it, which must have the tensors that were found."""
    with torch.device("meta"):
        network = UNet2DModel(**converted.config)
    needed = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert needed == {name: tensor.shape for name, tensor in converted.state.items()}
    return sum(tensor.numel() for name, tensor in converted.state.items() if name != "time_proj.weight")


@pytest.mark.parametrize(
    ("mult", "level", "millions"), [((1, 2, 2, 2), 1, 35.7), ((1, 1, 2, 2, 4, 4), 4, 113.7), ((1, 2, 2, 2, 4), 2, 78.7)]
)
def test_published_sizes_of_the_ddim_authors(mult: tuple[int, ...], level: int, millions: float) -> None:
    """CIFAR-10's and LSUN's as Ho et al. 2020 count them; CelebA's as counted here."""
    weights, x, t = outline(32)
    ddim_network(weights, x, t, ch=128, mult=mult, attention=(level,))
    assert round(parameters(convert_ddim(weights, None)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "conditional", "learned", "millions"),
    [
        ("cifar10_uncond", False, True, 50),
        ("imagenet64_uncond", False, True, 100),
        ("imagenet64_cond", True, True, 270),
        ("lsun_uncond", False, True, 100),
        ("64x64_diffusion", True, True, 296),
        ("128x128_diffusion", True, True, 422),
        ("256x256", True, True, 554),
    ],
)
def test_published_networks_of_openai_are_known_by_their_shape(
    name: str, conditional: bool, learned: bool, millions: int
) -> None:
    """The names of improved-diffusion's files round their sizes; Dhariwal and Nichol 2021 give guided-diffusion's."""
    known = next(each for each in PUBLISHED if each.name == name)
    shape, (weights, x, t) = known.shape, outline(64)
    adm_network(
        weights,
        x,
        t,
        torch.zeros(1, dtype=torch.long) if conditional else None,
        channels=shape.channels[0],
        mult=[width // shape.channels[0] for width in shape.channels],
        blocks=shape.blocks,
        attention=shape.attention,
        heads=known.heads,
        head_channels=known.head_channels,
        scale_shift=shape.shifts,
        updown=shape.resamples,
        learn_sigma=learned,
        classes=1000,
    )
    converted = convert_adm(weights, None, known.num_timesteps)
    counted = parameters(converted) / 1e6
    assert abs(counted - millions) < (1 if shape.resamples else 0.25 * millions)
    assert converted.config["sample_size"] == [known.size, known.size]
    assert converted.config["out_channels"] == 6
    assert converted.config.get("num_class_embeds") == (1000 if conditional else None)
    assert ("time_proj.weight" in converted.state) == known.rescaled
    assert converted.note is not None
    assert f"OpenAI's {name}, " in converted.note


# -- files -------------------------------------------------------------------------------------------------

GREY = {"mult": (1, 2), "attention": (1,), "blocks": 1}
"""A network for the digits."""


@functools.cache
def made(make: Callable[..., Tensor], size: int, **features: Any) -> Weights:
    """The weights that a network asks for; drawn once."""
    weights = Weights()
    make(weights, images(1, size), TIMES, **{**GREY, **features})
    return weights


def official(size: int = 8, **features: Any) -> dict[str, Tensor]:
    return dict(made(ddim_network, size, **features))


def adm(**features: Any) -> dict[str, Tensor]:
    return dict(made(adm_network, 8, **{"heads": 2, **features}))


def checked(path: Path, *overrides: str, kind: str = "official") -> Pretrained:
    options = ("metrics.features=pixels", "steps=3", f"model={kind}", f"model.path='{path}'", *overrides)
    config = tiny.configure(*options)
    assert isinstance(config.model, CheckpointOptions)
    return inspect_pretrained(config.model, config.schedule, config.data.name, config.data.shape)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def of_numpy(path: Path) -> Path:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))
    return path


def of_safetensors(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def changed(name: str, tensor: Any) -> dict[str, Any]:
    return {**official(), name: tensor}


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in official().items() if key != name}


STEP: dict[str, Any] = {"state": {}, "param_groups": []}

BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda p: p, "is not there$"),
    "a folder": (lambda p: p.parent, "is a folder: give the checkpoint's file$"),
    "of diffusers": (lambda p: written(p.parent / "config.json", b"{}").parent, "model=pretrained reads a folder"),
    "empty": (lambda p: written(p, b""), "is empty: download it again"),
    "a web page": (lambda p: written(p, b"\n<!DOCTYPE html><html>"), "is a web page, not a checkpoint"),
    "a pointer": (lambda p: written(p, b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
    "compressed": (lambda p: written(p, b"\x1f\x8b\x08rest"), "is compressed by gzip"),
    "of Keras": (lambda p: written(p, b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "text": (lambda p: written(p, b"hello, this is text"), "is no checkpoint"),
    "of numpy": (of_numpy, "is a zip archive, not one of torch.save"),
    "cut": (lambda p: cut(saved(p, official())), "is damaged or cut short"),
    "cut, old": (lambda p: cut(saved(p, official(), _use_new_zipfile_serialization=False)), "is damaged or cut short"),
    "cut, safe": (lambda p: cut(of_safetensors(p, official())), r"is a damaged \.safetensors file"),
    "a class": (lambda p: saved(p, argparse.Namespace(a=1)), r"an object of argparse\.Namespace, .*weights_only=False"),
    "a module": (lambda p: saved(p, {"m": torch.nn.Linear(1, 1)}), r"object of torch\.nn\.modules\.linear\.Linear"),
    "a pickle": (lambda p: written(p, pickle.dumps({"ema": 1})), "is a pickle that torch.save did not write"),
    "one tensor": (lambda p: saved(p, torch.zeros(2)), "holds one tensor: tensors by name"),
    "a number": (lambda p: saved(p, 3), "holds a int: tensors by name"),
    "a list": (lambda p: saved(p, [official(), 1]), r"holds a list of 2, not that of the training script"),
    "no average": (lambda p: saved(p, [official(), STEP, 1, 2]), "holds no averaged weights"),
    "nothing": (lambda p: saved(p, {}), "it has tensors as none, not like"),
    "nameless": (lambda p: saved(p, {0: torch.zeros(1)}), r"0 is no name: tensors by name"),
    "of Lightning": (
        lambda p: saved(p, {"pytorch-lightning_version": "2", "state_dict": official()}),
        "is a checkpoint of Lightning's training",
    ),
    "of a training": (
        lambda p: saved(p, {"model": official(), "epoch": 3}),
        "it holds epoch, model: a training's checkpoint",
    ),
    "text inside": (lambda p: saved(p, changed("conv_in.bias", "x")), r"conv_in\.bias is a str"),
    "whole numbers": (lambda p: saved(p, changed("conv_in.bias", torch.zeros(32).int())), "not of floating point"),
    "NaN": (lambda p: saved(p, changed("conv_in.bias", torch.full((32,), torch.nan))), r"NaN .*: conv_in\.bias"),
    "of another shape": (lambda p: saved(p, changed("conv_in.bias", torch.zeros(31))), r"conv_in\.bias.* ask for"),
    "incomplete": (lambda p: saved(p, without("mid.attn_1.q.bias")), r"it lacks mid\.attn_1\.q\.bias$"),
    "more": (lambda p: saved(p, changed("extra", torch.zeros(1))), "beside what its network needs, extra$"),
    "of OpenAI": (lambda p: saved(p, adm()), r"looks like openai/.*model=adm.*, not like .*ermongroup/ddim"),
    "of an EDM": (lambda p: saved(p, {"model.map_layer0.weight": torch.zeros(1)}), "looks like NVlabs/edm"),
    "unknown": (lambda p: saved(p, {"fc.weight": torch.zeros(1)}), r"has tensors as fc\.weight"),
    "of colours": (
        lambda p: saved(p, {**official(), "conv_in.weight": torch.zeros(32, 3, 3, 3)}),
        "is for images of 3x8x8, data=digits has 1x8x8",
    ),
    "too deep": (lambda p: saved(p, official(32, mult=(1, 1, 1, 1, 1), attention=())), "halves images 4 times"),
    "odd widths": (lambda p: saved(p, {**official(), "down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}), "32"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_file_is_one_line(fault: str, tmp_path: Path) -> None:
    make, message = BAD[fault]
    path = make(tmp_path / "file.ckpt")
    overrides = ["model.weights=ema"] if fault == "no average" else []
    with pytest.raises(ConfigError, match=rf"^model\.path[=:] ?{re.escape(str(tmp_path))}.*{message}") as found:
        checked(path, *overrides)
    assert "\n" not in str(found.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_program_is_not_run(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "file.pt")
    with pytest.raises(ConfigError, match="is a TorchScript program"):
        checked(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("features", "overrides", "message"),
    [
        ({}, [], "say num_heads or num_head_channels"),
        ({}, ["model.num_heads=5"], "num_heads=5 does not divide the 64 channels"),
        ({}, ["model.num_head_channels=48"], "num_head_channels=48 does not divide the 64 channels"),
        ({}, ["model.num_heads=2", "model.num_head_channels=32"], "num_heads or num_head_channels, not both"),
        ({}, ["model.num_heads=2", "schedule.num_timesteps=4000"], "say rescale_timesteps"),
        ({"time_embed.0.weight": torch.zeros(256, 64)}, ["model.num_heads=2"], r"as the 512x512 model's"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 2, 3, 3)}, ["model.num_heads=2"], "is for images of 2x8x8"),
        ({"input_blocks.9.0.op.weight": torch.zeros(1)}, ["model.num_heads=2"], "10 input_blocks and 4 output_blocks"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, ["model.num_heads=2"], "takes 6 channels, as an upsam"),
        ({"out.3.weight": torch.zeros(1)}, ["model.num_heads=2"], "looks like a classifier of openai/guided-diffusion"),
    ],
)
def test_a_bad_file_of_openai_is_one_line(
    features: dict[str, Tensor], overrides: list[str], message: str, tmp_path: Path
) -> None:
    saved(tmp_path / "file.pt", {**adm(), **features})
    with pytest.raises(ConfigError, match=message) as found:
        checked(tmp_path / "file.pt", *overrides, kind="adm")
    assert "\n" not in str(found.value)


def test_every_format_of_a_file_is_the_same_network(tmp_path: Path) -> None:
    state = official()
    files = [
        saved(tmp_path / "zip.ckpt", state),
        saved(tmp_path / "old.ckpt", state, _use_new_zipfile_serialization=False),
        of_safetensors(tmp_path / "safe", state),
        saved(tmp_path / "parallel", {f"module.{name}": tensor for name, tensor in state.items()}),
    ]
    assert len({checked(file).digest for file in files}) == 1
    half = checked(saved(tmp_path / "half", {name: tensor.half() for name, tensor in state.items()})).load()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert torch.equal(half.get_parameter("conv_in.bias"), state["conv_in.bias"].half().float())


def test_of_a_training_the_averaged_weights_are_taken_unless_the_others_are_asked_for(tmp_path: Path) -> None:
    raw, averaged = official(), {name: tensor / 2 for name, tensor in official().items()}
    alone = {
        "raw": checked(saved(tmp_path / "raw", raw)),
        "ema": checked(saved(tmp_path / "ema", averaged), "model.weights=ema"),
    }
    assert [(each.weights, each.weights_by) for each in alone.values()] == [("unknown", None), ("ema", "user")]
    parallel = {f"module.{name}": tensor for name, tensor in raw.items()}
    both = saved(tmp_path / "both", [parallel, STEP, 1, 2, averaged])
    assert (checked(both).digest, checked(both).weights, checked(both).weights_by) == (
        alone["ema"].digest,
        "ema",
        "file",
    )
    taken = checked(both, "model.weights=raw")
    assert (taken.digest, taken.weights) == (alone["raw"].digest, "raw")
    short = checked(saved(tmp_path / "short", [parallel, STEP, 1, 2]))
    assert (short.digest, short.weights, short.weights_by) == (alone["raw"].digest, "raw", "file")


def test_a_published_file_is_known_by_its_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "model-790000.ckpt", official())
    known = hashlib.md5(file.read_bytes()).hexdigest()
    assert checked(file).note is not None
    monkeypatch.setitem(ddim.PUBLISHED, known, ddim.PublishedFile("ema_digits", "ema", 8))
    checkpoints._read_file.cache_clear()
    found = checked(file)
    assert (found.weights, found.weights_by, found.note) == ("ema", "file", None)
    assert found.source == f"ermongroup/ddim, ema_digits (MD5 {known})"
    with pytest.raises(ConfigError, match="is the authors' ema_digits by its MD5: weights=raw contradicts it"):
        checked(file, "model.weights=raw")
    with pytest.raises(ConfigError, match=r"was trained with schedule=linear \(cosine is set\)"):
        checked(file, "schedule=cosine")
    monkeypatch.setitem(ddim.PUBLISHED, known, ddim.PublishedFile("ema_digits", "ema", 32))
    checkpoints._read_file.cache_clear()
    with pytest.raises(ConfigError, match="is for images of 1x32x32, data=digits has 1x8x8"):
        checked(file)
    checkpoints._read_file.cache_clear()


def test_as_many_weights_with_other_heads_are_another_model(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pt", adm())
    options = ("model.use_new_attention_order=true",)  # in which the weights' order is the same whatever the heads
    digests = {checked(file, f"model.num_heads={n}", *options, kind="adm").digest for n in (1, 2, 4)}
    assert len(digests) == 3


# -- the commands -------------------------------------------------------------------------------------------


def convert(*arguments: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ddim_lab.convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.slow
def test_a_converted_folder_gives_the_same_images_bit_by_bit(tmp_path: Path) -> None:
    """From the command line to the digests of the images; diffusers' pipeline loads the folder, too."""
    file, out, outputs = saved(tmp_path / "a=b file.ckpt", official()), tmp_path / "out", tmp_path / "outputs"
    assert convert(file, out, "--image-size", "8", "model.weights=ema") == 0
    settings = ("num_samples=4", "batch_size=4", "steps=3", "metrics.features=pixels", "logger=csv")
    assert tiny.run(outputs, "model=official", f"model.path='{file}'", "model.weights=ema", settings=settings) == 0
    assert tiny.run(outputs, "model=pretrained", f"model.path={out}", settings=settings) == 0
    rows = [tiny.results(sweep)[0] for sweep in tiny.sweeps(outputs)]
    assert rows[0]["sha256"] == rows[1]["sha256"] != ""
    assert [row["weights"] for row in rows] == ["ema", "ema"]
    results = [json.loads(found.read_text()) for found in outputs.glob("cells/*/result.json")]
    assert {result["recipe"]["model"].get("source") for result in results} == {"ermongroup/ddim", None}
    assert DDIMPipeline.from_pretrained(out).unet.config.sample_size == [8, 8]
    first, second = checked(tmp_path / "a=b file.ckpt").digest, checked(out, kind="pretrained").digest
    assert first == second


def test_a_converted_folder_of_openais_has_its_schedule(tmp_path: Path) -> None:
    file, out = saved(tmp_path / "file.pt", adm(updown=True)), tmp_path / "out"
    options = ("model.num_heads=2", "schedule=cosine", "schedule.num_timesteps=40")
    assert convert(file, out, "--image-size", "8", *options, "model.rescale_timesteps=true") == 0
    found = checked(out, *options[1:], kind="pretrained")
    assert found.whole
    direct = checked(file, *options, "model.rescale_timesteps=true", kind="adm").load()
    x, t = images(1, 8), torch.tensor([0, 7, 39])
    assert torch.equal(found.load()(x, t).sample, direct(x, t).sample)
    with pytest.raises(ConfigError, match=r"was trained with .*schedule=cosine|its own list of betas"):
        checked(out, kind="pretrained")


def test_openais_classes_and_learned_variance_are_sampled_with(tmp_path: Path) -> None:
    weights = Weights()
    adm_network(weights, images(1, 8), TIMES, TIMES % 10, **GREY, heads=2, classes=10, learn_sigma=True)
    file = saved(tmp_path / "file.pt", dict(weights))
    found = checked(file, "model.num_heads=2", kind="adm")
    assert (found.classes, found.null_class, found.learned_variance) == (10, None, True)
    settings = ("num_samples=4", "batch_size=4", "steps=3", "metrics.features=pixels", "logger=csv")
    overrides = ("model=adm", f"model.path={file}", "model.num_heads=2", "model.labels=7", "sampler=ddpm")
    outputs = tmp_path / "outputs"
    assert tiny.run(outputs, *overrides, "sampler.variance=learned", settings=settings) == 0
    assert tiny.results(tiny.sweeps(outputs)[0])[0]["weights"] == "unknown"
    with pytest.raises(ConfigError, match=r"model\.null_class=10: .* has 10 labels, 0 to 9"):
        checked(file, "model.num_heads=2", "model.null_class=10", kind="adm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}"], "the following arguments are required: out"),
        (["{file}", "{folder}", "--image-size", "8"], "is there already"),
        (["{file}", "{out}"], "does not say how large its images are: give --image-size"),
        (["{file}", "{out}", "--image-size", "9"], "halves images 1 times: --image-size=9 can't be"),
        (["{file}", "{out}", "--image-size", "0"], "at least 1 is needed"),
        (["{file}", "{out}", "--image-size", "8", "--family", "adm"], "not like a U-Net of improved-diffusion"),
        (["{file}", "{out}", "--image-size", "8", "steps=3"], "steps=3 is no option of a conversion"),
        (["{file}", "{out}", "--image-size", "8", "model.num_heads=3"], "num_heads"),
        (["{folder}/none", "{out}", "--image-size", "8"], "is not there"),
        (["{folder}/strange", "{out}", "--image-size", "8"], r"of no code base that is known here: ddim and adm are"),
        (["{folder}/wide", "{out}", "--image-size", "8", "model.num_heads=2"], "2 heads in attentions of different"),
        (["{file}", "{file}/out", "--image-size", "8"], "can't be made: .*file.ckpt is no folder"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = saved(tmp_path / "file.ckpt", official()), tmp_path / "out"
    saved(tmp_path / "strange", {"fc.weight": torch.zeros(1)})
    saved(tmp_path / "wide", adm(attention=(0, 1)))
    before = sorted(tmp_path.rglob("*"))
    assert convert(*(text.format(file=file, folder=tmp_path, out=out) for text in arguments)) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"ddim_lab: [^\n]*({message})[^\n]*\n", told), told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path / "file.ckpt", official())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddim_lab.models.unet.write_pipeline", full)
    assert convert(file, tmp_path / "out", "--image-size", "8") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file.ckpt"]
