"""Writing files so that a reader never sees half of one."""

import contextlib
import errno
import glob
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gdd_fast.errors import FULL, ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success its contents are flushed to disk and take `path`'s name.

    If the body raises, the temporary file is removed and whatever was at `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    # not tempfile.mkstemp, whose files only their owner may read
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers, safetensors among them, put a file of their own in its place
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename == str(temporary) or (error.filename is None and error.errno in FULL):
            error.filename = str(path)  # the name that means something to whoever reads the message
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, as `atomic_write`. Raises `OSError` if the system refuses, as for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # all that is left of the system's answer
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def leftovers(path: Path) -> list[Path]:
    """Temporary files of `path`: left by processes that were killed, or being written by others now."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.????????{glob.escape(path.suffix)}"))


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of `path` that killed processes left; nobody may be writing it now."""
    for leftover in leftovers(path):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` if `folder` cannot be made or written to. Leaves nothing behind."""
    folder = folder.absolute()
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"{folder} cannot be a folder: {error.strerror}; choose another one") from None
    if not existing.is_dir():
        raise ConfigError(f"{folder} cannot be a folder: {existing} is a file; choose another one")
    try:
        # Tried, as permissions do not tell: not of read-only disks, nor of /proc, where root has them all.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        # A folder that takes no files at all, such as /proc, says that its own path does not exist.
        reason = "it takes no files" if error.errno == errno.ENOENT else error.strerror
        raise ConfigError(f"{folder} cannot be written to: {existing}: {reason}; choose another one") from None


def check_destination(path: Path) -> None:
    """Raise `ConfigError` if no file can be written at `path`. Leaves nothing behind; a file there stays."""
    check_writable(path.absolute().parent)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file")


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk: a file's new name in it is durable only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
