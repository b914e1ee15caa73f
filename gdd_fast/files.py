"""Writing files so that a reader never sees half of one."""

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from gdd_fast.errors import ConfigError


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
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what processes killed while they wrote `path` have left; nobody may be writing it now."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{glob.escape(path.suffix)}"):
        leftover.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise `ConfigError` if `folder` cannot be made or written to. Creates nothing."""
    folder = folder.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{folder} cannot be a folder: {existing} is a file; choose another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written to: there is no permission for {existing}; choose another one")


def _sync_folder(folder: Path) -> None:
    """The rename itself is durable only once the folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
