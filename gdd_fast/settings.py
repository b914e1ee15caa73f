"""The base of every configuration: a frozen dataclass whose values have the types that its fields announce."""

import numbers
import operator
import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gdd_fast.errors import ConfigError


@dataclass(frozen=True)
class Limit:
    """Beside a number's type, the least that it may be: `Annotated[int, Limit(2)]`. `above`: it has to be more."""

    least: float
    above: bool = False

    def check(self, value: float | None, flag: str) -> None:
        """Raise `ConfigError` for a number that is too small; a setting that is None is fine."""
        if value is not None and (value <= self.least if self.above else value < self.least):
            raise ConfigError(f"{flag} must be {'above' if self.above else 'at least'} {self.least}, not {value}")


Count = Annotated[int, Limit(1)]
Positive = Annotated[float, Limit(0, above=True)]
NotNegative = Annotated[float, Limit(0)]


class Settings:
    """Mixin for frozen dataclasses that a program, a file or a command line may fill.

    What is meant without doubt is taken: a string or any path object for a path, 4.0 or a NumPy integer for a whole
    number, a list for a tuple. Anything else raises `ConfigError` with the name of the flag.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _converted(field.type, value, f"--{field.name.replace('_', '-')}"))


def _converted(kind: Any, value: Any, flag: str) -> Any:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        if any(get_origin(option) is Literal and value in get_args(option) for option in get_args(kind)):
            return value
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{flag} takes several values, not {value!r}: give a list")
        return tuple(_converted(get_args(kind)[0], item, flag) for item in value)
    convert = _CONVERSIONS.get(kind)
    return value if convert is None else convert(value, flag)


def _path(value: Any, flag: str) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{flag} is a path, not {value!r}")
    return Path(value)


def _text(value: Any, flag: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{flag} is text, not {value!r}")
    return os.fspath(value)


def _flag(value: Any, flag: str) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's is no subclass of Python's
        raise ConfigError(f"{flag} is True or False, not {value!r}")
    return bool(value)


def _whole(value: Any, flag: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{flag} is a whole number, not {value!r}")
    return operator.index(value)


def _number(value: Any, flag: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{flag} is a number, not {value!r}")
    return value if type(value) in (int, float) else float(value)


_CONVERSIONS = {Path: _path, str: _text, bool: _flag, int: _whole, float: _number}
