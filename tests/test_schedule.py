"""Schedules and spacings against closed forms, a rival's tables and exact integer arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from official import official_alpha, official_sequence

from ddim_lab.schedule import (
    CLEAN,
    LEVEL_SPACINGS,
    SPACINGS,
    WHOLE_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
    timestep_pairs,
    to_timestep,
    to_whole,
)

LINEAR = NoiseSchedule.linear()
TOTALS = (1, 2, 3, 4, 5, 7, 10, 37, 256, 999, 1000)


# -- alpha_bar -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "value", "tolerance"), [(0, 0.9999, 1e-15), (800, 1.50752e-3, 5e-9), (999, 4.03583e-5, 5e-11)]
)
def test_alpha_bar_anchors(t: int, value: float, tolerance: float) -> None:
    assert NoiseSchedule.linear().alpha_bar(t) == pytest.approx(value, abs=tolerance)


def test_clean_level_is_exactly_one_and_the_index_starts_at_zero() -> None:
    schedule = NoiseSchedule.linear()
    assert schedule.alpha_bar(CLEAN) == 1.0
    assert [schedule.alpha_bar(t) for t in range(-1, 1000)] == [1.0, *schedule.alpha_bars]
    assert schedule.alpha_bar(0) == 1.0 - schedule.betas[0]
    for t in (-1, 0, 1, 500, 999):
        assert schedule.alpha_bar(t) == official_alpha(schedule.betas, t)
    for t in (-2, 1000):
        with pytest.raises(ValueError, match="outside"):
            schedule.alpha_bar(t)


def test_alpha_bar_is_float64_and_read_only() -> None:
    """float32 products are off by 7e-7 at t = 999: harmless there, but not what is kept here."""
    schedule = NoiseSchedule.linear()
    exact = Fraction(1)
    for beta in schedule.betas:
        exact *= 1 - Fraction(float(beta))
    assert abs(schedule.alpha_bar(999) / float(exact) - 1.0) < 1e-13
    single = float(np.cumprod(1.0 - schedule.betas.astype(np.float32), dtype=np.float32)[999])
    assert 1e-7 < abs(single / float(exact) - 1.0) < 1e-5
    assert schedule.betas.dtype == schedule.alpha_bars.dtype == np.float64
    for values in (schedule.betas, schedule.alpha_bars):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0.5


@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (NoiseSchedule.linear, "linear"),
        (NoiseSchedule.scaled_linear, "scaled_linear"),
        (NoiseSchedule.cosine, "squaredcos_cap_v2"),
    ],
)
@pytest.mark.parametrize("total", [50, 1000])
def test_tables_equal_diffusers(make: Callable[[int], NoiseSchedule], theirs: str, total: int) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=total, beta_schedule=theirs)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), make(total).alpha_bars, rtol=3e-5)


def test_cosine_is_its_formula_until_the_cap() -> None:
    schedule = NoiseSchedule.cosine(1000)
    f = [math.cos(math.pi / 2 * (u / 1000 + 0.008) / 1.008) ** 2 for u in range(1001)]
    uncapped = schedule.betas < 0.999
    assert uncapped.sum() >= 990
    last = int(np.flatnonzero(uncapped).max())
    np.testing.assert_allclose(schedule.alpha_bars[: last + 1], np.array(f[1 : last + 2]) / f[0], rtol=1e-9)
    assert schedule.betas.max() == 0.999


def test_sigmoid_and_constant_are_their_formulas() -> None:
    sigmoid = NoiseSchedule.sigmoid(101, 1e-4, 0.02)
    for i in (0, 17, 50, 100):
        u = -6.0 + 12.0 * i / 100
        assert sigmoid.betas[i] == pytest.approx(1e-4 + 0.0199 / (1.0 + math.exp(-u)), rel=1e-12)
    constant = NoiseSchedule.constant(40, 0.02)
    assert constant.alpha_bar(39) == pytest.approx(0.98**40, rel=1e-13)


def test_betas_from_a_file(tmp_path: Path) -> None:
    betas = np.linspace(1e-3, 0.05, 12)
    np.savetxt(tmp_path / "betas.txt", betas, fmt="%.18e")
    np.save(tmp_path / "betas.npy", betas)
    for name in ("betas.txt", "betas.npy"):
        np.testing.assert_array_equal(NoiseSchedule.from_file(tmp_path / name).betas, betas)
    (tmp_path / "words.txt").write_text("not numbers\n")
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savetxt(tmp_path / "table.txt", np.full((3, 2), 0.1))
    for name in ("words.txt", "pickled.npy", "table.txt", "missing.txt"):
        with pytest.raises(ValueError, match="betas"):
            NoiseSchedule.from_file(tmp_path / name)


@pytest.mark.parametrize(
    "betas",
    [
        pytest.param([], id="empty"),
        pytest.param([[0.1]], id="2-d"),
        pytest.param([0.1, 0.0], id="zero"),
        pytest.param([0.1, 1.0], id="one"),
        pytest.param([-0.1, 0.1], id="negative"),
        pytest.param([0.1, math.nan], id="nan"),
        pytest.param([0.1, math.inf], id="inf"),
        pytest.param([1e-17, 0.1], id="alpha_bar stays 1"),
        pytest.param([0.5, 1e-17], id="alpha_bar stands still"),
        pytest.param([0.9] * 1000, id="alpha_bar underflows to 0"),
        pytest.param([0.5] * 200, id="alpha_bar below float32"),
    ],
)
def test_bad_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule(betas)


@pytest.mark.parametrize(
    "arguments",
    [
        *((total, 1e-4, 0.02) for total in (0, -5, 2.5, 20_000)),
        *(
            (10, start, end)
            for start, end in [(0.02, 1e-4), (0.0, 0.02), (1e-4, 1.0), (math.nan, 0.02), (1e-4, math.nan)]
        ),
    ],
)
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
def test_bad_ranges_are_refused(name: str, arguments: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match=r"beta|num_timesteps"):
        getattr(NoiseSchedule, name)(*arguments)


@pytest.mark.parametrize("arguments", [(0,), (10, math.nan), (10, -0.5), (10, 0.008, 1.0), (10, 0.008, math.nan)])
def test_bad_cosine_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"beta|num_timesteps"):
        NoiseSchedule.cosine(*arguments)


# -- spacings, in exact arithmetic -------------------------------------------------------------------------------


def exact_uniform(steps: int, total: int) -> list[int]:
    return [i * total // steps for i in range(steps)]


def exact_trailing(steps: int, total: int) -> list[int]:
    """The smallest t with (t + 1) / T >= (i + 1) / S."""
    return [((i + 1) * total + steps - 1) // steps - 1 for i in range(steps)]


def exact_linspace(steps: int, total: int) -> list[int]:
    """The nearest whole number, of two equally near the even one."""
    if steps == 1:
        return [total - 1]
    parts = (divmod(i * (total - 1), steps - 1) for i in range(steps))
    return [whole + (2 * rest + whole % 2 > steps - 1) for whole, rest in parts]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(
    ("name", "exact"), [("uniform", exact_uniform), ("trailing", exact_trailing), ("linspace", exact_linspace)]
)
def test_integer_spacings_are_their_definition_for_every_s(
    name: str, exact: Callable[[int, int], list[int]], total: int
) -> None:
    for steps in range(1, total + 1):
        assert spaced_timesteps(name, steps, total).tolist() == exact(steps, total), steps


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("name", WHOLE_SPACINGS)
def test_every_whole_spacing_increases_within_range_for_every_s(name: str, total: int) -> None:
    for steps in range(1, total + 1):
        timesteps = spaced_timesteps(name, steps, total)
        assert timesteps.dtype == np.int64
        assert timesteps[0] >= 0
        assert timesteps[-1] <= total - 1
        assert (np.diff(timesteps) > 0).all()
        assert 1 <= len(timesteps) <= steps
        if name in ("uniform", "trailing", "linspace"):
            assert len(timesteps) == steps
        top = {
            "uniform": total - math.ceil(Fraction(total, steps)),
            "quadratic": 0 if steps == 1 else None,
            "quadratic_full": 0 if steps == 1 else total - 1,
        }.get(name, total - 1)
        if top is not None:
            assert timesteps[-1] == top, steps
        if steps > 1 and name not in ("trailing",):
            assert timesteps[0] == 0


def assert_floors(timesteps: np.ndarray, floors: np.ndarray, edges: np.ndarray, context: object) -> None:
    """The set of floors; where the exact value is a whole number float64 may land just below it (`edges`)."""
    allowed = set(floors.tolist()) | {int(value) - 1 for value in floors[edges]}
    required = set(floors[~edges].tolist())
    assert required <= set(timesteps.tolist()) <= allowed, context


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("name", "share"), [("quadratic", Fraction(4, 5)), ("quadratic_full", Fraction(1))])
def test_quadratic_spacings_are_floors_of_exact_squares(name: str, share: Fraction, total: int) -> None:
    numerator, denominator = (share * total).as_integer_ratio()
    for steps in range(2, total + 1):
        squares = np.arange(steps, dtype=object) ** 2 * numerator
        floors = (squares // (denominator * (steps - 1) ** 2)).astype(np.int64)
        edges = (squares % (denominator * (steps - 1) ** 2) == 0) & (np.arange(steps) > 0)
        capped = np.minimum(floors, total - 1)
        assert_floors(spaced_timesteps(name, steps, total), capped, edges.astype(bool), steps)


@pytest.mark.parametrize("total", [10, 37, 256, 1000])
def test_log_spacing_is_floors_of_exact_powers(total: int) -> None:
    """floor(T^(i/(S-1))) is the largest n with n^(S-1) <= T^i."""
    for steps in range(2, min(total, 40) + 1):
        floors, edges = [], []
        for i in range(steps):
            guess = round(total ** (i / (steps - 1)))
            n = next(n for n in (guess + 1, guess, guess - 1) if n ** (steps - 1) <= total**i)
            floors.append(n - 1)
            edges.append(i > 0 and n ** (steps - 1) == total**i)
        timesteps = spaced_timesteps("log", steps, total)
        assert_floors(timesteps, np.array(floors), np.array(edges), steps)


@pytest.mark.parametrize(
    ("name", "steps", "timesteps"),
    [
        ("uniform", 10, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("uniform", 3, [0, 333, 666]),
        ("trailing", 10, [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]),
        ("trailing", 3, [333, 666, 999]),
        ("linspace", 4, [0, 333, 666, 999]),
        ("linspace", 3, [0, 500, 999]),
        ("quadratic", 10, [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]),
        ("quadratic_full", 10, [0, 12, 49, 111, 197, 308, 444, 604, 790, 999]),
        ("log", 10, [0, 1, 3, 9, 20, 45, 99, 214, 463, 999]),
        ("uniform", 1, [0]),
        ("trailing", 1, [999]),
        ("linspace", 1, [999]),
        ("quadratic", 1, [0]),
        ("quadratic_full", 1, [0]),
        ("log", 1, [999]),
    ],
)
def test_pinned_lists(name: str, steps: int, timesteps: list[int]) -> None:
    assert spaced_timesteps(name, steps).tolist() == timesteps


def test_quadratic_equals_the_official_list_without_its_repeats() -> None:
    for steps in (*range(2, 201), 500, 1000):
        assert spaced_timesteps("quadratic", steps).tolist() == sorted(set(official_sequence("quad", steps))), steps
    assert spaced_timesteps("quadratic", 20)[:8].tolist() == [0, 2, 8, 19, 35, 55, 79, 108]


@pytest.mark.parametrize(("steps", "distinct"), [(50, 49), (100, 96), (200, 187), (500, 422), (1000, 688)])
def test_quadratic_repeats_are_dropped_and_counted(steps: int, distinct: int) -> None:
    assert len(spaced_timesteps("quadratic", steps)) == distinct


@pytest.mark.parametrize(("steps", "official_count"), [(300, 334), (600, 1000), (30, 31)])
def test_uniform_gives_the_steps_asked_for(steps: int, official_count: int) -> None:
    """A stride of T // S gives another number of steps when S does not divide T; ours never does."""
    assert len(official_sequence("uniform", steps)) == official_count
    assert len(spaced_timesteps("uniform", steps)) == steps


def test_uniform_equals_the_official_list_where_s_divides_t() -> None:
    for steps in (s for s in range(1, 1001) if 1000 % s == 0):
        assert spaced_timesteps("uniform", steps).tolist() == official_sequence("uniform", steps)


@pytest.mark.parametrize(("steps", "top"), [(10, 900), (20, 950), (50, 980), (100, 990), (1000, 999), (300, 996)])
def test_uniform_starts_below_the_last_timestep(steps: int, top: int) -> None:
    assert spaced_timesteps("uniform", steps)[-1] == top


@pytest.mark.parametrize("steps", [0, -3, 1001, 10.5, math.nan, math.inf, True, "abc", None])
@pytest.mark.parametrize("name", SPACINGS)
def test_bad_step_counts_are_refused(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        spaced_timesteps(name, steps, LINEAR)


def test_unknown_spacing_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="uniform, trailing, linspace, quadratic, quadratic_full, log, logsnr, karras"):
        spaced_timesteps("cubic", 10)


@pytest.mark.parametrize("name", LEVEL_SPACINGS)
def test_a_spacing_of_levels_needs_more_than_t(name: str) -> None:
    with pytest.raises(ValueError, match=f"spacing {name} depends on alpha_bar, not on T alone: give the schedule"):
        spaced_timesteps(name, 10)


# -- between whole timesteps -------------------------------------------------------------------------------------

SCHEDULES = {
    "linear": LINEAR,
    "cosine": NoiseSchedule.cosine(),
    "scaled_linear": NoiseSchedule.scaled_linear(37),
    "two": NoiseSchedule.linear(2),
    "one": NoiseSchedule.linear(1),
    "faint": NoiseSchedule([1e-15, 0.1, 1e-12, 0.999, 0.3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_bar_is_log_linear_between_whole_timesteps(name: str) -> None:
    schedule = SCHEDULES[name]
    for t in range(schedule.num_timesteps - 1):
        low, high = schedule.alpha_bar(t), schedule.alpha_bar(t + 1)
        assert schedule.alpha_bar(float(t)) == low
        for weight in (0.25, 0.5, 0.9):
            exact = (1 - weight) * math.log(low) + weight * math.log(high)
            assert schedule.alpha_bar(t + weight) == pytest.approx(math.exp(exact), rel=1e-13)
            assert high <= schedule.alpha_bar(t + weight) <= low
    for t in (-0.5, schedule.num_timesteps - 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="outside"):
            schedule.alpha_bar(t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_timestep_is_found_by_its_half_log_snr(name: str) -> None:
    """Exactly where it is whole; else to rounding: alpha_bar's last digit is worth 1e-16 / (1 - alpha_bar) of it."""
    schedule = SCHEDULES[name]
    total = schedule.num_timesteps
    assert [schedule.timestep(schedule.half_log_snr(t)) for t in range(total)] == list(range(total))
    if name != "faint":
        for t in np.random.default_rng(0).uniform(0, total - 1, 200).tolist():
            assert schedule.timestep(schedule.half_log_snr(t)) == pytest.approx(t, abs=1e-9)
    for level in (schedule.half_log_snr(0) + 1e-6, schedule.half_log_snr(total - 1) - 1e-6, math.nan):
        with pytest.raises(ValueError, match="outside"):
            schedule.timestep(level)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", LEVEL_SPACINGS)
def test_spacings_of_levels_are_their_definitions(spacing: str, name: str) -> None:
    """To the float32 that each timestep is."""
    schedule = SCHEDULES[name]
    total = schedule.num_timesteps
    high, low = schedule.half_log_snr(0), schedule.half_log_snr(total - 1)
    for steps in sorted({1, min(2, total), min(3, total), min(20, total), total}):
        timesteps = spaced_timesteps(spacing, steps, schedule)
        assert (np.diff(timesteps) > 0).all()
        assert (timesteps == timesteps.astype(np.float32)).all()
        assert timesteps[-1] == total - 1
        if steps == 1:
            assert len(timesteps) == 1
            continue
        assert timesteps[0] == 0
        if name in ("cosine", "faint"):  # flat or steep between two timesteps: float32 holds t, not lambda
            continue
        assert len(timesteps) == steps
        i = np.arange(steps) / (steps - 1)
        if spacing == "logsnr":
            exact = low + i * (high - low)
        else:
            most, least = math.exp(-low) ** (1 / 7), math.exp(-high) ** (1 / 7)
            exact = -np.log((most + i * (least - most)) ** 7)
        found = [schedule.half_log_snr(t) for t in timesteps[::-1]]
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_karras_equals_diffusers(steps: int) -> None:
    """Its levels are float32, 1 - alpha_bar included: 8e-5 off at t = 0."""
    from diffusers import DPMSolverMultistepScheduler

    rival = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    rival.set_timesteps(steps)
    ours = [math.exp(-LINEAR.half_log_snr(t)) for t in spaced_timesteps("karras", steps, LINEAR)[::-1]]
    np.testing.assert_allclose([*ours, 0.0], rival.sigmas.numpy(), rtol=1e-4)


def test_rounding_drops_the_repeats_that_it_makes_and_no_others() -> None:
    assert to_whole([0, 0.4, 0.6, 1.2, 7.5, 9]) == [0, 1, 8, 9]
    assert to_whole([9.4, 9.2, 3.0, 3.0, 0]) == [9, 3, 3, 0]
    assert to_whole([3.2, 3.2, 1]) == [3, 3, 1]


@pytest.mark.parametrize(
    ("t", "held"), [(3, 3), (3.0, 3), (2.5, 2.5), (500.1, float(np.float32(500.1))), (1 - 1e-9, 1)]
)
def test_a_timestep_is_an_int_or_a_float32(t: float, held: float) -> None:
    found = to_timestep(t)
    assert found == held
    assert isinstance(found, int) == (held == int(held))


# -- pairs -----------------------------------------------------------------------------------------------------


def test_pairs_walk_from_noise_to_the_clean_image() -> None:
    for given in ([1, 500, 999], [999, 500, 1], np.array([1, 500, 999]), (999.0, 500.0, 1.0)):
        assert timestep_pairs(given, 1000) == ((999, 500), (500, 1), (1, CLEAN))
    assert timestep_pairs([0], 1) == ((0, CLEAN),)
    assert timestep_pairs([5, 5, 0], 10) == ((5, 5), (5, 0), (0, CLEAN))
    found = timestep_pairs([0.0, 2.5, 5.0], 10)
    assert found == ((5, 2.5), (2.5, 0), (0, CLEAN))
    assert [type(t) for t, _ in found] == [int, float, int]


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 13, 300, 1000])
def test_pairs_go_down_and_never_stand_at_zero(name: str, steps: int) -> None:
    """Neither upwards, nor from t = 0 to t = 0, nor to alpha_bar(0) as the end: the seed text's three faults."""
    timesteps = spaced_timesteps(name, steps, LINEAR)
    pairs = timestep_pairs(timesteps, 1000)
    assert [t for t, _ in pairs] == timesteps[::-1].tolist()
    assert all(t > t_prev for t, t_prev in pairs)
    assert [t_prev for _, t_prev in pairs].count(CLEAN) == 1
    assert pairs[-1][1] == CLEAN


@pytest.mark.parametrize(
    "timesteps",
    [
        [],
        [1000],
        [-1, 5],
        [1, 5, 3],
        [1.5, 0.5, 1],
        [-0.5],
        [999.5],
        [1e300],
        [math.nan],
        [math.inf],
        [True, 5],
        ["a"],
        [None],
    ],
)
def test_bad_timesteps_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        timestep_pairs(timesteps, 1000)
