"""Checkpoints in diffusers' format: ours load there, theirs load here, and what does not fit is one line."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.errors import ConfigError
from ddim_lab.models.obtain import Model, _say_once, check_model, obtain_model
from ddim_lab.models.scheduler import read_process
from ddim_lab.models.unet import load_unet, unet_digest, weights_digest
from ddim_lab.noise import NamedNoise
from ddim_lab.schedulers.classes import OTHERS, VARIANCE_PRESERVING

WEIGHTS = "diffusion_pytorch_model.safetensors"


def configure(*overrides: str) -> Config:
    return tiny.configure("metrics.features=pixels", *overrides)


def pretrained(path: Path | str, *overrides: str) -> Config:
    return configure("model=pretrained", f"model.path={path}", *overrides)


def model_of(config: Config) -> Model:
    """The model of a job; a checkpoint needs neither data nor a store."""
    none: Any = None
    return obtain_model(config, none, none, none, none)


def network(sides: int = 8, channels: int = 1, **changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": sides,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": None,
    }
    return UNet2DModel(**{**settings, **changes}).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A U-Net with a scheduler beside it, in one folder, as google/ddpm-cifar10-32 has them."""
    place = tmp_path / "checkpoint"
    network().save_pretrained(place)
    DDPMScheduler().save_pretrained(place)
    return place


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def output(module: Any) -> Tensor:
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module(x_t, torch.tensor([3, 700])).sample


# -- theirs here ----------------------------------------------------------------------------------------


def test_it_is_identified_by_its_weights_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    DDIMPipeline(network(), DDIMScheduler()).save_pretrained(pipeline)
    first, second = model_of(pretrained(folder)), model_of(pretrained(pipeline))
    assert first.recipe() == second.recipe()
    assert first.digest == unet_digest(network())
    assert first.parameters == sum(parameter.numel() for parameter in network().parameters())
    assert torch.equal(output(first.load()), output(network().requires_grad_(False)))
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"][0] += 1e-6
    save_file(state, folder / WEIGHTS)
    assert model_of(pretrained(folder)).digest != first.digest


@pytest.mark.parametrize(
    ("words", "weights", "by"),
    [
        ((), "unknown", None),
        (("model.card=ema",), "ema", "card"),
        (("model.card=ema", "model.weights=raw"), "raw", "user"),
        (("model.card=ema", "model.weights=unknown"), "unknown", "user"),
    ],
)
def test_whether_weights_are_averaged_is_the_users_word_or_the_cards(
    words: Sequence[str], weights: str, by: str | None, folder: Path
) -> None:
    """What is said changes no image, so the model's recipe does not hold it."""
    model = model_of(pretrained(folder, *words))
    assert (model.weights, model.weights_by) == (weights, by)
    assert model.recipe() == model_of(pretrained(folder)).recipe()


@pytest.mark.parametrize(
    "setting",
    [{"norm_num_groups": 2}, {"norm_eps": 1e-3}, {"flip_sin_to_cos": False}, {"freq_shift": 1}, {"act_fn": "relu"}],
    ids=str,
)
def test_what_no_weight_shows_is_part_of_it(setting: dict[str, Any], folder: Path) -> None:
    """The same weights computed with otherwise are another network, by its outputs and its digest."""
    before = model_of(pretrained(folder))
    images = output(before.load())
    edit(folder / "config.json", **setting)
    after = model_of(pretrained(folder))
    assert after.digest != before.digest
    assert not torch.equal(output(after.load()), images)


def test_half_precision_files_are_computed_with_in_fp32(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / WEIGHTS)
    loaded = model_of(pretrained(folder)).load()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(loaded.state_dict()[name], tensor.half().float()) for name, tensor in state.items())


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that attention had when Google's checkpoints were stored."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if ".attentions." in name:
                name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


def test_old_names_and_bin_files_load(folder: Path) -> None:
    digest = model_of(pretrained(folder)).digest
    state = old_names(load_file(folder / WEIGHTS))
    assert sum("proj_attn" in name for name in state) == 8
    save_file(state, folder / WEIGHTS)
    assert model_of(pretrained(folder)).digest == digest
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert model_of(pretrained(folder)).digest == digest


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Harm()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"can't be read: .* holds more than tensors"):
        check_model(pretrained(folder))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_its_prediction_type_is_honoured(theirs: str, ours: str, folder: Path) -> None:
    """The same images as diffusers' scheduler with that prediction type."""
    edit(folder / "scheduler_config.json", prediction_type=theirs)
    config = pretrained(folder, "steps=5", "sampler.clip=none")
    model = model_of(config)
    assert model.prediction == ours
    x_T = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    unet = model.load().double()
    got = config.build_sampler(model.prediction).sample(lambda x, t: unet(x, t).sample, x_T)
    expected = by_diffusers(DDIMScheduler(prediction_type=theirs, clip_sample=False), unet, x_T, 5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def by_diffusers(scheduler: DDIMScheduler, unet: Any, x_T: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x_t = x_T
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(unet(x_t, t).sample, t, x_t, eta=0.0).prev_sample
    return x_t


@pytest.mark.parametrize(
    ("scheduler", "overrides"),
    [
        ({"beta_schedule": "scaled_linear", "beta_end": 0.012}, ["schedule=scaled_linear", "schedule.beta_end=0.012"]),
        ({"beta_schedule": "squaredcos_cap_v2"}, ["schedule=cosine"]),
        ({"beta_schedule": "sigmoid"}, ["schedule=sigmoid"]),
        ({"num_train_timesteps": 100}, ["schedule.num_timesteps=100"]),
        ({"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()}, []),
    ],
)
def test_a_schedule_that_agrees_is_taken_and_diffusers_has_the_same(
    scheduler: dict[str, Any], overrides: list[str], folder: Path
) -> None:
    edit(folder / "scheduler_config.json", **scheduler)
    config = pretrained(folder, "steps=5", *overrides)
    check_model(config)
    theirs = DDPMScheduler(**scheduler).betas.double().numpy()
    np.testing.assert_allclose(config.build_schedule().betas, theirs, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(
    ("scheduler", "overrides", "message"),
    [
        ({"beta_end": 0.012}, [], r"schedule.beta_end=0.012 \(0.02 is set\): give schedule.beta_end=0.012"),
        ({}, ["schedule.beta_start=0.001"], r"schedule.beta_start=0.0001 \(0.001 is set\)"),
        ({"num_train_timesteps": 500}, [], r"schedule.num_timesteps=500 \(1000 is set\)"),
        ({}, ["schedule=cosine"], r"schedule=linear \(cosine is set\), schedule.beta_start=0.0001 \(none is set\)"),
        ({"beta_schedule": "scaled_linear"}, [], r"schedule=scaled_linear \(linear is set\)"),
        ({"trained_betas": [1e-4] * 999 + [0.5]}, [], r"beta\[1\] is 0.0001 there and 0.000119\d* in schedule=linear"),
        ({"trained_betas": [0.1, 0.2]}, [], r"its own list of betas: 2, and 1000 in schedule=linear; .* schedule=file"),
        ({"trained_betas": "abc"}, [], r"trained_betas is no list of numbers"),
        ({"trained_betas": 5}, [], r"trained_betas is no list of numbers"),
        ({"beta_schedule": "exp"}, [], r"beta_schedule=exp is not known; linear, "),
        ({"beta_schedule": ["linear"]}, [], r"beta_schedule=\['linear'\] is not known"),
        ({"beta_start": "a"}, [], r"scheduler_config\.json: beta_start='a' is not a number"),
        ({"prediction_type": "flow"}, [], r"prediction_type=flow is not known"),
        ({"rescale_betas_zero_snr": True}, [], r"rescale_betas_zero_snr=true is not supported"),
    ],
)
def test_a_schedule_that_disagrees_is_refused_with_both_values(
    scheduler: dict[str, Any], overrides: list[str], message: str, folder: Path
) -> None:
    edit(folder / "scheduler_config.json", **scheduler)
    with pytest.raises(ConfigError, match=message):
        check_model(pretrained(folder, *overrides))


def schedulers_of_diffusers() -> dict[str, Any]:
    """By name, as many as can be imported here; names for their users alone would leave some out."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        with contextlib.suppress(ImportError):
            members = vars(importlib.import_module(module.name)).items()
            found |= {
                name: kind for name, kind in members if isinstance(kind, type) and issubclass(kind, SchedulerMixin)
            }
    return {name: kind for name, kind in found.items() if kind is not SchedulerMixin}


SCHEDULERS = schedulers_of_diffusers()


def test_there_are_schedulers_of_every_kind() -> None:
    few = {"DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"}
    assert few <= set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_taken_with_diffusers_own_betas_or_refused_for_its_process(name: str, tmp_path: Path) -> None:
    """Whatever diffusers has: one that it adds is refused until it is known here what it is of."""
    if name not in VARIANCE_PRESERVING:
        known = any(name in kinds for kinds in OTHERS.values())
        said = f"{name} is of " if known else f"{name} is not known here"
        with pytest.raises(ValueError, match=rf"^{said}.*; a discrete variance-preserving process is needed"):
            read_process({"_class_name": name, "beta_schedule": "linear"})
        return
    scheduler = SCHEDULERS[name]()
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    theirs = scheduler.alphas_cumprod.double().numpy()
    for config in (stored, {"_class_name": name}):  # its class alone says which betas it has
        np.testing.assert_allclose(read_process(config).schedule.alpha_bars, theirs, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, r"use_flow_sigmas=true is flow matching"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, r"flow matching"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, r"prediction_type=flow_prediction is not known"),
        ("DDPMScheduler", {"prediction_type": ["epsilon"]}, r"prediction_type=\['epsilon'\] is not known"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, r"its noise is a continuous sigma"),
        ("DDIMScheduler", {"snr_shift_scale": 3.0}, r"snr_shift_scale=3.0 is not known here"),
        ("DDPMScheduler", {"predict_epsilon": False}, r"predict_epsilon=False and prediction_type=epsilon contradict"),
        ("SomeoneElsesScheduler", {}, r"SomeoneElsesScheduler is not known here"),
        (["DDPMScheduler"], {}, r"\['DDPMScheduler'\] is not known here"),
    ],
)
def test_a_process_that_is_not_ours_is_refused_whatever_its_betas(
    kind: Any, entries: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder / "scheduler_config.json", _class_name=kind, **entries)
    with pytest.raises(ConfigError, match=rf"^model.path=.*, scheduler_config.json: .*{message}[^\n]*$"):
        check_model(pretrained(folder))


def test_a_scheduler_of_no_class_needs_betas(folder: Path) -> None:
    (folder / "scheduler_config.json").write_text('{"sigma_min": 0.002, "num_train_timesteps": 1000}')
    with pytest.raises(ConfigError, match="it names neither its class nor betas; a discrete variance-preserving"):
        check_model(pretrained(folder))


def test_files_of_old_say_by_predict_epsilon_what_is_predicted(folder: Path) -> None:
    (folder / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler", "predict_epsilon": false}')
    assert model_of(pretrained(folder)).prediction == "x0"


@pytest.mark.parametrize("part", ["", "unet", "raw", "link"])
def test_a_part_of_a_pipeline_has_the_pipelines_scheduler(part: str, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    scheduler = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    DDPMPipeline(network(), scheduler).save_pretrained(pipeline)
    network().save_pretrained(pipeline / "raw")
    (tmp_path / "link").symlink_to(pipeline / "unet")
    path = tmp_path / "link" if part == "link" else pipeline / part
    with pytest.raises(ConfigError, match=r"was trained with schedule=cosine \(linear is set\)"):
        check_model(pretrained(path))
    cosine = pretrained(path, "schedule=cosine", "schedule.num_timesteps=50")
    assert model_of(cosine).prediction == "x0"
    (pipeline / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match=r"model_index.json names a DDPMScheduler, and .* fetch it, too"):
        check_model(cosine)
    edit(pipeline / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(ConfigError, match=r"model_index.json: FlowMatchEulerDiscreteScheduler is of flow matching"):
        check_model(cosine)


def test_a_learned_time_embedding_is_as_long_as_it_needs_to_be(tmp_path: Path) -> None:
    network(time_embedding_type="learned", num_train_timesteps=50).save_pretrained(tmp_path)
    check_model(pretrained(tmp_path, "schedule.num_timesteps=50"))
    edit(tmp_path / "config.json", num_train_timesteps=None)
    with pytest.raises(ConfigError, match="num_train_timesteps=None: a learned time embedding needs the number"):
        check_model(pretrained(tmp_path))


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.spacing=logsnr", "steps=5"],
        ["sampler=dpm_solver_2", "steps=5"],
        ["sampler.timesteps=[49,20.5,3]"],
        ["sampler=pndm", "sampler.start=runge_kutta", "steps=10"],
        ["sampler.spacing=karras", "steps=2", "task=consistency", "task.many_steps=20"],
    ],
    ids=" ".join,
)
def test_a_learned_time_embedding_has_whole_timesteps_alone(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in one line before any work, and by that line's advice taken."""
    given, outputs = tmp_path / "given", tmp_path / "outputs"
    network(time_embedding_type="learned", num_train_timesteps=50).save_pretrained(given)
    words = [f"model.path={given}", "model=pretrained", "schedule.num_timesteps=50", "logger=csv", *overrides]
    assert tiny.run(outputs, *words, settings=tiny.SMALL) == 2
    assert re.fullmatch(
        r"ddim_lab: model.path=.* has a learned time embedding, a table of whole timesteps, and (sampler|task)=\w+"
        r" visits others(: set| on its own walks: give those whole ones, or set) sampler.timesteps_as=integer\n",
        capsys.readouterr().err,
    )
    assert not outputs.exists()
    integer = pretrained(given, *words[2:], "sampler.timesteps_as=integer")
    check_model(integer)
    unet = model_of(integer).load()
    assert integer.build_sampler().sample(unet, torch.randn(2, 1, 8, 8)).isfinite().all()


def test_a_sinusoidal_one_takes_any(folder: Path) -> None:
    config = pretrained(folder, "sampler=dpm_solver_2", "sampler.spacing=logsnr", "steps=3")
    check_model(config)
    unet, asked = model_of(config).load(), []
    unet.time_proj.register_forward_hook(lambda _module, given, _output: asked.append(given[0]))  # type: ignore[operator,union-attr]
    sampler = config.build_sampler()
    assert sampler.sample(unet, torch.randn(2, 1, 8, 8)).isfinite().all()
    assert {t.dtype for t in asked} == {torch.float32}
    assert [float(t[0]) for t in asked] == [
        t for each in sampler.transitions for t in (each.t, *(each.between or ())[:1])
    ]


def test_without_a_scheduler_the_configured_schedule_is_taken_and_that_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "scheduler_config.json").unlink()
    _say_once.cache_clear()
    check_model(pretrained(folder, "schedule=cosine"))  # before there is a log
    with caplog.at_level(logging.INFO, "ddim_lab"):
        model = model_of(pretrained(folder, "schedule=cosine"))
    assert model.prediction == "eps"
    assert "no scheduler_config.json: schedule=cosine with T = 1000, eps-prediction, are taken" in caplog.text


def _drop(state: dict[str, Tensor]) -> None:
    del state["conv_in.weight"], state["conv_in.bias"]


def _reshape(state: dict[str, Tensor]) -> None:
    state["conv_in.weight"] = torch.zeros(9, 1, 3, 3)


def _add(state: dict[str, Tensor]) -> None:
    state["more"] = torch.zeros(1)


def _poison(state: dict[str, Tensor]) -> None:
    state["conv_out.bias"][0] = float("nan")


def _quantise(state: dict[str, Tensor]) -> None:
    state["conv_in.weight"] = torch.zeros(8, 1, 3, 3, dtype=torch.int8)


def _to_eight_bits(state: dict[str, Tensor]) -> None:
    state["conv_in.weight"] = torch.zeros(8, 1, 3, 3, dtype=torch.float8_e4m3fn)


FORMS = ("safetensors", "bin")


def store(folder: Path, state: dict[str, Tensor], form: str, *, sharded: bool) -> list[Path]:
    """Weights in a folder in one of diffusers' forms; the files that hold tensors."""
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    names = sorted(state)
    parts = [names[:20], names[20:]] if sharded else [names]
    files = [
        folder
        / (f"diffusion_pytorch_model-{n + 1:05d}-of-00002.{form}" if sharded else f"diffusion_pytorch_model.{form}")
        for n in range(len(parts))
    ]
    for file, part in zip(files, parts, strict=True):
        tensors = {name: state[name].contiguous() for name in part}
        save_file(tensors, file) if form == "safetensors" else torch.save(tensors, file)
    if sharded:
        places = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
        index = folder / f"diffusion_pytorch_model.{form}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


in_every_form = pytest.mark.parametrize(
    ("form", "sharded"), [(form, sharded) for form in FORMS for sharded in (False, True)]
)


@in_every_form
def test_every_form_of_weights_is_the_same_network(form: str, sharded: bool, folder: Path) -> None:
    digest = weights_digest(load_unet(folder))
    store(folder, old_names(load_file(folder / WEIGHTS)), form, sharded=sharded)
    assert weights_digest(load_unet(folder)) == digest


@in_every_form
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks 2 of the tensors, conv_in.bias first"),
        (_add, r"holds, beside what is needed, 1 of the tensors, more first"),
        (_reshape, r"does not fit .*config.json: size mismatch for conv_in.weight"),
        (_poison, r"holds NaN or infinite weights: conv_out.bias"),
        (_quantise, r": conv_in.weight is not of floating point: quantised weights are not supported"),
        (_to_eight_bits, r": conv_in.weight is not of floating point: quantised weights are not supported"),
    ],
)
def test_weights_that_are_not_the_networks_are_one_line_in_every_form(
    change: Callable[[dict[str, Tensor]], None], message: str, form: str, sharded: bool, folder: Path
) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    store(folder, state, form, sharded=sharded)
    name = r"diffusion_pytorch_model[-.0-9a-z]*"
    with pytest.raises(ValueError, match=rf"^\S*{name} ?{message}[^\n]*$"):
        load_unet(folder)


@in_every_form
def test_a_file_cut_short_is_named(form: str, sharded: bool, folder: Path) -> None:
    file = store(folder, load_file(folder / WEIGHTS), form, sharded=sharded)[-1]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{file.name} can't be read: it is damaged, cut short"):
        load_unet(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_that_is_not_what_the_index_says_is_named(form: str, folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    first, second = store(folder, state, form, sharded=True)
    kept = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf"{second.name} lacks {len(state) - 20} of the tensors that .*index.json"):
        load_unet(folder)
    second.unlink()
    with pytest.raises(ValueError, match=rf"{second.name} is missing: .*index.json says that weights are in it"):
        load_unet(folder)
    second.write_bytes(kept)
    load_unet(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../a.bin"}}']
)
def test_an_index_that_is_none_is_one_line(content: str, folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is no index of weights[^\n]*$"):
        load_unet(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": 16}, r"is for images of 1x16x16, data=digits has 1x8x8"),
        ({"channels": 3}, r"is for images of 3x8x8, data=digits has 1x8x8"),
        ({"out_channels": 3}, r"gives 3 channels for 1: as many are needed, or twice as many"),
        ({"class_embed_type": "timestep"}, r"told more than a class \(class_embed_type=timestep\)"),
        (
            {
                "sample_size": None,
                "block_out_channels": (8,) * 5,
                "down_block_types": ("DownBlock2D",) * 5,
                "up_block_types": ("UpBlock2D",) * 5,
            },
            r"halves images 4 times, which 8x8 of data=digits can't be",
        ),
        ({"time_embedding_type": "fourier"}, r"time_embedding_type=fourier is of a variance-exploding process"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 999},
            r"has a learned time embedding of 999 timesteps, and schedule.num_timesteps=1000: give the schedule",
        ),
    ],
)
def test_a_network_for_other_images_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    network(**changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_model(pretrained(tmp_path))


def test_what_is_not_there_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).unlink()
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "none", r"there is no such folder; give a diffusers folder or a hub id"),
        (tmp_path / "empty", r"no config.json of a U-Net there, nor in its folder unet"),
        (folder, rf"holds no weights: {WEIGHTS} \(or .bin\) is missing"),
    ):
        outputs = tmp_path / "outputs"
        assert tiny.run(outputs, "model=pretrained", f"model.path={path}", settings=tiny.SMALL) == 2
        assert re.fullmatch(rf"ddim_lab: model.path.*{message}\n", capsys.readouterr().err)
        assert not outputs.exists()


# -- the hub --------------------------------------------------------------------------------------------

PRESETS = {
    "ddpm_cifar10_32": ("google/ddpm-cifar10-32", "cifar10", 32),
    "ddpm_ema_bedroom_256": ("google/ddpm-ema-bedroom-256", "lsun_bedroom", 256),
    "ddpm_ema_church_256": ("google/ddpm-ema-church-256", "lsun_church", 256),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_find_their_checkpoint_on_the_hub(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network in the format of those repositories: everything in one folder, attention's old names."""
    repository, data, sides = PRESETS[preset]
    network(sides, 3).save_pretrained(tmp_path)
    save_file(old_names(load_file(tmp_path / WEIGHTS)), tmp_path / WEIGHTS)
    scheduler = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**scheduler, "variance_type": "fixed_large"}))
    asked: list[tuple[str, bool]] = []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert "*.bin" not in allow_patterns  # safetensors are there
        asked.append((name, local_files_only))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = model_of(configure(f"model={preset}", f"data={data}"))
    assert set(asked) == {(repository, True), (repository, False)}
    assert asked[-1] == (repository, False)
    assert model.digest == unet_digest(network(sides, 3))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r"^model.path=someone/some-model: .*no route to host.* give the folder of a"):
        check_model(pretrained("someone/some-model"))


# -- ours there -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of one tiny job, its samples kept."""
    outputs = tmp_path_factory.mktemp("ours") / "outputs"
    line = ("steps=10", "logger=csv", "metrics.features=pixels", "save_samples=true")
    assert tiny.run(outputs, *line) == 0
    return outputs


def model_folder(outputs: Path) -> Path:
    (file,) = outputs.glob(f"models/*/{WEIGHTS}")
    return file.parent


@pytest.mark.slow
def test_diffusers_pipeline_on_our_folder_gives_our_images(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading spacing, S | T, no clip, the same x_T: the images of samples.npz, and of our sampler to 1e-5."""
    pipeline = DDIMPipeline.from_pretrained(model_folder(trained), local_files_only=True)
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    assert not pipeline.scheduler.config.clip_sample
    pipeline.set_progress_bar_config(disable=True)
    x_T = NamedNoise(0).initial(torch.arange(44), torch.empty(44, 1, 8, 8))
    config = configure("steps=10")
    unet = load_unet(model_folder(trained))
    ours = config.build_sampler().sample(lambda x, t: unet(x, t).sample, x_T)
    theirs = by_diffusers(pipeline.scheduler, pipeline.unet, x_T, 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: x_T)
    images = pipeline(batch_size=44, eta=0.0, num_inference_steps=10, output_type="np").images
    (file,) = trained.glob("cells/*/samples.npz")
    with np.load(file, allow_pickle=False) as kept:
        stored = kept["arr_0"]
    np.testing.assert_allclose(images * 255.0, stored, rtol=0, atol=0.5 + 1e-2)
    assert stored.std() / 255.0 > 0.05  # nor are they all alike


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid", "cosine", "constant"])
def test_the_stored_scheduler_has_our_betas(schedule: str, tmp_path: Path) -> None:
    from ddim_lab.models.unet import write_pipeline

    config = configure(f"schedule={schedule}", "schedule.num_timesteps=50", "steps=5")
    write_pipeline(tmp_path, config.build_schedule(), config.schedule.model_dump())
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    np.testing.assert_allclose(scheduler.betas.double().numpy(), config.build_schedule().betas, rtol=1e-6)
    assert scheduler.final_alpha_cumprod == 1.0


def test_our_own_folder_is_a_checkpoint_like_any_other(trained: Path, tmp_path: Path) -> None:
    """The same weights under another name: the same digest, bitwise the same images."""
    folder = model_folder(trained)
    model = model_of(pretrained(folder))
    assert weights_digest(model.load()) == json.loads((folder / "model.json").read_text())["digests"]["ema"]
    assert (model.weights, model.weights_by) == ("ema", "file")
    raw = model_of(pretrained(folder / "raw"))
    assert (raw.weights, raw.weights_by) == ("raw", "file")
    line = ("model=pretrained", f"model.path={folder}", "steps=10", "logger=csv", "metrics.features=pixels")
    assert tiny.run(tmp_path, *line, settings=tiny.SMALL) == 0
    (again,), (before,) = tiny.results(tiny.sweeps(tmp_path)[0]), tiny.results(tiny.sweeps(trained)[0])
    assert again["sha256"] == before["sha256"]
    assert not list(tmp_path.glob("models/*/model.json")), "something was trained"
    with pytest.raises(ConfigError, match=r"schedule.beta_end=0.02 \(0.03 is set\)"):
        check_model(pretrained(folder, "schedule.beta_end=0.03"))


# -- a real one -----------------------------------------------------------------------------------------

CHECKPOINT = os.environ.get("DDIM_LAB_CHECKPOINT")


@pytest.mark.skipif(CHECKPOINT is None, reason="DDIM_LAB_CHECKPOINT names no Fashion-MNIST U-Net")
def test_a_real_checkpoint_predicts_noise_well() -> None:
    """On real images its eps at mid-noise is much nearer to the truth than that of no model at all (eps = x_t)."""
    from ddim_lab.data.base import load_data
    from ddim_lab.data.images import from_uint8

    config = pretrained(str(CHECKPOINT), "data=fashion_mnist")
    try:
        data = load_data(config.data)
    except ConfigError as error:
        pytest.skip(str(error))
    unet = model_of(config).load()
    x_0 = from_uint8(data.held_out.first(16))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    alpha_bar = config.build_schedule().alpha_bar(300)
    x_t = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps
    with torch.no_grad():
        error = (unet(x_t, torch.full((16,), 300)).sample - eps).square().mean()
    assert float(error) < 0.03
    assert float((x_t - eps).square().mean()) > 10 * float(error)
