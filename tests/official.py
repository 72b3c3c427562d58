"""References for the tests: the papers' and rivals' formulas, re-derived, and noise sources that replay or refuse.

Nothing of ddim_lab is imported here: these are the other side of the comparison. All of it is float64 and slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

EpsModel = Callable[[Tensor, Tensor], Tensor]
NoiseAt = Callable[[int], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A test file that imports this runs on one thread: tensors are small, and threads would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- test doubles ------------------------------------------------------------------------------------------


class Replay:
    """Noise that depends on the timestep alone, for a rival and for ours alike."""

    def __init__(self, like: Tensor, seed: int = 0) -> None:
        self._like = like
        self._seed = seed
        self._drawn: dict[int, Tensor] = {}
        self.asked: list[int] = []

    def at(self, t: int) -> Tensor:
        if t not in self._drawn:
            generator = torch.Generator().manual_seed(100_003 * self._seed + t)
            noise = torch.randn(self._like.shape, generator=generator, dtype=torch.float64)
            self._drawn[t] = noise.to(self._like.dtype)
        return self._drawn[t].clone()

    def __call__(self, indices: Tensor, t: int, like: Tensor) -> Tensor:
        self.asked.append(t)
        return self.at(t)


def refuse(indices: Tensor, t: int, like: Tensor) -> Tensor:
    """A noise source for walks that must not draw."""
    raise AssertionError(f"noise was drawn at t={t}")


class Counting:
    """A model that remembers the timesteps it was given: all int64, or all float32."""

    def __init__(self, model: EpsModel) -> None:
        self._model = model
        self.seen: list[float] = []
        self.dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype in (torch.int64, torch.float32)
        assert self.dtype in (None, t.dtype), "one walk, one dtype: what is compiled or recorded is so for one"
        assert t.shape == x.shape[:1]
        assert bool((t == t[0]).all())
        self.dtype = t.dtype
        self.seen.append(t[0].item())
        return self._model(x, t)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def labels(t: int, x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), t, dtype=torch.int64)


# -- the official DDIM code's walk (its betas have a leading 0, its alpha is indexed t + 1) -------------------


def official_alpha(betas: np.ndarray, t: int) -> float:
    return float(np.cumprod(1.0 - np.concatenate([[0.0], betas]))[t + 1])


def official_sequence(kind: str, steps: int, total: int = 1000) -> list[int]:
    """uniform: a stride of T // S, however many steps that makes. quad: squares up to 0.8 T, repeats kept."""
    if kind == "uniform":
        return list(range(0, total, total // steps))
    return [int(root**2) for root in np.linspace(0.0, np.sqrt(0.8 * total), steps)]


def official_ddim(
    model: EpsModel, x: Tensor, sequence: Sequence[int], betas: np.ndarray, eta: float, noise_at: NoiseAt
) -> Tensor:
    """Its walk for the eta rows of Table 1; nothing is clipped."""
    for t, t_next in zip(reversed(sequence), [*reversed(sequence[:-1]), -1], strict=True):
        a, a_next = official_alpha(betas, t), official_alpha(betas, t_next)
        eps = model(x, labels(t, x))
        x_0 = (x - math.sqrt(1.0 - a) * eps) / math.sqrt(a)
        c_1 = eta * math.sqrt((1.0 - a / a_next) * (1.0 - a_next) / (1.0 - a))
        c_2 = math.sqrt(1.0 - a_next - c_1**2)
        x = math.sqrt(a_next) * x_0 + c_1 * noise_at(t) + c_2 * eps
    return x


def official_sigma_hat(
    model: EpsModel, x: Tensor, sequence: Sequence[int], betas: np.ndarray, noise_at: NoiseAt
) -> Tensor:
    """Its walk for the sigma-hat row: posterior mean of (x_t, clamped x_0), std sqrt(beta), silent at t = 0 alone."""
    for t, t_next in zip(reversed(sequence), [*reversed(sequence[:-1]), -1], strict=True):
        a, a_next = official_alpha(betas, t), official_alpha(betas, t_next)
        beta = 1.0 - a / a_next
        eps = model(x, labels(t, x))
        x_0 = (math.sqrt(1.0 / a) * x - math.sqrt(1.0 / a - 1.0) * eps).clamp(-1.0, 1.0)
        mean = (math.sqrt(a_next) * beta * x_0 + math.sqrt(1.0 - beta) * (1.0 - a_next) * x) / (1.0 - a)
        x = mean if t == 0 else mean + math.sqrt(beta) * noise_at(t)
    return x


# -- DDPM's posterior and k-diffusion's ancestral Euler --------------------------------------------------------


def ddpm_posterior(ab: float, ab_prev: float) -> tuple[float, float, float]:
    """(coefficient of x_0, coefficient of x_t, variance) of q(x_prev | x_t, x_0), Ho et al. Eq. 7, over a skip.

    Product of the Gaussians N(x_prev; sqrt(ab_prev) x_0, 1 - ab_prev) and N(x_t; sqrt(alpha) x_prev, 1 - alpha)
    with alpha = ab / ab_prev.
    """
    alpha = ab / ab_prev
    beta = 1.0 - alpha
    return (
        math.sqrt(ab_prev) * beta / (1.0 - ab),
        math.sqrt(alpha) * (1.0 - ab_prev) / (1.0 - ab),
        beta * (1.0 - ab_prev) / (1.0 - ab),
    )


def ancestral_euler(
    model: EpsModel,
    x: Tensor,
    walk: Sequence[tuple[int, int]],
    alpha_bar: Callable[[int], float],
    eta: float,
    z: NoiseAt,
) -> Tensor:
    """Euler with ancestral noise on y = x / sqrt(ab), whose noise level is s = sqrt((1 - ab) / ab), as k-diffusion.

    Down to s_down, then up by s_up: s_down^2 + s_up^2 = s_to^2, and at eta = 1 s_up^2 is the posterior variance
    s_to^2 (s_from^2 - s_to^2) / s_from^2.
    """
    for t, t_next in walk:
        a, a_next = alpha_bar(t), alpha_bar(t_next)
        s_from, s_to = math.sqrt((1.0 - a) / a), math.sqrt((1.0 - a_next) / a_next)
        s_up = min(s_to, eta * math.sqrt(s_to**2 * (s_from**2 - s_to**2) / s_from**2))
        s_down = math.sqrt(s_to**2 - s_up**2)
        y = x / math.sqrt(a)
        denoised = y - s_from * model(x, labels(t, x))
        y = y + (y - denoised) / s_from * (s_down - s_from) + s_up * z(t)
        x = y * math.sqrt(a_next)
    return x


# -- Philox4x32-10 and the named normals, in Python integers ---------------------------------------------------


def philox_integers(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Salmon et al. 2011, one counter at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def named_normal(seed: int, index: int, t: int, element: int) -> float:
    """Element of the noise named (seed, index, t): Box-Muller on a pair of the words of its block of four."""
    words = philox_integers((element // 4, t + 1, index, 0), (seed % 2**32, seed // 2**32))
    a, b = words[element % 4 // 2 * 2 :][:2]
    radius = math.sqrt(-2.0 * math.log((a + 0.5) / 2**32))
    angle = 2.0 * math.pi * b / 2**32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))
