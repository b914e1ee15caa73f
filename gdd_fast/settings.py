"""The base of every configuration: a frozen dataclass whose values have the types that its fields announce."""

import numbers
import operator
import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gdd_fast.backend import Backend
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


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """What every run of the training loop can be told."""

    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best there is, `torch` their definitions. A
    named one runs the operators that have it, and their definitions for the others."""
    duration_mimg: Positive = 5.0
    """Length of the run, in millions of real images."""
    tick_kimg: Positive = 20.0
    """Thousands of images between metric lines with a sample grid."""
    checkpoint_ticks: Count = 10
    """Ticks between checkpoints. One is always written at the end, on SIGINT and on SIGTERM."""
    keep_checkpoints: Count = 1
    """How many checkpoints to keep: the newest, and those before it as checkpoint-IMAGES.safetensors."""
    async_checkpoints: bool = True
    """Go on training while a checkpoint is written; the copy of the state that this takes is in host memory. One that
    cannot be written ends the run at the next checkpoint."""
    max_hours: Annotated[float | None, Limit(0, above=True)] = None
    """Stop, with the state saved, after training for so long; the exit status is then 75. For queues with a limit."""
    debug_finite: bool = False
    """Look at every layer's output, every gradient, moment and weight, and end at the first that is not finite, with
    its name and the step. Slow: the host waits for each."""
    max_skipped_steps: Count = 10
    """Stop, with the state saved, after this many steps in a row whose gradients were not finite."""


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
