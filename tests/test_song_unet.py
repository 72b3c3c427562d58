"""Song et al.'s U-Net in EDM's and ScoreSDE's files: what it computes, what it is told, and what is refused."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from song_networks import Net, edm_content, edm_denoise, score_sde_content, score_sde_forward
from torch import Tensor, nn

from ddim_lab.analytic import GaussianEps
from ddim_lab.device.precision import Part, lower_precision
from ddim_lab.diffusion import per_sample
from ddim_lab.errors import ConfigError
from ddim_lab.models.foreign.edm import RECIPE, read_edm
from ddim_lab.models.foreign.preconditioning import (
    DiscreteVp,
    Edm,
    EpsOfNetwork,
    Preconditioning,
    SubVp,
    VarianceExploding,
    VariancePreserving,
)
from ddim_lab.models.foreign.score_sde import read_score_sde
from ddim_lab.models.obtain import Model, check_model, obtain_model
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()

DDPMPP = Net(blocks=2, classes=3, augment=9)
NCSNPP = Net(mult=(2, 1, 2), attention=(2, 4), fourier=True, residual=True, fir=True)
PRECONDITIONINGS = ("EDMPrecond", "VPPrecond", "VEPrecond")

T = torch.tensor([0.0, 400.25, 999.0])


def saved(content: dict[str, Any], folder: Path) -> str:
    torch.save(content, folder / "checkpoint.pt")
    return str(folder / "checkpoint.pt")


def states(net: Net) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(T), net.channels, net.size, net.size, generator=generator, dtype=torch.float64)


def levels() -> Tensor:
    """alpha_bar at T, by the schedule's own definition."""
    return torch.tensor([SCHEDULE.alpha_bar(t) for t in T.tolist()], dtype=torch.float64)


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def numbers(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


# -- the networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECONDITIONINGS)
@pytest.mark.parametrize("net", [DDPMPP, NCSNPP, Net(mult=(1,), channels=1)], ids=["ddpm++", "ncsn++", "one level"])
def test_edms_denoiser_is_this_eps(net: Net, name: str, tmp_path: Path) -> None:
    """eps = (x_t / sqrt(ab) - D(x_t / sqrt(ab); sigma)) / sigma, at whole timesteps and between."""
    content = edm_content(name, net)
    read = read_edm(saved(content, tmp_path))
    assert read.size == (net.size, net.size)
    # Of augmentation it is told 0 when one samples; all else is there once, in what the equality below needs.
    unused = ("resample_filter", "map_augment.weight")
    assert numbers(read.state) == numbers({k: v for k, v in content["state"].items() if not k.endswith(unused)})
    x_t, ab = states(net), levels()
    sigma, x = ((1.0 - ab) / ab).sqrt(), x_t / wide(ab.sqrt())
    model = read.build(SCHEDULE).double()
    for labels in (None, torch.tensor([2, 0, 1])) if net.classes else (None,):
        denoised = edm_denoise(name, net, content["state"], x, sigma, labels)
        close(model(x_t, T, labels), (x - denoised) / wide(sigma))
    if net.classes:  # what is no class is told as none is
        close(model(x_t, T, torch.full((3,), net.classes)), model(x_t, T))


@pytest.mark.parametrize("process", ["vp", "vp_discrete", "subvp"])
@pytest.mark.parametrize(
    "net",
    [
        Net(blocks=2),
        Net(mult=(2, 1, 2), residual=True, fir=True),
        Net(nf=32, ddpm=True, mult=(1, 2, 2), attention=(2,)),
    ],
    ids=["ddpm++", "ncsn++", "ddpm"],
)
def test_score_sdes_network_is_this_eps(net: Net, process: str, tmp_path: Path) -> None:
    """At the time s of their process that has our noise; both of the weights, the average by the parameters' order."""
    content = score_sde_content(net)
    names = [name for name in content["model"] if name != "module.sigmas"]
    weights = {"raw": content["model"], "ema": dict(zip(names, content["ema"]["shadow_params"], strict=True))}
    path = saved(content, tmp_path)
    x_t, ab = states(net), levels()
    root = ab.sqrt()
    if process == "subvp":  # sqrt(a) of (1 - a) / sqrt(a) = sigma
        sigma = ((1.0 - ab) / ab).sqrt()
        root = ((sigma.square() + 4.0).sqrt() - sigma) / 2.0
    time = ((0.01 - 4.0 * 19.9 * root.log()).sqrt() - 0.1) / 19.9
    told = T.double() if process == "vp_discrete" else 999.0 * time
    for which in ("raw", "ema"):
        read = read_score_sde(path, process, which)  # type: ignore[arg-type]
        assert numbers(read.state) == numbers(weights["ema"])
        model = read.build(SCHEDULE).double()
        close(model(x_t, T), score_sde_forward(net, weights[which], wide(root / ab.sqrt()) * x_t, told))


# -- what they are told ---------------------------------------------------------------------------------


class Exact(nn.Module):
    """The F whose eps is exact for N(mean, variance), found from what it is given alone: label and scaled input.

    sigma is read off the label, D(x) = (sigma^2 mean + variance x) / (sigma^2 + variance).
    """

    def __init__(self, invert: Callable[[Tensor], tuple[Tensor, ...]], mean: float, variance: float) -> None:
        super().__init__()
        self.invert, self.mean, self.variance = invert, mean, variance

    def forward(self, given: Tensor, label: Tensor, class_labels: Tensor | None) -> Tensor:
        sigma, skip, out, into = (per_sample(each, given) for each in self.invert(label))
        x = given / into
        denoised = (sigma**2 * self.mean + self.variance * x) / (sigma**2 + self.variance)
        return (denoised - skip * x) / out


def of_edm(label: Tensor) -> tuple[Tensor, ...]:
    sigma = (4.0 * label).exp()
    total = sigma**2 + 0.6**2
    return sigma, 0.36 / total, 0.6 * sigma / total.sqrt(), total.rsqrt()


def of_vp(label: Tensor) -> tuple[Tensor, ...]:
    time = label / 999.0
    sigma = torch.expm1(0.5 * 19.9 * time**2 + 0.1 * time).sqrt()
    return sigma, torch.ones_like(sigma), -sigma, (sigma**2 + 1.0).rsqrt()


def of_ve(label: Tensor) -> tuple[Tensor, ...]:
    sigma = 2.0 * label.exp()
    return sigma, torch.ones_like(sigma), sigma, torch.ones_like(sigma)


def of_subvp(label: Tensor) -> tuple[Tensor, ...]:
    time = label / 999.0
    a = torch.exp(-0.5 * 19.9 * time**2 - 0.1 * time)
    sigma = (1.0 - a) / a.sqrt()
    return sigma, torch.ones_like(sigma), -sigma, a.sqrt()


@pytest.mark.parametrize(
    ("preconditioning", "invert"),
    [(Edm(0.6), of_edm), (VariancePreserving(), of_vp), (VarianceExploding(), of_ve), (SubVp(), of_subvp)],
    ids=lambda each: type(each).__name__ if isinstance(each, Preconditioning) else "",
)
def test_an_exact_denoiser_is_the_exact_eps(
    preconditioning: Preconditioning, invert: Callable[[Tensor], tuple[Tensor, ...]]
) -> None:
    """Of a Gaussian: eps is known, and DDIM converges to the ODE's known map, at first order."""
    model = EpsOfNetwork(Exact(invert, mean=0.3, variance=0.2), SCHEDULE, preconditioning)
    exact = GaussianEps(SCHEDULE, 0.3, 0.2)
    x_T = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)[:, None, None, None]
    for t in (torch.arange(0, 1000, 222), torch.tensor([0.5, 10.25, 700.75, 998.5, 3.0])):
        torch.testing.assert_close(model(x_T, t), exact(x_T, t), rtol=0, atol=1e-8)
        single = model(x_T.float(), t)
        torch.testing.assert_close(single, exact(x_T.float(), t), rtol=2e-5, atol=2e-5)
    errors = []
    for steps in (50, 100):
        sampler = Sampler(SCHEDULE, steps, spacing="logsnr")
        errors.append(float((sampler.sample(model, x_T) - exact.ode_map(x_T, 999)).abs().max()))
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.25)


def test_samples_of_the_denoiser_are_those_of_the_eps(tmp_path: Path) -> None:
    """The same network as a model that predicts x_0."""
    content = edm_content("EDMPrecond", Net())
    model = read_edm(saved(content, tmp_path)).build(SCHEDULE).double()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        ab = torch.tensor([SCHEDULE.alpha_bar(float(each)) for each in t], dtype=torch.float64)
        sigma = ((1.0 - ab) / ab).sqrt()
        return edm_denoise("EDMPrecond", Net(), content["state"], x_t / wide(ab.sqrt()), sigma)

    settings: dict[str, Any] = {"steps": 4, "spacing": "logsnr"}
    found = Sampler(SCHEDULE, **settings).sample(model, states(Net()))
    close(Sampler(SCHEDULE, **settings, prediction="x0").sample(denoise, states(Net())), found)


def test_times_of_the_vp_process_are_near_hos() -> None:
    """What `VariancePreserving` says of the label: t + 0.5 to t + 3.4, above 999 from t = 996 on."""
    t, ab = torch.arange(1000), torch.tensor(SCHEDULE.alpha_bars)
    label = VariancePreserving().label(ab)
    assert float((label - t).min()) == pytest.approx(0.5, abs=0.01)
    assert float((label - t).max()) == pytest.approx(3.4, abs=0.03)
    assert t[label > 999].tolist() == [996, 997, 998, 999]
    s = (t + 1.0).double() / 1000.0
    ratio = (torch.expm1(0.5 * 19.9 * s**2 + 0.1 * s) / ((1.0 - ab) / ab)).sqrt()
    assert ratio[[0, 999]].tolist() == pytest.approx([1.05, 0.97], abs=0.005)
    assert VariancePreserving().largest_sigma == pytest.approx(float(of_vp(torch.tensor(999.0))[0]), rel=1e-5)
    assert SubVp().largest_sigma == pytest.approx(float(of_subvp(torch.tensor(999.0))[0]), rel=1e-5)
    assert DiscreteVp().largest_sigma == math.inf


# -- 16 bits --------------------------------------------------------------------------------------------


def test_16_bits_keep_the_edges(tmp_path: Path) -> None:
    """The layers that are given x_t or the time, and those that give the output: at small t the error is made there."""
    net = Net(fourier=True, residual=True, fir=True, classes=2)
    model = read_edm(saved(edm_content("EDMPrecond", net), tmp_path)).build(SCHEDULE)
    x_t, t = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(16)
    expected = model(x_t, t)

    def lowered(*keep: Part) -> nn.Module:
        other = copy.deepcopy(model)
        lower_precision(other, torch.bfloat16, keep)
        return other

    def error(*keep: Part) -> float:
        return float((lowered(*keep)(x_t, t) - expected).norm() / expected.norm())

    kept = {
        name.removeprefix("network.")
        for name, layer in lowered("edges").named_modules()
        if type(layer).__name__ == "_Cast" and next(layer.parameters()).dtype == torch.float32
    }
    assert {name for name in kept if "time_emb_proj" not in name} == {
        *("conv_in", "down.1.pyramid.conv", "conv_norm_out", "conv_out", "class_embedding.linear"),
        *("time_embedding.linear_1", "time_embedding.linear_2"),
    }
    none, edges, stream = error(), error("edges"), error("edges", "norms", "stream")
    assert stream < 0.9 * edges < 0.9 * 0.9 * none
    assert none < 0.015


# -- in the harness -------------------------------------------------------------------------------------

SMALL = Net(channels=1, attention=())
IN_SECONDS = ("num_samples=8", "batch_size=8", "metrics.features=pixels", "logger=csv")


def configure(kind: str, path: str, *overrides: str) -> Any:
    return tiny.configure("metrics.features=pixels", f"model={kind}", f"model.path={path}", *overrides)


def model_of(*arguments: str) -> Model:
    none: Any = None
    config = configure(*arguments)
    check_model(config)
    return obtain_model(config, none, none, none, none)


def test_one_is_sampled_from_the_command_line(tmp_path: Path) -> None:
    path = saved(score_sde_content(SMALL), tmp_path)
    arguments = ("model=score_sde", f"model.path={path}", "model.process=subvp", "sampler=ddim_logsnr", "steps=2")
    assert tiny.run(tmp_path / "outputs", *arguments, settings=IN_SECONDS) == 0
    (row,) = tiny.results(tiny.sweeps(tmp_path / "outputs")[0])
    assert (row["model"], row["weights"], row["nfe"]) == (path, "ema", "2")


def test_what_a_model_is_enters_its_digest(tmp_path: Path) -> None:
    """The weights, and how the network is told the noise."""
    path = saved(score_sde_content(SMALL), tmp_path)
    made = {
        named: model_of("score_sde", path, *named)
        for named in ((), ("model.weights=raw",), ("model.process=subvp",), ("model.process=vp_discrete",))
    }
    assert len({model.digest for model in made.values()}) == len(made)
    assert made[()].weights == "ema"
    assert (made["model.weights=raw",].weights, made["model.weights=raw",].weights_by) == ("raw", "file")
    assert made[()].digest == model_of("score_sde", path, "model.weights=ema").digest
    network = made[()].load()
    assert made[()].parameters == sum(parameter.numel() for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_class_conditional_one_is_told_the_class_or_none(tmp_path: Path) -> None:
    """The number of its classes means none, where the user says that it was trained with that."""
    path = saved(edm_content("EDMPrecond", Net(channels=1, attention=(), classes=10)), tmp_path)
    named, guided = model_of("edm", path), model_of("edm", path, "model.null_class=10", "sampler.guidance=2")
    assert (named.classes, named.null_class) == (10, None)
    assert (guided.classes, guided.null_class) == (11, 10)
    assert named.digest == guided.digest
    with pytest.raises(ConfigError, match=r"null_class=3: .* has 10 classes, and is told none by 10"):
        model_of("edm", path, "model.null_class=3")
    with pytest.raises(ConfigError, match=r"guidance=2 needs a network that can be told no class"):
        model_of("edm", path, "sampler.guidance=2")
    outputs = tmp_path / "outputs"
    arguments = ("model=edm", f"model.path={path}", "model.null_class=10", "sampler.guidance=2", "steps=2")
    assert tiny.run(outputs, *arguments, settings=IN_SECONDS) == 0
    (row,) = tiny.results(tiny.sweeps(outputs)[0])
    assert (row["model"], row["weights"], row["nfe"]) == (path, "ema", "4")


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    published = tmp_path / "network.pkl"
    published.write_bytes(pickle.dumps({"ema": Harm(tmp_path / "harm")}))
    with pytest.raises(ConfigError) as refused:
        model_of("edm", str(published))
    assert RECIPE in str(refused.value)
    assert "\n" not in str(refused.value)
    torch.save({"model": Harm(tmp_path / "harm"), "ema": {}}, tmp_path / "training.pth")
    with pytest.raises(ConfigError, match="holds more than tensors"):
        model_of("score_sde", str(tmp_path / "training.pth"))
    assert not (tmp_path / "harm").exists()


class EDMPrecond(nn.Module):
    """As a preconditioning of NVlabs/edm is, to whoever unpickles it."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(content["settings"])
        self.model = SongUNet({name.removeprefix("model."): each for name, each in content["state"].items()})


class SongUNet(nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *places, last = name.split(".")
            module: nn.Module = self
            for place in places:
                if not hasattr(module, place):
                    module.add_module(place, nn.Module())
                module = module.get_submodule(place)
            module.register_buffer(last, tensor)


def test_the_line_converts_what_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = edm_content("EDMPrecond", SMALL)
    source, target = tmp_path / "network.pkl", tmp_path / "network.pt"
    source.write_bytes(pickle.dumps({"ema": EDMPrecond(content)}))
    found = re.fullmatch(r'python -c "(.*)" FILE\.pkl FILE\.pt', RECIPE)
    assert found is not None
    monkeypatch.setattr("sys.argv", ["-c", str(source), str(target)])
    exec(found[1], {})
    assert model_of("edm", str(target)).digest == model_of("edm", saved(content, tmp_path)).digest


EDM_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a state dict alone": (lambda c: [c.pop(each) for each in ("class", "model")], "holds settings, state, not"),
    "ADM": (lambda c: c.update(model="DhariwalUNet"), "is a DhariwalUNet"),
    "iDDPM": (lambda c: c.update({"class": "iDDPMPrecond"}), "has the preconditioning iDDPMPrecond"),
    "no sigma_data": (lambda c: c["settings"].pop("sigma_data"), "lacks the setting 'sigma_data' of EDMPrecond"),
    "NaN": (lambda c: c["state"]["model.map_layer0.bias"].fill_(math.nan), "holds NaN or infinite weights"),
    "cut short": (lambda c: c["state"].pop("model.dec.8x8_aux_conv.bias"), "lacks 1 of the tensors, what .* conv_out"),
    "another layer": (
        lambda c: c["state"].update({"model.extra.bias": torch.ones(1)}),
        "holds model.extra.bias, which",
    ),
    "another shape": (
        lambda c: c["state"].update({"model.enc.8x8_block0.conv1.bias": torch.ones(3)}),
        r"down.0.blocks.0.conv2.bias is 3, 16 would fit",
    ),
    "another filter": (lambda c: c["state"]["model.enc.4x4_down.conv0.resample_filter"].mul_(2), "resamples with"),
    "no layers": (lambda c: c.update(state={"weight": torch.ones(1)}), "holds no layers of a SongUNet"),
}


@pytest.mark.parametrize("name", EDM_FAULTS)
def test_edm_files_that_do_not_fit_are_one_line(name: str, tmp_path: Path) -> None:
    content = edm_content("EDMPrecond", SMALL)
    tamper, line = EDM_FAULTS[name]
    tamper(content)
    with pytest.raises(ConfigError, match=line) as refused:
        model_of("edm", saved(content, tmp_path))
    assert "\n" not in str(refused.value)


SDE_FAULTS: dict[str, tuple[Net, Callable[[dict[str, Any]], Any], str]] = {
    "not a training": (SMALL, lambda c: c.pop("ema"), "not model and ema of a checkpoint of score_sde_pytorch"),
    "VE": (Net(fourier=True), lambda c: None, r"its process is variance exploding \(VE\)"),
    "too few averages": (SMALL, lambda c: c["ema"]["shadow_params"].pop(), "which are not those of its .* parameters"),
    "another network": (SMALL, lambda c: c["model"].update({"module.fc.bias": torch.ones(1)}), "holds fc.bias, which"),
    "no time": (
        SMALL,
        lambda c: [c["model"].pop(f"module.all_modules.{i}.{each}") for i in (0, 1) for each in ("weight", "bias")],
        "begins with|are not those",
    ),
    "another layer": (
        SMALL,
        lambda c: c["model"].update({"module.all_modules.99.gain": torch.ones(1)}),
        r"layer 99 \(gain\) is of none",
    ),
    "for other sizes": (Net(channels=1), lambda c: None, "is for images of 1x32x32, data=digits has 1x8x8"),
    "for other images": (Net(attention=()), lambda c: None, "is for images of 3x8x8, data=digits has 1x8x8"),
    "halved too often": (
        Net(channels=1, mult=(1,) * 5, attention=(), size=16),
        lambda c: None,
        "halves images 4 times",
    ),
}


@pytest.mark.parametrize("name", SDE_FAULTS)
def test_score_sde_files_that_do_not_fit_are_one_line(name: str, tmp_path: Path) -> None:
    net, tamper, line = SDE_FAULTS[name]
    content = score_sde_content(net)
    tamper(content)
    with pytest.raises(ConfigError, match=line) as refused:
        model_of("score_sde", saved(content, tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.weights=unknown"], "holds both weights"),
        (["model.process=vp_discrete", "schedule=cosine"], "schedule=linear's own 1000 timesteps"),
    ],
    ids=["unknown weights", "another schedule"],
)
def test_options_that_do_not_fit_are_one_line(overrides: list[str], line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        model_of("score_sde", saved(score_sde_content(SMALL), tmp_path), *overrides)


def test_noise_that_a_network_was_not_made_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(edm_content("EDMPrecond", SMALL), tmp_path)
    with caplog.at_level("INFO"):
        model_of("edm", path, "schedule.beta_end=0.0173")
        assert not caplog.records
        model_of("edm", path)
    assert re.search(r"made for sigma up to 80, and schedule=linear reaches 157", caplog.text)
