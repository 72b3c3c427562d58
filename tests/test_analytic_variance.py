"""sampler.variance=analytic: the paper's formula in its own notation, exact Gaussians, and what it says it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
import torch
from test_cost import count_forwards, planned
from test_pins import cell_key, job_of
from torch import Tensor

from ddim_lab.analytic import EmpiricalEps, GaussianEps
from ddim_lab.data.images import MemoryImages, NonFiniteError, from_uint8
from ddim_lab.errors import ConfigError
from ddim_lab.jobs.cost import image_forwards, variance_forwards_by_cell
from ddim_lab.models.second_moment import (
    FORWARDS_AN_IMAGE,
    SecondMoments,
    estimate_second_moments,
    training_draws,
    variance_table,
)
from ddim_lab.noise import NamedNoise
from ddim_lab.report.series import noise_label
from ddim_lab.sampler import Sampler, step
from ddim_lab.schedule import CLEAN, NoiseSchedule
from ddim_lab.store import Store
from ddim_lab.store.housekeeping import inventory, prunable
from ddim_lab.transitions import Gamma, Transition, analytic_std, faintest, gamma_needed_at, sigma, transitions

SCHEDULE = NoiseSchedule.linear()
MU, V = 0.2, 0.3
"""Of an isotropic Gaussian."""

EXACT = ("model=gaussian", "metrics.features=pixels", "logger=csv", "variance_images=30", *tiny.SMALL)
CPU = torch.device("cpu")


def isotropic(t: float) -> float:
    """Gamma(t) of it: of eps = sqrt(1 - ab) (x - sqrt(ab) MU) / (ab V + 1 - ab), whose x has that variance."""
    ab = SCHEDULE.alpha_bar(t)
    return (1.0 - ab) / (ab * V + 1.0 - ab)


def normal_draws(count: int, size: int = 16, seed: int = 0, batch: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = MU + math.sqrt(V) * torch.randn(count, 1, 1, size, generator=generator, dtype=torch.float64)
    for indices in torch.split(torch.arange(count), batch):
        yield indices, images[indices]


# -- the formula ---------------------------------------------------------------------------------------------------


def papers_variance(n: int, m: int, lambda_squared: float, score_norm: float) -> float:
    """Bao et al. 2022, Theorem 1, for a step from timestep n to m < n of 1..T: E |score|^2 / d = `score_norm`.

    Their alpha of a step over several timesteps is the product of the single ones', beta-bar is 1 - alpha-bar.
    """
    single = 1.0 - SCHEDULE.betas
    alpha_bar_n, alpha_bar_m, alpha = (math.prod(single[a:b]) for a, b in ((0, n), (0, m), (m, n)))
    beta_bar_n, beta_bar_m = 1.0 - alpha_bar_n, 1.0 - alpha_bar_m
    factor = math.sqrt(beta_bar_n / alpha) - math.sqrt(beta_bar_m - lambda_squared)
    return lambda_squared + factor**2 * (1.0 - beta_bar_n * score_norm)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("uniform", 10), ("trailing", 7), ("quadratic", 20), ("linspace", 1000)]
)
def test_it_is_the_papers_theorem_1(spacing: str, steps: int, eta: float) -> None:
    walk = transitions(SCHEDULE, steps, eta, "analytic", spacing, gamma=isotropic)
    compared = [each for each in walk if each.t_prev > 0]
    assert len(compared) >= steps - 2
    for each in compared:
        score_norm = isotropic(each.t) / (1.0 - each.alpha_bar)  # eps = -sqrt(beta-bar) score
        expected = papers_variance(int(each.t) + 1, int(each.t_prev) + 1, each.sigma**2, score_norm)
        assert each.noise_std**2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gamma", [-5.0, 0.0, 0.3, 0.97, 1.0, 1.4])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_lies_between_the_bounds_of_theorem_2(gamma: float, eta: float) -> None:
    """Whatever Gamma is estimated to be: above lambda, below what a Gamma of 0 gives, and below variance 1 of x_0."""
    for each in transitions(SCHEDULE, 10, eta, "analytic", "trailing", gamma=lambda t: gamma)[:-1]:
        ab, ab_prev, in_mean = each.alpha_bar, each.alpha_bar_prev, each.sigma
        rest = math.sqrt(1.0 - ab_prev - in_mean**2)
        above = in_mean**2 + (math.sqrt((1.0 - ab) * ab_prev / ab) - rest) ** 2
        images = in_mean**2 + (math.sqrt(ab_prev) - rest * math.sqrt(ab / (1.0 - ab))) ** 2
        assert in_mean**2 <= each.noise_std**2 * (1 + 1e-12)
        assert each.noise_std**2 <= max(above if gamma >= 0 else math.inf, 0) * (1 + 1e-12)
        assert each.noise_std**2 <= images * (1 + 1e-12)
        if gamma >= 1.0:
            assert each.noise_std == pytest.approx(in_mean, abs=1e-15)
        if gamma == -5.0:
            assert each.noise_std**2 == pytest.approx(images)


def test_ddpms_two_variances_are_of_images_that_vary_not_at_all_and_as_noise() -> None:
    """At eta = 1: the posterior variance is optimal for one image, the larger one for images that are N(0, 1)."""
    walks = [transitions(SCHEDULE, 10, 1.0, variance, "trailing") for variance in ("posterior", "large")]
    for gamma, walk in ((lambda t: 1.0, walks[0]), (lambda t: 1.0 - SCHEDULE.alpha_bar(t), walks[1])):
        analytic = transitions(SCHEDULE, 10, 1.0, "analytic", "trailing", gamma=gamma)
        expected = [each.noise_std for each in walk]
        assert [each.noise_std for each in analytic] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "logsnr"])
@pytest.mark.parametrize(("eta", "levels"), [(0.0, 1.0), (1.0, 2.0)])
def test_what_the_last_steps_add(spacing: str, eta: float, levels: float) -> None:
    """No noise in the last one; before a last one from t = 0, so much that |noise| is a level or two of 255."""
    walk = transitions(SCHEDULE, 10, eta, "analytic", spacing, gamma=isotropic)
    assert walk[-1].t_prev == CLEAN
    assert walk[-1].noise_std == 0.0
    before = walk[-2]
    optimal = analytic_std(isotropic(before.t), before.sigma, before.alpha_bar, before.alpha_bar_prev)
    assert optimal > faintest(eta), "or nothing would be limited"
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs().mean() * faintest(eta)
    assert float(drawn) * 127.5 == pytest.approx(levels, rel=0.01)
    assert before.noise_std == (optimal if spacing == "trailing" else faintest(eta))
    assert before.t_prev == (99 if spacing == "trailing" else 0)


def test_a_repeated_timestep_moves_nothing() -> None:
    walk = transitions(SCHEDULE, eta=0.5, variance="analytic", timesteps=[800, 500, 500, 100], gamma=isotropic)
    assert [each.noise_std > 0.0 for each in walk] == [True, False, True, False]
    assert gamma_needed_at(transitions(SCHEDULE, variance="analytic", timesteps=[800, 500, 500, 100])) == [800, 500]


# -- exact on a Gaussian -------------------------------------------------------------------------------------------


def unlimited(walk: tuple[Transition, ...], gamma: Gamma) -> list[Transition]:
    """The walk with the optimal noise in its last steps, too."""
    return [
        replace(each, noise_std=analytic_std(gamma(each.t), each.sigma, each.alpha_bar, each.alpha_bar_prev))
        for each in walk
    ]


def moments_along(walk: list[Transition]) -> Iterator[tuple[Transition, float, float]]:
    """Mean and variance after each step, exactly: from those of x_t at the start, by the step's slope and offset."""
    model = GaussianEps(SCHEDULE, MU, V)
    mean, variance = at_level(walk[0].alpha_bar)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    for each in walk:
        eps = model(probes, torch.full((2,), each.t, dtype=torch.float64))
        offset, end = step(replace(each, noise_std=0.0), probes, eps).flatten().tolist()
        mean = offset + (end - offset) * mean
        variance = (end - offset) ** 2 * variance + each.noise_std**2
        yield each, mean, variance


def at_level(alpha_bar: float) -> tuple[float, float]:
    """Mean and variance of x_t."""
    return math.sqrt(alpha_bar) * MU, alpha_bar * V + 1.0 - alpha_bar


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["uniform", "trailing", "logsnr"])
@pytest.mark.parametrize("steps", [*range(1, 11), 50])
def test_every_step_is_exact_on_an_isotropic_gaussian(steps: int, spacing: str, eta: float) -> None:
    """Mean and variance of x at every level are those of the noised data, down to the image, at any S and eta."""
    walk = transitions(SCHEDULE, steps, eta, "analytic", spacing, gamma=isotropic)
    for each, mean, variance in moments_along(unlimited(walk, isotropic)):
        assert (mean, variance) == pytest.approx(at_level(each.alpha_bar_prev), rel=1e-9)
    for each, mean, variance in moments_along(list(walk)):  # as it is sampled: down to t = 0, or to the image
        if each.t_prev > 0:
            assert (mean, variance) == pytest.approx(at_level(each.alpha_bar_prev), rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_have_the_datas_variance_where_the_posterior_ones_have_not(eta: float) -> None:
    count, size = 4_000, 4
    model = GaussianEps(SCHEDULE, MU, V)
    off = {}
    for variance, gamma in (("analytic", isotropic), ("posterior", None)):
        sampler = Sampler(SCHEDULE, 5, eta, variance, "trailing", gamma=gamma)  # type: ignore[arg-type]
        first, last = sampler.transitions[0], sampler.transitions[-1]
        mean, spread = at_level(first.alpha_bar)
        x_T = mean + math.sqrt(spread) * NamedNoise(7).initial(
            torch.arange(count), torch.empty(count, 1, 1, size).double()
        )
        *_, before, _ = sampler.trajectory(model, x_T, seed=1)
        expected = at_level(last.alpha_bar)[1]
        off[variance] = (float(before.var()) - expected) / (expected * math.sqrt(2.0 / (count * size)))
    assert abs(off["analytic"]) < 4.5
    assert abs(off["posterior"]) > 10.0


# -- what is not known when a walk is checked ----------------------------------------------------------------------


def test_without_gamma_the_levels_are_known_and_nothing_is_sampled() -> None:
    unknown = Sampler(SCHEDULE, 10, variance="analytic")
    known = Sampler(SCHEDULE, 10, variance="analytic", gamma=isotropic)
    assert [(each.t, each.t_prev, each.sigma) for each in unknown.transitions] == [
        (each.t, each.t_prev, each.sigma) for each in known.transitions
    ]
    assert gamma_needed_at(unknown.transitions) == [each.t for each in known.transitions[:-1]]
    assert gamma_needed_at(known.transitions) == []
    assert unknown.nfe == known.nfe == 10
    for sampler in (unknown, known):
        assert sampler.formula.claimed_order(sampler.transitions) is None
    with pytest.raises(ValueError, match=r"variance=analytic needs the model's Gamma\(t\), at t=900 first: give gamma"):
        unknown.sample(GaussianEps(SCHEDULE), torch.zeros(2, 1, 2, 2))


def test_at_eta_0_it_is_no_deterministic_walk() -> None:
    model, x_T = GaussianEps(SCHEDULE, MU, V), torch.zeros(2, 1, 2, 2)
    sampler = Sampler(SCHEDULE, 10, variance="analytic", gamma=isotropic)
    assert not torch.equal(sampler.sample(model, x_T, seed=0), sampler.sample(model, x_T, seed=1))
    with pytest.raises(ValueError, match="encoding needs the deterministic walk: variance=analytic adds noise"):
        sampler.encode(model, x_T)


# -- the statistic -------------------------------------------------------------------------------------------------


def test_it_is_estimated_within_its_error() -> None:
    sampler = Sampler(SCHEDULE, 10, variance="analytic", prediction="eps")
    found = estimate_second_moments(sampler, GaussianEps(SCHEDULE, MU, V), normal_draws(2_000))
    assert list(found.by_t) == [900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert found.images == 2_000
    for t, (gamma, se) in found.by_t.items():
        assert abs(gamma - isotropic(t)) < 4.0 * se
        assert 0.0 < se < 0.02 * (1.0 - isotropic(t)), "known to 2 %, at every t"


def test_errors_cover_what_they_say() -> None:
    """Of Gamma and of the standard deviation made of it: 95 % within 1.96 of them, over 200 estimates of 100 images."""
    sampler, model = Sampler(SCHEDULE, 4, 0.0, "analytic", "trailing"), GaussianEps(SCHEDULE, MU, V)
    exact = transitions(SCHEDULE, 4, 0.0, "analytic", "trailing", gamma=isotropic)
    of_gamma, of_std = [], []
    for seed in range(200):
        found = estimate_second_moments(sampler, model, normal_draws(100, seed=seed), seed=seed)
        walk = transitions(SCHEDULE, 4, 0.0, "analytic", "trailing", gamma=found.gamma)
        for each, right in zip(walk[:-1], exact[:-1], strict=True):
            gamma, se = found.by_t[each.t]
            of_gamma.append((gamma - isotropic(each.t)) / se)
            std_se = found.std_se(each)
            assert std_se is not None
            of_std.append((each.noise_std - right.noise_std) / std_se)
    for deviations in map(torch.tensor, (of_gamma, of_std)):
        assert float((deviations.abs() < 1.96).double().mean()) == pytest.approx(0.95, abs=0.04)
        assert float(deviations.std()) == pytest.approx(1.0, abs=0.15)


def test_pairs_and_the_regression_tell_far_more_than_the_plain_mean() -> None:
    """At t = 900, per forward; the plain mean's error is known: |eps|^2 / d is chi-squared."""
    found = estimate_second_moments(
        Sampler(SCHEDULE, 10, variance="analytic"), GaussianEps(SCHEDULE, MU, V), normal_draws(500, 64)
    )
    plain = isotropic(900) * math.sqrt(2.0 / 64 / (500 * FORWARDS_AN_IMAGE))
    assert found.by_t[900][1] < plain / 1000.0


def images(count: int = 37) -> MemoryImages:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 3, 3), generator=generator).to(torch.uint8)
    return MemoryImages(pixels, torch.zeros(count, dtype=torch.int64))


def test_of_training_images_it_is_the_mean_over_them() -> None:
    """Of a model that is linear in x_t the mean over images and noise is known: no image is left out or preferred."""
    train, model = images(), GaussianEps(SCHEDULE, 0.1, 0.5)
    found = estimate_second_moments(
        Sampler(SCHEDULE, 10, variance="analytic"), model, training_draws(train, 3_000, 256, CPU)
    )
    x_0 = from_uint8(train.images).double()
    for t, (gamma, se) in found.by_t.items():
        ab = SCHEDULE.alpha_bar(t)
        k = math.sqrt(1.0 - ab) / (ab * 0.5 + 1.0 - ab)
        exact = k**2 * (ab * float((x_0 - 0.1).square().mean()) + 1.0 - ab)
        assert abs(gamma - exact) < 4.0 * se


def test_what_is_drawn_does_not_depend_on_the_batch_nor_move_torchs_generator() -> None:
    before = torch.random.get_rng_state()
    train, sampler, model = (
        images(),
        Sampler(SCHEDULE, 5, variance="analytic"),
        EmpiricalEps(SCHEDULE, torch.zeros(3, 1, 3, 3)),
    )
    whole, parts = (list(training_draws(train, 200, size, CPU)) for size in (200, 7))
    for column in range(2):
        assert torch.equal(whole[0][column], torch.cat([part[column] for part in parts]))
    found = [estimate_second_moments(sampler, model, iter(draws)) for draws in (whole, whole, parts)]
    assert found[0] == found[1], "bitwise"
    for t in found[0].by_t:
        assert found[0].by_t[t] == pytest.approx(found[2].by_t[t], rel=1e-9)
    drawn = torch.cat([x_0 for _, x_0 in training_draws(train, 5_000, 1000, CPU)])
    counts = (drawn[:, None] == from_uint8(train.images)[None]).flatten(2).all(2).sum(0)
    assert int(counts.sum()) == 5_000
    assert float((counts - 5_000 / 37).abs().max()) < 5.0 * math.sqrt(5_000 / 37)
    other = torch.cat([x_0 for _, x_0 in training_draws(train, 200, 200, CPU, seed=1)])
    assert not torch.equal(other, whole[0][1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_noise_of_it_is_sampled_with() -> None:
    """Sample i at t of any sampling seed has other noise than image i at t here."""
    seen: dict[float, Tensor] = {}

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        seen.setdefault(int(t[0]), x_t)
        return x_t

    sampler = Sampler(SCHEDULE, 3, variance="analytic")
    indices = torch.arange(50)
    estimate_second_moments(sampler, model, iter([(indices, torch.zeros(50, 1, 4, 4))]))
    for t, x_t in seen.items():
        z = x_t / math.sqrt(1.0 - SCHEDULE.alpha_bar(t))
        assert float(z.std()) == pytest.approx(1.0, abs=0.1)
        for seed in range(5):
            for label in (t, -1):
                other = NamedNoise(seed)(indices, label, x_t)
                assert abs(float((z * other).mean())) < 5.0 / math.sqrt(z.numel())


def test_a_network_that_predicts_v_has_the_gamma_of_its_eps() -> None:
    eps_model = GaussianEps(SCHEDULE, MU, V)

    def v_model(x_t: Tensor, t: Tensor) -> Tensor:
        ab = torch.tensor([SCHEDULE.alpha_bar(float(one)) for one in t], dtype=torch.float64).view(-1, 1, 1, 1)
        eps = eps_model(x_t, t)
        return (eps - (1.0 - ab).sqrt() * x_t) / ab.sqrt()  # of v = sqrt(ab) eps - sqrt(1 - ab) x_0

    found = [
        estimate_second_moments(Sampler(SCHEDULE, 5, variance="analytic", prediction=of), model, normal_draws(50))
        for of, model in (("eps", eps_model), ("v", v_model))  # type: ignore[arg-type]
    ]
    for t in found[0].by_t:
        assert found[0].by_t[t] == pytest.approx(found[1].by_t[t], rel=1e-6)


def test_a_model_that_diverges_is_named_with_its_timestep() -> None:
    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / (t.view(-1, 1, 1, 1) != 400)

    with pytest.raises(NonFiniteError, match=r"the model predicts NaN or infinite values .*, at t = 400"):
        estimate_second_moments(Sampler(SCHEDULE, 10, variance="analytic"), model, normal_draws(10))


def test_the_table_says_what_limits_a_step() -> None:
    by_t = {750: (1.1, 0.2), 500: (0.97, 0.01), 250: (0.4, 0.01)}
    moments = SecondMoments(30, by_t)
    walk = transitions(SCHEDULE, 4, 0.0, "analytic", gamma=moments.gamma)
    table = variance_table(walk, 0.0, moments)
    assert "N = 30 " in table.title
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["limited by"] for row in rows] == ["bounds", "", "grey levels", "last step: none"]
    assert [row["±"] is None for row in rows] == [True, False, True, True]
    assert [row["analytic std"] for row in rows] == [each.noise_std for each in walk]
    for row, each in zip(rows, walk, strict=True):
        assert row["posterior std"] == sigma(1.0, each.alpha_bar, each.alpha_bar_prev)
    # the error of the standard deviation, by a difference
    other = transitions(SCHEDULE, 4, 0.0, "analytic", gamma=lambda t: moments.gamma(t) - 1e-6)
    slope = (other[1].noise_std - walk[1].noise_std) / 1e-6
    assert rows[1]["±"] == pytest.approx(slope * 0.01, rel=1e-4)


# -- jobs ----------------------------------------------------------------------------------------------------------


def cells(outputs: Path, *arguments: str) -> list[dict[str, Any]]:
    assert tiny.run(outputs, *arguments, settings=EXACT) == 0
    keys = [row["cell"] for row in tiny.results(tiny.sweeps(outputs)[-1])]
    return [json.loads((outputs / "cells" / key / "result.json").read_text()) for key in keys]


def kept(outputs: Path) -> list[Path]:
    return sorted((outputs / "references").glob("*/second_moments.json"))


@pytest.mark.slow
def test_it_is_estimated_once_and_costs_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two presets, and two seeds of the noise, of one model and one list of timesteps; then another list."""
    spent = count_forwards(monkeypatch)
    arguments = ["sampler=analytic_ddpm,analytic_ddim", "steps=4", "seed=0,1", "-m"]
    found = cells(tmp_path, *arguments)
    _, _, configs = planned([*EXACT, *arguments[:-1]])
    estimating = variance_forwards_by_cell(configs)
    assert estimating == [2 * 30 * 3, 0, 0, 0]
    samples, measuring = image_forwards(configs), sum(config.task.measuring_forwards(config) for config in configs)
    said = f"{samples:,} image-forwards for samples, 180 for the analytic variance and {measuring:,} to measure them\n"
    assert said in capsys.readouterr().err
    assert sum(spent) == samples + 180 + measuring
    (statistic,) = kept(tmp_path)
    tables = [[table for table in cell["tables"] if table["title"].startswith("Analytic variance")] for cell in found]
    assert all(len(of_cell) == 1 and len(of_cell[0]["rows"]) == 4 for of_cell in tables)
    assert "N = 30 " in tables[0][0]["title"]
    for cell in found:
        assert ["references", statistic.parent.name] in cell["objects"]
        assert cell["identity"]["second_moments"] == statistic.parent.name
        assert tiny.measured(cell)["noise_variance"] > 0.0
    assert "Analytic variance" in (tiny.sweeps(tmp_path)[-1] / "report.html").read_text()
    items = {item.name: item for item in inventory(Store(tmp_path))}
    assert items[statistic.parent.name].users, "it is listed, and used"
    assert statistic.parent.name not in {item.name for item in prunable(Store(tmp_path))}
    spent.clear()
    cells(tmp_path, "sampler=analytic_ddim", "steps=4")
    assert spent == [], "the cell was there"
    cells(tmp_path, "sampler=analytic_ddim", "steps=5")
    assert len(kept(tmp_path)) == 2


def test_a_walk_of_one_step_needs_none(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "sampler=analytic_ddim", "steps=1", "sampler.clip=none")
    assert kept(tmp_path) == []
    assert "second_moments" not in cell["identity"]
    assert tiny.measured(cell)["noise_variance"] == 0.0


def test_consistency_estimates_both_walks_and_shares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = count_forwards(monkeypatch)
    arguments = ["task=consistency", "task.many_steps=6", "sampler=analytic_ddim", "steps=3,6", "-m"]
    own, itself = map(tiny.measured, cells(tmp_path, *arguments))
    assert own["consistency_mse"] > 0.0
    assert itself["consistency_mse"] == 0.0
    assert len(kept(tmp_path)) == 2
    _, _, configs = planned([*EXACT, *arguments[:-1]])
    assert variance_forwards_by_cell(configs) == [2 * 30 * (2 + 5), 0]
    assert sum(spent) == image_forwards(configs) + 2 * 30 * (2 + 5)


def test_keys_hold_the_number_of_images_where_it_matters_alone(tmp_path: Path) -> None:
    words = ("model=gaussian", "metrics.features=pixels", "steps=3", *tiny.SMALL)
    analytic = [cell_key(tmp_path, [*words, "sampler=analytic_ddim", f"variance_images={n}"]) for n in (20, 30, 30)]
    assert analytic[0] != analytic[1] == analytic[2]
    for preset in ("ddim", "ddpm_large", "unipc"):
        assert len({cell_key(tmp_path, [*words, f"sampler={preset}", f"variance_images={n}"]) for n in (20, 30)}) == 1


def test_the_walk_is_the_same_for_every_seed_and_runtime(tmp_path: Path) -> None:
    words = ("model=empirical", "metrics.features=pixels", "sampler=analytic_ddpm", "steps=3", *tiny.SMALL)
    jobs = [job_of(tmp_path, [*words, *more]) for more in ((), ("seed=5",), ("runtime=deterministic",))]
    walks = [job.sampler.transitions for job in jobs]
    assert walks[0] == walks[1] == walks[2]
    assert all(math.isfinite(each.noise_std) for each in walks[0])
    assert len(kept(tmp_path)) == 1


def test_several_processes_walk_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked.ranks(monkeypatch)
    hashes = set()
    for count in (1, 2):
        (cell,) = cells(tmp_path / str(count), "sampler=analytic_ddim", "steps=3", f"sampling_devices={count}")
        hashes.add(tiny.measured(cell)["sha256"])
    assert len(hashes) == 1


@pytest.mark.slow
def test_a_network_is_estimated_as_it_is_sampled(tmp_path: Path) -> None:
    """A U-Net, trained for a few steps: the job's Gamma is that of its eps."""
    settings = [text for text in tiny.TINY if not text.startswith("num_samples")]
    job = job_of(tmp_path, [*settings, "num_samples=8", "metrics.features=pixels", "sampler=analytic_ddim", "steps=3"])
    moments = job.second_moments()
    network = job.model.load()
    with torch.inference_mode():
        draws = training_draws(job.data.train, job.config.variance_images, 16, CPU)
        again = estimate_second_moments(job.config.build_sampler(steps=3), network, draws)
    assert moments.by_t == again.by_t
    assert job.sampler.sample(network, torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["analytic_ddpm", "analytic_ddim"])
def test_task_order_knows_gamma_of_its_own_models(preset: str, tmp_path: Path) -> None:
    line = ("task=order", f"sampler={preset}", "sampler.clip=none", "steps=10", "task.steps=[10,50,100,200]")
    (cell,) = cells(tmp_path, *line)
    found = tiny.measured(cell)
    assert found["checks_failed"] == 0
    assert found["moments"] == "holds"
    assert found["order_reached"] == "not applicable"
    assert kept(tmp_path) == []
    _, _, configs = planned([*EXACT, *line])
    assert variance_forwards_by_cell(configs) == [0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=reconstruct"], "task=reconstruct needs the deterministic sampler, and sampler.variance=analytic"),
        (["task=interpolate"], "task=interpolate needs the deterministic sampler, and sampler.variance=analytic"),
        (["task=ode_error"], "task=ode_error needs the deterministic sampler, and sampler.variance=analytic"),
        (["task=benchmark"], "task=benchmark reads no images, and sampler.variance=analytic is estimated from them"),
        (["task=search_timesteps"], "sampler.variance=analytic is estimated for one: set sampler.variance=posterior"),
        (["task=speed_peers", "model=digits"], "set sampler.variance=posterior"),
        (["task=cannot_skip"], "set sampler=ddpm"),
        (
            ["sampler=unipc"],
            "sampler.variance=analytic is of the DDIM family, .* sampler=unipc has a formula of its own",
        ),
        (["sampler=dpmpp_2m_sde", "nfe=5"], "sampler=dpmpp_2m_sde has a formula of its own"),
        (["variance_images=9"], "variance_images"),
    ],
)
def test_what_it_can_not_do_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        tiny.configure("model=gaussian", "sampler.variance=analytic", *overrides)
    assert "\n" not in str(refused.value)


# -- reports -------------------------------------------------------------------------------------------------------


def test_reports_tell_it_from_ddim(tmp_path: Path) -> None:
    labels = [tiny.configure("model=gaussian", f"sampler={name}").labels() for name in ("ddim", "analytic_ddim")]
    assert [noise_label(one) for one in labels] == ["η 0", "η 0, analytic"]
    line = ["steps=3", "num_samples=10", "sampler=ddim,analytic_ddim", "sampler.clip=none", "-m"]
    cells(tmp_path, *line)
    told = (tiny.sweeps(tmp_path)[-1] / "table.md").read_text()
    assert "| η 0 |" in told
    assert "| η 0, analytic |" in told
