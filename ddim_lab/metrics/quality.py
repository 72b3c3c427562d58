"""All that says how good samples are, from one pass over them, in the features of one network or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.data.images import ImageData
from ddim_lab.metrics.base import Batch, Classes, Comparison, Metric, Running, told_apart
from ddim_lab.metrics.extractor import Extractor, exact_float32
from ddim_lab.metrics.features import Features
from ddim_lab.metrics.references import Reference
from ddim_lab.metrics.statistics import VECTORS, VectorFile, read_vectors
from ddim_lab.store import Store
from ddim_lab.store.records import Tabled, Value

__all__ = ["Quality", "Seen"]


@final
@dataclass(frozen=True)
class Seen:
    """Real images as one feature network sees them, for samples to be compared with.

    Attributes:
        name: the network's, among the options of metrics.features.
        features: the network.
        network: the same, loaded, on the device of the samples' features.
        reference: what samples are compared with.
        held_out: what is compared with it beside them; None where there is nothing.
    """

    name: str
    features: Features
    network: Extractor
    reference: Reference
    held_out: Reference | None


@final
class Quality:
    """The metrics that are switched on, streamed: features in, values out.

    The vectors of all samples are spooled to files: errors are taken from what each sample adds.

    Args:
        metrics: which metrics.
        seen: what the samples are compared with, by each feature network; the values of the first have plain names.
        num_samples: N.
        scratch: folder for the spooled features.
        store: where what is computed of the references is kept.
        device: where it is computed; None for the CPU.
        data: the data set, where `update` is given images; else metrics that need these are left out. They look at the
            images once, whatever the number of networks.
    """

    def __init__(
        self,
        metrics: MetricsConfig,
        seen: Sequence[Seen],
        num_samples: int,
        scratch: Path,
        store: Store,
        device: torch.device | None = None,
        data: ImageData | None = None,
    ) -> None:
        self._teller = next((each for each in seen if each.features.tells_classes), None)
        with torch.inference_mode(), exact_float32():
            classes = None if self._teller is None else _classes(self._teller, device)
        self._sees = {each.name: each.features.sees for each in seen}
        self._running: dict[str, list[Running]] = {}
        self._spooled: dict[str, VectorFile] = {}
        for each in seen:
            images = data if each is seen[0] else None
            comparison = Comparison(
                each.features,
                each.network.head,
                each.reference,
                num_samples,
                each.held_out,
                classes,
                images,
                store,
                device,
            )
            chosen = [metric for metric in metrics.chosen_in(each.name) if isinstance(metric, Metric)]
            assert len(chosen) == len(metrics.chosen_in(each.name)), "a metric that can't be measured was configured"
            self._running[each.name] = [
                metric.start(comparison) for metric in chosen if images is not None or not metric.needs_images
            ]
            folder = scratch / each.name
            folder.mkdir(exist_ok=True)
            self._spooled[each.name] = VectorFile(folder / VECTORS, (num_samples, each.features.num_features))
        self._num_samples, self._count, self._device = num_samples, 0, device

    @exact_float32()
    @torch.inference_mode()
    def update(self, features: Sequence[Tensor], images: Tensor | None = None) -> None:
        """Add the samples that follow those before.

        Args:
            features: [B, D] by each network.
            images: uint8 [B, C, H, W], needed where there is `data`.
        """
        by_network = dict(zip(self._running, features, strict=True))
        count = len(features[0])
        indices = torch.arange(self._count, self._count + count)
        classes = None
        if self._teller is not None:
            classes = _logits(self._teller.network, by_network[self._teller.name].to(self._device)).argmax(1)
        for name, found in by_network.items():
            batch = Batch(found.to(self._device), indices, images, classes)
            for metric in self._running[name]:
                metric.update(batch)
            self._spooled[name].add(batch.features)
        self._count += count

    @exact_float32()
    def values(self) -> dict[str, list[Value]]:
        """The values by the network's name, told apart as one cell may have them, with what they mean nothing without.

        Raises:
            RuntimeError: other than N samples were added.
        """
        if self._count != self._num_samples:
            raise RuntimeError(f"{self._num_samples} samples were to be measured, {self._count} were given")
        found: dict[str, list[Value]] = {}
        for name, running in self._running.items():
            vectors = read_vectors(self._spooled[name].path)
            found[name] = [value for metric in running for value in metric.compute(vectors)]
        return told_apart(found, self._sees)

    def tables(self) -> list[Tabled]:
        """What is shown beside the values, once they are computed."""
        return [table for running in self._running.values() for metric in running for table in metric.tables()]


def _classes(seen: Seen, device: torch.device | None) -> Classes:
    """The data set's classes, and their shares among the reference's images where these are known."""
    if seen.reference.features is None:
        return Classes(seen.features.sees, None)
    vectors = torch.from_numpy(seen.reference.features.copy())
    logits = torch.cat([_logits(seen.network, part.to(device)) for part in torch.split(vectors, 4096)])
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double()
    return Classes(seen.features.sees, counts / counts.sum())


def _logits(network: Extractor, features: Tensor) -> Tensor:
    """Of each image, [B, K] on the CPU."""
    assert network.head is not None
    logits: Tensor = network.head(features).cpu()
    return logits
