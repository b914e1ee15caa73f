"""Command lines from dataclasses: flags are field names, help texts are the docstrings under the fields."""

import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from gdd_fast.errors import ConfigError

T = TypeVar("T")


def parse(
    cls: type[T],
    default: T | None = None,
    *,
    name: str,
    args: Sequence[str] | None = None,
    description: str = "",
) -> T:
    """An instance of the dataclass `cls` from `args` (default: the process's), for `python -m gdd_fast.<name>`.

    Unknown flags and values of the wrong type end the process with status 2.
    """
    return tyro.cli(
        cls,
        prog=f"python -m gdd_fast.{name}",
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
