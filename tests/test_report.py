"""The report, from synthetic sweeps: files in, files out; no torch, no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddim_lab.metrics.estimates import fit_line, jackknife_se, paired_se
from ddim_lab.report import ReportError, Sweep, build, rows, static_charts
from ddim_lab.report.__main__ import main
from ddim_lab.report.charts import sweep_charts
from ddim_lab.report.compare import join_sweeps
from ddim_lab.report.drawing import page_spec
from ddim_lab.report.files import md, tex
from ddim_lab.report.numbers import DASH, decimals
from ddim_lab.report.page import script_json
from ddim_lab.report.read import read_sweep
from ddim_lab.report.seeds import over_seeds
from ddim_lab.report.tables import ValueTable, value_text
from ddim_lab.report.timing import pareto_front, timing_fits
from ddim_lab.report.together import neighbours
from ddim_lab.store import write_record
from ddim_lab.store.objects import seal
from ddim_lab.store.records import Result
from ddim_lab.store.schema1 import upgraded

GROUPS = 20
CONTRACT = [
    "data",
    "model",
    "sampler",
    "eta",
    "variance",
    "spacing",
    "clip",
    "steps",
    "nfe",
    "num_samples",
    "batch_size",
    "seed",
    "training_seed",
    "weights",
    "fd",
    "fd_se",
    "fd_features",
    "fd_reference",
    "images_per_second",
    "seconds_per_image",
    "forward_share",
    "peak_memory",
    "repeat_max_abs_diff",
    "repeat_identical",
    "noise_variance",
    "sha256",
    "precision",
    "device",
    "status",
    "cell",
]
LEVELS = {0.0: 9.8, 0.2: 10.4, 0.5: 11.7, 1.0: 14.7, "large": 43.0}


class Outputs:
    """A synthetic outputs folder with one sweep: numbers as the main job gives them."""

    def __init__(self, root: Path, **plan: Any) -> None:
        self.root = root
        self.sweep = root / "outputs" / "sweeps" / "2026-11-22T20-30-00-000000"
        self.cells: list[dict[str, Any]] = []
        self.plan = {
            "schema": 1,
            "created": "2026-11-22T20:30:00+00:00",
            "command": "python -m ddim_lab sampler.eta=0,0.5,1 steps=10,25,50 -m",
            "name": self.sweep.name,
            "title": None,
            "notes": None,
            "reference": None,
            "outputs_dir": "../..",
            "environment": {
                "python": "3.11.7",
                "torch": "2.9.1",
                "platform": "Linux-6.1-x86_64",
                "git_commit": "0123456789abcdef",
                "git_dirty": True,
            },
            **plan,
        }
        self.sweep.mkdir(parents=True)

    def add(
        self,
        eta: float = 0.0,
        steps: int = 10,
        *,
        change: Callable[[dict[str, Any]], None] | None = None,
        fd: float | None = None,
        overrides: list[str] | None = None,
        key: str | None = None,
        status: str = "done",
        error: str | None = None,
        seconds_per_image: float | None = None,
        cached: bool = False,
        size: int = 8,
        **labels: Any,
    ) -> dict[str, Any]:
        """Plan one cell and leave what its job leaves; return its labels. status "killed" leaves no record."""
        number = len(self.cells)
        named = {
            "sampler": "ddim",
            "eta": eta,
            "variance": "posterior",
            "spacing": "uniform",
            "clip": "none",
            "steps": steps,
            "data": "digits",
            "model": "digits",
            "num_samples": 1437,
            "batch_size": 256,
            "seed": 0,
            "training_seed": 0,
            **labels,
        }
        tokens = [f"sampler.eta={eta:g}", f"steps={steps}"] if overrides is None else overrides
        self.cells.append({"number": number, "task": "generate", "overrides": tokens, "labels": named})
        if status == "killed":
            return named
        key = key or hashlib.sha256(json.dumps([named, tokens]).encode()).hexdigest()
        pointer = {
            "schema": 1,
            "number": number,
            "status": status,
            "cell": key if status == "done" else None,
            "cached": cached,
            "error": error,
            "seconds": 8.5,
            "phases": {"train": 93.1 if number == 0 else 0.0, "sampling": 0.08 * steps, "features": 0.4},
            "wandb": None,
        }
        write_record(self.sweep / "jobs" / str(number) / "pointer.json", pointer)
        if status != "done":
            return named
        rng = np.random.default_rng(number)
        shared = np.random.default_rng(99).normal(size=GROUPS)  # what the pairing cancels
        level = LEVELS["large" if named["variance"] == "large" else eta]
        value = fd if fd is not None else 1.6 + (level - 1.6) * (10 / steps) ** 1.3
        spread = 0.02 * value * shared + 0.004 * value * rng.normal(size=GROUPS)
        leave_one_out = [float(value + s) for s in spread]
        seconds = seconds_per_image if seconds_per_image is not None else 0.0002 + 0.0012 * steps
        result: dict[str, Any] = {
            "schema": 1,
            "task": "generate",
            "key": key,
            "recipe": {
                "data": {"name": "digits", "digest": "ab" * 32, "preprocessing": "[-1, 1]"},
                "model": {
                    "name": "digits",
                    "weights": "ema",
                    "digest": f"{0xCD + (named['training_seed'] or 0):x}" * 32,
                    "parameters": 270_145,
                    "training_seed": named["training_seed"],
                    "fingerprint": "ef" * 32,
                },
                "schedule": {"name": "linear", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02},
                "sampler": {"steps": steps, "eta": eta, "timesteps": [i * 1000 // steps for i in range(steps)][::-1]},
                "seed": named["seed"],
                "num_samples": named["num_samples"],
                "runtime": {"device": "cpu", "device_name": "AMD EPYC 2 cores", "precision": "fp32"},
                "metrics": {"features": "classifier", "reference": "train", "reference_statistics": None},
            },
            "measurements": {
                "nfe": steps,
                "quality": {
                    "fd": value,
                    "fd_se": jackknife_se(leave_one_out),
                    "name": "FD (digits classifier)",
                    "features": "3f2a91c0" * 8,
                    "reference": "digits train, n=1437",
                    "num_samples": named["num_samples"],
                    "leave_one_out": leave_one_out,
                    "equal_n": {"num_samples": 360, "fd_samples": value + 1.3, "fd_held_out": 2.9134},
                    "nearest": {"samples_to_train": 1.12, "samples_to_held_out": 1.43, "held_out_to_train": 1.21},
                },
                "speed": {
                    "images": 64,
                    "repeats": 3,
                    "seconds": [seconds * 64] * 3,
                    "seconds_median": seconds * 64,
                    "seconds_q1": seconds * 64 * 0.98,
                    "seconds_q3": seconds * 64 * 1.03,
                    "images_per_second": 1 / seconds,
                    "seconds_per_image": seconds,
                    "forward_share": 0.93,
                    "warmup_seconds": 0.2,
                    "peak_memory_bytes": None,
                    "contended": False,
                },
                "determinism": {
                    "images": 64,
                    "repeat_max_abs_diff": 0.0,
                    "repeat_identical": True,
                    "batch_max_abs_diff": 3.1e-7,
                    "batch_sizes": [40, 24],
                    "noise_seeds": 4,
                    "noise_images": 8,
                    "noise_variance": 0.013 * eta,
                    "sha256": hashlib.sha256(str(eta).encode()).hexdigest(),
                },
            },
            "phases": {"sampling": 0.08 * steps, "features": 0.4, "metrics": 0.1, "speed": 0.7, "determinism": 0.5},
            "environment": {
                "python": "3.11.7",
                "packages": {"torch": "2.9.1", "diffusers": "0.35.2"},
                "git_commit": "0123456789abcdef",
                "git_dirty": True,
            },
            "created": "2026-11-22T20:31:00+00:00",
        }
        if change is not None:
            change(result)
        # cells of both schemas lie beside each other, as in an outputs folder that is older than the second
        write(
            self.cell(key) / "result.json",
            upgraded(result) | {"schema": 2} if number % 2 and result["schema"] == 1 else result,
        )
        noise = np.random.default_rng(5).normal(size=(size, 12 * size)) + rng.normal(size=(size, 12 * size)) * eta
        Image.fromarray((np.clip(noise * 60 + 110, 0, 255)).astype(np.uint8)).save(self.cell(key) / "preview.png")
        return named

    def cell(self, key: str) -> Path:
        return self.root / "outputs" / "cells" / key

    def done(self) -> Path:
        """Write the plan and the training curve, seal what the store would; return the sweep's folder."""
        write_record(self.sweep / "plan.json", {**self.plan, "cells": self.cells})
        curve = self.root / "outputs" / "models" / ("ef" * 32) / "training_curve.csv"
        curve.parent.mkdir(parents=True, exist_ok=True)
        lines = ["step,loss,learning_rate,seconds"]
        lines += [f"{s},{0.04 + math.exp(-s / 120):.5f},0.001,{s * 0.03:.2f}" for s in range(0, 3000, 5)]
        curve.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for folder in (curve.parent, *(path.parent for path in self.root.glob("outputs/cells/*/result.json"))):
            seal(folder, folder.parent.name, folder.name)
        return self.sweep


def shown(sweep: Sweep, name: str = "fd") -> list[ValueTable]:
    """The tables of a value."""
    return [values for _, found in sweep.shown for values in found if values.value.name == name]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_training_seeds_are_averaged_row_by_row(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    given = {(0.0, 10): (8.0, 10.0, 12.0), (0.0, 50): (2.0, 3.0, 7.0), (1.0, 10): (20.0, 21.0, 25.0)}
    for (eta, steps), values in given.items():
        for seed, fd in enumerate(values):
            overrides = [f"sampler.eta={eta:g}", f"steps={steps}", f"training.seed={seed}"]
            outputs.add(eta, steps, fd=fd, training_seed=seed, overrides=overrides)
    sweep = read_sweep(outputs.done())
    (table,) = shown(sweep)
    assert [row.series.label for row in table.table.rows] == [
        f"η {eta} · training seed {k}" for eta in (0, 1) for k in range(3)
    ]
    found = over_seeds(table)
    assert found is not None
    assert found.heading == "FD (digits classifier) over 3 training seeds"
    texts = {label: [entry and entry.text for entry in entries] for label, entries in found.rows}
    errors = [[table.se_of(table.table.rows[k].cells[steps]) or 0.0 for k in range(3)] for steps in (10, 50)]
    first, second = (math.fsum(of) / 3 for of in errors)
    assert texts == {"η 0": ["10.00 ± 2.00", "4.00 ± 2.65"], "η 1": ["22.00 ± 2.65", DASH]}
    asides = [entry and entry.aside for entry in found.rows[0][1]]
    assert asides == [f"se {first:.2f}", f"se {second:.2f}"]
    assert "not in the deviation" in found.notes[0]
    build(sweep.folder)
    page = (sweep.folder / "report.html").read_text(encoding="utf-8")
    assert "over 3 training seeds" in page
    assert f"4.00 ± 2.65 (se {second:.2f}) |" in (sweep.folder / "table.md").read_text(encoding="utf-8")
    assert f"<small>se {second:.2f}</small>" in page


@pytest.mark.parametrize("trained", [True, False])
def test_training_seeds_of_a_model_that_is_not_trained_are_no_networks(tmp_path: Path, trained: bool) -> None:
    """A pretrained or an exact model is the same one whatever training.seed says: its spread would be 0."""

    def given(result: dict[str, Any]) -> None:
        result["recipe"]["model"].update(training_seed=None, digest="cd" * 32, weights="pretrained")

    outputs = Outputs(tmp_path)
    for seed in range(3):
        overrides = ["steps=10", f"training.seed={seed}"]
        outputs.add(0.0, 10, fd=8.0, training_seed=seed, overrides=overrides, change=None if trained else given)
    (table,) = shown(read_sweep(outputs.done()))
    assert len(table.table.rows) == 3
    assert (over_seeds(table) is not None) == trained


def test_a_network_counts_once_and_a_missing_one_is_told(tmp_path: Path) -> None:
    def twin(result: dict[str, Any]) -> None:
        result["recipe"]["model"]["digest"] = "cd" * 32

    outputs = Outputs(tmp_path)
    for seed, fd in enumerate((8.0, 8.0, 12.0, 0.0)):
        given: dict[str, Any] = {"status": "failed", "error": "no"} if seed == 3 else {"fd": fd}
        given["change"] = (lambda result: (drop_se(result), twin(result))) if seed == 1 else drop_se
        outputs.add(0.0, 10, training_seed=seed, overrides=["steps=10", f"training.seed={seed}"], **given)
    (table,) = shown(read_sweep(outputs.done()))
    found = over_seeds(table)
    assert found is not None
    (entry,) = found.rows[0][1]
    assert entry is not None
    assert (entry.text, entry.aside) == ("10.00 ± 2.83", "2 of 3")
    assert found.heading.endswith("over 3 training seeds")


def drop_se(result: dict[str, Any]) -> None:
    result["measurements"]["quality"]["fd_se"] = None


def test_one_training_seed_has_no_such_table(tmp_path: Path) -> None:
    (table,) = shown(read_sweep(nine(tmp_path).done()))
    assert over_seeds(table) is None


def nine(root: Path, **plan: Any) -> Outputs:
    """The main job: eta 0, 0.5, 1 by 10, 25, 50 steps."""
    outputs = Outputs(root, **plan)
    for eta in (0.0, 0.5, 1.0):
        for steps in (10, 25, 50):
            outputs.add(eta, steps)
    return outputs


class Page(HTMLParser):
    """What the tests ask of the page: its tags, its <data> values, its JSON and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: dict[tuple[str, int], set[str]] = {}
        self.scripts: list[tuple[str | None, str]] = []
        self.title = self.text = ""
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag in ("script", "title", "style"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append((found.get("type"), ""))
        if tag == "data" and found.get("data-field"):
            place = (str(found["data-field"]), int(str(found["data-cell"])))
            self.values.setdefault(place, set()).add(str(found["value"]))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif inside == "title":
            self.title += data
        elif inside == "":
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(text for kind, text in self.scripts if kind == "application/json"))
        return found


def drawn_values(chart: dict[str, Any]) -> list[dict[str, Any]]:
    """Every record that the chart draws, whichever of its layers holds it."""
    return [record for values in chart["datasets"].values() for record in values]


def read_csv(sweep: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((sweep / "results.csv").read_text(encoding="utf-8"))))


# estimates


def test_paired_error_equals_the_hand_computation() -> None:
    # differences 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, times 2/3
    assert paired_se([10.0, 10.0, 10.0], [11.0, 12.0, 16.0]) == pytest.approx(math.sqrt(28 / 3), rel=1e-15)


def test_jackknife_of_a_mean_is_the_textbook_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=20)
    leave_one_out = [(x.sum() - v) / 19 for v in x]
    assert jackknife_se(leave_one_out) == pytest.approx(x.std(ddof=1) / math.sqrt(20), rel=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        jackknife_se([1.0])


def test_line_through_exactly_linear_times() -> None:
    line = fit_line([10, 25, 50, 100], [0.5 + 0.25 * s for s in (10, 25, 50, 100)])
    assert line is not None
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((0.25, 0.5, 1.0), rel=1e-12)
    assert fit_line([10, 10], [1.0, 2.0]) is None
    two = fit_line([10, 20], [1.0, 2.0])
    assert two is not None
    assert two.r_squared is None
    flat = fit_line([1, 2, 3], [4.0, 4.0, 4.0])
    assert flat is not None
    assert (flat.slope, flat.r_squared) == (0.0, None)


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 1.0), (4.0, 1.0)]
    assert pareto_front(points) == [0, 1, 4, 5]


# rows


def test_csv_has_the_contract_columns_first_and_reads_back_exactly(tmp_path: Path) -> None:
    sweep = nine(tmp_path).done()
    build(sweep)
    table = read_csv(sweep)
    assert list(table[0])[: len(CONTRACT)] == CONTRACT
    assert len(set(table[0])) == len(list(table[0]))
    assert [row["steps"] for row in table] == ["10", "25", "50"] * 3
    for written, row in zip(table, rows(read_sweep(sweep)), strict=True):
        assert list(row) == list(written)
        stored = Result.read(json.loads((tmp_path / "outputs" / "cells" / row["cell"] / "result.json").read_text()))
        found = {value.name: value.value for value in stored.values}
        assert float(written["fd"]) == row["fd"] == found["fd"]
        assert float(written["seconds_per_image"]) == found["seconds_per_image"]
        assert written["peak_memory"] == ""
        assert (written["repeat_identical"], written["status"]) == ("True", "done")


def test_holes_are_empty_cells_with_their_status(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10)
    outputs.add(0.0, 25, status="failed", error="RuntimeError: out of\n memory | <b>")
    outputs.add(0.5, 10, status="killed")
    outputs.add(0.5, 25)
    outputs.add(1.0, 10)
    outputs.add(1.0, 25)
    sweep = outputs.done()
    damaged, gone = (outputs.cell(rows(read_sweep(sweep))[n]["cell"]) / "result.json" for n in (3, 5))
    damaged.write_text(damaged.read_text(encoding="utf-8")[:500], encoding="utf-8")
    gone.unlink()

    page = Page(build(sweep))
    table = read_csv(sweep)
    assert [row["status"] for row in table] == ["done", "failed", "missing", "failed", "done", "missing"]
    assert [row["fd"] != "" for row in table] == [True, False, False, False, True, False]
    assert "result.json is damaged" in table[3]["error"]
    assert "5 without a result" not in page.text
    assert "4 without a result" in page.text
    assert "RuntimeError: out of memory | <b>" in page.text
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert markdown.count("— [") == 4
    assert r"[1] η 0, S = 25: failed: RuntimeError: out of memory \| &lt;b>" in markdown
    # the holes stand in the table of the cells beside them
    assert len(read_sweep(sweep).tables) == 1


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", '{"schema": 9, "status": "done"}', '{"schema": 1, "status": "done", "cell": "../../x"}'],
)
def test_a_damaged_pointer_is_a_hole(tmp_path: Path, content: str) -> None:
    outputs = Outputs(tmp_path)
    outputs.add()
    outputs.add(0.5)
    sweep = outputs.done()
    (sweep / "jobs" / "1" / "pointer.json").write_text(content, encoding="utf-8")
    build(sweep)
    assert [row["status"] for row in read_csv(sweep)] == ["done", "failed"]
    assert "pointer.json is damaged" in read_csv(sweep)[1]["error"]


def test_a_result_that_names_another_cell_is_a_hole(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(change=lambda result: result.update(key="0" * 64))
    assert rows(read_sweep(outputs.done()))[0]["status"] == "failed"


# series and tables


def labels_of(sweep: Path) -> list[str]:
    found = read_sweep(sweep)
    return [found.series[cell.number].label for cell in found.cells]


def test_names_say_what_varies_and_no_more(tmp_path: Path) -> None:
    assert set(labels_of(nine(tmp_path / "a").done())) == {"η 0", "η 0.5", "η 1"}

    presets = Outputs(tmp_path / "b")
    presets.add(0.0, sampler="ddim")
    presets.add(1.0, sampler="ddim_eta1")
    presets.add(1.0, sampler="ddpm_large", variance="large", clip="x0_eps")
    assert labels_of(presets.done()) == ["η 0", "η 1", "σ̂"]

    spacings = Outputs(tmp_path / "c")
    for spacing in ("uniform", "quadratic"):
        spacings.add(0.0, spacing=spacing)
    assert labels_of(spacings.done()) == ["η 0 · uniform", "η 0 · quadratic"]

    hidden = Outputs(tmp_path / "d")
    for beta in ("0.02", "0.03"):
        for steps in (10, 25):
            hidden.add(0.0, steps, overrides=[f"schedule.beta_end={beta}", f"steps={steps}", "seed=0"])
    assert labels_of(hidden.done()) == ["η 0 · schedule.beta_end=0.02"] * 2 + ["η 0 · schedule.beta_end=0.03"] * 2


def test_one_cell_under_two_presets_keeps_two_rows(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(0.0, sampler="ddim", overrides=["sampler=ddim"])
    key = "a" * 64
    outputs.add(1.0, sampler="ddpm", key=key, overrides=["sampler=ddpm"])
    outputs.add(1.0, sampler="ddim_eta1", key=key, overrides=["sampler=ddim_eta1"], fd=14.7)
    sweep = outputs.done()
    build(sweep)
    assert labels_of(sweep) == ["η 0", "η 1 · ddpm", "η 1 · ddim_eta1"]
    same = rows(read_sweep(sweep))[1:]
    assert same[0]["fd"] == same[1]["fd"] == 14.7
    comparison = neighbours(shown(read_sweep(sweep))[0])[1]
    assert (comparison.differences["S = 10"].value, comparison.differences["S = 10"].se) == (0.0, 0.0)


def test_different_n_features_or_reference_never_share_a_table(tmp_path: Path) -> None:
    def set_quality(**entries: Any) -> Callable[[dict[str, Any]], None]:
        return lambda result: result["measurements"]["quality"].update(entries)

    outputs = Outputs(tmp_path)
    for steps in (10, 25):
        outputs.add(0.0, steps)
        outputs.add(0.0, steps, num_samples=360)
        outputs.add(0.0, steps, overrides=["a=1"], change=set_quality(features="inception", name="FID"))
        outputs.add(0.0, steps, overrides=["b=1"], change=set_quality(reference="digits all, n=1797"))
        outputs.add(0.0, steps, overrides=["c=1"], change=set_quality(reference_key="other images of that name"))
    outputs.add(0.5, 10, num_samples=360, status="failed", error="no")
    sweep = outputs.done()
    page = Page(build(sweep))
    tables = shown(read_sweep(sweep))
    assert len({json.dumps(table.value.comparable) for table in tables}) == len(tables) == 5
    for table in tables:
        assert {json.dumps(value.comparable) for value in table.values.values()} == {json.dumps(table.value.comparable)}
    # the hole of N = 360 went to the table of N = 360
    assert [len(table.table.rows) for table in tables if table.value.count == 360] == [2]
    assert page.text.count("N = 360 ·") + page.text.count("N = 360\n") >= 1
    assert len([name for name in page.charts if name.startswith("fd_against_steps")]) == 5


def test_paired_differences_are_tighter_and_refused_across_seeds(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10)
    outputs.add(0.5, 10)
    outputs.add(1.0, 10, seed=1)
    table = shown(read_sweep(outputs.done()))[0]
    found = neighbours(table)
    assert [(c.first, c.second) for c in found] == [("η 0", "η 0.5")]
    difference = found[0].differences["S = 10"]
    first, second = (table.values[table.table.rows[i].cells[10].number] for i in (0, 1))
    assert difference.value == (second.number or 0) - (first.number or 0)
    d = np.array(second.replicates) - np.array(first.replicates)
    assert difference.se == pytest.approx(math.sqrt((GROUPS - 1) / GROUPS * ((d - d.mean()) ** 2).sum()), rel=1e-12)
    assert difference.se < 0.7 * math.hypot(first.se or 0, second.se or 0)


REFERENCE = {
    "source": "Song, Meng, Ermon (ICLR 2021), Table 1",
    "metric": "FID",
    "columns": "steps",
    "reference": "train",
    "rows": {"ddim": {"10": 13.36, "20": 6.84}, "ddpm_large": {"10": 367.43}},
    "samplers": {
        "ddim": {"eta": 0.0, "variance": "posterior", "clip": "none"},
        "ddpm_large": {"eta": 1.0, "variance": "large", "clip": "x0_eps"},
    },
}


def paper_like(root: Path, name: str) -> Path:
    def rename(result: dict[str, Any]) -> None:
        result["measurements"]["quality"].update(name=name)

    outputs = Outputs(root, reference=REFERENCE, title="Table 1")
    for steps in (10, 20):
        outputs.add(0.0, steps, sampler="ddim", overrides=[f"steps={steps}"], change=rename, fd=14.0)
        outputs.add(0.5, steps, sampler="ddim", overrides=["sampler.eta=0.5", f"steps={steps}"], change=rename)
        large = {"sampler": "ddpm_large", "variance": "large", "clip": "x0_eps"}
        outputs.add(1.0, steps, overrides=["x"], change=rename, fd=300.0, **large)
    return outputs.done()


def test_published_numbers_stand_beside_ours(tmp_path: Path) -> None:
    sweep = paper_like(tmp_path, "FID")
    page = Page(build(sweep))
    found = read_sweep(sweep)
    text = value_text(found.plan.published, shown(found)[0])
    entries = dict(text.rows)
    zero = entries["η 0"][0]
    assert zero is not None
    assert zero.paper == 13.36
    assert zero.difference == pytest.approx(14.0 - 13.36, rel=1e-12)
    # eta was overridden: the preset's published row is not this cell's
    half = entries["η 0.5"][0]
    assert half is not None
    assert half.paper is None
    large = entries["σ̂"][1]
    assert large is not None
    assert large.paper is None
    assert "/ 13.36 / +0.64" in (sweep / "table.md").read_text(encoding="utf-8")
    assert "paper 13.36" in page.text
    assert "/ 367.43 / $-$67.43" in (sweep / "table.tex").read_text(encoding="utf-8")


LINEAR = {"name": "linear", "num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
PROTOCOL = {
    **REFERENCE,
    "data": "digits",
    "num_samples": 1437,
    "weights": "ema",
    "spacing": {"10": "uniform", "20": "quadratic"},
    "schedule": LINEAR,
}


def fid(*path: str, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """A cell whose distance is an FID, with one entry changed if `path` is given."""

    def change(result: dict[str, Any]) -> None:
        result["measurements"]["quality"]["name"] = "FID"
        if path:
            other(*path, value=value)(result)

    return change


@pytest.mark.parametrize(
    ("change", "labels", "why"),
    [
        (fid(), {}, None),
        *(
            (
                fid("recipe", "model", "weights", value=unknown),
                {},
                "it is not known whether our network's weights are averaged (theirs are ema);"
                " model.weights=ema or raw says so",
            )
            for unknown in ("pretrained", "unknown")
        ),
        (fid(), {"data": "cifar10"}, "ours is of cifar10, theirs of digits"),
        (
            fid("measurements", "quality", "num_samples", value=1000),
            {},
            "ours is of 1,000 images, theirs of 1,437",
        ),
        (
            fid("recipe", "metrics", "reference", value="held_out"),
            {},
            "ours is to the held_out images, theirs to the train images",
        ),
        (
            fid("recipe", "metrics", "reference_statistics", value="/some/x.npz"),
            {},
            "ours is to the statistics in x.npz, theirs to the train images",
        ),
        (fid("recipe", "model", "weights", value="raw"), {}, "ours is of raw weights, theirs of ema"),
        (
            fid("recipe", "schedule", value={"name": "cosine", "offset": 0.008}),
            {},
            "ours has schedule cosine (offset 0.008), theirs schedule linear (num_timesteps 1000, beta_start 0.0001, "
            "beta_end 0.02)",
        ),
        (fid(), {"spacing": "trailing"}, "ours has trailing timesteps, theirs uniform"),
    ],
)
def test_a_difference_needs_the_published_protocol(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], labels: dict[str, Any], why: str | None
) -> None:
    outputs = Outputs(tmp_path, reference=PROTOCOL)
    outputs.add(0.0, 10, fd=14.0, change=change, **labels)
    found = read_sweep(outputs.done())
    text = value_text(found.plan.published, shown(found)[0])
    (entry,) = text.rows[0][1]
    assert entry is not None
    assert entry.paper == 13.36
    assert (entry.difference is None) == (why is not None)
    assert text.notes[0] == (
        f"Each place: ours / paper / ours − paper. Paper: {REFERENCE['source']}."
        if why is None
        else f"Each place: ours / paper (FID; {REFERENCE['source']}). No difference is given: {why}."
    )


def test_one_cell_of_another_protocol_is_refused_alone(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, reference=PROTOCOL)
    for steps in (10, 20):
        outputs.add(0.0, steps, fd=14.0, change=fid())  # uniform, as theirs at S = 10 alone
    found = read_sweep(outputs.done())
    text = value_text(found.plan.published, shown(found)[0])
    assert [entry and entry.difference is not None for entry in text.rows[0][1]] == [True, False]
    assert text.notes[0].endswith(
        "No difference is given where it would mean nothing: ours has uniform timesteps, theirs quadratic "
        "(η 0, S = 20)."
    )


@pytest.mark.parametrize(
    ("labels", "overrides", "paper"),
    [
        ({"sampler": "ddim"}, [], 13.36),
        ({"sampler": "ddim_eta1"}, ["sampler=ddim_eta1", "sampler.eta=0"], 13.36),  # it is DDIM, whatever was typed
        ({"sampler": "ddim", "eta": 0.5}, [], None),  # by a study's file: nothing was typed
        ({"sampler": "ddim", "clip": "x0"}, [], None),
        ({"sampler": "ddim", "variance": "large"}, [], None),
        ({"sampler": "ddim", "spacing": "custom"}, [], None),
    ],
)
def test_a_row_is_matched_by_what_the_sampler_is(
    tmp_path: Path, labels: dict[str, Any], overrides: list[str], paper: float | None
) -> None:
    outputs = Outputs(tmp_path, reference=REFERENCE)
    outputs.add(labels.pop("eta", 0.0), 10, change=fid(), overrides=overrides, **labels)
    found = read_sweep(outputs.done())
    (entry,) = value_text(found.plan.published, shown(found)[0]).rows[0][1]
    assert entry is not None
    assert entry.paper == paper


def test_no_difference_between_different_metrics(tmp_path: Path) -> None:
    sweep = paper_like(tmp_path, "FD (digits classifier)")
    build(sweep)
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert "/ 13.36 |" in markdown
    assert "another metric" in markdown
    assert "+0.64" not in markdown


def test_markdown_and_latex_tables_hold_the_values(tmp_path: Path) -> None:
    sweep = nine(tmp_path, title="A & B_1 | 100 %").done()
    build(sweep)
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    latex = (sweep / "table.tex").read_text(encoding="utf-8")
    table = read_csv(sweep)
    lines = [line for line in markdown.splitlines() if line.startswith("| η")]
    shown = [[float(v.split("±")[0]) for v in line.strip("| ").split("|")[1:]] for line in lines[:3]]
    assert np.allclose(np.array(shown).ravel(), [float(row["fd"]) for row in table], atol=0.005)
    assert "## FD (digits classifier)" in markdown
    assert "features: 3f2a91c03f2a · reference: digits train, n=1437 · N = 1,437" in markdown
    assert "held-out real images | 2.913 |" in markdown
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 3
    assert r"$\eta$ 0.5 & " in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {3}


def test_text_survives_markdown_and_latex() -> None:
    assert md("a|b\n<i>*x*") == r"a\|b &lt;i>\*x\*"
    assert tex("50% of a_b & σ̂ ± η {x} \\") == (r"50\% of a\_b \& $\hat{\sigma}$ $\pm$ $\eta$ \{x\} \textbackslash{}")
    assert [decimals([367.43, 3.2]), decimals([0.13]), decimals([3.2], [0.004]), decimals([0.0])] == [2, 2, 3, 2]


# the page


def test_values_on_the_page_equal_results_csv(tmp_path: Path) -> None:
    sweep = nine(tmp_path).done()
    page = Page(build(sweep))
    table = read_csv(sweep)
    for field in ("fd", "seconds_per_image", "images_per_second", "repeat_max_abs_diff", "noise_variance", "sha256"):
        assert [page.values[(field, n)] for n in range(9)] == [{row[field]} for row in table]
    for (field, number), values in page.values.items():
        assert values == {table[number][field]}
    drawn = {
        (record["series"], record["steps"]): record["value"] for record in drawn_values(page.charts["fd_against_steps"])
    }
    assert drawn == {(f"η {float(r['eta']):g}", int(r["steps"])): float(r["fd"]) for r in table}


def requests(page: Page) -> Iterator[str]:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if (value := attributes.get(name)) and not (tag == "data" and name == "value"):
                yield value


def test_nothing_leaves_the_page_and_it_is_small(tmp_path: Path) -> None:
    path = build(nine(tmp_path).done())
    page = Page(path)
    found = list(requests(page))
    assert len([value for value in found if value.startswith("data:image/png;base64,")]) == 9
    assert all(value.startswith(("data:", "#")) for value in found)
    assert not re.search(r"@import|url\(", re.sub(r"<script.*?</script>", "", path.read_text("utf-8"), flags=re.S))
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "eval" not in policy
    assert '"url"' not in json.dumps(page.charts)
    assert path.stat().st_size < 1_500_000


def files(page: Page) -> list[str]:
    """Where the page's links go, but those inside it."""
    found = [str(attributes["href"]) for tag, attributes in page.tags if tag == "a"]
    return [link for link in found if not link.startswith("#")]


def test_kept_images_are_named_where_they_are(tmp_path: Path) -> None:
    """From the report's folder, as python -m ddim_lab.score takes it; quoted in the link."""
    outputs = Outputs(tmp_path / "a b#c")
    outputs.add(0.0, 10, key="b" * 64)
    outputs.add(0.5, 10)
    samples = outputs.cell("b" * 64) / "samples.npz"
    np.savez(samples, np.zeros((4, 8, 8, 1), np.uint8))
    path = build(sweep := outputs.done())
    expected = f"../../cells/{'b' * 64}/samples.npz"
    assert files(Page(path)) == [f"./{expected}"]
    assert (sweep / expected).samefile(samples)
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert f"- η 0, S = 10: `{expected}`" in markdown
    assert r"python -m ddim\_lab.score PATH" in markdown
    samples.unlink()
    build(sweep)
    assert "samples.npz" not in path.read_text(encoding="utf-8")
    # beside another sweep, from a folder elsewhere
    np.savez(samples, np.zeros((4, 8, 8, 1), np.uint8))
    other_sweep = nine(tmp_path / "other").done()
    assert main([f"x={sweep}", f"y={other_sweep}", "--output", str(tmp_path / "both")]) == 0
    linked = files(Page(tmp_path / "both" / "report.html"))
    assert linked == [f"./../a%20b%23c/outputs/cells/{'b' * 64}/samples.npz"]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, title=HOSTILE, notes=HOSTILE, command=HOSTILE)
    for spacing in ("uniform", HOSTILE):
        outputs.add(0.0, 10, spacing=spacing, overrides=[HOSTILE + spacing])
    outputs.add(0.5, 10, status="failed", error=HOSTILE, overrides=[HOSTILE])
    plain = Page(build(nine(tmp_path / "plain").done()))
    page = Page(build(outputs.done()))
    assert page.title == HOSTILE
    assert len(page.scripts) == len(plain.scripts) == 3
    assert not [attributes for tag, attributes in page.tags if tag == "img" and attributes.get("src") == "x"]
    assert f"η 0 · {HOSTILE}" in page.text
    # and inside the charts' JSON, where the parser would have ended the script at the first "</"
    drawn = drawn_values(page.charts["fd_against_steps"])
    assert f"η 0 · {HOSTILE}" in {record["series"] for record in drawn}
    assert not set("<>&") & set(script_json({"a": HOSTILE}))


def test_same_files_same_bytes(tmp_path: Path) -> None:
    sweep = nine(tmp_path).done()
    names = ("results.csv", "table.md", "table.tex", "report.html")
    build(sweep)
    first = [(sweep / name).read_bytes() for name in names]
    build(sweep)
    assert [(sweep / name).read_bytes() for name in names] == first
    assert sorted(p.name for p in sweep.iterdir()) == sorted([*names, "jobs", "plan.json"])


def test_line_on_the_page_is_the_line_of_the_times(tmp_path: Path) -> None:
    page = Page(build(nine(tmp_path).done()))
    # seconds an image = 0.0002 + 0.0012 S in the synthetic cells
    assert re.search(r"all series\s*1\.2\s*0\.200\s*1\.000009\s", page.text)
    lines = [r for r in drawn_values(page.charts["time_against_steps"]) if "low" not in r]
    assert [r["forwards"] for r in lines] == [10, 50]
    assert [r["ms"] for r in lines] == pytest.approx([12.2, 60.2], rel=1e-9)


def test_contended_times_are_flagged_and_left_out(tmp_path: Path) -> None:
    def contend(result: dict[str, Any]) -> None:
        result["measurements"]["speed"].update(contended=True, seconds_per_image=9.0)

    outputs = Outputs(tmp_path)
    for steps in (10, 25, 50):
        outputs.add(0.0, steps, change=contend if steps == 25 else None)
    sweep = outputs.done()
    page = Page(build(sweep))
    assert page.values[("seconds_per_image", 1)] == {"9.0"}
    assert "1 cell marked “contended”" in page.text
    points = drawn_values(page.charts["time_against_steps"])
    assert {record["forwards"] for record in points} == {10, 50}
    assert {record["budget"] for record in drawn_values(page.charts["fd_against_seconds"])} == {"10", "50"}
    captions = {chart.name: chart.caption for chart in sweep_charts(read_sweep(sweep))}
    for name in ("time_against_steps", "fd_against_seconds"):
        assert captions[name].endswith(" 1 timed beside other work, left out.")
    assert "left out" not in captions["fd_against_steps"]


def speed_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The table "Timing" of a page: its columns, and its rows as texts."""
    (table,) = re.findall(r'aria-label="Timing">(.*?)</table>', path.read_text(encoding="utf-8"), re.DOTALL)
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    texts = [[html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]
    return texts[0], texts[1:]


def test_the_slowest_is_of_the_same_conditions(tmp_path: Path) -> None:
    def on(**model: Any) -> Callable[[dict[str, Any]], None]:
        return lambda result: result["recipe"]["model"].update(model)

    def larger_batch(result: dict[str, Any]) -> None:
        result["measurements"]["speed"]["images"] = 512

    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10, seconds_per_image=0.01)
    outputs.add(0.0, 25, seconds_per_image=0.03)
    outputs.add(0.5, 10, seconds_per_image=5.0, change=on(parameters=35_746_307))
    outputs.add(0.5, 25, seconds_per_image=7.0, change=on_another_machine)
    outputs.add(1.0, 10, seconds_per_image=9.0, change=larger_batch)
    outputs.add(1.0, 10, seconds_per_image=8.0, data="cifar10")
    columns, lines = speed_table(build(outputs.done()))
    place = columns.index("times as fast as the slowest")
    assert [line[place] for line in lines] == ["3×", "1×", "1×", "1×", "1×", "1×"]


def test_what_was_not_measured_of_the_speed_is_a_dash(tmp_path: Path) -> None:
    def without(result: dict[str, Any]) -> None:
        speed = result["measurements"]["speed"]
        speed.update(dict.fromkeys(("forward_share", "peak_memory_bytes", "seconds_q1", "seconds_per_image")))

    outputs = Outputs(tmp_path)
    outputs.add(0.0, 10, change=without)
    sweep = outputs.done()
    columns, ((name, *line),) = speed_table(build(sweep))
    shown = dict(zip(columns[1:], line, strict=True))
    assert name == "η 0, S = 10"
    assert {column for column, text in shown.items() if text == DASH} == {
        "ms an image", "quartiles", "hours for 50,000 images", "times as fast as the slowest", "forward's share",
        "peak memory",
    }  # fmt: skip
    (row,) = read_csv(sweep)
    assert (row["forward_share"], row["peak_memory"]) == ("", "")
    assert "Peak memory: what a GPU had allocated at most" in Page(sweep / "report.html").text


def test_held_out_level_is_drawn_only_at_equal_n(tmp_path: Path) -> None:
    def level(count: int) -> Callable[[dict[str, Any]], None]:
        return lambda result: result["measurements"]["quality"]["equal_n"].update(num_samples=count)

    for count, drawn in ((360, False), (1437, True)):
        outputs = Outputs(tmp_path / str(count))
        outputs.add(change=level(count))
        outputs.add(0.0, 25, change=level(count))
        (chart, *_) = sweep_charts(read_sweep(outputs.done()))
        assert ("held-out real images" in json.dumps(page_spec(chart))) is drawn
        assert "Held-out" in chart.caption or "held-out" in chart.caption


def test_the_held_out_level_is_one_draw_with_its_error(tmp_path: Path) -> None:
    def level(**values: Any) -> Callable[[dict[str, Any]], None]:
        return lambda result: result["measurements"]["quality"]["equal_n"].update(values)

    for se, told, row in ((0.1378, "2.91 ± 0.14", "2.91 ± 0.14"), (None, "2.91", "2.913")):
        outputs = Outputs(tmp_path / str(se))
        outputs.add(change=level(fd_held_out_se=se))
        sweep = outputs.done()
        build(sweep)
        markdown = (sweep / "table.md").read_text(encoding="utf-8")
        assert f"against the same reference: {told} at N = 360: one draw of them." in markdown
        assert f"| held-out real images | {row} |" in markdown
        assert "would score" not in markdown
        assert ("± its standard error" in markdown) is (se is not None)
        assert read_csv(sweep)[0].get("fd_held_out_at_equal_n_se") == (None if se is None else repr(se))
        equal = Outputs(tmp_path / f"{se} equal")
        equal.add(change=level(fd_held_out_se=se, num_samples=1437))
        (chart, *_) = sweep_charts(read_sweep(equal.done()))
        assert f"Dashed: held-out real images, one draw of them ({told})." in chart.caption


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for name in names:
            result["measurements"][name] = None

    return change


def nulls(result: dict[str, Any]) -> None:
    """Everything that a measurement may leave out (a single image has no split, a CPU no peak memory)."""
    measured = result["measurements"]
    for name in ("fd_se", "leave_one_out", "equal_n", "nearest"):
        measured["quality"][name] = None
    for name in ("batch_max_abs_diff", "batch_sizes"):
        measured["determinism"][name] = None
    result["recipe"]["model"]["fingerprint"] = None


def nan_fd(result: dict[str, Any]) -> None:
    result["measurements"]["quality"].update(fd=math.nan, fd_se=math.nan)


@pytest.mark.parametrize(
    ("cells", "done"),
    [
        ([{}], 1),
        ([{"status": "failed", "error": "no"}, {"status": "killed", "eta": 0.5}], 0),
        ([{"change": drop("quality")}, {"change": drop("quality"), "steps": 25}], 2),
        ([{"change": drop("quality", "speed", "determinism")}], 1),
        ([{"change": drop("speed")}, {"eta": 0.5}], 2),
        ([{"change": nulls}, {"eta": 0.5, "change": nulls}], 2),
        ([{"change": nan_fd}, {"steps": 25}], 2),
        ([{"fd": -0.01}, {"fd": 0.0, "steps": 25}], 2),
        ([{"eta": e, "steps": 10} for e in (0.0, 0.5, 1.0)], 3),
        ([{}, {}], 2),
        ([{"steps": None, "overrides": []}], 1),
    ],
    ids=[
        "one",
        "holes",
        "no-quality",
        "nothing",
        "no-speed",
        "nulls",
        "nan",
        "negative",
        "equal-steps",
        "twice",
        "no-steps",
    ],
)
def test_unusual_sweeps_are_reported(tmp_path: Path, cells: list[dict[str, Any]], done: int) -> None:
    outputs = Outputs(tmp_path)
    for cell in cells:
        without_steps = "steps" in cell and cell["steps"] is None
        arguments = {**cell, "steps": 10} if without_steps else cell
        named = outputs.add(**arguments)
        if without_steps:
            del named["steps"]
    sweep = outputs.done()
    page = Page(build(sweep))
    assert [row["status"] for row in read_csv(sweep)].count("done") == done
    assert f"{done} of {len(cells)} done" in page.text
    assert (sweep / "table.md").read_text(encoding="utf-8").count("\n## ") >= 1
    json.dumps(page.charts, allow_nan=False)


def test_nan_is_told_not_hidden(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.add(change=nan_fd)
    outputs.add(0.0, 25)
    sweep = outputs.done()
    build(sweep)
    assert read_csv(sweep)[0]["fd"] == "nan"
    assert "[1] η 0, S = 10: the value is nan" in (sweep / "table.md").read_text(encoding="utf-8")


def test_without_quality_the_table_shows_the_times(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for steps in (10, 25):
        outputs.add(0.0, steps, change=drop("quality"), seconds_per_image=0.004)
    sweep = outputs.done()
    build(sweep)
    markdown = (sweep / "table.md").read_text(encoding="utf-8")
    assert "## Milliseconds an image" in markdown
    assert "| η 0 | 4 | 4 |" in markdown


def test_task_tables_and_pictures_are_shown(tmp_path: Path) -> None:
    def extend(result: dict[str, Any]) -> None:
        result["tables"] = [{"title": "Reconstruction", "columns": ["S", "MSE"], "rows": [[10, 0.014], [20, None]]}]
        result["pictures"] = [
            {"title": "good", "file": "strip.png", "caption": "Above: data."},
            {"title": "outside", "file": "../secret.png", "caption": ""},
        ]

    outputs = Outputs(tmp_path)
    outputs.add(change=extend, key="b" * 64)
    picture = io.BytesIO()
    Image.new("L", (32, 8), 200).save(picture, "PNG")
    (outputs.cell("b" * 64) / "strip.png").write_bytes(picture.getvalue())
    (outputs.cell("b" * 64).parent / "secret.png").write_bytes(picture.getvalue())
    page = Page(build(outputs.done()))
    assert "0.014" in page.text
    assert "Above: data." in page.text
    source = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    shown = [attributes for tag, attributes in page.tags if tag == "img" and attributes["src"] == source]
    assert [attributes["alt"] for attributes in shown] == ["η 0, S = 10"]
    assert "good" in page.text
    assert "outside" not in page.text


def test_large_and_damaged_previews(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for steps in range(10, 18):
        outputs.add(1.0, steps, size=128)
    sweep = outputs.done()
    (outputs.cell(rows(read_sweep(sweep))[3]["cell"]) / "preview.png").write_bytes(b"not a picture")
    path = build(sweep)
    page = Page(path)
    assert path.stat().st_size < 3_000_000
    assert "the picture is missing or damaged" in page.text
    assert "preview.png in each cell's folder is exact" in page.text
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 7
    assert sum(map(len, sources)) < 1_500_000
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.width / image.height == 12


@pytest.mark.slow
def test_static_charts_are_pictures(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for eta in (0.0, 1.0):
        for steps in (10, 25, 50):
            outputs.add(eta, steps)
    charts = static_charts(read_sweep(outputs.done()))
    assert set(charts) == {
        "fd_against_steps",
        "fd_against_seconds",
        "time_against_steps",
        "training_curve",
        "time_per_phase",
    }
    for png in charts.values():
        with Image.open(io.BytesIO(png)) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


@pytest.mark.slow
def test_figures_are_the_charts_as_svg(tmp_path: Path) -> None:
    sweep = nine(tmp_path).done()
    assert main([str(sweep), "--figures", str(tmp_path / "figures")]) == 0
    written = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "figures").iterdir()}
    assert set(written) == set(static_charts(read_sweep(sweep)))
    assert all(text.startswith("<svg") for text in written.values())
    assert all("η 0.5" in text for name, text in written.items() if name.startswith("fd_against"))


def test_what_stands_beside_the_frechet_distance(tmp_path: Path) -> None:
    def extend(result: dict[str, Any]) -> None:
        result["measurements"]["quality"].update(kid=0.0123, kid_spread=0.002, precision=0.71, recall=0.52)

    sweep = Outputs(tmp_path)
    sweep.add(change=extend)
    page = Page(build(sweep.done()))
    assert page.values[("kid", 0)] == {"0.0123"}
    assert page.values[("improved_precision", 0)] == {"0.71"}
    assert page.values[("precision", 0)] == {"fp32"}
    assert re.search(r"kernel distance\s*precision\s*recall", page.text)
    assert "± 0.002" in page.text
    assert "Inception Score" not in page.text
    assert "Precision and recall drift with the number of images: compare them at equal N alone." in page.text
    assert 'class="block grid wide">\n<h3>Beside the Fréchet distance' in (sweep.sweep / "report.html").read_text(
        "utf-8"
    )


@pytest.mark.parametrize(
    ("subsets", "size", "said"),
    [
        (100, 1000, "mean over 100 subsets of 1,000 images."),
        (
            100,
            1437,
            "mean over 100 subsets of 1,437 images. All 1,437 samples are in each: its spread is over subsets of the "
            "reference alone.",
        ),
        (1, 1437, "mean over 1 subset of 1,437 images."),
    ],
)
def test_whose_subsets_the_kernel_distance_is_spread_over(tmp_path: Path, subsets: int, size: int, said: str) -> None:
    def extend(result: dict[str, Any]) -> None:
        spread = 0.002 if subsets > 1 else None
        result["measurements"]["quality"].update(
            kid=0.0123, kid_spread=spread, kid_subsets=subsets, kid_subset_size=size
        )

    outputs = Outputs(tmp_path)
    outputs.add(change=extend)
    page = build(outputs.done()).read_text(encoding="utf-8")
    assert f'<p class="quiet">Kernel distance: {said}</p>' in page
    assert "drift with the number of images" not in page


def test_a_series_has_one_colour_everywhere(tmp_path: Path) -> None:
    outputs = nine(tmp_path)
    outputs.add(1.0, 10, sampler="ddpm_large", variance="large", change=drop("quality"))
    charts = sweep_charts(read_sweep(outputs.done()))
    colours: dict[str, set[str]] = {}
    for chart in charts:
        if "against" in chart.name and "against_eta" not in chart.name:
            for key in chart.keys:
                colours.setdefault(key.label, set()).add(key.colour + key.shape)
    assert {label: len(found) for label, found in colours.items()} == {"η 0": 1, "η 0.5": 1, "η 1": 1, "σ̂": 1}
    assert len(set().union(*colours.values())) == 4


# the command


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "no plan.json"),
        ("{", "plan.json is damaged"),
        ("{}", "carries no hash"),
        ('{"schema": 1, "cells": [], "sha256": "0"}', "does not have the content it was written with"),
        ({"schema": 9}, "its schema is 9"),
        ({"schema": 1, "cells": [{}]}, "cells.0.number"),
        ({"schema": 1, "cells": []}, "plans no cell"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: str | dict[str, Any] | None, message: str
) -> None:
    if isinstance(plan, str):
        (tmp_path / "plan.json").write_text(plan, encoding="utf-8")
    elif plan is not None:
        write_record(tmp_path / "plan.json", plan)
    assert main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ddim_lab: ")
    assert err.count("\n") == 1
    assert message in err
    with pytest.raises(ReportError):
        build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if plan is None else ["plan.json"])


# several sweeps


def two(
    root: Path, *, first: dict[str, Any] | None = None, second: Callable[[dict[str, Any]], None] | None = None
) -> list[Path]:
    """Two sweeps, in outputs of their own."""
    folders = []
    for name, change in (("a", None), ("b", second)):
        outputs = Outputs(root / name)
        for steps in (10, 25):
            outputs.add(0.0, steps, change=change)
        folders.append(outputs.done())
    return folders


def on_another_machine(result: dict[str, Any]) -> None:
    result["recipe"]["runtime"]["device_name"] = "H100"
    result["measurements"]["quality"]["fd"] += 0.25


def test_sweeps_stand_beside_each_other(tmp_path: Path) -> None:
    a, b = two(tmp_path, second=on_another_machine)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main([f"cpu={a}", f"gpu={b}", "--output", str(tmp_path / "both")]) == 0
    table = read_csv(tmp_path / "both")
    assert [(row["sweep"], row["steps"], row["number"]) for row in table] == [
        ("cpu", "10", "0"), ("cpu", "25", "1"), ("gpu", "10", "2"), ("gpu", "25", "3")
    ]  # fmt: skip
    assert [row["fd"] for row in table] == [row["fd"] for sweep in (a, b) for row in read_csv_of(sweep)]
    markdown = (tmp_path / "both" / "table.md").read_text(encoding="utf-8")
    assert "| η 0 · cpu |" in markdown
    assert "| η 0 · gpu |" in markdown
    page = Page(tmp_path / "both" / "report.html")
    assert "Comparison of cpu and gpu" in page.text
    assert "H100, fp32" in page.text
    # paired where the same samples were made from the same noise
    assert "η 0 · gpu − η 0 · cpu" in page.text
    assert "Neighbouring rows at the same steps, lower minus upper" in page.text
    assert sorted(set(tmp_path.rglob("*")) - set(before)) == sorted(
        [tmp_path / "both", *(tmp_path / "both" / n for n in ("results.csv", "table.md", "table.tex", "report.html"))]
    )


def test_pairs_that_are_no_neighbours_are_said_to_be_of_one_sweep(tmp_path: Path) -> None:
    sweeps = {}
    for name in ("a", "b"):
        outputs = Outputs(tmp_path / name)
        for eta in (0.0, 1.0):
            outputs.add(eta, 10)
        sweeps[name] = outputs.done()
    assert main([f"{n}={folder}" for n, folder in sweeps.items()] + ["--output", str(tmp_path / "both")]) == 0
    (table,) = shown(join_sweeps({n: read_sweep(f) for n, f in sweeps.items()}, tmp_path))
    labels = [row.series.label for row in table.table.rows]
    found = {(labels.index(c.first), labels.index(c.second)): c.adjacent for c in neighbours(table)}
    assert found == {(0, 1): True, (0, 2): False, (1, 2): True, (1, 3): False, (2, 3): True}
    page = Page(tmp_path / "both" / "report.html")
    assert "Neighbouring rows, and the neighbours among the rows of each sweep, at the same steps" in page.text


def read_csv_of(sweep: Path) -> list[dict[str, Any]]:
    return [{"fd": repr(row["fd"])} for row in rows(read_sweep(sweep))]


def test_times_of_two_machines_share_no_line(tmp_path: Path) -> None:
    a, b = two(tmp_path, second=on_another_machine)
    joined = join_sweeps({"cpu": read_sweep(a), "gpu": read_sweep(b)}, tmp_path)
    fits = timing_fits(joined.cells, joined.series)
    assert [fit.series.label if fit.series else None for fit in fits] == ["η 0 · cpu", "η 0 · gpu"]


def other(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        place = result
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other("recipe", "data", "digest", value="12" * 32), "their data differs: digits (abab"),
        (other("measurements", "quality", "name", value="FID"), "their metric differs"),
        (other("measurements", "quality", "features", value="0" * 64), "their feature network differs"),
        (
            other("measurements", "quality", "reference", value="digits all, n=1797"),
            "their reference statistics differs: digits train, n=1437 against digits all, n=1797",
        ),
        (other("measurements", "quality", "num_samples", value=1000), "their N differs: 1,437 against 1,000"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], None], why: str
) -> None:
    a, b = two(tmp_path, second=change)
    assert main([f"a={a}", f"b={b}", "--output", str(tmp_path / "both")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("ddim_lab: a and b can't be compared: ")
    assert why in err
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["{a}", "{a}"], "two sweeps are called"),
        (["x={a}", "y={a}"], "is given twice"),
        (["x={a}", "x={b}"], "two sweeps are called x"),
        (["{a}", "--output", "{b}/new"], "--output is for a comparison"),
        (["x={a}", "y={b}/nowhere"], "is not a folder"),
    ],
)
def test_sweeps_given_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str
) -> None:
    a, b = two(tmp_path)
    assert main([text.format(a=a, b=b) for text in names]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_sweep_without_a_result_is_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = two(tmp_path)
    outputs = Outputs(tmp_path / "failed")
    outputs.add(status="failed", error="no")
    assert main([f"a={a}", f"b={outputs.done()}"]) == 2
    assert "b has no finished cell" in capsys.readouterr().err


@pytest.mark.slow
def test_command_rebuilds_without_torch(tmp_path: Path) -> None:
    sweep = nine(tmp_path).done()
    code = (
        "import sys; from ddim_lab.report.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sweep)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(sweep / "report.html")
    assert (sweep / "report.html").stat().st_size > 500_000


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = nine(tmp_path).done()
    build(sweep)
    old = (sweep / "report.html").read_bytes()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ReportError, match="disk full"):
        build(sweep)
    assert (sweep / "report.html").read_bytes() == old
    assert not [p for p in sweep.iterdir() if p.name.startswith(".")]
