"""What a metric of samples is: one class a file in `ddim_lab.metrics.of_samples`, found by its name."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, final

from ddim_lab.config.metrics import MetricOptions
from ddim_lab.metrics.estimates import Estimate
from ddim_lab.metrics.features import Features
from ddim_lab.store import Store, content_key, read_json, write_json
from ddim_lab.store.records import Tabled, Value

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from ddim_lab.data.images import ImageData
    from ddim_lab.metrics.references import Reference

    Vectors = np.ndarray[Any, np.dtype[np.float32]]

__all__ = [
    "BESIDE",
    "BY_INFLUENCE",
    "JACKKNIFE",
    "NO_IMAGES",
    "Batch",
    "Classes",
    "Comparison",
    "Metric",
    "Running",
    "in_short",
    "told_apart",
]

JACKKNIFE: Final = "by the delete-a-group jackknife over groups of samples"

BY_INFLUENCE: Final = "by the influence of each sample, to second order"
"""How the errors of distances are taken: `ddim_lab.metrics.influence`."""

BESIDE: Final = "Beside the Fréchet distance"
"""The table of what else is measured on the same features."""

NO_IMAGES: Final = "the reference is a mean and a covariance: the features of its images are not known"


@final
@dataclass(frozen=True)
class Comparison:
    """What samples are compared with, and as what network sees them.

    Attributes:
        features: the network.
        head: features [B, D] -> logits [B, K] of its classes, on `device`; None where it knows none.
        reference: real images.
        num_samples: N, how many samples there will be.
        held_out: other real images, to be compared with the reference as the samples are: as many, or as many as there
            are. None where there are none that the reference leaves out.
        classes: the classes of the data set, as a network at hand tells them; None where none does.
        data: the data set; None where the samples' images are not given.
        store: where what is computed of the reference is kept.
        device: where features come to and values are computed; None for the CPU.
    """

    features: Features
    head: nn.Module | None
    reference: Reference
    num_samples: int
    held_out: Reference | None
    classes: Classes | None
    data: ImageData | None
    store: Store
    device: torch.device | None

    @property
    def facts(self) -> str:
        """Network (a digest as its first 12 digits) and reference, to stand beside every value."""
        digest = self.features.digest
        features = digest[:12] if re.fullmatch(r"[0-9a-f]{32,}", digest) else digest
        return f"features: {features} · reference: {self.reference.name}"

    def comparable(self, **more: str | int | None) -> dict[str, str | int | None]:
        """`Value.comparable` of what is measured here, and what else a value depends on."""
        return {
            "name": self.features.name,
            "features": self.features.digest,
            "reference": self.reference.name,
            "reference_key": self.reference.key,
            "num_samples": self.num_samples,
            **more,
        }

    def of_held_out(self, what: str, compute: Callable[[Vectors], Estimate]) -> Estimate | None:
        """A statistic of the held-out images, which is the same for every cell: from the store, or computed.

        Args:
            what: names the statistic, with all its options.
            compute: of feature vectors [n, D].

        Returns:
            None where there are no held-out images.
        """
        if self.held_out is None or self.held_out.features is None:
            return None
        images = self.held_out.features

        def build(folder: Path) -> None:
            write_json(folder / "estimate.json", asdict(compute(images)))

        key = content_key({"level": what, "images": self.held_out.key, "reference": self.reference.key})
        folder, _ = self.store.obtain("references", key, build)
        kept = read_json(folder / "estimate.json")
        return Estimate(kept["value"], tuple(kept["replicates"]), tuple(kept["interactions"]))

    def radii(self, neighbours: int) -> Vectors:
        """Squared distance of each image of the reference to its k-th nearest other one: float32 [M].

        The same for every cell: from the store, or computed. The reference must have features, of more than k images.
        """
        from ddim_lab.metrics.distances import squared_radii

        reference = self.reference.features
        assert reference is not None
        what: dict[str, str | int] = {"reference": self.reference.key, "kept": len(reference), "neighbours": neighbours}
        return self._kept("radii.npy", what, lambda: squared_radii(reference, neighbours, self.device))

    def held_out_to_reference(self) -> Vectors:
        """Squared distance of each held-out image to the nearest of the reference: float32 [n].

        The same for every cell: from the store, or computed. Both must have features.
        """
        from ddim_lab.metrics.distances import squared_nearest

        reference = self.reference.features
        assert reference is not None
        assert self.held_out is not None
        images = self.held_out.features
        assert images is not None
        what: dict[str, str | int] = {
            "reference": self.reference.key,
            "kept": len(reference),
            "nearest_to": self.held_out.key,
        }
        return self._kept("nearest.npy", what, lambda: squared_nearest(images, reference, self.device))

    def _kept(self, file: str, what: Mapping[str, str | int], compute: Callable[[], Vectors]) -> Vectors:
        """An array that all cells share: from the store, or computed; `what` names it."""
        import numpy as np

        folder, _ = self.store.obtain("references", content_key(what), lambda fresh: np.save(fresh / file, compute()))
        found: Vectors = np.load(io.BytesIO((folder / file).read_bytes()), allow_pickle=False)
        return found


@final
@dataclass(frozen=True)
class Classes:
    """The classes of a data set, as a classifier trained on its labels tells them.

    Attributes:
        by: the classifier, as "digits classifier".
        shares: of each class among the reference's images, float64 [K]; None where these are not known.
    """

    by: str
    shares: Tensor | None


@final
@dataclass(frozen=True)
class Batch:
    """Samples that follow those of the batch before.

    Attributes:
        features: [B, D], on the device of the comparison.
        indices: int64 [B], the samples' names.
        images: uint8 [B, C, H, W] on the CPU; None where the comparison has no `data`.
        classes: of each sample, int64 [B] on the CPU; None where the comparison has no `classes`.
    """

    features: Tensor
    indices: Tensor
    images: Tensor | None
    classes: Tensor | None = None


class Running(ABC):
    """A metric at work on the samples of one cell; abstract."""

    def update(self, batch: Batch) -> None:  # noqa: B027 (a metric of the vectors alone has nothing to do)
        """Take in a batch of samples. They come in order, without gradients, in exact float32."""

    @abstractmethod
    def compute(self, vectors: Vectors) -> Sequence[Value]:
        """The values of all samples.

        Args:
            vectors: features [N, D] of the samples, float32, memory-mapped.
        """

    def tables(self) -> Sequence[Tabled]:
        """What is to be shown beside the values, once they are computed."""
        return ()


class Metric(MetricOptions):
    """Something that is measured of samples; abstract. The file of_samples/NAME.py has the metric NAME.

    Its fields are its options; they stand in conf/metrics beside all others, so their names begin with its own. An
    installed package brings more through entry points of the group ddim_lab.metrics: such a metric is there where its
    switch, an option of its name, is given. Torch is imported inside its methods: a command line is checked without it.

    Attributes:
        needs_images: whether it looks at the images, and is left out where these are not given.
    """

    needs_images: ClassVar[bool] = False

    @abstractmethod
    def start(self, comparison: Comparison) -> Running:
        """The metric at work."""


def told_apart(values: Mapping[str, Sequence[Value]], sees: Mapping[str, str]) -> dict[str, list[Value]]:
    """The values of one feature network or several as one cell may have them: told apart by their names and tables.

    Those of the first network keep their names; those of any other carry its own at the end, as `fd_classifier`.
    A value with a heading and a column has a table of its own where its network is the first, or where it is its
    network's first value; else it is a column of that network's other values, which stand beside the first.

    Args:
        values: by the network's name.
        sees: what each network is called in headings: `Features.sees`.
    """
    first = next(iter(values), None)
    told: dict[str, list[Value]] = {}
    for network, found in values.items():
        leads = network == first
        shown = [_shown_once(value, own_table=leads or value is found[0]) for value in found]
        suffix = "" if leads else _suffix(network)
        told[network] = shown if len(values) < 2 else [_of(value, found[0], sees[network], suffix) for value in shown]
    return told


def _shown_once(value: Value, *, own_table: bool) -> Value:
    """A value with a heading and a column, under one of them."""
    if not (value.heading and value.column):
        return value
    return value.model_copy(update={"column": "", "table": ""} if own_table else {"heading": ""})


def _of(value: Value, leading: Value, sees: str, suffix: str) -> Value:
    """A value of one of several networks, whose first value is `leading`; `suffix` ends its name."""
    changes: dict[str, Any] = {"name": value.name + suffix}
    if value.level is not None:
        changes["level"] = value.level + suffix
    if value.heading and leading.heading not in value.heading and sees not in value.heading:
        changes["heading"] = f"{value.heading}, beside {leading.heading}"
    if value.table == BESIDE:
        changes |= {"table": f"Beside {leading.heading}", "beside": leading.name + suffix}
    return value.model_copy(update=changes)


def _suffix(network: str) -> str:
    """A network's name at the end of a value's, whose letters are those of a column's name."""
    return "_" + re.sub(r"[^a-z0-9_]", "_", network.lower())


def in_short(value: Value) -> str:
    """A value in a few words, as "FID 4.67 ± 0.05"."""
    error = "" if value.se is None else f" ± {value.se:.2g}"
    return f"{value.heading or value.column or value.name} {value.value:.4g}{error}"
