"""The types that options are written in, and one line for what does not fit them. Imports nothing of the package but
its errors, and no torch: whoever owns options builds on this.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from ddim_lab.errors import ConfigError

__all__ = [
    "Fraction",
    "NonNegative",
    "NonNegativeInt",
    "Number",
    "Options",
    "PathOption",
    "Positive",
    "PositiveInt",
    "Seed",
    "StepsKey",
    "Switch",
    "Words",
    "checked",
    "path_argument",
    "user_path",
]

PositiveInt = Annotated[StrictInt, Field(ge=1)]
Words = Annotated[StrictStr, Field(min_length=1)]


def user_path(text: str) -> Path:
    """A path as a user writes it: `~` is the home folder, `~NAME` that of NAME, wherever the shell left it so.

    Raises:
        ConfigError: there is no such home folder; one line.
    """
    path = os.path.expanduser(text)  # noqa: PTH111 (Path.expanduser raises an error that says less)
    home = path.partition("/")[0]
    if home == "~" and not Path(home).exists():
        raise ConfigError(f"{text}: there is no home folder; set $HOME, or give the whole path")
    if home.startswith("~") and not Path(home).exists():
        raise ConfigError(f"{text}: there is no home folder {home}; a folder of that name here is ./{home}")
    return Path(path)


def path_argument(text: str) -> Path:
    """`user_path` for argparse."""
    try:
        return user_path(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None


def _path_option(given: Any) -> Any:
    """Text still, as recipes hold it."""
    if not isinstance(given, str) or not given:
        return given
    if not given.isascii() and any("\ud800" <= character <= "\udfff" for character in given):
        raise PydanticCustomError("path", "the name is not UTF-8: rename it, or link to it under another name")
    try:
        return str(user_path(given)) if given.startswith("~") else given
    except ConfigError as error:
        raise PydanticCustomError("path", "{why}", {"why": str(error).partition(": ")[2]}) from None


PathOption = Annotated[Words, BeforeValidator(_path_option)]
"""A file or folder of the user's."""

NonNegativeInt = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
StepsKey = Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9][0-9]*$")]


def _switch(given: Any) -> Any:
    """Checked here, where the message can say all three."""
    if isinstance(given, bool) or given == "auto":
        return given
    raise PydanticCustomError("switch", "must be true, false or auto")


Switch = Annotated[StrictBool | Literal["auto"], BeforeValidator(_switch)]


class Options(BaseModel):
    """A group of options, as one file of conf/ has them: typed, strict, unchangeable. Nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Given = TypeVar("Given", bound=Options)


def checked(kind: type[Given], values: Any, place: str = "") -> Given:
    """The options that `values` give; `place` is where they stand, as "task".

    Raises:
        ConfigError: with one line for the user, that names the option in full.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        words = _explain(error, place)  # pydantic, which may check this within another group, takes UTF-8 alone
        raise ConfigError(words.encode("utf-8", "backslashreplace").decode()) from None


_UNIONS: Final = ("model", "schedule")
"""Groups of which a choice has options of its own: pydantic names the choice after the group."""

_BOUNDS: Final = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def _explain(error: ValidationError, place: str) -> str:
    """The first fault as `option=value: what it must be`."""
    # A misspelt option before what is missing because of it.
    fault = next((each for each in error.errors() if each["type"] == "extra_forbidden"), error.errors()[0])
    top, *inner = (str(part) for part in fault["loc"])
    place = ".".join([*([place] if place else []), top, *(inner[1:] if top in _UNIONS else inner)])
    kind, given, context = fault["type"], fault.get("input"), fault.get("ctx", {})
    given = "null" if given is None else given  # as it is written
    if isinstance(raised := context.get("error"), ConfigError):
        return str(raised)
    if kind == "extra_forbidden":
        return f"{place}: no such option"
    if kind == "missing":
        return f"{place} is not set"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{place}={given}: must be {words} {context[key]}"
    if kind == "model_type":
        return f"{place}={given}: is a group of options, {place}.NAME=..."
    if kind == "literal_error":
        return f"{place}={given}: must be {context['expected']}"
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return f"{place}={given}: must be a whole number"
    if kind in ("float_type", "float_parsing", "finite_number"):
        return f"{place}={given}: must be a finite number"
    if kind == "string_too_short":
        return f"{place} is empty: give a value, or drop it"
    if kind == "tuple_type":
        return f"{place}={given}: must be a list, as {place}=[A,B]"
    if kind == "bool_type":
        return f"{place}={given}: must be true or false"
    return f"{place}={given}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
