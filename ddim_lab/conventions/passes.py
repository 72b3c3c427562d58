"""Passes over images: features of samples, statistics of references, each taken once and kept by content; distances."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.console import Progress
from ddim_lab.conventions.pixels import CODEC, Changed, First, Mirrored, as_levels, jpeg
from ddim_lab.conventions.protocol import Count, Levels, Protocol
from ddim_lab.conventions.source import Source
from ddim_lab.data.images import ImageData, ImageSet
from ddim_lab.data.samples import Samples
from ddim_lab.metrics.estimates import Estimate
from ddim_lab.metrics.extractor import Extractor, exact_float32
from ddim_lab.metrics.features import Features, Variant
from ddim_lab.metrics.frechet import FrechetDistance, Strata
from ddim_lab.metrics.references import Reference, obtain_reference, obtain_statistics, read_moments, stored_as
from ddim_lab.metrics.statistics import VECTORS, Moments, VectorFile, read_vectors
from ddim_lab.store import Store, content_key

__all__ = ["BEFORE_ROUNDING", "Cost", "Pass", "Passes", "Real", "counted"]

VERSION: Final = 1
"""Raised whenever the same pass would give other features."""

BATCH: Final = 256
"""Samples that are seen at once: as `ddim_lab.score` does, whose features they are to the last digit."""

WHOLE_BATCHES: Final = 64

BEFORE_ROUNDING: Final[tuple[Levels, ...]] = ("float", "truncated")
"""Levels for which samples are looked at as they were before they were rounded, where a source has these."""

HELD: Final = 6
"""References whose covariance and its root are in memory, at most: each takes 64 MB for Inception's 2,048 features."""

LONG_ENOUGH: Final = 1.0
"""Seconds that a timed batch of images takes, or it is as large as a batch gets."""

TELLER: Final = "teller"
"""What the network that tells classes is called among the variants."""

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def counted(count: Count | None, total: int) -> int:
    """How many of `total` images a protocol takes."""
    if count is None:
        return total
    if count == "half":
        return max(2, total // 2)
    if count == "whole_batches":
        return total // WHOLE_BATCHES * WHOLE_BATCHES
    return min(count, total)


@final
@dataclass(frozen=True)
class Real:
    """The real images that samples are compared with.

    Attributes:
        data: the data set.
        split: of it, as conf/metrics names it.
        samples: images of the user's instead; None for the data set's.
        statistics: file of a mean and a covariance instead; None where there is none.
        option: what named that file, for messages.
        keep: whether what is kept of the data set's images are their features, too, as for other metrics.
    """

    data: ImageData
    split: Literal["train", "held_out", "all"]
    samples: Samples | None
    statistics: Path | None
    option: str
    keep: bool

    @property
    def kind(self) -> str:
        """As `ddim_lab.conventions.factors.Subject.reference`."""
        return "statistics" if self.statistics is not None else "images" if self.samples is not None else "split"

    def images(self, protocol: Protocol) -> tuple[ImageSet, str, str]:
        """The images of the reference as they are, those that it takes first; what they are called, their identity."""
        if self.samples is not None:
            images, name, identity = self.samples.images, self.samples.name, self.samples.digest
        else:
            split = protocol.split or self.split
            images, name = self.data.split(split), f"{self.data.name} {split}"
            identity = f"{self.data.digest} {split}"
        return images, name, identity


@final
@dataclass(frozen=True)
class Pass:
    """One pass that is still to be made.

    Attributes:
        key: identifies it.
        images: how many are looked at.
        variant: of the feature network.
        levels, quality: what becomes of them before.
    """

    key: str
    images: int
    variant: str
    levels: Levels
    quality: int | None


@final
@dataclass(frozen=True)
class Cost:
    """What remains to be done for protocols.

    Attributes:
        forwards: image-forwards of the model.
        passes: over images.
        distances: that are computed.
        seconds: all of it, as measured.
    """

    forwards: int
    passes: tuple[Pass, ...]
    distances: int
    seconds: float


@final
class Passes:
    """Takes distances by protocols, and makes each pass that they need once.

    Args:
        features: the feature network as the field takes it.
        variants: others of it.
        teller: a network that tells the classes of the data set; None where none does.
        real: what samples are compared with.
        store: where passes are kept.
        device: where networks and distances are computed.
    """

    def __init__(
        self,
        features: Features,
        variants: Sequence[Variant],
        teller: Features | None,
        real: Real,
        store: Store,
        device: torch.device,
    ) -> None:
        self._features: Final = features
        self._variants: Final = {variant.name: variant for variant in variants}
        self._teller, self._real, self._store, self._device = teller, real, store, device
        self._of: dict[str, Features] = {"": features}
        self._loaded: dict[str, Extractor] = {}
        self._distances: OrderedDict[tuple[str, str], FrechetDistance] = OrderedDict()
        self._seconds: dict[Any, float] = {}

    def by(self, variant: str) -> Features:
        """The network of a variant.

        Raises:
            ConfigError: its weights are missing or damaged.
        """
        if variant not in self._of:
            self._of[variant] = self._variants[variant].features()
        return self._of[variant]

    @property
    def takes_levels(self) -> bool:
        """Whether the network looks at images before they were rounded, too."""
        return self._network("").takes_levels

    def forwards(self, source: Source, protocol: Protocol) -> int:
        """Image-forwards that the samples of a protocol still need."""
        return source.forwards(protocol.made, levels=_before_rounding(source, protocol))

    # -- distances ----------------------------------------------------------------------------------------

    @exact_float32()
    def estimate(self, source: Source, protocol: Protocol, count: int) -> Estimate:
        """The distance of the first `count` samples of a source, with its error.

        Raises:
            ValueError: it can't be taken so; says why.
            ConfigError: as `by`.
            NonFiniteError: as `Source.images`.
        """
        taken = counted(protocol.count, count)
        reference = self.reference(protocol)
        vectors = self.vectors(source, protocol)[:taken]
        distance = self._distance(reference, protocol)
        strata = self._strata(source, protocol, taken) if protocol.classes else None
        found = distance.of(vectors, strata)
        if protocol.infinite:
            if strata is not None:
                raise ValueError("an extrapolation of weighted samples is not known")
            found = distance.extrapolated(vectors, found)
        return found

    def _distance(self, reference: Reference, protocol: Protocol) -> FrechetDistance:
        key = reference.key, protocol.divisor
        if key not in self._distances:
            moments = reference.moments
            if protocol.divisor == "n":
                if moments.count is None:
                    raise ValueError("of how many images the reference is, is not known")
                scale = (moments.count - 1) / moments.count
                moments = Moments(moments.mean, moments.covariance * scale, moments.count)
            self._distances[key] = FrechetDistance(moments, self._device, protocol.divisor)
            if len(self._distances) > HELD:
                self._distances.popitem(last=False)
        self._distances.move_to_end(key)
        return self._distances[key]

    def _strata(self, source: Source, protocol: Protocol, count: int) -> Strata:
        """The classes of the first samples, and their shares of the reference."""
        assert self._teller is not None
        plain = Protocol(made=protocol.made)
        classes = self._classes(torch.from_numpy(np.array(self._vectors_by(self._teller, TELLER, source, plain))))
        images, name, identity = self._real.images(protocol)
        taken = counted(protocol.reference_count, len(images))
        key = content_key({"features": self._teller.digest, "images": identity, "count": taken})
        if self._real.samples is None:
            real = obtain_reference(
                *(self._teller, self._real.data, protocol.split or self._real.split, self._store),
                count=taken,
                keep_features=True,
                device=self._device,
            )
        else:
            real = obtain_statistics(
                *(self._teller, images, name, key, self._store), count=taken, keep_features=True, device=self._device
            )
        assert real.features is not None
        found = self._classes(torch.from_numpy(np.array(real.features)))
        shares = torch.bincount(found).double()
        return Strata(classes[:count], shares / shares.sum())

    def _classes(self, vectors: Tensor) -> Tensor:
        network = self._network(TELLER)
        assert network.head is not None
        with torch.inference_mode(), exact_float32():
            parts = [network.head(part.to(self._device)).argmax(1).cpu() for part in torch.split(vectors, 4096)]
        return torch.cat(parts)

    # -- passes -------------------------------------------------------------------------------------------

    def vectors(self, source: Source, protocol: Protocol) -> Vectors:
        """Features [N, D] of the samples by a protocol; memory-mapped."""
        return self._vectors_by(self.by(protocol.network), protocol.network, source, protocol)

    def _vectors_by(self, features: Features, variant: str, source: Source, protocol: Protocol) -> Vectors:
        key = self._samples_key(features, source, protocol)

        def build(folder: Path) -> None:
            network = self._network(variant)
            if protocol.levels == "float" and not network.takes_levels:
                raise ValueError("this resize takes images of 8 bits alone")
            images = self._samples(source, protocol)
            file = VectorFile(folder / VECTORS, (source.count, features.num_features))
            with torch.inference_mode(), Progress(f"features of {source.name}", source.count, "image") as progress:
                for part in images.batches(BATCH, source.count):
                    file.add(network(part.to(self._device)))
                    progress.update(len(part))

        folder, _ = self._store.obtain("references", key, build)
        return read_vectors(folder / VECTORS)

    def _samples(self, source: Source, protocol: Protocol) -> ImageSet:
        images = source.images(protocol.made, levels=_before_rounding(source, protocol))
        return _changed(images, protocol.levels, protocol.jpeg)

    def _samples_key(self, features: Features, source: Source, protocol: Protocol) -> str:
        return content_key(
            {
                "pass": VERSION,
                "features": features.digest,
                "samples": source.key(protocol.made, levels=_before_rounding(source, protocol)),
                "count": source.count,
                **_said(protocol.levels, protocol.jpeg),
            }
        )

    def reference(self, protocol: Protocol) -> Reference:
        """Statistics of the reference by a protocol; those that `ddim_lab.score` takes where nothing is changed."""
        variant = protocol.network if protocol.reference_network is None else protocol.reference_network
        features = self.by(variant)
        if self._real.statistics is not None:
            assert variant == ""
            return read_moments(self._real.statistics, features, self._real.option)
        images, name, identity = self._real.images(protocol)
        taken = counted(protocol.reference_count, len(images))
        changes = self._reference_changes(protocol)
        whole = not changes and variant == "" and protocol.split is None and taken == len(images)
        if self._real.samples is None and not changes:
            return obtain_reference(
                *(features, self._real.data, protocol.split or self._real.split, self._store),
                count=taken,
                keep_features=self._real.keep and whole,
                device=self._device,
            )
        key = self._reference_key(features, protocol, identity, taken, changes, len(images))
        shown = self._real_images(protocol, images, taken)
        said = f"{name}, n={taken}{', changed' if changes else ''}"
        return obtain_statistics(
            *(features, shown, said, key, self._store), count=len(shown), keep_features=False, device=self._device
        )

    @staticmethod
    def _reference_changes(protocol: Protocol) -> dict[str, Any]:
        said = _said(protocol.reference_levels, protocol.reference_jpeg)
        return {**said, **({"flips": True} if protocol.flips else {})}

    @staticmethod
    def _real_images(protocol: Protocol, images: ImageSet, taken: int) -> ImageSet:
        shown: ImageSet = First(images, taken)
        if protocol.flips:
            shown = Mirrored(shown)
        return _changed(shown, protocol.reference_levels, protocol.reference_jpeg)

    def _network(self, variant: str) -> Extractor:
        if variant not in self._loaded:
            features = self._teller if variant == TELLER else self.by(variant)
            assert features is not None
            self._loaded[variant] = features.load().to(self._device)
        return self._loaded[variant]

    # -- what it costs ------------------------------------------------------------------------------------

    def cost(self, asked: Sequence[tuple[Source, Protocol, int]]) -> Cost:
        """What these distances still need, each pass and each set of samples once."""
        passes: dict[str, Pass] = {}
        made: dict[str, int] = {}
        seconds = 0.0
        for source, protocol, count in asked:
            for needed in self._needed(source, protocol):
                if needed.key not in passes and not self._store.path("references", needed.key).is_dir():
                    passes[needed.key] = needed
            levels = _before_rounding(source, protocol)
            key = source.key(protocol.made, levels=levels)
            if key not in made:
                made[key] = source.forwards(protocol.made, levels=levels)
                seconds += made[key] * source.forward_seconds() if made[key] else 0.0
            seconds += self._distance_seconds(protocol, counted(protocol.count, count))
        for one in passes.values():
            seconds += one.images * self._image_seconds(one, asked[0][0])
        return Cost(sum(made.values()), tuple(passes.values()), len(asked), seconds)

    def _needed(self, source: Source, protocol: Protocol) -> Iterator[Pass]:
        """The passes of a distance, made or not."""
        features = self.by(protocol.network)
        key = self._samples_key(features, source, protocol)
        yield Pass(key, source.count, protocol.network, protocol.levels, protocol.jpeg)
        if protocol.classes and self._teller is not None:
            key = self._samples_key(self._teller, source, Protocol(made=protocol.made))
            yield Pass(key, source.count, TELLER, "rounded", None)
        if self._real.statistics is not None:
            return
        variant = protocol.network if protocol.reference_network is None else protocol.reference_network
        images, _, identity = self._real.images(protocol)
        taken = counted(protocol.reference_count, len(images))
        changes = self._reference_changes(protocol)
        key = self._reference_key(self.by(variant), protocol, identity, taken, changes, len(images))
        seen = taken * (2 if protocol.flips else 1)
        yield Pass(key, seen, variant, protocol.reference_levels, protocol.reference_jpeg)

    def _reference_key(
        self, features: Features, protocol: Protocol, identity: str, taken: int, changes: Mapping[str, Any], total: int
    ) -> str:
        """The store's name of the object that `reference` obtains."""
        if changes:
            return content_key(
                {"pass": VERSION, "features": features.digest, "reference": identity, "count": taken, **changes}
            )
        if self._real.samples is not None:
            return content_key({"features": features.digest, "samples": identity, "count": taken})
        split = protocol.split or self._real.split
        whole = features is self._features and protocol.split is None and taken == total
        return stored_as(features, self._real.data, split, taken, keep_features=self._real.keep and whole)

    def _image_seconds(self, one: Pass, source: Source) -> float:
        """Seconds that an image of a pass takes, measured on the first of the reference or, without any, of noise."""
        what = one.variant, one.levels, one.quality
        if what not in self._seconds:
            self._seconds[what] = self._seconds_of_network(one.variant, source)
            if one.levels != "rounded" or one.quality is not None:
                images = self._examples(source, 64)
                indices = torch.arange(len(images))
                clock = time.perf_counter()
                changed = as_levels(images, "rounded" if one.levels == "float" else one.levels, indices)
                if one.quality is not None:
                    jpeg(changed, one.quality)
                self._seconds[what] += (time.perf_counter() - clock) / len(images)
        return self._seconds[what]

    def _seconds_of_network(self, variant: str, source: Source) -> float:
        if (variant,) in self._seconds:
            return self._seconds[variant,]
        network, count = self._network(variant), 8
        with torch.inference_mode():
            while True:
                images = self._examples(source, count)
                network(images[:1].to(self._device))  # chooses the kernels
                clock = time.perf_counter()
                network(images.to(self._device)).cpu()
                seconds = time.perf_counter() - clock
                if seconds >= LONG_ENOUGH or count >= BATCH:
                    break
                count *= 2
        self._seconds[variant,] = seconds / count
        return self._seconds[variant,]

    def _examples(self, source: Source, count: int) -> Tensor:
        """Images to time with: noise of 8 bits, which JPEG takes longest for."""
        channels, height, width = source.shape
        return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)

    def _distance_seconds(self, protocol: Protocol, count: int) -> float:
        """Seconds of a distance: a part that does not depend on N, and one that grows with it, both measured."""
        if "distance" not in self._seconds:
            few, many = (self._time_distance(n) for n in (512, 2048))
            self._seconds["sample"] = max(0.0, (many - few) / 1536)
            self._seconds["distance"] = max(0.0, few - 512 * self._seconds["sample"])
        fixed, each = self._seconds["distance"], self._seconds["sample"]
        size = self._features.num_features
        parts = sum(range(1, 1 + min(4, count // (10 * size)))) if protocol.infinite else 1
        return fixed * max(1, parts) + each * count * (4 if protocol.infinite else 1)

    def _time_distance(self, count: int) -> float:
        size = self._features.num_features
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(count, size, generator=generator)
        moments = Moments(torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64), count)
        distance = FrechetDistance(moments, self._device)
        if size < 512:
            distance.of(vectors)  # imports, and warms up
        clock = time.perf_counter()
        distance.of(vectors)
        return time.perf_counter() - clock


def _before_rounding(source: Source, protocol: Protocol) -> bool:
    """Whether a protocol looks at samples before they were rounded, where a source has these."""
    return source.keeps_levels and protocol.levels in BEFORE_ROUNDING


def _said(levels: Levels, quality: int | None) -> dict[str, Any]:
    """The part of a pass's key that says what became of the images; empty where they are as they are."""
    coded = {} if quality is None else {"jpeg": [quality, CODEC]}
    return {**({} if levels == "rounded" else {"levels": levels}), **coded}


def _changed(images: ImageSet, levels: Levels, quality: int | None) -> ImageSet:
    if not _said(levels, quality):
        return images

    def change(batch: Tensor, indices: Tensor) -> Tensor:
        found = as_levels(batch, levels, indices)
        return found if quality is None else jpeg(found, quality)

    return Changed(images, change, repr(_said(levels, quality)))
