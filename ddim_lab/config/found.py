"""What there is to choose from: our own files by their names, and what installed packages bring.

A kind of thing (a task, a data set) is a room of this package: the file NAME.py there holds one class, the final one
that is of the room's base class. An installed package brings more of a kind through Python's entry points, in a group
of the room's name: `NAME = "package.module:Class"`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, TypeVar, final

from ddim_lab.config.options import Options, checked
from ddim_lab.errors import ConfigError, one_line

__all__ = ["Kind"]

T = TypeVar("T", bound=Options)


@final
class Kind(Generic[T]):
    """One kind of thing that has a name.

    Args:
        group: of conf/, as "task": what options call it.
        room: the package that ours lie in and the group of entry points, as "ddim_lab.tasks".
        base: the class that all of the kind derive from; abstract, mostly.
        points: the group of entry points, where that is not the room's name.
    """

    def __init__(self, group: str, room: str, base: type[T], points: str | None = None) -> None:
        self.group: Final = group
        self.room: Final = room
        self.base: Final = base
        self.points: Final = room if points is None else points

    def ours(self) -> dict[str, type[T]]:
        """Those of this package, by name; every file of the room is imported for it."""
        names = [module.name for module in pkgutil.iter_modules(importlib.import_module(self.room).__path__)]
        found = {name: self._class_in(f"{self.room}.{name}") for name in sorted(names)}
        return {name: each for name, each in found.items() if each is not None}

    def brought(self) -> dict[str, EntryPoint]:
        """Those that installed packages bring, by name.

        Raises:
            ConfigError: two packages bring the same name, or one of ours.
        """
        found: dict[str, EntryPoint] = {}
        for point in _entry_points(self.points):
            package = point.dist.name if point.dist else point.module
            if importlib.util.find_spec(f"{self.room}.{point.name}") is not None:
                raise ConfigError(f"the package {package} brings {self.group}={point.name}, which is a name of ours")
            if point.name in found:
                other = found[point.name].dist
                raise ConfigError(
                    f"the packages {package} and {other.name if other else '?'} both bring {self.group}={point.name}:"
                    " uninstall one of them"
                )
            found[point.name] = point
        return found

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ConfigError: there is none; or the package that brings it is broken.
        """
        if name.isidentifier() and not name.startswith("_"):
            module = f"{self.room}.{name}"
            if importlib.util.find_spec(module) is not None and (ours := self._class_in(module)) is not None:
                return ours
        if (point := self.brought().get(name)) is None:
            raise ConfigError(f"{self.group}={name}: there is no such {self.group}")
        package = point.dist.name if point.dist else point.module
        try:
            found = point.load()
        except Exception as error:
            raise ConfigError(f"{self.group}={name}: the package {package} is broken: {one_line(error)}") from error
        if not (inspect.isclass(found) and issubclass(found, self.base) and not inspect.isabstract(found)):
            raise ConfigError(
                f"{self.group}={name}: the package {package} is broken: {point.value} is no {self.base.__name__}"
            )
        return found

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


@functools.cache
def _entry_points(group: str) -> Sequence[EntryPoint]:
    return tuple(entry_points(group=group))
