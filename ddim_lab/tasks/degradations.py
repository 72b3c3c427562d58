"""Real images made worse in known ways, from hardly to plainly: what a metric of quality ought to see.

Images in, images out: uint8 [N, C, H, W], as metrics are given them. All randomness is a generator that is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.data.images import ImageSet, from_uint8, to_uint8

__all__ = [
    "AGAIN",
    "GAUSSIAN",
    "MISSING",
    "Drawn",
    "blurred",
    "class_dropped",
    "degradations",
    "draw",
    "duplicated",
    "moment_matched",
    "noisy",
    "reweighted",
    "shifted",
    "with_share_of",
]

Generator = np.random.Generator
Float64 = np.ndarray[Any, np.dtype[np.float64]]


# -- drawing real images ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Drawn:
    """Real images, split at random into sets that share none.

    Attributes:
        reference: uint8 [M, C, H, W], what the others are compared with; every class has its share.
        plain, labels: N images, uint8 [N, C, H, W], and their classes, int64 [N].
        again: N others.
        spare, spare_labels: images to put in place of plain ones: of those that are in no other set, then of `again`.
    """

    reference: Tensor
    plain: Tensor
    labels: Tensor
    again: Tensor
    spare: Tensor
    spare_labels: Tensor


def draw(images: ImageSet, count: int, reference: int, generator: Generator) -> Drawn:
    """A reference and two sets of `count` images, at random.

    Args:
        images: all there are.
        count: N; 2 N must be left beside the reference.
        reference: images of the reference.
        generator: numpy's.
    """
    total, labels = len(images), images.labels.cpu()
    assert reference + 2 * count <= total, "too few images"
    order = torch.from_numpy(generator.permutation(total))
    order = order[labels[order].argsort(stable=True)]  # class by class, at random within each
    # every so many places one: of each class its share, to within one image
    place = torch.arange(total)
    chosen = (place + 1) * reference // total > place * reference // total
    pool = order[~chosen][torch.from_numpy(generator.permutation(total - reference))]
    plain, again, left = pool[:count], pool[count : 2 * count], pool[2 * count : 3 * count]
    spare = torch.cat([left, again])
    return Drawn(
        reference=images.batch(order[chosen]),
        plain=images.batch(plain),
        labels=labels[plain],
        again=images.batch(again),
        spare=images.batch(spare),
        spare_labels=labels[spare],
    )


# -- each image worse -------------------------------------------------------------------------------------


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian of standard deviation `sigma`, in pixels; edges are mirrored."""
    from torchvision.transforms.v2.functional import gaussian_blur

    size = 2 * math.ceil(3.0 * sigma) + 1
    return to_uint8(gaussian_blur(from_uint8(images), [size, size], [sigma, sigma]))


def noisy(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """With Gaussian noise in every value, of this standard deviation on the [-1, 1] scale; then clamped."""
    noise = torch.from_numpy(generator.standard_normal(tuple(images.shape), dtype=np.float32))
    return to_uint8(from_uint8(images) + deviation * noise)


# -- a share of the images worse ----------------------------------------------------------------------------


def with_share_of(images: Tensor, others: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of the images, chosen at random, each replaced by the one of `others` in its place."""
    chosen = _some(len(images), share, generator)
    found = images.clone()
    found[chosen] = others[chosen]
    return found


def shifted(images: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of the images moved to the right by a pixel; the column that comes free repeats the one beside it."""
    moved = torch.cat([images[..., :1], images[..., :-1]], dim=-1)
    return with_share_of(images, moved, share, generator)


def duplicated(images: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of the images, chosen at random, each replaced by a copy of one of the rest."""
    chosen = _some(len(images), share, generator)
    rest = np.setdiff1d(np.arange(len(images)), chosen.numpy())
    found = images.clone()
    found[chosen] = images[torch.from_numpy(generator.choice(rest, len(chosen)))]
    return found


def _some(count: int, share: float, generator: Generator) -> Tensor:
    """A share of the places 0 ... count - 1; a larger share by the same generator has those of a smaller one."""
    return torch.from_numpy(generator.permutation(count))[: round(share * count)]


# -- other classes ------------------------------------------------------------------------------------------


def class_dropped(drawn: Drawn, dropped: int) -> Tensor:
    """The plain images without one class: spare images of the other classes stand in its images' places.

    Raises:
        ValueError: there are too few spare ones.
    """
    return _replaced(drawn, drawn.labels == dropped, drawn.spare_labels != dropped)


def reweighted(drawn: Drawn, generator: Generator) -> Tensor:
    """The plain images with a third of those of the upper half of the classes replaced by spare ones of the lower half.

    Where all classes were as frequent, those of the lower half then are twice as frequent as the others.

    Raises:
        ValueError: there are too few spare ones.
    """
    classes = int(max(drawn.labels.max(), drawn.spare_labels.max())) + 1
    upper = torch.nonzero(drawn.labels >= (classes + 1) // 2).flatten()
    replaced = torch.zeros(len(drawn.labels), dtype=torch.bool)
    replaced[upper[_some(len(upper), 1.0 / 3.0, generator)]] = True
    return _replaced(drawn, replaced, drawn.spare_labels < (classes + 1) // 2)


def _replaced(drawn: Drawn, replaced: Tensor, by: Tensor) -> Tensor:
    """The plain images, those marked `replaced` by the first spare ones that are marked `by`."""
    spare, needed = torch.nonzero(by).flatten(), int(replaced.sum())
    if len(spare) < needed:
        raise ValueError(f"{needed} images of other classes are needed, and there are {len(spare)}")
    found = drawn.plain.clone()
    found[replaced] = drawn.spare[spare[:needed]]
    return found


# -- the same mean and covariance ---------------------------------------------------------------------------

ROUNDS: Final = 40
"""Of bringing the moments back after clamping, at most."""

BEYOND: Final = 1.5
"""How much further than to the wanted covariance each round goes: clamping takes some of it away again."""

MATCHED: Final = 2e-4
"""A Fréchet distance to the images whose moments are wanted, as a part of their total variance, at which it ends."""


def moment_matched(images: Tensor, generator: Generator) -> tuple[Tensor, float]:
    """As many images that have the sample mean and covariance of the given ones, and are else Gaussian noise.

    With X the images less their mean, X = U diag(s) V^T, and Q a random orthonormal frame orthogonal to 1, as large as
    U, the rows of mean + Q diag(s) V^T have exactly the mean and covariance of X, and nearly a Gaussian distribution.
    Clamping to 0 ... 255 changes these moments. They are brought back by the map

        y -> mean + (y - mean(y)) C_y^(-1/2) (C_y^(1/2) C C_y^(1/2))^(1/2) C_y^(-1/2)

    the smallest linear one that does, then clamped again, and so on until little is left to bring back. Each round aims
    beyond, since clamping takes a part away again.

    Args:
        images: uint8 [N, C, H, W], N >= 2.
        generator: numpy's.

    Returns:
        The images, and the Fréchet distance in pixels that is left between them and the given ones.
    """
    flat = images.flatten(1)
    varying = (flat != flat[:1]).any(0)  # pixels that are equal in all images stay so
    x = from_uint8(flat[:, varying]).double().numpy()
    mean = x.mean(0)
    _, scales, axes = np.linalg.svd(x - mean, full_matrices=False)
    kept = (scales > 1e-9 * max(scales[0], 1.0)) & (np.arange(len(scales)) < len(x) - 1)
    scales, axes = scales[kept], axes[kept]
    noise = generator.standard_normal((len(x), len(scales)))
    frame, _ = np.linalg.qr(noise - noise.mean(0))
    y = mean + (frame * scales) @ axes
    covariance = (axes.T * (scales**2 / (len(x) - 1))) @ axes
    found, left, further = flat.clone(), math.inf, np.zeros_like(mean)
    for _ in range(ROUNDS):
        levels = to_uint8(torch.from_numpy(y))
        y = from_uint8(levels).double().numpy()
        centred = y - y.mean(0)
        own = centred.T @ centred / (len(y) - 1)
        change, apart = _optimal_map(own, covariance)
        distance = float(np.square(y.mean(0) - mean).sum()) + apart
        if distance < left:
            found[:, varying], left = levels, distance
        if left <= MATCHED * np.trace(covariance):
            break
        further += mean - y.mean(0)  # what clamping takes away again is aimed beyond
        y = mean + further + centred + BEYOND * (centred @ change - centred)
    return found.view(images.shape), left


def _optimal_map(own: Float64, wanted: Float64) -> tuple[Float64, float]:
    """The symmetric map T of covariance `own` to `wanted`, and their part of the Fréchet distance.

    On directions in which `own` has no variance T is 0, and what is wanted there counts in full.
    """
    values, axes = np.linalg.eigh(own)
    kept = values > 1e-9 * max(values[-1], 0.0)
    roots, axes = np.sqrt(values[kept]), axes[:, kept]
    inner, turn = np.linalg.eigh(np.outer(roots, roots) * (axes.T @ wanted @ axes))
    singular = np.sqrt(inner.clip(min=0.0))
    through = axes / roots @ turn
    distance = float(np.trace(own) + np.trace(wanted) - 2.0 * singular.sum())
    return (through * singular) @ through.T, max(distance, 0.0)


# -- all of them, in order ----------------------------------------------------------------------------------

AGAIN: Final = "real again"
"""Other real images, which are no worse: what is seen of them is the luck of the draw."""

GAUSSIAN: Final = "Gaussian, all"
"""Nothing but Gaussian noise with the mean and covariance of real images drawn again."""

MISSING: Final = "one class missing"


def degradations(num_classes: int) -> Mapping[str, Callable[[Drawn, Tensor, Generator], Tensor]]:
    """Every degradation by its name, the milder of a kind first: of (drawn, moment-matched images, generator).

    Args:
        num_classes: of the data; with one there is none to drop.
    """
    found: dict[str, Callable[[Drawn, Tensor, Generator], Tensor]] = {AGAIN: lambda drawn, gaussian, _: drawn.again}
    for sigma in (0.3, 0.5):
        found[f"blur, {sigma:g} pixels"] = partial(_blur, sigma)
    for deviation in (0.05, 0.1):
        found[f"noise, {deviation:g}"] = partial(_noise, deviation)
    for share in (0.05, 0.2):
        found[f"Gaussian, {share:.0%}"] = partial(_mixed, share)
    found[GAUSSIAN] = lambda drawn, gaussian, _: gaussian
    if num_classes > 1:
        found[MISSING] = lambda drawn, gaussian, _: class_dropped(drawn, num_classes // 2)
        found["classes 2 : 1"] = lambda drawn, gaussian, generator: reweighted(drawn, generator)
    for share in (0.1, 0.3):
        found[f"duplicates, {share:.0%}"] = partial(_duplicates, share)
    for share in (0.05, 0.2):
        found[f"a pixel aside, {share:.0%}"] = partial(_aside, share)
    return found


def _blur(sigma: float, drawn: Drawn, gaussian: Tensor, generator: Generator) -> Tensor:
    return blurred(drawn.plain, sigma)


def _noise(deviation: float, drawn: Drawn, gaussian: Tensor, generator: Generator) -> Tensor:
    return noisy(drawn.plain, deviation, generator)


def _mixed(share: float, drawn: Drawn, gaussian: Tensor, generator: Generator) -> Tensor:
    return with_share_of(drawn.plain, gaussian, share, generator)


def _duplicates(share: float, drawn: Drawn, gaussian: Tensor, generator: Generator) -> Tensor:
    return duplicated(drawn.plain, share, generator)


def _aside(share: float, drawn: Drawn, gaussian: Tensor, generator: Generator) -> Tensor:
    return shifted(drawn.plain, share, generator)
