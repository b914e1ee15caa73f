"""Command lines from dataclasses: flags are field names, help texts are the docstrings under the fields."""

import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from gdd_fast.errors import ConfigError

T = TypeVar("T")


def parse(cls: type[T], default: T | None = None, *, args: Sequence[str] | None = None, description: str = "") -> T:
    """An instance of the dataclass `cls` from `args` (default: the process's). Unknown flags exit with status 2."""
    return tyro.cli(
        cls,
        default=default if default is not None else tyro.MISSING_NONPROP,
        args=sys.argv[1:] if args is None else list(args),
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def pop_option(arguments: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, the last one given, and the other arguments."""
    value, rest, position = default, [], 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == f"--{name}":
            if position + 1 == len(arguments):
                raise ConfigError(f"--{name} takes a value")
            position += 1
            value = arguments[position]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
        position += 1
    return value, rest


def pop_flag(arguments: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Whether `--name` was given, and the other arguments."""
    return f"--{name}" in arguments, [a for a in arguments if a != f"--{name}"]
