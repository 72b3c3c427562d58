"""All that says how good samples are, from one pass over their features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

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

__all__ = ["Quality", "as_measurements"]


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

    def compute(self) -> dict[str, Any]:
        """The values as a result's `quality`; None for what could not be measured, `not_measured` says why."""
        return as_measurements(self.values())


# -- as result.json has them so far ----------------------------------------------------------------------

ENTRIES: Final = {
    "kid": "kid",
    "inception_score": "inception_score",
    "improved_precision": "precision",
    "improved_recall": "recall",
}
"""Value -> its entry of a result's `quality`."""

NEAREST: Final = ("samples_to_train", "samples_to_held_out", "held_out_to_train")


def as_measurements(values: Sequence[Value]) -> dict[str, Any]:
    """Values as the `quality` of a result.json of schema 1; those that it has no entry for are listed as they are."""
    found = {value.name: value for value in values}
    fd = found.pop("fd")
    equal, held_out = found.pop("fd_at_equal_n", None), found.pop("fd_held_out_at_equal_n", None)
    quality: dict[str, Any] = {
        "fd": fd.value,
        "fd_se": fd.se,
        "name": fd.comparable["metric"],
        **{name: fd.comparable[name] for name in ("features", "reference", "reference_key", "num_samples")},
        "leave_one_out": list(fd.replicates or ()),
        "equal_n": None,
    }
    if equal is not None and held_out is not None:
        quality["equal_n"] = {
            "num_samples": equal.count,
            "fd_samples": equal.value,
            "fd_held_out": held_out.value,
            "fd_held_out_se": held_out.se,
        }
    not_measured = {}
    for name, entry in ENTRIES.items():
        if (value := found.pop(name, None)) is None:
            continue
        quality[entry] = value.value
        if name in ("kid", "inception_score"):
            quality[f"{name}_spread"] = value.spread
        if name == "kid":
            quality |= {f"kid_{part}": value.comparable.get(part) for part in ("subsets", "subset_size")}
        if value.why_not is not None:
            not_measured[entry] = value.why_not
    quality["not_measured"] = not_measured
    nearest = {entry: value for entry in NEAREST if (value := found.pop(f"nearest_{entry}", None)) is not None}
    if nearest:
        numbers = {entry: value.value for entry, value in nearest.items()}
        quality["nearest"] = None if None in numbers.values() else numbers
    if found:
        quality["values"] = [value.model_dump(mode="json") for value in found.values()]
    return quality
