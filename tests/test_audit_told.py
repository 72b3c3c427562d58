"""An audit as it is told: every number is the record's, nothing is left out, no variant is called FID."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddim_lab.audit.page import chart, page
from ddim_lab.audit.told import PAIRS, WIDTH, console, mirror, wandb_payload
from ddim_lab.conventions.explanation import explain, fit
from ddim_lab.conventions.records import Audited, Claim, Measured, Tried, Untried
from ddim_lab.jobs.tracking import TrackingConfig
from ddim_lab.metrics.estimates import jackknife_se, paired_se
from ddim_lab.report.drawing import static_svg

HOSTILE = "<script>alert(1)</script> & 'samples'.npz"

FACTORS: tuple[tuple[str, str, str, float, int, tuple[str, ...]], ...] = (
    ("test_split", "reference", "test images as the reference", 2.31, 2, ("LD3", "some papers")),
    ("both_splits", "reference", "train and test images as the reference", 0.21, 1, ("improved-diffusion 0.0",)),
    ("flips", "reference", "each reference image mirrored, too", 0.02, 1, ("EDM2",)),
    ("count_49984", "number of samples", "49,984 samples instead of 50,000", 0.001, 2, ("guided-diffusion 2021",)),
    ("half", "number of samples", "half of the samples", 0.44, 3, ("ablations of most papers", "REPA", "SiT 1.0")),
    ("infinite", "number of samples", "extrapolated to infinitely many samples", -0.71, 1, ("Chong and Forsyth 2020",)),
    ("jpeg_75", "pixels", "JPEG of quality 75 for the samples", 11.4, 1, ("clean-fid 0.1.35",)),
    (
        "jpeg_75_of_reference",
        "pixels",
        "JPEG of quality 75 for the reference",
        -0.52,
        2,
        ("DDIM's authors", "Song 2021"),
    ),
    ("truncated", "pixels", "truncated to 256 levels instead of rounded", 0.06, 3, ("score_sde_pytorch 2021",)),
    ("antialiased", "network", "antialiased resize", -0.49, 3, ("torchmetrics 1.4", "clean-fid 0.1.35")),
    ("torchvision", "network", "torchvision's Inception", 3.9, 2, ("ignite 0.5",)),
    ("covariance_over_n", "estimate", "covariances over n instead of n - 1", -0.0003, 2, ("NumPy's bias=True",)),
)
POINTS = {1: ("",), 3: ("S = 10", "S = 50", "S = 100")}
PLAIN = (4.67, 13.9, 7.2)


def measured(random: np.random.Generator, change: float, points: int, shared: Any) -> tuple[Measured, ...]:
    """Numbers of one protocol over common groups; its own part of the error goes with the change."""
    found = []
    for point in range(points):
        own = random.standard_normal(100) * 0.5 * abs(change) ** 0.5
        groups = PLAIN[point] + change + 0.4 * shared[point] + (own - own.mean() if change else 0.0)
        plain = PLAIN[point] + 0.4 * shared[point]
        left, plain_left = ((100 * g.mean() - g) / 99 for g in (groups, plain))
        of_plain = change == 0.0
        found.append(
            Measured(
                value=float(groups.mean()),
                se=jackknife_se(left.tolist()),
                change=None if of_plain else float(groups.mean() - plain.mean()),
                change_se=None if of_plain else paired_se(plain_left.tolist(), left.tolist()),
                replicates=tuple(left.tolist()),
            )
        )
    return tuple(found)


def audited(points: int = 1, claimed: bool = True, subject: str = "samples.npz") -> Audited:
    """An audit as one of CIFAR-10 might come out: invented numbers."""
    random = np.random.default_rng(5)
    shared = random.standard_normal((points, 100))
    plain = Tried(name="FID", label="as the field takes it", measured=measured(random, 0.0, points, shared))
    tried = [
        Tried(
            factors=(name,),
            label=label,
            name=f"FID variant: {label}",
            says=f"What {label} means.",
            who=who,
            source=f"https://example.org/{name}",
            common=common,
            part=part,
            measured=measured(random, change, points, shared),
        )
        for name, part, label, change, common, who in FACTORS
    ]
    pairs = [
        Tried(
            factors=(*a.factors, *b.factors),
            label=f"{a.label} + {b.label}",
            name=f"FID variant: {a.label} + {b.label}",
            who=(*a.who, *b.who),
            common=min(a.common, b.common),
            measured=measured(random, (a.measured[0].change or 0.0) + (b.measured[0].change or 0.0), points, shared),
        )
        for i, a in enumerate(tried)
        for b in tried[i + 1 :]
        if claimed
    ]
    untried = [
        Untried(factors=("jpeg_95",), label="JPEG of quality 95", why_not="the budget of 30 min is spent", left=True),
        Untried(factors=("classes",), label="class proportions", why_not="no classifier of CIFAR-10 is here"),
        Untried(factors=("float_levels",), label="float images", why_not="a file has only 256 levels"),
        Untried(factors=("raised",), label="levels from 0 to 256", why_not="a file has only 256 levels"),
        *(
            Untried(factors=("jpeg_95", name), label=f"JPEG of quality 95 + {label}", why_not="no time", left=True)
            for name, _, label, *_ in FACTORS
        ),
    ]
    claims = tuple(
        Claim(value=v, at=at, num_samples=50_000, half_digit=0.005, source="--claimed")
        for v, at in zip((4.16, 13.36, 6.7), POINTS[points], strict=False)
    )
    facts = "Inception (TF1's, 2015), reference CIFAR-10 train, n = 50,000"
    record = Audited(
        command=f"python -m ddim_lab.audit {subject} data=cifar10 --claimed 4.16",
        created="2026-11-28",
        subject=subject,
        metric="FID",
        facts=facts,
        num_samples=50_000,
        points=POINTS[points],
        claims=claims if claimed else (),
        plain=plain,
        tried=(*tried, *pairs),
        untried=tuple(untried),
        forwards=650_000,
        seconds=1834.2,
        environment={"torch": "2.14"},
    )
    if not claimed:
        return record
    told = explain(claims, plain, tried, pairs, metric="FID", num_samples=50_000, facts=facts, untried=untried)
    follows = {"verdict": told.verdict, "paragraph": told.paragraph, "explained": told.explained}
    return record.model_copy(update=follows)


CASES = [(1, True), (3, True), (1, False)]


@pytest.mark.parametrize(("points", "claimed"), CASES)
def test_the_console_has_every_convention_and_all_that_was_not_tried(points: int, claimed: bool) -> None:
    record = audited(points, claimed)
    text = console(record)
    flat = " ".join(text.split())
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert not re.search(r"\bnan\b|\binf\b", text)
    assert text.startswith(" ".join(record.paragraph.split()[:12])) == claimed or not claimed
    assert all(label in flat for _, _, label, *_ in FACTORS)
    for untried in record.untried:
        assert untried.why_not in flat
        assert len(untried.factors) == 2 or untried.label in flat
    assert flat.count("a file has only 256 levels") == 1
    assert "12 pairs" in flat
    assert "Left out (the budget of 30 min is spent): JPEG of quality 95" in flat
    antialiased = next(line for line in lines if line.startswith("  antialiased resize"))
    of = next(tried for tried in record.tried if tried.factors == ("antialiased",))
    for one in of.measured:
        assert points > 1 or f"{one.value:.3f}" in antialiased
        assert f"{one.change:.3f} ± {one.change_se:.3f}".replace("-", "−") in antialiased
    if claimed:
        found = fit(record.claims, of, record.num_samples)
        assert found is not None
        assert (f"{found.errors:.1f} {'✓' if found.compatible else ' '}") in antialiased
        shown = [factors for factors in record.explained if len(factors) == 2][:PAIRS]
        assert f"{66 - len(shown)} {'more ' if shown else ''}pairs tried, not shown." in flat


@pytest.mark.parametrize(("points", "claimed"), CASES)
def test_the_page_has_the_records_numbers(points: int, claimed: bool) -> None:
    record = audited(points, claimed, HOSTILE)
    text = page(record)
    body = re.sub(r"<script type=\"module\">.*?</script>", "", text, flags=re.DOTALL)
    assert "<script>alert" not in body
    assert "&lt;script&gt;alert(1)" in body
    assert not re.search(r"\bNaN\b|\bnan\b", body)
    assert "FID variant" in body
    singles = [tried for tried in record.tried if len(tried.factors) == 1]
    for tried in (record.plain, *singles):
        for one in tried.measured:
            assert f'<data value="{one.value!r}"' in body
            assert one.change is None or f'<data value="{one.change!r}"' in body
    assert all(f"What {label} means.".replace("'", "&#39;") in body for _, _, label, *_ in FACTORS)
    assert all(untried.label.replace("'", "&#39;") in body for untried in record.untried)


@pytest.mark.parametrize(("points", "claimed"), CASES)
def test_the_chart_has_a_bar_for_each_convention_and_the_claim_as_a_band(points: int, claimed: bool) -> None:
    record = audited(points, claimed)
    drawn = chart(record)
    assert drawn is not None
    bars = {bar["factor"]: bar for bar in drawn.spec["datasets"]["points"]}
    singles = [tried for tried in record.tried if len(tried.factors) == 1]
    assert set(bars) == {tried.label for tried in singles}
    for tried in singles:
        bar, first = bars[tried.label], tried.measured[0]
        assert bar["change"] == first.change
        assert bar["high"] - bar["low"] == pytest.approx(2 * (first.change_se or 0.0))
    changes: dict[str, list[float]] = {}
    for bar in drawn.spec["datasets"]["points"]:
        changes.setdefault(bar["part"], []).append(bar["change"])
    assert all(of == sorted(of, reverse=True) for of in changes.values())
    assert list(changes) == list(dict.fromkeys(part for _, part, *_ in FACTORS))
    assert ("claim" in drawn.spec["datasets"]) == claimed
    if claimed:
        (band,) = drawn.spec["datasets"]["claim"]
        assert band["off"] == pytest.approx(record.claims[0].value - record.plain.measured[0].value)
    assert "logarithmic" in drawn.caption  # JPEG's change is 20 times the usual one
    of_part = tuple(tried for tried in record.tried if tried.part == "network")
    alone = chart(record.model_copy(update={"tried": of_part}))
    assert alone is not None
    assert "logarithmic" not in alone.caption
    svg = static_svg(drawn)
    assert all(label in svg for _, _, label, *_ in FACTORS)
    assert json.dumps(drawn.spec, allow_nan=False)


def test_a_protocol_without_numbers_or_errors_has_dashes() -> None:
    record = audited()
    without = Tried(factors=("none",), label="not measured", name="FID variant: not measured", part="pixels")
    alone = Measured(value=4.2, se=None, change=-0.5, change_se=None)
    bare = without.model_copy(update={"factors": ("bare",), "label": "no error", "measured": (alone,)})
    record = record.model_copy(update={"tried": (*record.tried, without, bare)})
    text = console(record)
    assert re.search(r"not measured +— +— +—", text)
    assert re.search(r"no error +4\.2 +−0\.5 +—", text)
    assert "nan" not in page(record).partition("<script")[0]


def test_wandb_gets_the_records_numbers_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_offline import read_run

    record = audited(3)
    told = wandb_payload(record)
    assert len(told.rows) == 3 * (1 + len(record.tried))
    assert told.summary["FID at S = 10"] == record.plain.measured[0].value
    assert not [
        name for name in told.summary if name.startswith("FID") and "variant" not in name and " at " not in name
    ]
    for row in told.rows:
        named = dict(zip(told.columns, row, strict=True))
        assert named["name"].startswith("FID variant: ") == bool(named["factors"])
        assert math.isfinite(named["value"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    html = tmp_path / "report.html"
    html.write_text(page(record), encoding="utf-8")
    hint = mirror(record, TrackingConfig(logger="wandb", directory=tmp_path), group="audit-1", page=html)
    assert hint is not None
    assert hint.startswith("wandb sync ")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run = read_run(folder)
    assert (run.job_type, run.group, run.exit_code) == ("audit", "audit-1", 0)
    assert run.summary["verdict"] == record.verdict
    assert run.summary["FID variant: antialiased resize at S = 50"] == record.tried[9].measured[1].value
    assert (folder / "files" / run.values("report.path")[0]).read_bytes() == html.read_bytes()
    table = json.loads((folder / "files" / run.values("conventions.path")[0]).read_text())
    assert table["columns"] == list(told.columns)
    assert mirror(record, TrackingConfig(logger="csv", directory=tmp_path), group="audit-1") is None
