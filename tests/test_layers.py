"""Imports point down only, and the mathematics needs neither a framework nor files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

import ddim_lab

PACKAGE = Path(ddim_lab.__file__).parent

# module -> what it may import besides the standard library
MATHEMATICS = {
    "schedule": {"numpy"},
    "transitions": {"ddim_lab.schedule"},
    "diffusion": {"torch", "ddim_lab.transitions"},
    "noise": {"torch"},
    "labels": {"torch", "ddim_lab.noise"},
    "sampler": {
        *("torch", "ddim_lab.diffusion", "ddim_lab.labels", "ddim_lab.noise", "ddim_lab.schedule"),
        "ddim_lab.transitions",
    },
    "singlestep": {"torch", "ddim_lab.sampler", "ddim_lab.schedule", "ddim_lab.transitions"},
    "multistep": {
        *("numpy", "torch", "ddim_lab.diffusion", "ddim_lab.sampler", "ddim_lab.schedule", "ddim_lab.singlestep"),
        "ddim_lab.transitions",
    },
    "pndm": {
        *("torch", "ddim_lab.sampler", "ddim_lab.schedule", "ddim_lab.singlestep", "ddim_lab.multistep"),
        "ddim_lab.transitions",
    },
    "analytic": {"torch", "ddim_lab.diffusion", "ddim_lab.schedule"},
    "interpolate": {"torch", "ddim_lab.diffusion"},
}


# From the mathematics to the commands: a room imports from itself and from those before it.
LAYERS = (
    "schedule transitions diffusion noise labels sampler singlestep multistep pndm analytic interpolate errors console",
    "schedulers",
    "store config",
    "device data",
    "models metrics",
    "conventions",
    "tasks",
    "report",
    "jobs",
    "score audit convert dashboard __main__",
)


def module_name(file: Path) -> str:
    parts = ["ddim_lab", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Every module imported anywhere in the file, inside functions too; relative imports are not used here."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            if node.module == "ddim_lab":
                found |= {f"ddim_lab.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


def root(module: str) -> str:
    return module if module.startswith("ddim_lab") else module.partition(".")[0]


@pytest.mark.parametrize("name", MATHEMATICS)
def test_mathematics_imports_downwards_only(name: str) -> None:
    found = {root(module) for module in imports(PACKAGE / f"{name}.py")}
    assert found - set(sys.stdlib_module_names) - {"__future__"} <= MATHEMATICS[name]


def test_the_package_itself_imports_nothing() -> None:
    assert imports(PACKAGE / "__init__.py") <= {"__future__"}


def below_each() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, those inside functions included."""
    files = {module_name(file): file for file in PACKAGE.rglob("*.py") if "conf" not in file.parts}
    return {name: {m for m in imports(file) if m in files and m != name} for name, file in files.items()}


def test_layers_import_downwards_only() -> None:
    """A module that is new has to be given its place."""
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
    below = below_each()
    placed = {module: layer.get(module.split(".")[1]) for module in below if module != "ddim_lab"}
    assert [module for module, depth in placed.items() if depth is None] == []
    upwards = [
        f"{module} imports {needed}"
        for module, depth in placed.items()
        for needed in below[module] - {"ddim_lab"}
        if placed[needed] > depth  # type: ignore[operator]
    ]
    assert upwards == []


def test_there_is_no_circle_of_imports() -> None:
    below = below_each()
    ordered: set[str] = set()
    while len(ordered) < len(below):
        ready = {name for name, needs in below.items() if name not in ordered and needs <= ordered}
        assert ready, f"a circle among {sorted(set(below) - ordered)}"
        ordered |= ready


def loaded_by(*codes: str) -> list[set[str]]:
    """What a process has loaded after each of these, one after the other."""
    script = "import sys\n" + "\n".join(f"{code}\nprint(*sys.modules)" for code in codes)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [{name.partition(".")[0] for name in line.split()} for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_no_import_brings_what_it_does_not_need() -> None:
    """One process, from the mathematics up: what is not there at the end was not there before."""
    schedule, mathematics, command = loaded_by(
        "import ddim_lab.schedule, ddim_lab.transitions",
        "import ddim_lab.sampler, ddim_lab.noise, ddim_lab.analytic, ddim_lab.diffusion, ddim_lab.interpolate",
        "import ddim_lab.jobs.plan, ddim_lab.data.base, ddim_lab.metrics.references, ddim_lab.models.obtain",
    )
    assert "torch" not in schedule
    assert {"torch", "numpy", "ddim_lab"} <= mathematics
    assert not mathematics & {"hydra", "omegaconf", "lightning", "torchvision", "pydantic", "altair", "PIL"}
    # Seconds of imports: where every cell is stored, nothing is trained and nothing measured.
    assert not command & {"torchmetrics", "pytorch_lightning", "diffusers", "wandb", "scipy", "sklearn", "matplotlib"}


def test_the_report_needs_no_torch() -> None:
    (loaded,) = loaded_by("import ddim_lab.report, ddim_lab.report.__main__")
    assert not loaded & {"torch", "wandb", "hydra", "diffusers"}


def test_a_configuration_is_checked_without_torch() -> None:
    """Its sampler, too: the walk, its largest eta, the range of its steps and its spacing."""
    code = """
from ddim_lab.config.folders import config_folder
from ddim_lab.config.job import Config
from ddim_lab.errors import ConfigError
import hydra

def refusal(*overrides):
    try:
        Config.from_hydra(hydra.compose("config", overrides=list(overrides)))
    except ConfigError as error:
        return str(error)
    return "none"

with hydra.initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
    assert refusal("steps=10", "sampler.eta=1.0003") == "none"
    assert "largest valid eta is 1.0004" in refusal("steps=10", "sampler.eta=1.001")
    assert "between 1 and 1000" in refusal("steps=1001")
    assert "unknown spacing 'cubic'" in refusal("sampler.spacing=cubic")
    assert "needs eta=1" in refusal("sampler.variance=large", "sampler.eta=0.5")
"""
    (loaded,) = loaded_by(code.strip())
    assert "torch" not in loaded


def answered(outputs: Path, *commands: Sequence[str]) -> tuple[list[int], set[str]]:
    """Several `python -m ddim_lab` in one process: their exit statuses, and what was loaded at the end."""
    code = f"""
import atexit, sys
from ddim_lab.__main__ import main
atexit.register(lambda: print("loaded:", *sys.modules))
for command in {[list(command) for command in commands]!r}:
    sys.argv = ["ddim_lab", *command, {f"outputs_dir={outputs}"!r}]
    try:
        main()
    except SystemExit as stop:
        print("status:", stop.code)
"""
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: threads are part of a cell's name
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alike, check=False)
    assert "Traceback" not in run.stderr
    statuses = [int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("status:")]
    return statuses, {name.partition(".")[0] for name in run.stdout.rpartition("loaded:")[2].split()}


@pytest.mark.slow
def test_help_and_a_wrong_option_are_answered_without_torch(tmp_path: Path) -> None:
    shown = (["--help"], ["--info", "config"], ["--cfg", "job"])
    wrong = (["sampler.etta=1"], ["data=nothing"], ["steps=abc"], ["sampler.eta=2"], ["steps=10,1200", "-m"])
    statuses, loaded = answered(tmp_path, *shown, *wrong)
    assert statuses == [0] * len(shown) + [2] * len(wrong)
    assert "hydra" in loaded
    assert not loaded & {"torch", "scipy", "sklearn", "wandb", "diffusers", "torchmetrics"}


@pytest.mark.slow
def test_what_is_stored_is_found_without_what_computes_it(tmp_path: Path) -> None:
    sweep = ["model=gaussian", "metrics.features=pixels", "num_samples=44", "steps=2,3", "-m", "logger=csv"]
    needed = {"pytorch_lightning", "torchmetrics", "sklearn"}  # scipy comes again: Student's t, for the findings
    assert tiny.run(tmp_path, *sweep, settings=()) == 0
    assert needed & set(sys.modules), "the first time, something is computed"
    statuses, loaded = answered(tmp_path, sweep)
    assert statuses == [0]
    assert "torch" in loaded
    assert not loaded & {*needed, "diffusers", "wandb", "torchvision"}
