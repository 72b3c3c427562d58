"""conf/metrics: what is measured of a cell, and in which network's features. Needs no torch.

Some options are everybody's; the others belong to a feature network or a metric, which has a file of its own in
`ddim_lab.metrics`. All stand side by side, as `metrics.kid_subsets`.
"""

from __future__ import annotations

from abc import ABC
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    StrictInt,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from ddim_lab.config.data import DataOptions
from ddim_lab.config.found import Kind
from ddim_lab.config.options import Options, PathOption, PositiveInt, Words
from ddim_lab.errors import ConfigError

__all__ = ["METRICS", "NETWORKS", "MetricOptions", "MetricsConfig", "NetworkOptions"]


class NetworkOptions(Options, ABC):
    """A feature network's own options; abstract, see `ddim_lab.metrics.features.FeatureNetwork`.

    Attributes:
        name: what metrics.features calls it.
    """

    name: ClassVar[str]

    def check(self, features: str, data: DataOptions) -> None:
        """Refuse combinations of options. It is called whichever network metrics.features names.

        Args:
            features: the network that is named.
            data: the data set.

        Raises:
            ConfigError: with one line for the user.
        """


class MetricOptions(Options, ABC):
    """A metric's own options; abstract, see `ddim_lab.metrics.base.Metric`.

    Attributes:
        name: of its file, or of the entry point that brings it: then an option of this name, its switch, must be given.
        needs_vectors: whether it compares feature vectors one by one, which are kept on disk for it.
    """

    name: ClassVar[str]
    needs_vectors: ClassVar[bool] = False

    @property
    def on(self) -> bool:
        """Whether it is to be measured."""
        return True


NETWORKS: Final = Kind("metrics.features", "ddim_lab.metrics.networks", NetworkOptions)
METRICS: Final = Kind("metrics", "ddim_lab.metrics.of_samples", MetricOptions, "ddim_lab.metrics")


class MetricsConfig(Options):
    """What is measured of a cell.

    Attributes:
        features: the feature network.
        reference: split of the real images that samples are compared with.
        reference_statistics: a file of mean and covariance to compare with instead.
        speed_repeats: full batches, after a process's first, that a speed is taken of; of fewer, it is of their steps.
        noise_seeds: seeds of the variance across runs from the same x_T.
    """

    features: Words
    reference: Literal["train", "held_out", "all"]
    reference_statistics: PathOption | None
    speed_repeats: PositiveInt
    noise_seeds: Annotated[StrictInt, Field(ge=2)]

    _networks: tuple[NetworkOptions, ...] = PrivateAttr(())
    _metrics: tuple[MetricOptions, ...] = PrivateAttr(())

    @field_validator("features")
    @classmethod
    def _known(cls, given: str) -> str:
        if given not in (ours := NETWORKS.ours()) and given not in NETWORKS.brought():
            *others, last = (f"'{name}'" for name in ours)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return given

    @model_validator(mode="wrap")
    @classmethod
    def _shared_out(cls, given: Any, own: ModelWrapValidatorHandler[MetricsConfig]) -> MetricsConfig:
        """The options of networks and metrics, each to its owner.

        Those of this package are all there. What an installed package brings is there where its name is given, so that
        its installation changes no other cell's key. Metrics stand as their options do, after those that have none.
        """
        if not isinstance(given, dict):
            return own(given)
        networks, metrics = NETWORKS.ours(), METRICS.ours()
        networks |= {name: NETWORKS.find(name) for name in NETWORKS.brought() if given.get("features") == name}
        metrics |= {name: METRICS.find(name) for name in METRICS.brought() if name in given}
        owners: dict[str, str] = dict.fromkeys(cls.model_fields, "conf/metrics")
        for owner, kind in [*networks.items(), *metrics.items()]:
            for name in kind.model_fields:
                if name in owners:
                    raise ConfigError(f"metrics.{name} belongs to {owners[name]}: {owner} can't have it, too")
                owners[name] = owner
        config = own({name: value for name, value in given.items() if owners.get(name, "") in ("", "conf/metrics")})
        config._networks = tuple(_part(kind, given) for kind in networks.values())
        place = {name: number for number, name in enumerate(given)}
        first = {
            name: min((place.get(option, -1) for option in kind.model_fields), default=-1)
            for name, kind in metrics.items()
        }
        config._metrics = tuple(_part(metrics[name], given) for name in sorted(metrics, key=first.__getitem__))
        return config

    @model_serializer(mode="wrap")
    def _side_by_side(self, own: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        parts = (part.model_dump(mode=info.mode) for part in (*self._networks, *self._metrics))
        return {**own(self), **{name: value for part in parts for name, value in part.items()}}

    @property
    def network(self) -> NetworkOptions:
        """The feature network that `features` names."""
        return self.network_named(self.features)

    def network_named(self, name: str) -> NetworkOptions:
        """One of this package's feature networks, or the one that `features` names, with its options."""
        return next(network for network in self._networks if network.name == name)

    @property
    def chosen(self) -> tuple[MetricOptions, ...]:
        """The metrics that are switched on."""
        return tuple(metric for metric in self._metrics if metric.on)

    @property
    def owners(self) -> list[tuple[str, Options]]:
        """The feature network and the metrics that are switched on, each with the kind of thing it is."""
        return [("features", self.network), *(("metric", metric) for metric in self.chosen)]

    @property
    def needs_vectors(self) -> bool:
        """Whether any metric that is switched on compares feature vectors one by one."""
        return any(metric.needs_vectors for metric in self.chosen)

    def check(self, data: DataOptions) -> None:
        """What no single value shows: combinations. Raises ConfigError."""
        for network in self._networks:
            network.check(self.features, data)

    def identity(self) -> dict[str, Any]:
        """The part of it that enters a cell's key: not files and networks, which enter by content digests."""
        parts = (metric.model_dump() for metric in self._metrics)
        shared = {"speed_repeats": self.speed_repeats, "noise_seeds": self.noise_seeds}
        return {**{name: value for part in parts for name, value in part.items()}, **shared}


Part = TypeVar("Part", bound=Options)


def _part(kind: type[Part], given: dict[str, Any]) -> Part:
    return kind.model_validate({name: given[name] for name in kind.model_fields if name in given})
