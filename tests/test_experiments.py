"""Every file in experiments/: it composes, every cell is valid, it starts at a tiny size and ends in a report."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from diffusers.models.unets.unet_2d import UNet2DModel
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from ddim_lab.config.job import Config
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.compose import compose, composer, split_cells
from ddim_lab.jobs.plan import plan_sweep
from ddim_lab.store.records import Plan, Result

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
PAPER = {
    "table1_cifar10",
    "table1_celeba",
    "table2_cifar10",
    "table3_bedroom",
    "table3_church",
    "figure3_samples",
    "figure4_time",
    "figure5_consistency",
    "figure6_interpolation",
}
"""Their images or checkpoints are seldom where a test runs."""
SHORT = PAPER | {
    *("table1_fashion_mnist", "table2_digits", "table2_fashion_mnist", "figure3_digits", "figure4_digits"),
    *("solvers_cifar10", "solvers_fashion_mnist", "solver_orders", "scheduler_orders"),
    *("guidance_digits", "metric_power"),
}
"""What differs from another experiment in data and settings alone, or is about something else than numbers of steps,
starts at one of them."""
LESSONS = {
    "eta_effect": ("steps=10",),
    "step_counts": ("steps=50,20,5", "task.many_steps=50"),
    "ddpm_vs_ddim": ("steps=10",),
    "ddpm_cannot_skip": ("steps=10",),
    "spacings": ("steps=100",),
    "reconstruction": ("steps=10,20,50",),
    "interpolation": ("steps=5",),
    "consistency": ("steps=5,50", "task.many_steps=50"),
}
"""By name, the numbers of steps at which a lesson shows what it says."""


FEWER = {
    "solver_orders": ("sampler=ddim,unipc,dpmpp_2m_sde", "sampler.spacing=logsnr"),
    "solvers_digits": ("sampler=ddim_logsnr,heun,unipc",),
    "scheduler_orders": ("sampler.scheduler=DDIMScheduler timestep_spacing:trailing,DDPMScheduler clip_sample:false",),
    "solvers_cifar10": ("sampler=ddim,analytic_ddim,unipc,diffusers_unipc", "variance_images=44"),
    "solvers_fashion_mnist": ("sampler=ddim_trailing,unipc,pndm",),
    "schedulers_digits": ("sampler.scheduler=DDIMScheduler,SASolverScheduler,HeunDiscreteScheduler",),
}
"""Some rows of many, which tests of the samplers have all of."""

TRAINED = {
    "guidance_digits": (
        *(
            "training.max_steps=12",
            "training.warmup_steps=2",
            "training.batch_size=16",
            *("model.block_out_channels=[8]", "model.attention=[false]"),
        ),
        *("model.norm_num_groups=4", "sampler.guidance=1,2"),
    )
}
"""Those of a network that no exact model stands for, with what makes its training short."""

SPEED = {"benchmark", "speed_peers"}
"""Tasks that time a network, and make no pictures."""


def plan(*arguments: str) -> Plan:
    """The plan of a command line: every cell composed and checked, nothing run."""
    with composer(asked := get_args_parser().parse_args(list(arguments))):
        return plan_sweep(asked, arguments)[1]


def composed(name: str, *more: str) -> list[Config]:
    """The configurations of an experiment's cells, checked as they are written; its files need not be there."""
    return list(_composed(name, *more))


@functools.cache
def _composed(name: str, *more: str) -> tuple[Config, ...]:
    arguments = [f"+experiments={name}", *more]
    parse = OverridesParser.create()
    with composer(get_args_parser().parse_args([])):
        overrides = parse.parse_overrides(arguments)
        base = compose([o.input_line for o in overrides if not o.is_sweep_override()], hydra_too=True)
        return tuple(Config.from_hydra(compose(cell)) for cell in split_cells(base, overrides, parse))


def starts(outputs: Path, name: str, *more: str) -> Path:
    """Run an experiment at a tiny size, with an exact model of the digits; its sweep's folder."""
    model = () if name in TRAINED else ("model=gaussian",)
    arguments = [f"+experiments={name}", "data=digits", *model, "training=digits", "logger=csv"]
    with composer(get_args_parser().parse_args([])):
        base = compose(arguments, hydra_too=True)
    arguments += [*tiny.SMALL, "metrics.features=pixels", "metrics.noise_seeds=3", "metrics.speed_repeats=1"]
    if base.task.name in SPEED:  # no images are read, and the network is a U-Net that others can run, too
        (outputs / "none").mkdir(exist_ok=True)
        arguments = [text for text in arguments if not text.startswith(("data=", "model=", "metrics.features"))]
        arguments += ["data=image_folder", f"data.root={outputs / 'none'}", "data.image_size=8", "data.channels=1"]
        arguments += ["model=digits", "model.block_out_channels=[8]", "model.attention=[false]", "task.rounds=3"]
    if base.task.name == "benchmark":
        arguments.append("task.batch_sizes=[1]")  # as speed_gpu has it, whose cells these are, too
    if base.task.name == "consistency":
        arguments.append("task.many_steps=8")
    if base.task.name == "search_timesteps":
        pytest.importorskip("optuna")
        arguments += ["task.trials=8", "task.search_samples=40"]
    if base.task.name == "order":
        arguments += ["task.steps=[10,50,60,80]", "task.starts=2", "task.draws=1000"]
    if base.task.name == "metric_power":
        arguments += ["task.draws=2", "task.fewer_steps=2", "task.reference_images=300"]
    arguments += FEWER.get(name, ()) + TRAINED.get(name, ())
    if not any(text.startswith("steps=") for text in more):
        arguments.append("steps=3" if name in SHORT or base.task.name in SPEED else "steps=3,8")
    assert tiny.run(outputs, *arguments, *more, settings=()) == 0
    return tiny.sweeps(outputs)[-1]


@pytest.fixture(scope="module")
def sweep_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The sweep of an experiment, run once; those on speed share their outputs, and so the cells of both."""
    timed = tmp_path_factory.mktemp("timed")

    @functools.cache
    def run(name: str) -> Path:
        outputs = timed if name.startswith("speed") else tmp_path_factory.mktemp(name)
        return starts(outputs, name, *LESSONS.get(name, ()))

    return run


def test_the_lessons_and_the_papers_tables_are_there() -> None:
    assert set(NAMES) >= set(LESSONS) | PAPER


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert f"python -m ddim_lab +experiments={name}" in text
    cells = composed(name)
    assert len(cells) >= 1
    assert all(config.study.title and config.study.notes for config in cells)


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_every_lesson_runs_on_what_comes_along(name: str) -> None:
    assert len(plan(f"+experiments={name}").cells) >= 1


# the paper's tables: its protocol and its numbers


@pytest.mark.parametrize("name", [name for name in sorted(PAPER) if name.startswith("table")])
def test_the_papers_protocol(name: str) -> None:
    cells = composed(name)
    first = cells[0]
    assert {config.sampler.spacing for config in cells} == {"quadratic" if "cifar10" in name else "uniform"}
    assert {config.sampler.name: config.sampler.clip for config in cells}.get("ddpm_large", "x0_eps") == "x0_eps"
    assert {config.sampler.clip for config in cells if config.sampler.name != "ddpm_large"} == {"none"}
    assert {(config.data.name, config.num_samples) for config in cells} == {
        (first.data.name, 10_000 if name.startswith("table2") else 50_000)
    }
    reference = first.study.published
    assert reference is not None
    assert (reference.data, reference.num_samples) == (first.data.name, first.num_samples)
    for config in cells:
        assert str(config.steps) in reference.rows[config.sampler.name]
    if not name.startswith("table2"):
        assert (reference.metric, first.metrics.features, first.metrics.reference) == ("FID", "inception", "train")
        assert reference.reference == "train"
        spacing = (
            reference.spacing
            if isinstance(reference.spacing, dict)
            else {str(c.steps): c.sampler.spacing for c in cells}
        )
        assert {spacing[str(config.steps)] for config in cells} == {first.sampler.spacing}
        assert isinstance(reference.spacing, dict) or reference.spacing == first.sampler.spacing
    assert (reference.weights, reference.schedule) == ("ema", first.schedule)
    for config in cells:
        row, sampler = reference.samplers[config.sampler.name], config.sampler
        assert (row.eta, row.variance, row.clip) == (sampler.eta, sampler.variance, sampler.clip)


def test_the_papers_numbers() -> None:
    """A few by hand, and two laws: FID falls with S, and up to S = 50 it rises from row to row."""
    numbers = {name: composed(name)[0].study.published for name in sorted(PAPER) if name.startswith("table")}
    found = {name: reference.rows for name, reference in numbers.items() if reference}
    assert found["table1_cifar10"]["ddim"] == {"10": 13.36, "20": 6.84, "50": 4.67, "100": 4.16, "1000": 4.04}
    assert found["table1_celeba"]["ddpm_large"]["1000"] == 3.26
    assert found["table3_church"]["ddim_eta1"]["100"] == 8.27
    assert found["table2_cifar10"]["ddim"]["50"] == 0.0023
    for rows in found.values():
        for row in rows.values():
            assert list(row.values()) == sorted(row.values(), reverse=True)
        for steps in ("10", "20", "50"):
            column = [row[steps] for row in rows.values()]
            assert column == sorted(column)


def test_the_last_column_is_opt_in() -> None:
    cells = composed("table1_celeba", "steps=10,20,50,100,1000")
    assert {config.steps for config in cells} == {10, 20, 50, 100, 1000}
    last = composed("table1_cifar10", "steps=1000", "sampler.spacing=uniform")
    assert [config.build_sampler().nfe for config in last] == [1000] * 5
    reference = last[0].study.published
    assert reference is not None
    assert isinstance(reference.spacing, dict)
    assert reference.spacing["1000"] == "uniform"


def test_offline_twins_differ_from_the_papers_in_data_alone() -> None:
    assert [config.data.name for config in composed("table1_fashion_mnist")] == ["fashion_mnist"] * 20
    assert {config.task.name for config in composed("table2_fashion_mnist")} == {"reconstruct"}
    for config in (*composed("figure3_digits"), *composed("figure4_digits", "data=fashion_mnist")):
        assert config.model.kind == "unet"
    twin, paper = composed("figure4_digits"), composed("figure4_time")
    assert [(c.steps, c.sampler, c.num_samples) for c in twin] == [(c.steps, c.sampler, c.num_samples) for c in paper]


def with_rows(more: str) -> str:
    """A reference that is right but for `more`."""
    return f"{{source: me, metric: FID, rows: {{ddim: {{10: 1.0}}}}, {more}}}"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{source: me, metric: FID, row: {}}", "study.published.row: no such option"),
        ("{source: me, rows: {ddim: {10: 1.0}}}", "study.published.metric is not set"),
        ("{source: me, metric: FID, rows: {ddim: {ten: 1.0}}}", "study.published.rows.ddim.ten"),
        ("{source: me, metric: FID, rows: {ddim: {10: good}}}", "study.published.rows.ddim.10=good"),
        ("{source: me, metric: FID, rows: {mine: {10: 1.0}}}", "study.published.rows.mine: conf/sampler has no such"),
        ("{source: me, metric: FID, rows: {../config: {10: 1.0}}}", "rows.../config: conf/sampler has no such preset"),
        (with_rows("samplers: {ddpm: {eta: 1.0, variance: posterior, clip: none}}"), "samplers.ddpm: study.published"),
        (
            with_rows("samplers: {ddim: {eta: 0.0, variance: small, clip: none}}"),
            "samplers.ddim.variance=small: must be",
        ),
        (with_rows("reference: test"), "study.published.reference=test: must be 'train', 'held_out' or 'all'"),
        (with_rows("weights: best"), "study.published.weights=best: must be 'ema' or 'raw'"),
        (with_rows("spacing: linear"), "study.published.spacing=linear: must be one of uniform, trailing"),
        (
            with_rows("spacing: {10: linear}"),
            "study.published.spacing={10: 'linear'}: must be one of uniform, trailing",
        ),
        (with_rows("spacing: {10: null}"), "study.published.spacing={10: None}: must be one of uniform, trailing"),
        (with_rows("spacing: {ten: uniform}"), "study.published.spacing={'ten': 'uniform'}: must be one of uniform"),
        (with_rows("schedule: linear"), "study.published.schedule=linear: input should be"),
        (with_rows("schedule: {name: square}"), "study.published.schedule="),
        (with_rows("schedule: {name: linear, num_timesteps: 1000, beta_start: 0.0001}"), "beta_end is not set"),
    ],
)
def test_a_wrong_reference_is_refused_before_any_work(reference: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed("table1_digits", f"study.published={reference}")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_row_of_ones_own_says_what_it_is() -> None:
    own = "{source: me, metric: FID, rows: {mine: {10: 1.0}}, samplers: {mine: {eta: 0.7, variance: large, clip: x0}}}"
    reference = composed("table1_digits", f"study.published={own}")[0].study.published
    assert reference is not None
    assert reference.model_dump()["samplers"] == {"mine": {"eta": 0.7, "variance": "large", "clip": "x0"}}


def test_a_papers_table_on_a_checkpoint(tmp_path: Path) -> None:
    """Table 1's file with a checkpoint of another data set: the paper's numbers stand there, and no difference."""
    checkpoint = tmp_path / "checkpoint"
    UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(checkpoint)
    arguments = ["data=digits", f"model.path={checkpoint}", "metrics.features=pixels", "sampler=ddim", "steps=10"]
    assert tiny.run(tmp_path / "o", "+experiments=table1_cifar10", *arguments, "logger=csv", settings=tiny.SMALL) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "o")[0])
    assert (row["spacing"], row["model"], row["status"]) == ("quadratic", str(checkpoint), "done")
    table = (tiny.sweeps(tmp_path / "o")[0] / "table.md").read_text(encoding="utf-8")
    assert "/ 13.36 |" in table
    assert "another metric" in table


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_starts_and_ends_in_a_table_and_a_picture(name: str, sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of(name)
    assert {row["status"] for row in tiny.results(sweep)} == {"done"}
    assert "|---|" in (sweep / "table.md").read_text(encoding="utf-8")
    page = (sweep / "report.html").read_text(encoding="utf-8")
    assert "the picture is missing" not in page
    if not name.startswith(("speed", "solver_orders", "scheduler_orders")):
        assert page.count('src="data:image/png') >= len(tiny.results(sweep))
    for row in (rows := tiny.results(sweep)):
        file = sweep.parents[1] / "cells" / row["cell"] / "result.json"
        values = Result.read(json.loads(file.read_text())).values
        assert {value.name for value in values if value.value is not None} <= set(rows[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speed", "speed_peers"])
def test_speed_is_that_of_an_untrained_network_and_no_data_set(name: str, sweep_of: Callable[[str], Path]) -> None:
    """data.root names an empty folder: any other task is refused there."""
    for row in tiny.results(sweep_of(name)):
        assert (row["data"], row["weights"]) == ("image_folder", "random")
        assert float(row["images_per_second"]) > 0
        assert float(row["one_image_seconds"]) > 0


# what each lesson shows


def column(sweep: Path, name: str) -> list[float]:
    return [float(row[name]) for row in tiny.results(sweep)]


@pytest.mark.slow
def test_eta_effect(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("eta_effect")
    variances = column(sweep, "noise_variance")
    assert column(sweep, "eta") == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert variances[0] == 0.0
    assert variances[:4] == sorted(set(variances[:4]))
    # nothing of x_T is left by then, and few steps of the posterior variance leave too little spread: of the exact
    # model at S = 10 the recursion of the variance gives 0.17 at eta 0.75 and 0.15 at eta 1
    assert variances[4] == pytest.approx(variances[3], rel=0.25)
    assert column(sweep, "noise_mse") == [variance / 2 for variance in variances]
    assert re.search(r"## Variance across noise seeds.*\| η 0 \| 0 \|", (sweep / "table.md").read_text(), re.DOTALL)
    assert "noise_variance_against_eta" in (sweep / "report.html").read_text()


@pytest.mark.slow
def test_step_counts(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("step_counts")
    assert (mses := column(sweep, "consistency_mse"))[0] == 0.0
    assert mses == sorted(set(mses))
    assert "## MSE to many steps (digits)" in (sweep / "table.md").read_text()


@pytest.mark.slow
def test_ddpm_vs_ddim(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("ddpm_vs_ddim")
    ddim, ddpm = column(sweep, "noise_mse")
    assert ddim == 0.0
    assert ddpm > 0.001
    assert "times as fast as the slowest" in (sweep / "report.html").read_text()


@pytest.mark.slow
def test_ddpm_cannot_skip(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("ddpm_cannot_skip")
    wrong, right = column(sweep, "mse_to_sampler")
    assert right < 1e-9 < 1e-2 < wrong
    table = (sweep / "table.md").read_text()
    assert "task.alphas=per\\_step" in table
    assert "task.alphas=cumulative" in table


@pytest.mark.slow
def test_spacings(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("spacings")
    forwards = dict(zip((row["spacing"] for row in tiny.results(sweep)), column(sweep, "nfe"), strict=True))
    assert forwards["uniform"] == 100
    assert forwards["quadratic"] == 96
    assert forwards["log"] < 100
    assert forwards["logsnr"] == forwards["karras"] == 100
    assert "fd_against_forwards" in (sweep / "report.html").read_text()


@pytest.mark.slow
def test_reconstruction(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("reconstruction")
    mses = column(sweep, "reconstruction_mse")
    assert mses == sorted(set(mses), reverse=True)
    table = (sweep / "table.md").read_text()
    assert "## Reconstruction MSE (digits)" in table
    assert re.search(r"\| η 0 \| \S+ ± \S+ / 0.014 \| \S+ ± \S+ / 0.0065 \| \S+ ± \S+ / 0.0023 \|", table)
    assert "No difference is given: ours is of digits, theirs of cifar10." in table


@pytest.mark.slow
def test_interpolation(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("interpolation")
    page = (sweep / "report.html").read_text()
    assert "Lines between pairs of x_T (slerp)" in page
    assert "Grid between four x_T" in page


@pytest.mark.slow
def test_consistency(sweep_of: Callable[[str], Path]) -> None:
    sweep = sweep_of("consistency")
    ddim, itself, ddpm, ddpm_itself = column(sweep, "consistency_mse")
    assert itself == ddpm_itself == 0.0
    assert ddim < ddpm
