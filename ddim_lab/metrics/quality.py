"""All that says how good samples are, from one pass over their features."""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.data.images import ImageData
from ddim_lab.metrics.base import Batch, Comparison, Metric
from ddim_lab.metrics.extractor import Extractor, exact_float32
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.references import KEPT_AT_MOST, Level, Reference
from ddim_lab.metrics.statistics import VECTORS, VectorFile, read_vectors
from ddim_lab.store import Store
from ddim_lab.store.records import Value

__all__ = ["Quality"]


@final
class Quality:
    """The metrics that are switched on, streamed: features in, values out.

    Some keep sums. Others need the vectors of the first 50,000 samples: those are spooled to a file, where such a
    metric is on and the reference has vectors, too.

    Args:
        metrics: which metrics.
        features: the extractor.
        network: the same, loaded; its head is used.
        reference: real images.
        num_samples: N.
        scratch: folder for the spooled features.
        store: where what is computed of the reference is kept.
        held_out: what other real images score; so many of the samples are scored beside them.
        device: where it is computed; None for the CPU.
        data: the data set, where `update` is given images; else metrics that need these are left out.
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
        data: ImageData | None = None,
    ) -> None:
        comparison = Comparison(features, network.head, reference, num_samples, held_out, data, store, device)
        chosen = [metric for metric in metrics.chosen if isinstance(metric, Metric)]
        assert len(chosen) == len(metrics.chosen), "a metric that can't be measured was configured"
        self._running = [metric.start(comparison) for metric in chosen if data is not None or not metric.needs_images]
        self._spooled: VectorFile | None = None
        if metrics.needs_vectors and reference.features is not None:
            self._spooled = VectorFile(scratch / VECTORS, (min(num_samples, KEPT_AT_MOST), features.num_features))
        self._num_samples, self._count, self._device = num_samples, 0, device

    @exact_float32()
    @torch.inference_mode()
    def update(self, features: Tensor, start: int, images: Tensor | None = None) -> None:
        """Add features [B, D] of the samples start ... start + B - 1, in their order.

        The images, uint8 [B, C, H, W], are needed where there is `data`.
        """
        batch = Batch(features.to(self._device), torch.arange(start, start + len(features)), images)
        for metric in self._running:
            metric.update(batch)
        if self._spooled is not None:
            self._spooled.add(batch.features)
        self._count += len(features)

    @exact_float32()
    def values(self) -> list[Value]:
        """The values with what they mean nothing without: network, reference, N.

        Raises:
            RuntimeError: other than N samples were added.
        """
        if self._count != self._num_samples:
            raise RuntimeError(f"{self._num_samples} samples were to be measured, {self._count} were given")
        vectors = None if self._spooled is None else read_vectors(self._spooled.path)
        return [value for metric in self._running for value in metric.compute(vectors)]
