"""A job's samples with one convention changed: each change does what it says, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from networks import Weights, ddim_network
from torch import Tensor, nn

from ddim_lab.conventions.protocol import Made
from ddim_lab.conventions.sampling import CONVENTIONS, published_effect
from ddim_lab.data.base import load_data
from ddim_lab.device.runtime import Runtime
from ddim_lab.models.obtain import obtain_model, with_batch_size
from ddim_lab.store import Store
from ddim_lab.tasks import sampling
from ddim_lab.tasks.base import Job
from ddim_lab.tasks.remade import JobSource, _ChunkImages
from ddim_lab.tasks.walks import start

COUNT = 20
LINE = (*tiny.TINY[:5], f"num_samples={COUNT}", "batch_size=8", "steps=7", "logger=csv", "checkpoint_seconds=1e-9")


EXACT = ("model=gaussian", f"num_samples={COUNT}", "batch_size=8", "steps=3", "checkpoint_seconds=1e-9")


def job_of(outputs: Path, *overrides: str) -> Job:
    config = tiny.configure(f"outputs_dir={outputs}", *overrides)
    data, runtime, store = load_data(config.data), Runtime.resolve(config.runtime), Store(outputs)

    def no_training() -> Any:
        raise AssertionError("nothing is to be trained")

    model = obtain_model(config, data, runtime, store, no_training)
    return Job(with_batch_size(config, runtime), data, model, runtime, store, "")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of a U-Net's cells: as the job has them, and with one option changed."""
    folder = tmp_path_factory.mktemp("remade")
    line = (*LINE, "metrics.features=pixels", "metrics.kid=false", "save_samples=true")
    swept = ("sampler.spacing=uniform,trailing", "model.weights=ema,raw", "-m")
    assert tiny.run(folder, *line, *swept, settings=()) == 0
    return folder


@pytest.fixture
def source(outputs: Path) -> JobSource:
    return JobSource(job_of(outputs, *LINE))


def pixels(source: JobSource, made: Made, **given: bool) -> Tensor:
    return source.images(made, **given).first(COUNT)


def cells(outputs: Path) -> list[Tensor]:
    """The images that a sweep kept, cell by cell."""
    rows = [row for sweep in tiny.sweeps(outputs) for row in tiny.results(sweep)]
    files = [np.load(outputs / "cells" / row["cell"] / "samples.npz")["arr_0"] for row in rows]
    return [torch.from_numpy(file).permute(0, 3, 1, 2) for file in files]


@pytest.mark.slow
def test_what_a_configuration_has_is_taken_from_its_cell(outputs: Path, source: JobSource, walked: list[int]) -> None:
    plain, raw, trailing, both = cells(outputs)
    for made, images in (
        ((), plain),
        ((("spacing", "trailing"),), trailing),
        ((("weights", "raw"),), raw),
        ((("spacing", "trailing"), ("weights", "raw")), both),
    ):
        assert source.forwards(made) == 0
        assert torch.equal(pixels(source, made), images)
    assert walked == []


def test_a_cell_takes_what_an_audit_made(tmp_path: Path, walked: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a network that sees them: an audit looks at images by passes of its own."""
    line = (
        "model=gaussian",
        "metrics.features=pixels",
        "metrics.kid=false",
        "num_samples=20",
        "batch_size=8",
        "steps=3",
    )
    source = JobSource(job_of(tmp_path, *line))
    made = (("eta", "1"), ("seed", "plus_1"))
    assert source.forwards(made) == 3 * 20
    images = pixels(source, made)
    assert walked == [8, 8, 4]
    assert source.forwards(made) == 0
    assert not (tmp_path / "models").exists()
    more = ("logger=csv", "sampler.eta=1", "seed=1", "save_samples=true")
    assert tiny.run(tmp_path, *line, *more, settings=()) == 0
    assert "(20 of 20 images were there)" in capsys.readouterr().err
    assert torch.equal(cells(tmp_path)[0], images)
    walked.clear()
    JobSource(job_of(tmp_path, *line, "force=true")).images(made)
    assert walked == []


def states(job: Job, network: nn.Module, scheduler: DDIMScheduler, eta: float = 0.0) -> Tensor:
    """x_0 by diffusers' scheduler from the job's x_T and noise."""
    indices = torch.arange(COUNT)
    x, noise = start(job, indices), job.runtime.noise(job.config.seed)
    scheduler.set_timesteps(job.config.steps)
    with torch.inference_mode():
        for t in scheduler.timesteps.tolist():
            eps = network(x, torch.full((COUNT,), t)).sample
            x = scheduler.step(eps, t, x, eta=eta, variance_noise=noise(indices, t, x) if eta else None).prev_sample
    return x


def schedulers(**given: Any) -> DDIMScheduler:
    return DDIMScheduler(**{"clip_sample": False, **given})


@pytest.mark.parametrize(
    ("pair", "theirs", "eta"),
    [
        (("first", "plus_one"), {"steps_offset": 1}, 0.0),
        (("last", "alpha_bar_0"), {"set_alpha_to_one": False}, 1.0),
        (("clip", "x0"), {"clip_sample": True}, 0.0),
        (("schedule", "cosine"), {"beta_schedule": "squaredcos_cap_v2"}, 0.0),
    ],
)
def test_a_change_is_the_one_that_diffusers_has(outputs: Path, pair: tuple[str, str], theirs: Any, eta: float) -> None:
    """T / S is whole, where leading timesteps are ours; x_0 before it is rounded, to what float32 betas leave."""
    job = job_of(outputs, *LINE, "steps=8", f"sampler.eta={eta}")
    source = JobSource(job)
    found = pixels(source, (pair,), levels=True)
    plain, changed = (
        ((states(job, job.model.load(), scheduler, eta) + 1.0) * 127.5).clamp(0.0, 255.0)
        for scheduler in (schedulers(), schedulers(**theirs))
    )
    torch.testing.assert_close(found, changed, rtol=0.0, atol=0.05)
    assert (changed - plain).abs().max() > 0.5
    assert not torch.equal(pixels(source, (pair,)), pixels(source, ()))


def test_the_last_step_from_a_later_timestep_adds_noise(outputs: Path) -> None:
    """Together with first=plus_one, as in Stable Diffusion's configuration: sigma is above 0 then."""
    job = job_of(outputs, *LINE, "steps=8", "sampler.eta=1")
    both = (("first", "plus_one"), ("last", "alpha_bar_0"))
    found = pixels(JobSource(job), both, levels=True)
    x_0 = states(job, job.model.load(), schedulers(steps_offset=1, set_alpha_to_one=False), 1.0)
    torch.testing.assert_close(found, ((x_0 + 1.0) * 127.5).clamp(0.0, 255.0), rtol=0.0, atol=0.05)


class Recorder(nn.Module):
    """Notes what its network is told."""

    def __init__(self, network: nn.Module, seen: list[Tensor]) -> None:
        super().__init__()
        self.network, self.seen = network, seen

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.seen.append(t)
        return self.network(x, t)


def test_timesteps_are_rounded_before_the_network_sees_them(source: JobSource) -> None:
    made: Made = (("timesteps", "bf16"),)
    plan = source._plan(made)
    seen: list[Tensor] = []
    rounding: Any = plan.job.model.load()
    rounding.network = Recorder(rounding.network, seen)
    with torch.inference_mode():
        plan.sampler.sample(rounding, torch.zeros(2, *source.shape))
    walk = [each.t for each in plan.sampler.transitions]
    assert walk == [857, 714, 571, 428, 285, 142, 0]
    assert [int(t[0]) for t in seen] == [856, 712, 572, 428, 284, 142, 0]
    assert {t.dtype for t in seen} == {torch.int64}
    assert [each.alpha_bar for each in plan.sampler.transitions] == [
        each.alpha_bar for each in source._plan(()).sampler.transitions
    ]


def test_sixteen_bits_are_a_runtime_that_keeps_nothing(outputs: Path, source: JobSource) -> None:
    made: Made = (("arithmetic", "bf16"),)
    network = source._plan(made).job.network(8)
    weights = {parameter.dtype for parameter in network.parameters()}
    assert weights == {torch.bfloat16}
    options = ("runtime.precision=bf16", "runtime.keep_fp32=[]")
    assert source.key(made) == JobSource(job_of(outputs, *LINE, *options)).key(())
    assert not torch.equal(pixels(source, made), pixels(source, ()))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_pipeline_is_diffusers_own(outputs: Path, monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    job = job_of(outputs, *LINE, f"sampler.eta={eta}")
    source, made = JobSource(job), (("loop", "diffusers"),)
    found = pixels(source, made)
    assert source.forwards(made) == 0
    assert torch.equal(pixels(source, made, levels=True).round().to(torch.uint8), found)
    x_T = start(job, torch.arange(COUNT))
    handed = itertools.repeat(x_T)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: next(handed))
    pipe = DDIMPipeline(unet=job.model.load(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=COUNT, eta=eta, num_inference_steps=7, generator=torch.manual_seed(0)).images
    theirs = torch.stack([torch.from_numpy(np.array(image)) for image in images])[:, None]
    apart = (found.int() - theirs.int()).abs()
    # batches of another size round otherwise; at eta 1 the steps' noise is other noise
    assert (apart.max() <= 1 and apart.float().mean() < 0.01) if eta == 0.0 else apart.float().mean() > 1.0
    assert not torch.equal(found, pixels(source, ()))


def test_a_samples_noise_in_the_pipeline_is_its_own_whatever_the_batch(outputs: Path) -> None:
    images = [
        pixels(JobSource(job_of(outputs, *LINE, "sampler.eta=1", f"batch_size={size}")), (("loop", "diffusers"),))
        for size in (8, 20)
    ]
    assert (images[0].int() - images[1].int()).abs().max() <= 1


def test_levels_are_the_images_before_they_are_rounded(source: JobSource, walked: list[int]) -> None:
    made: Made = (("clip", "x0_eps"),)
    rounded = pixels(source, made)
    assert source.forwards(made, levels=True) == 7 * COUNT
    levels = pixels(source, made, levels=True)
    assert levels.dtype == torch.float32
    assert torch.equal(levels.round().to(torch.uint8), rounded)
    assert not torch.equal(levels.round(), levels)
    assert walked == [8, 8, 4] * 2
    assert source.forwards(made, levels=True) == 0


def test_what_was_killed_goes_on(tmp_path: Path, walked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    source = JobSource(job_of(tmp_path, *EXACT))
    made: Made = (("last", "alpha_bar_0"),)
    original = sampling.Maker.add

    def cut(self: Any, indices: Tensor) -> None:
        if int(indices[0]) == 16:
            raise KeyboardInterrupt
        original(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(sampling.Maker, "add", cut)
        with pytest.raises(KeyboardInterrupt):
            source.images(made)
    again = JobSource(job_of(tmp_path, *EXACT))
    assert again.forwards(made) == 3 * 4
    walked.clear()
    assert len(again.images(made)) == 20
    assert walked == [4]
    grown = JobSource(job_of(tmp_path, *EXACT, "num_samples=30"))
    assert grown.key(made) != again.key(made)
    assert grown.forwards(made) == 3 * (8 + 6)


def test_every_change_has_a_key_of_its_own(source: JobSource) -> None:
    possible = [factor for factor in source.factors() if factor.why_not is None]
    changes: list[Made] = [(), *(factor.change["made"] for factor in possible)]
    keys = [source.key(made, levels=levels) for made in changes for levels in (False, True)]
    assert len(set(keys)) == len(keys)
    assert {aspect for made in changes for aspect, _ in made} == {each.aspect for each in CONVENTIONS}
    assert [factor.name for factor in source.factors() if factor.why_not] == ["arithmetic_fp16"]
    offered = {factor.name: factor for factor in source.factors()}
    assert not {"spacing_uniform", "clip_none", "eta_0", "weights_ema", "schedule_linear"} & set(offered)
    assert offered["weights_raw"].effect == 151.1
    assert offered["eta_1"].effect == pytest.approx((41.07 / 13.36 - 1.0) * 100.0, abs=0.1)
    assert published_effect("spacing", "uniform", "quadratic", 100) == pytest.approx(26.8, abs=0.1)


def test_pairs_work_together_or_say_why_not(source: JobSource) -> None:
    single = [factor.change["made"][0] for factor in source.factors() if factor.why_not is None]
    refused = {}
    keys = set()
    for one, other in itertools.combinations(single, 2):
        try:
            keys.add(source.key((one, other)))
        except ValueError as error:
            refused[one, other] = str(error)
    aspects = {tuple(sorted((one[0], other[0]))) for one, other in refused if one[0] != other[0]}
    of_the_loop = {("clip", "loop"), ("first", "loop"), ("last", "loop"), ("loop", "spacing"), ("loop", "timesteps")}
    assert aspects == {*of_the_loop, ("loop", "variance"), ("arithmetic", "loop"), ("eta", "variance")}
    count = len(single) * (len(single) - 1) // 2
    assert len(keys) == count - len(refused)
    many: Made = (("arithmetic", "bf16"), ("eta", "1"), ("last", "alpha_bar_0"), ("schedule", "cosine"))
    assert len(source.images((*many, ("timesteps", "bf16"), ("weights", "raw")))) == COUNT


@pytest.mark.parametrize(
    ("line", "reasons"),
    [
        (
            ("sampler=dpmpp_2m",),
            {"clip_x0": "formula of its own", "eta_1": "formula of its own", "loop_diffusers": "formula of"},
        ),
        (("sampler=diffusers_ddim",), {"spacing_trailing": "own timesteps", "first_plus_one": "own timesteps"}),
        (("model=gaussian",), {"weights_raw": "exact", "timesteps_bf16": "exact", "loop_diffusers": "exact"}),
        (("steps=10",), {"timesteps_bf16": "has every timestep of this walk exactly"}),
        (("sampler=ddpm_large",), {"loop_diffusers": "posterior's noise"}),
        (("sampler.variance=analytic", "model=gaussian"), {"spacing_trailing": "estimated again"}),
    ],
)
def test_what_does_not_apply_says_why(outputs: Path, line: tuple[str, ...], reasons: dict[str, str]) -> None:
    kept = [option for option in LINE if not ("model=gaussian" in line and option.startswith(("model.", "training.")))]
    factors = {factor.name: factor for factor in JobSource(job_of(outputs, *kept, *line)).factors()}
    for name, reason in reasons.items():
        assert reason in (factors[name].why_not or "")
    assert any(factor.why_not is None for factor in factors.values())


def test_weights_of_a_file_are_changed_where_it_holds_both(tmp_path: Path) -> None:
    raw = Weights()
    ddim_network(raw, torch.zeros(1, 1, 8, 8), torch.tensor([3]), mult=(1, 2), attention=(1,), blocks=1)
    training = [dict(raw), {}, 1, 2, {name: tensor / 2 for name, tensor in raw.items()}]
    torch.save(training, tmp_path / "both")
    torch.save(dict(raw), tmp_path / "one")
    line = ("model=official", *LINE[5:])
    both = JobSource(job_of(tmp_path, *line, f"model.path={tmp_path / 'both'}"))
    changed = both._plan((("schedule", "cosine"), ("weights", "raw"))).job
    alone = job_of(tmp_path, *line, f"model.path={tmp_path / 'one'}")
    assert changed.model.digest == alone.model.digest
    assert both._plan(()).job.model.digest != alone.model.digest
    said = {factor.name: factor.why_not or "" for factor in JobSource(alone).factors()}
    assert "holds one network" in said["weights_raw"]
    assert "holds one network" in said["weights_ema"]


def test_large_sets_are_read_from_their_chunks(source: JobSource) -> None:
    made: Made = (("seed", "plus_1"),)
    held = source.images(made)
    plan = source._plan(made)
    folder = plan.job.store.path("samples", sampling.content_key(source._identity(plan)))
    read = _ChunkImages(sampling.SampleChunks(folder, COUNT, 8, 1.0), held.labels, source.shape, levels=False)
    mixed = torch.tensor([19, 3, 3, 8, 0])
    assert torch.equal(read.batch(mixed), held.batch(mixed))
    assert torch.equal(torch.cat(list(read.batches(6))), held.first(COUNT))
    assert b"".join(read.content()) == b"".join(held.content())


def test_a_forward_is_timed(source: JobSource) -> None:
    seconds = source.forward_seconds()
    assert 0.0 < seconds < 1.0
    assert source.forward_seconds() == seconds
