"""Noise that has a name: z = N(seed, sample index, timestep), whatever the batch, order, process or device.

A counter-based generator (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
maps the name straight to random bits, so nothing is stored, advanced or shared. It is written in tensor
operations on int64, hence the same bits on every device; Box-Muller in float64 turns them into normals, which
are rounded to the asked dtype last: float32 noise is float64 noise, rounded.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Final, Protocol, final

import torch
from torch import Tensor

__all__ = ["INITIAL", "NamedNoise", "NoiseSource", "philox4x32"]

INITIAL: Final = -1
"""The label of x_T, the noise that a sample starts from; a transition from t uses the label t >= 0, whole or not."""

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10


class NoiseSource(Protocol):
    """Anything that gives standard normal noise for named samples at a timestep."""

    def __call__(self, indices: Tensor, t: float, like: Tensor) -> Tensor:
        """Standard normal z for samples `indices` [B] at label t; shape, dtype and device of `like` [B, ...]."""
        ...


def philox4x32(
    counter: Sequence[Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words of counter and two of key -> four random words.

    Args:
        counter: four int64 tensors that broadcast together, each value in [0, 2^32).
        key: two integers in [0, 2^32), or int64 tensors of such that broadcast with the counter's.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product wraps in int64, but its 64 bits are right: the shift's sign bits are masked off.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@final
class NamedNoise:
    """Standard normal noise named by (seed, sample index, timestep).

    Element j of sample i at label t is a function of (seed, i, t, j) alone. Counter words of a whole t, be it an int or
    a float: block of four elements, t + 1, i, 0; the key is the seed. A counter word has 32 bits: 0 <= i < 2^32.

    Where t is not whole, the second and the fourth word are the lower and the upper half of the 64 bits of -t: the sign
    is in the upper one, so that it is never 0 and no counter is one of a whole t or of another t.

    Args:
        seed: 0 <= seed < 2^64.
        compiled: fuse its some 200 operations into one kernel with torch.compile. The random words are the same;
            their float64 logarithm and cosine may come from another library, a difference that rounding to float32
            nearly always hides.
    """

    def __init__(self, seed: int, compiled: bool = False) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2^64 - 1, got {seed}")
        self.seed: Final = seed
        self.compiled: Final = compiled

    def __call__(self, indices: Tensor, t: float, like: Tensor) -> Tensor:
        if indices.shape != like.shape[:1]:
            raise ValueError(f"{tuple(indices.shape)} indices name {like.shape[0]} samples: give one index a sample")
        size = math.prod(like.shape[1:])
        blocks = torch.arange((size + 3) // 4, device=like.device)[None, :]
        samples = indices.to(device=like.device, dtype=torch.int64)[:, None]
        label, sign = (torch.full_like(blocks, word) for word in _words(t))
        key = (self.seed & _MASK, self.seed >> 32)
        if self.compiled:  # for every other integer it would be compiled again
            normals = _compiled()(blocks, label, samples, sign, *(torch.full_like(blocks[:, :1], k) for k in key))
        else:
            normals = _normals(blocks, label, samples, sign, *key)
        return normals.flatten(1)[:, :size].reshape(like.shape).to(like.dtype)

    def initial(self, indices: Tensor, like: Tensor) -> Tensor:
        """x_T of the named samples: the noise at label `INITIAL`; shape, dtype and device of `like`."""
        return self(indices, INITIAL, like)


def _words(t: float) -> tuple[int, int]:
    """The second and the fourth word of a label's counters."""
    if t == int(t):
        return int(t) + 1, 0
    if t < 0.0:
        raise ValueError(f"label {t} names no noise: give a timestep from 0 up, or -1 for x_T")
    upper, lower = struct.unpack(">II", struct.pack(">d", -t))
    return lower, upper


def _normals(
    blocks: Tensor, label: Tensor, samples: Tensor, sign: Tensor, low: int | Tensor, high: int | Tensor
) -> Tensor:
    """Normals of samples [B, 1] and blocks [1, M], float64 [B, M, 4]; label and sign are a label's `_words`, [1, M]."""
    words = philox4x32((blocks, label, samples, sign), (low, high))
    return torch.stack((*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])), dim=-1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`_normals` as one kernel for all shapes; compiled at its first call."""
    return torch.compile(_normals, dynamic=True)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two 32-bit words (Box & Muller 1958); |z| <= 6.77."""
    radius = torch.sqrt(-2.0 * torch.log((a.double() + 0.5) * 2.0**-32))
    angle = b.double() * (2.0 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)
