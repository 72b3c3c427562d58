"""Findings: against theory, by simulation, and in words that never name a winner below the line."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from test_report import Outputs, Page, nine, shown

from ddim_lab.metrics.estimates import jackknife_se, variance_components
from ddim_lab.metrics.significance import (
    critical_t,
    first_threshold,
    holm,
    samples_to_settle,
    two_sided_p,
    welch,
)
from ddim_lab.report import build, console_text, read_sweep
from ddim_lab.report.cells import Cell
from ddim_lab.report.findings import ALPHA, COLUMNS, Findings, findings
from ddim_lab.report.grids import difference_grids
from ddim_lab.report.seeds import over_seeds
from ddim_lab.report.series import name_series, paper_tables
from ddim_lab.report.tables import ValueTable, value_tables
from ddim_lab.store.records import PlanCell, Published, Result, Value

GROUPS = 20

# -- the statistics ---------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    """0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not be below what came before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("freedom", [1.0, 2.7, 19.0, 57.3, 1e6])
def test_t_is_scipys(freedom: float) -> None:
    for t in (0.0, 0.3, -2.1, 9.0):
        assert two_sided_p(t, freedom) == pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom), rel=1e-9)
    for p in (0.5, 0.05, 0.05 / 60):
        assert critical_t(p, freedom) == pytest.approx(scipy.stats.t.isf(p / 2, freedom), rel=1e-9)


def test_welch_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=7), 3 * rng.normal(size=20)
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1.0) for x in (a, b)]
    assert welch(parts) == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).df)
    assert welch([(2.0, 19.0)] * 3) == pytest.approx(57.0)
    assert welch([(2.0, 19.0), (0.0, 1.0)]) == pytest.approx(19.0)
    assert welch([(0.0, 19.0), (0.0, 5.0)]) == 5.0


def test_the_first_threshold_is_where_one_more_is_settled() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        p = list(rng.uniform(size=8) ** 4)
        threshold = first_threshold(holm(p), ALPHA)
        for i, corrected in enumerate(holm(p)):
            if corrected > ALPHA:
                assert threshold is not None
                for factor, settled in ((0.999, True), (1.001, False)):
                    assert (holm([*p[:i], factor * threshold, *p[i + 1 :]])[i] <= ALPHA) == settled
    assert first_threshold([0.01, 0.05], ALPHA) is None


def test_samples_that_would_settle_by_the_formula() -> None:
    assert samples_to_settle(0.07, 0.04, 1437, 2.5) == 3000  # 1437 (2.5 · 0.04 / 0.07)² = 2932.7
    assert samples_to_settle(-0.07, 0.04, 1437, 2.5) == 3000
    assert samples_to_settle(1.0, 0.01, 10, 2.0) == 1  # 0.004
    assert samples_to_settle(0.0, 0.04, 1437, 2.5) is None
    # half of the variance stays: N' = N c² v / (d² − c² v)
    assert samples_to_settle(1.0, math.sqrt(0.2), 100, 2.0, math.sqrt(0.1)) == 67
    assert samples_to_settle(1.0, math.sqrt(0.6), 100, 2.0, math.sqrt(0.3)) is None, "the fixed part alone hides it"


# -- tables that nobody measured --------------------------------------------------------------------------


def measured(samples: np.ndarray, **more: Any) -> Value:
    """The mean of samples as a value, with the jackknife's replicates over 20 groups."""
    groups = samples.reshape(-1, GROUPS).mean(axis=0)
    left_out = ((groups.sum() - groups) / (GROUPS - 1)).tolist()
    given: dict[str, Any] = {
        "name": "roughness",
        "value": float(samples.mean()),
        "heading": "Roughness",
        "se": jackknife_se(left_out),
        "replicates": left_out,
        "count": len(samples),
        "better": "lower",
        "comparable": {"num_samples": len(samples)},
    }
    return Value(**(given | more))


def cell(number: int, *values: Value, eta: float = 0.0, steps: int = 10, **labels: Any) -> Cell:
    own = {"sampler": "ddim", "eta": eta, "steps": steps, "data": "digits", "seed": 0, "spacing": "uniform"}
    own |= {"variance": "posterior", "clip": "none"}
    plan = PlanCell(number=number, overrides=(str(number),), labels=own | labels)
    return Cell(plan, "done", None, None, Result(key=f"k{number}", values=values), None)


def tables(cells: Sequence[Cell]) -> list[ValueTable]:
    return [values for table in paper_tables(cells, name_series(cells)) for values in value_tables(table)]


def found_in(cells: Sequence[Cell], reference: Published | None = None) -> Findings:
    return findings(tables(cells), reference)


def test_false_findings_are_rare_over_whole_sweeps() -> None:
    """Of 500 sweeps of equal Gaussians at most 34 settle anything: 25 are expected, and 34 is the 97th percentile."""
    rng = np.random.default_rng(2026)
    false, tested = 0, 0
    for _ in range(500):
        common = rng.normal(size=100)
        cells = [
            cell(number, measured(common + rng.normal(size=100)), eta=eta, steps=steps)
            for number, (eta, steps) in enumerate(itertools.product((0.0, 0.5, 1.0), (10, 20, 50)))
        ]
        found = found_in(cells)
        tested += len(found.tested)
        false += bool(found.settled)
    assert tested == 500 * 12, "two pairs of rows at three S, two pairs of columns in three rows"
    assert false <= 34
    assert false >= 5, "correction or t is far too strict"


def test_a_true_difference_is_found() -> None:
    rng = np.random.default_rng(3)
    common = rng.normal(size=400)
    cells = [cell(n, measured(common + 0.1 * rng.normal(size=400) + shift), eta=n) for n, shift in enumerate((0, 0.2))]
    (finding,) = found_in(cells).all
    assert finding.settled
    assert finding.sentence == "Roughness: η 1 is worse than η 0 at S = 10, by 0.1989 ± 0.0070"
    assert finding.p == pytest.approx(
        2 * scipy.stats.t.sf(finding.difference.value / finding.difference.se, GROUPS - 1), rel=1e-9
    )


def test_so_many_samples_settle_it() -> None:
    """With the error that N' samples have, the difference is settled; with a tenth fewer it is not."""
    rng = np.random.default_rng(4)
    common = rng.normal(size=400)
    shifts = (0.0, 0.9, 0.87, 2.0)
    cells = [
        cell(n, measured(common + 0.3 * rng.normal(size=400) + shift), eta=n / 4) for n, shift in enumerate(shifts)
    ]
    (open_,) = (finding for finding in found_in(cells).all if not finding.settled)
    assert open_.samples is not None
    assert open_.samples > 400
    for factor, settled in ((1.0, True), (0.9, False)):
        se = open_.difference.se * math.sqrt(400 / (factor * open_.samples))
        p = two_sided_p(open_.difference.value / se, open_.difference.freedom)
        others = [finding.p for finding in found_in(cells).all if finding is not open_ and finding.settled]
        assert (holm([p, *(q for q in others if q is not None)])[0] <= ALPHA) == settled


REFERENCE = Published.model_validate(
    {
        "source": "a book",
        "metric": "Roughness",
        "rows": {"ddim": {"10": 0.5, "20": 0.01}},
        "samplers": {"ddim": {"eta": 0.0, "variance": "posterior", "clip": "none"}},
    }
)


def all_kinds(better: str | None = "lower") -> list[Cell]:
    """Two rows of DDIM and a solver, two S, a published row, held-out images, and a duplicate of one row."""
    rng = np.random.default_rng(5)
    common, held_out = rng.normal(size=200), rng.normal(size=200)
    level = measured(held_out, name="smooth", heading="", label="held-out images", comparable={}, replicates=None)
    rows = [
        ("ddim", 0.0, None, 0.0),
        ("ddim_eta1", 1.0, None, 0.01),
        ("euler", 0.0, "euler", -1.0),
        ("twin", 1.0, None, 0.01),
    ]
    cells = []
    for steps in (10, 20):
        noise = {shift: 0.2 * rng.normal(size=200) for _, _, _, shift in rows}
        for sampler, eta, formula, shift in rows:
            value = measured(common + noise[shift] + shift, level="smooth", better=better)
            labels = {"sampler": sampler, "formula": formula}
            cells.append(cell(len(cells), value, level, eta=eta, steps=steps, **labels))
    return cells


def test_every_kind_is_compared_once_and_in_one_family() -> None:
    found = found_in(all_kinds(), REFERENCE)
    kinds = [finding.kind for finding in found.all]
    # ddim - euler stand below each other as well, and are one comparison
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "solvers": 2,
        "rows": 4,
        "published": 2,
        "level": 8,
        "steps": 4,
    }
    same = [finding for finding in found.all if finding.p is None]
    assert [finding.pair for finding in same] == ["η 1 · ddim_eta1 and η 1 · twin"] * 2
    assert len(found.tested) == 18
    corrected = holm([finding.p for finding in found.tested if finding.p is not None])
    assert [finding.corrected for finding in found.tested] == corrected
    # against what is not of the same samples: its own error, in squares with the held-out images'
    values = {(table.value.name, n): v for table in tables(all_kinds()) for n, v in table.values.items()}
    own = values["roughness", 0]
    published = next(finding for finding in found.all if finding.kind == "published")
    assert (published.difference.value, published.difference.se) == (pytest.approx((own.number or 0) - 0.5), own.se)
    assert published.difference.freedom == GROUPS - 1
    level = next(finding for finding in found.all if finding.kind == "level")
    smooth = all_kinds()[0].values["smooth"]
    assert level.difference.se == pytest.approx(math.hypot(own.se or 0, smooth.se or 0))
    assert level.difference.freedom == pytest.approx(welch([((own.se or 0) ** 2, 19), ((smooth.se or 0) ** 2, 99)]))


@pytest.mark.parametrize("better", ["lower", "higher", None])
def test_no_winner_is_named_where_nothing_is_settled(better: str | None) -> None:
    found = found_in(all_kinds(better), REFERENCE)
    winner = re.compile(r"\b(better|worse|larger|smaller|than)\b")
    settled = [finding for finding in found.all if finding.settled]
    left = [finding for finding in found.all if not finding.settled]
    assert len(settled) > 5
    assert len(left) > 5
    assert all(winner.search(finding.sentence) for finding in settled)
    assert not [finding.sentence for finding in left if winner.search(finding.sentence)]
    for part in found.parts:
        assert all(bool(winner.search(line)) == (part.title == "Roughness: settled") for line in part.lines)
    euler = next(finding for finding in settled if finding.kind == "solvers")
    word = {"lower": "better", "higher": "worse", None: "smaller"}[better]
    assert euler.sentence.startswith(f"Roughness: euler is {word} than DDIM on uniform at S = 10, by 0.99")
    told = next(finding for finding in left if finding.p is not None and finding.samples is not None)
    assert re.search(
        r": not settled: .* \(difference [\d.]+ ± [\d.]+\); about [\d,]+ samples would settle", told.sentence
    )


def test_all_places_of_a_pair_are_one_line() -> None:
    found = found_in(all_kinds(), REFERENCE)
    titles = [part.title for part in found.parts]
    assert titles[0] == "Roughness: settled"
    assert titles[1].startswith("Roughness: not settled (difference; samples")
    assert titles[2] == "Roughness: the same, to every digit"
    (first, *_) = found.parts[0].lines
    assert re.fullmatch(
        r"euler is better than DDIM on uniform at S = 10 \(by [\d.]+ ± [\d.]+\) and S = 20 \(by [\d.]+ ± [\d.]+\)",
        first,
    )
    assert found.parts[2].lines == ("η 1 · ddim_eta1 and η 1 · twin at S = 10 and S = 20",)
    assert found.summary.startswith(
        f"{len(found.settled)} of 18 comparisons are settled at 95 %, after Holm's correction"
    )


@pytest.mark.parametrize("most", [4, 6, 8, 100])
def test_a_console_has_so_many_lines_and_the_rest_is_counted(most: int) -> None:
    found = found_in(all_kinds(), REFERENCE)
    lines = found.lines(most, 60)
    assert len(lines) <= most
    assert all(len(line) <= 62 for line in lines if line.startswith("  "))
    told = sum(line.startswith("  ") for line in lines)
    in_all = sum(len(part.lines) for part in found.parts)
    counted = re.fullmatch(r"… and (\d+) more lines? in the report", lines[-1])
    assert told + (int(counted[1]) if counted else 0) == in_all
    assert bool(counted) == (most < 100)
    assert all(told.startswith("  ") for title, told in itertools.pairwise(lines[1:]) if title.startswith("Roughness"))


def test_what_has_no_replicates_or_no_error_is_not_compared() -> None:
    rng = np.random.default_rng(6)
    one, two = (measured(rng.normal(size=100)) for _ in range(2))
    assert len(found_in([cell(0, one), cell(1, two, eta=1.0)]).tested) == 1
    for change in ({"replicates": None}, {"value": math.nan}, {"replicates": one.replicates and one.replicates[1:]}):
        assert not found_in([cell(0, one), cell(1, two.model_copy(update=change), eta=1.0)])
    constant = two.model_copy(update={"value": (one.number or 0) + 1.0, "replicates": one.replicates})
    assert not found_in([cell(0, one), cell(1, constant, eta=1.0)]), "an error of 0 is none"
    alone = found_in([cell(0, one)])
    assert not alone
    assert alone.lines(15, 100) == []


# -- seeds ------------------------------------------------------------------------------------------------


def seeds_of(shape: tuple[int, int], networks: bool, spread: float = 0.1) -> list[Cell]:
    """η 0 and 1, a network or two, some sampling seeds; x_T is shared where the seed is."""
    rng = np.random.default_rng(7)
    noises = [rng.normal(size=100) for _ in range(shape[1])]
    cells = []
    for eta, network, seed in itertools.product((0.0, 1.0), range(shape[0]), range(shape[1])):
        value = measured(noises[seed] + spread * rng.normal(size=100) + 0.1 * eta + network)
        made = cell(len(cells), value, eta=eta, seed=seed, training_seed=network)
        recipe = {"model": {"digest": f"n{network}", "training_seed": network if networks else None}}
        assert made.result is not None
        cells.append(replace(made, result=made.result.model_copy(update={"recipe": recipe})))
    return cells


def test_rows_are_compared_at_equal_seeds_and_averaged_over_sampling_seeds() -> None:
    cells = seeds_of((2, 3), networks=True)
    rows = [finding for finding in found_in(cells).all if finding.kind == "rows"]
    assert [finding.pair for finding in rows] == [
        f"η 0 · training seed {network} and η 1 · training seed {network}" for network in (0, 1)
    ]
    values = {(c.labels["eta"], c.labels["training_seed"], c.labels["seed"]): c.values["roughness"] for c in cells}
    pairs = [(values[0.0, 1, seed], values[1.0, 1, seed]) for seed in range(3)]
    errors = [
        jackknife_se([y - x for x, y in zip(a.replicates or (), b.replicates or (), strict=True)]) for a, b in pairs
    ]
    difference = rows[1].difference
    assert difference.value == pytest.approx(np.mean([(b.number or 0) - (a.number or 0) for a, b in pairs]))
    assert difference.se == pytest.approx(math.hypot(*errors) / 3)
    assert difference.freedom == pytest.approx(welch([(se**2, 19) for se in errors]))
    assert difference.samples == 300
    assert "Differences are means over 3 sampling seeds" in found_in(cells).summary


def test_sampling_seeds_have_mean_spread_and_the_minimum_by_its_name() -> None:
    (table,) = tables(seeds_of((1, 3), networks=False))
    found = over_seeds(table)
    assert found is not None
    assert found.heading == "Roughness over 3 sampling seeds"
    assert [label for label, _ in found.rows] == ["η 0", "η 1"]
    values = [table.values[n].number or 0.0 for n in range(3)]
    (entry,) = found.rows[0][1]
    assert entry is not None
    assert entry.text == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}".replace("-", "−")
    assert entry.aside == f"minimum of three {min(values):.2f}".replace("-", "−")
    assert "minimum of three is what Karras et al. (2022) print" in found.notes[1]


def test_seeds_and_networks_are_variances_of_a_two_way_layout() -> None:
    (table,) = tables(seeds_of((2, 3), networks=True))
    found = over_seeds(table)
    assert found is not None
    assert found.heading == "Roughness over 2 training seeds and 3 sampling seeds"
    values = [table.values[n].number or 0.0 for n in range(6)]
    parts = variance_components([values[:3], values[3:]])
    (entry,) = found.rows[0][1]
    assert entry is not None
    assert entry.value == parts.mean
    within = math.sqrt(parts.columns + parts.rest)
    assert entry.aside == (
        f"between networks {math.sqrt(parts.rows):.2f}; over seeds {within:.2f}; se of the mean {parts.se:.2f}"
    )
    # what is common to the networks is told from what is not: they differ by 1 from the same noise
    assert math.sqrt(parts.rows) == pytest.approx(1 / math.sqrt(2), abs=0.05)


def test_variance_components_are_found_again() -> None:
    """Over many layouts: 4, 1 and 0.25; and the mean's error is the spread of the means."""
    rng = np.random.default_rng(8)
    count, (rows, columns) = 4000, (3, 4)
    a, b = 2 * rng.normal(size=(count, rows, 1)), rng.normal(size=(count, 1, columns))
    layouts = a + b + 0.5 * rng.normal(size=(count, rows, columns))
    found = [variance_components(layout.tolist()) for layout in layouts]
    for name, expected in (("rows", 4.0), ("columns", 1.0), ("rest", 0.25)):
        assert np.mean([getattr(parts, name) for parts in found]) == pytest.approx(expected, rel=0.06)
    assert np.mean([parts.se**2 for parts in found]) == pytest.approx(np.var([parts.mean for parts in found]), rel=0.1)
    flat = variance_components([[1.0, 2.0], [2.0, 1.0]])
    assert (flat.rows, flat.columns) == (0.0, 0.0)
    with pytest.raises(ValueError, match="full layout"):
        variance_components([[1.0, 2.0], [1.0]])


# -- where they are told ----------------------------------------------------------------------------------


def test_findings_come_first_in_the_report_and_last_on_the_console(tmp_path: Path) -> None:
    sweep = read_sweep(nine(tmp_path).done())
    build(sweep.folder)
    markdown = (sweep.folder / "table.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE)[0] == "Findings"
    page = (sweep.folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page)[0] == "Findings"
    console = console_text(sweep)
    assert "## Findings" not in console
    last = console.rpartition("Findings: ")[2].splitlines()
    assert last[0] == sweep.findings.summary
    assert len(last) <= 15
    for part in sweep.findings.parts:
        assert all(line in Page(sweep.folder / "report.html").text for line in part.lines)
    assert [len(finding.row()) for finding in sweep.findings.all] == [len(COLUMNS)] * len(sweep.findings.all)


def test_bold_differences_are_those_that_are_settled(tmp_path: Path) -> None:
    sweep = read_sweep(nine(tmp_path).done())
    (table,) = shown(sweep)
    (grid,) = difference_grids(table, sweep.findings)
    bold = [box.tint == "clear" for row in grid.rows for box in row[1:]]
    settled = {(finding.first, finding.second, finding.place): finding.settled for finding in sweep.findings.all}
    places = [
        (first, second, place) for first, second in (("η 0", "η 0.5"), ("η 0.5", "η 1")) for place in grid.columns[1:]
    ]
    assert bold == [settled[place] for place in places]
    assert any(bold)


def test_holes_are_left_out_and_one_cell_finds_nothing(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "holes")
    for eta in (0.0, 0.5, 1.0):
        outputs.add(eta, 10, status="failed" if eta == 0.5 else "done", error="no" if eta == 0.5 else None)
        outputs.add(eta, 20, status="killed" if eta == 1.0 else "done")
    damaged = outputs.done()
    found = read_sweep(damaged).findings
    assert [(finding.kind, finding.pair) for finding in found.all if finding.kind != "level"] == [
        ("rows", "η 0 and η 0.5"),
        ("steps", "S = 10 and S = 20"),
    ]
    alone = Outputs(tmp_path / "alone")
    alone.add()
    sweep = read_sweep(alone.done())
    build(sweep.folder)
    assert "Findings" not in (sweep.folder / "table.md").read_text(encoding="utf-8") + console_text(sweep)
    assert 'id="findings"' not in (sweep.folder / "report.html").read_text(encoding="utf-8")
