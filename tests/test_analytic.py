"""The exact models against the score of the density they stand for, and DDIM against the ODE it discretises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from official import one_thread as one_thread
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_lab.analytic import EmpiricalEps, GaussianEps, GaussianMixtureEps
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
# So many timesteps that the number of steps is the only discretisation.
FINE_TOTAL = 20_000
FINE = NoiseSchedule.linear(FINE_TOTAL, 1e-4 * 1000 / FINE_TOTAL, 0.02 * 1000 / FINE_TOTAL)
STEPS = (50, 100, 200, 400, 800)

MEAN = torch.tensor([0.5, -0.5, 0.0, 0.3, 1.0, -1.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.05, 0.2, 0.5, 1.0, 2.0, 0.01], dtype=torch.float64)
MEANS = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.2, -1.0]], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.1, 0.02], dtype=torch.float64)
WEIGHTS = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score_eps(log_density: Callable[[Tensor], Tensor], x: Tensor, ab: float) -> Tensor:
    """-sqrt(1 - ab) grad log p_t, by automatic differentiation."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(x).sum(), x)
    return -math.sqrt(1.0 - ab) * gradient


def mixture_density(means: Tensor, variances: Tensor, weights: Tensor, ab: float) -> MixtureSameFamily:
    """p_t of a mixture: means shrink by sqrt(ab), variances become ab v + 1 - ab."""
    spread = (ab * variances + 1.0 - ab).sqrt()[:, None].expand(means.shape)
    return MixtureSameFamily(Categorical(probs=weights), Independent(Normal(math.sqrt(ab) * means, spread), 1))


def order(steps: tuple[int, ...], errors: list[float]) -> float:
    """The slope of log error on log step size."""
    return float(np.polyfit(-np.log(steps), np.log(errors), 1)[0])


# -- the eps are those of the density --------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_gaussian_eps_is_its_score(t: int) -> None:
    ab, x = SCHEDULE.alpha_bar(t), normal(7, 6)
    density = Independent(Normal(math.sqrt(ab) * MEAN, (ab * VARIANCE + 1 - ab).sqrt()), 1)
    eps = GaussianEps(SCHEDULE, MEAN, VARIANCE)(x, torch.full((7,), t))
    assert torch.allclose(eps, score_eps(density.log_prob, x, ab), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_mixture_eps_is_its_score(t: int) -> None:
    ab, x = SCHEDULE.alpha_bar(t), normal(50, 2)
    density = mixture_density(MEANS, VARIANCES, WEIGHTS, ab)
    eps = GaussianMixtureEps(SCHEDULE, MEANS, VARIANCES, WEIGHTS)(x, torch.full((50,), t))
    assert torch.allclose(eps, score_eps(density.log_prob, x, ab), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("t", [10, 500, 999])
def test_empirical_eps_is_the_score_of_its_point_masses(t: int) -> None:
    images, ab = normal(12, 5), SCHEDULE.alpha_bar(t)
    x = math.sqrt(ab) * images[:6] + math.sqrt(1 - ab) * normal(6, 5, seed=1)
    density = mixture_density(images, torch.zeros(12, dtype=torch.float64), torch.ones(12), ab)
    eps = EmpiricalEps(SCHEDULE, images)(x, torch.full((6,), t))
    assert torch.allclose(eps, score_eps(density.log_prob, x, ab), rtol=1e-9, atol=1e-11)


def test_one_component_is_the_gaussian_and_points_are_the_limit_of_components() -> None:
    x, t = normal(5, 2, 3, 3), torch.tensor([0, 3, 200, 700, 999])
    mean = normal(2, 3, 3, seed=1)
    gaussian = GaussianEps(SCHEDULE, mean, 0.3)(x, t)
    mixture = GaussianMixtureEps(SCHEDULE, mean[None], torch.tensor([0.3], dtype=torch.float64))(x, t)
    assert torch.allclose(gaussian, mixture, atol=1e-12)
    images = normal(4, 2, 3, 3, seed=2)
    narrow = GaussianMixtureEps(SCHEDULE, images, torch.full((4,), 1e-12, dtype=torch.float64))(x, t)
    assert torch.allclose(EmpiricalEps(SCHEDULE, images)(x, t), narrow, atol=1e-5)


def test_each_sample_has_its_own_timestep_and_dtype_is_kept() -> None:
    x, t = normal(4, 1, 2, 2), torch.tensor([0, 5, 500, 999])
    for model in (
        GaussianEps(SCHEDULE, 0.2, 0.5),
        GaussianMixtureEps(SCHEDULE, normal(3, 1, 2, 2, seed=1), VARIANCES),
        EmpiricalEps(SCHEDULE, normal(3, 1, 2, 2, seed=1)),
    ):
        together = model(x, t)
        apart = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        assert torch.allclose(together, apart, atol=1e-13)
        assert model(x.float(), t).dtype == torch.float32
        assert model(x.float(), t).shape == x.shape


MODELS: list[Callable[[NoiseSchedule], Callable[[Tensor, Tensor], Tensor]]] = [
    lambda schedule: GaussianEps(schedule, 0.2, 0.5),
    lambda schedule: GaussianMixtureEps(schedule, normal(3, 1, 2, 2, seed=1), VARIANCES),
    lambda schedule: EmpiricalEps(schedule, normal(3, 1, 2, 2, seed=1)),
]


@pytest.mark.parametrize("make", MODELS)
def test_between_timesteps_eps_is_that_of_the_level_there(make: Any) -> None:
    """A schedule of one timestep with that alpha_bar; a whole t is bitwise what it is as an integer."""
    x, model = normal(4, 1, 2, 2), make(SCHEDULE)
    for t in (0.5, 20.25, 500.5, 998.75):
        there = make(NoiseSchedule([1.0 - SCHEDULE.alpha_bar(t)]))(x, torch.zeros(4, dtype=torch.int64))
        torch.testing.assert_close(model(x, torch.full((4,), t)), there, rtol=1e-10, atol=1e-12)
    whole = torch.tensor([0, 5, 500, 999])
    assert torch.equal(model(x, whole.float()), model(x, whole))
    assert torch.equal(
        make(NoiseSchedule([0.5]))(x, torch.zeros(4)), make(NoiseSchedule([0.5]))(x, torch.zeros(4).long())
    )


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy":
            self.found += result.device != args[0].device
        return result


@pytest.mark.parametrize(
    "model", [GaussianEps(SCHEDULE, MEAN, VARIANCE), EmpiricalEps(SCHEDULE, normal(3, 6, seed=1))], ids=["one", "many"]
)
def test_what_a_model_knows_moves_to_the_device_once(model: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A copy from the host in every step makes the host wait, and ends the recording of a CUDA graph."""
    x, t = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    with Copies() as copies:
        model(x, t)
        assert copies.found > 0, "the test sees what it looks for"
        copies.found = 0
        model(x, t)
    assert copies.found == 0


def test_a_posterior_mean_is_the_best_eps() -> None:
    """E[eps | x_t]: no constant nor linear correction lowers the squared error, on draws of q."""
    t, n = 400, 200_000
    ab = SCHEDULE.alpha_bar(t)
    choice = torch.multinomial(WEIGHTS, n, replacement=True, generator=torch.Generator().manual_seed(0))
    x_0 = MEANS[choice] + VARIANCES[choice].sqrt()[:, None] * normal(n, 2, seed=1)
    eps = normal(n, 2, seed=2)
    x_t = math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * eps
    residual = eps - GaussianMixtureEps(SCHEDULE, MEANS, VARIANCES, WEIGHTS)(x_t, torch.full((n,), t))
    features = torch.cat([torch.ones(n, 1, dtype=torch.float64), x_t, x_t.square(), x_t.sin()], 1)
    z = (features[:, :, None] * residual[:, None, :]).mean(0) / (
        (features[:, :, None] * residual[:, None, :]).std(0) / math.sqrt(n)
    )
    assert float(z.abs().max()) < 4.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianEps(SCHEDULE, 0.0, 0.0),
        lambda: GaussianEps(SCHEDULE, 0.0, torch.tensor([1.0, -1.0])),
        lambda: GaussianMixtureEps(SCHEDULE, MEANS, torch.zeros(3)),
    ],
)
def test_variances_must_be_positive(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="positive"):
        make()


# -- DDIM is Euler on the ODE: order 1 --------------------------------------------------------------------------


def test_ode_map_solves_the_ode() -> None:
    """dy/ds = eps with y = x / sqrt(ab), s = sqrt((1 - ab) / ab) (the paper's Eq. 14), by an adaptive solver."""
    t = FINE_TOTAL - 1
    ab, x = FINE.alpha_bar(t), normal(1, 6)[0]

    def slope(s: float, y: np.ndarray) -> np.ndarray:
        level = 1.0 / (1.0 + s * s)
        spread = level * VARIANCE.numpy() + 1.0 - level
        return math.sqrt(1 - level) * (math.sqrt(level) * y - math.sqrt(level) * MEAN.numpy()) / spread

    start = math.sqrt((1 - ab) / ab)
    solution = solve_ivp(slope, (start, 0.0), x.numpy() / math.sqrt(ab), method="DOP853", rtol=1e-12, atol=1e-12)
    ours = GaussianEps(FINE, MEAN, VARIANCE).ode_map(x, t)
    np.testing.assert_allclose(ours.numpy(), solution.y[:, -1], atol=1e-9)


def test_ddim_on_a_gaussian_converges_to_the_ode_map_with_order_1() -> None:
    model, x_T = GaussianEps(FINE, MEAN, VARIANCE), normal(8, 6)
    exact = model.ode_map(x_T, FINE_TOTAL - 1)
    errors = [
        float((Sampler(FINE, steps=s, spacing="trailing").sample(model, x_T) - exact).norm(dim=1).mean()) for s in STEPS
    ]
    assert order(STEPS, errors) == pytest.approx(1.0, abs=0.1)
    assert errors[-1] < 0.01


@pytest.fixture(scope="module")
def fine_mixture() -> tuple[GaussianMixtureEps, Tensor, Tensor]:
    """The mixture, x_T, and where the walk over all 20,000 timesteps carries it."""
    model, x_T = GaussianMixtureEps(FINE, MEANS, VARIANCES, WEIGHTS), normal(64, 2, seed=4)
    return model, x_T, Sampler(FINE, steps=FINE_TOTAL, spacing="trailing").sample(model, x_T)


@pytest.mark.slow
def test_ddim_on_a_mixture_converges_with_order_1(fine_mixture: tuple[GaussianMixtureEps, Tensor, Tensor]) -> None:
    model, x_T, exact = fine_mixture
    errors = [
        float((Sampler(FINE, steps=s, spacing="trailing").sample(model, x_T) - exact).norm(dim=1).mean()) for s in STEPS
    ]
    assert order(STEPS, errors) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("at", ["source", "target"])
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_encoding_and_sampling_undo_each_other_with_order_1(
    kind: str, at: str, fine_mixture: tuple[GaussianMixtureEps, Tensor, Tensor]
) -> None:
    steps = (100, 200, 400, 800, 1600)
    if kind == "gaussian":
        model = GaussianEps(FINE, MEAN, VARIANCE)
        x_0 = model.ode_map(normal(8, 6), FINE_TOTAL - 1)
    else:
        model, _, x_0 = fine_mixture
    errors = []
    for s in steps:
        sampler = Sampler(FINE, steps=s, spacing="trailing")
        back = sampler.sample(model, sampler.encode(model, x_0, at=at))
        errors.append(float((back - x_0).norm(dim=1).mean()))
    assert order(steps, errors) == pytest.approx(1.0, abs=0.1)


def test_encoding_converges_to_the_inverse_of_the_ode_map() -> None:
    model, x_T = GaussianEps(FINE, MEAN, VARIANCE), normal(8, 6)
    x_0, steps = model.ode_map(x_T, FINE_TOTAL - 1), (200, 400, 800, 1600)
    for at in ("source", "target"):
        errors = [
            float((Sampler(FINE, steps=s, spacing="trailing").encode(model, x_0, at=at) - x_T).norm(dim=1).mean())
            for s in steps
        ]
        assert order(steps, errors) == pytest.approx(1.0, abs=0.1)


# -- a finite data set -----------------------------------------------------------------------------------------


def test_a_perfect_model_of_a_finite_set_returns_its_images() -> None:
    images = (torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 1).round(
        decimals=1
    )
    model = EmpiricalEps(SCHEDULE, images)
    x_0 = Sampler(SCHEDULE, steps=1000).sample(model, normal(40, 1, 8, 8, seed=5))
    distances = torch.cdist(x_0.flatten(1), images.flatten(1))
    nearest, which = distances.min(dim=1)
    assert float(nearest.max()) < 1e-6
    assert len(set(which.tolist())) >= 10
