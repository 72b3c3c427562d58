"""Slerp against its theory: ends, norms, angles, and the straight line where there is no circle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddim_lab.interpolate import slerp, slerp_grid, slerp_line
from ddim_lab.noise import NamedNoise

WEIGHTS = [0.1, 0.25, 0.5, 0.9]


def noise(count: int, dtype: torch.dtype = torch.float64, first: int = 0) -> Tensor:
    return NamedNoise(0).initial(torch.arange(first, first + count), torch.empty(count, 3, 8, 8, dtype=dtype))


def on_sphere(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def angles(a: Tensor, b: Tensor) -> Tensor:
    """From the inner product, another way than the code's."""
    a, b = on_sphere(a).flatten(1), on_sphere(b).flatten(1)
    return torch.acos((a * b).sum(1).clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_ends_at_its_ends_exactly(dtype: torch.dtype) -> None:
    a, b = noise(4, dtype), noise(4, dtype, first=4)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.3).dtype == dtype


@pytest.mark.parametrize("weight", WEIGHTS)
def test_equal_norms_are_kept(weight: float) -> None:
    a, b = on_sphere(noise(6)) * 5.0, on_sphere(noise(6, first=6)) * 5.0
    norms = slerp(a, b, weight).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((6,), 5.0, dtype=torch.float64), rtol=1e-14, atol=0)
    assert float(torch.lerp(a, b, 0.5).flatten(1).norm(dim=1).max()) < 4.0  # the straight line does not


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_angle_grows_in_proportion_sample_by_sample(weight: float) -> None:
    a, b = on_sphere(noise(6)), on_sphere(noise(6, first=6))
    whole = angles(a, b)
    assert float(whole.std()) > 0.01  # each sample has its own
    torch.testing.assert_close(angles(a, slerp(a, b, weight)), weight * whole, rtol=1e-10, atol=1e-12)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """The angle is each sample's own, not one angle of the flattened batch (the official code's)."""
    a, b = noise(5), noise(5, first=5)
    one_by_one = torch.cat([slerp(a[i : i + 1], b[i : i + 1], 0.3) for i in range(5)])
    assert torch.equal(slerp(a, b, 0.3), one_by_one)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, -0.5, 0.0])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_parallel_vectors_are_interpolated_straight(factor: float, weight: float) -> None:
    a = noise(3)
    torch.testing.assert_close(slerp(a, factor * a, weight), a * (1 - weight + weight * factor), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", [1e-9, 1e-7, 1e-5, 1e-3])
def test_the_fallback_is_continuous(theta: float) -> None:
    """Near-parallel vectors: slerp tends to lerp with the square of the angle, on both sides of the threshold."""
    a = on_sphere(noise(1))
    other = noise(1, first=9)
    normal = on_sphere(other - (other * a).sum() * a)
    b = math.cos(theta) * a + math.sin(theta) * normal
    gap = float((slerp(a, b, 0.3) - torch.lerp(a, b, 0.3)).abs().max())
    assert gap <= theta**2 + 1e-15


def test_one_parallel_sample_does_not_touch_its_neighbours() -> None:
    a, b = noise(3), noise(3, first=3)
    expected = slerp(a, b, 0.4)
    b[1] = a[1]
    found = slerp(a, b, 0.4)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(found[1], a[1], rtol=1e-14, atol=0)


def test_line_and_grid() -> None:
    corners = noise(4)
    line = slerp_line(corners[:1], corners[1:2], 5)
    assert line.shape == (1, 5, 3, 8, 8)
    assert torch.equal(line[:, 2], slerp(corners[:1], corners[1:2], 0.5))
    grid = slerp_grid(corners, 5)
    assert grid.shape == (5, 5, 3, 8, 8)
    for corner, place in zip(corners, [(0, 0), (0, 4), (4, 0), (4, 4)], strict=True):
        assert torch.equal(grid[place], corner)
    left, right = (slerp(corners[k : k + 1], corners[k + 2 : k + 3], 0.25) for k in (0, 1))
    torch.testing.assert_close(grid[1, 3], slerp(left, right, 0.75)[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slerp(torch.zeros(2, 3), torch.zeros(3, 3), 0.5), "one shape"),
        (lambda: slerp_line(torch.zeros(2, 3), torch.zeros(2, 3), 1), "at least 2 points"),
        (lambda: slerp_grid(torch.zeros(3, 3), 4), "4 corners"),
    ],
)
def test_wrong_arguments_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
