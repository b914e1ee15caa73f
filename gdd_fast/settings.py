"""The base of every configuration: a frozen dataclass whose values have the types that its fields declare."""

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
    """The least value of a number, given with its type: `Annotated[int, Limit(2)]`. `above`: it must be greater."""

    least: float
    above: bool = False

    def check(self, value: float | None, flag: str) -> None:
        """Raise `ConfigError` for a number that is too small; None is allowed."""
        if value is not None and (value <= self.least if self.above else value < self.least):
            raise ConfigError(f"{flag} must be {'above' if self.above else 'at least'} {self.least}, not {value}")


Count = Annotated[int, Limit(1)]
Positive = Annotated[float, Limit(0, above=True)]
NotNegative = Annotated[float, Limit(0)]


class Settings:
    """Mixin for frozen dataclasses that a program, a file or a command line may fill.

    Values whose meaning is clear are converted: a string or any path object to a path, 4.0 or a NumPy integer to a
    whole number, a list to a tuple. Anything else raises a `ConfigError` that names the flag.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _converted(field.type, value, f"--{field.name.replace('_', '-')}"))


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """The settings of every run of the training loop."""

    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
    backend: Backend = "auto"
    """Which implementation of the fused operators runs: `auto` takes the best available, `torch` their definitions.
    With any other, operators that lack it run their definition."""
    duration_mimg: Positive = 5.0
    """Length of the run, in millions of real images."""
    tick_kimg: Positive = 20.0
    """Thousands of images per tick; each tick writes a line of metrics and a grid of samples."""
    checkpoint_ticks: Count = 10
    """Ticks between checkpoints. One is also written at the end, on SIGINT and on SIGTERM."""
    keep_checkpoints: Count = 1
    """How many checkpoints to keep, the newest included; older ones are named checkpoint-IMAGES.safetensors."""
    async_checkpoints: bool = True
    """Keep training while a checkpoint is written, which takes a copy of the state in host memory. If writing fails,
    the run ends at the next checkpoint."""
    max_hours: Annotated[float | None, Limit(0, above=True)] = None
    """Stop after training this long, with the state saved and exit status 75: for job queues with a time limit."""
    debug_finite: bool = False
    """Check every layer's output, every gradient, moment and weight, and stop at the first that is not finite, with its
    name and the step. Slow: the host waits for each."""
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
            raise ConfigError(f"{flag} takes several values: give a list, not {value!r}")
        return tuple(_converted(get_args(kind)[0], item, flag) for item in value)
    convert = _CONVERSIONS.get(kind)
    return value if convert is None else convert(value, flag)


def _path(value: Any, flag: str) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{flag} must be a path, not {value!r}")
    return Path(value)


def _text(value: Any, flag: str) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{flag} must be text, not {value!r}")
    return os.fspath(value)


def _flag(value: Any, flag: str) -> bool:
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's is not a subclass of Python's
        raise ConfigError(f"{flag} must be True or False, not {value!r}")
    return bool(value)


def _whole(value: Any, flag: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{flag} must be a whole number, not {value!r}")
    return operator.index(value)


def _number(value: Any, flag: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{flag} must be a number, not {value!r}")
    return value if type(value) in (int, float) else float(value)


_CONVERSIONS = {Path: _path, str: _text, bool: _flag, int: _whole, float: _number}
