"""`python -m ddim_lab.audit`: planted causes are named, what can't be known is said, and wrong words are one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import configure

from ddim_lab.audit import audit
from ddim_lab.audit.__main__ import main
from ddim_lab.audit.auditing import Asked, _published, carry_out
from ddim_lab.config.study import PublishedConfig
from ddim_lab.conventions.records import Audited
from ddim_lab.data.base import load_data
from ddim_lab.errors import ConfigError
from ddim_lab.store import Store, read_record
from ddim_lab.store.__main__ import main as list_store
from ddim_lab.store.housekeeping import inventory, prunable


def samples(path: Path, seed: int) -> Path:
    """Images like the digits, each set of its own: digits drawn with repeats, and noise."""
    generator = np.random.default_rng(seed)
    train = load_data(configure("data=digits").data).train
    drawn = train.batch(torch.from_numpy(generator.integers(0, len(train), 700))).numpy()
    noisy = np.clip(drawn + generator.normal(0.0, 10.0, drawn.shape), 0, 255).round().astype(np.uint8)
    np.savez(path, arr_0=noisy.transpose(0, 2, 3, 1))
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], tuple[str, ...]]:
    """Five independent sets of samples, and the options of an audit of them."""
    folder = tmp_path_factory.mktemp("audited")
    options = ("data=digits", "metrics.features=pixels", f"outputs_dir={folder}/outputs", "progress=none", "logger=csv")
    return [samples(folder / f"{seed}.npz", seed) for seed in range(5)], options


@pytest.fixture(scope="module")
def planted(drawn: tuple[list[Path], tuple[str, ...]]) -> list[str]:
    """Conventions whose effect on the first set is large."""
    return large(audit(drawn[0][0], drawn[1]))


@pytest.fixture(scope="module")
def others(drawn: tuple[list[Path], tuple[str, ...]], planted: list[str]) -> list[Audited]:
    """What the conventions give that claims are made of, for each of the other sets."""
    paths, options = drawn
    names = {*planted, "reference_flipped", "samples_half", "reference_half"}
    return [audit(path, options, factors=sorted(names)) for path in paths[1:]]


def of(found: Audited, name: str) -> float:
    return next(tried.measured[0].value for tried in found.tried if tried.factors == (name,))


def large(found: Audited) -> list[str]:
    """Conventions whose effect is over 5 errors, and 3 apart from the next; errors of two independent sets."""
    plain = found.plain.measured[0]
    values = {tried.factors[0]: tried.measured[0] for tried in found.tried}
    names = []
    for name, one in values.items():
        error = (2.0**0.5) * (one.se or 0.0)
        others = [plain, *(other for each, other in values.items() if each != name)]
        if abs(one.value - plain.value) > 5 * error and all(abs(one.value - o.value) > 3 * error for o in others):
            names.append(name)
    return names


@pytest.mark.slow
def test_planted_causes_are_named_from_independent_samples(
    drawn: tuple[list[Path], tuple[str, ...]], planted: list[str], others: list[Audited]
) -> None:
    """Claims of other samples under one convention: all but one at most name it first."""
    paths, options = drawn
    assert "reference_flipped" in planted
    named = []
    for name in planted:
        for other in others:
            found = audit(paths[0], options, claimed=f"{of(other, name):.4g}")
            named.append(found.explained[:1] == ((name,),))
    assert sum(named) >= len(named) - 1


@pytest.mark.slow
def test_what_is_alike_is_called_so_and_what_is_far_is_not_explained(
    drawn: tuple[list[Path], tuple[str, ...]], others: list[Audited]
) -> None:
    paths, options = drawn
    plain = others[0].plain.measured[0].value
    agreeing = audit(paths[0], options, claimed=f"{plain:.4g}")
    assert agreeing.verdict == "agrees"
    far = audit(paths[0], options, claimed=f"{10 * of(others[0], 'reference_flipped'):.4g}")
    assert (far.verdict, far.explained) == ("unexplained", ())
    assert "not explained by anything tried" in far.paragraph
    one, other = (of(others[0], name) for name in ("samples_half", "reference_half"))
    between = audit(paths[0], options, claimed=f"{(one + other) / 2:.4g}", factors=["samples_half", "reference_half"])
    assert between.verdict in ("ambiguous", "agrees")
    assert {("samples_half",), ("reference_half",)} <= set(between.explained)


@pytest.mark.slow
def test_more_numbers_over_n_narrow_it(drawn: tuple[list[Path], tuple[str, ...]]) -> None:
    """One number between is met by several; with another N only the true one is left, and both points are told."""
    paths, options = drawn
    claims = []
    for count in (350, 700):
        cut = np.load(paths[1])["arr_0"][:count]
        np.savez(paths[1].with_name(f"cut_{count}.npz"), arr_0=cut)
        found = audit(paths[1].with_name(f"cut_{count}.npz"), options, factors=["reference_held_out"])
        claims.append(f"{count}:{of(found, 'reference_held_out'):.4g}")
    both = audit(paths[0], options, claimed=",".join(claims))
    assert both.points == ("N = 350", "N = 700")
    assert both.explained[0] == ("reference_held_out",)
    assert all(len(tried.measured) == 2 for tried in both.tried)


def test_a_budget_leaves_out_and_says_so(drawn: tuple[list[Path], tuple[str, ...]]) -> None:
    paths, options = drawn
    found = audit(paths[0], options, claimed="5", budget=1e-3)
    left = [untried for untried in found.untried if untried.left]
    assert not found.tried
    assert len(left) >= 15
    assert found.plain.measured


def test_samples_of_a_model_by_steps(tmp_path: Path) -> None:
    """An exact model with conventions of sampling changed, at two numbers of steps; then nothing is made again."""
    options = [
        "model=gaussian",
        "num_samples=64",
        "steps=4,8",
        "metrics.features=pixels",
        f"outputs_dir={tmp_path}",
        "progress=none",
    ]
    chosen = ["samples_jpeg_75", "clip_x0", "seed_plus_1", "seed_plus_2", "levels_float", "spacing_quadratic"]
    found = audit(None, options, factors=chosen)
    assert found.points == ("S = 4", "S = 8")
    names = [tried.factors[0] for tried in found.tried if len(tried.factors) == 1]
    assert sorted(names) == sorted([*chosen, "seed_minimum"])
    assert found.forwards == 64 * (4 + 8) * 6  # plain, float and four others
    least = next(tried for tried in found.tried if tried.factors == ("seed_minimum",))
    seeds = [found.plain, *(tried for tried in found.tried if tried.factors[0].startswith("seed_plus"))]
    for point in range(2):
        assert least.measured[point].value == min(seed.measured[point].value for seed in seeds[:3])
    again = audit(None, options, factors=chosen)
    assert again.forwards == 0
    assert again.tried == found.tried


def test_pairs_that_exclude_each_other_in_the_making_are_said(tmp_path: Path) -> None:
    """sigma-hat is at eta 1, so that it and another eta are no pair; the others are tried together."""
    options = ["model=gaussian", "num_samples=64", "steps=3", "metrics.features=pixels", "progress=none"]
    chosen = ["eta_1", "variance_large", "samples_half"]
    found = audit(None, [*options, f"outputs_dir={tmp_path}"], claimed="9999", factors=chosen)
    why = {untried.factors: untried.why_not for untried in found.untried}
    assert "eta is not changed together with it" in next(why[pair] for pair in why if set(pair) == set(chosen[:2]))
    assert len([tried for tried in found.tried if len(tried.factors) == 2]) == 2


def test_published_numbers_are_those_of_row_and_steps() -> None:
    published = PublishedConfig.model_validate(
        {"source": "A (2020)", "metric": "FID", "num_samples": 50_000, "rows": {"ddim": {"10": 13.36, "50": 4.7}}}
    )
    config = configure("steps=50", "sampler=ddim")
    claim = _published("study", published, config, 1000)
    assert (claim.value, claim.num_samples, claim.half_digit, claim.source) == (4.7, 50_000, 0.005, "A (2020)")
    with pytest.raises(ConfigError, match="no number at steps=20: choose of 10, 50"):
        _published("study", published, configure("steps=20"), 1000)
    with pytest.raises(ConfigError, match="no row for sampler=ddim_eta1: choose one of ddim"):
        _published("study", published, configure("sampler=ddim_eta1"), 1000)


def test_the_plan_says_what_it_costs_and_does_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    options = ("model=gaussian", "num_samples=50", "steps=3", "metrics.features=pixels", f"outputs_dir={tmp_path}")
    carry_out(Asked(options=options, plan_only=True, factors=("clip_x0", "samples_half")), lines.append)
    assert "with 2 conventions changed" in lines[0]
    assert "300 image-forwards" in lines[0]
    assert any("predicted image clamped" in line and " 150 " in line for line in lines)
    assert not any((tmp_path / "references").glob("*"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["audit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_leaves_a_record_and_a_page(
    drawn: tuple[list[Path], tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths, options = drawn
    place = tmp_path / "found"
    assert run(monkeypatch, str(paths[0]), *options, "--claimed", "1.23", "--output", str(place)) == 0
    shown = capsys.readouterr()
    found = Audited.read(read_record(place / "audit.json"))
    assert found.claims[0].value == 1.23
    assert found.command.startswith("python -m ddim_lab.audit ")
    assert shown.err.startswith("ddim_lab: plan: ")
    assert "FD (digits pixels)" in shown.out
    page = (place / "report.html").read_text()
    assert "reference with its mirror images" in page
    assert not json.dumps(found.content()).count("NaN")


def test_what_an_audit_stands_on_is_kept_as_long_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["model=gaussian", "num_samples=16", "steps=2", "metrics.features=pixels", f"outputs_dir={tmp_path}"]
    assert run(monkeypatch, *options, "--factors", "clip_x0", "logger=csv") == 0
    store = Store(tmp_path)
    assert prunable(store) == []
    made = [item for item in inventory(store) if item.kind in ("samples", "references")]
    assert {item.kind for item in made} == {"samples", "references"}
    (audit,) = (tmp_path / "audits").iterdir()
    assert all(item.users == item.audits == (str(audit),) for item in made)
    capsys.readouterr()
    assert list_store(["list", "--outputs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("  1 audit(s)") == len(made)
    (audit / "audit.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"delete {audit}"):
        prunable(store)
    shutil.rmtree(audit)
    assert {item.path for item in prunable(store)} >= {item.path for item in made}


def test_the_list_needs_no_data_and_names_every_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--list") == 0
    text = capsys.readouterr().out
    for name in ("reference_jpeg_75:", "antialiased:", "pillow_bicubic:", "torch_fidelity:", "loop_diffusers:"):
        assert name in text
    assert text.count("    Source: ") == text.count("    Who: ") > 50


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.npz"], "there is no such folder"),
        (["--claimed", "4,5"], "each needs its S"),
        (["--claimed", "x"], "no number"),
        (["--claimed", "1e200"], "too large or too small"),
        (["--plan"], "not trained yet"),
        (["--output", "pyproject.toml", "model=gaussian", "num_samples=8"], "can't be written"),
        (["--budget", "soon"], "is no time"),
        (["--budget", "0"], "is no time"),
        (["--claimed-samples", "1", "--claimed", "3"], "2 images at least"),
        (["--claimed-samples", "100"], "give --claimed, too"),
        (["--paper", "table1_digits"], "no published numbers"),
        (["--paper", "table1_nowhere"], "table1_nowhere"),
        (["--paper", "table1_cifar10", "--claimed", "4"], "drop --claimed"),
        (["--paper", "table1_cifar10", "data=digits", "model=gaussian"], "--paper=table1_cifar10 is of FID"),
        (["--claimed", "5:1.0", "steps=5"], "drop steps="),
        (["model=gaussian", "--factors", "clip_x1", "num_samples=8"], "did you mean clip_x0"),
        (["--claimed", "3", "--surely"], "--surely"),
        (["a", "b"], "is no OPTION=VALUE"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["metrics.features=pixels", f"outputs_dir={tmp_path}", "progress=none"]
    assert run(monkeypatch, *words, *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("ddim_lab: ")]) == 1
    assert "Traceback" not in error


def test_images_of_another_shape_than_the_networks_are_refused(tmp_path: Path) -> None:
    """Statistics as the reference say nothing of images, so the network does."""
    np.savez(tmp_path / "rgb.npz", arr_0=np.zeros((20, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    options = ["data=digits", "metrics.features=pixels", f"outputs_dir={tmp_path}", "progress=none"]
    with pytest.raises(ConfigError, match="8x8 with 3 channels, data=digits of 8x8 with 1"):
        audit(tmp_path / "rgb.npz", options, reference=tmp_path / "statistics.npz")


def test_statistics_and_images_of_one_file_are_taken_as_score_takes_them(
    drawn: tuple[list[Path], tuple[str, ...]], tmp_path: Path
) -> None:
    """Statistics that do not fit leave the images; those that do are the reference."""
    paths, options = drawn
    images = np.load(paths[1])["arr_0"]
    values = images.reshape(700, -1) / 127.5 - 1.0
    moments = {"mu": values.mean(0), "sigma": np.cov(values.T)}
    np.savez(tmp_path / "unfit.npz", arr_0=images, mu=np.zeros(10), sigma=np.eye(10))
    np.savez(tmp_path / "fit.npz", arr_0=images, **moments)
    found = [
        audit(paths[0], options, reference=path, factors=["covariance_n"])
        for path in (paths[1], tmp_path / "unfit.npz", tmp_path / "fit.npz")
    ]
    of_images, unfit, fit = (one.plain.measured[0].value for one in found)
    assert unfit == of_images
    assert fit == pytest.approx(of_images, rel=1e-5)
    assert [one.tried != () for one in found] == [True, True, False]


@pytest.mark.parametrize("claimed", ["800:1.0,300:1.2", "701:1.0"])
def test_a_claim_of_more_images_than_there_are(claimed: str, drawn: tuple[list[Path], tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match="is more than the 700 images"):
        audit(drawn[0][0], drawn[1], claimed=claimed)
