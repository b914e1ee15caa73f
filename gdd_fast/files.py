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
    """Yield a path for a file of the same name; on success what was written there is flushed to disk and moved to
    `path`.

    If the body raises, nothing is left, and whatever was at `path` stays as it was. With `new` it stays too if it is
    there at the end, such as another process's, and `FileExistsError` is raised. The file lies in a hidden folder
    beside `path` until then, since some writers make further files of their own beside theirs, safetensors among them.
    What killed processes have left of `path` is removed, but not what others are writing now.
    """
    path = Path(path)
    with atomic_folder(path) as temporary:
        yield temporary
        # some writers make files that only their owner may read
        temporary.chmod(0o666 & temporary.parent.stat().st_mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if new and path.exists():
            raise FileExistsError(errno.EEXIST, "another process has written it meanwhile", str(path))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_write` for a folder, which the body makes; at `path` there is nothing, or an empty folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with _folder_beside(path) as folder:
        temporary = folder / path.name
        try:
            yield temporary
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:  # the name that means something to whoever reads the message
            if error.filename is None and error.errno in FULL:
                error.filename = str(path)
            elif str(error.filename).startswith(str(temporary)):
                error.filename = str(path) + str(error.filename).removeprefix(str(temporary))
            raise


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder, removed at the end, that is locked as long as this process lives, where the disk has locks."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        with _locked(folder) as lock:
            if lock is False:  # taken for a leftover before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether `folder` is there and locked by this block alone; None if its disk has no locks."""
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
            number = re.search(r"os error (\d+)", str(error))  # all that is left of the system's answer
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def leftovers(path: Path) -> list[Path]:
    """What processes killed while they wrote `path` have left, and what others are writing it to now."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.????????"))


def remove_leftovers(path: Path) -> None:
    """Delete what processes killed while they wrote `path` have left. What others are writing now stays."""
    _remove(leftovers(path))


def remove_leftovers_within(folder: Path) -> None:
    """`remove_leftovers` of whatever was written in `folder`, or in a folder that is there in it."""
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
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{folder} cannot be a folder: {error.strerror}; choose another one") from None
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a link to nothing"
        raise ConfigError(f"{folder} cannot be a folder: {existing} is {what}; choose another one")
    try:
        # Tried, as permissions do not tell: not of read-only disks, nor of /proc, where root has them all.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        # A folder that takes no files at all, such as /proc, says that its own path does not exist.
        reason = "it takes no files" if error.errno == errno.ENOENT else error.strerror
        raise ConfigError(f"{folder} cannot be written to: {existing}: {reason}; choose another one") from None


def check_readable(path: Path) -> None:
    """Raise the OSError of a file that may not be read: safetensors says that there is none. Raise `ConfigError` for a
    name that is no text, which safetensors does not read.
    """
    with path.open("rb"):
        pass
    check_name(path)


def check_name(path: Path) -> None:
    """Raise `ConfigError` for a name that is no text: safetensors writes such a file and does not read it."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this name is not UTF-8, and safetensors reads no such file; rename it") from None


def check_destination(path: Path) -> None:
    """Raise `ConfigError` if no file can be written at `path`. Leaves nothing behind; a file there stays."""
    check_writable(path.absolute().parent)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. Raises `ValueError` for any other text, for NaN, and for values nested too deeply."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: a file's new name in it is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
