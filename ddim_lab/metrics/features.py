"""Images -> feature vectors: what a feature network is, one class a file in `ddim_lab.metrics.networks`.

Only the 2015 Inception network gives "FID"; what the others give is named "FD (...)".
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal, final

from ddim_lab.config.metrics import NetworkOptions
from ddim_lab.data.base import DataSet
from ddim_lab.store import Store

if TYPE_CHECKING:
    from ddim_lab.data.images import ImageData
    from ddim_lab.device.runtime import Runtime
    from ddim_lab.metrics.extractor import Extractor

__all__ = [
    "KEPT_AT_MOST",
    "FeatureNetwork",
    "Features",
    "PublishedKernel",
    "Variant",
    "feature_network",
    "obtain_features",
]

KEPT_AT_MOST: Final = 50_000
"""Feature vectors that are compared one by one, at most: kernel distances, precision and recall see no more."""


@final
@dataclass(frozen=True)
class PublishedKernel:
    """A discrepancy that has a name in the literature, which it has in one network's features and with one kernel.

    Attributes:
        name: as "CMMD".
        bandwidth: sigma of its Gaussian kernel.
        source: where it was published.
    """

    name: str
    bandwidth: float
    source: str


@final
@dataclass(frozen=True)
class Features:
    """A feature extractor with its name and identity.

    Attributes:
        name: what its Fréchet distance is called in tables, as "FD (digits classifier)"; "FID" for one network only.
        digest: identifies the extractor: weights, layer, resizing.
        num_features: D.
        load: gives the network, on the CPU, in evaluation mode.
        tells_classes: whether the classes of its head are the data set's own labels.
        kept: whether the features of samples are kept beside their images: not those that are the images again.
        known_as: what others call this very Fréchet distance, in words; None where nobody does.
        kernel: of a discrepancy in them that was published; None where there is none.
        akin: published metrics beside which its Fréchet distance may stand, as `Value.akin`.
        statistics: names of the mean and the covariance in the field's files of them.
    """

    name: str
    digest: str
    num_features: int
    load: Callable[[], Extractor]
    tells_classes: bool = False
    kept: bool = True
    known_as: str | None = None
    kernel: PublishedKernel | None = None
    akin: tuple[str, ...] = ("FID", "FD")
    statistics: tuple[str, str] = ("mu", "sigma")

    @property
    def is_fid(self) -> bool:
        """Whether what is measured in them has the field's own names: FID, KID, Inception Score."""
        return self.name == "FID"

    @property
    def sees(self) -> str:
        """What looks at the images, in words: "digits classifier", "Inception"."""
        return "Inception" if self.is_fid else self.name.removeprefix("FD (").removesuffix(")")


@final
@dataclass(frozen=True)
class Variant:
    """Another way in which the same network is taken: what is measured in it has another name.

    Attributes:
        name: unique among the network's, of letters, digits and _, as "antialiased".
        label: in a few words, as "antialiased resize".
        says: what is done otherwise, one sentence.
        who: who does it so, with version.
        source: where that can be read.
        common: how often the field does it: 1 rarely, 2 sometimes, 3 often.
        effect: what was published of its size, in percent of FID; None where nothing was.
        features: gives the extractor; raises ConfigError where weights are missing or damaged.
        same_network: whether it differs in how images come to it alone, so that others may meet with it on one side.
    """

    name: str
    label: str
    says: str
    who: tuple[str, ...]
    source: str
    common: Literal[1, 2, 3]
    effect: float | None
    features: Callable[[], Features]
    same_network: bool = True


class FeatureNetwork(NetworkOptions):
    """A network whose features are compared; abstract. The file networks/NAME.py has that of metrics.features=NAME.

    Its fields are the options that it alone has; they stand in conf/metrics beside all others, so their names begin
    with its own. Torch is imported inside its methods: a command line is checked without it.

    Attributes:
        takes_any_images: whether it looks at images of any size and number of channels, or at the data set's alone.
    """

    takes_any_images: ClassVar[bool] = False

    def check_data(self, data: DataSet, files: Sequence[Path]) -> None:
        """Checks that need no computation, but may need the files; weights are downloaded.

        Args:
            data: the data set.
            files: its files, of `DataSet.find`.

        Raises:
            ConfigError: something is missing, damaged or too large; one line.
        """

    def check_runtime(self, runtime: Runtime) -> None:
        """Raise ConfigError where the runtime can't do what the options say."""

    @abstractmethod
    def num_features(self, shape: tuple[int, int, int]) -> int:
        """D, for images of this shape (C, H, W), before the network is there."""

    @abstractmethod
    def obtain(self, data: ImageData, store: Store) -> Features:
        """The extractor; one that has to be trained is, if the store has none for these data.

        Args:
            data: the data set; a network that is trained sees its training split and labels.
            store: where trained networks are kept.

        Raises:
            ConfigError: weights are missing or damaged.
        """

    def variants(self, data: ImageData, store: Store) -> Sequence[Variant]:
        """Other ways in which this network is taken by others; none of a network that nobody else has."""
        return ()


def feature_network(options: NetworkOptions) -> FeatureNetwork:
    """The network that a configuration names."""
    assert isinstance(options, FeatureNetwork), f"metrics.features={options.name} is no FeatureNetwork"
    return options


def obtain_features(options: NetworkOptions, data: ImageData, store: Store) -> Features:
    """`FeatureNetwork.obtain` of the network that a configuration names."""
    return feature_network(options).obtain(data, store)
