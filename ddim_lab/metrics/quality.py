"""All that says how good samples are, from one pass over their features."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ddim_lab.config.job import MetricsConfig
from ddim_lab.metrics.estimates import jackknife_se
from ddim_lab.metrics.extractor import Extractor, exact_float32
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.frechet import FrechetDistance
from ddim_lab.metrics.inception_score import InceptionScore
from ddim_lab.metrics.kernel import kernel_distance
from ddim_lab.metrics.precision_recall import precision_recall, squared_radii
from ddim_lab.metrics.references import KEPT_AT_MOST, Level, Reference
from ddim_lab.metrics.statistics import VECTORS, FeatureSums, VectorFile, read_vectors
from ddim_lab.store import Store, content_key

__all__ = ["Quality"]


@final
class Quality:
    """Measures of samples against a reference, streamed: features in, a result's `quality` out.

    The Fréchet distance and the Inception Score keep sums. Kernel distance, precision and recall need the vectors of
    the first 50,000 samples: they are spooled to a file, where they are asked for.

    Args:
        metrics: which measures.
        features: the extractor.
        network: the same, loaded; its head is used.
        reference: real images.
        num_samples: N.
        scratch: folder for the spooled features.
        store: where the reference's radii (`squared_radii`) are kept.
        held_out: what other real images score; so many of the samples are scored beside them.
        device: where it is computed; None for the CPU.
    """

    def __init__(
        self,
        metrics: MetricsConfig,
        features: Features,
        network: Extractor,
        reference: Reference,
        num_samples: int,
        scratch: Path,
        store: Store,
        held_out: Level | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._metrics, self._features, self._reference, self._store = metrics, features, reference, store
        self._held_out, self._device = held_out, device
        self._distance = FrechetDistance(reference.moments).to(device)
        self._equal_n = 0 if held_out is None else held_out.num_images
        self._first: FeatureSums | None = None
        self._head = network.head
        self._score = InceptionScore(metrics.inception_score_splits)
        self._spooled: VectorFile | None = None
        if (metrics.kid or metrics.precision_recall) and reference.features is not None:
            self._spooled = VectorFile(scratch / VECTORS, (min(num_samples, KEPT_AT_MOST), features.num_features))
        self._num_samples = num_samples

    @exact_float32()
    @torch.inference_mode()
    def update(self, features: Tensor, start: int) -> None:
        """Add features [B, D] of the samples start ... start + B - 1; in their order."""
        indices = torch.arange(start, start + len(features))
        features = features.to(self._device)
        self._distance.update(features, indices)
        if start < self._equal_n:
            first = FeatureSums.of([features[: self._equal_n - start]])
            self._first = first if self._first is None else self._first + first
        if self._metrics.inception_score and self._head is not None:
            self._score.update(self._head(features), indices)
        if self._spooled is not None:
            self._spooled.add(features)

    @exact_float32()
    def compute(self) -> dict[str, Any]:
        """The values with what they mean nothing without: network, reference, N. None for what could not be measured,
        with the reason in `not_measured`.

        Raises:
            RuntimeError: other than N samples were added.
        """
        distance, metrics = self._distance, self._metrics
        if distance.num_samples != self._num_samples:
            raise RuntimeError(f"{self._num_samples} samples were to be measured, {distance.num_samples} were given")
        replicates = distance.leave_one_out()
        equal = None
        if self._held_out is not None and self._first is not None and self._first.count == self._equal_n:
            equal = {
                "num_samples": self._equal_n,
                "fd_samples": FrechetDistance.between(self._reference.moments, self._first),
                "fd_held_out": self._held_out.fd,
                "fd_held_out_se": self._held_out.fd_se,
            }
        not_measured: dict[str, str] = {}
        return {
            "fd": float(distance.compute()),
            "fd_se": jackknife_se(replicates) if len(replicates) > 1 else None,
            "name": self._features.name,
            "features": self._features.digest,
            "reference": self._reference.name,
            "reference_key": self._reference.key,
            "num_samples": distance.num_samples,
            "leave_one_out": replicates,
            "equal_n": equal,
            **(self._kernel(not_measured) if metrics.kid else {}),
            **(self._inception_score(not_measured) if metrics.inception_score else {}),
            **(self._precision_recall(not_measured) if metrics.precision_recall else {}),
            "not_measured": not_measured,
        }

    def _kernel(self, not_measured: dict[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = dict.fromkeys(("kid", "kid_spread", "kid_subsets", "kid_subset_size"))
        if self._spooled is None or self._reference.features is None:
            not_measured["kid"] = NO_IMAGES
            return values
        asked = self._metrics.kid_subsets, self._metrics.kid_subset_size
        found = kernel_distance(read_vectors(self._spooled.path), self._reference.features, *asked, self._device)
        return dict(zip(values, (found.value, found.spread, found.subsets, found.subset_size), strict=True))

    def _inception_score(self, not_measured: dict[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = dict.fromkeys(("inception_score", "inception_score_spread"))
        if self._head is None:
            not_measured["inception_score"] = f"{self._features.name}: the network knows no classes"
            return values
        try:
            return dict(zip(values, self._score.compute(), strict=True))
        except ValueError as error:
            not_measured["inception_score"] = str(error)
            return values

    def _precision_recall(self, not_measured: dict[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = dict.fromkeys(("precision", "recall"))
        if self._spooled is None or self._reference.features is None:
            not_measured["precision"] = not_measured["recall"] = NO_IMAGES
            return values
        k = self._metrics.neighbours
        vectors = read_vectors(self._spooled.path)
        if min(len(vectors), len(self._reference.features)) <= k:
            not_measured["precision"] = not_measured["recall"] = f"{k} neighbours need more than {k} images"
            return values
        found = precision_recall(vectors, self._reference.features, k, self._radii(), self._device)
        return dict(zip(values, found, strict=True))

    def _radii(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The reference's radii, which are the same for every cell: from the store, or computed."""
        vectors, k = self._reference.features, self._metrics.neighbours
        assert vectors is not None

        def build(folder: Path) -> None:
            np.save(folder / "radii.npy", squared_radii(vectors, k, self._device))

        key = content_key({"reference": self._reference.key, "kept": len(vectors), "neighbours": k})
        folder, _ = self._store.obtain("references", key, build)
        radii: np.ndarray[Any, np.dtype[np.float32]] = np.load(
            io.BytesIO((folder / "radii.npy").read_bytes()), allow_pickle=False
        )
        return radii


NO_IMAGES = "the reference is a mean and a covariance: the features of its images are not known"
