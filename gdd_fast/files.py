"""Writing files so that a reader never sees half of one."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdd_fast.errors import FULL, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path with the name of `path`; on success, what was written there is flushed to disk and moved
    to `path`.

    If the body raises, nothing is left, and whatever was at `path` stays as it was. With `new`, a file that is at
    `path` by then, such as another process's, stays too, and `FileExistsError` is raised. The temporary file is in a
    hidden folder beside `path`, as some writers, safetensors among them, create further files beside theirs. Leftovers
    of killed processes that were writing `path` are removed, but not what others are writing now.
    """
    path = Path(path)
    with atomic_folder(path) as temporary:
        yield temporary
        # some writers make files that only the owner may read
        temporary.chmod(0o666 & temporary.parent.stat().st_mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if new and path.exists():
            raise FileExistsError(errno.EEXIST, "another process has written it meanwhile", str(path))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_write`, for a folder that the body creates. `path` must not exist or be an empty folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with _folder_beside(path) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:  # name the path that the reader of the message knows
            if error.filename is None and error.errno in FULL:
                error.filename = str(path)
            elif str(error.filename).startswith(str(temporary)):
                error.filename = str(path) + str(error.filename).removeprefix(str(temporary))
            raise


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder, removed at the end; until then this process holds a lock on it, if the disk supports locks."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        with _locked(folder) as lock:
            if lock is False:  # another process took it for a leftover before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Yields whether `folder` exists and only this block has it locked; None if its disk does not support locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        lock: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock = False if isinstance(error, BlockingIOError) else None
        yield lock and folder.exists()
    finally:
        os.close(descriptor)


def write_tensors(
    path: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None, *, new: bool = False
) -> None:
    """Write a safetensors file, as `atomic_write`. Raises `OSError` if the system refuses, as for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path, new=new) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # all that is left of the system's error
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def leftovers(path: Path) -> list[Path]:
    """The temporary folders of `path`: of processes killed while writing it, and of those writing it now."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.????????"))


def remove_leftovers(path: Path) -> None:
    """Delete what processes that were killed while writing `path` left behind. What others are writing now stays."""
    _remove(leftovers(path))


def remove_leftovers_within(folder: Path) -> None:
    """`remove_leftovers` for everything written in `folder` or in a folder directly inside it."""
    found = (path for pattern in (".*", "*/.*") for path in folder.glob(pattern))
    _remove(path for path in found if re.search(r"\.[0-9a-f]{8}$", path.name) and path.is_dir())


def _remove(folders: Iterable[Path]) -> None:
    for folder in list(folders):
        with _locked(folder) as lock:
            if lock:
                shutil.rmtree(folder, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` if `folder` cannot be made or written to. Leaves nothing behind."""
    folder = folder.absolute()
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists() or parent.is_symlink())
    except OSError as error:  # for instance, the name is too long
        raise ConfigError(f"{folder} cannot be a folder: {error.strerror}; choose another one") from None
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a link to nothing"
        raise ConfigError(f"{folder} cannot be a folder: {existing} is {what}; choose another one")
    try:
        # Tried out, as permissions do not tell: not on read-only disks, nor in /proc, where root has them all.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        # A folder that accepts no files at all, such as /proc, reports that its own path does not exist.
        reason = "it accepts no files" if error.errno == errno.ENOENT else error.strerror
        raise ConfigError(f"{folder} cannot be written to: {existing}: {reason}; choose another one") from None


def check_readable(path: Path) -> None:
    """Raise the OSError of a file that may not be read, for which safetensors would say that it does not exist. Raise
    `ConfigError` for a name that is not UTF-8, which safetensors cannot read.
    """
    with path.open("rb"):
        pass
    check_name(path)


def check_name(path: Path) -> None:
    """Raise `ConfigError` for a name that is not UTF-8: safetensors can write such a file but not read it."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this name is not UTF-8, which safetensors cannot read; rename it") from None


def check_destination(path: Path) -> None:
    """Raise `ConfigError` if no file can be written at `path`. Leaves nothing behind; an existing file stays."""
    check_writable(path.absolute().parent)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises `ValueError` if it is not JSON, has NaN or infinities, or nests too deeply."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: only then is a new file name in it durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
