"""An installed package brings a sampler, a task, a metric and a data set: chosen, checked, keyed, reported like ours.

Each package is installed into the environment of a subprocess: a folder of its own on the path, with the metadata that
pip would have written.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import tiny

import ddim_lab

README = Path(ddim_lab.__file__).parent / "README.md"

TASK = """
from typing import Literal

import torch

from ddim_lab.store.records import Value
from ddim_lab.tasks.base import Outcome, Task
from ddim_lab.tasks.walks import network_in_place, sample_states


class Brightness(Task):
    name: Literal["brightness"]
    scale: float

    def forwards(self, config):
        return config.num_samples * config.forwards

    def identity(self, job):
        return {}

    def measure(self, job, folder, work):
        with network_in_place(job) as network:
            x_0 = sample_states(job, job.sampler, network, job.config.num_samples)
        mean = self.scale * float(x_0.mean())
        value = Value(name="brightness", value=mean, heading="Brightness", facts="mean of x_0, times the scale")
        return Outcome(job.sampler.nfe, f"brightness {mean:.3g}", [value], {})
"""

METRIC = """
from typing import ClassVar

from pydantic import StrictBool

from ddim_lab.metrics.base import Metric, Running
from ddim_lab.store.records import Value


class Contrast(Metric):
    name: ClassVar[str] = "contrast"
    needs_images: ClassVar[bool] = True

    contrast: StrictBool

    @property
    def on(self):
        return self.contrast

    def start(self, comparison):
        return Deviation()


class Deviation(Running):
    def __init__(self):
        self.found = []

    def update(self, batch):
        self.found.append(batch.images.float().flatten(1).std(1))

    def compute(self, vectors):
        import torch

        values = torch.cat(self.found)
        return [
            Value(
                name="contrast",
                value=float(values.mean()),
                heading="Contrast",
                facts="standard deviation of an image's grey levels",
                se=float(values.std() / len(values) ** 0.5),
                error="over images",
                count=len(values),
            )
        ]
"""

DATA = """
from typing import Literal

from ddim_lab.data.base import DataSet


class Stripes(DataSet):
    name: Literal["stripes"]
    period: Literal[2, 4]

    @property
    def shape(self):
        return 1, 8, 8

    def find(self):
        return ()

    def load(self, files):
        import torch

        from ddim_lab.data.images import ImageData, MemoryImages

        rows = torch.arange(8).div(self.period / 2, rounding_mode="floor") % 2
        images = (rows[:, None] * torch.arange(50, 250).view(-1, 1, 1, 1)).expand(-1, 1, 8, 8).to(torch.uint8)
        labels = torch.arange(len(images)) % 2
        split = MemoryImages(images[:160], labels[:160]), MemoryImages(images[160:], labels[160:])
        return ImageData("stripes", *split, preprocessing=f"stripes of {self.period}")
"""

YAML = {
    "task/brightness.yaml": "name: brightness\nscale: 2.0\n",
    "metrics/contrast.yaml": "defaults: [default]\ncontrast: true\n",
    "data/stripes.yaml": "name: stripes\nroot: null\nnum_samples: 40\nperiod: 4\n",
    "model/stripes.yaml": "kind: gaussian\n",
    "training/stripes.yaml": "defaults: [default]\nmax_steps: 10\nwarmup_steps: 1\n",
}


def example() -> tuple[str, str, str]:
    """The Python, YAML and entry points of README's sampler."""
    text = README.read_text(encoding="utf-8")
    page = text[text.index("<!-- plug-in -->") : text.index("<!-- end of the plug-in -->")]
    python, yaml, toml = re.findall(r"```\w+\n(.*?)```", page, flags=re.DOTALL)
    return python, yaml, toml


def install(
    site: Path, name: str, files: Mapping[str, str], entry_points: Mapping[str, str], version: str = "0.1"
) -> None:
    """Put a package where Python finds it, with the metadata that an installer writes."""
    for file, text in files.items():
        path = site / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metadata = site / f"{name}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups: dict[str, list[str]] = {}
    for point, target in entry_points.items():
        group, _, key = point.partition(":")
        groups.setdefault(group, []).append(f"{key} = {target}")
    lines = [line for group, entries in groups.items() for line in (f"[{group}]", *entries)]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def command(site: Path, *arguments: str, module: str = "ddim_lab") -> subprocess.CompletedProcess[str]:
    """`python -m MODULE` where the packages in `site` are installed."""
    path = os.pathsep.join([str(site), str(Path(ddim_lab.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=site, check=False)


ANSWERS = """
import contextlib, io, json, sys
from ddim_lab.__main__ import main

for line in json.loads(sys.argv[1]):
    sys.argv = ["ddim_lab", *line]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def answers(site: Path, *lines: Sequence[str]) -> list[tuple[int, str, str]]:
    """Several command lines in one process: exit status, stdout and stderr of each."""
    path = os.pathsep.join([str(site), str(Path(ddim_lab.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", ANSWERS, json.dumps(lines)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=site, check=True)
    return [tuple(json.loads(answer)) for answer in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages: README's sampler, and one that brings a task, a metric and a data set."""
    site = tmp_path_factory.mktemp("site")
    python, yaml, toml = example()
    points = dict(re.findall(r'^(\w+) = "(.*)"$', toml, flags=re.MULTILINE))
    assert points == {"thresholded": "thresholded:Thresholded"}
    files = {"__init__.py": python, "conf/sampler/thresholded.yaml": yaml}
    install(site, "thresholded", files, {"ddim_lab.samplers:thresholded": points["thresholded"]})
    code = {"__init__.py": "", "task.py": TASK, "metric.py": METRIC, "data.py": DATA}
    brought = {
        "ddim_lab.tasks:brightness": "rest.task:Brightness",
        "ddim_lab.metrics:contrast": "rest.metric:Contrast",
        "ddim_lab.data:stripes": "rest.data:Stripes",
    }
    install(site, "rest", {**code, **{f"conf/{name}": text for name, text in YAML.items()}}, brought)
    return site


@pytest.fixture(scope="module")
def outputs(site: Path) -> Path:
    """Nine cells: the sampler on the data set, scored by the metric; then the task; then what task=order says of it."""
    line = ("data=stripes", "metrics=contrast", "metrics.features=pixels", "logger=csv", "batch_size=20")
    swept = ("sampler=thresholded", "sampler.quantile=0.9,0.95,0.99", "steps=3,5,8", "-m")
    instrument = ("task=order", "sampler=thresholded", "task.steps=[10,50,100,200]", "logger=csv")
    for status, _, printed in answers(
        site,
        (*line, *swept, "hydra.sweep.dir=outputs/sweeps/nine"),
        (*line[:1], *line[2:], "task=brightness", "steps=3,5", "-m", "hydra.sweep.dir=outputs/sweeps/task"),
        (*instrument, "-m", "hydra.sweep.dir=outputs/sweeps/order"),
    ):
        assert status == 0, printed
    return site / "outputs"


@pytest.mark.slow
def test_nine_cells_of_a_sampler_from_outside(outputs: Path) -> None:
    rows = tiny.results(outputs / "sweeps" / "nine")
    assert len({row["cell"] for row in rows}) == 9
    assert {(row["status"], row["data"], row["sampler"]) for row in rows} == {("done", "stripes", "thresholded")}
    assert all(float(row["fd"]) > 0 and float(row["contrast"]) > 0 and float(row["contrast_se"]) >= 0 for row in rows)
    table = (outputs / "sweeps" / "nine" / "table.md").read_text(encoding="utf-8")
    assert "## Contrast" in table
    assert "| thresholded" in table  # no row is called "η 0", which is DDIM
    assert "η 0" not in table
    assert "standard deviation of an image's grey levels" in table
    brightness = tiny.results(outputs / "sweeps" / "task")
    assert [row["status"] for row in brightness] == ["done", "done"]
    assert all(row["brightness"] for row in brightness)
    (order,) = tiny.results(outputs / "sweeps" / "order")
    assert order["checks_failed"] == "0"
    assert "order_claimed" not in order
    assert float(order["order"]) < 0.5  # with its thresholds it comes to other images than the ODE's
    # what is installed and not asked for moves no key
    plain = json.loads((outputs / "cells" / brightness[0]["cell"] / "result.json").read_text())
    assert "contrast" not in plain["recipe"]["metrics"]
    assert {entry["kind"] for entry in plain["identity"]["plugins"]} == {"task", "data"}


@pytest.mark.slow
def test_package_version_and_files_are_in_the_key(site: Path, outputs: Path) -> None:
    cell = tiny.results(outputs / "sweeps" / "nine")[0]["cell"]
    result = json.loads((outputs / "cells" / cell / "result.json").read_text())
    found = {entry["kind"]: entry for entry in result["identity"]["plugins"]}
    assert set(found) == {"sampler", "metric", "data"}
    assert (found["sampler"]["package"], found["sampler"]["version"]) == ("thresholded", "0.1")
    assert re.fullmatch(r"[0-9a-f]{64}", found["sampler"]["sha256"])
    assert result["identity"]["sampler"]["formula"] == {"name": "thresholded", "quantile": 0.9}
    # the same command finds its cell; another line in the package's file is another cell, whatever its version
    line = ("data=stripes", "metrics=contrast", "metrics.features=pixels", "logger=csv", "batch_size=20")
    again = (*line, "sampler=thresholded", "sampler.quantile=0.9", "steps=3", "outputs_dir=outputs")
    assert "(was there)" in command(site, *again).stderr
    file = site / "thresholded" / "__init__.py"
    before = file.read_text()
    file.write_text(before + "# another line\n")
    try:
        done = command(site, *again)
    finally:
        file.write_text(before)
    assert done.returncode == 0, done.stderr
    assert "(was there)" not in done.stderr


@pytest.mark.slow
def test_it_shows_in_help_and_is_checked_like_ours(site: Path) -> None:
    refused = {
        ("sampler=thresholded", "sampler.quantile=2"): "sampler.quantile=2: must be below 1",
        ("sampler=thresholded", "sampler.quantil=0.9"): "sampler.quantil: there is no such option",
        ("data=stripes", "data.period=3"): "data.period=3: must be 2 or 4",
        ("sampler=thresholded", "task=reconstruct"): "task=reconstruct is for the DDIM family",
    }
    (_, text, _), *refusals = answers(site, ("--help",), *refused)
    for group, name in (
        ("sampler", "thresholded"),
        ("task", "brightness"),
        ("metrics", "contrast"),
        ("data", "stripes"),
    ):
        assert re.search(rf"^{group}: .*\b{name}\b", text, flags=re.MULTILINE), group
    for (status, _, printed), said in zip(refusals, refused.values(), strict=True):
        assert status == 2, printed
        assert said in printed
        assert printed.count("\n") == 1


@pytest.mark.slow
def test_finished_files_are_read_without_the_packages(outputs: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    sweep = outputs / "sweeps" / "nine"
    before = (sweep / "results.csv").read_bytes()
    done = command(nothing, str(sweep), module="ddim_lab.report")
    assert done.returncode == 0, done.stderr
    assert (sweep / "results.csv").read_bytes() == before
    done = command(nothing, "verify", "--outputs-dir", str(outputs), module="ddim_lab.store")
    assert (done.returncode, done.stdout.split()[-2:]) == (0, ["0", "damaged"])


BROKEN = {
    "a name of ours": (
        {"__init__.py": "", "conf/sampler/ddim.yaml": "name: ddim\n"},
        {"ddim_lab.samplers:mine": "broken:Mine"},
        (),
        "the package broken brings conf/sampler/ddim.yaml, which is a name of ours",
    ),
    "a task of ours": (
        {"__init__.py": ""},
        {"ddim_lab.tasks:generate": "broken:Mine"},
        (),
        "the package broken brings task=generate, which is a name of ours",
    ),
    "another group": (
        {"__init__.py": "", "conf/hydra/launcher/x.yaml": "_target_: os.system\n"},
        {"ddim_lab.samplers:mine": "broken:Mine"},
        (),
        "the package broken brings conf/hydra/launcher/x.yaml: it may add choices to",
    ),
    "it can't be imported": (
        {"__init__.py": "import nowhere_to_be_found\n", "conf/task/mine.yaml": "name: mine\n"},
        {"ddim_lab.tasks:mine": "broken:Mine"},
        ("task=mine",),
        "task=mine: the package broken is broken: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ),
    "no class of the kind": (
        {"__init__.py": "Mine = 3\n", "conf/task/mine.yaml": "name: mine\n"},
        {"ddim_lab.tasks:mine": "broken:Mine"},
        ("task=mine",),
        "task=mine: the package broken is broken: broken:Mine is no TaskOptions that can be used",
    ),
    "a file names code that nobody installed": (
        {"__init__.py": "", "conf/sampler/mine.yaml": "name: mine\nformula: os.system\n"},
        {"ddim_lab.samplers:mine": "broken:Mine"},
        ("sampler=mine",),
        "sampler=os.system: there is no such sampler",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    files, points, arguments, said = BROKEN[case]
    install(tmp_path, "broken", files, points)
    done = command(tmp_path, *arguments, "logger=csv")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_two_packages_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        install(tmp_path, name, {"__init__.py": ""}, {"ddim_lab.tasks:mine": f"{name}:Mine"})
    done = command(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "both bring task=mine" in done.stderr
