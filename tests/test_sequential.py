"""num_samples=auto: boundaries against published ones, false findings by simulation, sweeps that end as they say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_findings import cell, tables
from wandb_offline import read_run

from ddim_lab.metrics.estimates import GROUPS, jackknife_se
from ddim_lab.metrics.sequential import boundaries, nominal_p, sequential_p, spent
from ddim_lab.metrics.significance import holm, two_sided_p
from ddim_lab.report import build, read_sweep
from ddim_lab.report.findings import ALPHA, findings
from ddim_lab.report.tables import ValueTable
from ddim_lab.store import read_record
from ddim_lab.store.__main__ import main as housekeeping
from ddim_lab.store.records import Plan, Pointer, Published, StopRule, Value
from ddim_lab.tasks import sampling
from ddim_lab.tasks.generate import Generate

FIVE = (0.2, 0.4, 0.6, 0.8, 1.0)

# -- the boundaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published",
    [
        (1.9600,),
        (2.9626, 1.9686),
        (3.7103, 2.5114, 1.9930),
        (4.3326, 2.9631, 2.3590, 2.0141),
        (4.8769, 3.3569, 2.6803, 2.2898, 2.0310),
    ],
    ids=len,
)
def test_boundaries_are_the_published_ones(published: Sequence[float]) -> None:
    """Of 1 to 5 equal looks at 5 %, two-sided, as tables for Lan and DeMets's O'Brien-Fleming type have them."""
    looks = [(k + 1) / len(published) for k in range(len(published))]
    assert boundaries(looks, 0.05) == pytest.approx(published, abs=2e-4)


def test_paths_reach_the_boundaries_as_often_as_is_spent() -> None:
    rng = np.random.default_rng(1)
    looks = np.array([0.15, 0.3, 0.7, 1.0])
    steps = rng.normal(size=(200_000, 4)) * np.sqrt(np.diff(looks, prepend=0.0))
    z = np.abs(np.cumsum(steps, axis=1)) / np.sqrt(looks)
    for alpha in (0.5, 0.05):
        first = np.maximum.accumulate(z >= boundaries(looks.tolist(), alpha), axis=1).mean(axis=0)
        expected = [spent(t, alpha) for t in looks]
        assert expected[-1] == pytest.approx(alpha)
        assert first == pytest.approx(expected, abs=4 * np.sqrt(alpha / 200_000))


def test_p_of_a_look_is_the_level_whose_boundary_it_reaches() -> None:
    for alpha, count in itertools.product((0.3, 0.05, 1e-3, 1e-9), (1, 3, 5)):
        looks = FIVE[:count]
        reached = two_sided_p(boundaries(looks, alpha)[-1], 1e12)
        assert sequential_p(looks, reached) == pytest.approx(alpha, rel=2e-3)
        assert nominal_p(looks, alpha) == pytest.approx(reached, rel=2e-3)
    for p in (1e-3, 0.2):
        assert sequential_p(FIVE[:2], p) > sequential_p(FIVE, p) > p
    assert sequential_p([1.0], 0.0321) == pytest.approx(0.0321)
    assert sequential_p(FIVE, 0.0) < 1e-14
    assert sequential_p(FIVE[:2], 1.0) == 1.0


# -- by simulation ----------------------------------------------------------------------------------------


def measured(samples: np.ndarray) -> Value:
    """A mean with the jackknife over as many groups as metrics take."""
    groups = samples.reshape(-1, GROUPS).mean(axis=0)
    left_out = ((groups.sum() - groups) / (GROUPS - 1)).tolist()
    given: dict[str, Any] = {"name": "roughness", "heading": "Roughness", "better": "lower", "count": len(samples)}
    return Value(**given, value=float(samples.mean()), se=jackknife_se(left_out), replicates=left_out)


def at_looks(cells: np.ndarray, rule: StopRule) -> list[list[ValueTable]]:
    """Tables of three eta at three S at each look; samples by cell."""
    places = list(itertools.product((0.0, 0.5, 1.0), (10, 20, 50)))
    return [
        tables([cell(n, measured(cells[n, :count]), eta=eta, steps=steps) for n, (eta, steps) in enumerate(places)])
        for count in rule.counts
    ]


RULE = StopRule(counts=(200, 400, 600, 800, 1000), reached=1000, ended="samples")


@pytest.mark.slow
def test_false_findings_are_rare_whenever_one_stops() -> None:
    """Of 500 sweeps of nine equal samplers at most 34 have settled anything at any of five looks.

    34 is the 97th percentile of what 5 % give. Without the correction for looking there are more.
    """
    rng = np.random.default_rng(2026)
    false, uncorrected = 0, 0
    for _ in range(500):
        looks = at_looks(rng.normal(size=1000) + rng.normal(size=(9, 1000)), RULE)
        at = [
            findings(look, None, RULE.model_copy(update={"reached": count}), looks[:k])
            for k, (count, look) in enumerate(zip(RULE.counts, looks, strict=True))
        ]
        assert {len(found.tested) for found in at} == {12}
        false += any(found.settled for found in at)
        uncorrected += any(findings(look, None).settled for look in looks)
    assert 5 <= false <= 34
    assert uncorrected > 34


def settled_of(comparisons: int, errors: float, repeats: int) -> tuple[float, float]:
    """How often one difference of so many errors at the largest N is settled, and at a look before the last.

    The others of its family are none.
    """
    rng = np.random.default_rng(comparisons)
    t = np.array(FIVE)
    steps = rng.normal(size=(repeats, comparisons, 5)) * np.sqrt(np.diff(t, prepend=0.0))
    spread = np.sqrt(rng.chisquare(GROUPS - 1, size=steps.shape) / (GROUPS - 1))
    drift = np.where(np.arange(comparisons) == 0, errors, 0.0)[:, None]
    statistic = (np.cumsum(steps, axis=2) + drift * t) / np.sqrt(t) / spread
    found, early = 0, 0
    for one in statistic:
        p = [[two_sided_p(z, GROUPS - 1) for z in of] for of in one]
        at = [holm([sequential_p(FIVE[:k], of[k - 1]) for of in p])[0] <= ALPHA for k in (4, 5)]
        early, found = early + at[0], found + at[1]
    return found / repeats, early / repeats


def test_four_errors_are_found() -> None:
    found, early = settled_of(comparisons=12, errors=4.0, repeats=500)
    assert found >= 0.8
    assert early >= 0.5, "nothing is won by looking"


def test_published_numbers_of_another_look_are_counted_ahead() -> None:
    rng = np.random.default_rng(4)
    looks = at_looks(rng.normal(size=1000) + rng.normal(size=(9, 1000)), RULE)
    row = {"source": "a book", "metric": "Roughness", "rows": {"ddim": {"10": 0.5, "20": 0.01}}}
    sampler = {"ddim": {"eta": 0.0, "variance": "posterior", "clip": "none"}}
    theirs = Published.model_validate({**row, "samplers": sampler, "num_samples": 1000})

    assert len(findings(looks[4], theirs, RULE, looks[:4]).tested) == 14
    found = findings(looks[3], theirs, RULE.model_copy(update={"reached": 800, "ended": None}), looks[:3])
    assert len(found.tested) == 12
    assert "counts 2 more that other N compare" in found.summary
    # the smallest p is multiplied by all 14
    smallest = min(found.tested, key=lambda f: f.p or 0.0)
    assert smallest.corrected == pytest.approx(min(1.0, 14 * (smallest.p or 0.0)))
    # what earlier looks alone compared stays in the family
    gone = findings([of for of in looks[4] if of is None], None, RULE, looks[:4])
    assert not gone.tested
    assert gone.rule.endswith("The correction counts 12 more that other N compare.")


# -- whole sweeps -----------------------------------------------------------------------------------------

EXACT = ("model=gaussian", "metrics.features=pixels", "metrics.kid=false", "metrics.precision_recall=false")
LINE = (*EXACT, "batch_size=16", "checkpoint_seconds=1e-9", "stop.samples=150", "stop.looks=3", "num_samples=auto")


def swept(outputs: Path, *arguments: str, status: int = 0, logger: str = "csv") -> tuple[Path, Plan]:
    assert tiny.run(outputs, *LINE, f"logger={logger}", *arguments, "-m", settings=()) == status
    sweep = tiny.sweeps(outputs)[-1]
    return sweep, Plan.read(read_record(sweep / "plan.json"))


def reached(plan: Plan) -> tuple[int | None, str | None]:
    assert plan.stop is not None
    return plan.stop.reached, plan.stop.ended


def files_of(sweep: Path) -> dict[str, bytes]:
    return {name: (sweep / name).read_bytes() for name in ("table.md", "table.tex", "results.csv", "report.html")}


@pytest.mark.slow
def test_a_sweep_ends_where_all_is_settled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells are those of that N; earlier ones stay as long as the sweep; the report is of files alone."""
    sweep, plan = swept(tmp_path, "steps=5", "sampler.eta=0,1", "stop.samples=450")
    assert reached(plan) == (300, "enough")
    shown = capsys.readouterr()
    assert re.search(r"^ddim_lab: 2 cells, at most [\d,]+ image-forwards for samples", shown.err, re.MULTILINE)
    assert re.findall(r"^ddim_lab: (look .*)$", shown.err, re.MULTILINE)[-1] == (
        "look 2 of 3, N = 300: 6 of 6 comparisons settled"
    )
    told = "N was not fixed: comparisons were looked at with N = 150 and 300 of at most 450; there every comparison"
    assert told in shown.out
    assert "alpha spending, O'Brien-Fleming type" in (sweep / "table.md").read_text(encoding="utf-8")
    rows = tiny.results(sweep)
    assert [row["num_samples"] for row in rows] == ["300", "300"]
    written = files_of(sweep)
    build(sweep)
    assert files_of(sweep) == written

    pointers = [Pointer.read(read_record(sweep / "jobs" / str(n) / "pointer.json")) for n in (0, 1)]
    for pointer in pointers:
        assert [(look.num_samples, ("cells", look.cell) in pointer.objects) for look in pointer.earlier] == [
            (150, True)
        ]
    assert housekeeping(["prune", "--yes", "--outputs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 in all")
    fixed = (*EXACT, "batch_size=16", "logger=csv", "steps=5", "sampler.eta=0,1", "num_samples=300", "-m")
    assert tiny.run(tmp_path, *fixed, settings=()) == 0
    again = tiny.results(tiny.sweeps(tmp_path)[-1])
    assert [(row["cell"], row["cached"]) for row in again] == [(row["cell"], "True") for row in rows]
    ours, theirs = (read_sweep(folder).findings for folder in tiny.sweeps(tmp_path))
    assert [f.difference for f in ours.all] == [f.difference for f in theirs.all]
    assert all((a.p or 0.0) >= (b.p or 0.0) for a, b in zip(ours.all, theirs.all, strict=True))


@pytest.mark.parametrize(
    ("given", "end", "told"),
    [
        ((), (150, "samples"), "50, 100 and 150 of at most 150; the largest that was allowed."),
        (("stop.hours=1e-9",), (50, "hours"), "the clock ended it (stop.hours=1e-09), which is not reproducible"),
        (("stop.se=1e6",), (50, "enough"), "is settled, or has an error below 1e+06"),
    ],
    ids=["largest", "hours", "se"],
)
def test_what_else_ends_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Sequence[str], end: tuple[int, str], told: str
) -> None:
    """Of two samplers that are all but equal."""
    _, plan = swept(tmp_path, "steps=2", "sampler.eta=0,0.001", *given)
    assert reached(plan) == end
    shown = capsys.readouterr()
    assert told in shown.out
    assert len(re.findall(r"^ddim_lab: look \d", shown.err, re.MULTILINE)) == end[0] // 50
    assert (" more need no more samples" in shown.err) == (given == ("stop.se=1e6",))


@pytest.mark.slow
def test_an_interrupted_sweep_shows_its_last_whole_look_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("steps=2", "sampler.eta=0,0.001")
    original, made = sampling.Maker.add, []

    def cut(self: Any, indices: Any) -> None:
        if int(indices[-1]) >= 96 and len(made) > 20:
            raise KeyboardInterrupt
        made.append(indices)
        original(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(sampling.Maker, "add", cut)
        sweep, plan = swept(tmp_path, *line, status=130)
    assert reached(plan) == (100, None)
    assert "looked at with N = 50 and 100 of at most 150; there it was cut short" in capsys.readouterr().out
    assert [(row["num_samples"], row["status"]) for row in tiny.results(sweep)] == [("100", "done")] * 2
    last, plan = swept(tmp_path, *line)
    assert reached(plan) == (150, "samples")
    assert [row["cached"] for row in tiny.results(last)] == ["True", "False"]
    assert read_sweep(last).earlier[1].cells[0].key == tiny.results(sweep)[0]["cell"]


def test_the_others_go_on_without_a_cell_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Generate.measure

    def broken(self: Any, job: Any, folder: Path, work: Path) -> Any:
        if job.config.num_samples == 100 and job.config.sampler.eta == 1.0:
            raise RuntimeError("no room")
        return original(self, job, folder, work)

    monkeypatch.setattr(Generate, "measure", broken)
    sweep, plan = swept(tmp_path, "steps=2", "sampler.eta=0,0.001,1", "stop.samples=100", "stop.looks=2", status=1)
    assert reached(plan) == (100, "samples")
    found = read_sweep(sweep)
    assert [cell.status for cell in found.cells] == ["done", "done", "failed"]
    assert [cell.status for cell in found.earlier[0].cells] == ["done"] * 3
    assert found.cells[2].error == "no room"
    assert "more that other N compare" in found.findings.rule
    assert all(2 not in side for f in found.findings.all for side in f.difference.of)


@pytest.mark.slow
def test_a_growing_sweep_leaves_one_run_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    sweep, _ = swept(tmp_path, "steps=2", "sampler.eta=0,0.001", "stop.samples=100", "stop.looks=2", logger="wandb")
    runs = [read_run(folder) for folder in sorted((sweep / "wandb").glob("offline-run-*"))]
    assert sorted(run.job_type for run in runs) == ["cell", "cell", "report"]
    assert {run.config["num_samples"] for run in runs if run.job_type == "cell"} == {100}


REFUSED = {
    "num_samples=auto": "one cell has none: sweep an option with -m",
    "num_samples=auto steps=2,3 task=trajectory -m": "task=trajectory does not, so give a number",
    "num_samples=auto,100 steps=2,3 -m": "must be the same in all cells of a sweep",
    "num_samples=auto stop.looks=2,3 -m": "must be the same in all cells of a sweep",
    "num_samples=auto stop.samples=5 steps=2,3 -m": "stop.samples=5 is too few for stop.looks=5",
    "num_samples=auto stop.looks=21 steps=2,3 -m": "stop.looks=21: must be at most 20",
    "num_samples=auto stop.se=0 steps=2,3 -m": "stop.se=0: must be above 0",
    "num_samples=100 stop.samples=400": "stop.samples=400 is for num_samples=auto, and num_samples=100 is given",
    "num_samples=1": "num_samples=1: must be at least 2, or auto",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_grow_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert tiny.run(tmp_path / "outputs", *line.split(), settings=("logger=csv",)) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert REFUSED[line] in told
    assert not (tmp_path / "outputs").exists()
