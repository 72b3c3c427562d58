"""nfe=: forwards as the axis. A sampler takes the most steps that cost no more; the report goes by what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from ddim_lab.config.job import Config
from ddim_lab.errors import ConfigError
from ddim_lab.report.read import read_sweep
from ddim_lab.report.together import against_best_ddim, against_ddim


def steps_of(*overrides: str) -> int:
    return tiny.configure(*overrides).steps


@pytest.mark.parametrize("sampler", ["ddim", "ddim_eta1", "ddpm_large", "unipc", "heun", "dpm_solver_2", "pndm"])
@pytest.mark.parametrize("nfe", [2, 5, 10, 50])
def test_the_most_steps_that_cost_no_more(sampler: str, nfe: int) -> None:
    config = tiny.configure(f"sampler={sampler}", f"nfe={nfe}")
    assert config.forwards <= nfe < config.forwards_at(config.steps + 1)
    assert config.forwards == config.build_sampler().nfe


@pytest.mark.parametrize("spacing", ["quadratic", "quadratic_full", "log"])
@pytest.mark.parametrize("nfe", [9, 60, 200])
def test_a_spacing_that_drops_repeats_takes_more_steps_than_forwards(spacing: str, nfe: int) -> None:
    config = tiny.configure(f"sampler.spacing={spacing}", f"nfe={nfe}")
    assert config.steps >= nfe >= config.forwards
    assert min(config.forwards_at(steps) for steps in range(config.steps + 1, config.steps + 20)) > nfe


def test_more_than_there_are_timesteps() -> None:
    assert steps_of("nfe=5000") == 1000
    assert steps_of("nfe=5000", "sampler=heun") == 1000


def test_an_eta_that_one_step_bears_and_two_do_not() -> None:
    """It is the eta that is wrong: one step is no answer to ten forwards."""
    assert steps_of("sampler.eta=1.05", "steps=1") == 1
    with pytest.raises(ConfigError, match=r"eta=1.05 is too large for these 10 timesteps"):
        tiny.configure("sampler.eta=1.05", "nfe=10")


def test_too_few_is_refused_with_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {steps: 2 * steps + 7 for steps in range(4, 1001)}

    def forwards_at(self: Config, steps: int | None = None) -> int:
        if steps not in costs:
            raise ValueError("it needs 4 steps")
        return costs[steps]

    monkeypatch.setattr(Config, "forwards_at", forwards_at)
    assert steps_of("nfe=21") == 7
    with pytest.raises(ConfigError, match=r"nfe=14 is too few for sampler=ddim: it takes 15 forwards at the least"):
        steps_of("nfe=14")


def test_steps_stay_as_they_are() -> None:
    config = tiny.configure("steps=20")
    assert config.nfe is None
    assert config.steps == 20
    assert "nfe_asked" not in config.labels()


LINE = ("model=gaussian", "metrics.features=pixels", "logger=csv")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nfe") / "outputs"
    assert tiny.run(folder, *LINE, "sampler=ddim,heun,pndm", "nfe=5,10", "-m", settings=tiny.SMALL) == 0
    return folder


@pytest.mark.slow
def test_rows_are_paired_by_what_was_asked_and_say_what_was_done(outputs: Path) -> None:
    (sweep,) = tiny.sweeps(outputs)
    rows = tiny.results(sweep)
    assert [(row["sampler"], row["nfe_asked"], row["steps"], row["nfe"]) for row in rows] == [
        *(("ddim", "5", "5", "5"), ("ddim", "10", "10", "10")),
        *(("heun", "5", "3", "5"), ("heun", "10", "5", "9")),
        *(("pndm", "5", "4", "5"), ("pndm", "10", "9", "10")),
    ]
    table = (sweep / "table.md").read_text()
    assert "|  | NFE = 5 | NFE = 10 |" in table
    assert "Forwards done where no number of steps costs what was asked: heun 9 at NFE = 10." in table
    html = (sweep / "report.html").read_text()
    assert "heun, NFE = 10" in html
    assert "at 5 and 10 forwards a sample (NFE)" in html
    assert "S = " not in table


@pytest.mark.slow
def test_solvers_are_paired_with_ddim_on_their_grid_and_on_its_best(tmp_path: Path) -> None:
    line = (*LINE, "sampler=ddim,ddim_trailing,heun", "nfe=5,9", "-m")
    assert tiny.run(tmp_path / "outputs", *line, settings=tiny.SMALL) == 0
    sweep = read_sweep(tiny.sweeps(tmp_path / "outputs")[0])
    fd = next(table for _, tables in sweep.shown for table in tables if table.value.name == "fd")
    (own,), (best,) = against_ddim(fd), against_best_ddim(fd)
    assert (own.second, own.first) == ("heun · trailing", "DDIM on trailing")
    assert (best.second, best.first) == ("heun · trailing", "DDIM's best")
    values = {(row["sampler"], int(row["nfe_asked"])): float(row["fd"]) for row in tiny.results(sweep.folder)}
    for nfe in (5, 9):
        heun, uniform, trailing = (values[name, nfe] for name in ("heun", "ddim", "ddim_trailing"))
        place = f"NFE = {nfe}"
        assert own.differences[place].value == pytest.approx(heun - trailing)
        assert best.differences[place].value == pytest.approx(heun - min(uniform, trailing))
        assert own.differences[place].se > 0
    # what is chosen after looking is not among what is tested
    told = {(finding.first, finding.second) for finding in sweep.findings.all}
    assert ("DDIM's best", "heun · trailing") not in told
    page = (sweep.folder / "report.html").read_text()
    assert "FD (digits pixels): solvers against DDIM" in page
    assert "so nothing is settled there" in page


@pytest.mark.slow
def test_solvers_are_paired_with_ddim_on_the_same_network_alone(tmp_path: Path) -> None:
    line = ("training.seed=0,1", "sampler=ddim_trailing,dpmpp_2m", "nfe=3", "-m", "metrics.features=pixels")
    assert tiny.run(tmp_path / "outputs", *line, "logger=csv") == 0
    sweep = read_sweep(tiny.sweeps(tmp_path / "outputs")[0])
    fd = next(table for _, tables in sweep.shown for table in tables if table.value.name == "fd")
    values = {(row["sampler"], row["training_seed"]): float(row["fd"]) for row in tiny.results(sweep.folder)}
    found = {comparison.second: comparison.differences["NFE = 3"].value for comparison in against_ddim(fd)}
    assert len(found) == 2
    for seed in ("0", "1"):
        expected = values["dpmpp_2m", seed] - values["ddim_trailing", seed]
        (value,) = (value for label, value in found.items() if f"training seed {seed}" in label)
        assert value == pytest.approx(expected)


@pytest.mark.slow
def test_null_takes_it_back(tmp_path: Path) -> None:
    line = ("+experiments=spacings", "model=gaussian", "metrics.features=pixels", "sampler.spacing=uniform", "nfe=null")
    assert tiny.run(tmp_path / "outputs", *line, "logger=csv", settings=tiny.SMALL) == 0
    assert [row["steps"] for row in tiny.results(tiny.sweeps(tmp_path / "outputs")[0])] == ["10", "20", "50", "100"]
    with pytest.raises(ConfigError, match="searches a list of as many timesteps as steps="):
        tiny.configure("task=search_timesteps", "nfe=10")


def test_it_is_the_cell_of_that_many_steps(outputs: Path) -> None:
    line = (*LINE, "sampler=heun", "steps=5", "logger=csv")
    assert tiny.run(outputs, *line, settings=tiny.SMALL) == 0
    asked, sweep = tiny.sweeps(outputs)
    assert [row["cached"] for row in tiny.results(sweep)] == ["True"]
    assert "nfe_asked" not in tiny.results(sweep)[0]
    plan = json.loads((asked / "plan.json").read_text())
    assert [cell["labels"]["nfe_asked"] for cell in plan["cells"]] == [5, 10] * 3


def test_charts_go_by_the_forwards_done(outputs: Path) -> None:
    from ddim_lab.report.charts import sweep_charts

    names = {chart.name: chart for chart in sweep_charts(read_sweep(tiny.sweeps(outputs)[0]))}
    assert "fd_against_forwards" in names
    assert "fd_against_steps" not in names
    points = names["fd_against_forwards"].spec["datasets"]["points"]
    assert [point["steps"] for point in points if point["series"] == "heun"] == [5, 9]


@pytest.mark.slow
def test_the_command_line_says_the_axis_of_a_study(tmp_path: Path) -> None:
    """A study that sweeps one of nfe and steps is asked for the other."""
    line = ("+experiments=solvers_digits", "model=gaussian", "sampler=ddim,heun", "task=generate", "logger=csv")
    assert tiny.run(tmp_path / "outputs", *line, "steps=2,3", settings=tiny.SMALL) == 0
    assert [row["steps"] for row in tiny.results(tiny.sweeps(tmp_path / "outputs")[0])] == ["2", "3"] * 2
    line = ("+experiments=step_counts", "model=gaussian", "metrics.features=pixels", "sampler=heun", "logger=csv")
    assert tiny.run(tmp_path / "others", *line, "nfe=5,6", "task=generate", settings=tiny.SMALL) == 0
    assert [row["nfe_asked"] for row in tiny.results(tiny.sweeps(tmp_path / "others")[0])] == ["5", "6"]
