"""Task `ode_error`: the distance is to the ODE's solution, which is known here, and known for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from ddim_lab.analytic import GaussianEps
from ddim_lab.config.job import Config
from ddim_lab.data.base import load_data
from ddim_lab.data.images import MemoryImages, from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.noise import NamedNoise

LINE = ("task=ode_error", "model=gaussian", "metrics.features=pixels", "logger=csv", "num_samples=40", "batch_size=16")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ode") / "outputs"
    swept = ("sampler=ddim_trailing,dpmpp_2m,unipc", "nfe=5,10", "-m")
    assert tiny.run(folder, *LINE, *swept, settings=()) == 0
    return folder


def exact(config: Config) -> tuple[GaussianEps, torch.Tensor]:
    """The model of model=gaussian, and the images that the ODE carries the cells' x_T to from t = 999."""
    data = load_data(config.data)
    assert isinstance(data.train, MemoryImages)
    images = from_uint8(data.train.images).double()
    model = GaussianEps(config.build_schedule(), images.mean(0), images.var(0).clamp(min=127.5**-2))
    x_T = NamedNoise(0).initial(torch.arange(40), torch.zeros(40, 1, 8, 8))
    return model, model.ode_map(x_T.double(), 999)


@pytest.mark.slow
def test_it_is_the_distance_to_the_closed_form(outputs: Path) -> None:
    rows = tiny.results(tiny.sweeps(outputs)[0])
    for row in rows:
        config = tiny.configure(*LINE, f"sampler={row['sampler']}", f"steps={row['steps']}")
        model, solution = exact(config)
        x_T = NamedNoise(0).initial(torch.arange(40), torch.zeros(40, 1, 8, 8))
        images = config.build_sampler().sample(model, x_T).double()
        expected = float(((images - solution) / 2).square().mean())
        # the fine walk's step from t = 0 to the image is of first order, too
        assert float(row["ode_mse"]) == pytest.approx(expected, rel=2e-2)
        assert float(row["fine_mse"]) < 1e-9
        assert row["fine_agrees"] == "True"
        assert 0 < float(row["ode_mse_se"]) < 0.2 * float(row["ode_mse"])


def test_a_higher_order_is_nearer(outputs: Path) -> None:
    at_10 = {row["sampler"]: float(row["ode_mse"]) for row in tiny.results(tiny.sweeps(outputs)[0])[1::2]}
    assert at_10["unipc"] < at_10["dpmpp_2m"] < at_10["ddim_trailing"] / 2


def test_the_fine_solution_is_sampled_once_and_paired(outputs: Path) -> None:
    states = list(outputs.glob("references/*/states.npy"))
    assert len(states) == 2
    page = (tiny.sweeps(outputs)[0] / "report.html").read_text()
    assert "MSE to the ODE" in page
    assert "solvers against DDIM" in page


def test_a_fine_solution_that_is_not_fine_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(tmp_path / "outputs", *LINE, "steps=20", "task.fine_nfe=[6,4]", settings=()) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert row["fine_agrees"] == "False"
    assert "only: raise task.fine_nfe" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sampler.eta=0.5",), "needs the deterministic sampler"),
        (("task.fine_nfe=[2000,100]",), "task.fine_nfe=2000 exceeds the schedule's 1000 timesteps"),
        (("task.fine_spacing=cubic",), "task.fine_spacing=cubic: unknown spacing 'cubic'"),
        (("num_samples=2",), "needs 3 samples"),
    ],
)
def test_what_it_can_not_do_is_one_line(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.configure("task=ode_error", *overrides)
