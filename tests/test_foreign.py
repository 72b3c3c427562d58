"""Networks of other code bases: what diffusers' answers with their weights is what they answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Weights, adm_network, ddim_network
from torch import Tensor

from ddim_lab.models.foreign.adm import convert_adm
from ddim_lab.models.foreign.converted import Converted, build
from ddim_lab.models.foreign.ddim import convert_ddim

LACKING = "looks like|has tensors as|is a checkpoint|beside what its network needs|the other tensors ask for"

TIMES = torch.tensor([0, 3, 999])


def images(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))


def agree(converted: Converted, expected: Tensor, *args: Any) -> None:
    with torch.no_grad():
        got = build(converted)(*args).sample
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"attention": (), "blocks": 1},
        {"attention": (0, 2), "mult": (1, 1, 3)},
        {"with_conv": False},
        {"mult": (1,), "attention": (0,), "blocks": 3},
    ],
)
def test_the_ddim_authors_network(features: dict[str, Any]) -> None:
    weights, x = Weights(), images(1)
    expected = ddim_network(weights, x, TIMES, **features)
    held = dict(weights)
    converted = convert_ddim(held, (16, 16))
    agree(converted, expected, x, TIMES)
    assert held == dict(weights)  # what was given is left as it was
    assert converted.weights is None
    for name in held:  # every key is needed
        with pytest.raises(ValueError, match=rf"^it lacks .*|{LACKING}"):
            build(convert_ddim({key: tensor for key, tensor in held.items() if key != name}, None))
    with pytest.raises(ValueError, match=r"^it holds, beside what its network needs, another and 1 more$"):
        convert_ddim({**held, "another": torch.zeros(1), "one": torch.zeros(1)}, None)


@pytest.mark.parametrize(
    "features",
    [
        {"heads": 4},
        {"heads": 4, "mult": (1, 2, 4), "attention": (0, 1, 2), "learn_sigma": True},  # other widths: no config says it
        {"head_channels": 16, "new_order": True, "updown": True, "learn_sigma": True},
        {"head_channels": 32, "updown": True, "attention": (), "blocks": 2},
        {"heads": 1, "scale_shift": False, "attention": (0, 2)},
        {"heads": 2, "conv_resample": False},
        {"heads": 2, "mult": (1,), "attention": (0,)},
    ],
)
@pytest.mark.parametrize("conditional", [False, True])
def test_openais_network(features: dict[str, Any], conditional: bool) -> None:
    weights, x = Weights(), images()
    y = torch.tensor([4, 0, 2]) if conditional else None
    expected = adm_network(weights, x, TIMES, y, **features)
    told = {name: features.get(name) for name in ("heads", "head_channels", "new_order")}
    converted = convert_adm(weights, (16, 16), 1000, **told)
    agree(converted, expected, x, TIMES, y)
    assert (converted.heads is None) == (features.get("mult") != (1, 2, 4))


@pytest.mark.parametrize("rescaled", [False, True])
def test_openais_network_of_4000_timesteps_is_given_as_many_or_1000(rescaled: bool) -> None:
    weights, x, t = Weights(), images(), torch.tensor([1, 2, 3999])
    expected = adm_network(weights, x, t * 0.25 if rescaled else t, heads=2)
    agree(convert_adm(weights, None, 4000, heads=2, rescaled=rescaled), expected, x, t)
    with pytest.raises(ValueError, match="say rescale_timesteps"):
        convert_adm(weights, None, 4000, heads=2)
