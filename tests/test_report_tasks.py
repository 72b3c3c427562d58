"""What the report makes of the tasks' numbers: one table over the steps, charts, and the paper's numbers beside."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import Outputs, Page, shown

from ddim_lab.report import build
from ddim_lab.report.charts import sweep_charts
from ddim_lab.report.files import texts_of
from ddim_lab.report.numbers import small
from ddim_lab.report.read import read_sweep
from ddim_lab.report.tables import value_text

TABLE_2 = {
    "source": "Table 2",
    "metric": "Reconstruction MSE",
    "data": "cifar10",
    "num_samples": 360,
    "reference": "train",  # which a reconstruction is not compared with
    "rows": {"ddim": {"10": 0.014, "20": 0.0065, "50": 0.0023}},
    "samplers": {"ddim": {"eta": 0.0, "variance": "posterior", "clip": "none"}},
}


def numbers(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Turn a cell of the main job into one of a task that measured these numbers."""

    def change(result: dict[str, Any]) -> None:
        result["measurements"] = {"nfe": result["measurements"]["nfe"], **values}

    return change


def reconstructions(root: Path, data: str = "digits") -> Outputs:
    outputs = Outputs(root, reference=TABLE_2)
    for steps, mse in ((10, 0.0066), (20, 0.0025), (50, 0.0007)):
        values = {"reconstruction_mse": mse, "reconstruction_mse_se": mse / 10, "reconstruction_images": 360}
        outputs.add(
            steps=steps,
            data=data,
            overrides=[f"steps={steps}"],
            change=numbers(**values, reconstruction_mse_median=1e-4),
        )
    return outputs


def test_one_table_over_the_steps_with_the_papers_numbers(tmp_path: Path) -> None:
    sweep = reconstructions(tmp_path).done()
    page = Page(build(sweep))
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert markdown.count("## ") == 1
    assert "## Reconstruction MSE (digits)" in markdown
    assert "| η 0 | 0.00660 ± 0.00066 / 0.014 | 0.00250 ± 0.00025 / 0.0065 | 0.00070 ± 0.00007 / 0.0023 |" in markdown
    assert "360 images" in markdown
    assert "No difference is given: ours is of digits, theirs of cifar10." in markdown
    assert "Median over images instead of mean: 0.00010." in markdown
    assert r"0.00660 $\pm$ 0.00066 / 0.014" in (sweep / "table.tex").read_text(encoding="utf-8")
    assert "paper 0.014" in page.text
    assert "reconstruction_mse_against_steps" in page.charts
    with (sweep / "results.csv").open(newline="") as file:
        assert [float(row["reconstruction_mse"]) for row in csv.DictReader(file)] == [0.0066, 0.0025, 0.0007]


def test_a_difference_is_given_on_the_papers_own_data(tmp_path: Path) -> None:
    found = read_sweep(reconstructions(tmp_path, data="cifar10").done())
    text = value_text(found.plan.published, shown(found, "reconstruction_mse")[0])
    entry = text.rows[0][1][0]
    assert entry is not None
    assert entry.difference == pytest.approx(0.0066 - 0.014)
    assert "ours − paper" in text.notes[0]


def test_a_reference_of_another_measure_stays_away(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, reference=TABLE_2)
    outputs.add(steps=10, overrides=["steps=10"], change=numbers(consistency_mse=0.001, feature_distance=2.0))
    sweep = outputs.done()
    build(sweep)
    assert "0.014" not in (sweep / "table.md").read_text(encoding="utf-8")


def test_zero_is_zero_and_stays_off_the_log_axis(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for steps, mse in ((10, 0.0016), (20, 0.0004), (1000, 0.0)):
        outputs.add(steps=steps, change=numbers(consistency_mse=mse, consistency_mse_se=mse / 8, unrelated_mse=0.14))
    found = read_sweep(outputs.done())
    (text,) = texts_of(found)
    assert text.field == "consistency_mse"
    assert [entry.text for entry in text.rows[0][1] if entry] == ["0.00160 ± 0.00020", "0.00040 ± 0.00005", "0"]
    assert "Two of them from different x_T: 0.14000." in text.notes
    (chart,) = [chart for chart in sweep_charts(found) if chart.name.startswith("consistency_mse")]
    (records,) = chart.spec["datasets"].values()
    assert [record["steps"] for record in records] == [10, 20]
    assert "exactly 0" in chart.caption


def test_a_hole_says_why_once(tmp_path: Path) -> None:
    outputs = reconstructions(tmp_path)
    outputs.add(steps=100, status="failed", error="out of memory", overrides=["steps=100"])
    outputs.add(steps=200, overrides=["steps=200"], change=numbers())
    sweep = outputs.done()
    build(sweep)
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert markdown.count("out of memory") == 1
    assert "η 0, S = 200: not measured" in markdown


def test_variance_over_eta_needs_three_etas_and_something_to_show(tmp_path: Path) -> None:
    def names(root: Path, etas: tuple[float, ...]) -> list[str]:
        outputs = Outputs(root)
        for eta in etas:
            outputs.add(eta, 10)
        found = read_sweep(outputs.done())
        charts = [chart.name for chart in sweep_charts(found) if chart.name.startswith("noise")]
        return charts + [text.field for text in texts_of(found) if text.field.startswith("noise")]

    assert names(tmp_path / "a", (0.0, 0.5, 1.0)) == ["noise_variance_against_eta", "noise_variance"]
    assert names(tmp_path / "b", (0.0, 1.0)) == ["noise_variance"]
    assert names(tmp_path / "c", (0.0,)) == []


def test_the_variance_across_noise_seeds_has_its_error_everywhere(tmp_path: Path) -> None:
    def with_error(result: dict[str, Any]) -> None:
        determinism = result["measurements"]["determinism"]
        determinism["noise_variance_se"] = determinism["noise_variance"] / 10

    outputs = Outputs(tmp_path)
    for eta in (0.0, 0.5, 1.0):
        outputs.add(eta, 10, change=with_error)
    sweep = outputs.done()
    page = Page(build(sweep))
    with (sweep / "results.csv").open(newline="") as file:
        found = [row["noise_variance_se"] for row in csv.DictReader(file)]
    assert found == ["0.0", repr(0.0065 / 10), repr(0.013 / 10)]
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert "| η 0 | 0 |" in markdown  # nothing was drawn: no error
    assert "| η 1 | 0.0130 ± 0.0013 |" in markdown
    assert "± is one standard error over images." in markdown
    assert "0.013 ± 0.0013" in page.text
    chart = page.charts["noise_variance_against_eta"]
    (records,) = chart["datasets"].values()
    ends = [end for record in records for end in (record["low"], record["high"])]
    assert ends == pytest.approx([0.0, 0.0, 0.00585, 0.00715, 0.0117, 0.0143])


def test_quality_over_forwards_where_they_differ_from_the_steps(tmp_path: Path) -> None:
    def fewer(result: dict[str, Any]) -> None:
        result["measurements"]["nfe"] -= 1

    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10)
    outputs.add(0.0, 20)
    assert not [c for c in sweep_charts(read_sweep(outputs.done())) if c.name == "fd_against_forwards"]
    outputs.add(0.5, 50, change=fewer)
    (chart,) = [c for c in sweep_charts(read_sweep(outputs.done())) if c.name == "fd_against_forwards"]
    assert "network forwards" in chart.title


def test_tables_and_pictures_of_one_title_stand_together(tmp_path: Path) -> None:
    def extend(result: dict[str, Any]) -> None:
        result["tables"] = [{"title": "Ways", "columns": ["way", "length"], "rows": [["slerp", 1.5], ["lerp", 1.25]]}]
        result["pictures"] = [{"title": "Lines", "file": "lines.png", "caption": ""}]

    outputs = Outputs(tmp_path)
    for steps in (10, 20):
        outputs.add(0.0, steps, change=extend)
    page = build(outputs.done()).read_text(encoding="utf-8")
    assert page.count("<h3>Ways</h3>") == 1
    assert page.count("<h3>Lines</h3>") == 1
    assert page.count("the picture is missing or damaged") == 2


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [(0.0, 3, "0"), (0.0123, 3, "0.012"), (8.7e-15, 4, "8.7e−15"), (-0.00001, 3, "−1.0e−5"), (2.0, 2, "2.00")],
)
def test_small_numbers(value: float, places: int, text: str) -> None:
    assert small(value, places) == text
