"""Solvers of higher order: how they converge on an exact model, what they share with DDIM, and other people's."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from official import Counting, relative_difference
from official import one_thread as one_thread
from scipy.integrate import solve_ivp
from torch import Tensor

from ddim_lab.analytic import GaussianEps, GaussianMixtureEps
from ddim_lab.config.sampler import FORMULAS
from ddim_lab.errors import ConfigError
from ddim_lab.multistep import Deis, DpmSolverPP, DpmSolverPPSde, Multistep, UniPC
from ddim_lab.noise import NamedNoise
from ddim_lab.pndm import Ipndm, Pndm
from ddim_lab.sampler import Formula, Sampler
from ddim_lab.schedule import NoiseSchedule, half_log_snr
from ddim_lab.singlestep import DpmSolver2, Heun

SCHEDULE = NoiseSchedule.linear()
COMMON = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
MEANS = torch.tensor([[-0.8, 0.3], [0.7, 0.5], [0.1, -0.9]], dtype=torch.float64)
VARIANCES = torch.tensor([0.10, 0.15, 0.20], dtype=torch.float64)

EVERY: dict[str, Formula] = {
    "deis": Deis(3),
    "ipndm": Ipndm(4),
    "pndm": Pndm(),
    "pndm runge_kutta": Pndm("runge_kutta"),
    "pndm lowered": Pndm(lower_order_final=True),
    "dpm_solver_2": DpmSolver2(),
    "heun": Heun(),
    "dpmpp_2m": DpmSolverPP(2),
    "dpmpp_3m": DpmSolverPP(3),
    "dpmpp_3m full": DpmSolverPP(3, "full"),
    "unip_3": UniPC(3, corrector=False),
    "unipc_2": UniPC(2),
    "unipc_3": UniPC(3, bh="bh1"),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixture(schedule: NoiseSchedule = SCHEDULE) -> GaussianMixtureEps:
    return GaussianMixtureEps(schedule, MEANS, VARIANCES)


# -- the order of convergence ------------------------------------------------------------------------------------

TOP, BOTTOM = SCHEDULE.alpha_bar(999), SCHEDULE.alpha_bar(0)


def uniform_in_lambda(steps: int) -> NoiseSchedule:
    """A schedule whose timesteps are steps + 1 levels, equally far apart in lambda: a grid without rounding."""
    lambdas = np.linspace(half_log_snr(BOTTOM), half_log_snr(TOP), steps + 1)
    alpha_bars = 1.0 / (1.0 + np.exp(-2.0 * lambdas))
    return NoiseSchedule(1.0 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]]))


def solution(x_T: Tensor) -> Tensor:
    """The ODE d(x / alpha) / d rho = eps from TOP to BOTTOM, by an adaptive solver of order 8."""
    rho = [math.exp(-half_log_snr(level)) for level in (TOP, BOTTOM)]

    def slope(log_rho: float, scaled: Any) -> Any:
        level = 1.0 / (1.0 + math.exp(2.0 * log_rho))
        here = NoiseSchedule(np.array([1.0 - level]))
        x = torch.from_numpy(scaled).view(x_T.shape) * math.sqrt(level)
        eps = mixture(here)(x, torch.zeros(len(x), dtype=torch.int64))
        return math.exp(log_rho) * eps.flatten().numpy()

    start = (x_T / math.sqrt(TOP)).flatten().numpy()
    found = solve_ivp(slope, [math.log(r) for r in rho], start, method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(found.y[:, -1]).view(x_T.shape) * math.sqrt(BOTTOM)


def error_at_0(formula: Formula | None, steps: int, x_T: Tensor, exact: Tensor) -> float:
    """Root mean square error at the cleanest level before the image, over steps that are equal in lambda."""
    schedule = uniform_in_lambda(steps)
    sampler = Sampler(schedule, timesteps=list(range(steps + 1)), formula=formula)
    (at_0,) = (state.x for state in sampler.walk(mixture(schedule), x_T) if state.t == 0)
    return float((at_0 - exact).square().mean().sqrt())


@pytest.mark.parametrize(
    ("formula", "order"),
    [
        (None, 1),
        (Heun(), 2),
        (DpmSolver2(), 2),
        (Pndm(), 2),
        (Pndm("runge_kutta"), 2),
        (Pndm(lower_order_final=True), 2),
        (Ipndm(4, lower_order_final=False), 2),
        (Deis(2, lower_order_final=False), 2),
        (Deis(3, lower_order_final=False), 3),
        (DpmSolverPP(2), 2),
        (DpmSolverPP(3), 2),
        (DpmSolverPP(3, "full"), 3),
        (UniPC(2, corrector=False), 2),
        (UniPC(2), 3),
    ],
    ids=str,
)
def test_the_order_is_what_it_says(formula: Formula | None, order: int) -> None:
    x_T = normal(8, 2, seed=3)
    exact = solution(x_T)
    forwards = np.array([80, 120, 160, 240, 320])
    a_step = 2 if isinstance(formula, Heun | DpmSolver2) else 1
    errors = [error_at_0(formula, int(count) // a_step, x_T, exact) for count in forwards]
    slope = -np.polyfit(np.log(forwards), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(
    ("formula", "order"), [(None, 1), (DpmSolver2(), 2), (DpmSolverPP(2), 2), (UniPC(2), 3)], ids=str
)
def test_the_order_is_what_it_says_on_the_logsnr_grid_of_a_schedule(formula: Formula | None, order: int) -> None:
    """Its timesteps are float32 and not whole: levels stand where alpha_bar of these is, which bends no order."""
    x_T, errors = normal(8, 2, seed=3), []
    exact, forwards = solution(x_T), np.array([80, 120, 160, 240, 320])
    for count in (forwards // (2 if isinstance(formula, DpmSolver2) else 1)).tolist():
        sampler = Sampler(SCHEDULE, count + 1, spacing="logsnr", formula=formula)
        (at_0,) = (state.x for state in sampler.walk(mixture(), x_T) if state.t == 0)
        errors.append(float((at_0 - exact).square().mean().sqrt()))
    assert -np.polyfit(np.log(forwards), np.log(errors), 1)[0] == pytest.approx(order, abs=0.15)


# -- what they share with DDIM -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize(
    "formula", [Deis(1), Ipndm(1), DpmSolverPP(1), UniPC(1, corrector=False)], ids=lambda formula: repr(formula)
)
def test_the_first_order_is_ddim(formula: Formula, spacing: str) -> None:
    x_T = normal(4, 2)
    ours, ddim = (Sampler(SCHEDULE, 12, spacing=spacing, formula=each) for each in (formula, None))
    assert relative_difference(ours.sample(mixture(), x_T), ddim.sample(mixture(), x_T)) < 1e-12


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 37, 50])
def test_forwards_said_are_forwards_done_and_images_are_finite(name: str, steps: int) -> None:
    if name == "pndm runge_kutta" and steps < 4:
        with pytest.raises(
            ValueError, match=f"needs 4 steps \\(13 forwards\\) at least, got {steps}: give more, or samp"
        ):
            Sampler(SCHEDULE, steps, spacing="trailing", formula=EVERY[name])
        return
    model, sampler = Counting(mixture()), Sampler(SCHEDULE, steps, spacing="trailing", formula=EVERY[name])
    found = sampler.sample(model, normal(3, 2))
    assert len(model.seen) == sampler.nfe
    assert found.abs().max() < 3.0
    if steps == 1:
        ddim = Sampler(SCHEDULE, 1, spacing="trailing").sample(mixture(), normal(3, 2))
        torch.testing.assert_close(found, ddim, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_does_not_depend_on_its_batch_and_repeats_bitwise(name: str) -> None:
    sampler, x_T = Sampler(SCHEDULE, 10, spacing="trailing", formula=EVERY[name]), normal(6, 2, dtype=torch.float32)
    whole = sampler.sample(mixture(), x_T)
    assert torch.equal(whole, sampler.sample(mixture(), x_T))
    parts = torch.cat([sampler.sample(mixture(), part) for part in x_T.split([1, 2, 3])])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeated", [[999, 600, 300, 60, 60], [999, 999, 600, 300, 60], [999, 600, 600, 300, 60]])
@pytest.mark.parametrize("name", EVERY)
def test_a_repeated_timestep_moves_nothing(name: str, repeated: list[int]) -> None:
    """As in DDIM it costs a forward (in Heun's walk two); the images are those of the list without it."""
    x_T, once = normal(2, 2), Sampler(SCHEDULE, timesteps=[999, 600, 300, 60], formula=EVERY[name])
    model, twice = Counting(mixture()), Sampler(SCHEDULE, timesteps=repeated, formula=EVERY[name])
    torch.testing.assert_close(twice.sample(model, x_T), once.sample(mixture(), x_T), rtol=1e-12, atol=1e-12)
    assert len(model.seen) == twice.nfe > once.nfe


@pytest.mark.parametrize("name", EVERY)
def test_noise_and_clipping_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="solves the ODE, without noise: eta must be 0"):
        Sampler(SCHEDULE, 10, eta=0.5, formula=EVERY[name])
    with pytest.raises(ValueError, match="clip=x0 is for the default formula"):
        Sampler(SCHEDULE, 10, clip="x0", formula=EVERY[name])


def test_no_two_of_them_have_the_same_recipe() -> None:
    settings = [*EVERY.values(), Deis(2), Ipndm(3), UniPC(3), UniPC(2, lower_order_final=False), DpmSolverPP(1)]
    assert len({str(formula.recipe()) for formula in settings}) == len(settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Deis(5), "order must be from 1 to 4, got 5"),
        (lambda: DpmSolverPP(4), "order must be from 1 to 3, got 4"),
        (lambda: DpmSolverPP(3, "half"), "unknown correction 'half'"),  # type: ignore[arg-type]
        (lambda: UniPC(3, bh="bh3"), "unknown bh 'bh3'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Multistep], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_noise_that_eta_asks_for_is_one_line() -> None:
    with pytest.raises(ConfigError, match="DpmSolverPP solves the ODE, without noise: eta must be 0"):
        tiny.configure("sampler=dpmpp_2m", "sampler.eta=0.5")


def test_rounded_timesteps_go_by_another_name_in_reports() -> None:
    """Two cells of a sweep that differ in nothing else."""
    words = ("sampler.spacing=logsnr", "steps=10")
    names = [tiny.configure(*words, f"sampler.timesteps_as={how}").labels()["spacing"] for how in ("given", "integer")]
    assert names == ["logsnr", "logsnr (integer)"]
    listed = tiny.configure("sampler.timesteps=[999.0,500.5,20]")
    assert listed.sampler.timesteps == (999, 500.5, 20)
    assert [type(t) for t in listed.sampler.timesteps] == [int, float, int]


def test_the_paper_s_start_is_an_option() -> None:
    config = tiny.configure("sampler=pndm", "sampler.start=runge_kutta", "steps=7")
    lowered = {"lower_order_final": True}
    assert config.build_sampler().recipe()["formula"] == {"name": "pndm", "start": "runge_kutta", **lowered}
    assert config.forwards == 7 + 9
    assert tiny.configure("sampler=pndm", "sampler.start=runge_kutta", "nfe=13").steps == 4
    with pytest.raises(ConfigError, match=r"nfe=12 is too few for sampler=pndm: it takes 13 forwards at the least"):
        tiny.configure("sampler=pndm", "sampler.start=runge_kutta", "nfe=12")
    published = tiny.configure("sampler=pndm", "sampler.lower_order_final=false")
    assert published.build_sampler().recipe()["formula"] == {"name": "pndm", "start": "linear"}
    with pytest.raises(ConfigError, match=r"needs 4 steps \(13 forwards\) at least, got 3"):
        tiny.configure("sampler=pndm", "sampler.start=runge_kutta", "steps=3")
    with pytest.raises(ConfigError, match=r"sampler.start=rk4: must be 'linear' or 'runge_kutta'"):
        tiny.configure("sampler=pndm", "sampler.start=rk4")


@pytest.mark.parametrize("formula", sorted(set(FORMULAS) - {"checkpoint", "diffusers"}))
def test_every_formula_is_built_from_its_options(formula: str) -> None:
    presets = {"dpmpp": "dpmpp_3m", "dpmpp_sde": "dpmpp_2m_sde"}
    config = tiny.configure(f"sampler={presets.get(formula, formula)}", "steps=7")
    sampler = config.build_sampler()
    assert sampler.recipe()["formula"]["name"] == {"dpmpp": "dpmsolverpp", "dpmpp_sde": "dpmsolverppsde"}.get(
        formula, formula
    )
    assert config.forwards == sampler.nfe == {"heun": 13, "dpm_solver_2": 13, "pndm": 8}.get(formula, 7)


# -- the SDE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic"])
def test_the_first_order_of_the_sde_is_ddpm(spacing: str) -> None:
    x_T = normal(4, 2)
    found = Sampler(SCHEDULE, 12, eta=1.0, spacing=spacing, formula=DpmSolverPPSde(1)).sample(mixture(), x_T, seed=3)
    ddpm = Sampler(SCHEDULE, 12, eta=1.0, spacing=spacing).sample(mixture(), x_T, seed=3)
    assert relative_difference(found, ddpm) < 1e-10


def test_the_second_order_has_the_targets_variance_sooner_than_ddpm() -> None:
    """A Gaussian of variance 0.25: the variance after 20 steps, over 40,000 samples."""
    schedule, x_T = SCHEDULE, normal(40_000, 1, seed=1)
    model = GaussianEps(schedule, 0.3, 0.25)
    variances = [
        float(Sampler(schedule, 20, eta=1.0, spacing="trailing", formula=formula).sample(model, x_T, seed=2).var())
        for formula in (DpmSolverPPSde(2), None)
    ]
    second, first = (abs(variance - 0.25) for variance in variances)
    assert second < first / 3


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_diffusers_sde_is_ours_on_the_same_noise(steps: int) -> None:
    x_T = normal(4, 2, dtype=torch.float32)
    rival = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="sde-dpmsolver++", **COMMON)
    rival.set_timesteps(steps)
    noise, names, x = NamedNoise(3), torch.arange(4), x_T
    for t in rival.timesteps:
        eps = mixture()(x, torch.full((4,), int(t)))
        x = rival.step(eps, t, x, variance_noise=noise(names, int(t), x)).prev_sample
    formula = DpmSolverPPSde(2, lower_order_final=steps < 15)
    ours = Sampler(SCHEDULE, steps, eta=1.0, spacing="trailing", formula=formula).sample(mixture(), x_T, seed=3)
    assert relative_difference(x, ours) < 5e-5


@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0, "variance": "large"}])
def test_another_noise_than_the_sdes_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="DpmSolverPPSde solves the SDE: eta must be 1, and variance posterior"):
        Sampler(SCHEDULE, 10, formula=DpmSolverPPSde(2), **settings)


# -- other people's ----------------------------------------------------------------------------------------------


def theirs(scheduler: Any, steps: int, x_T: Tensor) -> list[Tensor]:
    """The states after each step of a scheduler of diffusers, on the same model."""
    scheduler.set_timesteps(steps)
    x, states, model = x_T * float(scheduler.init_noise_sigma), [], mixture()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, torch.full((len(x),), int(t))), t, x).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(
    ("scheduler", "formula"),
    [
        (
            lambda: DPMSolverMultistepScheduler(solver_order=2, **COMMON),
            lambda low: DpmSolverPP(2, lower_order_final=low),
        ),
        (
            lambda: DPMSolverMultistepScheduler(solver_order=3, **COMMON),
            lambda low: DpmSolverPP(3, lower_order_final=low),
        ),
        (lambda: UniPCMultistepScheduler(solver_order=2, **COMMON), lambda low: UniPC(2)),
        (lambda: UniPCMultistepScheduler(solver_order=3, **COMMON), lambda low: UniPC(3)),
        (lambda: PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, **COMMON), lambda low: Pndm()),
    ],
    ids=["2M", "3M", "UniPC-2", "UniPC-3", "PNDM"],
)
def test_diffusers_images_are_ours(scheduler: Any, formula: Any, steps: int) -> None:
    """Theirs lowers DPM-Solver++'s order towards the end below 15 steps alone."""
    x_T = normal(4, 2, dtype=torch.float32)
    ours = Sampler(SCHEDULE, steps, spacing="trailing", formula=formula(steps < 15)).sample(mixture(), x_T)
    assert relative_difference(theirs(scheduler(), steps, x_T)[-1], ours) < 5e-5


@pytest.mark.parametrize("steps", [4, 5, 10, 20, 50])
def test_diffusers_runge_kutta_start_is_ours(steps: int) -> None:
    """Its midpoints are T // S // 2 below, which is the middle where S divides T and leaves an even number."""
    x_T = normal(4, 2, dtype=torch.float32)
    rival = PNDMScheduler(skip_prk_steps=False, set_alpha_to_one=True, **COMMON)
    model = Counting(mixture())
    found = Sampler(SCHEDULE, steps, spacing="trailing", formula=Pndm("runge_kutta")).sample(model, x_T)
    assert relative_difference(theirs(rival, steps, x_T)[-1], found) < 5e-5
    assert model.seen == rival.timesteps.tolist()
    assert len(model.seen) == steps + 9
    assert model.dtype == torch.int64


def test_diffusers_unipc_with_bh1_is_ours_until_its_last_step_is_nan() -> None:
    """To alpha_bar = 1 its h is infinite, and its bh1 multiplies it by a sum over nothing."""
    x_T = normal(4, 2, dtype=torch.float32)
    *others, last = theirs(UniPCMultistepScheduler(solver_order=3, solver_type="bh1", **COMMON), 10, x_T)
    ours = Sampler(SCHEDULE, 10, spacing="trailing", formula=UniPC(3, bh="bh1"))
    _, *states = (state.x for state in ours.walk(mixture(), x_T))
    assert all(relative_difference(other, mine) < 5e-5 for other, mine in zip(others, states[:-1], strict=True))
    assert last.isnan().all()
    assert states[-1].isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_deis_is_ours_until_the_last_step(order: int) -> None:
    """It ends at the first timestep's noise level unless told otherwise, which is not the image."""
    x_T = normal(4, 2, dtype=torch.float32)
    rival = DEISMultistepScheduler(solver_order=order, lower_order_final=False, **COMMON)
    ours = Sampler(SCHEDULE, 20, spacing="trailing", formula=Deis(order, lower_order_final=False))
    states = [state.x for state in ours.walk(mixture(), x_T)]
    for mine, other in list(zip(states[1:], theirs(rival, 20, x_T), strict=True))[:-1]:
        assert relative_difference(other, mine) < 1e-4


def test_diffusers_heun_is_ours() -> None:
    """Its state is x / alpha; two calls a step, one in the last."""
    x_T = normal(4, 2, dtype=torch.float32)
    rival = HeunDiscreteScheduler(**COMMON)
    rival.set_timesteps(20)
    ours = Sampler(SCHEDULE, 20, spacing="trailing", formula=Heun())
    start = x_T / math.sqrt(SCHEDULE.alpha_bar(999))
    x = start
    for t in rival.timesteps:
        scaled = rival.scale_model_input(x, t)
        x = rival.step(mixture()(scaled, torch.full((4,), int(t))), t, x).prev_sample
    assert len(rival.timesteps) == ours.nfe
    assert relative_difference(x, ours.sample(mixture(), x_T)) < 1e-4


# -- inside a step -------------------------------------------------------------------------------------------------


def finer(schedule: NoiseSchedule, parts: int) -> NoiseSchedule:
    """The same process in more timesteps: t of it is t / parts of the other, and log alpha_bar is linear between."""
    t = np.arange((schedule.num_timesteps - 1) * parts + 1) / parts
    alpha_bars = np.exp(np.interp(t, np.arange(schedule.num_timesteps), np.log(schedule.alpha_bars)))
    return NoiseSchedule(1.0 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]]))


@pytest.mark.parametrize("name", ["ddim", *sorted(set(EVERY) - {"dpm_solver_2"})])
def test_a_walk_between_whole_timesteps_is_one_on_a_finer_schedule(name: str) -> None:
    formula, fine, x_T = EVERY.get(name), finer(SCHEDULE, 4), normal(3, 2)
    timesteps = [999, 800.25, 600.5, 400.75, 200, 100.25, 7.5, 0]
    model = Counting(mixture())
    between = Sampler(SCHEDULE, timesteps=timesteps, formula=formula).sample(model, x_T)
    whole = Sampler(fine, timesteps=[int(4 * t) for t in timesteps], formula=formula).sample(mixture(fine), x_T)
    assert model.dtype == torch.float32
    assert set(timesteps) <= set(model.seen)
    torch.testing.assert_close(between, whole, rtol=1e-9, atol=1e-9)


def by_hand(schedule: NoiseSchedule, timesteps: list[float], x: Tensor) -> Tensor:
    """DPM-Solver-2 with r = 1/2 as its Algorithm 1 has it, to the last timestep but the image."""
    model = mixture(schedule)

    def eps(x: Tensor, level: float) -> Tensor:
        here = NoiseSchedule(np.array([1.0 / (1.0 + math.exp(2.0 * level))]))
        return mixture(here)(x, torch.zeros(len(x), dtype=torch.int64))

    for t, t_prev in pairwise(timesteps):
        start, stop = schedule.half_log_snr(t), schedule.half_log_snr(t_prev)
        h, middle = stop - start, 0.5 * (start + stop)
        alpha = {level: 1.0 / math.sqrt(1.0 + math.exp(-2.0 * level)) for level in (start, middle, stop)}
        sigma = {level: 1.0 / math.sqrt(1.0 + math.exp(2.0 * level)) for level in (start, middle, stop)}
        now = model(x, torch.full((len(x),), t))
        u = alpha[middle] / alpha[start] * x - sigma[middle] * math.expm1(h / 2) * now
        x = alpha[stop] / alpha[start] * x - sigma[stop] * math.expm1(h) * eps(u, middle)
    return x


def test_dpm_solver_2_is_its_algorithm_and_ends_with_ddim() -> None:
    """The middle's t is a float32, so that it lies in the middle to 1e-6; the solver goes by where it is."""
    timesteps: list[float] = [999, 700, 420.5, 200, 31]
    sampler = Sampler(SCHEDULE, timesteps=timesteps, formula=DpmSolver2())
    *_, before, image = (state.x for state in sampler.walk(mixture(), normal(3, 2)))
    torch.testing.assert_close(before, by_hand(SCHEDULE, timesteps, normal(3, 2)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(image, Sampler(SCHEDULE, timesteps=[31]).sample(mixture(), before), rtol=0, atol=0)
    for each in sampler.transitions[:-1]:
        assert each.between is not None
        middle = 0.5 * (half_log_snr(each.alpha_bar) + half_log_snr(each.alpha_bar_prev))
        assert half_log_snr(each.between.alpha_bar) == pytest.approx(middle, abs=1e-6)
    assert sampler.transitions[-1].between is None
    assert (sampler.nfe, sampler.whole) == (9, False)


def test_what_a_step_asks_between_is_announced_and_part_of_the_recipe() -> None:
    sampler, model = Sampler(SCHEDULE, 5, spacing="trailing", formula=DpmSolver2()), Counting(mixture())
    sampler.sample(model, normal(2, 2))
    announced = [t for each in sampler.transitions for t in (each.t, *(each.between or ())[:1])]
    assert model.seen == announced
    assert model.dtype == torch.float32
    assert sampler.recipe()["between"] == [each.between and each.between.t for each in sampler.transitions]
    integer = Sampler(SCHEDULE, 5, spacing="trailing", formula=DpmSolver2(), timesteps_as="integer")
    assert integer.recipe() != sampler.recipe()
    assert "between" not in Sampler(SCHEDULE, 5, formula=Heun()).recipe()


def test_a_formula_that_asks_at_a_t_which_it_has_not_announced_is_stopped() -> None:
    class Asking(Formula):
        def step(self, transition: Any, x_t: Tensor, eps: Tensor, z: Tensor | None) -> Tensor:
            return x_t

        def recipe(self) -> dict[str, Any]:
            return {"name": "asking"}

        def walk(self, predict: Any, x_T: Tensor, transitions: Any, draw: Any) -> Any:
            yield predict(x_T, 0.5)

    with pytest.raises(ValueError, match=r"asks the model at t=0.5: its method `between` must announce it"):
        list(Sampler(SCHEDULE, 3, formula=Asking()).walk(mixture(), normal(2, 2)))


@pytest.mark.parametrize("steps", [5, 10, 37, 600, 1000])
def test_dpm_solver_2_on_whole_timesteps(steps: int) -> None:
    """The middle is the whole one that is nearest in t; where there is none between, the step is Heun's."""
    sampler = Sampler(SCHEDULE, steps, spacing="trailing", formula=DpmSolver2(), timesteps_as="integer")
    model = Counting(mixture())
    sampler.sample(model, normal(2, 2))
    assert (len(model.seen), model.dtype, sampler.whole) == (sampler.nfe, torch.int64, True)
    assert sampler.nfe == 2 * steps - 1
    for each in sampler.transitions[:-1]:
        assert each.between is not None
        if each.t - each.t_prev == 1:
            assert each.between.t == each.t_prev
            continue
        middle = SCHEDULE.timestep(0.5 * (half_log_snr(each.alpha_bar) + half_log_snr(each.alpha_bar_prev)))
        assert each.t_prev < each.between.t < each.t
        assert abs(each.between.t - middle) <= max(0.5, 1 - (middle - each.t_prev), 1 - (each.t - middle))
    if steps == 1000:
        heun = Sampler(SCHEDULE, steps, spacing="trailing", formula=Heun()).sample(mixture(), normal(2, 2))
        torch.testing.assert_close(sampler.sample(mixture(), normal(2, 2)), heun, rtol=1e-12, atol=1e-12)


def test_dpm_solver_2_is_of_second_order_on_whole_timesteps_too() -> None:
    """Every third level of a grid: the middle is a third or two of the way, and r says so."""
    x_T = normal(8, 2, seed=3)
    exact, steps, errors = solution(x_T), np.array([40, 60, 80, 120, 160]), []
    for count in steps.tolist():
        schedule = uniform_in_lambda(3 * count)
        timesteps = list(range(0, 3 * count + 1, 3))
        sampler = Sampler(schedule, timesteps=timesteps, formula=DpmSolver2(), timesteps_as="integer")
        assert sampler.whole
        (at_0,) = (state.x for state in sampler.walk(mixture(schedule), x_T) if state.t == 0)
        errors.append(float((at_0 - exact).square().mean().sqrt()))
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
@pytest.mark.parametrize("name", ["ddim", *EVERY])
def test_rounding_makes_a_walk_whole_throughout(name: str, spacing: str) -> None:
    given, integer = (
        Sampler(SCHEDULE, 12, spacing=spacing, formula=EVERY.get(name), timesteps_as=how)
        for how in ("given", "integer")
    )
    model = Counting(mixture())
    found = integer.sample(model, normal(3, 2))
    assert (given.whole, integer.whole, model.dtype) == (False, True, torch.int64)
    assert len(model.seen) == integer.nfe <= given.nfe
    assert found.isfinite().all()
    assert [each.t for each in integer.transitions] == sorted({round(each.t) for each in given.transitions})[::-1]


def test_a_runge_kutta_start_needs_room_between_whole_timesteps() -> None:
    with pytest.raises(
        ValueError, match=r"needs a timestep between 999 and 998: give fewer steps, sampler\.timesteps_as=g"
    ):
        Sampler(SCHEDULE, 1000, spacing="trailing", formula=Pndm("runge_kutta"), timesteps_as="integer")
    assert not Sampler(SCHEDULE, 1000, spacing="trailing", formula=Pndm("runge_kutta")).whole


@pytest.mark.parametrize("how", ["given", "integer"])
@pytest.mark.parametrize("name", ["ddim", *sorted(set(EVERY) - {"dpm_solver_2", "pndm runge_kutta"})])
def test_how_timesteps_are_taken_is_no_matter_to_whole_ones(name: str, how: Any) -> None:
    formula = EVERY.get(name)
    plain = Sampler(SCHEDULE, 9, spacing="trailing", formula=formula)
    said = Sampler(SCHEDULE, 9, spacing="trailing", formula=formula, timesteps_as=how)
    assert said.recipe() == plain.recipe()
    assert all(isinstance(t, int) for each in said.transitions for t in (each.t, each.t_prev))


def test_half_log_snr_is_its_definition_and_infinite_at_the_image() -> None:
    assert half_log_snr(1.0) == math.inf
    for high, low in pairwise([0.999, 0.5, 1e-5]):
        assert half_log_snr(high) > half_log_snr(low)
        assert half_log_snr(low) == pytest.approx(math.log(math.sqrt(low) / math.sqrt(1 - low)), rel=1e-12)
