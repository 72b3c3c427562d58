"""Claims and what explains them, against theory and by simulation: truths are planted in known Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2, norm

from ddim_lab.conventions.explanation import Explanation, as_written, explain, fit, read_claims
from ddim_lab.conventions.records import Claim, Measured, Tried, Untried
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.estimates import jackknife_se

N, GROUPS = 10_000, 100


# -- claims ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "half_digit", "written"),
    [
        *(
            ("4.16", 4.16, 0.005, "4.16"),
            ("4.2", 4.2, 0.05, "4.2"),
            ("4.20", 4.2, 0.005, "4.20"),
            ("4.", 4.0, 0.5, "4"),
        ),
        *(("13", 13.0, 0.5, "13"), ("1e2", 100.0, 50.0, "100"), (".5", 0.5, 0.05, "0.5")),
        ("1.25e1", 12.5, 0.05, "12.5"),
    ],
)
def test_a_claim_is_rounded_to_its_last_digit(text: str, value: float, half_digit: float, written: str) -> None:
    (claim,) = read_claims(text, N, "S")
    assert (claim.value, claim.at, claim.num_samples) == (value, "", N)
    assert claim.half_digit == pytest.approx(half_digit)
    assert as_written(claim) == written


def test_claims_by_steps_and_by_samples() -> None:
    by_steps = read_claims(" 10:13.36, 50 : 4.67,100:4.16", N, "S")
    assert [(c.at, c.value, c.num_samples) for c in by_steps] == [
        *(("S = 10", 13.36, N), ("S = 50", 4.67, N), ("S = 100", 4.16, N))
    ]
    by_samples = read_claims("5000:9.3,50000:4.16", N, "N")
    assert [(c.at, c.num_samples) for c in by_samples] == [("N = 5,000", 5000), ("N = 50,000", 50_000)]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-4", "nan", "inf", "1_0", "1e999", "1e-400", "0x1", "4.16 FID", "\u0663"),
        *("4,16", "4.16,", "10:13,10:12", "10:13,4", "1.5:3", "x:3", ":3", "0:3", "-5:3", "10:"),
    ],
)
def test_what_is_no_claim_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_claims(text, N, "S")
    assert str(refused.value).startswith(f"--claimed={text}")
    assert "\n" not in str(refused.value)


# -- a world to simulate --------------------------------------------------------------------------------


class World:
    """Protocols whose numbers are known; every draw of samples errs by SES, with correlation RHO between points."""

    def __init__(self, effects: Sequence[float], points: int = 1, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.points = points
        self.ses = 0.05 * np.arange(1, points + 1)
        correlation = np.full((points, points), 0.8) + 0.2 * np.eye(points)
        self.root = np.linalg.cholesky(correlation * np.outer(self.ses, self.ses))
        # in errors of a comparison with a claim of as many samples; the direction differs from factor to factor
        ways = self.random.choice([-1.0, 1.0], (len(effects), points))
        ways[:, 0] = 1.0
        self.truth = 5.0 + np.asarray(effects)[:, None] * ways * self.ses * math.sqrt(2.0)

    def audited(self, commons: Sequence[int] = ()) -> list[Tried]:
        """The plain protocol and one a factor, on one set of samples: its error is common to all."""
        drawn = self.random.standard_normal((GROUPS, self.points)) @ self.root.T * math.sqrt(GROUPS)
        names: list[tuple[str, ...]] = [(), *((f"factor_{index}",) for index in range(len(self.truth)))]
        truth = np.vstack([np.full(self.points, 5.0), self.truth])
        return [
            tried(factors, at + drawn, (3, *commons)[index] if commons else 2)
            for index, (factors, at) in enumerate(zip(names, truth, strict=True))
        ]

    def claims(self, cause: int, count: int = N, places: int = 3, alone: bool = False) -> list[Claim]:
        """What somebody gets from `count` other samples, by a factor; -1 for the plain protocol.

        Samples are of the same x_T at all points, or, `alone`, of other ones at each.
        """
        truth = np.full(self.points, 5.0) if cause < 0 else self.truth[cause]
        root = np.diag(self.ses) if alone else self.root
        numbers = truth + root @ self.random.standard_normal(self.points) * math.sqrt(N / count)
        return [
            Claim(value=round(v, places), at=f"S = {i}", num_samples=count, half_digit=0.5 * 10.0**-places)
            for i, v in enumerate(numbers.tolist())
        ]


def tried(factors: tuple[str, ...], groups: NDArray[np.float64], common: int = 2) -> Tried:
    """A protocol's number at each point: the mean of its groups [G, points]."""
    values = groups.mean(axis=0)
    left_out = (len(groups) * values - groups) / (len(groups) - 1)
    measured = tuple(
        Measured(value=v, se=jackknife_se(r), replicates=tuple(r))
        for v, r in zip(values.tolist(), left_out.T.tolist(), strict=True)
    )
    label = " + ".join(name.replace("_", " ") for name in factors)
    return Tried(factors=factors, label=label, name=f"FID variant: {label}", common=common, measured=measured)


def explained(
    claims: Sequence[Claim], protocols: Sequence[Tried], pairs: Sequence[Tried] = (), untried: Sequence[Untried] = ()
) -> Explanation:
    found = explain(
        *(claims, protocols[0], protocols[1:], pairs),
        metric="FID",
        num_samples=N,
        facts="Inception, reference CIFAR-10 train",
        untried=untried,
    )
    assert found.paragraph
    assert "nan" not in found.paragraph
    assert "\n" not in found.paragraph
    assert len(found.paragraph.split()) <= 120, found.paragraph
    return found


def one(value: float, *factors: str, se: float | None = 0.05, common: int = 2, who: tuple[str, ...] = ()) -> Tried:
    """A protocol with a number at a single point."""
    label = " + ".join(factors)
    return Tried(factors=factors, label=label, common=common, measured=(Measured(value=value, se=se),), who=who)


def claim(value: float, count: int = N, half_digit: float = 0.005) -> Claim:
    return Claim(value=value, num_samples=count, half_digit=half_digit)


# -- a fit ----------------------------------------------------------------------------------------------


def test_a_fit_of_one_claim_is_the_normal_distribution() -> None:
    """Our error, the claim's at its own N, and its rounding: sqrt(se^2 + se^2 N / N' + h^2 / 3)."""
    found = fit([claim(4.5, N // 4, 0.05)], one(4.2), N)
    assert found is not None
    sd = math.sqrt(0.05**2 * (1 + 4) + 0.05**2 / 3)
    assert found.sds == pytest.approx((sd,))
    assert found.errors == pytest.approx(0.3 / sd)
    assert found.p == pytest.approx(2 * norm.sf(0.3 / sd))
    assert found.log_likelihood == pytest.approx(norm.logpdf(0.3, scale=sd) + 0.5 * math.log(2 * math.pi))


def test_points_count_by_their_correlation() -> None:
    """Equal differences at points that err together are one; opposed ones are the claims' own, which may err apart."""
    world = World([0.0], points=2, seed=3)
    world.ses[:] = 0.05
    protocol = world.audited()[0]
    values = [one.value for one in protocol.measured]
    errors = [one.se or 0.0 for one in protocol.measured]
    found = {}
    for sign in (1.0, -1.0):
        moved = [values[0] + 2 * errors[0], values[1] + sign * 2 * errors[1]]
        found[sign] = fit([Claim(value=v, num_samples=N, half_digit=1e-4) for v in moved], protocol, N)
    same, opposed = found[1.0], found[-1.0]
    assert same is not None
    assert opposed is not None
    rho = np.corrcoef([one.replicates for one in protocol.measured])[0, 1]
    assert same.chi_square == pytest.approx(4 / (1 + rho), rel=1e-2)
    assert opposed.chi_square == pytest.approx(8 / (2 - rho), rel=1e-2)
    assert same.p == pytest.approx(chi2.sf(same.chi_square, 2))


def test_points_over_n_are_of_the_claims_own_n() -> None:
    """Where claims go by N, ours are taken at the same N: their errors are alike."""
    (at,) = read_claims("500:4.20", N, "N")
    found = fit([at], one(4.2), N)
    assert found is not None
    assert found.sds == pytest.approx((math.sqrt(2 * 0.05**2 + 0.005**2 / 3),))


def test_without_an_error_nothing_fits_and_an_error_of_zero_leaves_the_rounding() -> None:
    assert fit([claim(4.2)], one(4.2, se=None), N) is None
    assert fit([claim(4.2), claim(4.2)], one(4.2), N) is None
    assert fit([], one(4.2), N) is None
    rounded, exact = fit([claim(4.2)], one(4.205, se=0.0), N), fit([claim(4.2, half_digit=0.0)], one(4.2, se=0.0), N)
    assert rounded is not None
    assert rounded.compatible
    assert exact is not None
    assert exact.p == 1.0
    identical = Tried(measured=(Measured(value=4.0, se=0.1, replicates=(4.0, 4.1, 4.2, 3.9)),) * 2)
    together = fit([claim(4.1), claim(4.1)], identical, N)
    assert together is not None  # with so few groups, points count as independent
    assert math.isfinite(together.chi_square)
    identical = Tried(measured=(Measured(value=4.0, se=0.1, replicates=tuple(np.linspace(3.9, 4.1, 20).tolist())),) * 2)
    together = fit([claim(4.1), claim(4.1)], identical, N)
    assert together is not None
    assert together.chi_square == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("points", "count", "alone"), [(1, N, False), (3, N, False), (3, N // 4, False), (3, N, True), (3, N // 4, True)]
)
def test_the_true_protocol_is_compatible_99_times_in_100(points: int, count: int, alone: bool) -> None:
    """Of one claim; of several it is not known whether they err together, which costs a little or gains it."""
    draws, world = 400, World([6.0], points, seed=points + count)
    found = [fit(world.claims(0, count, alone=alone), world.audited()[1], N) for _ in range(draws)]
    fits = [one for one in found if one is not None]
    assert len(fits) == draws
    compatible = sum(one.compatible for one in fits) / draws
    assert compatible > (0.99 - 3.0 * math.sqrt(0.99 * 0.01 / draws) if points == 1 else 0.95)
    likelier = sum(one.p >= 0.05 for one in fits) / draws
    assert points > 1 or abs(likelier - 0.95) < 3.0 * math.sqrt(0.95 * 0.05 / draws)


# -- what follows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 3])
def test_a_planted_cause_is_named_first(points: int) -> None:
    """Causes of over 5 errors that are over 3 apart from the next: 28 in 30, on independent samples.

    One in a hundred is not compatible with its own claim, as `COMPATIBLE_P` says; the order has it first even then.
    """
    effects = [-22.0, -14.0, -9.0, -5.5, 0.2, 0.5, -0.3, 5.5, 9.5, 14.0, 19.0, 25.0]
    causes = [index for index, effect in enumerate(effects) if abs(effect) > 5.0]
    world, trials = World(effects, points, seed=points), 300
    named = first = identified = 0
    for trial in range(trials):
        cause = (f"factor_{causes[trial % len(causes)]}",)
        found = explained(world.claims(causes[trial % len(causes)]), world.audited())
        named += found.explained[:1] == (cause,)
        first += found.singles[0].factors == cause
        identified += found.verdict == "identified"
    assert named >= 28 / 30 * trials
    assert first >= 0.98 * trials
    assert identified >= 0.9 * trials


def test_causes_of_equal_size_are_ambiguous_until_a_second_point_tells_them_apart() -> None:
    """Alike at the first point, opposed at the others."""
    for points, expected in ((1, "ambiguous"), (2, "identified")):
        world = World([8.0, 8.2, -9.0], points, seed=4)
        if points == 2:
            world.truth[1, 1] = 10.0 - world.truth[0, 1]
        verdicts = [str(explained(world.claims(0), world.audited()).verdict) for _ in range(20)]
        assert verdicts.count(expected) >= 17, verdicts


@pytest.mark.parametrize("points", [1, 3])
def test_ten_times_off_is_not_explained_and_the_plain_number_agrees(points: int) -> None:
    world = World([6.0, -6.0, 12.0, 20.0], points, seed=7)
    verdicts = []
    for _ in range(20):
        off = [c.model_copy(update={"value": c.value * 10.0}) for c in world.claims(0)]
        assert explained(off, world.audited()).verdict == "unexplained"
        verdicts.append(explained(world.claims(-1), world.audited()).verdict)
    assert verdicts.count("agrees") >= 17


def test_order_is_by_fit_and_by_how_often_the_field_does_it() -> None:
    protocols = [one(5.0), one(4.2, "rare", common=1), one(4.21, "usual", common=3), one(4.9, "far", common=3)]
    found = explained([claim(4.2)], protocols)
    assert found.verdict == "ambiguous"
    assert found.explained == (("usual",), ("rare",))
    assert found.ties == (("usual",), ("rare",))
    assert [one.label for one in found.singles] == ["usual", "rare", "far"]
    alike = [one(5.0), one(4.2, "rare", common=1), one(4.2, "sometimes", common=2)]
    assert explained([claim(4.2)], alike).explained == (("sometimes",), ("rare",))
    # four times as often outweighs a difference of sqrt(2 log 4) = 1.67 errors, and no more
    worse = [one(5.0), one(4.2, "rare", common=1), one(4.315, "usual", common=3)]
    assert explained([claim(4.2)], worse).explained[0] == ("usual",)
    worse[2] = one(4.322, "usual", common=3)
    assert explained([claim(4.2)], worse).explained[0] == ("rare",)


def test_singles_come_before_pairs_and_pairs_go_by_both() -> None:
    protocols = [one(5.0), one(4.3, "a", common=1), one(3.0, "b", common=3), one(3.0, "c", common=3)]
    pairs = [one(4.2, "a", "b", common=1), one(4.21, "b", "c", common=3)]
    found = explained([claim(4.2)], protocols, pairs)
    assert found.verdict == "identified"
    assert found.explained == (("a",), ("b", "c"), ("a", "b"))
    assert [one.weight for one in found.pairs] == [16.0, 4.0]
    assert "So do 2 of 2 pairs tried, but one convention is the simpler answer." in found.paragraph


def test_a_coarse_claim_identifies_nothing() -> None:
    """4 is anything from 3.5 to 4.5, where 4.20 is not."""
    protocols = [one(5.0), one(4.2, "a"), one(3.8, "b")]
    assert explained([claim(4.2)], protocols).verdict == "identified"
    (coarse,) = read_claims("4", N, "S")
    found = explained([coarse], protocols)
    assert found.verdict == "ambiguous"
    assert set(found.explained) == {("a",), ("b",)}


def test_what_the_paragraph_says() -> None:
    untried = [
        Untried(factors=("x",), label="x", why_not="costs 3 h", left=True),
        Untried(factors=("y", "z"), label="y + z", why_not="no classes"),
    ]
    plain = one(4.67)

    def told(*protocols: Tried, pairs: Sequence[Tried] = (), at: Claim | None = None) -> tuple[str, str]:
        found = explained([at or claim(4.16)], [plain, *protocols], pairs, untried)
        assert found.paragraph.endswith("Not tried: 1 convention left out and 1 pair that can't be tried here.")
        assert found.paragraph.startswith(
            "FID is 4.670 ± 0.050 here (N = 10,000; Inception, reference CIFAR-10 train), "
        )
        return found.verdict, found.paragraph

    verdict, text = told(one(4.2, "JPEG", who=("clean-fid 0.1.35", "others")), one(6.0, "flips"))
    assert verdict == "identified"
    assert "4.16 ± 0.05 claimed: 0.51 apart, 7.2 errors." in text
    assert (
        "Of 2 conventions changed one at a time, one alone fits: JPEG (FID variant 4.200 ± 0.050, 0.6 errors away)"
        in text
    )
    assert ", as in clean-fid 0.1.35 and others. Not tried" in text

    verdict, text = told(one(4.2, "JPEG"), one(6.0, "flips"), pairs=[one(6.0, "JPEG", "flips")])
    assert verdict == "identified"
    assert "None of 1 pair tried fits." in text

    verdict, text = told(one(6.0, "a"), pairs=[one(4.1, "a", "b"), one(4.2, "b", "c")])
    assert verdict == "ambiguous"
    assert (
        "This does not identify a cause: none of 1 single convention fits, and 2 of 2 pairs fit, best first: " in text
    )

    verdict, text = told()
    assert verdict == "unexplained"
    assert "It is not explained by anything tried (nothing)." in text

    verdict, text = told(one(6.0, "flips"), one(6.5, "JPEG"), pairs=[one(4.1, "flips", "JPEG", who=("a paper",))])
    assert verdict == "identified"
    assert "None of 2 single conventions fits. Of 1 pair one alone does: flips + JPEG (FID variant 4.100" in text

    several = [one(4.16 + 0.01 * i, f"factor {i}") for i in range(6)]
    verdict, text = told(*several, pairs=[one(4.1, "factor 1", "factor 2")])
    assert verdict == "ambiguous"
    assert "This does not identify a cause: 6 of 6 single conventions fit, best first: factor 0 (" in text
    assert " and 3 more." in text
    assert "None of the others can be told from the first by what is claimed; more claimed numbers" in text
    assert "1 of 1 pair fit" in text

    verdict, text = told(one(6.0, "flips"), pairs=[one(7.0, "flips", "JPEG")])
    assert verdict == "unexplained"
    assert "It is not explained by anything tried (1 convention and 1 pair): the nearest convention is flips (" in text
    assert "and the nearest pair is flips + JPEG (FID variant 7.000 ± 0.050, 40 errors away)." in text

    verdict, text = told(one(4.7, "flips"), at=claim(4.7, 5000))
    assert verdict == "agrees"
    assert "The claim is of 5,000 images, ours of 10,000: FID falls with N." in text
    assert "They agree, 0.3 errors apart: nothing needs explaining. 1 of 1 single convention tried" in text

    found = explained([claim(4.16)], [one(4.67, se=None), one(4.16, "JPEG")])
    assert (found.verdict, found.explained) == ("", ())
    assert "no error" in found.paragraph
