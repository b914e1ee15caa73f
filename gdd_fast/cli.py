"""Command lines from dataclasses, and how a command ends.

Flags are field names, help texts are the docstrings under the fields.
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
_LET_THE_OTHER_SPEAK = 3.0  # seconds in which torchrun sees which process ended first


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
    import tyro  # a command without flags of its own, and a library call, need none

    return tyro.cli(
        cls,
        prog=f"python -m gdd_fast.{name}",
        default=default if default is not None else tyro.MISSING_NONPROP,
        args=with_home(sys.argv[1:] if args is None else args),
        description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def pop_option(arguments: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, the last one given, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{name}", dest="value", default=default)
    try:
        found, rest = parser.parse_known_args(with_home(arguments))
    except argparse.ArgumentError:
        raise ConfigError(f"--{name} takes a value") from None
    return found.value, rest


def with_home(arguments: Sequence[str]) -> list[str]:
    """`--flag=~/folder` as `--flag ~/folder` is read: bash replaces a ~ at the start of a word only."""
    parts = (argument.partition("=") for argument in arguments)
    return [f"{flag}{sign}{os.path.expanduser(v) if flag.startswith('--') else v}" for flag, sign, v in parts]


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end with one line on stderr, never a traceback, for what is not the program's fault.

    Status 2 on a `GddFastError`, on a path that the system refuses, a full disk and too little memory; 130 on Ctrl-C.
    Under torchrun the first process says the line; all leave it for torchrun, which shows it with the number of the
    process that failed first.

    Output that cannot be written does not end the work: a stream that is closed, whose reader has gone or whose disk is
    full loses its lines. Where the work ends well, lines of stdout that were lost end it with 141 and no message if the
    reader has gone, as with `| head`, and as any full disk otherwise.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        with _usable_streams() as output, _said_errors(), _unless_lost(output):
            main(*args, **kwargs)

    return wrapped


@contextlib.contextmanager
def start(name: str) -> Iterator[None]:
    """Around a command's imports, as `with start(__name__):`. PyTorch's take seconds, in which Ctrl-C and too little
    memory end the process as they do in `command`. In a module that is imported, and not run, nothing is done.
    """
    if name != "__main__":
        yield
        return
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not one that the shell told to ignore it
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        with _usable_streams() as output, _said_errors(), _unless_lost(output):
            yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    """Nothing is begun yet. A KeyboardInterrupt would not always arrive: imports of NumPy and of PyTorch catch some."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


class _Unbreakable(io.TextIOBase):
    """A text stream that drops what its file does not take any more. `lost`: why it has first done so."""

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
    """Streams that can be written to, for a block, which gets stdout; Python has None for one that was closed when it
    started (`>&-`).
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        output = _Unbreakable(before[0] or nowhere)
        sys.stdout, sys.stderr = output, _Unbreakable(before[1] or nowhere)
        stdout = before[0]
        strict = isinstance(stdout, io.TextIOWrapper) and stdout.errors == "strict"
        if strict:  # a file's name may have letters that this terminal's encoding has not: shown as stderr shows them
            stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            yield output
        finally:
            if output.lost:  # else Python tries once more as it exits
                with contextlib.suppress(OSError):  # not a file of the operating system
                    os.dup2(nowhere.fileno(), output.fileno())
            if strict:
                stdout.reconfigure(errors="strict")  # type: ignore[union-attr]
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _unless_lost(output: _Unbreakable) -> Iterator[None]:
    """A block that ends well raises why not all of `output` could be written; it has a status of its own otherwise."""
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
    """The statuses and lines of `command`, for a block."""
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
    """PyTorch asks for it in the middle of its work, wherever the files lie."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory is gone: cd to one that is there") from None


def _line_for(error: Exception) -> str | None:
    """What to say of an error that is not the program's fault; None for any other."""
    detail = str(error).strip().partition("\n")[0]
    if "can't start new thread" in detail:
        return "the system starts no more threads: too little memory, or too many processes (ulimit -v, ulimit -u)"
    if _is_out_of_memory(error):
        return f"not enough memory{f' ({detail})' if detail else ''}: ask for less at once"
    if isinstance(error, GddFastError):
        return str(error)
    return _what_the_system_refuses(error) if isinstance(error, OSError) else None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was made of, is for want of memory: a file that cannot be read is not damaged then.

    PyTorch's allocators raise RuntimeError, on a GPU a subclass; that one is known by its name, without torch. oneDNN
    ("could not create a primitive") and Python itself ("error return without exception set") have errors that may mean
    anything else as well: here it depends on what memory is left.
    """
    named = getattr(error, "errno", None) == errno.ENOMEM or {kind.__name__ for kind in type(error).__mro__} & {
        "MemoryError",
        "OutOfMemoryError",
    }
    said = any(words in str(error) for words in ("can't allocate memory", "bad_alloc"))
    # the loader of libraries, which says so where memory is short and where it may not execute what lies there
    said = said or ("failed to map segment" in str(error) and "not permitted" not in str(error))
    ambiguous = isinstance(error, RuntimeError | SystemError | ImportError) and not isinstance(error, GddFastError)
    if named or said or (ambiguous and _memory_is_used_up()):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_out_of_memory(before)


def _memory_is_used_up() -> bool:
    """Whether less than an eighth is left of what `ulimit -v` allows this process."""
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
    """The line for an error that is about a path, or a disk that is full; None for any other."""
    path = "" if error.filename is None else f"{error.filename}: "
    if error.errno in FULL:
        return f"{path}{error.strerror}; make room, or write to another disk"
    return f"{path}{error.strerror}; choose another path, or mend this one" if path else None
