"""What outputs are found by and what reports say of them stays as it was: names, columns and numbers, literally.

Who has outputs of an earlier version keeps them: its cells are found again, its models are not trained anew, its
reports are built with the same numbers. What is pinned here changes on purpose alone, with a version raised in keys.

`pins/outputs` is an outputs folder that an earlier version wrote, on a CPU of one thread called "pinned CPU"; of its
references the largest is left out.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

from ddim_lab.metrics.base import BY_INFLUENCE
from ddim_lab.metrics.speed import OF_STEPS

PINS = Path(__file__).parent / "pins"
KEYS = json.loads((PINS / "keys.json").read_text())
SWEEPS = ("quality", "tasks", "holes", "speed", "search")
LIBRARIES = {"torch": "pinned", "cuda": None, "cudnn": None}

# -- the project, as it is now: all that moves with its modules ------------------------------------------


def same_machine(patch: pytest.MonkeyPatch) -> None:
    """One CPU with one thread and one set of libraries, whatever this is: they are part of keys."""
    patch.setattr("ddim_lab.device.runtime._cpu_name", lambda: "pinned CPU")
    patch.setattr(torch, "get_num_threads", lambda: 1)
    for task in ("benchmark", "precision", "speed_peers"):
        patch.setattr(f"ddim_lab.tasks.{task}.timed_libraries", lambda: LIBRARIES)
    patch.setattr(diffusers, "__version__", "pinned")
    version = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "pinned" if name == "optuna" else version(name))


def without_training(patch: pytest.MonkeyPatch) -> None:
    """What would be trained is filled by a formula: trained weights, which keys hold digests of, differ by machine."""
    from ddim_lab.models.unet import build_unet

    def train(config: Any, data: Any, runtime: Any, work: Path, folder: Path, send: Any, rank: int = 0) -> None:
        for number, place in enumerate((folder, folder / "raw")):
            filled(build_unet(config.model, data.shape), number).save_pretrained(place)

    patch.setattr("ddim_lab.models.obtain._train", train)
    patch.setattr("ddim_lab.metrics.training.train_classifier", lambda network, data, recipe: 0.5)
    patch.setattr("ddim_lab.metrics.classifier.save_file", lambda tensors, path: path.write_bytes(b"a classifier"))


def rounded_schedules(patch: pytest.MonkeyPatch) -> None:
    """Schedules go by nine digits of their betas: a cosine's last one differs by machine."""
    from ddim_lab.schedule import NoiseSchedule

    def digest(schedule: NoiseSchedule) -> str:
        return hashlib.sha256(" ".join(f"{beta:.8e}" for beta in schedule.betas).encode()).hexdigest()

    patch.setattr(NoiseSchedule, "digest", property(digest))


def job_of(outputs: Path, overrides: Sequence[str]) -> Any:
    """One job as the harness makes it, its model there."""
    from ddim_lab.data.base import load_data, without_images
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.models.obtain import obtain_model, with_batch_size
    from ddim_lab.store import Store
    from ddim_lab.tasks.base import Job

    config = tiny.configure("runtime.device=cpu", f"outputs_dir={outputs}", *overrides)
    data = load_data(config.data) if config.needs_images else without_images(config.data)
    runtime, store = Runtime.resolve(config.runtime), Store(outputs)
    model = obtain_model(config, data, runtime, store, lambda: contextlib.nullcontext(lambda values, step: None))
    return Job(with_batch_size(config, runtime), data, model, runtime, store, "")


def cell_key(outputs: Path, overrides: Sequence[str]) -> str:
    """The name of a job's cell, under outputs/cells."""
    from ddim_lab.jobs.run import _identity
    from ddim_lab.store import content_key

    return content_key(_identity(job_of(outputs, overrides)))


def fingerprint(outputs: Path, overrides: Sequence[str]) -> str:
    """The name of a job's trained model, under outputs/models."""
    from ddim_lab.data.base import load_data
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.models.obtain import training_recipe
    from ddim_lab.store import content_key

    config = tiny.configure("runtime.device=cpu", *overrides)
    return content_key(training_recipe(config, load_data(config.data), Runtime.resolve(config.runtime)))


def reference_key(outputs: Path, overrides: Sequence[str]) -> str:
    """What identifies the real images' statistics that a job compares with."""
    from ddim_lab.metrics.references import reference_of

    job = job_of(outputs, ["model=gaussian", *overrides])
    return reference_of(job.config.metrics, job.features[0], job.data)


def reference_names(outputs: Path, overrides: Sequence[str]) -> list[str]:
    """The names, under outputs/references, of a job's statistics and of its held-out images'; both are computed."""
    from ddim_lab.metrics.references import obtain_held_out, obtain_reference

    job = job_of(outputs, ["model=gaussian", *overrides])
    metrics, count = job.config.metrics, job.config.num_samples
    keep = metrics.needs_vectors(job.config.metrics.networks[0].name)
    obtain_reference(job.features[0], job.data, metrics.reference, job.store, keep_features=keep)
    if metrics.reference == "train":
        obtain_held_out(job.features[0], job.data, job.store, count=count)
    return sorted(key for kind, key in job.store.used if kind == "references")


def build_report(sweep: Path) -> int:
    """`python -m ddim_lab.report SWEEP`; its exit status."""
    from ddim_lab.report.__main__ import main

    return main([str(sweep)])


def verify(outputs: Path) -> int:
    """`python -m ddim_lab.store verify`; its exit status."""
    from ddim_lab.store.__main__ import main

    return main(["verify", "--outputs-dir", str(outputs)])


def record(path: Path) -> dict[str, Any]:
    """A record that carries its own hash, checked."""
    from ddim_lab.store import read_record

    return read_record(path)


# -- keys ------------------------------------------------------------------------------------------------

EXACT = ("model=gaussian", "metrics.features=pixels")
BARE = ("model.weights=random", "model.block_out_channels=[8,8]")
LIST = "sampler.timesteps=[10,100,400,999]"

DIGITS_THEN = (
    "model.block_out_channels=[32,32]",
    "training.max_steps=1500",
    "training.batch_size=128",
    "training.timesteps=uniform",
    "training.learning_rate=2.0e-3",
    "training.warmup_steps=100",
    "training.ema_decay=0.995",
)
"""The recipe of `digits` when the keys were pinned."""

CELLS: dict[str, tuple[str, ...]] = {
    "generate": EXACT,
    "generate, empirical": ("model=empirical", "metrics.features=pixels"),
    "generate, trained": (*DIGITS_THEN, "metrics.features=pixels"),
    "generate, trained, batch 256": (*DIGITS_THEN, "metrics.features=pixels", "batch_size=256"),
    "generate, trained, raw weights": (*DIGITS_THEN, "metrics.features=pixels", "model.weights=raw"),
    "generate, trained, other seed": (*DIGITS_THEN, "metrics.features=pixels", "num_samples=100", "seed=3"),
    "generate, pretrained": ("model=pretrained", "model.path={checkpoint}", "metrics.features=pixels"),
    "generate, classifier": ("model=gaussian", "metrics.features=classifier"),
    "generate, two networks": ("model=gaussian",),
    "generate, ddpm": (*EXACT, "sampler=ddpm", "steps=10"),
    "generate, ddpm_large": (*EXACT, "sampler=ddpm_large", "steps=10"),
    "generate, eta 0.5": (*EXACT, "sampler.eta=0.5", "steps=20"),
    "generate, quadratic": (*EXACT, "sampler.spacing=quadratic", "steps=20"),
    "generate, trailing": (*EXACT, "sampler.spacing=trailing", "steps=20"),
    "generate, a list": (*EXACT, LIST),
    "generate, clip x0": (*EXACT, "sampler.clip=x0"),
    "generate, scaled_linear": (*EXACT, "schedule=scaled_linear"),
    "generate, other numbers": (*EXACT, "seed=7", "num_samples=123", "batch_size=32"),
    "generate, batch auto": (*EXACT, "batch_size=auto"),
    "generate, held_out": (*EXACT, "metrics.reference=held_out"),
    "generate, all": (*EXACT, "metrics.reference=all"),
    "generate, statistics": (*EXACT, "metrics.reference_statistics={statistics}"),
    "generate, kid off": (*EXACT, "metrics.kid=false"),
    "generate, metrics": (*EXACT, "metrics.neighbours=5", "metrics.speed_repeats=2", "metrics.precision_recall=false"),
    "generate, deterministic": (*EXACT, "runtime.deterministic=true"),
    "generate, reference runtime": (*EXACT, "runtime=deterministic"),
    "generate, bf16": (*EXACT, "runtime.precision=bf16", "runtime.keep_fp32=[edges,norms]"),
    "reconstruct": (*EXACT, "task=reconstruct"),
    "reconstruct, target": (*EXACT, "task=reconstruct", "task.at=target", "num_samples=40"),
    "interpolate": (*EXACT, "task=interpolate"),
    "consistency": (*EXACT, "task=consistency"),
    "consistency, classifier": (
        "model=gaussian",
        "metrics.features=classifier",
        "task=consistency",
        "task.many_steps=100",
    ),
    "trajectory": (*EXACT, "task=trajectory", "task.columns=5"),
    "cannot_skip": (*EXACT, "task=cannot_skip", "sampler=ddpm", "steps=10"),
    "cannot_skip, cumulative": (*EXACT, "task=cannot_skip", "task.alphas=cumulative", "sampler=ddpm", "steps=10"),
    "search_timesteps": (*EXACT, "task=search_timesteps", "steps=5"),
    "search_timesteps, classifier": (
        *("model=gaussian", "task=search_timesteps", "task.search_features=pixels", "metrics.features=classifier"),
    ),
    "benchmark": (*BARE, "task=benchmark"),
    "benchmark, pretrained": ("model=pretrained", "model.path={checkpoint}", "task=benchmark"),
    "speed_peers": (*BARE, "task=speed_peers"),
    "precision": (*EXACT, "task=precision"),
    "precision, bf16": (*EXACT, "task=precision", "runtime.precision=bf16", "runtime.keep_fp32=[edges]"),
    "precision, bf16 as a CPU has it": (*EXACT, "task=precision", "runtime.precision=bf16"),
}

TRAININGS: dict[str, tuple[str, ...]] = {
    "digits": DIGITS_THEN,
    "other weights of the same": (
        *DIGITS_THEN,
        "model.weights=raw",
        "training.checkpoint_every=7",
        "sampler=ddpm",
        "seed=5",
    ),
    "training.seed=1": (
        *DIGITS_THEN,
        "training.seed=1",
    ),
    "training.max_steps=100": (*DIGITS_THEN, "training.max_steps=100", "training.batch_size=32"),
    "bf16": (
        *DIGITS_THEN,
        "training.precision=bf16",
    ),
    "two ranks": (
        *DIGITS_THEN,
        "training.devices=2",
    ),
    "scaled_linear": (
        *DIGITS_THEN,
        "schedule=scaled_linear",
    ),
    "wider": (*DIGITS_THEN, "model.block_out_channels=[16,32]", "model.attention=[false,true]", "model.dropout=0.1"),
}

REFERENCES: dict[str, tuple[str, ...]] = {
    "pixels, train": ("metrics.features=pixels",),
    "pixels, held_out": ("metrics.features=pixels", "metrics.reference=held_out"),
    "pixels, all": ("metrics.features=pixels", "metrics.reference=all"),
    "pixels, statistics": ("metrics.features=pixels", "metrics.reference_statistics={statistics}"),
    "classifier, train": ("metrics.features=classifier",),
    "classifier, all": ("metrics.features=classifier", "metrics.reference=all"),
}

KEPT: dict[str, tuple[str, ...]] = {
    "vectors and level": ("metrics.features=pixels", "num_samples=40"),
    "level at other N": ("metrics.features=pixels", "num_samples=100"),
    "no vectors": (
        *("metrics.features=pixels", "num_samples=40"),
        *("metrics.mmd=false", "metrics.kid=false", "metrics.precision_recall=false"),
        *("metrics.density_coverage=false", "metrics.memorisation=false"),
    ),
    "all": ("metrics.features=pixels", "metrics.reference=all"),
}


def filled(network: torch.nn.Module, number: int = 0) -> Any:
    """The network with weights that are the same on every machine: a hash of their position, around 0."""
    with torch.no_grad():
        for name, tensor in sorted(network.state_dict().items()):
            start = int(hashlib.sha256(f"{name} {number}".encode()).hexdigest()[:6], 16)
            positions = torch.arange(tensor.numel(), dtype=torch.int64) + start
            tensor.copy_(((positions * 40503 % 65536).float() / 65536.0 - 0.5).view(tensor.shape) / 8.0)
    return network


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that configurations name: a checkpoint in diffusers' format, and statistics of pixels."""
    folder = tmp_path_factory.mktemp("given")
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=None,
    )
    filled(network).save_pretrained(folder / "checkpoint")
    diffusers.DDPMScheduler().save_pretrained(folder / "checkpoint")
    np.savez(folder / "statistics.npz", mu=np.arange(64) / 64.0, sigma=np.diag(1.0 + np.arange(64) / 64.0))
    return {"checkpoint": folder / "checkpoint", "statistics": folder / "statistics.npz"}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty outputs folder on the pinned machine, where nothing is trained."""
    with pytest.MonkeyPatch.context() as patch:
        same_machine(patch)
        without_training(patch)
        yield tmp_path_factory.mktemp("keys") / "outputs"


def placed(overrides: Sequence[str], given: dict[str, Path]) -> list[str]:
    return [text.format_map(given) if "={" in text else text for text in overrides]


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_keeps_its_key(name: str, outputs: Path, given: dict[str, Path]) -> None:
    assert cell_key(outputs, placed(CELLS[name], given)) == KEYS["cells"][name]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_keeps_its_fingerprint(name: str, outputs: Path) -> None:
    assert fingerprint(outputs, TRAININGS[name]) == KEYS["fingerprints"][name]


def test_a_training_on_a_cosine_schedule_keeps_its_fingerprint(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_schedules(monkeypatch)
    assert fingerprint(outputs, [*DIGITS_THEN, "schedule=cosine"]) == KEYS["fingerprints"]["cosine, rounded"]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_keeps_its_key(name: str, outputs: Path, given: dict[str, Path]) -> None:
    assert reference_key(outputs, placed(REFERENCES[name], given)) == KEYS["references"][name]


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_of_a_reference_keeps_its_names(name: str, outputs: Path) -> None:
    assert reference_names(outputs, KEPT[name]) == KEYS["reference_objects"][name]


def test_trained_networks_lie_where_they_did(tmp_path: Path, outputs: Path) -> None:
    """The eps-model's folder and the classifier's, of what was the default configuration."""
    job = job_of(tmp_path, DIGITS_THEN)
    assert [features.name for features in job.features] == ["FD (digits pixels)", "FD (digits classifier)"]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == KEYS["models"]


# -- outputs of an earlier version -----------------------------------------------------------------------

CONTRACT = [
    *("data", "model", "sampler", "eta", "variance", "spacing", "clip", "steps", "nfe", "num_samples", "batch_size"),
    *("seed", "training_seed", "weights", "fd", "fd_se", "fd_features", "fd_reference", "images_per_second"),
    *("seconds_per_image", "forward_share", "peak_memory", "repeat_max_abs_diff", "repeat_identical"),
    *("noise_variance", "sha256", "precision", "device", "status", "cell"),
]
"""Columns that results.csv always has, first and in this order; noise_variance_se may stand anywhere."""


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored outputs, on the machine that made them."""
    same_machine(monkeypatch)
    return Path(shutil.copytree(PINS / "outputs", tmp_path / "outputs"))


def table(text: str) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a CSV file."""
    reader = csv.DictReader(io.StringIO(text))
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def check_columns(header: Sequence[str]) -> None:
    columns = [name for name in header if name != "noise_variance_se"]
    assert columns[: len(CONTRACT)] == CONTRACT
    assert set(columns[len(CONTRACT) :]) <= set(KEYS["columns"])


def cells_of_tables(markdown: str) -> list[list[str]]:
    """The cells of every row of every table, its heads included; not the words between tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [line.strip("|").split("|") for line in lines if not re.fullmatch(r"[|:-]+", line)]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("name", SWEEPS)
def test_the_report_has_the_same_columns_and_numbers(name: str, earlier: Path) -> None:
    sweep = earlier / "sweeps" / name
    assert build_report(sweep) == 0
    header, rows = table((sweep / "results.csv").read_text())
    check_columns(header)
    _, pinned = table((PINS / f"results_{name}.csv").read_text())
    valued = {column for row in pinned for column, value in row.items() if value}
    assert valued <= set(header)
    assert rows == [{column: row[column] for column in header} for row in pinned]
    text, before = (sweep / "table.md").read_text(), (PINS / f"table_{name}.md").read_text()
    assert cells_of_tables(text) == cells_of_tables(before)
    assert (sweep / "report.html").is_file()


def test_every_stored_object_and_record_is_whole(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(earlier) == 0
    assert capsys.readouterr().out.endswith(" verified, 0 damaged\n")
    assert not list(earlier.rglob("*.damaged-*"))


def again(outputs: Path, name: str, *more: str) -> Path:
    """The command that made a stored sweep, into a new sweep of the same outputs; the new sweep's folder."""
    words = shlex.split(record(outputs / "sweeps" / name / "plan.json")["command"])[3:]
    kept = [word for word in words if not word.startswith(("outputs_dir=", "hydra.sweep.dir="))]
    before = set((outputs / "sweeps").iterdir())
    assert tiny.run(outputs, *kept, *more, settings=()) == 0
    (sweep,) = set((outputs / "sweeps").iterdir()) - before
    return sweep


def pointers(sweep: Path) -> list[dict[str, Any]]:
    found = sorted(sweep.glob("jobs/*/pointer.json"), key=lambda path: int(path.parent.name))
    return [record(path) for path in found]


@pytest.mark.parametrize("name", ["tasks", "speed", "search"])
def test_the_same_command_finds_every_cell(name: str, earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "search":
        pytest.importorskip("optuna")

    def no_forward(module: torch.nn.Module, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was called: something is computed again")

    monkeypatch.setattr(torch.nn.Module, "__call__", no_forward)
    before = pointers(earlier / "sweeps" / name)
    more = []
    if name == "tasks":  # `consistency` has another option in its key now, and the errors of `precision` are others
        before = [before[number] for number in (0, 2, 3)]
        more = ["task=reconstruct,interpolate,trajectory"]
    found = pointers(again(earlier, name, *more))
    assert [pointer["cell"] for pointer in found] == [pointer["cell"] for pointer in before]
    assert all(pointer["cached"] for pointer in found)
    assert [pointer["objects"] for pointer in found] == [pointer["objects"] for pointer in before]


def test_a_cell_that_is_computed_again_has_the_same_network_and_numbers(earlier: Path) -> None:
    """The stored network is used; others round otherwise, so numbers agree nearly; errors are taken otherwise."""
    others = ("training.timesteps", "training.learning", "training.ema")
    then = [word for word in DIGITS_THEN if word.startswith(others)]
    sweep = again(earlier, "quality", "sampler=ddpm", "steps=5", "force=true", *then)
    (pointer,), before = pointers(sweep), pointers(earlier / "sweeps" / "quality")[3]
    assert not pointer["cached"]
    assert pointer["cell"] != before["cell"]
    models, known = ([each for each in of["objects"] if each[0] == "models"] for of in (pointer, before))
    assert models == known
    (row,), pinned = tiny.results(sweep), table((PINS / "results_quality.csv").read_text())[1][3]
    for column in ("fd", "kid", "fd_at_equal_n", "fd_held_out_at_equal_n"):
        assert float(row[column]) == pytest.approx(float(pinned[column]), rel=1e-2), column
    assert 0.4 < float(row["fd_se"]) / float(pinned["fd_se"]) < 1.2


FEWER = "The two batch sizes: 20 and 8."
"""What determinism is measured on: 16 or 10 images then, 8 now, a fifth of what is sampled."""

WORDS = (
    *("heading", "facts", "section", "table", "column", "label", "against", "unit", "better", "count", "counted"),
    *("level", "level_says", "level_as", "akin", "notes"),
)


@pytest.mark.parametrize(("name", "more"), [("quality", ("sampler=ddpm", "steps=5")), ("tasks", ())])
def test_values_say_what_those_of_schema_1_are_read_as(name: str, more: tuple[str, ...], earlier: Path) -> None:
    """A cell of schema 1 is read into Values by one module; what tasks and metrics say now is the same, and more."""
    before = [told(earlier, pointer["cell"]) for pointer in pointers(earlier / "sweeps" / name)]
    sweep = again(earlier, name, *more, "force=true")
    for pointer, earlier_words in zip(pointers(sweep), before[-1:] if more else before, strict=True):
        now = told(earlier, pointer["cell"])
        assert set(earlier_words) - set(now) <= {"timesteps"}
        for value, words in earlier_words.items():
            known = {word: text for word, text in words.items() if text not in (None, "")}
            known["notes"] = [*words["notes"], *([OF_STEPS] if OF_STEPS in now[value]["notes"] else [])]
            now[value]["notes"] = list(now[value]["notes"])
            if value == "forward_share" or FEWER in now[value]["notes"]:  # the share is taken in the walk now
                known = {word: text for word, text in known.items() if word not in {"notes", "count"}}
            if BY_INFLUENCE in now[value].get("error", ""):  # it was by the jackknife
                known.pop("error")
            if value == "fd" and "facts" in known:  # and says what it sees
                assert now[value]["facts"].startswith(known.pop("facts"))
            assert {word: now[value][word] for word in known} == known, value


def told(outputs: Path, cell: str) -> dict[str, dict[str, Any]]:
    """The words of each value of a cell."""
    from ddim_lab.store.records import Result

    values = Result.read(json.loads((outputs / "cells" / cell / "result.json").read_text())).values
    found = {value.name: {word: getattr(value, word) for word in WORDS} for value in values}
    for value in values:
        if (value.heading or value.column) and (value.se is not None or value.spread is not None):
            found[value.name]["error"] = value.error
    return found
