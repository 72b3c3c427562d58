"""Interpolation between noises: along the great circle, so that the points between are as likely as the ends.

    slerp(a, b; w) = sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b       (Shoemake 1985; DDIM, D.5)

A standard normal vector of D elements has a norm near sqrt(D). The straight line between two of them passes at
sqrt(D / 2), where the model was never trained; the great circle keeps the norm.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from ddim_lab.diffusion import per_sample

__all__ = ["slerp", "slerp_grid", "slerp_line"]

_PARALLEL: Final = 1e-6
"""sin(theta) below which slerp is lerp: there they differ by O(theta^2), less than float64 resolves of the ratio."""


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each sample by itself; the angle is over the flattened sample.

    Equal norms are kept. Where a and b are parallel, antiparallel or one is 0, the circle through them is not defined
    and lerp, (1 - weight) a + weight b, stands in for it.

    Args:
        a, b: [B, ...], same shape, floating point.
        weight: w; 0 gives a, 1 gives b, exactly.

    Returns:
        [B, ...] in the dtype of a; angle and weights are float64.
    """
    if a.shape != b.shape:
        raise ValueError(f"slerp needs two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if weight in (0.0, 1.0):  # sin(theta) / sin(theta) would be 1 to rounding only
        return (a if weight == 0.0 else b).clone()
    theta = _angle(a, b)
    sine = theta.sin()
    flat = sine < _PARALLEL
    sine = torch.where(flat, torch.ones_like(sine), sine)
    of_a = torch.where(flat, torch.full_like(sine, 1.0 - weight), ((1.0 - weight) * theta).sin() / sine)
    of_b = torch.where(flat, torch.full_like(sine, weight), (weight * theta).sin() / sine)
    return per_sample(of_a, a) * a + per_sample(of_b, a) * b


def slerp_line(a: Tensor, b: Tensor, points: int) -> Tensor:
    """Points evenly spaced in angle from a to b, both included.

    Args:
        a, b: [B, ...].
        points: at least 2.

    Returns:
        [B, points, ...].
    """
    if points < 2:
        raise ValueError(f"a line has at least 2 points, got {points}")
    return torch.stack([slerp(a, b, k / (points - 1)) for k in range(points)], dim=1)


def slerp_grid(corners: Tensor, side: int) -> Tensor:
    """A square of slerps of slerps between four corners (DDIM, appendix D.5).

    Args:
        corners: [4, ...]: top left, top right, bottom left, bottom right.
        side: points along an edge, at least 2.

    Returns:
        [side, side, ...]: down the left and the right edge first, then across.
    """
    if len(corners) != 4:
        raise ValueError(f"a grid has 4 corners, got {len(corners)}")
    edges = slerp_line(corners[:2], corners[2:], side)  # [2, side, ...]: the left and the right edge
    return slerp_line(edges[0], edges[1], side)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle between samples, float64 [B]: 2 atan2(|u - v|, |u + v|) of the unit vectors, exact near 0 and pi (Kahan).

    0 where a sample is 0.
    """
    u, v = (_unit(x.flatten(1).double()) for x in (a, b))
    angle = 2.0 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    defined = (u.square().sum(1) > 0) & (v.square().sum(1) > 0)
    return torch.where(defined, angle, torch.zeros_like(angle))


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))
