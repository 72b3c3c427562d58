"""conf/metrics: what is measured of a cell, and in which network's features. Needs no torch.

Some options are everybody's; the others belong to a feature network or a metric, which has a file of its own in
`ddim_lab.metrics`. All stand side by side, as `metrics.kid_subsets`.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Sequence
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
from ddim_lab.config.options import Options, PathOption, PositiveInt
from ddim_lab.errors import ConfigError

__all__ = ["METRICS", "NETWORKS", "MetricOptions", "MetricsConfig", "NetworkOptions"]


class NetworkOptions(Options, ABC):
    """A feature network's own options; abstract, see `ddim_lab.metrics.features.FeatureNetwork`.

    Attributes:
        name: what metrics.features calls it.
        measured: names of the metrics that are measured in its features; None for all.
        statistics: names of the mean and the covariance of its features in the field's files of them.
    """

    name: ClassVar[str]
    measured: ClassVar[tuple[str, ...] | None] = None
    statistics: ClassVar[tuple[str, str]] = ("mu", "sigma")

    def check(self, features: Sequence[str], data: DataOptions) -> None:
        """Refuse combinations of options. It is called whichever networks metrics.features names.

        Args:
            features: the networks that are named.
            data: the data set.

        Raises:
            ConfigError: with one line for the user.
        """


class MetricOptions(Options, ABC):
    """A metric's own options; abstract, see `ddim_lab.metrics.base.Metric`.

    Attributes:
        name: of its file, or of the entry point that brings it: then an option of this name, its switch, must be given.
        needs_vectors: whether it compares feature vectors one by one: those of the reference are kept on disk for it.
    """

    name: ClassVar[str]
    needs_vectors: ClassVar[bool] = False

    @property
    def on(self) -> bool:
        """Whether it is to be measured."""
        return True


NETWORKS: Final = Kind("metrics.features", "ddim_lab.metrics.networks", NetworkOptions)
METRICS: Final = Kind("metrics", "ddim_lab.metrics.of_samples", MetricOptions, "ddim_lab.metrics")

ERRORS: Final = "influence"
"""How standard errors are taken; in the keys of cells, whose values would be others."""


class MetricsConfig(Options):
    """What is measured of a cell.

    Attributes:
        features: the feature network, or a list of different ones: the values of the first have the plain names.
        reference: split of the real images that samples are compared with.
        reference_statistics: a file of mean and covariance to compare with instead.
        speed_repeats: full batches, after a process's first, that a speed is taken of; of fewer, it is of their steps.
        noise_seeds: seeds of the variance across runs from the same x_T.
    """

    features: str | tuple[str, ...]
    reference: Literal["train", "held_out", "all"]
    reference_statistics: PathOption | None
    speed_repeats: PositiveInt
    noise_seeds: Annotated[StrictInt, Field(ge=2)]

    _networks: tuple[NetworkOptions, ...] = PrivateAttr(())
    _metrics: tuple[MetricOptions, ...] = PrivateAttr(())

    @field_validator("features", mode="before")
    @classmethod
    def _known(cls, given: Any) -> str | tuple[str, ...]:
        """A list of one network is that network: the same cell."""
        listed = isinstance(given, list | tuple)
        names = tuple(given) if listed else (given,)
        *others, last = (f"'{name}'" for name in NETWORKS.ours())
        expected = f"{', '.join(others)} or {last}"
        told = f"metrics.features=[{','.join(map(str, names))}]"
        if not names:
            raise ConfigError(f"{told} names no network: give some of {expected}")
        for name in names:
            if not isinstance(name, str) or (name not in NETWORKS.ours() and name not in NETWORKS.brought()):
                if not listed:
                    raise PydanticKnownError("literal_error", {"expected": expected})
                raise ConfigError(f"{told}: {name} must be {expected}")
            if names.count(name) > 1:
                raise ConfigError(f"{told} names {name} twice")
        return names if len(names) > 1 else str(names[0])

    @model_validator(mode="wrap")
    @classmethod
    def _shared_out(cls, given: Any, own: ModelWrapValidatorHandler[MetricsConfig]) -> MetricsConfig:
        """The options of networks and metrics, each to its owner.

        Those of this package are all there. What an installed package brings is there where its name is given, so that
        its installation changes no other cell's key. Metrics stand as their options do, before those that have none.
        """
        if not isinstance(given, dict):
            return own(given)
        networks, metrics = NETWORKS.ours(), METRICS.ours()
        networks |= {name: NETWORKS.find(name) for name in NETWORKS.brought() if name in _names(given.get("features"))}
        metrics |= {name: METRICS.find(name) for name in METRICS.brought() if name in given}
        owners: dict[str, str] = dict.fromkeys(cls.model_fields, "conf/metrics")
        declared: dict[str, type] = {}
        for owner, kind in [*networks.items(), *metrics.items()]:
            for name in kind.model_fields:
                declaring = next(each for each in kind.__mro__ if name in inspect.get_annotations(each))
                # what layers of one network inherit is both's
                if name in owners and declared.get(name) is not declaring:
                    raise ConfigError(f"metrics.{name} belongs to {owners[name]}: {owner} can't have it, too")
                owners[name], declared[name] = owner, declaring
        config = own({name: value for name, value in given.items() if owners.get(name, "") in ("", "conf/metrics")})
        config._networks = tuple(_part(kind, given) for kind in networks.values())
        place = {name: number for number, name in enumerate(given)}
        first = {
            name: min((place.get(option, -1) for option in kind.model_fields), default=len(place))
            for name, kind in metrics.items()
        }
        config._metrics = tuple(_part(metrics[name], given) for name in sorted(metrics, key=first.__getitem__))
        return config

    @model_serializer(mode="wrap")
    def _side_by_side(self, own: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        parts = (part.model_dump(mode=info.mode) for part in (*self._networks, *self._metrics))
        return {**own(self), **{name: value for part in parts for name, value in part.items()}}

    @property
    def known_networks(self) -> tuple[NetworkOptions, ...]:
        """All that could be chosen, with their options."""
        return self._networks

    @property
    def networks(self) -> tuple[NetworkOptions, ...]:
        """The feature networks that `features` names, in its order."""
        return tuple(map(self.network_named, _names(self.features)))

    def network_named(self, name: str) -> NetworkOptions:
        """One of this package's feature networks, or one that `features` names, with its options."""
        return next(network for network in self._networks if network.name == name)

    @property
    def chosen(self) -> tuple[MetricOptions, ...]:
        """The metrics that are switched on."""
        return tuple(metric for metric in self._metrics if metric.on)

    @property
    def owners(self) -> list[tuple[str, Options]]:
        """The feature networks and the metrics that are switched on, each with the kind of thing it is."""
        networks = [("features", network) for network in self.networks]
        return [*networks, *(("metric", metric) for metric in self.chosen)]

    def chosen_in(self, network: str) -> tuple[MetricOptions, ...]:
        """The metrics that are switched on and measured in the features of a network, by its name."""
        measured = self.network_named(network).measured
        return tuple(metric for metric in self.chosen if measured is None or metric.name in measured)

    def needs_vectors(self, network: str) -> bool:
        """Whether any metric that is measured in a network's features compares these one by one."""
        return any(metric.needs_vectors for metric in self.chosen_in(network))

    def check(self, data: DataOptions) -> None:
        """What no single value shows: combinations. Raises ConfigError."""
        names = _names(self.features)
        for network in self._networks:
            network.check(names, data)
        if self.reference_statistics is None:
            return
        for statistics in {network.statistics for network in self.networks}:
            if (several := sum(network.statistics == statistics for network in self.networks)) > 1:
                raise ConfigError(
                    f"metrics.reference_statistics is a mean and a covariance ({', '.join(statistics)}) of one"
                    f" network's features, and metrics.features names {several} that go by them: name one"
                )

    def identity(self) -> dict[str, Any]:
        """The part of it that enters a cell's key: not files and networks, which enter by content digests."""
        parts = (metric.model_dump() for metric in self._metrics)
        shared = {"speed_repeats": self.speed_repeats, "noise_seeds": self.noise_seeds, "errors": ERRORS}
        return {**{name: value for part in parts for name, value in part.items()}, **shared}


def _names(features: Any) -> tuple[Any, ...]:
    """What metrics.features names, one or several."""
    return tuple(features) if isinstance(features, list | tuple) else (features,)


Part = TypeVar("Part", bound=Options)


def _part(kind: type[Part], given: dict[str, Any]) -> Part:
    return kind.model_validate({name: given[name] for name in kind.model_fields if name in given})
