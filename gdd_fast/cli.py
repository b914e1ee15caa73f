"""Command lines from dataclasses, and how a command ends.

Flags are field names; help texts are the docstrings under the fields.
"""

import argparse
import contextlib
import errno
import functools
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TextIO, TypeVar

from gdd_fast.errors import FULL, ConfigError, GddFastError, LostProcessError

T = TypeVar("T")
_LET_THE_OTHER_SPEAK = 3.0  # seconds, for torchrun to see which process ended first


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
    import tyro  # imported late: library calls, and commands without flags of their own, do not need it

    return tyro.cli(
        cls,
        prog=f"python -m gdd_fast.{name}",
        default=default if default is not None else tyro.MISSING_NONPROP,
        args=_with_home(sys.argv[1:] if args is None else args),
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def pop_option(arguments: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, the last if given twice, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", dest="value", default=default)
    try:
        found, rest = parser.parse_known_args(_with_home(arguments))
    except argparse.ArgumentError:
        raise ConfigError(f"--{name} needs a value") from None
    return found.value, rest


def _with_home(arguments: Sequence[str]) -> list[str]:
    """Expand the ~ in `--flag=~/folder` too: bash expands a ~ only at the start of a word."""
    parts = (argument.partition("=") for argument in arguments)
    return [f"{flag}{sign}{os.path.expanduser(v) if flag.startswith('--') else v}" for flag, sign, v in parts]


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end with one line on stderr, never a traceback, for errors that are not the program's fault.

    The exit status is 2 for a `GddFastError`, a path that the system refuses, a full disk or too little memory, and 130
    for Ctrl-C. Under torchrun the first process prints its line; all pass theirs to torchrun, which shows that of the
    first to fail.

    Output that cannot be written does not stop the work: a stream that is closed, has lost its reader or is on a full
    disk loses its lines. If stdout has lost lines, a run that otherwise succeeds ends with status 141 and no message if
    the reader is gone, as with `| head`, and else with the error of a full disk.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        with _usable_streams() as output, _said_errors(), _unless_lost(output):
            main(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def start(name: str) -> Iterator[None]:
    """Wraps a command's imports: `with start(__name__):`. Importing PyTorch takes seconds; Ctrl-C and too little memory
    end the process then as they do in `command`. Does nothing in a module that is imported, not run.
    """
    if name != "__main__":
        yield
        return
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not if the shell made us ignore it
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        with _usable_streams() as output, _said_errors(), _unless_lost(output):
            yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """End at once, as nothing has begun. A KeyboardInterrupt can get lost: NumPy's and PyTorch's imports catch some."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


class _Unbreakable(io.TextIOBase):
    """A text stream that drops what its file no longer takes. `lost`: the first error that made it do so."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        with self._noting():
            self._stream.write(text)
        self.flush()
        return len(text)

    def flush(self) -> None:
        with self._noting():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = self.lost or error

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextlib.contextmanager
def _usable_streams() -> Iterator[_Unbreakable]:
    """For a block, make stdout and stderr streams that never fail; yields stdout. A stream that was closed when Python
    started (`>&-`) is None in sys.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        output = _Unbreakable(before[0] or nowhere)
        sys.stdout, sys.stderr = output, _Unbreakable(before[1] or nowhere)
        stdout = before[0]
        strict = isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict"
        if strict:  # a file name may have letters that the terminal's encoding lacks: show them as stderr does
            stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            yield output
        finally:
            if output.lost:  # else Python tries again as it exits
                with contextlib.suppress(OSError):  # it is no file of the operating system
                    os.dup2(nowhere.fileno(), output.fileno())
            if strict:
                stdout.reconfigure(errors="strict")  # type: ignore[union-attr]
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _unless_lost(output: _Unbreakable) -> Iterator[None]:
    """If the block succeeds but `output` has lost lines, raise why; a block that fails keeps its own status."""
    try:
        yield
    except SystemExit as end:
        if end.code or not output.lost:
            raise
    if isinstance(output.lost, BrokenPipeError):
        raise SystemExit(128 + signal.SIGPIPE) from None
    if output.lost:
        raise OSError(output.lost.errno, output.lost.strerror, "standard output") from None


@contextlib.contextmanager
def _said_errors() -> Iterator[None]:
    """For a block: turn errors into the exit statuses and lines that `command` describes."""
    try:
        _check_working_directory()
        yield
    except LostProcessError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        time.sleep(_LET_THE_OTHER_SPEAK)
        raise SystemExit(2) from None
    except (GddFastError, MemoryError, RuntimeError, SystemError, ImportError, OSError) as error:
        line = _line_for(error)
        if line is None:
            raise
        _end(line)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _check_working_directory() -> None:
    """PyTorch asks for the working directory in the middle of its work, even if no path is relative to it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory no longer exists: cd to one that does") from None


def _line_for(error: Exception) -> str | None:
    """The message for an error that is not the program's fault; None for any other."""
    detail = str(error).strip().partition("\n")[0]
    if "can't start new thread" in detail:
        return "the system cannot start more threads: too little memory, or too many processes (ulimit -v, ulimit -u)"
    if _is_out_of_memory(error):
        return f"not enough memory{f' ({detail})' if detail else ''}: use smaller batches"
    if isinstance(error, GddFastError):
        return str(error)
    return _what_the_system_refuses(error) if isinstance(error, OSError) else None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or an error behind it, was a lack of memory: then a file that cannot be read is not damaged.

    PyTorch's allocators raise RuntimeError, on a GPU a subclass of it, recognised by name so that torch is not
    imported. Errors of oneDNN ("could not create a primitive") and Python itself ("error return without exception set")
    can have other causes: here the memory that is left decides.
    """
    named = getattr(error, "errno", None) == errno.ENOMEM or {kind.__name__ for kind in type(error).__mro__} & {
        "MemoryError",
        "OutOfMemoryError",
    }
    said = any(words in str(error) for words in ("can't allocate memory", "bad_alloc"))
    # the dynamic loader says this if memory is short, and also if it may not execute files there
    said = said or ("failed to map segment" in str(error) and "not permitted" not in str(error))
    ambiguous = isinstance(error, RuntimeError | SystemError | ImportError) and not isinstance(error, GddFastError)
    if named or said or (ambiguous and _memory_is_used_up()):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_out_of_memory(before)


def _memory_is_used_up() -> bool:
    """Whether less than an eighth of what `ulimit -v` allows this process is left."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or not os.path.exists("/proc/self/statm"):
        return False
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    return used > limit * 7 / 8


def _end(message: str) -> None:
    line = f"error: {message}"
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    if os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(line, file=sys.stderr)
    raise SystemExit(2) from None


def _what_the_system_refuses(error: OSError) -> str | None:
    """The line for an error about a path or a full disk; None for any other."""
    path = "" if error.filename is None else f"{error.filename}: "
    if error.errno in FULL:
        return f"{path}{error.strerror}; make room, or write to another disk"
    return f"{path}{error.strerror}; choose another path, or mend this one" if path else None
