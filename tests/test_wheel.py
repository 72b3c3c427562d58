"""The wheel carries conf/ and experiments/, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("conf/config.yaml", "conf/sampler/ddpm_large.yaml", "conf/experiments/table1_digits.yaml"):
        assert f"ddim_lab/{name}" in names
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "ddim_lab").rglob("*.py")}
    assert code <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "outputs/", "conf/"))]
    site = folder / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(site), str(wheel)),
        cwd=folder,
    )
    return site


def test_it_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import ddim_lab; print(ddim_lab.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    assert "table1_digits" in run(sys.executable, "-m", "ddim_lab", "--help", cwd=tmp_path, path=installed)
    run(
        *(sys.executable, "-m", "ddim_lab", "model=gaussian", "metrics.features=pixels", "steps=3", "num_samples=20"),
        *("logger=csv", f"outputs_dir={tmp_path}/outputs"),
        cwd=tmp_path,
        path=installed,
    )
    assert len(list((tmp_path / "outputs" / "sweeps").glob("*/report.html"))) == 1


def test_the_console_script_is_the_same_command(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "ddim-lab"
    assert "steps: 7" in run(sys.executable, str(script), "--cfg", "job", "steps=7", cwd=tmp_path, path=installed)
