"""diffusers' schedulers: the loop that its users write, on our x_T and noise; what runs, and why the others do not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from official import relative_difference
from torch import Tensor

from ddim_lab.analytic import GaussianMixtureEps
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.exactness import mixture, on_one_point, starts
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.schedulers.adapter import DiffusersScheduler, betas_of, scheduler_names
from ddim_lab.schedulers.classes import ASTRAY, OTHERS, VARIANCE_PRESERVING

SCHEDULE = NoiseSchedule.linear()

RUN = sorted(set(VARIANCE_PRESERVING) - set(ASTRAY))


def model(schedule: NoiseSchedule = SCHEDULE) -> GaussianMixtureEps:
    return mixture(schedule)


def sampler(name: str, steps: int = 10, eta: float = 0.0, **options: Any) -> Sampler:
    return Sampler(SCHEDULE, steps, eta=eta, formula=DiffusersScheduler(name, options, eta))


def written_by_hand(scheduler: Any, steps: int, x_T: Tensor, **settings: Any) -> Tensor:
    """diffusers' loop as its documentation has it, with our exact model."""
    scheduler.set_timesteps(steps)
    x, eps = x_T * scheduler.init_noise_sigma, model()
    for t in scheduler.timesteps:
        state = scheduler.scale_model_input(x, t)
        given = {name: value(t, x) if callable(value) else value for name, value in settings.items()}
        x = scheduler.step(eps(state, torch.full((len(x),), float(t))), t, x, **given).prev_sample
    return x


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 10, 30])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DDIMScheduler, {}),
        (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False}),
        (UniPCMultistepScheduler, {"solver_order": 3}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        (HeunDiscreteScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_images_are_those_of_the_loop_that_its_users_write(kind: Any, options: dict[str, Any], steps: int) -> None:
    x_T = starts(5).float()
    try:
        theirs = written_by_hand(kind(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", **options), steps, x_T)
    except Exception:  # theirs fails with so few, and so does ours, in one line
        with pytest.raises(ValueError, match=f"diffusers' {kind.__name__} fails at {steps} steps"):
            sampler(kind.__name__, steps, **options)
        return
    assert torch.equal(sampler(kind.__name__, steps, **options).sample(model(), x_T), theirs)


def test_noise_that_a_step_accepts_is_ours() -> None:
    """Named by timestep: the same that our own rows have."""
    x_T, indices, noise = starts(5).float(), torch.arange(7, 12), NamedNoise(3)
    theirs = written_by_hand(
        DDIMScheduler(clip_sample=False), 10, x_T, eta=0.7, variance_noise=lambda t, x: noise(indices, int(t), x)
    )
    adapted = sampler("DDIMScheduler", eta=0.7, clip_sample=False)
    assert torch.equal(adapted.sample(model(), x_T, seed=3, indices=indices), theirs)
    ours = Sampler(SCHEDULE, 10, eta=0.7).sample(model(), x_T, seed=3, indices=indices)
    assert relative_difference(theirs, ours) < 1e-5
    assert adapted.is_random
    assert adapted.formula.noise_from is None


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_where_a_step_accepts_none_each_sample_has_a_generator(kind: Any) -> None:
    x_T, indices, seed = starts(4).float(), torch.tensor([5, 0, 9, 2]), 11
    adapted = sampler(kind.__name__)
    z = NamedNoise(seed)(indices, 1000.0, torch.empty(4, 2))
    seeds = (z.view(torch.int64).flatten() & (2**63 - 1)).tolist()
    theirs = written_by_hand(kind(), 10, x_T, generator=[torch.Generator().manual_seed(each) for each in seeds])
    assert torch.equal(adapted.sample(model(), x_T, seed=seed, indices=indices), theirs)
    assert adapted.formula.noise_from == "a generator for each sample"
    brownian = sampler("DPMSolverSDEScheduler", 3)
    assert brownian.formula.noise_from == "a Brownian path for each sample"
    assert "torchsde" in brownian.recipe()["formula"]


@pytest.mark.parametrize("name", RUN)
def test_a_sample_depends_on_nothing_beside_it(name: str) -> None:
    """Alone, in a batch, again, and whatever torch's global generator has given meanwhile: the same image."""
    walk, x_T, indices = sampler(name, 6), starts(3).float(), torch.tensor([4, 1, 7])
    together = walk.sample(model(), x_T, seed=2, indices=indices)
    torch.rand(3)
    assert torch.equal(together, walk.sample(model(), x_T, seed=2, indices=indices))
    for at in range(3):
        alone = walk.sample(model(), x_T[at : at + 1], seed=2, indices=indices[at : at + 1])
        assert relative_difference(alone, together[at : at + 1]) < 1e-5
    assert torch.isfinite(together).all()
    assert walk.is_random == (not torch.equal(together, walk.sample(model(), x_T, seed=3, indices=indices)))


def test_states_are_what_the_model_is_given() -> None:
    """Of a scheduler in sigma, whose own state is x / sqrt(alpha_bar), too: strips show what others show."""
    walk, x_T = sampler("EulerDiscreteScheduler", 8), starts(2).float()
    ours = Sampler(SCHEDULE, 8, timesteps=[step.t for step in walk.transitions])
    for theirs, state in zip(walk.walk(model(), x_T), ours.walk(model(), x_T), strict=True):
        assert theirs.t == state.t
        assert relative_difference(theirs.x, state.x) < 1e-2  # it starts from x_T / sqrt(1 - alpha_bar)
        if theirs.x0 is not None and state.x0 is not None:
            assert relative_difference(theirs.x0, state.x0) < 1e-2


@pytest.mark.parametrize(
    ("schedule", "named"),
    [
        (NoiseSchedule.linear(), "linear"),
        (NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), "scaled_linear"),
        (NoiseSchedule.cosine(), None),
        (NoiseSchedule.constant(), "linear"),
        (NoiseSchedule([0.3, 0.1, 0.2]), None),
    ],
)
def test_betas_are_given_by_name_where_they_have_one(schedule: NoiseSchedule, named: str | None) -> None:
    words = betas_of(schedule)
    assert words.get("beta_schedule") == named
    made = DDIMScheduler(**words)
    assert made.alphas_cumprod.numpy() == pytest.approx(schedule.alpha_bars, rel=1e-2)


# -- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scheduler_names())
def test_every_scheduler_runs_or_is_refused_for_a_reason(name: str) -> None:
    if name in RUN:
        walk = sampler(name)
        assert walk.nfe == len(walk.transitions) >= 10
        return
    with pytest.raises(
        ValueError, match=rf"^sampler.scheduler={name} can't run here: it (is of|takes no|walks|fills|has)"
    ):
        DiffusersScheduler(name)
    assert name in ASTRAY or any(name in kinds for kinds in OTHERS.values()) or name == "RFD4ProteinaScheduler"


class Newer(DDIMScheduler):
    """What diffusers may have tomorrow."""


class Forgetful(DDIMScheduler):
    """Draws from the global generator."""

    def step(self, *args: Any, **settings: Any) -> Any:
        found = super().step(*args, **settings)
        found.prev_sample = found.prev_sample + 0.1 * torch.randn_like(found.prev_sample)
        return found


def test_a_class_that_diffusers_adds_runs_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "NewerScheduler", Newer, raising=False)
    monkeypatch.setattr(diffusers, "ForgetfulScheduler", Forgetful, raising=False)
    x_T = starts(3).float()
    assert torch.equal(sampler("NewerScheduler").sample(model(), x_T), sampler("DDIMScheduler").sample(model(), x_T))
    assert sampler("NewerScheduler").formula.claimed_order(()) is None
    with pytest.raises(ValueError, match="draws from torch's global generator"):
        _ = sampler("ForgetfulScheduler").is_random


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampler.scheduler=DDIMSheduler"], r"has no such scheduler; did you mean DDIMScheduler\?"),
        (["sampler.scheduler=LCMScheduler"], "it is of a consistency model"),
        (["sampler.scheduler=RePaintScheduler"], "it fills in a part of an image"),
        (["sampler.options={timestep_spcing: trailing}"], "no such option; did you mean timestep_spacing"),
        (["sampler.options={beta_start: 0.1}"], "sampler.options.beta_start: it says of which process"),
        (["sampler.options={prediction_type: sample}"], "sampler.options.prediction_type: it says of which process"),
        (["sampler.options={num_train_timesteps: 10}"], "it says of which process"),
        (
            ["sampler.scheduler=UniPCMultistepScheduler", "sampler.options={use_flow_sigmas: true}"],
            "use_flow_sigmas: it says of which process",
        ),
        (
            ["sampler.scheduler=SASolverScheduler", "sampler.options={tau_func: os.system}"],
            "a function or a file can't",
        ),
        (["sampler.options={clip_sample: {a: 1}}"], "must be a number, a word"),
        (["sampler.options={timestep_spacing: even}"], "timestep_spacing=even: must be one of 'leading', 'trailing'"),
        (["sampler.options=3"], "sampler.options"),
        (["sampler.scheduler=DDIMScheduler clip_sample:False"], "clip_sample=False: must be true or false"),
        (["sampler.options={clip_sample_range: wide}"], "clip_sample_range=wide: must be a number"),
        (["sampler.options={steps_offset: 0.5}"], "steps_offset=0.5: must be a whole number"),
        (["sampler.scheduler=DDPMScheduler variance_type:some"], "variance_type=some: must be one of 'fixed_small'"),
        (["sampler.options={steps_offset: -1}"], "visits t = -1 at 50 steps, and the schedule has 0 to 999"),
        (["sampler.scheduler=DPMSolverSDEScheduler noise_sampler_seed:3"], "seed names the noise; drop it"),
        (["sampler.scheduler=DDIMScheduler clip_sample:true clip_sample:false"], "say clip_sample twice"),
        (["sampler.options={eta: 1}"], "sampler.options.eta: diffusers' DDIMScheduler has no such option"),
        (["sampler.scheduler='  '"], "sampler.scheduler=: diffusers .* has no such scheduler"),
        (["sampler.eta=2", "sampler.options={clip_sample: false}"], "gives no finite image at 50 steps, not even of a"),
        (
            ["sampler.scheduler=DPMSolverSinglestepScheduler lower_order_final:false", "nfe=10"],
            "lower_order_final=False: diffusers' DPMSolverSinglestepScheduler takes True for it; give that",
        ),
        (
            ["sampler.scheduler=DDPMScheduler", "sampler.timesteps=[900.5,500,20]"],
            r"takes \[900, 500, 20\] for them; give others",
        ),
        (["sampler.scheduler=DDIMScheduler clip_sample"], "clip_sample is no argument; write it as option:value"),
        (["sampler.scheduler=EulerDiscreteScheduler", "sampler.eta=1"], "sampler.eta=1: the step of .* takes none"),
        (["sampler.spacing=uniform"], "sampler.spacing=uniform: must be 'scheduler'"),
        (["sampler.clip=none"], "sampler.clip=none: must be 'scheduler'"),
        (["sampler.timesteps=[900,20]"], "DDIMScheduler takes no list of timesteps"),
        (["steps=1001"], "fails at 1001 steps"),
        (["sampler.scheduler=HeunDiscreteScheduler", "nfe=0"], "nfe=0"),
        (["sampler.scheduler=DDPMScheduler", "task=interpolate"], "needs a deterministic sampler"),
        (["task=reconstruct"], "is for the DDIM family"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_t_be_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        tiny.configure("sampler=diffusers", *words)
    assert "\n" not in str(raised.value)


def test_arguments_may_stand_beside_the_name() -> None:
    config = tiny.configure("sampler=diffusers", "sampler.scheduler=DDIMScheduler clip_sample:false steps_offset:1")
    assert config.build_sampler().recipe()["formula"]["options"] == {"clip_sample": False, "steps_offset": 1}
    assert config.labels()["sampler"] == "DDIMScheduler clip_sample:false steps_offset:1"
    assert config.build_sampler().transitions[0].t == 981


def test_nfe_is_forwards_done() -> None:
    config = tiny.configure("sampler=diffusers", "sampler.scheduler=HeunDiscreteScheduler", "nfe=10")
    assert (config.steps, config.forwards, config.build_sampler().nfe) == (5, 9, 9)


def test_a_key_holds_what_its_images_depend_on() -> None:
    keys = {
        json.dumps(each.recipe(), sort_keys=True)
        for each in (
            sampler("DDIMScheduler"),
            sampler("DDIMScheduler", clip_sample=False),
            sampler("DDIMScheduler", eta=0.5),
            sampler("DDIMScheduler", 20),
            sampler("DDIMParallelScheduler"),
        )
    }
    assert len(keys) == 5
    assert sampler("DDIMScheduler").recipe()["formula"]["version"] == diffusers.__version__


# -- the scheduler that a folder ships -----------------------------------------------------------------------------


def shipped(folder: Path, scheduler: Mapping[str, Any] | None) -> Path:
    """A pipeline's folder with a small network."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks)
    network.save_pretrained(folder / "unet")
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


GOOGLES = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "tensor_format": "pt",
    "trained_betas": None,
    "variance_type": "fixed_large",
}
"""As Ho et al.'s checkpoints are stored."""


def test_a_folder_s_own_scheduler_is_as_its_user_gets_it(tmp_path: Path) -> None:
    words = ("model=pretrained", f"model.path={shipped(tmp_path / 'a', GOOGLES)}", "metrics.features=pixels")
    config = tiny.configure(*words, "sampler=checkpoint", "steps=20")
    theirs, x_T = DDPMScheduler.from_config(GOOGLES), starts(3).float()
    assert theirs.config.variance_type == "fixed_large"
    z = NamedNoise(0)(torch.arange(3), 1000.0, torch.empty(3, 2))
    seeds = (z.view(torch.int64).flatten() & (2**63 - 1)).tolist()
    by_hand = written_by_hand(theirs, 20, x_T, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    assert torch.equal(config.build_sampler().sample(model(), x_T), by_hand)
    assert config.labels()["sampler"] == "checkpoint"
    changed = tiny.configure(*words, "sampler=checkpoint", "sampler.options={variance_type: fixed_small}")
    assert changed.build_sampler().recipe()["formula"]["options"]["variance_type"] == "fixed_small"


@pytest.mark.parametrize("name", RUN)
def test_a_folder_that_diffusers_saves_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    made = getattr(diffusers, name)(**betas_of(SCHEDULE))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    ours = Sampler(SCHEDULE, 6, formula=DiffusersScheduler.shipped(name, config, {}, 0.0))
    x_T = starts(2).float()
    assert torch.equal(ours.sample(model(), x_T), sampler(name, 6).sample(model(), x_T))


def test_a_folder_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped(tmp_path / "ck", GOOGLES)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("model=pretrained", "model.path='~/ck'", "metrics.features=pixels", "sampler=checkpoint")
    assert tiny.configure(*words).forwards == 50
    with pytest.raises(ConfigError, match=r"sampler.folder=/elsewhere: it is the model's folder"):
        tiny.configure(*words, "sampler.folder=/elsewhere")


def test_without_one_it_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler=checkpoint is the scheduler of a checkpoint's folder: give model="):
        tiny.configure("sampler=checkpoint")
    bare = shipped(tmp_path / "bare", None)
    with pytest.raises(ConfigError, match=r"has no scheduler_config\.json, and so no scheduler"):
        tiny.configure("model=pretrained", f"model.path={bare}", "sampler=checkpoint")
    flow = shipped(tmp_path / "flow", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ConfigError, match="it is of flow matching"):
        tiny.configure("model=pretrained", f"model.path={flow}", "sampler=checkpoint")


# -- from the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("schedulers")
    names = "DDIMScheduler clip_sample:false,DPMSolverMultistepScheduler,EulerAncestralDiscreteScheduler"
    apart = "{metric: FID, source: A paper, protocol: another network, unit: NFE, rows: {Theirs: {5: 8.1, 20: 3.25}}}"
    words = ("model=gaussian", "metrics.features=pixels", "logger=csv", f"study.elsewhere=[{apart}]", "-m")
    words = (f"sampler.scheduler={names}", "nfe=5,10", *words)
    assert tiny.run(outputs, "sampler=diffusers", *words, settings=tiny.SMALL) == 0
    return tiny.sweeps(outputs)[0]


@pytest.mark.slow
def test_a_sweep_over_schedulers(sweep: Path) -> None:
    rows = tiny.results(sweep)
    assert [row["nfe"] for row in rows] == ["5", "10"] * 3
    assert len({row["sampler"] for row in rows}) == 3
    assert {row["spacing"] for row in rows} == {row["clip"] for row in rows} == {"scheduler"}
    found = [json.loads((sweep.parent.parent / "cells" / row["cell"] / "result.json").read_text()) for row in rows]
    said = [result["recipe"]["sampler"] for result in found]
    assert [each.get("noise_from") for each in said] == [None] * 4 + ["a generator for each sample"] * 2
    assert said[1]["formula"]["version"] == diffusers.__version__
    assert said[1]["timesteps"] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


def test_the_report_says_whose_noise_is_its_own(sweep: Path) -> None:
    table = (sweep / "table.md").read_text()
    assert re.search(r"Noise: a generator for each sample for EulerAncestralDiscreteScheduler", table)


def test_numbers_from_elsewhere_stand_apart(sweep: Path) -> None:
    told = (sweep / "table.md").read_text().partition("## FID, published elsewhere")[2]
    assert "A paper · another network" in told
    assert "| Theirs | 8.10 | 3.25 |" in told
    assert "FID, published elsewhere" in (sweep / "report.html").read_text()


def test_a_repeated_timestep_has_noise_of_its_own() -> None:
    """Karras' sigmas are rounded to timesteps, of which some are visited twice."""
    walk = sampler("DPMSolverMultistepScheduler", 200, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    visited = [step.t for step in walk.transitions]
    assert len(set(visited)) < len(visited)
    asked: list[float] = []
    noise = NamedNoise(0)

    def listening(indices: Tensor, t: float, like: Tensor) -> Tensor:
        asked.append(t)
        return noise(indices, t, like)

    walk.sample(model(), starts(2).float(), noise=listening)
    assert len(asked) == len(set(asked)) == len(visited)


@pytest.mark.parametrize("task", ["consistency", "precision", "ode_error", "trajectory"])
def test_every_task_takes_one_with_options(task: str, tmp_path: Path) -> None:
    words = ("sampler=diffusers", "sampler.options={clip_sample: false}", "model=gaussian", "metrics.features=pixels")
    quick = {"consistency": ["task.many_steps=4"], "ode_error": ["task.fine_nfe=[9,8]"]}.get(task, [])
    assert tiny.run(tmp_path, *words, f"task={task}", "steps=3", "logger=csv", *quick, settings=tiny.SMALL) == 0


def test_timesteps_are_walked_down_in_whatever_order_they_are_given() -> None:
    up, down = (
        tiny.configure("sampler=diffusers", "sampler.scheduler=EulerDiscreteScheduler", f"sampler.timesteps={given}")
        for given in ("[20,500,900]", "[900,500,20]")
    )
    assert [step.t for step in up.build_sampler().transitions] == [900, 500, 20]
    assert up.build_sampler().recipe() == down.build_sampler().recipe()


def test_the_image_gone_by_is_the_clamped_one() -> None:
    """Of a step that clamps it; of one that does not say it, what eps stands for."""
    clamped, free = sampler("DDIMScheduler"), sampler("UniPCMultistepScheduler")
    x_T = 3.0 * starts(4).float()
    for walk in (clamped, free):
        found = [state.x0 for state in walk.walk(model(), x_T) if state.x0 is not None]
        assert len(found) == walk.nfe
        assert (max(float(x0.abs().max()) for x0 in found) <= 1.0) == (walk is clamped)


def test_a_larger_noise_is_no_fault() -> None:
    assert not DiffusersScheduler("DDPMScheduler", {"variance_type": "fixed_large"}).keeps_levels
    assert DiffusersScheduler("DDPMScheduler").keeps_levels


def test_one_point_shows_states_off_their_level() -> None:
    """diffusers' DDIM goes T // S timesteps down, wherever its list goes next."""
    fine = on_one_point(sampler("DDIMScheduler", 10, timestep_spacing="trailing"), starts(2))
    off = on_one_point(sampler("DDIMScheduler", 3, timestep_spacing="trailing"), starts(2))
    left = on_one_point(sampler("DDIMScheduler", 10, set_alpha_to_one=False), starts(2))
    assert fine.off_level is not None
    assert off.off_level is not None
    assert fine.off_level < 1e-5 < 1e-3 < off.off_level
    assert off.off_at == 332
    assert fine.noise_left < 1e-5 < 1e-3 < left.noise_left
