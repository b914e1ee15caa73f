"""Everything a user can get wrong, one class a kind; each message says what was wrong and what to do."""

import errno
import functools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the `OSError`s that say that no more can be written."""


class GddFastError(Exception):
    """Base of every error that is the input's fault and not the program's."""


class ConfigError(GddFastError, ValueError):
    """An option, or a combination of options, that cannot work."""


class InputError(GddFastError, ValueError):
    """A tensor of a shape, type or device that a function does not take."""


class DataError(GddFastError, ValueError):
    """A data set that is missing, empty, corrupt or inconsistent."""


class WeightsError(GddFastError):
    """Weights that cannot be found, or do not fit the network."""


class UnsafePickleError(GddFastError):
    """A network pickle that holds something other than the tensors and settings of an EDM network."""


class CheckpointError(GddFastError):
    """A checkpoint that is incomplete, corrupt or from another configuration."""


class BackendError(GddFastError, RuntimeError):
    """An implementation of an operator that was asked for by name and cannot run here."""


class DivergedError(GddFastError):
    """Training stopped because too many steps in a row had gradients that were not finite."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end with one line on stderr, never a traceback, for what is not the program's fault.

    Status 2 on a `GddFastError`, on a path that the system refuses, a full disk and too little memory; 130 on Ctrl-C;
    141 without a word if whoever read the output has gone, as with `| head`. Of the processes of a torchrun, the first
    says the line; all leave it for torchrun, which shows it with the number of the process that failed first.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            _say_errors(main, args, kwargs)
        except BrokenPipeError:
            if not _stdout_is_gone():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None

    return wrapped


def _say_errors(main: Callable[..., None], args: tuple, kwargs: dict) -> None:
    try:
        try:
            main(*args, **kwargs)
        finally:
            sys.stdout.flush()  # what cannot be written is said here, and not by Python while it ends
    except GddFastError as error:
        _end(str(error))
    except MemoryError as error:
        _end(f"not enough memory{f' ({error})' if str(error) else ''}: ask for less at once")
    except OSError as error:
        reason = _what_the_system_refuses(error)
        if reason is None:
            raise
        _end(reason)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _end(message: str) -> None:
    line = f"error: {message}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    raise SystemExit(2) from None


def _what_the_system_refuses(error: OSError) -> str | None:
    """The line for an error that is about a path, or a disk that is full; None for any other."""
    path = "" if error.filename is None else f"{error.filename}: "
    if error.errno in FULL:
        return f"{path}{error.strerror}; make room, or write to another disk"
    return f"{path}{error.strerror}; choose another path, or mend this one" if path else None


def _stdout_is_gone() -> bool:
    """Whether nobody reads standard output any more: a pipe's writing end is then in error, whatever one asks of it."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file of the system's
        return False
    poll = select.poll()
    poll.register(output, 0)
    return bool(poll.poll(0))
