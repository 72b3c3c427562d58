"""What there is to choose from: our own files by their names, and what installed packages bring.

A kind of thing (a task, a data set) is a room of this package: the file NAME.py there holds one class, the final one
that is of the room's base class. An installed package brings more of a kind through Python's entry points, in a group
of the room's name: `NAME = "package.module:Class"`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Final, Generic, TypeVar, final

from ddim_lab.config.folders import config_folder, distribution, package_folder, points, source_sha256
from ddim_lab.config.options import Options, checked
from ddim_lab.errors import ConfigError, one_line

__all__ = ["Kind", "Origin", "origin_of"]

T = TypeVar("T", bound=Options)


@final
@dataclass(frozen=True)
class Origin:
    """The installed package that brings something: what its code is, whether or not its version moves.

    Attributes:
        package, version: as pip has them.
        sha256: over the package's files.
    """

    package: str
    version: str
    sha256: str


_origins: dict[type, Origin] = {}


def origin_of(chosen: Options) -> Origin | None:
    """Where the class of these options comes from; None for one of ours."""
    return _origins.get(type(chosen))


@final
class Kind(Generic[T]):
    """One kind of thing that has a name.

    Args:
        group: of conf/, as "task": what options call it.
        room: the package that ours lie in, as "ddim_lab.tasks"; None where ours are no files of their own.
        base: the class that all of the kind derive from; abstract, mostly.
        points: the group of entry points, where that is not the room's name.
        names: of ours that are no files of their own.
    """

    def __init__(
        self, group: str, room: str | None, base: type[T], points: str | None = None, names: Collection[str] = ()
    ) -> None:
        self.group: Final = group
        self.room: Final = room
        self.base: Final = base
        self.points: Final = points or room or ""
        self.names: Final = names

    def ours(self) -> dict[str, type[T]]:
        """Those of this package, by name; every file of the room is imported for it."""
        assert self.room is not None
        names = [module.name for module in pkgutil.iter_modules(importlib.import_module(self.room).__path__)]
        found = {name: self._class_in(f"{self.room}.{name}") for name in sorted(names)}
        return {name: each for name, each in found.items() if each is not None}

    def brought(self) -> dict[str, EntryPoint]:
        """Those that installed packages bring, by name.

        Raises:
            ConfigError: two packages bring the same name, or one of ours.
        """
        found: dict[str, EntryPoint] = {}
        for point in points(self.points):
            package = distribution(point)
            if self._is_ours(point.name):
                raise ConfigError(f"the package {package} brings {self.group}={point.name}, which is a name of ours")
            if point.name in found:
                raise ConfigError(
                    f"the packages {distribution(found[point.name])} and {package} both bring"
                    f" {self.group}={point.name}: uninstall one of them"
                )
            found[point.name] = point
        return found

    def _is_ours(self, name: str) -> bool:
        if name in self.names or (config_folder() / self.group / f"{name}.yaml").exists():
            return True
        return self.room is not None and importlib.util.find_spec(f"{self.room}.{name}") is not None

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ConfigError: there is none; or the package that brings it is broken.
        """
        if self.room is not None and name.isidentifier() and not name.startswith("_"):
            module = f"{self.room}.{name}"
            if importlib.util.find_spec(module) is not None and (ours := self._class_in(module)) is not None:
                return ours
        if (point := self.brought().get(name)) is None:
            raise ConfigError(f"{self.group}={name}: there is no such {self.group}")
        broken = f"{self.group}={name}: the package {distribution(point)} is broken"
        try:
            found = point.load()
        except Exception as error:
            raise ConfigError(f"{broken}: {one_line(error)}") from error
        if not (inspect.isclass(found) and issubclass(found, self.base) and not inspect.isabstract(found)):
            raise ConfigError(f"{broken}: {point.value} is no {self.base.__name__} that can be used")
        if found not in _origins:
            folder = package_folder(point.module)
            if folder is None or point.dist is None:
                raise ConfigError(f"{broken}: it must be an installed package of files, not a single module")
            _origins[found] = Origin(point.dist.name, point.dist.version, source_sha256(folder))
        kind: type[T] = found
        return kind

    def chosen(self, values: Any) -> Any:
        """The options that a choice of this group gives, by the class of its name; for a field of a configuration.

        Raises:
            ConfigError: there is no such class, or it has other options.
        """
        if isinstance(values, self.base):
            return values
        name = values.get("name") if isinstance(values, dict) else values
        if not isinstance(name, str):
            raise ConfigError(
                f"{self.group}={name}: must be the name of a choice, as a file of conf/{self.group} has it"
            )
        return checked(self.find(name), values, self.group)

    def _class_in(self, module: str) -> type[T] | None:
        """The class of this kind that a module of ours defines."""
        members = vars(importlib.import_module(module)).values()
        found = [
            each
            for each in members
            if inspect.isclass(each)
            and issubclass(each, self.base)
            and each.__module__ == module
            and not inspect.isabstract(each)
        ]
        assert len(found) < 2, f"{module} defines several of a kind: {found}"
        return found[0] if found else None
