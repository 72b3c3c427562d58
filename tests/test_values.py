"""What a report makes of Values: it knows none by name, so one that nobody has heard of is shown like the others."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_report import GROUPS, Outputs, Page, drawn_values, read_csv, shown

import ddim_lab.report
from ddim_lab.config.folders import config_folder
from ddim_lab.metrics.estimates import paired_se
from ddim_lab.report import build, curves, read_sweep, text_tables
from ddim_lab.report.charts import sweep_charts
from ddim_lab.report.rows import CONTRACT
from ddim_lab.score import _row
from ddim_lab.store.records import ROW, Plan, Pointer, Result, Value
from ddim_lab.store.schema1 import upgraded

REPORT = Path(ddim_lab.report.__file__).parent


def holding(*values: Value) -> Callable[[dict[str, Any]], None]:
    """Turn a cell of the main job into one that measured these values."""

    def change(result: dict[str, Any]) -> None:
        nfe = result.pop("measurements")["nfe"]
        result.update(schema=2, nfe=nfe, values=[value.model_dump(mode="json", exclude_unset=True) for value in values])

    return change


def sharpness(steps: int, level: float = 9.0, **more: Any) -> Value:
    """A made-up measure: higher is better, in groups, compared under made-up conditions."""
    value = 2.0 + steps / 10
    given: dict[str, Any] = {
        "name": "sharpness",
        "value": value,
        "heading": "Sharpness",
        "facts": "of edges, in furlongs",
        "se": 0.25,
        "error": "over edges",
        "count": 70,
        "counted": "edges",
        "better": "higher",
        "level": "sharpness_of_data",
        "level_says": "Sharpness of the data",
        "level_as": "row",
        "replicates": [value + 0.01 * (k % 5) * steps for k in range(GROUPS)],
        "comparable": {"ruler": "steel"},
    }
    return Value(**(given | more))


def invented(root: Path) -> Outputs:
    outputs = Outputs(root)
    for eta in (0.0, 0.5):
        for steps in (10, 20):
            outputs.add(
                eta,
                steps,
                change=holding(
                    sharpness(steps),
                    Value(name="sharpness_of_data", value=9.0, label="the data", facts="all of it", count=70),
                    Value(name="taste", value="sweet", section="Cooking", column="how it tastes", notes=("Ask one.",)),
                    Value(name="salt", value=0.125, unit="share", section="Cooking", column="salt"),
                ),
            )
    return outputs


def test_a_value_that_nobody_has_heard_of_is_shown(tmp_path: Path) -> None:
    sweep = invented(tmp_path).done()
    page = Page(build(sweep))
    table = read_csv(sweep)
    assert [row["sharpness"] for row in table] == ["3.0", "4.0", "3.0", "4.0"]
    assert {(row["sharpness_se"], row["sharpness_ruler"], row["sharpness_count"]) for row in table} == {
        ("0.25", "steel", "70")
    }
    assert {(row["taste"], row["salt"], row["fd"]) for row in table} == {("sweet", "0.125", "")}
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert "## Sharpness\n\nof edges, in furlongs · 70 edges · weights: ema" in markdown
    assert "| η 0 | 3.00 ± 0.25 | 4.00 ± 0.25 |" in markdown
    assert "| the data | 9.00 | 9.00 |" in markdown
    assert "Last row: Sharpness of the data, the same in every column: all of it." in markdown
    assert "± is one standard error over edges." in markdown
    assert r"\caption{Sharpness; of edges" in (sweep / "table.tex").read_text(encoding="utf-8")
    assert "The stronger the colour, the higher (better) the value, on a log scale." in page.text
    assert page.values[("sharpness", 3)] == {"4.0"}
    drawn = drawn_values(page.charts["sharpness_against_steps"])
    assert {(r["series"], r["steps"], r["value"]) for r in drawn if "steps" in r} == {
        (f"η {eta}", steps, 2.0 + steps / 10) for eta in ("0", "0.5") for steps in (10, 20)
    }
    assert {"value": 9.0, "text": "the data"} in drawn
    # a section of its own, with a row a cell
    assert re.search(r"Cooking\s+how it tastes\s*salt", page.text)
    assert page.text.count("Ask one.") == 1
    assert "12.5%" in page.text
    assert page.values[("taste", 0)] == {"sweet"}
    found = read_sweep(sweep)
    assert curves(found) == {s: {f"sharpness/η {e}": 2 + s / 10 for e in ("0", "0.5")} for s in (10, 20)}
    assert [heading for heading, _, _ in text_tables(found)] == ["Sharpness"]


def test_an_error_that_nothing_is_said_of_is_shown_all_the_same(tmp_path: Path) -> None:
    """As a package's metric may give it: no space before the full stop, no empty brackets."""
    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10, change=holding(sharpness(10, error="", level=None, replicates=None)))
    sweep = outputs.done()
    build(sweep)
    assert "± is one standard error.\n" in (sweep / "table.md").read_text(encoding="utf-8")
    assert _row(sharpness(10, error=""), 9) == "Sharpness          3 ± 0.25"
    assert _row(sharpness(10), 9) == "Sharpness          3 ± 0.25  (over edges)"


def test_its_differences_are_paired(tmp_path: Path) -> None:
    sweep = invented(tmp_path).done()
    page = Page(build(sweep))
    assert "Paired differences of Sharpness" in page.text
    assert paired_se([1.0] * GROUPS, [1.0] * GROUPS) == 0.0
    assert re.search(r"η 0.5 − η 0\s*\+0.00\s*± 0.00\s*\+0.00\s*± 0.00", page.text)


def test_what_does_not_compare_shares_no_table(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for number, ruler in enumerate(("steel", "wood", "steel")):
        value = sharpness(10 * (number + 1), comparable={"ruler": ruler})
        outputs.add(0.0, 10 * (number + 1), change=holding(value))
    found = read_sweep(outputs.done())
    assert [sorted(values.values) for values in shown(found, "sharpness")] == [[0, 2], [1]]
    charts = [chart.name for chart in sweep_charts(found) if chart.name.startswith("sharp")]
    assert charts == ["sharpness_against_steps_1", "sharpness_against_steps_2"]


def test_a_second_value_that_does_not_compare_has_two_tables(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for steps, oven in ((10, "gas"), (20, "wood"), (30, "gas")):
        baked = Value(name="baked", value=float(steps), heading="Baked", comparable={"oven": oven})
        outputs.add(0.0, steps, change=holding(sharpness(steps), baked))
    found = read_sweep(outputs.done())
    assert len(found.tables) == 1
    assert [sorted(values.values) for values in shown(found, "baked")] == [[0, 2], [1]]
    assert [values.table.columns for values in shown(found, "baked")] == [(10, 30), (20,)]


def test_a_reason_stands_where_the_number_would(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10, change=holding(sharpness(10)))
    outputs.add(0.0, 20, change=holding(Value(name="sharpness", value=None, why_not="no edges", heading="Sharpness")))
    sweep = outputs.done()
    build(sweep)
    assert "not measured: no edges" in (sweep / "table.md").read_text(encoding="utf-8")
    assert [row["sharpness"] for row in read_csv(sweep)] == ["3.0", ""]


def test_published_numbers_of_a_made_up_metric(tmp_path: Path) -> None:
    reference = {
        "source": "a book",
        "metric": "sharpness",
        "rows": {"ddim": {"10": 2.5}},
        "samplers": {"ddim": {"eta": 0.0, "variance": "posterior", "clip": "none"}},
    }
    outputs = Outputs(tmp_path, reference=reference)
    outputs.add(0.0, 10, change=holding(sharpness(10)))
    sweep = outputs.done()
    build(sweep)
    assert "| η 0 | 3.00 ± 0.25 / 2.5 / +0.50 |" in (sweep / "table.md").read_text(encoding="utf-8")


def test_a_time_draws_its_line_whatever_it_is_called(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for steps in (10, 20, 40):
        fair = steps != 40
        value = Value(
            name="wall_clock",
            value=0.001 * steps,
            unit="s/image",
            section="Pace",
            table="By the clock",
            column="an image",
            quartiles=(0.0009 * steps, 0.0012 * steps),
            fair=fair,
        )
        outputs.add(0.0, steps, change=holding(sharpness(steps), value))
    sweep = outputs.done()
    page = Page(build(sweep))
    assert {r["forwards"] for r in drawn_values(page.charts["time_against_steps"])} == {10, 20}
    assert {r["budget"] for r in drawn_values(page.charts["sharpness_against_seconds"])} == {"10", "20"}
    assert re.search(r"NFE\s*ms an image\s*quartiles\s*hours for 50,000 images", page.text)
    assert "1 cell marked “contended”" in page.text
    assert [row["wall_clock"] for row in read_csv(sweep)] == ["0.01", "0.02", "0.04"]


# -- nothing is known by its name ------------------------------------------------------------------------

METRICS = {
    *("fd", "fid", "kid", "inception_score", "improved_precision", "improved_recall", "recall", "nearest", "kernel"),
    *("noise_variance", "reconstruction_mse", "forward_share", "peak_memory", "sha256", "repeat_identical", "frechet"),
}


SHARED = {"precision", "interpolate", "order"}
"""Tasks called as something else is, too: the arithmetic's precision, how Vega-Lite joins points, what comes first."""


def words_of(file: Path) -> set[str]:
    """Names and texts of a file, without its docstrings and the contract's columns."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "CONTRACT" for t in node.targets):
            left_out |= set(ast.walk(node))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(node.value)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        for text in (getattr(node, name, None) for name in ("id", "attr", "arg", "value", "name")):
            if isinstance(text, str):
                found |= {text.casefold(), *re.findall(r"\w+", text.casefold())}
    return found


@pytest.mark.parametrize("file", sorted(REPORT.glob("*.py")), ids=lambda file: file.name)
def test_the_report_names_no_task_and_no_metric(file: Path) -> None:
    tasks = {path.stem for path in (config_folder() / "task").glob("*.yaml")} - SHARED
    assert tasks >= {"generate", "reconstruct", "cannot_skip"}
    assert words_of(file) & (tasks | METRICS) == set()


# -- the records -----------------------------------------------------------------------------------------


def test_a_values_number_keeps_its_kind() -> None:
    for given in (3, 3.0, True, "3", None):
        read = Value.model_validate(json.loads(Value(name="x", value=given).model_dump_json())).value
        assert type(read) is type(given)
        assert read == given
    assert Value(name="x", value=True).number is None
    assert Value(name="x", value=float("nan")).number is None


@pytest.mark.parametrize("name", ["", "a b", "Two", *sorted(ROW)])
def test_a_value_can_not_take_the_name_of_another_column(name: str) -> None:
    with pytest.raises(ValidationError):
        Value(name=name, value=1.0)


def test_a_rows_own_columns_are_those_that_no_value_may_take(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add()
    sweep = outputs.done()
    build(sweep)
    about = {*CONTRACT, *read_csv(sweep)[0]} & set(ROW)
    assert about >= set(ROW) - {"device_name", "compile", "error", "sweep", "nfe_asked", "guidance"}


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(ValidationError, match="two values are called x"):
        Result(key="k", values=(Value(name="x", value=1), Value(name="x", value=2)))


def test_what_is_written_reads_back_and_unknown_entries_are_left_alone() -> None:
    pointer = Pointer(number=3, status="done", cell="abc", wandb=(), objects=(("models", "k"),))
    assert pointer.content() == {
        "schema": 1, "number": 3, "status": "done", "cell": "abc", "wandb": [], "objects": [["models", "k"]]
    }  # fmt: skip
    assert Pointer.read({**pointer.content(), "of a later version": 1}) == pointer
    result = Result(key="k", values=(sharpness(10),))
    assert Result.read(json.loads(json.dumps(result.content()))) == result
    numbers = {"source": "s", "metric": "m", "more": 1}
    plan = Plan(name="x", published=numbers)
    assert Plan.read({"schema": 1, "name": "x", "reference": numbers}) == plan, "what earlier versions called it"
    assert plan.content()["published"] == numbers


@pytest.mark.parametrize("content", [None, [], {}, {"schema": 3}, {"schema": "2"}])
def test_another_schema_is_refused(content: Any) -> None:
    for kind in (Plan, Pointer, Result):
        with pytest.raises(ValueError, match=r"not a JSON object|its schema is"):
            kind.read(content)


@pytest.mark.parametrize(
    "measurements",
    [
        [],
        {"quality": [1]},
        {"quality": {"fd": "low"}},
        {"quality": {"fd": 1.0, "leave_one_out": "many"}},
        {"quality": {"equal_n": {"num_samples": 3.5}}},
        {"quality": {"nearest": {"samples_to_train": "near"}}},
        {"speed": {"seconds_per_image": True}},
        {"determinism": {"repeat_identical": 1}},
        {"reconstruction_mse": "small"},
        {"quality": {"values": [{"name": "x"}]}},
    ],
)
def test_measurements_of_schema_1_that_are_none_are_refused(measurements: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (pydantic's, or the reader's)
        Result.read({"schema": 1, "key": "k", "measurements": measurements})


def test_a_number_that_schema_1_did_not_know_is_kept() -> None:
    result = {"schema": 1, "key": "k", "measurements": {"nfe": 3, "wingspan": 1.5, "wingspan_se": 0.5, "kind": "swan"}}
    found = {value.name: value for value in Result.read(result).values}
    assert (found["wingspan"].value, found["wingspan"].se, found["kind"].value) == (1.5, 0.5, "swan")
    assert upgraded(result)["nfe"] == 3
