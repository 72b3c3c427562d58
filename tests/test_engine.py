"""Runtime switches: what they settle to, and that none of them changes what a network is."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddim_lab.config.model import UNetConfig
from ddim_lab.config.runtime import Part, RuntimeConfig
from ddim_lab.device.engine import Engine
from ddim_lab.device.memory import Halving
from ddim_lab.device.precision import ends_without_autocast, lower_precision
from ddim_lab.device.reuse import reuse_memory
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError
from ddim_lab.metrics.speed import device_seconds
from ddim_lab.models.obtain import with_batch_size
from ddim_lab.models.unet import build_unet
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import Sampler
from ddim_lab.schedule import NoiseSchedule

DEFAULTS = {
    "device": "auto",
    "aim": "faithful",
    "precision": "auto",
    "keep_fp32": ("edges",),
    "channels_last": "auto",
    "compile": "auto",
    "cuda_graphs": "auto",
    "cudnn_benchmark": "auto",
    "deterministic": False,
}


def runtime(**asked: Any) -> Runtime:
    return Runtime.resolve(RuntimeConfig(**{**DEFAULTS, "device": "cpu", **asked}))


ON_A_CPU: tuple[Part, ...] = ("edges", "norms", "outer", "weights")
"""What 16 bits keep there of a network that is not narrow."""


def small_unet(*channels: int, attention: bool = True) -> nn.Module:
    config = UNetConfig(
        kind="unet",
        weights="ema",
        block_out_channels=channels or (16, 32),
        attention=(False, attention),
        layers_per_block=1,
        norm_num_groups=8,
        dropout=0.0,
    )
    torch.manual_seed(0)
    network: nn.Module = build_unet(config, (3, 8, 8))
    return network.eval().requires_grad_(False)


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = NamedNoise(seed).initial(torch.arange(count), torch.empty(count, 3, 8, 8))
    return x, torch.full((count,), 400)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return small_unet()


# -- memory that is written over -------------------------------------------------------------------------


class OnLayers(TorchDispatchMode):
    """Which of some operations are called on whole layers, each time."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = names
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self._names and args[0].ndim == 4:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


FRESH = ("silu", "div", "add")
"""What takes memory where an input could be written over."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [None, (), ("edges",), ("edges", "norms", "stream"), ON_A_CPU])
@pytest.mark.parametrize("count", [1, 3, 64])  # from 64 on diffusers lays out anew what it enlarges
@pytest.mark.parametrize("attention", [True, False])  # which leaves images pixel by pixel
def test_a_network_that_writes_over_its_own_memory_gives_the_same_bits(
    attention: bool, layout: str, keep: Sequence[Part] | None, count: int
) -> None:
    plain = small_unet(attention=attention).to(memory_format=LAYOUTS[layout])
    if keep is not None:
        lower_precision(plain, torch.bfloat16, keep)
    x, t = inputs(count)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    given = x.clone()
    spared = copy.deepcopy(plain)
    reuse_memory(spared, channels_last=layout == "channels_last")
    with torch.inference_mode():
        expected = plain(x, t).sample
        for _ in range(2):
            found = spared(x, t).sample
            if layout == "channels_last" and attention:  # its norm adds up pixel by pixel, too
                tolerance = 1e-5 if keep is None else 3e-2
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(found, expected)
    assert torch.equal(x, given)
    assert spared.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("channels_last", [True, False])
def test_uncompiled_a_cpu_writes_over_what_a_block_is_done_with(channels_last: bool, network: nn.Module) -> None:
    x, t = inputs(2)
    with torch.inference_mode(), OnLayers(*FRESH) as as_it_comes:
        network(x, t)
    with torch.inference_mode(), OnLayers(*FRESH) as left:
        runtime(channels_last=channels_last).wrap(copy.deepcopy(network), 2)(x, t)
    assert as_it_comes.found
    assert not left.found


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_attention_of_several_heads_is_what_diffusers_computes(count: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()
    spared = copy.deepcopy(plain)
    reuse_memory(spared, channels_last=channels_last)
    x, t = inputs(count)
    with torch.inference_mode():
        torch.testing.assert_close(spared(x, t).sample, plain(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [3, 64])
def test_images_that_lie_channel_by_channel_are_enlarged_by_rows(count: int) -> None:
    for attention in (True, False):
        spared = small_unet(attention=attention)
        reuse_memory(spared, channels_last=False)
        with torch.inference_mode(), OnLayers("upsample_nearest2d") as enlarged:
            spared(*inputs(count))
        # What comes from attention lies pixel by pixel, below 64 images, and is left to torch.
        assert len(enlarged.found) == (attention and count < 64)


class TurnedOver(TorchDispatchMode):
    """Which operations lay an image out anew: `contiguous`, and those that are given one in another layout than theirs.

    That of norms and convolutions is [B, H, W, C]; of layers of places, whatever lies in a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("contiguous", "group_norm", "conv2d", "linear"):
            x = args[0]
            layout = (
                torch.channels_last if name in ("group_norm", "conv2d") and x.ndim == 4 else torch.contiguous_format
            )
            if not x.is_contiguous(memory_format=layout):
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [3, 64])
def test_images_that_lie_pixel_by_pixel_are_never_turned_over(count: int) -> None:
    plain = small_unet().to(memory_format=torch.channels_last)
    spared = copy.deepcopy(plain)
    reuse_memory(spared, channels_last=True)
    x, t = inputs(count)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), TurnedOver() as as_it_comes:
        plain(x, t)
    with torch.inference_mode(), TurnedOver() as left:
        spared(x, t)
    assert set(as_it_comes.found) == {"group_norm", "linear", *(("contiguous", "conv2d") if count >= 64 else ())}
    assert not left.found


@pytest.mark.parametrize("channels_last", [True, False])
def test_where_gradients_are_asked_for_nothing_is_written_over(channels_last: bool, network: nn.Module) -> None:
    x, t = inputs(2)
    spared = copy.deepcopy(network)
    reuse_memory(spared, channels_last=channels_last)
    found = []
    for each in (network, spared):
        own = x.clone().requires_grad_()
        found.append(torch.autograd.grad(each(own, t).sample.square().sum(), own)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("channels_last", [True, False])
def test_blocks_of_another_kind_are_left_alone(channels_last: bool) -> None:
    torch.manual_seed(0)
    blocks = ("ResnetDownsampleBlock2D", "DownBlock2D"), ("UpBlock2D", "ResnetUpsampleBlock2D")
    other = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        layers_per_block=1,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    spared = copy.deepcopy(other.eval())
    reuse_memory(spared, channels_last=channels_last)
    x, t = inputs(2)
    with torch.inference_mode():
        assert torch.equal(spared(x, t).sample, other(x, t).sample)


# -- what "auto" is --------------------------------------------------------------------------------------


def test_the_default_on_a_cpu_wraps_nothing_around_the_network(network: nn.Module) -> None:
    settled = runtime()
    assert settled.precision == "fp32"
    assert not any((settled.channels_last, settled.compile, settled.cuda_graphs, settled.cudnn_benchmark))
    assert not settled.noise(0).compiled
    for each in (settled, runtime(deterministic=True)):
        own = copy.deepcopy(network)
        assert each.wrap(own, 4) is own


@pytest.mark.parametrize("count", [3, 64])
def test_the_default_on_a_cpu_gives_the_bits_of_diffusers(count: int, network: nn.Module) -> None:
    x, t = inputs(count)
    with torch.inference_mode():
        expected = network(x, t).sample
        assert torch.equal(runtime().wrap(copy.deepcopy(network), count)(x, t).sample, expected)


def test_channels_last_on_a_cpu_turns_eps_alone_over(network: nn.Module) -> None:
    x, t = inputs(64)
    wrapped = runtime(channels_last=True).wrap(copy.deepcopy(network), 64)
    with torch.inference_mode(), TurnedOver() as turned:
        found = wrapped(x, t)
    assert turned.found == ["contiguous"], "into the layout of x_t"
    torch.testing.assert_close(found, network(x, t).sample, rtol=1e-4, atol=1e-5)


def test_channels_last_on_a_cpu_rounds_as_fp32_does(network: nn.Module) -> None:
    """Torch takes a norm's variance as E[x^2] - E[x]^2 there, which rounds more."""
    x, t = inputs(16)
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(x.double(), t).sample
        errors = [
            (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            for found in (
                network(x, t).sample,
                runtime(channels_last=True).wrap(copy.deepcopy(network), 16)(x, t),
            )
        ]
    assert errors[0] < 1e-6
    assert errors[1] < 2e-6


@tiny.needs_compiler
@pytest.mark.parametrize(("units", "precision"), [(False, "fp32"), (True, "bf16")])
def test_for_speed_a_cpu_compiles_in_the_precision_that_it_has_units_for(
    units: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim_lab.device.runtime.multiplies_bf16", lambda: units)
    settled = runtime(aim="speed")
    assert (settled.precision, settled.compile, settled.channels_last) == (precision, True, True)
    assert not settled.noise(0).compiled
    asked = runtime(compile=True, precision=precision)
    assert settled.recipe() == asked.recipe(), "what it aims at is no part of what it is"
    assert not runtime(aim="speed", deterministic=True).compile
    assert runtime().precision == "fp32"


def test_a_runtime_leaves_determinism_as_it_was() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with runtime(deterministic=False).applied():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_that_is_resolved_says_auto() -> None:
    for aim in ("faithful", "speed"):
        assert "auto" not in runtime(aim=aim).recipe().values()


@pytest.mark.parametrize("switch", ["channels_last", "compile", "cudnn_benchmark"])
def test_every_switch_is_part_of_the_identity(switch: str) -> None:
    assert runtime(**{switch: True}).recipe() != runtime(**{switch: False}).recipe()


def test_what_stays_fp32_is_part_of_the_identity_only_in_16_bits() -> None:
    assert runtime(keep_fp32=("edges",)).recipe() == runtime(keep_fp32=()).recipe()
    low = {"precision": "bf16"}
    assert runtime(**low, keep_fp32=("edges",)).recipe() != runtime(**low, keep_fp32=()).recipe()
    assert (
        runtime(**low, keep_fp32=("norms", "edges")).recipe() == runtime(**low, keep_fp32=("edges", "norms")).recipe()
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"precision": "tf32"}, "needs a CUDA device"),
        ({"cuda_graphs": True}, "needs a CUDA device"),
        ({"cudnn_benchmark": True, "deterministic": True}, "set runtime.deterministic=false"),
    ],
)
def test_what_a_machine_can_not_do_is_refused_in_a_line(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        runtime(**asked)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    assert not runtime(aim="speed").compile
    assert not runtime(aim="speed").channels_last
    with pytest.raises(ConfigError, match=r"C\+\+ compiler"):
        runtime(compile=True)


def test_compiling_needs_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there
    monkeypatch.setattr("sysconfig.get_path", lambda *_, **__: str(tmp_path))
    assert not runtime(aim="speed").compile
    with pytest.raises(ConfigError, match="needs Python's headers"):
        runtime(compile=True)


# -- the engine changes no result ------------------------------------------------------------------------


def test_channels_last_is_the_same_network_up_to_rounding(network: nn.Module) -> None:
    x, t = inputs(4)
    expected = network(x, t).sample
    found = Engine(copy.deepcopy(network), 4, channels_last=True, compiled=False, graphs=False)(x, t)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Noted(nn.Module):
    """A network that notes the sizes of its batches."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.sizes.append(len(x))
        return self.network(x, t)


def compiled_without_compiling(monkeypatch: pytest.MonkeyPatch, network: nn.Module, size: int) -> Engine:
    """An engine with the compiler taken out of it: its batches are those of a compiled one."""
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    return Engine(network, size, channels_last=False, compiled=True, graphs=False)


@pytest.mark.parametrize("count", [1, 3, 8, 11, 16])
def test_a_fixed_batch_size_gives_every_image_its_own(
    count: int, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(network)
    engine = compiled_without_compiling(monkeypatch, noted, 8)
    x, _ = inputs(count)
    t = torch.arange(count) * 10
    torch.testing.assert_close(engine(x, t), network(x, t).sample, rtol=1e-4, atol=1e-5)
    assert set(noted.sizes) == {8}


@pytest.mark.parametrize(("batch_size", "parts"), [(100, [100]), (512, [512]), (513, [257, 257]), (1024, [512, 512])])
def test_a_cpu_compiles_for_batches_of_a_size_that_wastes_little(
    batch_size: int, parts: list[int], network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(network)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr("ddim_lab.device.runtime._missing_for_compiling", lambda _: None)
    walked = Halving(runtime(compile=True).wrap(noted, batch_size))
    assert len(walked(*inputs(batch_size))) == batch_size
    assert noted.sizes == parts
    assert walked.at_once(batch_size) == parts[0]


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device, or copy to it."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "_to_copy", "lift_fresh", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and set(kwargs or {}) <= {"dtype", "memory_format"}
        if name in self.WAITING and not copies:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


SAMPLERS: list[dict[str, Any]] = [
    {"eta": 0.0},
    {"eta": 0.7, "clip": "x0"},
    {"eta": 1.0, "variance": "large", "clip": "x0_eps"},
    {"eta": 1.0, "spacing": "logsnr"},  # t is float32
]


@pytest.mark.parametrize("settings", SAMPLERS)
def test_a_walk_never_waits_for_the_device(settings: dict[str, Any], network: nn.Module) -> None:
    sampler = Sampler(NoiseSchedule.linear(1000, 1e-4, 0.02), 5, **settings)
    x, _ = inputs(4)
    indices = torch.arange(4)
    engine = Engine(network, 4, channels_last=False, compiled=False, graphs=False)
    with Waits() as waits:
        sampler.sample(engine, x, indices=indices)
        assert waits.found == []
        x.sum().item()
        assert waits.found == ["_local_scalar_dense"], "the test sees what it looks for"


def walks() -> Iterator[tuple[Sampler, Tensor, Tensor]]:
    for settings in SAMPLERS:
        sampler = Sampler(NoiseSchedule.linear(1000, 1e-4, 0.02), 5, **settings)
        indices = torch.arange(16)
        yield sampler, NamedNoise(0).initial(indices, torch.empty(16, 3, 8, 8)), indices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("switches", [{}, {"cuda_graphs": False, "compile": False}, {"precision": "bf16"}])
def test_on_a_gpu_every_walk_is_asynchronous_and_near_the_reference(switches: dict[str, Any]) -> None:
    plain = runtime(device="cuda", precision="fp32", deterministic=True)
    settled = runtime(**{"device": "cuda", **switches})
    for sampler, x_T, indices in walks():
        x_T, indices = x_T.cuda(), indices.cuda()
        with plain.applied():
            expected = sampler.sample(small_unet().cuda(), x_T, indices=indices)
        with settled.applied():
            engine, noise = settled.wrap(small_unet().cuda(), 16), settled.noise(0)
            sampler.sample(engine, x_T, indices=indices, noise=noise)  # compiles and records
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = sampler.sample(engine, x_T, indices=indices, noise=noise)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        scale = expected.square().mean().sqrt()
        assert (found - expected).square().mean().sqrt() < 0.05 * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_network_follows_its_weights_and_keeps_no_output() -> None:
    x, t = (tensor.cuda() for tensor in inputs(4))
    network = small_unet().cuda()
    engine = Engine(network, 4, channels_last=True, compiled=False, graphs=True)
    first = engine(x, t)
    kept = first.clone()
    engine(-x, t)
    assert torch.equal(first, kept), "a later forward wrote into an output that was handed out"
    engine.cpu().cuda()
    torch.testing.assert_close(engine(x, t), kept)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["cuda:0", "cuda:1"])
def test_networks_are_recorded_and_timed_on_the_device_they_are_on(name: str) -> None:
    """The current device is the first all the time."""
    device = torch.device(name)
    x, t = (tensor.to(device) for tensor in inputs(4))
    network = small_unet().to(device)
    engine = Engine(network, 4, channels_last=False, compiled=False, graphs=True)
    engine(x, t)
    torch.testing.assert_close(engine(-x, t), network(-x, t).sample, rtol=1e-3, atol=1e-3)

    def seconds(forwards: int) -> float:
        return device_seconds(lambda: [network(x, t) for _ in range(forwards)], device)

    assert seconds(1) < seconds(10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_network_takes_t_of_either_dtype() -> None:
    x, t = (tensor.cuda() for tensor in inputs(4))
    network = small_unet().cuda()
    engine = Engine(network, 4, channels_last=False, compiled=False, graphs=True)
    for asked in (t, t + 0.5, t + 1, t + 0.25):
        torch.testing.assert_close(engine(x, asked), network(x, asked).sample, rtol=1e-3, atol=1e-3)


class Recording:
    """What stands for a CUDA graph where there is none: fixed memory for x and t, and a forward that is made of it."""

    made: list[torch.dtype] = []  # noqa: RUF012

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        x, t = inputs
        self.made.append(t.dtype)
        self._network, self._x, self._t = network, torch.empty_like(x), torch.empty_like(t)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        output = self._network(self._x, self._t)
        assert isinstance(output, Tensor)
        return output


def test_what_is_recorded_is_so_for_each_dtype_of_t(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied into memory for whole numbers, a t between two would be cut off without a word."""
    monkeypatch.setattr("ddim_lab.device.engine._Recorded", Recording)
    monkeypatch.setattr(Recording, "made", [])
    engine = Engine(network, 4, channels_last=False, compiled=False, graphs=True)
    x, t = inputs(3)
    for asked in (t, t + 0.5, t + 1, t + 0.25):
        torch.testing.assert_close(engine(x, asked), network(x, asked).sample, rtol=1e-4, atol=1e-5)
    assert Recording.made == [torch.int64, torch.float32]


@pytest.mark.parametrize("settings", [{"spacing": "logsnr"}, {"timesteps": [999, 500.5, 20]}], ids=str)
def test_a_walk_between_whole_timesteps_records_once(
    settings: dict[str, Any], network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddim_lab.device.engine._Recorded", Recording)
    monkeypatch.setattr(Recording, "made", [])
    sampler = Sampler(NoiseSchedule.linear(), 5, **settings)
    engine = Engine(network, 4, channels_last=False, compiled=False, graphs=True)
    found, expected = (sampler.sample(each, inputs(4)[0]) for each in (engine, network))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert Recording.made == [torch.float32]


def test_the_network_is_told_a_t_between_two_as_it_is(network: nn.Module) -> None:
    """Its sinusoids are those of that t: a float32 whole t is the int64 one, and the middle is neither end."""
    x, t = inputs(2)
    assert torch.equal(network(x, t.float()).sample, network(x, t).sample)
    low, middle, high = (network(x, t + d).sample for d in (0.0, 0.5, 1.0))
    torch.testing.assert_close(middle, (low + high) / 2, rtol=0, atol=0.2 * float((high - low).abs().max()))
    assert not torch.equal(middle, low)


# -- 16 bits ---------------------------------------------------------------------------------------------


def lowered(network: nn.Module, dtype: torch.dtype, keep: tuple[Part, ...]) -> nn.Module:
    other = copy.deepcopy(network)
    lower_precision(other, dtype, keep)
    return other


def spied(network: nn.Module, x: Tensor, t: Tensor) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """What each convolution, linear layer and norm was given and gave: dtypes by name."""
    found = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = (given[0].dtype, output.dtype)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm):
            module.register_forward_hook(note(name.removesuffix(".layer")))
    network(x, t)
    return found


def test_what_is_kept_computes_in_fp32_and_the_rest_does_not(network: nn.Module) -> None:
    x, t = inputs(2)
    of_edges = spied(lowered(network, torch.bfloat16, ("edges",)), x, t)
    edges = {name for name, dtypes in of_edges.items() if dtypes == (torch.float32, torch.float32)}
    assert {"conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= edges
    assert all(name.startswith(("conv_", "time_")) or name.endswith("time_emb_proj") for name in edges)
    assert set(of_edges.values()) == {(torch.float32,) * 2, (torch.bfloat16,) * 2}
    of_outer = spied(lowered(network, torch.bfloat16, ("edges", "outer")), x, t)
    outer = {name for name, dtypes in of_outer.items() if dtypes == (torch.float32, torch.float32)} - edges
    ends = ("down_blocks.0.", "up_blocks.1.")
    assert outer == {name for name in of_outer if name.startswith(ends)} - edges
    with_norms = spied(lowered(network, torch.bfloat16, ("edges", "norms")), x, t)
    norms = {name for name in with_norms if "norm" in name}
    assert {name for name in with_norms if with_norms[name] != of_edges[name]} == norms - {"conv_norm_out"}
    assert set(spied(lowered(network, torch.bfloat16, ()), x, t).values()) == {(torch.bfloat16,) * 2}


def test_the_stream_is_added_in_fp32(network: nn.Module) -> None:
    other = lowered(network, torch.bfloat16, ("stream",))
    seen = []
    for block in (*other.down_blocks, other.mid_block, *other.up_blocks):  # type: ignore[misc,union-attr]
        for part in (*block.resnets, *(getattr(block, "attentions", None) or [])):
            part.register_forward_hook(lambda _module, _given, output: seen.append(output.dtype))
    other(*inputs(2))
    assert len(seen) > 4
    assert set(seen) == {torch.float32}


def test_the_outer_stream_is_fp32_from_the_image_to_half_its_resolution_and_back(network: nn.Module) -> None:
    other: Any = lowered(network, torch.bfloat16, ("edges", "outer"))
    parts = [other.conv_in, other.down_blocks[0].resnets[0], other.down_blocks[0].downsamplers[0]]
    parts += [other.down_blocks[1].resnets[0], other.up_blocks[0].upsamplers[0], *other.up_blocks[1].resnets]
    seen: list[torch.dtype] = []
    for part in parts:
        part.register_forward_hook(lambda _module, _given, output: seen.append(output.dtype))
    other(*inputs(2))
    full, low = torch.float32, torch.bfloat16
    assert seen == [full, full, low, low, low, *[full] * len(other.up_blocks[1].resnets)]


PARTS_OF_ANY = tuple(part for part in get_args(Part) if part != "narrow")
"""Parts of a network of any width."""


@pytest.mark.parametrize("keep", [keep for n in range(6) for keep in itertools.combinations(PARTS_OF_ANY, n)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_choice_runs_near_fp32(keep: tuple[Part, ...], dtype: torch.dtype, network: nn.Module) -> None:
    x, t = inputs(2)
    expected = network(x, t).sample
    found = lowered(network, dtype, keep)(x, t).sample
    assert found.dtype == (torch.float32 if "edges" in keep else dtype)
    assert (found.float() - expected).square().mean() < 1e-3 * expected.square().mean()


def test_fp32_edges_bring_eps_nearer_to_fp32(network: nn.Module) -> None:
    """The last layer's rounding alone is 2^-9 of eps; and fp16's 11 bits beat bf16's 8."""

    def error(dtype: torch.dtype, keep: tuple[Part, ...]) -> float:
        other, total = lowered(network, dtype, keep), 0.0
        for step in (10, 300, 600, 990):
            x, _ = inputs(8, seed=step)
            t = torch.full((8,), step)
            total += float((other(x, t).sample.float() - network(x, t).sample).square().mean())
        return total

    assert error(torch.bfloat16, ("edges",)) < 0.9 * error(torch.bfloat16, ())
    assert error(torch.float16, ("edges",)) < 0.2 * error(torch.bfloat16, ("edges",))


def test_a_cpu_keeps_more_in_16_bits_than_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(runtime(precision="bf16", keep_fp32="auto").keep_fp32) == set(ON_A_CPU)
    monkeypatch.setattr("ddim_lab.device.runtime.multiplies_bf16", lambda: True)
    chosen = runtime(aim="speed", compile=False, keep_fp32="auto")
    assert chosen.precision == "bf16"
    assert set(chosen.keep_fp32) == {*ON_A_CPU, "narrow"}


def test_a_narrow_network_stays_fp32_and_a_wide_one_does_not(network: nn.Module) -> None:
    x, t = inputs(2)
    assert torch.equal(lowered(network, torch.bfloat16, ("narrow",))(x, t).sample, network(x, t).sample)
    wide = small_unet(16, 64)
    expected = lowered(wide, torch.bfloat16, ("edges",))(x, t).sample
    assert torch.equal(lowered(wide, torch.bfloat16, ("edges", "narrow"))(x, t).sample, expected)
    assert not torch.equal(wide(x, t).sample, expected)


def test_weights_of_two_numbers_have_twice_the_bits(network: nn.Module) -> None:
    other = lowered(network, torch.bfloat16, ("weights",))
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            cast: Any = other.get_submodule(name)
            for found, rest, expected in zip(
                cast.layer.parameters(), cast.rest.parameters(), layer.parameters(), strict=True
            ):
                assert found.dtype == rest.dtype == torch.bfloat16
                assert ((found.double() + rest.double() - expected).abs() <= 2**-17 * expected.abs()).all()


def test_weights_of_two_numbers_leave_little_error_that_all_images_share(network: nn.Module) -> None:
    """Rounded inputs err one way in one image and the other way in the next; rounded weights err alike in all."""
    x, t = inputs(512)

    def shared(keep: tuple[Part, ...]) -> float:
        error = lowered(network, torch.bfloat16, keep)(x, t).sample - network(x, t).sample
        return float(error.mean(0).square().mean())

    with torch.inference_mode():
        assert shared(("edges", "weights")) < 0.5 * shared(("edges",))


def test_16_bits_leave_an_exact_model_alone() -> None:
    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * 0.1234567

    x, t = inputs(2)
    assert torch.equal(runtime(precision="bf16").wrap(Exact(), 2)(x, t), x * 0.1234567)


# -- compiled --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_noise_is_the_same_noise() -> None:
    for seed in (0, 2**40 + 7):
        plain, compiled = NamedNoise(seed), NamedNoise(seed, compiled=True)
        for count, shape, t in ((3, (1, 8, 8), 5), (16, (3, 4, 4), 999), (2, (5,), -1), (2, (5,), 0.5)):
            like = torch.empty(count, *shape)
            assert torch.equal(compiled(torch.arange(count), t, like), plain(torch.arange(count), t, like))


class Tiny(nn.Module):
    """Small, for the C++ compiler takes a minute for a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output = torch.nn.functional.silu(self.conv(x)) + t[:, None, None, None] / 1000
        assert isinstance(output, Tensor)
        return output


@pytest.mark.slow
def test_a_compiled_network_is_compiled_once_and_near() -> None:
    from torch._dynamo.utils import counters

    network = Tiny()
    engine = Engine(copy.deepcopy(network), 4, channels_last=True, compiled=True, graphs=False)
    before = counters["stats"]["unique_graphs"]
    for count in (4, 1, 6):
        x, t = inputs(count)
        torch.testing.assert_close(engine(x, t), network(x, t))
    assert counters["stats"]["unique_graphs"] == before + 1
    for count in (4, 1, 6):
        x, t = inputs(count)
        torch.testing.assert_close(engine(x, t + 0.5), network(x, t + 0.5))
    assert counters["stats"]["unique_graphs"] == before + 2, "once more for walks between whole timesteps"
    assert {name for name, _ in engine.named_parameters()} == {
        f"forwarded.network.{name}" for name, _ in network.named_parameters()
    }


@tiny.needs_compiler
def test_what_is_compiled_is_never_run_uncompiled_in_silence() -> None:
    """Past torch's limit of compilations a network would go on in Python, with a warning."""
    import torch._dynamo

    engine = Engine(Tiny(), 3, channels_last=False, compiled=True, graphs=False)
    assert torch._dynamo.config.recompile_limit >= 64
    with torch._dynamo.config.patch(recompile_limit=1):
        torch._dynamo.reset()
        engine(*inputs(3))
        other = Engine(Tiny(), 2, channels_last=False, compiled=True, graphs=False)
        torch._dynamo.config.recompile_limit = 1
        with pytest.raises(RuntimeError, match=r"set runtime\.compile=false"):
            other(*inputs(2))
    torch._dynamo.reset()


# -- batch_size=auto -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "size"), [("digits", 512), ("fashion_mnist", 64), ("cifar10", 32), ("celeba", 8), ("lsun_church", 1)]
)
def test_a_cpu_takes_as_many_images_as_its_caches_hold_layers_of(data: str, size: int) -> None:
    """Whatever else is on the machine, and whatever its memory is: a cell has the same name on all CPUs of a kind."""
    config = with_batch_size(tiny.configure(f"data={data}", f"model={data}", "metrics.features=pixels"), runtime())
    assert config.batch_size == size


@pytest.mark.parametrize(
    ("gigabytes", "channels", "side", "size"), [(80, 128, 32, 2048), (24, 128, 256, 16), (1, 512, 512, 1)]
)
def test_a_gpu_takes_as_many_images_as_fit(
    gigabytes: int, channels: int, side: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    assert replace(runtime(), device="cuda:0").batch_size(channels, (3, side, side)) == size


def test_a_checkpoints_batch_is_that_of_its_network(tmp_path: Path) -> None:
    for channels, size in ((8, 512), (512, 128)):
        network = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(channels,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8,
        )  # fmt: skip
        network.save_pretrained(tmp_path)
        config = tiny.configure("model=pretrained", f"model.path={tmp_path}", "batch_size=auto")
        assert with_batch_size(config, runtime()).batch_size == size


def test_an_automatic_batch_is_resolved_in_the_cell_and_changes_no_image(tmp_path: Path) -> None:
    settings = ["model=gaussian", "metrics.features=pixels", "logger=csv", "steps=3", "num_samples=44"]
    for size in ("auto", "256"):
        assert tiny.run(tmp_path, *settings, f"batch_size={size}", settings=()) == 0
    (auto,), (given,) = (tiny.results(sweep) for sweep in tiny.sweeps(tmp_path))
    assert auto["cell"] == given["cell"], "the same resolved size is the same cell"
    assert auto["batch_size"] == "256"


@pytest.mark.parametrize("size", ["0", "-3"])
def test_a_batch_without_images_is_refused(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(tmp_path, f"batch_size={size}", settings=()) == 2
    assert f"batch_size={size}: must be at least 1, or auto" in capsys.readouterr().err


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_images_in_16_bits_stay_near_those_in_fp32(
    network: nn.Module, eta: float, dtype: torch.dtype, bound: float
) -> None:
    """The bounds in outputs/README.md: rms of the difference over that of the images, S = 10, from the same x_T."""
    x_T = inputs(8)[0]
    sampler = Sampler(NoiseSchedule.linear(1000, 1e-4, 0.02), steps=10, eta=eta)
    expected = sampler.sample(network, x_T)
    found = sampler.sample(lowered(network, dtype, ("edges",)), x_T)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-5 < error < bound


def test_under_autocast_the_ends_see_what_bf16_can_not_show() -> None:
    """Noise below bf16's resolution moves the output only if the first convolution is out of autocast."""
    x, t = torch.full((2, 3, 8, 8), 1.0), torch.zeros(2, dtype=torch.int64)
    moved = x + 0.003 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x.bfloat16(), moved.bfloat16())
    plain, ends = small_unet(), small_unet()
    ends_without_autocast(ends)
    again = copy.deepcopy(ends)
    again.conv_out.bias.data += 1.0  # a copy computes with its own weights
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x, t).sample, plain(moved, t).sample)
        output = ends(moved, t).sample
        assert output.dtype == torch.float32
        assert not torch.equal(ends(x, t).sample, output)
        assert torch.allclose(again(moved, t).sample, output + 1.0)
    assert torch.equal(ends(x, t).sample, plain(x, t).sample)
    assert ends.state_dict().keys() == plain.state_dict().keys()
