"""Class-conditional networks: labels named by sample index, guidance, learned variance; here and in checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, UNet2DModel
from official import one_thread  # noqa: F401
from torch import Tensor, nn

from ddim_lab.device.engine import Engine
from ddim_lab.device.memory import Halving
from ddim_lab.labels import NamedLabels
from ddim_lab.models.unet import load_unet
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
CENTRES = torch.tensor([-0.6, 0.1, 0.8, 0.0], dtype=torch.float64)
"""Of three classes, and of the images of a network that is told none."""
NULL = 3
SPREAD = 0.3


def start(count: int = 6) -> Tensor:
    return NamedNoise(1).initial(torch.arange(count), torch.empty(count, 2, 3, 3, dtype=torch.float64))


def exact_eps(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """eps of Gaussian images, N(centre of the label, SPREAD^2): sqrt(1 - ab) (x - sqrt(ab) mu) / (ab s^2 + 1 - ab)."""
    ab = torch.tensor(SCHEDULE.alpha_bars)[t][:, None, None, None]
    mean = CENTRES[labels][:, None, None, None]
    return (1 - ab).sqrt() * (x - ab.sqrt() * mean) / (ab * SPREAD**2 + 1 - ab)


LABELS = NamedLabels(5, [0.25, 0.25, 0.5, 0.0], null_class=NULL)


# -- labels ----------------------------------------------------------------------------------------------


def test_labels_are_drawn_by_name_with_their_shares() -> None:
    """Of 40,000 each share lies within four standard errors; no batch, order or device plays a part."""
    drawn = LABELS(torch.arange(40_000))
    for label, share in enumerate(LABELS.shares):
        assert abs(float((drawn == label).double().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 40_000)
    some = torch.tensor([39_999, 7, 123])
    assert torch.equal(LABELS(some), drawn[some])
    assert not torch.equal(NamedLabels(6, LABELS.shares)(torch.arange(100)), drawn[:100])
    last = NamedLabels(0, [0.1] * 10 + [0.0])(torch.arange(2000))  # ten tenths sum to just below 1
    assert int(last.max()) == 9


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], []])
def test_shares_are_a_distribution(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares of classes must be 0 or more and sum to 1"):
        NamedLabels(0, shares)


# -- guidance --------------------------------------------------------------------------------------------


class Counting:
    """The exact model, which counts its forwards and keeps the labels that it was told."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.told.append(labels)
        return exact_eps(x, t, labels)


@pytest.mark.parametrize(("guidance", "forwards"), [(None, 1), (1.0, 1), (0.0, 1), (1.5, 2), (-1.0, 2)])
def test_guidance_is_the_published_combination_and_costs_what_it_says(guidance: float | None, forwards: int) -> None:
    sampler = Sampler(SCHEDULE, 10, labels=LABELS, guidance=guidance)
    model, x_T, indices = Counting(), start(), torch.arange(3, 9)
    images = sampler.sample(model, x_T, indices=indices)
    assert sampler.nfe == len(model.told) == 10 * forwards
    labels, w = LABELS(indices), 1.0 if guidance is None else guidance

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        """Ho and Salimans' (1 + w') eps(label) - w' eps(none), w' = w - 1."""
        return w * exact_eps(x, t, labels) - (w - 1.0) * exact_eps(x, t, torch.full_like(labels, NULL))

    torch.testing.assert_close(images, Sampler(SCHEDULE, 10).sample(by_hand, x_T), rtol=0, atol=1e-12)


def test_the_exact_conditional_model_makes_images_of_its_classes() -> None:
    """The ODE carries N(0, 1) to N(centre, spread^2) of each sample's label: mean and deviation known."""
    count = 600
    indices = torch.arange(count)
    images = Sampler(SCHEDULE, 500, spacing="trailing", labels=LABELS).sample(exact_eps, start(count), indices=indices)
    for label in range(3):
        mine = images[LABELS(indices) == label]
        assert float(mine.mean()) == pytest.approx(
            float(CENTRES[label]), abs=4 * SPREAD / math.sqrt(mine.numel()) + 0.01
        )
        assert float(mine.std()) == pytest.approx(SPREAD, rel=0.05)


def test_every_formula_is_guided_the_same_way() -> None:
    """DDIM with w by labels equals a formula that never heard of them on the combined eps."""
    from ddim_lab.multistep import DpmSolverPP

    x_T = start()
    labels = LABELS(torch.arange(6))
    guided = Sampler(SCHEDULE, 8, spacing="trailing", formula=DpmSolverPP(2), labels=LABELS, guidance=3.0)
    assert guided.nfe == 16
    plain = Sampler(SCHEDULE, 8, spacing="trailing", formula=DpmSolverPP(2))

    def combined(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(exact_eps(x, t, torch.full_like(labels, NULL)), exact_eps(x, t, labels), 3.0)

    assert torch.equal(guided.sample(exact_eps, x_T), plain.sample(combined, x_T))


def test_guidance_needs_a_null_class_and_a_number() -> None:
    with pytest.raises(ValueError, match="guidance=2 needs a model with a null class"):
        Sampler(SCHEDULE, 4, labels=NamedLabels(0, [1.0]), guidance=2.0)
    with pytest.raises(ValueError, match="guidance must be a number"):
        Sampler(SCHEDULE, 4, guidance=math.nan)
    with pytest.raises(ValueError, match="encoding is of models without classes"):
        Sampler(SCHEDULE, 4, labels=LABELS).encode(exact_eps, start())


# -- learned variance ------------------------------------------------------------------------------------


def with_share(share: float) -> Any:
    """A model of Gaussian images whose variances all lie at `share` between their bounds."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        eps = exact_eps(x, t, torch.full_like(t, NULL))
        return torch.cat([eps, torch.full_like(eps, 2.0 * share - 1.0)], 1)

    return model


def test_at_its_bounds_the_learned_variance_is_ddpms() -> None:
    """Share 0: the posterior's, as eta = 1; share 1: beta, as the paper's sigma-hat. The mean alone: as it ever was."""
    x_T = start()
    for share, variance in ((0.0, "posterior"), (1.0, "large")):
        learned = Sampler(SCHEDULE, 20, eta=1.0, variance="learned").sample(with_share(share), x_T, seed=3)
        known = Sampler(SCHEDULE, 20, eta=1.0, variance=variance).sample(with_share(share), x_T, seed=3)  # type: ignore[arg-type]
        torch.testing.assert_close(learned, known, rtol=0, atol=1e-11)
    eps_alone = Sampler(SCHEDULE, 20).sample(lambda x, t: with_share(0.3)(x, t)[:, :2], x_T)
    assert torch.equal(Sampler(SCHEDULE, 20).sample(with_share(0.3), x_T), eps_alone)


def test_between_them_it_interpolates_as_published() -> None:
    """Nichol and Dhariwal's respaced process written down: betas of the visited timesteps, log variances mixed by v."""
    steps, x_T = 12, start()
    sampler = Sampler(SCHEDULE, steps, eta=1.0, variance="learned", clip="x0_eps")
    visited = [int(each.t) for each in reversed(sampler.transitions)]
    bars = SCHEDULE.alpha_bars[visited]
    before = np.append(1.0, bars[:-1])
    betas = 1.0 - bars / before
    posterior = betas * (1.0 - before) / (1.0 - bars)
    generator = torch.Generator().manual_seed(0)
    field = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([exact_eps(x, t, torch.full_like(t, NULL)), field.expand_as(x)], 1)

    noise, indices, x = NamedNoise(3), torch.arange(6), x_T
    for i in reversed(range(steps)):
        eps = exact_eps(x, torch.full((6,), visited[i]), torch.full((6,), NULL))
        x_0 = ((x - math.sqrt(1 - bars[i]) * eps) / math.sqrt(bars[i])).clamp(-1, 1)
        mean = betas[i] * math.sqrt(before[i]) / (1 - bars[i]) * x_0
        mean = mean + (1 - before[i]) * math.sqrt(1 - betas[i]) / (1 - bars[i]) * x
        if i > 0:
            share = (field + 1) / 2
            log_variance = share * math.log(betas[i]) + (1 - share) * math.log(posterior[i])
            mean = mean + (0.5 * log_variance).exp() * noise(indices, visited[i], x)
        x = mean
    torch.testing.assert_close(sampler.sample(model, x_T, seed=3), x, rtol=0, atol=1e-10)


def test_a_variance_that_was_not_learned_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="variance=learned needs a network with twice the channels"):
        Sampler(SCHEDULE, 4, eta=1.0, variance="learned").sample(lambda x, t: x, start())
    with pytest.raises(ValueError, match="learned around DDPM's mean and needs eta=1"):
        Sampler(SCHEDULE, 4, eta=0.5, variance="learned")


# -- on the way to the network ---------------------------------------------------------------------------


def unet(**changes: Any) -> UNet2DModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": 11,
    }
    torch.manual_seed(0)
    return UNet2DModel(**{**settings, **changes}).eval().requires_grad_(False)


class Told(nn.Module):
    """A network of one convolution that adds what its labels stand for: the C++ compiler takes long for a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.embedding = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(11, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = self.conv(x) + self.embedding(labels)[:, :, None, None] * t[:, None, None, None]
        return found


@pytest.mark.slow
def test_a_unet_that_is_told_labels_compiles_whole() -> None:
    network, told = unet(), (torch.randn(2, 1, 8, 8), torch.full((2,), 10), torch.tensor([3, 10]))
    traced = torch.compile(network, backend="eager", dynamic=False, fullgraph=True)
    assert torch.equal(traced(*told).sample, network(*told).sample)


@pytest.mark.slow
@tiny.needs_compiler
def test_labels_go_with_their_images_through_parts_and_copies() -> None:
    """A batch of 5 in compiled forwards of 2, the last filled up; and in halves."""
    network = Told().eval().requires_grad_(False)
    x, t, labels = start(5)[:, :1].float().repeat(1, 1, 3, 3)[..., :8, :8], torch.full((5,), 10), torch.arange(5)
    expected = network(x, t, labels)
    engine = Engine(network, 2, channels_last=True, compiled=True, graphs=False)
    torch.testing.assert_close(engine(x, t, labels), expected, rtol=0, atol=1e-5)
    halving = Halving(network)
    halving.at_most = 3
    torch.testing.assert_close(halving(x, t, labels), expected, rtol=0, atol=1e-5)


# -- trained here ----------------------------------------------------------------------------------------

CONDITIONAL = ("model.conditional=true", "metrics.features=pixels", "logger=csv", "steps=4", *tiny.TINY)
CONDITIONAL = (*CONDITIONAL, "model.norm_num_groups=4")  # a norm of single channels would undo what labels add to them


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional training and cells of three w."""
    outputs = tmp_path_factory.mktemp("guided")
    assert tiny.run(outputs, "sampler.guidance=null,1,3", "-m", settings=CONDITIONAL) == 0
    return outputs


def test_it_is_trained_once_and_each_w_is_a_cell(guided: Path) -> None:
    (sweep,) = tiny.sweeps(guided)
    plain, one, three = tiny.results(sweep)
    assert [row["guidance"] for row in (plain, one, three)] == ["", "1.0", "3.0"]
    assert [row["nfe"] for row in (plain, one, three)] == ["4", "4", "8"]
    assert plain["sha256"] == one["sha256"] != three["sha256"]
    assert {row["model"] for row in (plain, one, three)} == {"unet, class-conditional"}
    (model,) = guided.glob("models/*/model.json")
    assert json.loads(model.read_text())["recipe"]["training"]["label_dropout"] == 0.1
    assert load_unet(model.parent).config["num_class_embeds"] == 11
    report = (sweep / "table.md").read_text()
    assert "guidance 3" in report
    assert "no guidance" in report


def test_its_own_folder_is_a_conditional_checkpoint(guided: Path, tmp_path: Path) -> None:
    """Bitwise the same images as a checkpoint with its null class."""
    (model,) = guided.glob("models/*/model.json")
    words = ("model=pretrained", f"model.path={model.parent}", "metrics.features=pixels", "logger=csv", "steps=4")
    assert tiny.run(tmp_path, *words, "model.null_class=10", "sampler.guidance=3", settings=tiny.SMALL) == 0
    (again,), three = tiny.results(tiny.sweeps(tmp_path)[0]), tiny.results(tiny.sweeps(guided)[0])[2]
    assert again["sha256"] == three["sha256"]


PLAIN, TOLD, LEARNED, VARIED, ALONE = (
    ("model=pretrained", f"model.path={{{name}}}") for name in ("plain", "told", "learned", "varied", "alone")
)
REFUSED = {
    ("sampler.guidance=2",): r"sampler.guidance=2 needs a class-conditional network: set model.conditional=true",
    ("model=gaussian", "sampler.guidance=2"): r"sampler.guidance=2 needs a class-conditional network",
    ("model.conditional=true", "task=reconstruct"): r"task=reconstruct is for networks without classes",
    ("model.conditional=true", "sampler=analytic_ddim"): r"sampler.variance=analytic is estimated without labels",
    (
        "model.conditional=true",
        "model.labels=12",
    ): r"model.labels=12 is no class of data=digits, whose are 0 to 9",
    ("model.conditional=true", "model.labels=10"): r"model.labels=10 is no class of data=digits",  # the null class
    ("model.labels=3",): r"model.labels is for class-conditional networks: set model.conditional=true, or drop it",
    ("sampler=heun", "sampler.variance=learned"): r"sampler.variance=learned is of the DDIM family",
    ("task=order", "sampler=ddpm", "sampler.variance=learned"): r".*task=order brings models of its own, which did not",
    (*PLAIN, "model.labels=7"): r"model.labels is for class-conditional networks, and .* is none",
    (*LEARNED, "task=speed_peers"): r"task=speed_peers is for networks without classes",
    (*VARIED, "task=speed_peers"): r".* learned its variance, and the code that task=speed_peers runs is not for that",
    (
        *PLAIN,
        "sampler=diffusers",
        "sampler.scheduler=DDPMScheduler variance_type:learned",
    ): r".*set sampler=ddpm sampler.*",
    (*ALONE, "model.null_class=0"): r"model.null_class=0: .* has that label alone, and so no classes",
    ("model.conditional=true", "model.labels=some"): r"model.labels.*",
    ("model.conditional=true", "training.label_dropout=1.5"): r"training.label_dropout=1.5: .*",
    ("sampler.variance=learned", "sampler.eta=1"): r"sampler.variance=learned needs a network that learned it",
    ("model=gaussian", "sampler.variance=learned", "sampler.eta=1"): r"sampler.variance=learned needs a network that",
    ("task=order", "sampler.guidance=2"): r"sampler.guidance is not for task=order, which brings models of its own",
    (
        "model=pretrained",
        "model.path={plain}",
        "sampler.guidance=2",
    ): r"sampler.guidance is for class-conditional",
    (
        "model=pretrained",
        "model.path={plain}",
        "model.null_class=2",
    ): r"model.null_class is for class-conditional",
    (*TOLD, "sampler.guidance=2"): r".*it is not known how: give model.null_class",
    (*TOLD, "model.null_class=11"): r"model.null_class=11: .* has 11 labels, 0 to 10",
    (*TOLD, "model.labels=11"): r"model.labels=11 is no class of .* 0 to 10",
    (*TOLD, "task=interpolate"): r"task=interpolate is for networks without classes",
    (
        "model=pretrained",
        "model.path={plain}",
        "sampler=ddpm",
        "sampler.variance=learned",
    ): r".* learned it, and .* did not",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A U-Net without classes, one with, and one that learned its variance."""
    kinds: dict[str, dict[str, Any]] = {"plain": {"num_class_embeds": None}, "told": {}, "learned": {"out_channels": 2}}
    kinds |= {"varied": {"out_channels": 2, "num_class_embeds": None}, "alone": {"num_class_embeds": 1}}
    kinds["alone"] = {"num_class_embeds": 1}
    folders = {}
    for name, changes in kinds.items():
        folders[name] = tmp_path_factory.mktemp(name)
        unet(**changes).save_pretrained(folders[name])
        DDPMScheduler().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_does_not_go_together_is_one_line(
    words: Sequence[str], checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    asked = [word.format(**checkpoints) for word in words]
    small = tiny.TINY if not any(word.startswith("model=") for word in words) else tiny.SMALL
    assert tiny.run(tmp_path, *asked, "steps=4", "logger=csv", "metrics.features=pixels", settings=small) != 0
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"(ddim_lab: |.* failed: ){REFUSED[tuple(words)]}.*", told[-1]), told


@pytest.mark.slow
def test_a_checkpoint_with_classes_and_a_learned_variance_is_sampled(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """With every sampler's mean, and with its own variance."""
    words = (
        "model=pretrained",
        f"model.path={checkpoints['learned']}",
        "metrics.features=pixels",
        "logger=csv",
        "steps=3",
    )
    samplers = ("sampler=ddim,heun,ddpm", "-m")
    assert tiny.run(tmp_path / "a", *words, *samplers, settings=tiny.SMALL) == 0
    assert tiny.run(tmp_path / "b", *words, "sampler=ddpm", "sampler.variance=learned", settings=tiny.SMALL) == 0
    (learned,), (_, _, posterior) = (tiny.results(tiny.sweeps(tmp_path / place)[0]) for place in "ba")
    assert learned["sha256"] != posterior["sha256"]
    assert learned["nfe"] == "3"


# -- the training ----------------------------------------------------------------------------------------


def test_labels_are_dropped_as_often_as_asked_by_step_alone(tmp_path: Path) -> None:
    """The same at every start of a run, as a resumed one needs it; ranks drop what their rows of the batch are."""
    from ddim_lab.models.training import DiffusionModule

    config = tiny.configure("model.conditional=true", "training.label_dropout=0.25", "training.batch_size=4000")
    module, parts = (DiffusionModule(unet(), SCHEDULE, config.training, ranks=ranks, null_class=10) for ranks in (1, 2))
    labels = torch.arange(4000) % 10
    (told,) = module._labels({"labels": labels}, 4000, slice(0, 4000), 7)
    dropped = float((told == 10).double().mean())
    assert abs(dropped - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(told[told != 10], labels[told != 10])
    (second,) = parts._labels({"labels": labels[2000:]}, 4000, slice(2000, 4000), 7)
    assert torch.equal(second, told[2000:])
    (other,) = module._labels({"labels": labels}, 4000, slice(0, 4000), 8)
    assert not torch.equal(other, told)
